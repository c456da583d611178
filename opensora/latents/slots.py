"""Blocks of a large tensor on this machine's disk, never more than a given number: what several processes have fetched of a shard.

Owns two files: NAME.slots, that many blocks long (sparse until it is filled), and NAME.table, which block lies in which slot. Every process
that uses them maps both. Refuses to know where blocks come from (`streamed`) and what they are (`shard`).

A reader takes no lock. It looks up the slots of its rows, copies them, and looks again: a slot whose generation is another one now was
given to another block meanwhile, and its rows are taken again (a seqlock). A writer, in this order: takes the block out of the table,
makes the generation odd, writes the new block, makes the generation even, puts the block into the table. Writers agree by a lock on
NAME.table, held while slots are chosen and not while blocks are fetched; a slot that is being filled is locked by a byte of its own
(open file description locks), which the kernel opens when the writer dies.

The block that is given up is the one that is needed furthest in the future (Belady): the order of clips is known in advance. With the
least recently used one given up, a shuffled epoch over twice as many rows as fit would find 15% of them there; so it is about a half.
"""

from __future__ import annotations

import fcntl
import math
import mmap
import os
import struct
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from opensora.errors import DataError
from opensora.latents.shard import AGAIN, writing

NONE = -1
LATER = np.inf
"""When a block is needed that nobody asked for."""
_FLOCK = "hhqqi0q"
"""struct flock of Linux on 64 bits."""
_LOCKED_AT = 1 << 40
"""Where the bytes lie that stand for slots: beyond each file's end, which locks may."""


@dataclass(frozen=True)
class Shape:
    """Of the tensor whose blocks are kept."""

    rows: int
    row: tuple[int, ...]
    dtype: torch.dtype
    block_rows: int

    @property
    def row_bytes(self) -> int:
        return math.prod(self.row) * self.dtype.itemsize

    @property
    def block_bytes(self) -> int:
        return self.block_rows * self.row_bytes

    @property
    def blocks(self) -> int:
        return -(-self.rows // self.block_rows)

    def rows_of(self, block: int) -> range:
        return range(block * self.block_rows, min((block + 1) * self.block_rows, self.rows))


class Slots:
    def __init__(self, shard: Path, shape: Shape, slots: int) -> None:
        """Opens what `make` made. Raises DataError, where it is not there or not whole."""
        self.shape, self._slots = shape, slots
        self._path, table_path = shard.with_suffix(".slots"), shard.with_suffix(".table")
        try:
            with self._path.open("rb") as file:
                self._mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            self._data = os.open(self._path, os.O_RDWR | os.O_CLOEXEC)
            self._lock = os.open(table_path, os.O_RDWR | os.O_CLOEXEC)
            table = np.memmap(table_path, np.int64, "r+", shape=(shape.blocks + 3 * slots,))
        except (OSError, ValueError) as error:
            raise DataError(f"{self._path}: the local part of a latent cache is not whole ({error}). {AGAIN}") from error
        self.check()
        self._slot_of = table[: shape.blocks]
        """Slot of each block, or NONE."""
        self._block_of, self._generation, due = np.split(table[shape.blocks :], 3)
        self._due: NDArray[np.float64] = due.view(np.float64)
        self._mine: set[int] = set()
        """Slots that this object fills now."""
        self._guard = threading.Lock()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # read-only memory as a tensor
            flat = torch.frombuffer(self._mapping, dtype=shape.dtype, count=slots * shape.block_rows * math.prod(shape.row))
        self._rows = flat.view(slots * shape.block_rows, *shape.row)

    @staticmethod
    def make(shard: Path, shape: Shape, slots: int) -> None:
        """Both files, empty. `shard`: where the whole file would lie. Raises DiskFull."""
        with writing(shard):
            with shard.with_suffix(".slots").open("wb") as file:
                file.truncate(slots * shape.block_bytes)
            table = np.full(shape.blocks + 3 * slots, NONE, np.int64)
            table[shape.blocks + slots : shape.blocks + 2 * slots] = 0
            table[shape.blocks + 2 * slots :].view(np.float64)[:] = LATER
            shard.with_suffix(".table").write_bytes(table.tobytes())

    def close(self) -> None:
        for opened in (self._data, self._lock):
            with suppress(OSError):
                os.close(opened)
        self._data = self._lock = -1

    def __del__(self) -> None:
        if getattr(self, "_lock", -1) >= 0:
            self.close()

    def check(self) -> None:
        """Raises DataError, where somebody cut the file: the next look at the mapping would kill the process."""
        found, whole = self._mapping.size(), self._slots * self.shape.block_bytes
        if found != whole:
            raise DataError(f"{self._path}: {found} bytes, the latent cache has {whole} there; somebody changed it. {AGAIN}")

    # --- Reading -----------------------------------------------------------------------------------------------------------------------

    def copy(self, rows: NDArray[np.int64], due: NDArray[np.float64] | None) -> tuple[Tensor, NDArray[np.bool_]]:
        """(n, *row), and which of them are there; the others are to be fetched and copied again.

        Args:
            due: when each row is needed next, in epochs of its clips.
        """
        blocks = rows // self.shape.block_rows
        slots = self._slot_of[blocks]
        there = slots >= 0
        generation = self._generation[slots]
        copied = self._rows.index_select(0, torch.from_numpy(slots * self.shape.block_rows + rows % self.shape.block_rows).clamp_min_(0))
        there &= (self._slot_of[blocks] == slots) & (self._generation[slots] == generation)
        if due is not None:
            self._due[slots[there]] = due[there]
        return copied, there

    def settled_rows(self, rows: NDArray[np.int64]) -> Tensor:
        """(n, *row), where every block is here and has a slot: nothing is given up, so one look is enough."""
        slots = self._slot_of[rows // self.shape.block_rows]
        return self._rows.index_select(0, torch.from_numpy(slots * self.shape.block_rows + rows % self.shape.block_rows))

    def missing(self, blocks: NDArray[np.int64]) -> NDArray[np.int64]:
        return blocks[self._slot_of[blocks] < 0]

    # --- Filling -----------------------------------------------------------------------------------------------------------------------

    def claim(self, blocks: Sequence[int], due: Sequence[float], *, urgent: bool) -> tuple[dict[int, int], list[int]]:
        """A slot for each block that is not there, to be fetched by the caller, who then calls `put` or `give_up` for each.

        Args:
            due: when each block is needed, in epochs.
            urgent: whether somebody waits for them. If not, no block is given up for one that is needed later than it.

        Returns:
            slots by block, and the blocks that another process fetches now, or that have no slot now.
        """
        mine: dict[int, int] = {}
        waits: list[int] = []
        with self._locked():
            filling = {int(self._block_of[slot]): int(slot) for slot in np.flatnonzero(self._generation & 1)}
            for left in [slot for slot in filling.values() if slot not in self._mine and self._take_byte(slot)]:
                self._drop_byte(left)  # whoever filled it is dead
                filling.pop(int(self._block_of[left]))
                self._empty(left)
            kept_until = self._kept_until()
            for block, when in zip(blocks, due, strict=True):
                if self._slot_of[block] >= 0:
                    continue
                slot = None if block in filling else self._victim(kept_until, when, urgent=urgent)
                if slot is None or not self._take_byte(slot):
                    waits.append(block)
                    continue
                kept_until[slot] = -np.inf
                old = int(self._block_of[slot])
                if old != NONE and self._slot_of[old] == slot:
                    self._slot_of[old] = NONE
                self._generation[slot] += 1
                self._block_of[slot], self._due[slot] = block, when
                self._mine.add(slot)
                mine[block] = slot
        return mine, waits

    def put(self, block: int, slot: int, content: bytes | memoryview) -> None:
        """The block's bytes into its slot. Raises DiskFull."""
        try:
            with writing(self._path):
                done = 0
                while done < len(content):
                    done += os.pwrite(self._data, memoryview(content)[done:], slot * self.shape.block_bytes + done)
        except BaseException:
            self.give_up(slot)
            raise
        with self._locked():
            self._generation[slot] += 1
            self._slot_of[block] = slot
            self._mine.discard(slot)
            self._drop_byte(slot)

    def give_up(self, slot: int) -> None:
        with self._locked():
            if slot in self._mine:
                self._empty(slot)
                self._mine.discard(slot)
                self._drop_byte(slot)

    def _empty(self, slot: int) -> None:
        self._generation[slot] += 1
        self._block_of[slot], self._due[slot] = NONE, LATER

    def _kept_until(self) -> NDArray[np.float64]:
        """When the block of each slot is needed; -inf of those that are being filled."""
        return np.where(self._generation & 1, -np.inf, np.where(self._block_of == NONE, LATER, self._due))

    @staticmethod
    def _victim(kept_until: NDArray[np.float64], when: float, *, urgent: bool) -> int | None:
        """The slot that is free, or whose block is needed last of all. None: there is none now."""
        slot = int(kept_until.argmax())
        if kept_until[slot] == -np.inf or not (urgent or kept_until[slot] > when):
            return None
        return slot

    @contextmanager
    def _locked(self) -> Iterator[None]:
        with self._guard:
            fcntl.flock(self._lock, fcntl.LOCK_EX)
            try:
                yield
            finally:
                fcntl.flock(self._lock, fcntl.LOCK_UN)

    def _take_byte(self, slot: int) -> bool:
        try:
            fcntl.fcntl(self._lock, fcntl.F_OFD_SETLK, struct.pack(_FLOCK, fcntl.F_WRLCK, os.SEEK_SET, _LOCKED_AT + slot, 1, 0))
        except OSError:
            return False
        return True

    def _drop_byte(self, slot: int) -> None:
        fcntl.fcntl(self._lock, fcntl.F_OFD_SETLK, struct.pack(_FLOCK, fcntl.F_UNLCK, os.SEEK_SET, _LOCKED_AT + slot, 1, 0))
