"""Uploads arrive in order, however often the store is away, and none holds up the others for ever."""

from __future__ import annotations

import errno
import threading
from functools import partial

import pytest
from live_attempts import until

from orchestrator.agent import upload_queue
from orchestrator.agent.upload_queue import Upload, UploadQueue
from orchestrator.errors import StoreConflict, Unreachable


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upload_queue, "FIRST_PAUSE_S", 0.001)


class Store:
    """Answers with the errors it is given, then takes what comes."""

    def __init__(self, *errors: Exception) -> None:
        self.errors, self.taken = list(errors), list[str]()

    def take(self, name: str) -> None:
        if self.errors:
            raise self.errors.pop(0)
        self.taken.append(name)


def deliver(uploads: list[Upload]) -> UploadQueue:
    done = threading.Semaphore(0)
    one = UploadQueue("test", done.release)
    for upload in uploads:
        one.put(upload)
    for _ in uploads:
        assert done.acquire(timeout=10)
    assert one.idle
    return one


def test_a_store_that_is_away_is_asked_again_and_the_order_stays() -> None:
    store = Store(Unreachable("away"), OSError(errno.EIO, "broken"), Unreachable("away"))
    one = deliver([Upload(name, partial(store.take, name)) for name in ("a", "b", "c")])
    assert store.taken == ["a", "b", "c"]
    assert one.refused == {} and one.failing_since is None and one.trouble == ""


@pytest.mark.parametrize("error", [StoreConflict("other content"), ValueError("a slip")])
def test_an_upload_that_cannot_succeed_is_refused_and_the_next_ones_go(error: Exception) -> None:
    store = Store(error)
    one = deliver([Upload(name, partial(store.take, name)) for name in ("a", "b")])
    assert store.taken == ["b"]
    assert list(one.refused) == ["a"]
    assert str(error) in one.refused["a"].reason and not one.refused["a"].disk_full


def test_a_full_disk_is_told_from_an_absent_store() -> None:
    unreachable = Unreachable("cannot write")
    unreachable.__cause__ = OSError(errno.ENOSPC, "No space left on device")
    store = Store(unreachable)
    one = deliver([Upload("a", lambda: store.take("a"))])
    assert one.refused["a"].disk_full


def test_only_the_newest_wait_for_a_slow_store() -> None:
    store, gate, done = Store(), threading.Event(), threading.Semaphore(0)
    dropped: list[str] = []
    one = UploadQueue("test", done.release)
    one.put(Upload("first", gate.wait))
    while one._queue:
        pass  # until it is under way
    for name in ("a", "b", "c", "d"):
        one.put(Upload(name, partial(store.take, name), partial(dropped.append, name)), keep=2)
    assert dropped == ["a", "b"]
    gate.set()
    for _ in range(3):
        assert done.acquire(timeout=10)
    assert store.taken == ["c", "d"]


def test_parts_that_arrive_renew_the_patience() -> None:
    """An upload that fails now and then, and is on its way all the same, is not given up; one that only fails is."""
    store = Store(Unreachable("away"))
    arrived, seen, waits, gate = [0], list[float](), threading.Event(), threading.Event()

    def send() -> None:
        store.take("a")
        waits.set()
        gate.wait()

    one = UploadQueue("test", lambda: None, lambda: arrived[0])
    one.put(Upload("a", send))
    assert waits.wait(timeout=10)
    for _ in range(3):
        seen += [one.failing_since or 0.0, one.failing_since or 0.0]
        arrived[0] += 1
    assert seen[0] == seen[1] < seen[2] == seen[3] < seen[4] == seen[5]
    gate.set()
    until(lambda: one.idle, "the upload's arrival")
    assert one.failing_since is None
