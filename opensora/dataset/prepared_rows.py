"""Rows of a prepared data set as its manifest has them, and the digest over them, for whoever makes or shortens one. Pure.

The digest counts of each row its id, its caption and its measures (3 significant digits), in the order of the rows; no latents and no bytes
of files: two machines may round those differently.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Measures = Mapping[str, float | str]
SETTINGS = "settings"
"""Column of manifest.parquet behind which the measures stand."""
BESIDE_CAPTION = ("language",)
"""Measures whose column stands among the caption's columns instead."""
ROWS_A_GROUP = 4096
"""Of manifest.parquet's row groups: what is held in memory at a time."""


def measures_of(row: Mapping[str, Any], columns: Sequence[str]) -> Measures:
    """Measures of a row of manifest.parquet, whose columns these are in their order. One that is null was not measured."""
    names = [*BESIDE_CAPTION, *columns[columns.index(SETTINGS) + 1 :]]
    return {name: row[name] for name in names if row.get(name) is not None}


def digest_of_rows(rows: Iterable[Mapping[str, Any]], columns: Sequence[str]) -> str:
    """`digest_of` over rows of manifest.parquet, whose columns these are in their order."""
    return digest_of((row["id"], row["caption"] or "", measures_of(row, columns)) for row in rows)


def digest_of(rows: Iterable[tuple[str, str, Measures]]) -> str:
    """sha256 over (id, caption, measures) of each row, in this order."""
    total = hashlib.sha256()
    for name, caption, measures in rows:
        counted = [name, caption, {column: _rounded(value) for column, value in sorted(measures.items())}]
        total.update(json.dumps(counted, ensure_ascii=True, separators=(",", ":")).encode() + b"\n")
    return total.hexdigest()


def _rounded(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value + 0.0:.3g}"
