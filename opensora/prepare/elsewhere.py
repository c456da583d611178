"""A row on a machine that has none of the engine's files: its source is fetched there, or its file comes along; what it writes goes back.

Owns the scratch folder of a machine: sources lie there under a bound, the longest unused leave first, and all rows of the machine share
them. Refuses to know engines and what the functions do. Runs in guards.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from opensora.dataset.prepare_config import Download
from opensora.dataset.rows import Fetched, Leaves, Quarantine, Source
from opensora.prepare import guarded
from opensora.prepare.steps import Inspected

WITHIN_S = 300.0
"""A fetch may take as long as it likes, while bytes arrive: each time it looks up it may take so long again."""

Fetch = Callable[[Source, Path, Download, Callable[[], bool], int], Fetched]


@dataclass(frozen=True)
class There:
    """A row, and what it takes to work on it there."""

    function: Callable[[Any], Any]
    row: Any
    """Has `path`; may have `source`, `sha256` and `to`."""
    data: bytes | None
    """Of the file that `path` names, where it comes along."""
    fetch: Fetch
    download: Download
    max_bytes: int
    """Of a source."""
    scratch: str
    """Folder; empty: one in the system's folder for what is temporary."""
    most_bytes: int
    """Of sources that no row works on."""


@dataclass(frozen=True)
class Back:
    result: Any
    data: bytes | None
    """What the function wrote to `row.to`."""


def there(row: There) -> Back:
    """Call the function. Raises what it raises; Quarantine, where its file cannot be had."""
    folder = Path(row.scratch or Path(tempfile.gettempdir()) / f"osctl-scratch-{os.getuid()}")
    work = folder / "work" / str(os.getpid())
    work.mkdir(mode=0o700, parents=True, exist_ok=True)
    try:
        return _called(row, folder, work)
    finally:
        for left in work.iterdir():
            left.unlink()


def _called(row: There, folder: Path, work: Path) -> Back:
    inner, fetched = row.row, None
    source: Source | None = getattr(inner, "source", None)
    if source is not None:
        try:
            fetched, path = _brought(row, source, folder, work)
        except Leaves as leaves:
            if hasattr(inner, "to"):
                raise
            return Back(Inspected(leaves, None, leaves), None)
        inner = replace(inner, path=path)
    elif row.data is not None:
        (work / "given").write_bytes(row.data)
        inner = replace(inner, path=str(work / "given"))
    elif not Path(inner.path).exists():
        raise Quarantine("not on this node", f"{inner.path}: nodes share no files. Name sources by address, or mount them on all nodes")
    if not hasattr(inner, "to"):
        result = row.function(inner)
        return Back(replace(result, fetched=replace(fetched, path="")) if fetched is not None else result, None)
    to = work / "written.mp4"
    result = row.function(replace(inner, to=str(to)))
    return Back(result, to.read_bytes())


def _brought(row: There, source: Source, folder: Path, work: Path) -> tuple[Fetched, str]:
    """A source under a name of this process's own, so that nobody takes it away. Raises Leaves."""
    looked = 0.0

    def look() -> bool:
        nonlocal looked
        if (now := time.monotonic()) - looked > 1:
            guarded.allow(WITHIN_S)
            looked = now
        return False

    mine = work / "source"
    for _ in range(3):
        make_room(folder, row.most_bytes)
        fetched = row.fetch(source, folder / "sources", row.download, look, row.max_bytes)
        with contextlib.suppress(FileNotFoundError):  # another row made room in this moment
            os.utime(fetched.path)
            mine.hardlink_to(fetched.path)
            break
    else:
        raise Quarantine("no room", f"{folder}: taken away three times before it was opened. Raise ray.scratch_gb")
    if row.row.sha256 and fetched.sha256 != row.row.sha256:
        raise Quarantine("source has changed", f"{source.uri} has other content now")
    guarded.tell(replace(fetched, path=""))
    return fetched, str(mine)


def make_room(folder: Path, most_bytes: int) -> None:
    """Remove the longest unused sources until the rest has so many bytes, and what processes that ended have left."""
    for left in _inside(folder / "work"):
        if not Path(f"/proc/{left.name}").exists():
            for file in _inside(left):
                file.unlink(missing_ok=True)
            with contextlib.suppress(OSError):
                left.rmdir()
    found = []
    for path in _inside(folder / "sources"):
        with contextlib.suppress(FileNotFoundError):
            if path.is_file() and path.suffix not in (".lock", ".part", ".json", ".new"):
                known = path.stat()
                found.append((known.st_mtime, known.st_size, path))
    total = sum(size for _, size, _ in found)
    for _, size, path in sorted(found):
        if total <= most_bytes:
            return
        path.unlink(missing_ok=True)
        total -= size


def _inside(folder: Path) -> Iterator[Path]:
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        yield from list(folder.iterdir())
