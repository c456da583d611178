"""Clips from video files and their captions: a folder in one of the layouts that people have, or a table (manifest).

Owns which files are opened and what is said of them; `layouts` reads which clips there are, with which captions, and `video` owns what a
file shows. A video that cannot be used is left out with a reason, never replaced by another one. Nothing is flipped here: the latent cache
flips latents where the stage allows it.

A clip is frames 0, k, 2k … of its file (k = frame_interval), or those at 0, 1/fps, 2/fps … seconds: frames after the last one are not
decoded, frames between are not converted. Pictures (PNG, JPEG) are clips of one frame. If a stage has several buckets, the size of each
file is read once (`opensora.data.buckets` chooses its bucket): the first frame is decoded, and the container's count of frames is believed
until all frames are decoded. If the container has no count, frames are decoded and counted, as many as the longest bucket needs.

A clip may be a member of a tar (a WebDataset): its bytes are read where they lie in it.

Only regular files are opened: a pipe never ends, and a device has no content. If one file fails, only its clip is left out. But if another
machine (fsspec) cannot be reached, the stage ends: its clips are as good as before, and a short fault must not leave them out.

With the manifest that was recorded at the launch (`opensora.dataset.manifest`) the digest is over contents and captions, not over paths or
dates, and what is found is compared with the manifest: captions, and sizes if they are cheap to get. Without a manifest the digest is over
sizes and dates. For URIs in a CSV only the names count: sizes are not asked for, since a million requests at each start would take minutes.
A file of this machine is hashed before it is decoded, so that one that was replaced since the launch is never taken for the recorded one.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import stat
import statistics
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import fsspec

from opensora.config import DataConfig, FolderSource, ManifestSource
from opensora.data.buckets import Size, choose, frames_needed, sizes, too_short
from opensora.data.screen import Unusable
from opensora.data.video import Notes, probe
from opensora.data.video import decode as _decode
from opensora.dataset.layouts import Captioned, read_file, read_folder
from opensora.dataset.manifest import UNKNOWN, DataManifest, Unknown, changed_since, renamed, told
from opensora.dataset.places import Finder, Folder, is_local
from opensora.dataset.webdataset import Part
from opensora.errors import ConfigError, DataError
from opensora.printable import one_line, quoted

if TYPE_CHECKING:
    import torch

VERSION = 3
"""This number goes up whenever the same files would give other pixels."""
READERS = 8
"""Files opened at once: for a small file most of the time is waiting."""

NAMED = 20
"""How many clips are logged by name as soon as they are left out. The cache and the run directory list all of them."""
UNEVEN = 1.1
"""Frame rates that differ by more than this ratio are reported, since they show the same motion at different speeds."""
SPECIAL = {stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device", stat.S_IFDIR: "a folder"}

CHUNK = 1 << 20

Read = TypeVar("Read")
State = tuple[int, int, int, int]
"""The state of a file: inode, size, and the dates of its content and of its inode."""

log = logging.getLogger(__name__)


class FileClips:
    """The clips of a `FolderSource` or a `ManifestSource`. Implements `opensora.data.source.Clips`."""

    def __init__(self, data: DataConfig, recorded: DataManifest | None = None, *, first: int | None = None) -> None:
        """Read the CSV and the files' dates. No video is opened.

        Args:
            recorded: the manifest that the launch recorded. None means there is none.
            first: use only this many clips, to look at a data set. None means all.

        Raises:
            ConfigError: the folder or CSV cannot be used.
            DataError: the folder or CSV is not what was recorded.
        """
        source = data.source
        if not isinstance(source, FolderSource | ManifestSource):
            raise TypeError(f"no files: {source.kind}")
        try:
            self._files, place = fsspec.core.url_to_fs(source.path)
        except (ValueError, ImportError) as error:
            raise ConfigError(f"data.source {source.path}: {error}. Give a path, or an address that fsspec knows") from error
        self._finder = Finder()
        self._folder, self._read = _captioned(self._files, place, folder=isinstance(source, FolderSource))
        self._paths, self.captions = [row.path for row in self._read.rows], [row.text for row in self._read.rows]
        if isinstance(source, ManifestSource) and len(self._paths) != source.clips:
            raise ConfigError(f"data.source.clips is {source.clips}, but {place} has {len(self._paths)} rows. Make them equal")
        self.total = len(self._paths)
        self._paths, self.captions = self._paths[:first], self.captions[:first]
        self._listing = isinstance(source, FolderSource)
        self.sizes, self._interval = sizes(data), data.frame_interval
        self._fps = None if data.fps is None else Fraction(str(data.fps))
        self.notes: dict[str, tuple[int, Notes]] = {}
        self._recorded: dict[str, str | None] = {}
        """By path, the sha256 of each file at the launch. None means that the launch could not read it."""
        self._as_recorded: dict[str, State] = {}
        """By path, the state of each file when its content was last found equal to what was recorded."""
        self.words: Sequence[str] = ()
        self._skipped: dict[str, str] = {}
        self.skipped: Mapping[str, str] = self._skipped
        stamps = self._listed() if self._listing else self._dated()
        rows = [list(row) for row in zip(self._paths, self.captions, stamps, strict=True)]
        self.dated = self._digest_over(rows)
        self.digest = self.dated
        if recorded is not None:
            self._refuse_other(recorded, stamps, source.path)
            self.digest = self._digest_over(recorded.digest)
            if recorded.by == "content":
                self._recorded = dict(zip(self._paths, (row.sha256 for row in recorded.rows), strict=False))

    def _digest_over(self, rows: Any) -> str:
        made_of = [VERSION, rows, self._interval if self._fps is None else f"{self._fps} fps", self.sizes]
        return hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()

    def _refuse_other(self, recorded: DataManifest, stamps: Sequence[list[Any] | None], place: str) -> None:
        """Raise DataError if the clips are not those that were recorded."""
        sizes = [self._size(path, stamp) for path, stamp in zip(self._paths, stamps, strict=True)]
        rows = list(zip(self._paths, self.captions, strict=True))
        unknown = [number for number in renamed(recorded, rows) if isinstance(sizes[number], Unknown)]
        with ThreadPoolExecutor(READERS) as pool:
            for number, size in zip(unknown, pool.map(lambda number: self._asked(self._paths[number]), unknown), strict=True):
                sizes[number] = size
        differences = changed_since(recorded, rows, sizes)
        if differences:
            raise DataError(
                f"data.source {place}: other clips than at the launch, {len(differences):,} rows changed ({told(differences)}). "
                "Put them back as they were, and `osctl launch` goes on"
            )

    def _size(self, path: str, stamp: list[Any] | None) -> int | Unknown | None:
        if (member := self._read.members.get(path)) is not None:
            return member.size
        if stamp is not None:
            return UNKNOWN if stamp[0] is None else int(stamp[0])
        asked = self._read.listing is not None if self._listing else is_local(self._written(path)[0])
        return None if asked else UNKNOWN

    def _asked(self, path: str) -> int | Unknown:
        """The size of a file on another machine; UNKNOWN if its file system does not say."""
        try:
            files, place = self._locate(path)
            size = files.size(place)
        except Exception:  # noqa: BLE001 - file system clients raise their own kinds; reading the clip will say why
            return UNKNOWN
        return UNKNOWN if size is None else int(size)

    def __len__(self) -> int:
        return len(self._paths)

    @property
    def paths(self) -> Sequence[str]:
        """The path of clip i, as its row has it."""
        return self._paths

    @property
    def counts(self) -> tuple[int, ...]:
        return tuple(len(members) for members in self._members)

    def read(self, start: int, stop: int, bucket: int = 0) -> tuple[torch.Tensor, list[int]]:
        size, members = self.sizes[bucket], self._members[bucket][start:stop]
        clips, indices = [], []
        with ThreadPoolExecutor(min(READERS, os.cpu_count() or 1)) as pool:
            for index, clip in zip(members, pool.map(lambda index: self._clip(self._paths[index], size), members), strict=True):
                if isinstance(clip, Unusable):
                    self._leave_out(self._paths[index], str(clip))
                else:
                    clips.append(clip)
                    indices.append(index)
        import torch

        return torch.stack(clips) if clips else torch.empty(0, *size, 3, dtype=torch.uint8), indices

    @cached_property
    def _members(self) -> list[list[int]]:
        """The clips of each bucket. A single bucket has all clips; decoding finds out which are too short."""
        if len(self.sizes) == 1:
            return [list(range(len(self)))]
        members: list[list[int]] = [[] for _ in self.sizes]
        with ThreadPoolExecutor(READERS) as pool:
            for index, (path, size) in enumerate(zip(self._paths, pool.map(self._probe, self._paths), strict=True)):
                if isinstance(size, Unusable):
                    self._leave_out(path, str(size))
                    continue
                bucket = choose(size, self.sizes, self._interval)
                if bucket is None:
                    self._leave_out(path, too_short(size.frames, min(each.frames for each in self.sizes), self._interval, self._fps))
                else:
                    members[bucket].append(index)
        return members

    def _leave_out(self, path: str, reason: str) -> None:
        if path not in self._skipped and len(self._skipped) < NAMED:
            log.warning("left out %s: %s", quoted(path), one_line(reason))
        self._skipped[path] = reason

    @property
    def remarks(self) -> Sequence[str]:
        """Sentences about the layout and about the clips that were read so far, beside the clips that were left out."""
        films = {path: (frames, notes) for path, (frames, notes) in sorted(self.notes.items()) if frames > 1}
        interlaced = [path for path, (_, notes) in films.items() if notes.interlaced]
        said = [*self._read.remarks, *([self._uneven(films)] if self._fps is None else [])]
        if interlaced:
            said.append(f"{_files(interlaced)} interlaced: one field of each frame is used, which halves its rows")
        return [each for each in said if each]

    def _uneven(self, films: Mapping[str, tuple[int, Notes]]) -> str:
        """A sentence if clips of equally many frames last for different times, otherwise an empty string."""
        rates = {path: float((frames - 1) / notes.span) for path, (frames, notes) in films.items() if notes.span}
        if not rates or max(rates.values()) <= UNEVEN * min(rates.values()):
            return ""
        fast, slow = max(rates, key=rates.__getitem__), min(rates, key=rates.__getitem__)
        counted = "" if self._interval == 1 else " --set STAGE.data.frame_interval=1"
        told = " to ".join(f"{films[path][0]} frames in {float(films[path][1].span):.2f} s ({quoted(path)})" for path in (fast, slow))
        return (
            f"files have different frame rates, and frames are counted: {told}. So the same motion has different speeds. "
            f"Take frames by time: `osctl launch --set STAGE.data.fps={max(1, round(statistics.median_low(rates.values())))}{counted}`"
        )

    def _probe(self, path: str) -> Size | Unusable:
        """The size of the whole file."""
        most = max(frames_needed(size.frames, self._interval) for size in self.sizes)
        return self._reading(path, lambda file: probe(file, most, self._fps))

    def _clip(self, path: str, size: Size) -> torch.Tensor | Unusable:
        """(T, H, W, 3). Each frame is fitted as soon as it is decoded, since a long film at its own size may not fit in memory."""
        notes = Notes()

        def read(file: Any) -> torch.Tensor:
            frames = _decode(file, size.frames, self._interval, fps=self._fps, size=(size.height, size.width), notes=notes)
            import torch

            return torch.stack([torch.from_numpy(frame) for frame in frames])

        clip = self._reading(path, read)
        if not isinstance(clip, Unusable):
            self.notes[path] = size.frames, notes
        return clip

    def _reading(self, path: str, read: Callable[[Any], Read]) -> Read | Unusable:
        """What `read` makes of the open file. An error of the file is returned, since other files are read at the same time. Raises
        DataError if the place of the file cannot be reached, or the file has changed since the launch."""
        here = False  # a place that cannot be reached is on another machine
        try:
            files, place = self._locate(path)
            here = "file" in files.protocol
            if here:
                _refuse_special(place)
            with files.open(place, "rb") as whole:
                member = self._read.members.get(path)
                opened = whole if member is None else Part(whole, member.offset, member.size)
                file = opened if here else _Elsewhere(opened)
                if here:
                    self._refuse_changed(path, opened)
                made: Read | Unusable
                try:
                    made = read(file)
                except Unusable as reason:
                    if isinstance(file, _Elsewhere) and file.failed is not None:
                        raise file.failed from reason
                    made = reason
                if here:
                    self._refuse_changed(path, opened)
                return made
        except Unusable as reason:
            return reason
        except DataError:
            raise
        except (FileNotFoundError, IsADirectoryError, PermissionError) as error:
            if isinstance(error, FileNotFoundError) and here and self._recorded.get(path):
                raise DataError(f"{path}: was removed after the launch recorded it. Put it back, or launch again to record anew") from error
            return Unusable(error.strerror or type(error).__name__)
        except Exception as error:
            if not here:
                why = f"{type(error).__name__}: {error}"
                raise DataError(f"{quoted(path)}: cannot be read now ({why}). Mend the access to it, then launch again") from error
            return Unusable(error.strerror or str(error) if isinstance(error, OSError) else f"{type(error).__name__}: {error}")

    def _refuse_changed(self, path: str, file: Any) -> None:
        """Raise DataError if an open file of this machine is not what the launch hashed: its latents are kept under that digest for good.
        The file is hashed once, and again if its dates have changed since."""
        if path not in self._recorded:
            return
        state = _state(file)
        if state == self._as_recorded.get(path):
            return
        digest, was = hashlib.sha256(), self._recorded[path]
        file.seek(0)
        while chunk := file.read(CHUNK):
            digest.update(chunk)
        file.seek(0)
        if (now := digest.hexdigest()) != was:
            then = was[:12] if was else "not known"
            raise DataError(
                f"{path}: was changed after the launch recorded it (sha256 was {then}, is {now[:12]}). Launch again to record anew"
            )
        self._as_recorded[path] = state

    def _locate(self, path: str) -> tuple[Any, str]:
        """The file system and place of the file that a row names, whatever Unicode normal form its name has there."""
        files, place = self._written(path)
        return files, place if self._listing else self._finder.located(files, place)

    def _written(self, path: str) -> tuple[Any, str]:
        if not self._listing and "://" in path:
            files, place = fsspec.core.url_to_fs(path)
            return files, place
        if not self._listing and path.startswith("/"):
            return fsspec.filesystem("file"), path
        return self._files, self._folder.place(self._read.files.get(path, path))

    def _listed(self) -> list[list[Any] | None]:
        """Size and date of each file, from one listing of the folder. None means the file is not listed."""
        listing = self._read.listing or {}
        found = (listing.get(self._read.files.get(path, path)) for path in self._paths)
        return [None if entry is None else [entry.size, entry.date] for entry in found]

    def _dated(self) -> list[list[Any] | None]:
        """Size and date of each local file. None means the file is on another machine, or cannot be found."""
        stamps: list[list[Any] | None] = []
        for path in self._paths:
            try:
                found = Path(self._locate(path)[1]).stat() if is_local(self._written(path)[0]) else None
            except OSError:  # reading it will say why
                found = None
            stamps.append(None if found is None else [found.st_size, found.st_mtime_ns])
        return stamps


def _state(file: Any) -> State:
    found = os.fstat(file.fileno())
    return found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


class _Elsewhere:
    """A file on another machine. It remembers a failure to read, which says nothing about the file itself."""

    def __init__(self, file: Any) -> None:
        self._file, self.size = file, file.size
        self.failed: Exception | None = None

    def read(self, count: int = -1) -> bytes:
        try:
            return bytes(self._file.read(count))
        except Exception as error:
            self.failed = error
            raise

    def seek(self, place: int, whence: int = 0) -> int:
        return int(self._file.seek(place, whence))

    def tell(self) -> int:
        return int(self._file.tell())


def _refuse_special(place: str) -> None:
    """Raise Unusable if this is not a regular file. Raises OSError."""
    kind = stat.S_IFMT(Path(place).stat().st_mode)
    if kind != stat.S_IFREG:
        raise Unusable(f"{SPECIAL.get(kind, 'something else')}, not a regular file")


def _files(paths: Sequence[str]) -> str:
    """`a.mpg is`, `3 files are` …"""
    return f"{quoted(paths[0])} is" if len(paths) == 1 else f"{len(paths)} files ({quoted(paths[0])} …) are"


def _captioned(files: Any, place: str, *, folder: bool) -> tuple[Folder, Captioned]:
    """The folder that relative paths start from, and the captioned clips that are read there. Raises ConfigError."""
    root, _, name = (place, "", "") if folder else place.rpartition("/")
    where = Folder(files, root)
    try:
        return where, read_folder(where, place) if folder else read_file(where, name, place)
    except ConfigError:
        raise
    except Exception as error:  # file system clients raise their own kinds (botocore's, aiohttp's)
        said = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
        raise ConfigError(f"{place}: cannot be read ({said}). Mend the access to it") from error
