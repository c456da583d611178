"""Many reads at a time: all answers in order, and one pool of threads however often it is asked."""

from __future__ import annotations

import os
import threading
import time

import pytest

from orchestrator.ledger.reading import READERS, read_many


@pytest.mark.parametrize("count", [0, 1, 2, READERS, READERS + 1, 100])
def test_answers_come_in_the_order_of_the_keys(count: int) -> None:
    def read(key: int) -> int:
        time.sleep(0.001 * (key % 3))
        return key * key

    assert read_many(read, list(range(count))) == [key * key for key in range(count)]


def test_a_thousand_calls_start_no_more_threads_than_readers() -> None:
    seen: set[int] = set()

    def read(_key: int) -> None:
        seen.add(threading.get_ident())

    for _ in range(1000):
        read_many(read, list(range(16)))
    assert len(seen) <= READERS


def test_what_a_reader_raises_is_raised_when_all_have_ended() -> None:
    ended = []

    def read(key: int) -> None:
        if key == 0:
            raise ValueError("no such key")
        time.sleep(0.01)
        ended.append(key)

    with pytest.raises(ValueError, match="no such key"):
        read_many(read, list(range(READERS)))
    assert len(ended) == READERS - 1


def test_a_forked_child_reads_too() -> None:
    read_many(str, [1, 2, 3])
    pid = os.fork()
    if pid == 0:
        os._exit(0 if read_many(str, [1, 2, 3]) == ["1", "2", "3"] else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
