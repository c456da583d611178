"""Results of steps as the run directory keeps them, in packs (`opensora.dataset.kept_packs`): read for people, and found for taking them
out. Releases before 0.3.0 kept each in a file of its own, `kept/STEP/DIGEST/KE/KEY.json`: those are read, too.

    {"row":{…}}                          the step's result
    {"drop":{"reason":…,"detail":…}}     it was not wanted
    {"quarantine":{…}}                   it could not be worked on; these lie below `quarantined/`, since they are tried again

Owns the reading. Refuses to write, and to fail over a file that is no result: it counts as not there.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opensora.dataset.kept_packs import SUFFIX, Packs, lines, packs_in
from opensora.dataset.rows import Drop, Fetched, Leaves, Looked, Media, Quarantine, Shot, clip_id, from_json


@dataclass(frozen=True)
class Found:
    """What is known of a source."""

    fetched: Fetched
    key: str
    """Under which what was seen of it is kept."""
    digest: str
    """Of the one decode's settings."""
    media: Media | Leaves | None
    looked: Looked | Leaves | None

    def clips(self) -> list[tuple[str, Shot]]:
        """(id, shot) of each clip, by its start."""
        if not isinstance(self.looked, Looked):
            return []
        shots = sorted(self.looked.shots, key=lambda shot: shot.start_pts)
        return [(clip_id(self.fetched.sha256, shot.start_pts, shot.end_pts, self.digest), shot) for shot in shots]


class KeptResults:
    """Leaving its `with` closes the packs that were asked."""

    def __init__(self, run_dir: Path, digests: dict[str, str] | None = None) -> None:
        """
        Args:
            digests: by step, under which the current settings keep their results; of the others those that were written last count.
        """
        self.run_dir, self.root, self._digests = run_dir, run_dir / "kept", digests or {}
        self._packs: dict[Path, Packs] = {}
        """As they were when they were first asked."""

    def __enter__(self) -> KeptResults:
        return self

    def __exit__(self, *_: object) -> None:
        for packs in self._packs.values():
            packs.close()

    def digest(self, step: str) -> str:
        """Empty: nothing is kept of it."""
        if step in self._digests:
            return self._digests[step]
        folders = self.all_digests(step)
        return max(folders, key=lambda name: (self.root / step / name).stat().st_mtime_ns, default="")

    def all_digests(self, step: str) -> list[str]:
        folder = self.root / step
        return sorted(one.name for one in folder.iterdir() if one.is_dir()) if folder.is_dir() else []

    def read(self, step: str, key: str, digest: str | None = None) -> Any:
        """The row as JSON has it, or how it left; None: nothing."""
        digest = self.digest(step) if digest is None else digest
        if not digest:
            return None
        folder = self.root / step / digest
        if folder not in self._packs:
            self._packs[folder] = Packs(str(folder))
        for data in self._packs[folder].contents(key):
            if (found := _decoded(data)) is not None:
                return found
        for root in (self.root, self.run_dir / "quarantined"):
            if (found := _read(root / step / digest / key[:2] / f"{key}.json")) is not None:
                return found
        return None

    def rows(self, step: str, digest: str) -> Iterator[tuple[str, Any]]:
        """(key, row or how it left) of all that is kept and can be read; a key may come twice, the one that counts first."""
        for key, data in self._data(step, digest):
            if (found := _decoded(data)) is not None:
                yield key, found

    def packs_with(self, keys: Collection[str], step: str, digest: str) -> list[str]:
        """Names, relative to `kept`, of packs that have a result of one of these keys."""
        folder = self.root / step / digest
        return [
            f"{step}/{digest}/{name}"
            for name in packs_in(folder)
            if name.endswith(SUFFIX) and any(key in keys for key, _ in lines(folder / name))
        ]

    def path(self, step: str, key: str, digest: str, suffix: str = ".json") -> str:
        """Relative to `kept`."""
        return f"{step}/{digest}/{key[:2]}/{key}{suffix}"

    def sources(self) -> Iterator[tuple[str, Fetched | Leaves]]:
        """(key, what is known) of every source that was fetched, or could not be. Of a file that changed, as it was kept last."""
        keys = Counter(key for digest in self.all_digests("download") for key in self._keys("download", digest))
        several: dict[str, tuple[int, Any]] = {}
        seen = set[str]()
        for key, stamp, found in self._downloads():
            if keys[key] > 1:
                several[key] = max(several.get(key, (-1, None)), (stamp, found), key=lambda one: one[0])
                continue
            row = found if isinstance(found, Leaves) else _as(Fetched, found)
            if key not in seen and row is not None:
                seen.add(key)
                yield key, row
        for key, (_, found) in several.items():
            if (row := found if isinstance(found, Leaves) else _as(Fetched, found)) is not None:
                yield key, row

    def all_fetched(self) -> list[tuple[str, Fetched]]:
        """(key, what is known) of every state of every source that was fetched."""
        rows = ((key, _as(Fetched, found)) for key, _, found in self._downloads() if not isinstance(found, Leaves))
        return [(key, row) for key, row in rows if row is not None]

    def _downloads(self) -> Iterator[tuple[str, int, Any]]:
        """(key, date of the file in nanoseconds or 0, row or how it left); those that were put aside come last."""
        current = self.digest("download")
        for digest in sorted({current, *self.all_digests("download")} - {""}):
            for key, data in self._data("download", digest):
                if (found := _decoded(data)) is not None:
                    yield key, _date(data), found
        for path in sorted((self.run_dir / "quarantined/download" / (current or "none")).rglob("*.json")):
            if (found := _read(path)) is not None:
                yield path.stem, -1, found

    def _data(self, step: str, digest: str) -> Iterator[tuple[str, bytes]]:
        folder = self.root / step / digest
        for name in packs_in(folder):
            yield from lines(folder / name)
        for path in sorted(folder.rglob("*.json")):
            with contextlib.suppress(OSError):
                yield path.stem, path.read_bytes()

    def _keys(self, step: str, digest: str) -> Iterator[str]:
        folder = self.root / step / digest
        for name in packs_in(folder):
            yield from (key for key, _ in lines(folder / name))
        yield from (path.stem for path in folder.rglob("*.json"))

    def found(self, fetched: Fetched, digest: str | None = None) -> Found:
        """What was seen of a source. `digest`: of the one decode; None: the current one."""
        digest = self.digest("frames") if digest is None else digest
        key = content_key(fetched)
        media, looked = self.read("probe", key), self.read("frames", key, digest)
        return Found(
            fetched, key, digest,
            media if isinstance(media, Leaves) else _as(Media, media), looked if isinstance(looked, Leaves) else _as(Looked, looked),
        )  # fmt: skip

    def captions(self, keys: Collection[str]) -> Iterator[str]:
        """The texts that are kept under these keys, of whatever prompt and model."""
        for digest in self.all_digests("caption"):
            for key in keys:
                if isinstance(found := self.read("caption", key, digest), dict):
                    yield str(found.get("text", ""))

    def caption_keys(self, fetched: Fetched, clip: str) -> tuple[str, str]:
        """Under which a clip's caption may be kept: of a model, and of one that came along."""
        provenance = fetched.source.provenance
        return clip, key_of(clip, provenance.caption, provenance.segments)


def content_key(fetched: Fetched) -> str:
    """Under which probe and look are kept: the file's content, and the parts of it that a list names."""
    bounds = tuple((start, end) for start, end, _ in fetched.source.provenance.segments)
    return key_of(fetched.sha256, bounds) if bounds else fetched.sha256[:20]


def key_of(*content: object) -> str:
    """20 hex digits, as the engine names results."""
    return hashlib.sha256("\0".join(map(str, content)).encode(errors="surrogateescape")).hexdigest()[:20]


def _as(kind: Any, content: Any) -> Any:
    if content is None:
        return None
    try:
        return from_json(kind, json.dumps(content))
    except ValueError:
        return None


def _date(data: bytes) -> int:
    """Of the file that a result was made from, as its stamp says: size, a dash, nanoseconds."""
    found = re.search(rb',"stamp":"\d+-(\d+)"}$', data)
    return int(found[1]) if found else 0


def _read(path: Path) -> Any:
    try:
        return _decoded(path.read_bytes())
    except OSError:
        return None


def _decoded(data: bytes) -> Any:
    try:
        content = json.loads(data)
        if "row" in content:
            return content["row"]
        for name, kind in (("drop", Drop), ("quarantine", Quarantine)):
            if name in content:
                return kind(str(content[name]["reason"]), str(content[name]["detail"]))
    except (ValueError, KeyError, TypeError):
        return None  # as the engine has it: a result that cannot be read is made again by the next run
    return None
