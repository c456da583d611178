"""One file of the latent cache: a safetensors file with one large tensor that grows row by row, and small ones after it.

Owns its layout: a header of fixed length (padded with blanks, which the format allows), written last, so that a cache larger than memory
can be streamed to disk. Any safetensors reader opens it. Refuses to know what the rows mean (`cache`).

Beside each shard lies NAME.digests: 32 bytes of sha256 for the header, for each block of rows of the large tensor, and for what comes after
it. Whoever reads a shard block by block from an object store (`streamed`) checks each block by itself. A shard of a release that wrote no
digests is read on a disk as before.

A mapped file that somebody cuts kills its reader with SIGBUS at the next look. So a file is compared with its header before it is mapped,
and `Shard.check` compares its size again before each use: what was whole and is no longer ends as a `DataError` with both sizes.
"""

from __future__ import annotations

import hashlib
import json
import math
import mmap
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from opensora.errors import DataError, DiskFull

HEADER = 16376
"""Bytes of the padded JSON: room for some 150 tensors. With the 8 of its length before it the large tensor starts at 16 KiB."""
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64}
AGAIN = "Start again: it is built anew"
"""What to do about a cache that is not whole."""
NAMES = {dtype: name for name, dtype in DTYPES.items()}
DIGESTS = ".digests"
"""What the file of a shard's digests ends with instead of `.safetensors`."""
BLOCK = 256 << 10
"""Bytes of rows that are fetched and checked at once, at least one row. Measured with s3fs: a request costs about 4 ms of CPU, as much as
a few hundred KB of content; larger blocks bring rows along that a shuffled order needs much later."""

Header = Mapping[str, Mapping[str, Any]]
"""Of a safetensors file: dtype, shape and data_offsets of each tensor."""


def digests_file(shard: str) -> str:
    """Name of the file of digests that belongs to a shard's file."""
    return shard.removesuffix(".safetensors") + DIGESTS


def rows_per_block(row_bytes: int) -> int:
    return max(1, BLOCK // max(1, row_bytes))


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
        self.block_rows = rows_per_block(math.prod(row) * dtype.itemsize)
        """Rows of a block; the last one may have fewer."""
        self._block, self._digests = hashlib.sha256(), [b""]
        with writing(path):
            self._file = path.open("wb")
            self._file.seek(8 + HEADER)

    def append(self, rows: Tensor) -> None:
        """(n, *row), of any floating type and on any device."""
        if rows.shape[1:] != self._row:
            raise ValueError(f"{self._path}: rows of {tuple(rows.shape[1:])}, this file's are {self._row}")
        kept = rows.to("cpu", self._dtype).contiguous()
        with writing(self._path):
            self._file.write(_bytes(kept))
        while len(kept):
            some = kept[: self.block_rows - self.rows % self.block_rows]
            self._block.update(_bytes(some))
            self.rows, kept = self.rows + len(some), kept[len(some) :]
            if self.rows % self.block_rows == 0:
                self._end_block()

    def _end_block(self) -> None:
        self._digests.append(self._block.digest())
        self._block = hashlib.sha256()

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def finish(self, small: Mapping[str, Tensor]) -> None:
        """Add the small tensors and make it whole, with its digests beside it."""
        header, end = {}, 0
        shapes = {self._name: (self._dtype, (self.rows, *self._row))} | {name: (each.dtype, each.shape) for name, each in small.items()}
        for name, (dtype, shape) in shapes.items():
            start, end = end, end + math.prod(shape) * dtype.itemsize
            header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
        text = json.dumps(header).encode().ljust(HEADER)
        assert len(text) == HEADER, f"{len(header)} tensors"
        if self.rows % self.block_rows:
            self._end_block()
        head, tail = len(text).to_bytes(8, "little") + text, b"".join(_bytes(tensor) for tensor in small.values())
        self._digests[0] = hashlib.sha256(head).digest()
        self._digests.append(hashlib.sha256(tail).digest())
        with writing(self._path):
            self._path.with_name(digests_file(self._path.name)).write_bytes(b"".join(self._digests))
            self._file.write(tail)
            self._file.seek(0)
            self._file.write(head)
            self._file.flush()
            os.fsync(self._file.fileno())


class Shard:
    """A shard, opened: `large` is mapped, `small` is read. Neither is ever written to."""

    large: Tensor
    small: Mapping[str, Tensor]

    def __init__(self, path: Path, name: str) -> None:
        """`name`: of the tensor to map.

        Raises:
            DataError: where the file is not what `Writer` left.
        """
        self._path = path
        try:
            with path.open("rb") as file:
                header, self.size = parsed(file.read(8 + HEADER), name)
                mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)  # of the file's size now; it keeps the file open
        except (OSError, ValueError) as error:
            raise DataError(f"{path}: no whole file of a latent cache ({error}). {AGAIN}") from error
        self._mapping = mapping
        self.check()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # read-only memory as a tensor; a writable private mapping would have to fit in memory
            self.large = tensor_at(mapping, header[name], 8 + HEADER + header[name]["data_offsets"][0])
            # small ones may lie unaligned
            self.small = small_tensors(header, name, lambda begin, end: mapping[8 + HEADER + begin : 8 + HEADER + end])

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the large tensor."""
        return tuple(self.large.shape)

    def take(self, rows: Tensor, due: Tensor | None = None) -> Tensor:
        """These rows of the large tensor, copied. `due`: of each, when it is needed next; of no account on a disk."""
        del due
        return self.large.index_select(0, rows)

    def check(self) -> None:
        """Raises DataError, where the file's size is no longer its own. Somebody may still cut it between this and the next look: then
        the process dies."""
        found = self._mapping.size()  # of the file, now
        if found != self.size:
            raise DataError(f"{self._path}: {found} bytes, the latent cache has {self.size} there; somebody changed it. {AGAIN}")


def parsed(head: bytes, name: str) -> tuple[Header, int]:
    """The header, and the bytes of the whole file that it describes. Raises ValueError for what no `Writer` left.

    Args:
        name: of the large tensor.
    """
    try:
        header: Header = json.loads(head[8:])
        size = 8 + HEADER + max(int(entry["data_offsets"][1]) for entry in header.values())
        dtypes, large = {entry["dtype"] for entry in header.values()}, header[name]
        if not dtypes <= DTYPES.keys() or not isinstance(large["shape"], list):
            raise ValueError(f"tensors of {', '.join(sorted(dtypes))}, this release reads {', '.join(DTYPES)}")
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise ValueError(f"no header of a shard ({type(error).__name__}: {error})") from error
    return header, size


def small_tensors(header: Header, name: str, read: Callable[[int, int], bytes]) -> dict[str, Tensor]:
    """All but the large one. `read`: the bytes between two offsets of the data."""
    return {
        key: tensor_at(bytearray(read(*entry["data_offsets"])), entry, 0) for key, entry in header.items() if key != name
    }  # fmt: skip


def tensor_at(source: bytearray | mmap.mmap, entry: Mapping[str, Any], place: int) -> Tensor:
    """The tensor whose bytes begin at `place`; it shares their memory."""
    dtype, count = DTYPES[entry["dtype"]], math.prod(entry["shape"])
    flat = torch.frombuffer(source, dtype=dtype, count=count, offset=place) if count else torch.empty(0, dtype=dtype)
    return flat.view(entry["shape"])


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().data
