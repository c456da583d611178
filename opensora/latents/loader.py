"""Which clips a step trains on.

Owns the order. Each bucket has a stream of its own: epochs, each a permutation of the bucket's clips drawn from (seed, epoch, bucket), laid
end to end without end. A position is how many clips have been taken from each stream. A step takes all its clips from one bucket: the one
that is least far in its epochs (taken / clips; the first of several), so that buckets never differ by more than one step's worth of an
epoch. It takes the next batch_size·parts·world clips of that stream: rank r takes the r-th share, and its part j of the step the j-th
piece of that share. So part j of rank r is what rank r·parts + j takes where each step has one part: the number of ranks and of parts
may change at the same product, and a step keeps its clips.

So within an epoch of a bucket nothing is lost or doubled, all ranks have equally many steps with the same shape in each, and the position
is all that a resume needs, also onto another number of ranks. A step at the seam of two epochs takes clips of both; a bucket with fewer
clips than a step takes repeats them there and nowhere else.

Whether a clip is mirrored is drawn from (seed, epoch, bucket, clip), so it differs between the epochs of a clip, and between the clips of
two ranks. There are no worker processes, and so no seeds of workers to forget: decoding and encoding happened before (`cache`), a batch
is three gathers from mapped files, and reading ahead (`Ahead`) draws nothing. Open-Sora 1.0 gave each worker of each rank and epoch the
same seed, and so the same crops; here there is no state that could be equal.

Letters: B batch · C latent channels · T frames · h, w latent rows and columns · L text tokens · Dc channels of a token vector.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cached_property, lru_cache
from types import TracebackType

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from opensora.latents.prepared import Prepared
from opensora.latents.streamed import StreamedShard

REACH = 32
"""Most batches whose blocks are fetched ahead."""

Position = tuple[int, ...]
"""Clips taken from each bucket since the stage began, by all ranks together."""


@dataclass(frozen=True)
class Batch:
    latents: Tensor  # (B, C, T, h, w) float32
    vectors: Tensor  # (B, L, Dc) float32, zero where padded; L is the longest caption of this batch
    mask: Tensor | None  # (B, L) bool, true on tokens; none where all captions are equally long
    index: Tensor  # (B,) int64, clips of the bucket
    bucket: int

    def to(self, device: torch.device) -> Batch:
        """On the device. To CUDA the copy runs beside the host, from page-locked memory; `index` stays where it is, for reports."""
        if device.type == self.latents.device.type:
            return self
        if device.type == "cuda":
            pinned = self.pinned()
            mask = None if pinned.mask is None else pinned.mask.to(device, non_blocking=True)
            latents, vectors = (part.to(device, non_blocking=True) for part in (pinned.latents, pinned.vectors))
            return replace(self, latents=latents, vectors=vectors, mask=mask)
        mask = None if self.mask is None else self.mask.to(device)
        return replace(self, latents=self.latents.to(device), vectors=self.vectors.to(device), mask=mask)

    def pinned(self) -> Batch:
        """In page-locked memory."""
        mask = None if self.mask is None else self.mask.pin_memory()
        return replace(self, latents=self.latents.pin_memory(), vectors=self.vectors.pin_memory(), mask=mask)


class Stream:
    """One bucket's clips, epoch after epoch, without end. Keeps two epochs' orders: a step may see the end of one and the next one."""

    def __init__(self, seed: int, clips: int, bucket: int = 0) -> None:
        self._clips = clips
        self._order = lru_cache(2)(lambda epoch: np.random.default_rng([seed, epoch, bucket]).permutation(clips))
        self._place = lru_cache(2)(lambda epoch: np.argsort(np.random.default_rng([seed, epoch, bucket]).permutation(clips)))
        self._mirrors = lru_cache(2)(lambda epoch: np.random.default_rng([seed, epoch, bucket, 1]).integers(0, 2, clips, np.int8))

    def clips_at(self, start: int, count: int) -> NDArray[np.int64]:
        """Clips at positions start..start+count−1."""
        return np.concatenate([self._order(epoch)[part] for epoch, part in self._epochs(start, count)])

    def mirrors(self, start: int, count: int) -> NDArray[np.int64]:
        """1 where the clip at this position is mirrored, else 0."""
        parts = [self._mirrors(epoch)[self._order(epoch)[part]] for epoch, part in self._epochs(start, count)]
        return np.concatenate(parts).astype(np.int64)

    def due_again(self, start: int, count: int) -> NDArray[np.float64]:
        """When the clips at these positions come again, in epochs of this bucket."""
        parts = [epoch + 1 + self._place(epoch + 1)[self._order(epoch)[part]] / self._clips for epoch, part in self._epochs(start, count)]
        return np.concatenate(parts)

    def _epochs(self, start: int, count: int) -> Iterator[tuple[int, slice]]:
        """Which epochs these positions lie in, and where in each."""
        while count > 0:
            epoch, first = divmod(start, self._clips)
            last = min(first + count, self._clips)
            yield epoch, slice(first, last)
            start, count = start + last - first, count - (last - first)


class Loader:
    """Batches of one rank. Holds no position: `batch` is a pure function of it."""

    def __init__(self, prepared: Prepared, *, seed: int, rank: int = 0, world: int = 1, parts: int = 1) -> None:
        """`rank`, `world`: data-parallel ones. `parts`: batches of a step, one after the other."""
        self._prepared, self._rank, self._world, self._parts = prepared, rank, world, parts
        self._counts = [len(part) for part in prepared.parts]
        self._sizes = [bucket.batch_size for bucket in prepared.buckets]
        self._streams = [Stream(seed, clips, bucket) for bucket, clips in enumerate(self._counts)]
        self._lengths = prepared.offsets.diff()

    @property
    def start(self) -> Position:
        """Where a stage begins."""
        return (0,) * len(self._counts)

    @property
    def parts(self) -> int:
        """Batches of a step."""
        return self._parts

    def bucket(self, seen: Position) -> int:
        """Which bucket the step at this position takes its clips from."""
        if len(seen) != len(self._counts):
            raise ValueError(f"a position in {len(seen)} buckets, the stage has {len(self._counts)}")
        return min((Fraction(taken, clips), bucket) for bucket, (taken, clips) in enumerate(zip(seen, self._counts, strict=True)) if clips)[
            1
        ]

    def clips(self, seen: Position) -> int:
        """Of all ranks and parts together, in the step at this position."""
        return self._sizes[self.bucket(seen)] * self._parts * self._world

    def after(self, seen: Position) -> Position:
        """The position after that step."""
        bucket = self.bucket(seen)
        return (*seen[:bucket], seen[bucket] + self.clips(seen), *seen[bucket + 1 :])

    def batch(self, seen: Position, part: int = 0) -> Batch:
        """This rank's clips in one part of the step at this position.

        Raises:
            DataError: where the cache is no longer whole.
        """
        bucket = self.bucket(seen)
        self._prepared.check(bucket)
        held, stream, size = self._prepared.parts[bucket], self._streams[bucket], self._sizes[bucket]
        place = self._place(seen, part, bucket)
        index, rows = self._rows(bucket, place)
        due = torch.from_numpy(stream.due_again(place, size)) if self._is_fetched(bucket) else None
        latents = held.shard.take(rows, due).float()
        return Batch(latents, *self._text(held.caption_of[index], due), index, bucket)

    def ask(self, seen: Position, part: int = 0, *, alone: bool = False) -> None:
        """Have what this batch needs fetched soon, where the cache lies in a store. Waits for nothing.

        Args:
            alone: without what lies around it.
        """
        bucket = self.bucket(seen)
        if not self._is_fetched(bucket):
            return
        held, place = self._prepared.parts[bucket], self._place(seen, part, bucket)
        index, rows = self._rows(bucket, place)
        due, text = place / self._counts[bucket], self._prepared.text_shard
        if isinstance(held.shard, StreamedShard) and isinstance(text, StreamedShard):
            held.shard.ask(rows.numpy(), due, alone=alone)
            text.ask(self._tokens(held.caption_of[index])[0].flatten().numpy(), due, alone=alone)

    def _is_fetched(self, bucket: int) -> bool:
        """Whether something that this bucket's batches need may still have to be fetched."""
        shards = self._prepared.parts[bucket].shard, self._prepared.text_shard
        return any(isinstance(shard, StreamedShard) and not shard.settled for shard in shards)

    @cached_property
    def reach(self) -> int:
        """Batches whose blocks are fetched ahead: as many as a quarter of the room holds. 0, where the cache lies on a disk."""
        if self._prepared.stream is None:
            return 0
        batch = max(self._sizes)
        room = min((part.shard.capacity for part in self._prepared.parts if isinstance(part.shard, StreamedShard) and len(part)), default=0)
        return max(1, min(REACH, room // (4 * batch)))

    def forget(self) -> None:
        """What was asked for, and is not being fetched, is needed no more."""
        if self._prepared.stream is not None:
            self._prepared.stream.fetcher.forget()

    def close(self) -> None:
        """Nothing more is fetched."""
        if self._prepared.stream is not None:
            self._prepared.stream.close()

    def _place(self, seen: Position, part: int, bucket: int) -> int:
        """Where this rank's clips begin in the bucket's stream."""
        return seen[bucket] + (self._rank * self._parts + part) * self._sizes[bucket]

    def _rows(self, bucket: int, place: int) -> tuple[Tensor, Tensor]:
        """Clips of the batch at this position of a bucket's stream, and the rows of their latents."""
        held, stream, size = self._prepared.parts[bucket], self._streams[bucket], self._sizes[bucket]
        index = torch.from_numpy(stream.clips_at(place, size))
        mirrored = torch.from_numpy(stream.mirrors(place, size)) if self._prepared.mirrored else 0
        return index, held.rows[index, mirrored]

    def _text(self, captions: Tensor, due: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Vectors and mask of these captions."""
        places, mask = self._tokens(captions)
        again = None if due is None else (due[:, None] * mask).flatten()  # the row of zeros is needed in each batch
        vectors = self._prepared.text_shard.take(places.flatten(), again).float().view(*places.shape, -1)
        return vectors, None if bool(mask.all()) else mask

    def _tokens(self, captions: Tensor) -> tuple[Tensor, Tensor]:
        """(B, L): rows of these captions' vectors, and which of them are tokens."""
        lengths = self._lengths[captions]
        token = torch.arange(int(lengths.max()))
        mask = token < lengths[:, None]
        last = self._prepared.text_shard.shape[0] - 1  # padding is the row of zeros
        return torch.where(mask, self._prepared.offsets[captions][:, None] + token, last), mask


class Ahead:
    """A loader's batches, read in a thread while the caller trains: a mapped file's pages may have to come from a disk first.

    The same batches as `loader.batch`, at the same positions and parts. An error is raised where its batch is asked for. A position that
    is not the expected one starts the reading anew.
    """

    def __init__(self, loader: Loader, device: torch.device | None = None, *, depth: int = 2) -> None:
        """`device`: where batches will go; for CUDA they are page-locked in the thread. `depth`: batches read ahead."""
        self._loader, self._depth = loader, depth
        self._device = device if device is not None and device.type == "cuda" else None
        self._pool = ThreadPoolExecutor(1, "loader")
        self._waiting: deque[tuple[tuple[Position, int], Future[Batch]]] = deque()
        self._asked: deque[tuple[Position, int]] = deque()
        """Batches beyond the one that the thread is at whose blocks it asked for."""

    @property
    def start(self) -> Position:
        return self._loader.start

    def clips(self, seen: Position) -> int:
        return self._loader.clips(seen)

    def after(self, seen: Position) -> Position:
        return self._loader.after(seen)

    def batch(self, seen: Position, part: int = 0) -> Batch:
        """`loader.batch(seen, part)`; the batches after it are being read when this returns.

        Raises:
            DataError: where the cache is no longer whole.
        """
        if self._waiting and self._waiting[0][0] != (seen, part):
            self._drop()
        if not self._waiting:
            self._submit((seen, part))
        last, batch = self._waiting.popleft()
        if self._waiting:
            last = self._waiting[-1][0]
        while len(self._waiting) < self._depth:
            last = self._next(last)
            self._submit(last)
        return batch.result()

    def close(self) -> None:
        """Ends the thread, after the batch that it is at, and whoever fetches for it."""
        self._drop()
        self._loader.close()
        self._pool.shutdown()

    def __enter__(self) -> Ahead:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _next(self, place: tuple[Position, int]) -> tuple[Position, int]:
        """The part after this one, or the first one of the step after it."""
        seen, part = place
        return (seen, part + 1) if part + 1 < self._loader.parts else (self._loader.after(seen), 0)

    def _submit(self, place: tuple[Position, int]) -> None:
        self._waiting.append((place, self._pool.submit(self._read, place)))

    def _ask(self, place: tuple[Position, int]) -> None:
        """Have the blocks of the batches after this one fetched."""
        if self._asked and self._asked[0] == place:
            self._asked.popleft()
        elif self._asked:
            self._asked.clear()
            self._loader.forget()
        if not self._asked and self._loader.reach:
            self._loader.ask(*place, alone=True)  # somebody waits for it: before the threads are busy with the batches after it
        last = self._asked[-1] if self._asked else place
        while len(self._asked) < self._loader.reach:
            last = self._next(last)
            self._loader.ask(*last)
            self._asked.append(last)

    def _read(self, place: tuple[Position, int]) -> Batch:
        self._ask(place)
        batch = self._loader.batch(*place)
        if self._device is None:
            return batch
        torch.cuda.set_device(self._device)  # a thread begins on the first one, and would make itself at home there
        return batch.pinned()

    def _drop(self) -> None:
        while self._waiting:
            self._waiting.popleft()[1].cancel()
