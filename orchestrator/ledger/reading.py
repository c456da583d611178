"""Many small reads of a store at a time.

Owns one pool of threads for all readers of a process. A pool for each call cost more than the reads: 300 attempts in a folder took 3.6 s of
wall clock to look at, two thirds of it starts of 2,400 threads; with one pool they take 1.1 s. Refuses to know what is read.

A function that runs here must not call `read_many`: it would wait for threads that wait for it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import TypeVar

Key = TypeVar("Key")
Answer = TypeVar("Answer")

READERS = 8
"""Reads at a time. On S3 a read is a round trip, and a day of training has thousands of journal pieces."""


def read_many(read: Callable[[Key], Answer], keys: Sequence[Key]) -> list[Answer]:
    """`read` of each key, in the keys' order. What the first failing reader raised is raised, once all have ended."""
    if len(keys) < 2:
        return [read(key) for key in keys]
    readers = min(READERS, len(keys))
    shares = [keys[reader::readers] for reader in range(readers)]
    futures = [_pool().submit(_read, read, share) for share in shares]
    answers: dict[int, Answer] = {}
    failures = [future.exception() for future in futures]
    for failure in failures:
        if failure is not None:
            raise failure
    for reader, future in enumerate(futures):
        answers.update(zip(range(reader, len(keys), readers), future.result(), strict=True))
    return [answers[index] for index in range(len(keys))]


def _read(read: Callable[[Key], Answer], keys: Sequence[Key]) -> list[Answer]:
    return [read(key) for key in keys]


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(READERS, "reader")


os.register_at_fork(after_in_child=_pool.cache_clear)  # its threads are not in a child
