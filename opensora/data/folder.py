"""Clips from video files that a CSV names: a folder with its `captions.csv`, or a manifest.

Owns the CSV's rules and decoding with PyAV. The CSV starts with a header that names `path` and `text` (more columns are ignored). In a
folder paths are relative to it and stay inside; in a manifest they may also be absolute, or URIs of fsspec, and relative ones start at the
CSV's folder. What a person wrote wrong there is an error that names file and line. A video that cannot be used is left out with a reason,
never replaced by another one. Nothing is flipped here: `latents` does it, where it may.

A clip is frames 0, k, 2k … of its file (k = frame_interval): frames after the last one are not decoded, frames between are not converted.
Pictures (PNG, JPEG) are clips of one frame. Where a stage has several buckets, each file is asked once for its size
(`opensora.data.buckets` says where it goes); what its container says of frames is believed until it is decoded. A container that says
nothing is decoded, as far as the longest bucket needs.

With the manifest that was recorded at the launch (`opensora.data.manifest`) the digest is of contents and captions, whatever the place
and the dates of the files, and what is found is compared with it: captions, and sizes where they are cheap. Without one the digest counts
sizes and dates. Of a CSV's URIs sizes are not asked for, since a million requests at each start would take minutes: then names count.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import av
import fsspec
import numpy as np
import torch
from einops import rearrange
from numpy.typing import NDArray

from opensora.config import DataConfig, FolderSource, ManifestSource
from opensora.data.buckets import Size, choose, frames_needed, sizes, too_short
from opensora.data.manifest import CAPTIONS, UNKNOWN, DataManifest, Unknown, changed_since, parse_csv, told
from opensora.errors import ConfigError, DataError

VERSION = 2
"""Raised whenever the same files would give other pixels."""
READERS = 8
"""Files opened at once: most of a look at a small file is waiting."""

log = logging.getLogger(__name__)


class Unusable(Exception):
    """Why one file gives no clip."""


class FileClips:
    """The clips of a `FolderSource` or a `ManifestSource`. Implements `opensora.data.source.Clips`."""

    def __init__(self, data: DataConfig, recorded: DataManifest | None = None) -> None:
        """Reads the CSV and the files' dates; opens no video.

        Args:
            recorded: what the launch found; none: nobody wrote it down.

        Raises:
            ConfigError: for a folder or CSV that cannot be used.
            DataError: for one that is not what was recorded.
        """
        source = data.source
        if not isinstance(source, FolderSource | ManifestSource):
            raise TypeError(f"no files: {source.kind}")
        try:
            self._files, place = fsspec.core.url_to_fs(source.path)
        except (ValueError, ImportError) as error:
            raise ConfigError(f"data.source {source.path}: {error}. Give a path, or an address that fsspec knows") from error
        if isinstance(source, FolderSource):
            self._root = place
            self._paths, self.captions = _read_folder(self._files, place)
        else:
            self._root = place.rpartition("/")[0]
            self._paths, self.captions = _read_csv(self._files, place, inside=False)
            if len(self._paths) != source.clips:
                raise ConfigError(f"data.source.clips is {source.clips}, but {place} has {len(self._paths)} rows. Make them equal")
        self._listing = isinstance(source, FolderSource)
        self.sizes, self._interval = sizes(data), data.frame_interval
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

    def _digest_over(self, rows: Any) -> str:
        made_of = [VERSION, rows, self._interval, self.sizes]
        return hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()

    def _refuse_other(self, recorded: DataManifest, stamps: Sequence[list[Any] | None], place: str) -> None:
        """Raises DataError."""
        sizes = [self._size(path, stamp) for path, stamp in zip(self._paths, stamps, strict=True)]
        differences = changed_since(recorded, list(zip(self._paths, self.captions, strict=True)), sizes)
        if differences:
            raise DataError(
                f"data.source {place}: other clips than at the launch, {len(differences):,} rows changed ({told(differences)}). "
                "Put them back as they were, or see what goes on with: osctl launch --dry-run"
            )

    def _size(self, path: str, stamp: list[Any] | None) -> int | Unknown | None:
        if stamp is not None:
            return int(stamp[0])
        asked = self._listing or "file" in self._locate(path)[0].protocol
        return None if asked else UNKNOWN

    def __len__(self) -> int:
        return len(self._paths)

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
        return torch.stack(clips) if clips else torch.empty(0, *size, 3, dtype=torch.uint8), indices

    @cached_property
    def _members(self) -> list[list[int]]:
        """Clips of each bucket. With one there is nothing to choose, and decoding finds out what is too short."""
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
                    self._leave_out(path, too_short(size.frames, min(each.frames for each in self.sizes), self._interval))
                else:
                    members[bucket].append(index)
        return members

    def _leave_out(self, path: str, reason: str) -> None:
        if path not in self._skipped:
            log.warning("left out %s: %s", path, reason)
        self._skipped[path] = reason

    def _probe(self, path: str) -> Size | Unusable:
        """Of the whole file; an error is a value here, since others are being looked at beside it."""
        most = max(frames_needed(size.frames, self._interval) for size in self.sizes)
        try:
            with self._open(path) as file:
                return probe(file, most)
        except Unusable as reason:
            return reason
        except (FileNotFoundError, IsADirectoryError, PermissionError) as error:
            return Unusable(error.strerror or type(error).__name__)

    def _clip(self, path: str, size: Size) -> torch.Tensor | Unusable:
        """(T, H, W, 3), each frame fitted as soon as it is decoded: a long film at its own size may not fit in memory."""
        try:
            with self._open(path) as file:
                frames = [fit_frames(frame[None], size.height, size.width) for frame in _decode(file, size.frames, self._interval)]
        except Unusable as reason:
            return reason
        except (FileNotFoundError, IsADirectoryError, PermissionError) as error:
            return Unusable(error.strerror or type(error).__name__)
        return torch.cat(frames)

    def _open(self, path: str) -> Any:
        files, place = self._locate(path)
        return files.open(place, "rb")

    def _locate(self, path: str) -> tuple[Any, str]:
        if "://" in path:
            files, place = fsspec.core.url_to_fs(path)
            return files, place
        return (fsspec.filesystem("file"), path) if path.startswith("/") else (self._files, f"{self._root}/{path}")

    def _listed(self) -> list[list[Any] | None]:
        """Size and date of each file, from one listing of the folder."""
        found = {}
        for name, info in self._files.find(self._root, detail=True).items():
            found[name] = [info["size"], str(info.get("ETag") or info.get("mtime"))]
        return [found.get(f"{self._root}/{path}") for path in self._paths]

    def _dated(self) -> list[list[Any] | None]:
        """Size and date of each local file; none for what is elsewhere."""
        stamps: list[list[Any] | None] = []
        for path in self._paths:
            files, place = self._locate(path)
            try:
                found = Path(place).stat() if "file" in files.protocol else None
            except OSError:  # reading it will say why
                found = None
            stamps.append(None if found is None else [found.st_size, found.st_mtime_ns])
        return stamps


def probe(file: Any, most: int) -> Size:
    """Frames, rows and columns of a video (an open binary file or a path), from its container. Where that does not count frames they are
    decoded, at most `most`.

    Raises:
        Unusable: for what is no video.
    """
    try:
        with _opened(file) as container:
            stream = container.streams.video[0]
            if stream.frames > 0 and stream.height > 0 and stream.width > 0:
                return Size(stream.frames, stream.height, stream.width)
            seen, height, width = 0, 0, 0
            for frame in container.decode(stream):
                seen, height, width = seen + 1, frame.height, frame.width
                if seen == most:
                    break
    except av.FFmpegError as error:
        raise Unusable(f"cannot be decoded: {error.strerror}") from error
    if not seen:
        raise Unusable("no frames")
    return Size(seen, height, width)


def decode_frames(file: Any, frames: int, interval: int) -> NDArray[np.uint8]:
    """Frames 0, interval, 2·interval … of a video (an open binary file or a path), uint8 (frames, H, W, 3).

    Raises:
        Unusable: for what is no video, breaks off, or is too short.
    """
    return np.stack(list(_decode(file, frames, interval)))


def _decode(file: Any, frames: int, interval: int) -> Iterator[NDArray[np.uint8]]:
    seen = kept = 0
    try:
        with _opened(file) as container:
            for frame in container.decode(video=0):
                if seen % interval == 0:
                    yield frame.to_ndarray(format="rgb24")
                    kept += 1
                seen += 1
                if kept == frames:
                    return
    except av.FFmpegError as error:
        raise Unusable(f"cannot be decoded after {seen} frames: {error.strerror}") from error
    raise Unusable(too_short(seen, frames, interval))


@contextmanager
def _opened(file: Any) -> Iterator[Any]:
    """PyAV's container of a file with a video stream. Raises Unusable, av.FFmpegError."""
    if getattr(file, "size", None) == 0:  # PyAV seeks before the beginning of one: an error of the disk or of the network, by its class
        raise Unusable("the file is empty")
    # A title in another character set than UTF-8 is no reason to do without a clip: nobody reads it here.
    with av.open(file, metadata_errors="replace") as container:
        if not container.streams.video:
            raise Unusable("no video stream")
        yield container


def fit_frames(frames: NDArray[np.uint8], height: int, width: int) -> torch.Tensor:
    """uint8 (T, h, w, 3) → (T, height, width, 3): resized until both sides are covered, then the centre. The picture is never stretched."""
    pixels = rearrange(torch.from_numpy(frames), "t h w c -> t c h w")
    rows, columns = pixels.shape[-2:]
    scale = max(height / rows, width / columns)
    size = (max(round(rows * scale), height), max(round(columns * scale), width))
    if size != (rows, columns):
        resized = torch.nn.functional.interpolate(pixels.float(), size=size, mode="bilinear", align_corners=False, antialias=True)
        pixels = resized.round().clamp(0, 255).to(torch.uint8)
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    return rearrange(pixels[..., top : top + height, left : left + width], "t c h w -> t h w c").contiguous()


def _read_folder(files: Any, root: str) -> tuple[list[str], list[str]]:
    """Paths and captions, a row each. Raises ConfigError."""
    if not files.isdir(root):
        raise ConfigError(f"data.source {root}: no such folder. Give the folder that holds {CAPTIONS}")
    return _read_csv(files, f"{root}/{CAPTIONS}", inside=True)


def _read_csv(files: Any, name: str, *, inside: bool) -> tuple[list[str], list[str]]:
    """Paths and captions, a row each; `inside`: paths may not leave the CSV's folder. Raises ConfigError."""
    try:
        with files.open(name, "rt", encoding="utf-8-sig", newline="") as file:
            rows = parse_csv(file, name, inside=inside)
    except FileNotFoundError as error:
        raise ConfigError(f"{name}: no such file. Write one with the header path,text and a line per clip") from error
    except OSError as error:
        raise ConfigError(f"{name}: cannot be read ({error.strerror or error}). Mend the access to it") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{name}: not UTF-8 at byte {error.start}. Save it as UTF-8") from error
    return [path for path, _ in rows], [text for _, text in rows]
