"""The agent's side of its guard."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from processes import crowded, open_files

from orchestrator.agent import guard
from orchestrator.agent.trainer_process import TrainerProcess
from orchestrator.local.attempt_lock import take_lock
from orchestrator.local.clock import AttemptClock


@pytest.fixture
def lock(tmp_path: Path) -> Iterator[int]:
    """Of a run directory. This process is not the heir of others' orphans any more afterwards."""
    taken = take_lock(tmp_path)
    assert taken is not None
    yield taken
    os.close(taken)
    guard.prctl(guard.PR_SET_CHILD_SUBREAPER, 0)


def test_a_trainer_is_ended_whatever_numbers_descriptors_have(tmp_path: Path, lock: int) -> None:
    with crowded():
        process = TrainerProcess(tmp_path, lock, AttemptClock.here())
        try:
            process.start((sys.executable, "-c", "import time; time.sleep(600)"), os.environ, log=tmp_path / "log")
            assert process.fileno() > 1024 and not process.has_spoken(0)
            assert os.WIFSIGNALED(process.kill(0.0).status)
        finally:
            process.close()


def test_a_trainer_that_was_released_leaves_no_descriptor_open(tmp_path: Path, lock: int) -> None:
    before = open_files()
    process = TrainerProcess(tmp_path, lock, AttemptClock.here())
    process.start((sys.executable, "-c", ""), os.environ, log=tmp_path / "log")
    assert process.has_spoken(60)
    process.close()
    assert open_files() == before
