"""Parquet tables of clips and captions: the columns that `tables` knows, of Open-Sora 2.0, OpenVid and the like.

Owns which two columns are read, and of what type they must be. Refuses to read others: a table may hold whole videos beside them.
"""

from __future__ import annotations

from typing import Any

from opensora.dataset.tables import FILE_COLUMNS, TEXT_COLUMNS, Record, Table, column_of
from opensora.errors import ConfigError
from opensora.printable import quoted

LONGEST = 1 << 20
"""Characters of a caption: a column may pack a million of long ones into a few bytes."""
BATCH = 256
"""Rows in memory at a time, beside those that were read."""


def read_parquet(file: Any, name: str) -> Table:
    """The rows of an open file. `name`: how messages call it. Raises ConfigError, and what its file system says."""
    import pyarrow as arrow
    import pyarrow.parquet as parquet

    try:
        table = parquet.ParquetFile(file, page_checksum_verification=False)
        names = table.schema_arrow.names
        path, text = (_column(names, known, what, name) for known, what in ((FILE_COLUMNS, "files"), (TEXT_COLUMNS, "captions")))
        for column in (path, text):
            kind = table.schema_arrow.field(column).type
            if not (arrow.types.is_string(kind) or arrow.types.is_large_string(kind) or _is_dictionary_of_text(kind, arrow)):
                raise ConfigError(
                    f"{name}: column {quoted(column, 60)} is of type {quoted(str(kind), 60)}, texts are needed. {_advice(column, path)}"
                )
        records: list[Record] = []
        for batch in table.iter_batches(batch_size=BATCH, columns=[path, text]):
            for cells in zip(batch.column(path), batch.column(text), strict=True):
                records.append(_record(len(records) + 1, cells[0].as_py(), cells[1].as_py(), (path, text), name))
    except (arrow.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise ConfigError(f"{name}: no Parquet, or cut off ({' '.join(str(error).split())[:160]}). Fetch or write it again") from None
    if not records:
        raise ConfigError(f"{name}: no clips. Write a row with path and text per clip")
    return Table(records, f"columns {path} and {text}")


def _column(names: list[str], known: tuple[str, ...], what: str, name: str) -> str:
    if not any(one.strip().casefold() in known for one in names):
        shown = quoted(",".join(names), 120)
        raise ConfigError(f"{name}: no column of {what} among {shown}. Call it {known[0]}")
    return names[column_of([one.strip() for one in names], known, name)]


def _advice(column: str, path: str) -> str:
    if column == path:
        return "Write the videos into files, and their paths into this column"
    return "Write one text a row"


def _is_dictionary_of_text(kind: Any, arrow: Any) -> bool:
    return bool(arrow.types.is_dictionary(kind) and arrow.types.is_string(kind.value_type))


def _record(row: int, path: str | None, text: str | None, columns: tuple[str, str], name: str) -> Record:
    for column, value in zip(columns, (path, text), strict=True):
        if value is not None and (len(value) > LONGEST or "\0" in value):
            fact = f"{len(value):,} characters, at most {LONGEST:,} are read" if len(value) > LONGEST else "holds NUL"
            raise ConfigError(f"{name}:{row}: {quoted(column, 60)}: {fact}. Write it anew")
    return Record(row, path or "", (text or "").strip())
