"""The folder `out/` of a run: built beside its place, and put there as a whole once DATASET.json is in it.

Owns DATASET.json, when two data sets are the same, and how the folder is replaced. Refuses to decide what is in the data set.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from itertools import chain, groupby
from pathlib import Path
from typing import Any, TextIO

from opensora.dataset.rows import ClipFile, Source
from opensora.prepare.kept import sync
from opensora.prepare.manifest import Written

DATASET = "DATASET.json"
REPORT = "report.html"
MADE_OF = "made-of"
"""In `out.partial`: the digest of what it is being made of. What is there already is used again when it is still the same."""
_EXCHANGE, _HERE = 2, -100


@dataclass(frozen=True)
class Wanted:
    """What the data set is to be."""

    digest: str
    """Of its rows."""
    made_of: str
    """Of the configuration and the stages."""

    @property
    def mark(self) -> str:
        return f"{self.digest} {self.made_of}"


def read(out: Path) -> dict[str, Any]:
    """DATASET.json of a folder; empty: there is none that can be read."""
    with contextlib.suppress(OSError, ValueError):
        content = json.loads((out / DATASET).read_bytes())
        if isinstance(content, dict):
            return content
    return {}


def is_there(out: Path, wanted: Wanted) -> bool:
    """Whether this very data set is there, with all its files in their sizes."""
    content = read(out)
    try:
        return (content["digest"], content["made_of"]) == (wanted.digest, wanted.made_of) and all(
            (out / path).stat().st_size == about["size"] for path, about in content["files"].items()
        )
    except (KeyError, OSError, TypeError, AttributeError):
        return False


def begin(partial: Path, wanted: Wanted) -> None:
    """An empty folder, or what an interrupted run left of this very data set. Raises OSError."""
    with contextlib.suppress(OSError):
        if (partial / MADE_OF).read_text() == wanted.mark:
            return
    _remove(partial)
    (partial / "clips").mkdir(parents=True)
    (partial / MADE_OF).write_text(wanted.mark)


def link(source: Path | str, to: Path | str) -> None:
    """The same file under another name, or a copy where the file system has no such thing. Raises OSError."""
    with contextlib.suppress(FileExistsError):
        if _linked(source, to):
            return
    source, to = Path(source), Path(to)
    if to.exists() and to.stat().st_size == source.stat().st_size:
        return
    to.unlink(missing_ok=True)
    if not _linked(source, to):
        draft = to.with_name(f".{to.name}.partial")
        shutil.copyfile(source, draft)
        draft.replace(to)


def _linked(source: Path | str, to: Path | str) -> bool:
    """Raises FileExistsError."""
    try:
        os.link(source, to)
    except FileExistsError:
        raise
    except OSError:
        return False
    return True


def take_latents(out: Path, partial: Path, wanted: Wanted) -> None:
    """Latents of the same rows that `out` has already are not encoded again: they are linked."""
    if read(out).get("digest") != wanted.digest or (partial / "latents").exists() or not (out / "latents").is_dir():
        return
    for path in sorted((out / "latents").rglob("*")):
        to = partial / path.relative_to(out)
        if path.is_file() and not path.is_symlink():
            to.parent.mkdir(parents=True, exist_ok=True)
            link(path, to)


def finish(partial: Path, out: Path, content: Mapping[str, Any], sources: Iterable[Mapping[str, Any]], clips: Iterable[ClipFile]) -> None:
    """Write DATASET.json, and put the folder in its place. Raises OSError.

    Args:
        clips: the files in `clips/`, by their path. They were hashed, and are on the disk itself, since they were made.
    """
    (partial / MADE_OF).unlink(missing_ok=True)
    draft = partial / f".{DATASET}.partial"
    draft.unlink(missing_ok=True)
    others = files_of(partial)
    for name in others:
        sync(partial / name)
    files: Iterator[tuple[str, Any]] = chain(others.items(), ((one.path, {"size": one.size, "sha256": one.sha256}) for one in clips))
    with draft.open("w", encoding="utf-8", errors="replace") as file:  # row by row: of 400,000 clips it has 60 MB
        file.write(json.dumps(content, indent=1, ensure_ascii=False).removesuffix("\n}"))
        _rows(file, ',\n "sources": [', (_line(one) for one in sources), "]")
        _rows(file, ',\n "files": {', (f"{_line(name)}: {_line(about)}" for name, about in files), "}")
        file.write("\n}\n")
        file.flush()
        os.fsync(file.fileno())
    draft.replace(partial / DATASET)
    put(partial, out)


def _line(content: Any) -> str:
    return json.dumps(content, ensure_ascii=False)


def _rows(file: TextIO, begin: str, lines: Iterable[str], end: str) -> None:
    file.write(begin)
    between = "\n  "
    for line in lines:
        file.write(between + line)
        between = ",\n  "
    file.write(end)


def put(partial: Path, out: Path) -> None:
    """Give a folder the place of another in one operation; where the file system cannot exchange two, there is a moment without any."""
    if not out.exists():
        partial.rename(out)
    elif _exchanged(partial, out):
        shutil.rmtree(partial)
    else:
        old = out.with_name("out.old")
        out.rename(old)
        partial.rename(out)
        shutil.rmtree(old)


def recover(out: Path, partial: Path) -> None:
    """Where a run was killed in that moment, the older folder comes back; where it was killed while it took the older one away, the rest
    of that goes. Raises OSError."""
    old = out.with_name("out.old")
    if old.exists():
        shutil.rmtree(old) if out.exists() else old.rename(out)
    if not (partial / MADE_OF).exists():  # a folder that is being built has it until it is whole
        _remove(partial)


def _remove(partial: Path) -> None:
    if partial.is_symlink() or partial.is_file():
        partial.unlink()
    elif partial.exists():
        shutil.rmtree(partial)


def _exchanged(one: Path, other: Path) -> bool:
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    return int(rename(_HERE, os.fsencode(one), _HERE, os.fsencode(other), _EXCHANGE)) == 0


def files_of(partial: Path) -> dict[str, dict[str, Any]]:
    """By path: size and sha256 of every file but the clips."""
    files: dict[str, dict[str, Any]] = {}
    for path in _walk(partial):
        name = path.relative_to(partial).as_posix()
        if name not in (MADE_OF, DATASET):
            files[name] = {"size": path.stat().st_size, "sha256": _sha256(path)}
    return files


def description(
    name: str, wanted: Wanted, written: Written, config: Mapping[str, Any], steps: Mapping[str, Any], alone: Mapping[str, int]
) -> dict[str, Any]:
    """DATASET.json but for its sources and files. `alone`: by rule, how many clips it would drop if there were no other."""
    return {
        "schema": 1,
        "name": name,
        "digest": wanted.digest,
        "clips": written.clips,
        "seconds": round(written.seconds, 3),
        "frames": written.frames,
        "bytes": written.bytes,
        "config": config,
        "made_of": wanted.made_of,
        "code": code_version(),
        "steps": steps,
        "alone": dict(alone),
    }


def sources_of(sources: Iterable[tuple[Source, str, int]]) -> Iterator[dict[str, Any]]:
    """Sources that clips came from, in order, with the number of these. `sources`: `ClipRows.sources`."""
    for (name, sha256), some in groupby(sources, key=lambda one: (one[0].name, one[1])):
        rows = list(some)
        source = rows[0][0]
        yield {
            "name": name, "uri": source.provenance.uri or source.uri, "sha256": sha256, "licence": source.provenance.licence,
            "clips": sum(count for _, _, count in rows),
        }  # fmt: skip


def code_version() -> str:
    """Version of the installed package."""
    with contextlib.suppress(PackageNotFoundError):
        return version("osctl")
    return ""


def _walk(folder: Path) -> Iterator[Path]:
    """All files but those of `clips/`."""
    for place_, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if name != "clips" or place_ != str(folder))
        yield from (Path(place_, name) for name in sorted(names))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
