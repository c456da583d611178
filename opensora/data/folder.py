"""Clips from a folder of video files and its `captions.csv`.

Owns the CSV's rules and decoding with PyAV. The CSV starts with a header that names `path` and `text` (more columns are ignored); paths are
relative to the folder and stay inside it. What a person wrote wrong there is an error that names file and line. A video that cannot be used
is left out with a reason, never replaced by another one. Nothing is flipped: captions say left and right.

A clip is frames 0, k, 2k … of its file (k = frame_interval): frames after the last one are not decoded, frames between are not converted.
Pictures (PNG, JPEG) are clips of one frame.
"""

from __future__ import annotations

import csv
import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any

import av
import fsspec
import numpy as np
import torch
from einops import rearrange
from numpy.typing import NDArray

from opensora.config import DataConfig, FolderSource
from opensora.errors import ConfigError

CAPTIONS = "captions.csv"
COLUMNS = ("path", "text")
VERSION = 1
"""Raised whenever the same files would give other pixels."""

log = logging.getLogger(__name__)


class Unusable(Exception):
    """Why one file gives no clip."""


class FolderClips:
    """The clips of a `FolderSource`. Implements `opensora.data.source.Clips`."""

    def __init__(self, data: DataConfig) -> None:
        """Reads the CSV and lists the folder; decodes nothing.

        Raises:
            ConfigError: for a folder or CSV that cannot be used.
        """
        if not isinstance(data.source, FolderSource):
            raise TypeError(f"not a folder: {data.source.kind}")
        self._data = data
        self._files, self._root = fsspec.core.url_to_fs(data.source.path)
        self._paths, self.captions = _read_captions(self._files, self._root)
        self.words: Sequence[str] = ()
        self._skipped: dict[str, str] = {}
        self.skipped: Mapping[str, str] = self._skipped
        self.digest = self._digest()

    def __len__(self) -> int:
        return len(self._paths)

    def read(self, start: int, stop: int) -> tuple[torch.Tensor, list[int]]:
        data = self._data
        clips, indices = [], []
        for index in range(start, min(stop, len(self))):
            path = self._paths[index]
            try:
                frames = self._decode(path)
            except Unusable as reason:
                if path not in self.skipped:
                    log.warning("left out %s: %s", path, reason)
                self._skipped[path] = str(reason)
                continue
            clips.append(fit_frames(frames, data.height, data.width))
            indices.append(index)
        if not clips:
            return torch.empty(0, data.frames, data.height, data.width, 3, dtype=torch.uint8), []
        return torch.stack(clips), indices

    def _decode(self, path: str) -> NDArray[np.uint8]:
        try:
            with self._files.open(f"{self._root}/{path}", "rb") as file:
                return decode_frames(file, self._data.frames, self._data.frame_interval)
        except (FileNotFoundError, IsADirectoryError, PermissionError) as error:
            raise Unusable(error.strerror or type(error).__name__) from error

    def _digest(self) -> str:
        """Over captions, sizes and dates of the files, and how they are cut."""
        listing = self._files.find(self._root, detail=True)
        found = {}
        for name, info in listing.items():
            found[name] = [info["size"], str(info.get("ETag") or info.get("mtime"))]
        rows = [[path, text, found.get(f"{self._root}/{path}")] for path, text in zip(self._paths, self.captions, strict=True)]
        made_of = [VERSION, rows, self._data.model_dump(mode="json", exclude={"source"})]
        return hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()


def decode_frames(file: Any, frames: int, interval: int) -> NDArray[np.uint8]:
    """Frames 0, interval, 2·interval … of a video (an open binary file or a path), uint8 (frames, H, W, 3).

    Raises:
        Unusable: for what is no video, breaks off, or is too short.
    """
    kept: list[NDArray[np.uint8]] = []
    seen = 0
    try:
        with av.open(file) as container:
            if not container.streams.video:
                raise Unusable("no video stream")
            for frame in container.decode(video=0):
                if seen % interval == 0:
                    kept.append(frame.to_ndarray(format="rgb24"))
                seen += 1
                if len(kept) == frames:
                    return np.stack(kept)
    except av.FFmpegError as error:
        raise Unusable(f"cannot be decoded after {seen} frames: {error.strerror}") from error
    raise Unusable(f"{seen} frames, {(frames - 1) * interval + 1} are needed for {frames} frames at interval {interval}")


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


def _read_captions(files: Any, root: str) -> tuple[list[str], list[str]]:
    """Paths and captions, a row each. Raises ConfigError."""
    name = f"{root}/{CAPTIONS}"
    if not files.isdir(root):
        raise ConfigError(f"data.source {root}: no such folder. Give the folder that holds {CAPTIONS}")
    try:
        with files.open(name, "rt", encoding="utf-8-sig", newline="") as file:
            return _parse(csv.reader(file, strict=True), name)
    except FileNotFoundError as error:
        raise ConfigError(f"{name}: no such file. Write one with the header path,text and a line per clip") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{name}: not UTF-8 at byte {error.start}. Save it as UTF-8") from error


def _parse(reader: Any, name: str) -> tuple[list[str], list[str]]:
    paths: list[str] = []
    captions: list[str] = []
    lines: dict[str, int] = {}
    header: list[str] = []
    try:
        for row in reader:
            if not row:
                continue
            if not header:
                header = _header(row, f"{name}:{reader.line_num}")
                continue
            path, text = _row(row, header, f"{name}:{reader.line_num}")
            if path in lines:
                raise ConfigError(f"{name}:{reader.line_num}: {path} is on line {lines[path]} already. Keep one of the two")
            lines[path] = reader.line_num
            paths.append(path)
            captions.append(text)
    except csv.Error as error:
        raise ConfigError(f"{name}:{reader.line_num}: {error}. Mend the line") from error
    if not paths:
        raise ConfigError(f"{name}: no clips. Write the header path,text and a line per clip")
    return paths, captions


def _header(row: list[str], place: str) -> list[str]:
    names = [cell.strip() for cell in row]
    for column in COLUMNS:
        if names.count(column) != 1:
            raise ConfigError(f"{place}: the header is {','.join(row)}, it must name {' and '.join(COLUMNS)} once each")
    return names


def _row(row: list[str], header: list[str], place: str) -> tuple[str, str]:
    if len(row) != len(header):
        raise ConfigError(f"{place}: {len(row)} columns, the header has {len(header)}. Quote texts that hold a comma")
    path, text = (row[header.index(column)].strip() for column in COLUMNS)
    if not text:
        raise ConfigError(f"{place}: {path or 'the row'} has no text. Write a caption or drop the line")
    pure = PurePosixPath(path)
    if not path or pure.is_absolute() or ".." in pure.parts or "\\" in path:
        raise ConfigError(f"{place}: path {path!r} does not lie inside the folder. Give it relative to the folder, with /")
    return str(pure), text
