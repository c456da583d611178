"""Write one file of a checkpoint in safetensors' layout: from the rows of tensors to bytes on the disk.

Owns the layout, so that a file has the same bytes whether the rows are copied to memory first (`Image`) or written straight from the
tensors (`Direct`). `opensora.checkpoint.writer` decides which files there are and when they are written.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from opensora.checkpoint.reader import DTYPES, TensorShard

WRITE_BYTES = 8 << 20
"""Bytes handed to the kernel at once."""


@dataclass(frozen=True)
class Layout:
    """A safetensors file of these shards: its first bytes, and where the data of each tensor lies."""

    head: bytes
    offsets: dict[str, int]
    """Where each tensor's data begins, in bytes from the file's first byte, in the order of the file."""
    size: int
    """Bytes of the file."""


def lay_out(shards: Mapping[str, TensorShard]) -> Layout:
    """The layout of a file with these shards. Equal shards give equal bytes. Tensors are sorted by width of type, widest first, then by
    name, as safetensors itself does.

    Source: github.com/huggingface/safetensors, "Format": 8 bytes of header length, JSON padded with spaces, data.
    """
    names = sorted(shards, key=lambda name: (-shards[name].tensor.element_size(), name))
    content: dict[str, object] = {}
    sliced = {name: [shards[name].start, shards[name].rows] for name in sorted(names) if shards[name].rows is not None}
    if sliced:
        content["__metadata__"] = {"about": json.dumps({"rows": sliced}, sort_keys=True, separators=(",", ":"))}
    offsets, end = {}, 0
    for name in names:
        tensor = shards[name].tensor
        offsets[name], begin = end, end
        end += tensor.numel() * tensor.element_size()
        content[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    header = json.dumps(content, separators=(",", ":"), ensure_ascii=False).encode()
    header = header.ljust(-(-len(header) // 8) * 8)
    head = len(header).to_bytes(8, "little") + header
    return Layout(head, {name: len(head) + offset for name, offset in offsets.items()}, len(head) + end)


class Image:
    """A file of a checkpoint in host memory, byte for byte. The memory is pinned if the tensors are on a GPU (not run on a GPU)."""

    def __init__(self, layout: Layout, shards: Mapping[str, TensorShard], device: torch.device) -> None:
        self.layout = layout
        self._bytes = torch.empty(layout.size, dtype=torch.uint8, pin_memory=device.type == "cuda")
        self._bytes.zero_()  # touches every page now: the first save would otherwise wait for page faults
        self._bytes[: len(layout.head)] = torch.frombuffer(bytearray(layout.head), dtype=torch.uint8)
        self.tensors: dict[str, Tensor] = {}
        for name, offset in layout.offsets.items():
            tensor = shards[name].tensor
            data = self._bytes[offset : offset + tensor.numel() * tensor.element_size()]
            self.tensors[name] = data.view(tensor.dtype).view(tensor.shape)

    def copy(self, shards: Mapping[str, TensorShard]) -> None:
        """Copy the rows into the file's bytes. On CUDA the copy may still run when this returns."""
        for name, target in self.tensors.items():
            target.copy_(shards[name].tensor.detach(), non_blocking=True)

    def chunks(self) -> Iterator[memoryview]:
        """The bytes of the file."""
        yield self._bytes.numpy().data


@dataclass(frozen=True)
class Direct:
    """A file of a checkpoint that is written from the tensors themselves, one after the other."""

    layout: Layout
    shards: Mapping[str, TensorShard]
    beat: Callable[[], None]
    """Called before each tensor."""

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The rows in the order of the file."""
        return {name: self.shards[name].tensor.detach() for name in self.layout.offsets}

    def chunks(self) -> Iterator[memoryview]:
        """The bytes of the file, tensor by tensor."""
        yield memoryview(self.layout.head)
        for tensor in self.tensors.values():
            self.beat()
            yield tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def write(path: Path, chunks: Iterable[memoryview]) -> None:
    """Make a new file with these bytes, and return when it is on the disk. Raises OSError."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
    try:
        for chunk in chunks:
            written = 0
            while written < len(chunk):
                written += os.write(descriptor, chunk[written : written + WRITE_BYTES])
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def flush(path: Path) -> None:
    """Return when the content of a file, or the names in a folder, are on the disk. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
