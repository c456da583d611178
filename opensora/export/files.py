"""Write single files of an export: safetensors tensor by tensor, and JSON."""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from opensora.checkpoint.reader import DTYPES

Say = Callable[[str], None]


def write_tensors(
    path: Path, shapes: Mapping[str, Sequence[int]], dtype: torch.dtype, tensor: Callable[[str], Tensor], say: Say = lambda _: None
) -> int:
    """Write a safetensors file of one type; `tensor(name)` is called right before each tensor is written. Returns the file's size."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + torch.Size(shape).numel() * dtype.itemsize
        header[name] = {"dtype": DTYPES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    written, told = 0, 0
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for name in shapes:
            written += file.write(tensor(name).to(dtype).contiguous().reshape(-1).view(torch.uint8).numpy().data)
            if written - told >= 2**28:
                told = written
                say(f"{path.parent.name}: {written / 2**20:.0f} of {end / 2**20:.0f} MiB")
        file.flush()
        os.fsync(file.fileno())
    return path.stat().st_size


def shapes_of(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def copy_weights(weights: Iterable[Path], source: Path, folder: Path) -> None:
    """Copy weight files and the index of their shards."""
    for path in (*weights, *source.glob("*.safetensors.index.json")):
        shutil.copyfile(path, folder / path.name)


def write_model(folder: Path, kind: str, facts: Mapping[str, Any], *, name: str = "config.json") -> None:
    write_json(folder / name, {"_class_name": kind, "_diffusers_version": diffusers_version(), **facts})


def write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def diffusers_version() -> str:
    return importlib.metadata.version("diffusers")
