"""Laws of attempts as processes of this machine, under SIGKILL of everything that can be killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
from faults import faults_of_thirty_kinds
from live_attempts import Attempts, Watcher, assert_books_balance, start_launcher, until

from orchestrator.agent.guard import children_of
from orchestrator.ledger.records import Intent
from orchestrator.local.attempt_lock import SUBMITTED, last_alive, make_alive, pulse, write_submission
from orchestrator.local.backend import LocalBackend, _Child, cuda_devices
from orchestrator.local.clock import boottime
from orchestrator.local.processes import Process
from orchestrator.ports import Life

DEVICES = 2
LONG = ("--step-ms", "50")
"""Twenty steps of this length are longer than any test waits before it kills."""


@pytest.fixture
def attempts(tmp_path: Path) -> Attempts:
    return Attempts(tmp_path)


def begin(attempts: Attempts) -> tuple[Intent, Watcher]:
    """An attempt in the middle of its training."""
    intent = attempts.intend(*LONG, devices=DEVICES)
    attempts.submit(intent)
    watcher = Watcher(attempts.agent(intent))
    attempts.reaches(intent, 5)
    return intent, watcher


def is_gone(attempts: Attempts, intent: Intent) -> None:
    until(lambda: not attempts.left_behind(intent), "nothing left behind", patience_s=10)


def another_launcher(attempts: Attempts) -> LocalBackend:
    """The backend of a launcher that did not start the attempts it finds."""
    return LocalBackend(attempts.store.url, attempts.root)


def test_an_attempt_lives_once_however_often_it_is_submitted(attempts: Attempts) -> None:
    intent = attempts.intend()
    assert attempts.backend.observe(intent.run_key) == Life("absent")
    for _ in range(2):
        attempts.submit(intent)
    agent = attempts.agent(intent)
    life = attempts.end(intent)
    attempts.submit(intent)
    another_launcher(attempts).submit(attempts.key(intent), intent.run_key)
    assert attempts.end(intent) == life
    assert attempts.agent(intent) == agent
    report = attempts.report(intent)
    assert report is not None and report.class_ == "completed"


def test_a_killed_agent_takes_all_its_processes_along_and_its_time_of_death_is_known(attempts: Attempts) -> None:
    intent, watcher = begin(attempts)
    assert len(attempts.trainers(intent)) == 1 + DEVICES
    os.kill(attempts.agent(intent).pid, signal.SIGKILL)
    life = attempts.end(intent)
    assert not attempts.left_behind(intent)
    assert life.exit_code == 137 and attempts.report(intent) is None
    assert_books_balance(attempts.journal(intent), life, watcher, DEVICES)

    seen_later = another_launcher(attempts).observe(intent.run_key)
    assert seen_later.state == "ended" and seen_later.exit_code is None
    assert_books_balance(attempts.journal(intent), seen_later, watcher, DEVICES)


def torchrun(attempts: Attempts, intent: Intent) -> int:
    return attempts.trainers(intent)[0]


def rank(attempts: Attempts, intent: Intent) -> int:
    return attempts.trainers(intent)[-1]


def guard(attempts: Attempts, intent: Intent) -> int:
    (pid,) = children_of(attempts.agent(intent).pid)
    return pid


@pytest.mark.parametrize("victim", [torchrun, rank, guard])
def test_whatever_is_killed_below_the_agent_ends_the_attempt_with_a_report(
    attempts: Attempts, victim: Callable[[Attempts, Intent], int]
) -> None:
    intent, watcher = begin(attempts)
    os.kill(victim(attempts, intent), signal.SIGKILL)
    life = attempts.end(intent)
    report = attempts.report(intent)
    assert report is not None
    assert (report.class_, life.exit_code) == ("signal", 137)
    assert "SIGKILL" in report.reason
    assert not attempts.left_behind(intent)
    assert 5 in attempts.published(intent)
    assert_books_balance(attempts.journal(intent), life, watcher, DEVICES)


def test_a_killed_launcher_takes_its_attempt_along_and_the_journal_closes(attempts: Attempts) -> None:
    intent = attempts.intend(*LONG, devices=DEVICES)
    with start_launcher(attempts, intent) as launcher:
        watcher = Watcher(attempts.agent(intent))
        attempts.reaches(intent, 5)
        launcher.kill()
    is_gone(attempts, intent)
    report = attempts.report(intent)
    assert report is not None and (report.class_, report.reason) == ("lost", "the launcher died")
    life = attempts.backend.observe(intent.run_key)
    pieces = attempts.journal(intent)
    assert_books_balance(pieces, life, watcher, DEVICES)
    assert life.ended is not None and life.ended - pieces[-1].end < 0.5


def test_launcher_and_agent_killed_at_once_leave_nothing_behind(attempts: Attempts) -> None:
    intent = attempts.intend(*LONG, devices=DEVICES)
    with start_launcher(attempts, intent) as launcher:
        agent = attempts.agent(intent)
        watcher = Watcher(agent)
        attempts.reaches(intent, 5)
        os.kill(agent.pid, signal.SIGSTOP)  # so that it cannot hear of the launcher's death before its own
        launcher.kill()
        os.kill(agent.pid, signal.SIGKILL)
    is_gone(attempts, intent)
    assert attempts.report(intent) is None
    assert_books_balance(attempts.journal(intent), attempts.backend.observe(intent.run_key), watcher, DEVICES)


def test_a_launcher_killed_right_after_it_submitted_leaves_nothing_behind(attempts: Attempts) -> None:
    for attempt in range(1, 4):
        intent = attempts.intend(*LONG, attempt=attempt)
        with start_launcher(attempts, intent) as launcher:
            time.sleep(0.1 * (attempt - 1))
            launcher.kill()
        is_gone(attempts, intent)
        assert attempts.backend.observe(intent.run_key).state in ("absent", "ended")


def test_another_launcher_can_drain_what_it_did_not_start(attempts: Attempts) -> None:
    intent = attempts.intend(*LONG)
    with start_launcher(attempts, intent) as launcher:
        attempts.reaches(intent, 5)
        found = another_launcher(attempts)
        assert found.observe(intent.run_key).state == "running"
        found.drain(intent.run_key)
        until(lambda: found.observe(intent.run_key).state == "ended", "its end")
        report = attempts.report(intent)
        launcher.kill()
    assert report is not None and report.class_ == "drained"


def test_kill_returns_when_it_is_gone(attempts: Attempts) -> None:
    intent = attempts.intend(*LONG, devices=DEVICES)
    with start_launcher(attempts, intent) as launcher:
        attempts.reaches(intent, 5)
        found = another_launcher(attempts)
        found.kill(intent.run_key)
        assert not attempts.left_behind(intent)
        assert found.observe(intent.run_key).state == "ended"
        found.kill(intent.run_key)
        launcher.kill()


def test_a_time_of_death_is_never_the_file_systems(tmp_path: Path) -> None:
    """A shared one has a clock of its own: ahead of the host's it would bill time that nobody had."""
    write_submission(tmp_path, 1000.0)
    os.utime(tmp_path / SUBMITTED, (1094.0, 1094.0))
    assert last_alive(tmp_path) == 1000.0
    make_alive(tmp_path, 1005.0)
    assert last_alive(tmp_path) == 1005.0
    make_alive(tmp_path, 1001.0)
    assert last_alive(tmp_path) == 1005.0, "what is there is its owner's"
    moments = iter([1006.0] * 2 + [1007.0] * 100_000)
    with pulse(tmp_path, lambda: next(moments)):
        until(lambda: last_alive(tmp_path) == 1007.0, "it beats")


@pytest.mark.parametrize("ours", [signal.SIG_DFL, signal.SIG_IGN])
def test_a_hangup_means_to_a_trainer_what_it_means_to_its_launcher(attempts: Attempts, ours: signal.Handlers) -> None:
    """Nothing, where nohup has started that; else it saves (`opensora.train`)."""
    code = "import pathlib, signal; pathlib.Path('hangup').write_text(str(int(signal.getsignal(signal.SIGHUP))))"
    intent = attempts.intend(trainer=(sys.executable, "-c", code))
    kept = signal.signal(signal.SIGHUP, ours)
    try:
        attempts.live(intent)
    finally:
        signal.signal(signal.SIGHUP, kept)
    assert (attempts.run_dir(intent) / "hangup").read_text() == str(int(ours))


def test_a_pid_that_is_another_processes_now_is_not_signalled(attempts: Attempts) -> None:
    intent = attempts.intend()
    attempts.live(intent)
    with subprocess.Popen(["sleep", "60"]) as bystander:
        record = attempts.run_dir(intent) / "agent.json"
        record.write_text(record.read_text().replace(str(attempts.agent(intent).pid), str(bystander.pid)))
        assert attempts.agent(intent).pid == bystander.pid
        found = another_launcher(attempts)
        found.drain(intent.run_key)
        found.kill(intent.run_key)
        assert Process.of(bystander.pid).alive()
        bystander.kill()


def test_no_fault_ends_the_wait_for_an_agents_end(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Without its witness a dead attempt would seem to run for ever."""

    class Process:
        pid, faults = 7, list(faults_of_thirty_kinds())

        def wait(self) -> int:
            if self.faults:
                raise self.faults.pop(0)
            return -9

    child = _Child(cast(Any, Process()), 1000.0, boottime())
    LocalBackend("store", tmp_path)._witness(child)
    assert child.exit_code == 137 and child.ended is not None and 1000 <= child.ended < 1010
    said = [one.getMessage() for one in caplog.records if one.name == "orchestrator.local.backend"]  # threads of other tests speak too
    assert len(said) == 1 and "cannot be waited for" in said[0]


def test_hidden_devices_are_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    for visible, count in (("", 0), ("-1", 0), ("0", 1), ("0,3", 2)):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert cuda_devices() == count
