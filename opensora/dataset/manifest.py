"""What a data set is: its rows in order, each the content of one file and its caption. Pure, and free of torch.

Owns the manifest of a data set as bytes, its digest, and in which rows two data sets differ. Refuses to open files: `layouts` reads
captions, and who reads clips gives sizes and digests in.

The digest counts of each row the sha256 of the file's content and the caption, in the order of the rows; neither the place nor the name of
a file. So the same clips and captions elsewhere are the same data set, and one other byte, one other word, or another order is another one
(a stage's position in the stream of clips counts rows). That a file could not be read is counted, why it could not is not: reading it
tomorrow gives another data set, another message does not. A manifest `by name` counts the path in place of the content, for data whose
files nobody wants to read for a digest; then whoever changes a file must give it another name.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from opensora.printable import several

SCHEMA = 1

By = Literal["content", "name"]


class Unknown:
    """Of a size: nobody asked. (`None` says that there is no file.)"""


UNKNOWN = Unknown()


@dataclass(frozen=True, slots=True)
class Row:
    """One clip of a data set."""

    path: str
    """As the captions have it."""
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
                raise ValueError(f"{several(len(manifest.rows), 'row')} of digest {found}, its header says {header['rows']} of {said}")
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


# --- What a trainer finds, against what was recorded --------------------------------------------------------------------------------------


def changed_since(recorded: DataManifest, rows: Sequence[tuple[str, str]], sizes: Sequence[int | Unknown | None]) -> list[RowDifference]:
    """What is no longer as recorded, as far as captions and sizes tell: they are cheap. The same size with other content is found when a
    launch looks at the data, and when a trainer decodes it.

    Names of files are free, as they are in the digest: the manifest in a store has those of whoever wrote it first. But `by name` they
    count, and where nobody asked for a size nothing else tells one file from another.

    Args:
        rows: path and caption of each, as they are now. Where not one path is as it was, rows are compared by their numbers.
        sizes: of the files; None: no such file. Of rows that are `renamed` they had better be known.
    """
    paths = {row.path: row for row in recorded.rows}
    moved = _all_moved(recorded, rows)
    by_number = recorded.by == "content" and len(rows) == len(recorded.rows)
    if by_number and all(
        text == was.text and (path == was.path or moved if isinstance(size, Unknown) else size == was.size)
        for was, (path, text), size in zip(recorded.rows, rows, sizes, strict=True)
    ):
        return []
    now = {path for path, _ in rows}
    found = []
    for number, ((path, text), size) in enumerate(zip(rows, sizes, strict=True)):
        there = recorded.rows[number] if moved or (by_number and path not in paths) else None
        name = there.path if there is not None and (moved or (there.path not in now and there.size == size)) else path
        was = paths.get(name)
        same = was is not None and (isinstance(size, Unknown) or size == was.size)
        content = was.sha256 if was is not None and same else None if size is None else _bytes(size)
        found.append(Row(name, text, None, content))
    return rows_that_differ(recorded, DataManifest(tuple(found), recorded.by))


def _bytes(size: int | Unknown) -> str:
    return "unknown" if isinstance(size, Unknown) else f"{size:,} bytes"


def renamed(recorded: DataManifest, rows: Sequence[tuple[str, str]]) -> list[int]:
    """Numbers of the rows whose file had another name when it was recorded. None where all of them lie elsewhere, or rows came or went."""
    if recorded.by == "name" or len(rows) != len(recorded.rows) or _all_moved(recorded, rows):
        return []
    return [number for number, (was, (path, _)) in enumerate(zip(recorded.rows, rows, strict=True)) if was.path != path]


def _all_moved(recorded: DataManifest, rows: Sequence[tuple[str, str]]) -> bool:
    paths = {row.path for row in recorded.rows}
    return len(rows) == len(recorded.rows) and not any(path in paths for path, _ in rows)
