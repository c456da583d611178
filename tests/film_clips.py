"""A folder of tiny films with its captions.csv, made in milliseconds."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path

import av
import numpy as np

CAPTIONS = {"one.mp4": "a grey square", "two.mp4": "a dark square", "more/three.mp4": "a bright square"}


def film(path: Path, level: int, frames: int = 8) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as out:
        stream = out.add_stream("libx264", rate=8)
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
        for number in range(frames):
            out.mux(stream.encode(av.VideoFrame.from_ndarray(np.full((32, 32, 3), level + 2 * number, np.uint8), format="rgb24")))
        out.mux(stream.encode())


def captions(folder: Path, told: Mapping[str, str] = CAPTIONS) -> None:
    with (folder / "captions.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("path", "text"), *told.items()])


def make(folder: Path, told: Mapping[str, str] = CAPTIONS) -> Path:
    for number, name in enumerate(told):
        film(folder / name, 20 + 60 * number)
    captions(folder, told)
    return folder
