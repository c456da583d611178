"""A latent cache that lies in a store: its small files are here, of its large tensors the blocks that batches need.

Owns the folder of such a cache on this machine, the look at each block's digest, and who fetches ahead. `slots` owns which blocks are kept
in the bounded space, `remote` how bytes are asked for. Refuses to know the order of clips: `loader` says what is needed, and when.

    DIGEST.BOOT.streamed/
      stream.json            address, and slots of each shard
      bucket-<i>.edges       the shard's header and small tensors
      bucket-<i>.slots|table blocks of the large tensor (`slots`)
      cache.json …           the small files of the cache, whole

DIGEST counts the index, and so the digest of every block, and the number of slots: one address or another, the same blocks are the same.
BOOT is of the machine's start: what a power failure left half written is not looked at again.
"""

from __future__ import annotations

import fcntl
import hashlib
import heapq
import itertools
import json
import os
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from opensora.errors import DataError
from opensora.latents.remote import Remote, Span
from opensora.latents.shard import AGAIN, DTYPES, HEADER, Header, Shard, digests_file, parsed, small_tensors
from opensora.latents.slots import Shape, Slots

STREAM = "stream.json"
THREADS = 4
"""Fetch at once, and each asks for as many ranges at once as RANGES_AT_ONCE: 32 requests on their way hide 30 ms of a store's latency at
1,000 blocks a second."""
RANGES_AT_ONCE = 8
RUN_BYTES = 4 << 20
"""Most that a thread fetches at once. With s3fs a MB takes 8.0 ms of CPU in requests of 256 KiB, 2.6 in those of 1 MiB, 1.8 of 4 MiB."""
QUEUED_BYTES = 64 << 20
"""While less than this is queued, blocks bring their neighbours along. A network that is slower than the training gets further behind than
this; then each block that is needed soon is fetched alone, and no batch waits for what is needed later."""
POLL_S = 0.005
"""Between two looks at a block that another process fetches."""
ROUNDS = 3
"""How often a block is fetched whose digest is another one: the network may have changed it, or the store."""

DIGEST_BYTES = 32
_NOW = -1.0
"""Due of a block that somebody waits for."""


class Stream:
    """The folder of a streamed cache, opened by one process."""

    def __init__(self, directory: Path, address: str, slots: Mapping[str, int]) -> None:
        self._directory, self._slots = directory, slots
        self.remote = Remote(address)
        self._told: Mapping[str, Any] = json.loads((directory / "cache.json").read_bytes())
        self.fetcher = Fetcher(self.remote)
        self._used = os.open(directory / STREAM, os.O_RDONLY | os.O_CLOEXEC)
        fcntl.flock(self._used, fcntl.LOCK_SH)  # while it is open, nobody removes the folder for its room

    @classmethod
    def open(cls, directory: Path) -> Stream:
        """Raises DataError."""
        try:
            told = json.loads((directory / STREAM).read_bytes())
            return cls(directory, str(told["address"]), {str(name): int(slots) for name, slots in told["slots"].items()})
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{directory / STREAM}: not a streamed latent cache ({error}). {AGAIN}") from error

    @property
    def shards(self) -> frozenset[str]:
        """Names of the files that do not lie here whole."""
        return frozenset(self._slots)

    def shard(self, name: str, tensor: str) -> StreamedShard:
        """Raises DataError."""
        size, block_rows = int(self._told["files"][name]), int(self._told["blocks"][name])
        return StreamedShard(self._directory, name, tensor, size=size, block_rows=block_rows, slots=self._slots[name], fetcher=self.fetcher)

    def close(self) -> None:
        """Ends the threads. What is here can be taken, what is not is an error."""
        self.fetcher.close()

    def __del__(self) -> None:
        if getattr(self, "_used", -1) >= 0:
            os.close(self._used)


class StreamedShard(Shard):
    """A shard whose rows are fetched when they are needed, or before."""

    def __init__(self, directory: Path, name: str, tensor: str, *, size: int, block_rows: int, slots: int, fetcher: Fetcher) -> None:
        """`size`: bytes of the whole file. Raises DataError."""
        self._path, self.name, self.size, self._fetcher = directory / name, name, size, fetcher
        try:
            edges = (directory / edges_file(name)).read_bytes()
            digests = (directory / digests_file(name)).read_bytes()
            header, whole = parsed(edges[: 8 + HEADER], tensor)
            if whole != size:
                raise ValueError(f"its header describes {whole} bytes, the index {size}")
            self.of = shape_of(header, tensor, digests, block_rows)
        except (OSError, ValueError) as error:
            raise DataError(f"{directory / name}: no whole file of a latent cache ({error}). {AGAIN}") from error
        self._digests = digests
        end = header[tensor]["data_offsets"][1]
        self.small = small_tensors(header, tensor, lambda first, last: edges[8 + HEADER + first - end : 8 + HEADER + last - end])
        self.slots = Slots(directory / name, self.of, slots) if self.of.blocks else None
        self.capacity = slots
        self._settled = not self.of.blocks

    @property
    def settled(self) -> bool:
        """Whether all of it is here and has room to stay: then nobody needs to ask, or to say when a row is due."""
        if not self._settled and self.slots is not None and self.capacity >= self.of.blocks:
            self._settled = not len(self.slots.missing(np.arange(self.of.blocks)))
        return self._settled

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.of.rows, *self.of.row)

    def check(self) -> None:
        if self.slots is not None:
            self.slots.check()

    def blocks_of(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Each once."""
        found: NDArray[np.int64] = np.unique(rows // self.of.block_rows)
        return found

    def take(self, rows: Tensor, due: Tensor | None = None) -> Tensor:
        """These rows, copied; those that are not here are waited for. Raises DataError."""
        if self.slots is None:
            return torch.empty(0, *self.of.row, dtype=self.of.dtype)
        numbers: NDArray[np.int64] = rows.numpy()
        if self._settled:
            return self.slots.settled_rows(numbers)
        later = None if due is None else due.numpy()
        taken, there = self.slots.copy(numbers, later)
        while not there.all():
            left = np.flatnonzero(~there)
            self._fetcher.need(self, self.blocks_of(numbers[left]))
            again, now = self.slots.copy(numbers[left], None if later is None else later[left])
            taken[torch.from_numpy(left[now])] = again[torch.from_numpy(now)]
            there[left[now]] = True
        return taken

    def ask(self, rows: NDArray[np.int64], due: float, *, alone: bool = False) -> None:
        """Have these rows fetched soon. Waits for nothing, and fails for nothing.

        Where all of the shard has room, the blocks around them come along, so that a first epoch takes few large requests: a shuffled
        order would need each of them in one of its own. Where it has not, they would be given up again before they are needed.

        Args:
            alone: without what lies around them.
        """
        if self.slots is None or not len(missing := self.slots.missing(self.blocks_of(rows))):
            return
        if not alone and self.capacity >= self.of.blocks and self._fetcher.queued * self.of.block_bytes < QUEUED_BYTES:
            missing = self.slots.missing(self._around(missing))
        self._fetcher.ask(self, missing, due)

    def _around(self, blocks: NDArray[np.int64]) -> NDArray[np.int64]:
        """The aligned runs of RUN_BYTES that these blocks lie in."""
        length = max(1, RUN_BYTES // self.of.block_bytes)
        found = (np.unique(blocks // length)[:, None] * length + np.arange(length)).flatten()
        return found[found < self.of.blocks]

    def fill(self, blocks: Sequence[int], due: Sequence[float], remote: Remote) -> list[int]:
        """Fetch those that are not here. Returns those that another process fetches, or that have no room now. Raises DataError."""
        assert self.slots is not None
        mine, waits = self.slots.claim(blocks, due, urgent=min(due) == _NOW)
        try:
            for block, content in self._fetched(list(mine), remote).items():
                self.slots.put(block, mine.pop(block), content)
        finally:
            for slot in mine.values():
                self.slots.give_up(slot)
        return waits

    def _fetched(self, blocks: Sequence[int], remote: Remote) -> dict[int, memoryview]:
        """Each with the digest that it should have. Raises DataError."""
        found: dict[int, memoryview] = {}
        for number in range(ROUNDS):
            left = [block for block in blocks if block not in found]
            if not left:
                break
            for block, content in self._asked(left, remote):
                digest, was = hashlib.sha256(content).digest(), self._digests[DIGEST_BYTES * (block + 1) : DIGEST_BYTES * (block + 2)]
                if digest == was:
                    found[block] = content
                elif number == ROUNDS - 1:
                    first, last = self._span(block)
                    raise DataError(
                        f"{remote.address}/{self.name}: bytes {first} to {last} have the sha256 {digest.hex()[:12]}, the latent cache has "
                        f"{was.hex()[:12]} there; somebody changed the file. Publish the data set again"
                    )
        return found

    def _asked(self, blocks: Sequence[int], remote: Remote) -> Iterator[tuple[int, memoryview]]:
        """Blocks that lie side by side, as those of one caption, are one request."""
        runs: list[list[int]] = []
        for block in sorted(blocks):
            if runs and runs[-1][-1] == block - 1:
                runs[-1].append(block)
            else:
                runs.append([block])
        spans = [(self._span(run[0])[0], self._span(run[-1])[1]) for run in runs]
        for run, span, content in zip(runs, spans, remote.ranges(self.name, spans, self.size), strict=True):
            for block in run:
                first, last = self._span(block)
                yield block, memoryview(content)[first - span[0] : last - span[0]]

    def _span(self, block: int) -> Span:
        rows, start = self.of.rows_of(block), 8 + HEADER
        return start + rows.start * self.of.row_bytes, start + rows.stop * self.of.row_bytes


class Fetcher:
    """Fetches blocks in a few threads, those that somebody waits for first, then those that are due first."""

    def __init__(self, remote: Remote) -> None:
        self._remote = remote
        self._lock = threading.Lock()
        self._queue: list[tuple[float, int, StreamedShard, int]] = []
        self._count = itertools.count()
        self._waiting: dict[tuple[str, int], Future[None]] = {}
        """What is queued or being fetched."""
        self._running: set[tuple[str, int]] = set()
        """What is being fetched."""
        self._pool = ThreadPoolExecutor(THREADS, "latents")
        self._working = 0
        self._failed: Exception | None = None

    @property
    def queued(self) -> int:
        """Blocks that no thread has begun with."""
        return len(self._queue)

    def ask(self, shard: StreamedShard, blocks: NDArray[np.int64], due: float) -> list[Future[None]]:
        """Futures that are done when the blocks were fetched, or had no room."""
        with self._lock:
            if self._failed is not None:
                failed: Future[None] = Future()
                failed.set_exception(self._failed)
                return [failed]
            futures = []
            for block in map(int, blocks):
                known = self._waiting.get((shard.name, block))
                future = known or Future()
                futures.append(future)
                if known is None or due == _NOW:
                    self._waiting[shard.name, block] = future
                    heapq.heappush(self._queue, (due, next(self._count), shard, block))
            for _ in range(min(THREADS - self._working, -(-len(self._queue) // RANGES_AT_ONCE))):
                self._working += 1
                self._pool.submit(self._work)
            return futures

    def need(self, shard: StreamedShard, blocks: NDArray[np.int64]) -> None:
        """Waits until each has been fetched; it may be given up again before it is looked at. Raises DataError."""
        for future in self.ask(shard, blocks, _NOW):
            future.result()

    def forget(self) -> None:
        """What is queued and not begun is needed no more."""
        with self._lock:
            for key in [key for key in self._waiting if key not in self._running]:
                self._waiting.pop(key).set_result(None)  # whoever waits for it looks, and asks again
            self._queue.clear()

    def close(self) -> None:
        """Ends the threads; whoever waits gets an error."""
        self._remote.closed.set()
        self.forget()
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _work(self) -> None:
        while group := self._next():
            shard, blocks, due, futures = group
            error: Exception | None = None
            try:
                waits = shard.fill(blocks, due, self._remote)
                while waits and min(due) == _NOW and not self._remote.closed.is_set():
                    time.sleep(POLL_S)
                    waits = shard.fill(waits, [_NOW] * len(waits), self._remote)
            except Exception as caught:  # noqa: BLE001 - raised where the block is asked for
                error = caught
            with self._lock:
                self._failed = self._failed or error
                for block, future in zip(blocks, futures, strict=True):
                    self._running.discard((shard.name, block))
                    self._waiting.pop((shard.name, block), None)
                    if error is None:
                        future.set_result(None)
                    else:
                        future.set_exception(error)

    def _next(self) -> tuple[StreamedShard, list[int], list[float], list[Future[None]]] | None:
        """Some blocks of one shard, none of which another thread fetches."""
        with self._lock:
            taken: list[tuple[float, int, Future[None]]] = []
            shard: StreamedShard | None = None
            ranges = 0
            while self._queue:
                due, _, of, block = self._queue[0]
                if shard is not None and (of is not shard or (len(taken) + 1) * of.of.block_bytes > RUN_BYTES):
                    break
                beside = bool(taken) and taken[-1][1] == block - 1
                if ranges == RANGES_AT_ONCE and not beside:
                    break
                heapq.heappop(self._queue)
                key = (of.name, block)
                future = self._waiting.get(key)
                if future is None or key in self._running:
                    continue
                self._running.add(key)
                shard, ranges = of, ranges + (not beside)
                taken.append((due, block, future))
            if shard is None:
                self._working -= 1
                return None
            return shard, [block for _, block, _ in taken], [due for due, _, _ in taken], [future for _, _, future in taken]


def edges_file(shard: str) -> str:
    """Name of the file with a shard's header and what comes after its large tensor."""
    return shard.removesuffix(".safetensors") + ".edges"


def shape_of(header: Header, tensor: str, digests: bytes, block_rows: int) -> Shape:
    """Raises ValueError, where there are not as many digests as blocks."""
    entry = header[tensor]
    rows, *row = entry["shape"]
    shape = Shape(rows, tuple(row), DTYPES[entry["dtype"]], block_rows)
    if len(digests) != DIGEST_BYTES * (shape.blocks + 2):
        raise ValueError(f"{len(digests)} bytes of digests, {shape.blocks} blocks have {DIGEST_BYTES * (shape.blocks + 2)}")
    return shape
