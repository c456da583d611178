"""Whatever goes wrong in a thread of the agent, it is said once and the thread goes on; none ends in silence."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from faults import faults_of_thirty_kinds
from live_attempts import Attempts, until

from orchestrator.agent import publication, upload_queue
from orchestrator.agent.publication import Peers
from orchestrator.agent.standing import Standing
from orchestrator.agent.upload_queue import Upload, UploadQueue
from orchestrator.ledger.store import Ledger
from orchestrator.local.attempt_lock import ALIVE, pulse

FAULTS = list(faults_of_thirty_kinds())


class Failing:
    """Calls that fail by each fault in turn, then go through."""

    def __init__(self, inner: Any, *names: str) -> None:
        self.inner, self.names, self.left = inner, names, list(FAULTS)

    def __getattr__(self, name: str) -> Any:
        if name in self.names and self.left:
            raise self.left.pop(0)
        return getattr(self.inner, name)


def test_there_are_thirty_kinds() -> None:
    assert len({(type(fault), getattr(fault, "errno", None)) for fault in FAULTS}) >= 30


@pytest.mark.parametrize("where", ["send", "after", "wake"])
def test_no_fault_ends_an_upload_queue(where: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(upload_queue, "FIRST_PAUSE_S", 0.001)
    delivered: list[str] = []
    faults = list(FAULTS)

    def fail(*_: object) -> None:
        if faults:
            raise faults.pop(0)

    one = UploadQueue("test", fail if where == "wake" else lambda: None)
    for number in range(len(FAULTS)):
        send: Callable[[], object] = fail if where == "send" else lambda number=number: delivered.append(str(number))
        one.put(Upload(str(number), send, fail if where == "after" else lambda: None))
    one.put(Upload("last", lambda: delivered.append("last")))
    until(lambda: "last" in delivered and one.idle, "the last one is delivered")
    assert one.is_alive() and not faults
    assert all(type(fault).__name__ in caplog.text or str(fault) in caplog.text for fault in FAULTS)


def test_no_fault_ends_the_look_at_the_lease(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    attempts = Attempts(tmp_path)
    intent = attempts.intend(flush_s=0.01)
    ledger = Failing(Ledger(attempts.store, "demo"), "lease")
    began = time.monotonic()
    standing = Standing(ledger, intent, 0, lambda: None, lambda: None, 300.0)  # type: ignore[arg-type]
    until(lambda: standing.looked > began, "a look that succeeds")
    assert standing.is_alive() and not ledger.left and not standing.over
    assert all(type(fault).__name__ in caplog.text for fault in FAULTS)


def test_no_fault_ends_the_wait_for_other_nodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(publication, "POLL_S", 0.01)
    attempts = Attempts(tmp_path)
    intent = attempts.intend(nodes=2)
    ledger = Failing(Ledger(attempts.store, "demo"), "reports")
    peers = Peers(ledger, intent, 0, lambda: None, 0.5, set(), lambda: "")  # type: ignore[arg-type]
    peers.watch()
    until(lambda: peers.lost, "the other node is given up")
    assert peers.is_alive() and not ledger.left
    assert all(str(fault) in caplog.text for fault in FAULTS)


def test_no_fault_ends_the_pulse(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    faults, touch = list(FAULTS), os.utime

    def failing(*arguments: Any) -> None:
        if faults and threading.current_thread().name == "pulse":
            raise faults.pop(0)
        touch(*arguments)

    monkeypatch.setattr(os, "utime", failing)
    with pulse(tmp_path, time.time):
        until(lambda: not faults, "every fault was thrown")
        before = (tmp_path / ALIVE).stat().st_mtime
        until(lambda: (tmp_path / ALIVE).stat().st_mtime > before, "it beats again")
    assert "cannot be kept up" in caplog.text and sum("cannot be kept up" in record.message for record in caplog.records) == 1
