"""One file of the latent cache: a safetensors file with one large tensor that grows row by row, and small ones after it.

Owns its layout: a header of fixed length (padded with blanks, which the format allows), written last, so that a cache larger than memory
can be streamed to disk. Any safetensors reader opens it. Refuses to know what the rows mean (`latents`).

A mapped file that somebody cuts kills its reader with SIGBUS at the next look. So a file is compared with its header before it is mapped,
and `Shard.check` compares its size again before each use: what was whole and is no longer ends as a `DataError` with both sizes.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import torch
from torch import Tensor

from opensora.errors import DataError, DiskFull

HEADER = 16376
"""Bytes of the padded JSON: room for some 150 tensors. With the 8 of its length before it the large tensor starts at 16 KiB."""
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64}
AGAIN = "Start again: it is built anew"
"""What to do about a cache that is not whole."""
NAMES = {dtype: name for name, dtype in DTYPES.items()}


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Writes under `path`. Raises DiskFull where they fail."""
    try:
        yield
    except OSError as error:
        raise DiskFull(f"{path}: the latent cache cannot be written ({error}). Make room, or choose another place") from error


class Writer(AbstractContextManager["Writer"]):
    """Writes a shard from front to back, in a `with` block. It is one once `finish` returned; before that no reader takes it for one."""

    def __init__(self, path: Path, name: str, row: tuple[int, ...], dtype: torch.dtype) -> None:
        """`name`, `row`, `dtype`: of the tensor that grows, and the shape of its rows.

        Raises:
            DiskFull: here and in the other methods, where it cannot be written.
        """
        self._path, self._name, self._row, self._dtype = path, name, row, dtype
        self.rows = 0
        with writing(path):
            self._file = path.open("wb")
            self._file.seek(8 + HEADER)

    def append(self, rows: Tensor) -> None:
        """(n, *row), of any floating type and on any device."""
        if rows.shape[1:] != self._row:
            raise ValueError(f"{self._path}: rows of {tuple(rows.shape[1:])}, this file's are {self._row}")
        with writing(self._path):
            self._file.write(_bytes(rows.to("cpu", self._dtype)))
        self.rows += len(rows)

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def finish(self, small: Mapping[str, Tensor]) -> None:
        """Add the small tensors and make it whole."""
        header, end = {}, 0
        shapes = {self._name: (self._dtype, (self.rows, *self._row))} | {name: (each.dtype, each.shape) for name, each in small.items()}
        for name, (dtype, shape) in shapes.items():
            start, end = end, end + math.prod(shape) * dtype.itemsize
            header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
        text = json.dumps(header).encode().ljust(HEADER)
        assert len(text) == HEADER, f"{len(header)} tensors"
        with writing(self._path):
            for tensor in small.values():
                self._file.write(_bytes(tensor))
            self._file.seek(0)
            self._file.write(len(text).to_bytes(8, "little") + text)
            self._file.flush()
            os.fsync(self._file.fileno())


class Shard:
    """A shard, opened: `large` is mapped, `small` is read. Neither is ever written to."""

    def __init__(self, path: Path, name: str) -> None:
        """`name`: of the tensor to map.

        Raises:
            DataError: where the file is not what `Writer` left.
        """
        self._path = path
        try:
            with path.open("rb") as file:
                head = file.read(8 + HEADER)
                mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)  # of the file's size now; it keeps the file open
            header = json.loads(head[8:])
            self.size = 8 + HEADER + max(entry["data_offsets"][1] for entry in header.values())
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{path}: no whole file of a latent cache ({error}). {AGAIN}") from error
        self._mapping = mapping
        self.check()
        tensors: dict[str, Tensor] = {}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # read-only memory as a tensor; a writable private mapping would have to fit in memory
            for key, entry in header.items():
                begin, end = entry["data_offsets"]
                dtype, place = DTYPES[entry["dtype"]], 8 + HEADER + begin
                source: bytes | mmap.mmap = mapping if key == name else mapping[place : 8 + HEADER + end]  # small ones may lie unaligned
                count = (end - begin) // dtype.itemsize
                flat = (
                    torch.frombuffer(source, dtype=dtype, count=count, offset=place if key == name else 0)
                    if count
                    else torch.empty(0, dtype=dtype)
                )
                tensors[key] = flat.view(entry["shape"])
        self.large = tensors.pop(name)
        self.small: Mapping[str, Tensor] = tensors

    def check(self) -> None:
        """Raises DataError, where the file's size is no longer its own. Somebody may still cut it between this and the next look: then
        the process dies."""
        found = self._mapping.size()  # of the file, now
        if found != self.size:
            raise DataError(f"{self._path}: {found} bytes, the latent cache has {self.size} there; somebody changed it. {AGAIN}")


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().data
