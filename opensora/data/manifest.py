"""What a data set is: its rows in order, each the content of one file and its caption. Pure, and free of torch.

Owns the rules of a CSV of clips, the manifest of a data set as bytes, its digest, and in which rows two data sets differ. Refuses to open
files: who reads them gives sizes and digests in.

The digest counts of each row the sha256 of the file's content and the caption, in the CSV's order; neither the place nor the name of a
file. So the same clips and captions elsewhere are the same data set, and one other byte, one other word, or another order is another one
(a stage's position in the stream of clips counts rows). That a file could not be read is counted, why it could not is not: reading it
tomorrow gives another data set, another message does not. A manifest `by name` counts the path in place of the content, for data whose
files nobody wants to read for a digest; then whoever changes a file must give it another name.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import json
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import PurePosixPath
from typing import Any, Literal

from opensora.errors import ConfigError

CAPTIONS = "captions.csv"
COLUMNS = ("path", "text")
SCHEMA = 1

By = Literal["content", "name"]


class Unknown:
    """Of a size: nobody asked. (`None` says that there is no file.)"""


UNKNOWN = Unknown()


@dataclass(frozen=True, slots=True)
class Row:
    """One clip of a data set."""

    path: str
    """As the CSV has it."""
    text: str
    """Caption."""
    size: int | None
    """Bytes; none: the file could not be read, or nobody asked (`by name`)."""
    sha256: str | None
    """Of the content, in hex; none as for `size`."""


@dataclass(frozen=True)
class DataManifest:
    """A data set."""

    rows: tuple[Row, ...]
    by: By = "content"

    @cached_property
    def digest(self) -> str:
        """sha256 in hex over contents and captions in their order."""
        counted = hashlib.sha256(b"osctl data set 1\n")
        for row in self.rows:
            content = f"name {row.path}" if self.by == "name" else row.sha256
            counted.update(json.dumps([content, row.text], ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n")
        return counted.hexdigest()

    @property
    def size(self) -> int:
        """Bytes of all files that could be read."""
        return sum(row.size or 0 for row in self.rows)

    @property
    def unreadable(self) -> int:
        """Rows whose file could not be read."""
        return 0 if self.by == "name" else sum(row.sha256 is None for row in self.rows)

    def encode(self) -> bytes:
        """JSON lines in gzip: a header, then a row each. Equal manifests give equal bytes."""
        header = {"schema": SCHEMA, "digest": self.digest, "rows": len(self.rows), "bytes": self.size, "by": self.by}
        lines: list[Any] = [header, *([row.path, row.text, row.size, row.sha256] for row in self.rows)]
        return gzip.compress("".join(json.dumps(line) + "\n" for line in lines).encode(), 6, mtime=0)

    @classmethod
    def decode(cls, data: bytes) -> DataManifest:
        """Raises ValueError, where it is not whole or not what its digest says."""
        try:
            lines = gzip.decompress(data).splitlines()
            header = json.loads(lines[0])
            if header["schema"] != SCHEMA or header["by"] not in ("content", "name"):
                raise ValueError(f"schema {header['schema']} by {header['by']}, this version reads {SCHEMA} by content or name")
            manifest = cls(tuple(Row(*json.loads(line)) for line in lines[1:]), header["by"])
            if len(manifest.rows) != header["rows"] or manifest.digest != header["digest"]:
                found, said = manifest.digest[:12], str(header["digest"])[:12]
                raise ValueError(f"{len(manifest.rows)} rows of digest {found}, its header says {header['rows']} of {said}")
        except (OSError, EOFError, zlib.error, IndexError, KeyError, TypeError) as error:
            raise ValueError(f"no manifest of a data set ({type(error).__name__}: {error})") from error
        return manifest


# --- In what two data sets differ -------------------------------------------------------------------------------------------------------

Kind = Literal["added", "removed", "caption", "content", "order"]


@dataclass(frozen=True)
class RowDifference:
    """One row in which two data sets differ."""

    path: str
    """In the new one, where the row is in it; empty: of the whole (`order`)."""
    kind: Kind
    old: str | None = None
    new: str | None = None

    def __str__(self) -> str:
        match self.kind:
            case "caption":
                return f"{self.path}: caption was {_short(self.old)}, is {_short(self.new)}"
            case "content":
                return f"{self.path}: content was {_digits(self.old)}, is {_digits(self.new)}"
            case "order":
                return f"the same rows in another order, from row {self.new} on"
        return f"{self.path}: {self.kind}"


def rows_that_differ(old: DataManifest, new: DataManifest) -> list[RowDifference]:
    """By path, in the order of the new one, removed rows last. A file that has only moved (same content, another path) is no difference."""
    before = {row.path: row for row in old.rows}
    after = {row.path for row in new.rows}
    moved = {row.sha256: row for row in old.rows if row.path not in after and row.sha256}
    found: list[RowDifference] = []
    matched: set[str] = set()
    for row in new.rows:
        was = before.get(row.path) or moved.get(row.sha256 or "")
        if was is None or was.path in matched:
            found.append(RowDifference(row.path, "added"))
            continue
        matched.add(was.path)
        if was.text != row.text:
            found.append(RowDifference(row.path, "caption", was.text, row.text))
        if old.by == new.by == "content" and was.sha256 != row.sha256:
            found.append(RowDifference(row.path, "content", was.sha256 or "unreadable", row.sha256 or "unreadable"))
    found += [RowDifference(row.path, "removed") for row in old.rows if row.path not in matched]
    if not found and old.digest != new.digest:
        pairs = zip(old.rows, new.rows, strict=False)
        first = next((number for number, (one, other) in enumerate(pairs, 1) if (one.sha256, one.text) != (other.sha256, other.text)), 1)
        found.append(RowDifference("", "order", new=str(first)))
    return found


def told(differences: Sequence[RowDifference], most: int = 5) -> str:
    """The first of them for a message, and how many more there are."""
    more = f"; and {len(differences) - most:,} more" if len(differences) > most else ""
    return "; ".join(map(str, differences[:most])) + more


def _short(text: str | None) -> str:
    shown = repr(text or "")
    return shown if len(shown) <= 60 else f"{shown[:57]}…'"


def _digits(content: str | None) -> str:
    return content[:12] if content is not None and len(content) == 64 else str(content)


# --- The CSV ----------------------------------------------------------------------------------------------------------------------------


def parse_csv(lines: Iterable[str], name: str, *, inside: bool) -> list[tuple[str, str]]:
    """Path and caption of each row. `inside`: paths may not leave the CSV's folder. Raises ConfigError, which names file and line."""
    rows: list[tuple[str, str]] = []
    seen: dict[str, int] = {}
    header: list[str] = []
    reader = csv.reader(lines, strict=True)
    try:
        for row in reader:
            if not row:
                continue
            if not header:
                header = _header(row, f"{name}:{reader.line_num}")
                continue
            path, text = _row(row, header, f"{name}:{reader.line_num}", inside)
            if path in seen:
                raise ConfigError(f"{name}:{reader.line_num}: {path} is on line {seen[path]} already. Keep one of the two")
            seen[path] = reader.line_num
            rows.append((path, text))
    except csv.Error as error:
        raise ConfigError(f"{name}:{reader.line_num}: {error}. Mend the line") from error
    if not rows:
        raise ConfigError(f"{name}: no clips. Write the header path,text and a line per clip")
    return rows


def _header(row: list[str], place: str) -> list[str]:
    names = [cell.strip() for cell in row]
    for column in COLUMNS:
        if names.count(column) != 1:
            raise ConfigError(f"{place}: the header is {','.join(row)}, it must name {' and '.join(COLUMNS)} once each")
    return names


def _row(row: list[str], header: list[str], place: str, inside: bool) -> tuple[str, str]:
    if len(row) != len(header):
        raise ConfigError(f"{place}: {len(row)} columns, the header has {len(header)}. Quote texts that hold a comma")
    path, text = (row[header.index(column)].strip() for column in COLUMNS)
    if not text:
        raise ConfigError(f"{place}: {path or 'the row'} has no text. Write a caption or drop the line")
    pure = PurePosixPath(path)
    if not inside:
        if not path:
            raise ConfigError(f"{place}: no path. Give a file relative to the CSV's folder, an absolute one or a URI")
        return path if "://" in path else str(pure), text
    if not path or pure.is_absolute() or ".." in pure.parts or "\\" in path:
        raise ConfigError(f"{place}: path {path!r} does not lie inside the folder. Give it relative to the folder, with /")
    return str(pure), text


# --- What a trainer finds, against what was recorded --------------------------------------------------------------------------------------


def changed_since(recorded: DataManifest, rows: Sequence[tuple[str, str]], sizes: Sequence[int | Unknown | None]) -> list[RowDifference]:
    """What is no longer as recorded, as far as captions and sizes tell: they are cheap. The same size with other content is found when a
    launch looks at the data.

    Args:
        rows: path and caption of each, as they are now. Where not one path is as it was, rows are compared by their numbers.
        sizes: of the files; None: no such file.
    """
    paths = {row.path: row for row in recorded.rows}
    moved = len(rows) == len(recorded.rows) and not any(path in paths for path, _ in rows)
    found = []
    for number, ((path, text), size) in enumerate(zip(rows, sizes, strict=True)):
        name = recorded.rows[number].path if moved else path
        was = paths.get(name)
        same = was is not None and (isinstance(size, Unknown) or size == was.size)
        content = was.sha256 if was is not None and same else None if size is None else f"{size:,} bytes"
        found.append(Row(name, text, None, content))
    return rows_that_differ(recorded, DataManifest(tuple(found), recorded.by))
