"""Rows from the engine into Ray Data while it runs: an actor that holds those that no reader has taken, and the source that reads it.

Owns that each row is a block of its own, and that rows are never all there at once: the engine sends as many as it has room for. Refuses to
know what a row is. Ray Data has sources that are files or lists; a stream that somebody still writes is made of a read task that waits.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from typing import Any

import pyarrow
import ray
from ray.data.block import BlockMetadata
from ray.data.datasource import Datasource, ReadTask

from opensora.prepare.ray.setup import Sent


class Feed:
    """An actor: rows that wait for the reader, what functions told, and when an actor was last heard of."""

    def __init__(self) -> None:
        self._rows: list[Sent] = []
        self._ends = self._leaves = False
        self._more = asyncio.Event()
        self._told: list[bytes] = []
        self._heard, self._worked_by = time.monotonic(), False

    async def put(self, rows: list[Sent]) -> None:
        self._rows += rows
        self._more.set()

    async def end(self) -> None:
        self._ends = True
        self._more.set()

    async def take(self) -> list[Sent]:
        """All that is there, at least one; none at the end."""
        while not self._rows and not self._ends:
            self._more.clear()
            await self._more.wait()
        rows, self._rows = self._rows, []
        return rows

    async def say(self, told: bytes) -> None:
        self._told.append(told)

    async def leave(self) -> None:
        self._leaves = True

    async def beat(self) -> bool:
        """An actor lives. Whether the run is to leave."""
        self._heard, self._worked_by = time.monotonic(), True
        return self._leaves

    async def heard(self) -> tuple[list[bytes], float, bool]:
        told, self._told = self._told, []
        return told, time.monotonic() - self._heard, self._worked_by


class Rows(Datasource):  # type: ignore[misc]
    """What one read task takes from the feed, row by row."""

    def __init__(self, feed: Any) -> None:
        super().__init__()
        self._feed = feed

    def estimate_inmemory_data_size(self) -> int | None:
        return None

    def get_read_tasks(self, parallelism: int, per_task_row_limit: int | None = None, data_context: Any = None) -> list[Any]:
        unknown = BlockMetadata(num_rows=None, size_bytes=None, input_files=None, exec_stats=None)
        return [ReadTask(_reader(self._feed), unknown)]


def _reader(feed: Any) -> Callable[[], Iterator[Any]]:
    def read() -> Iterator[Any]:
        while rows := ray.get(feed.take.remote()):
            for row in rows:
                yield pyarrow.table({name: [value] for name, value in row._asdict().items()})

    return read
