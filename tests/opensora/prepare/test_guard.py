"""Laws of the guard: whatever a row does costs that row alone, is told with its reason, and stalls nothing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import guard_rows
import psutil
import pytest

from opensora.dataset.prepare_config import Limits
from opensora.dataset.rows import Drop, Leaves, Quarantine
from opensora.errors import ConfigError
from opensora.prepare.guard import Guards
from opensora.prepare.pool import LATER, Later, Lost

LIMITS = Limits(memory_gb=0.4)


@pytest.fixture
def guards() -> Iterator[Guards]:
    with Guards(2, LIMITS) as pool:
        yield pool


@pytest.mark.long
def test_a_crash_an_end_a_hang_and_too_much_memory_cost_exactly_their_rows(guards: Guards) -> None:
    ended = dict(guards.map(guard_rows.poisoned, range(20), 2.0))
    assert sorted(ended) == list(range(20))
    lost = {row: leaves for row, leaves in ended.items() if isinstance(leaves, Leaves)}
    assert {row: leaves.reason for row, leaves in lost.items()} == {
        7: "crash (SIGSEGV)", 11: "its process ended", 13: "takes too long", 16: "needs too much memory",
    }  # fmt: skip
    assert all(isinstance(leaves, Quarantine) and leaves.detail for leaves in lost.values())
    assert all(ended[row] == row * row for row in ended if row not in lost)


def test_a_hang_that_hears_no_signal_ends_at_its_deadline(guards: Guards) -> None:
    [(_, ended)] = guards.map(guard_rows.hangs_in_c, [1], 0.5)
    assert isinstance(ended, Lost)
    assert ended.detail == "no result after 0.5 s (limits.deadline_s, limits.deadline_per_s)"


def test_of_rows_that_were_sent_at_once_a_crash_costs_one_and_no_other_is_begun_twice(tmp_path: Path) -> None:
    notes = tmp_path / "notes"
    with Guards(1, LIMITS) as pool:
        ended = dict(pool.map(guard_rows.noted, [(str(notes), number) for number in range(100)], 20.0))
    lost = [number for (_, number), end in ended.items() if isinstance(end, Lost)]
    assert lost == [50]
    begun = [int(line.split()[1]) for line in notes.read_text().splitlines()]
    assert sorted(begun) == list(range(100))


@pytest.mark.long
def test_a_pool_whose_rows_all_die_is_never_used_up(guards: Guards) -> None:
    ended = list(guards.map(guard_rows.tells_and_crashes, range(12), 20.0))
    assert [leaves.reason for _, leaves in ended if isinstance(leaves, Lost)] == ["crash (SIGABRT)"] * 12


def test_what_was_told_before_a_crash_is_known(guards: Guards) -> None:
    [(_, lost)] = guards.map(guard_rows.tells_and_crashes, [1], 20.0)
    assert isinstance(lost, Lost)
    assert lost.told == ("half of it",)


def test_what_is_told_is_heard_at_once(guards: Guards) -> None:
    heard: list[object] = []
    guards.on_tell = heard.append
    list(guards.map(guard_rows.tells_and_crashes, [1], 20.0))
    assert heard == ["half of it"]


@pytest.mark.long
def test_a_function_may_prolong_its_deadline(guards: Guards) -> None:
    assert list(guards.map(guard_rows.takes_its_time, [4.0], 3.0)) == [(4.0, "done")]


def test_a_row_whose_guard_was_killed_from_outside_is_tried_once_more(guards: Guards, tmp_path: Path) -> None:
    assert list(guards.map(guard_rows.killed_once, [str(tmp_path)], 20.0)) == [(str(tmp_path), "done")]
    [(_, lost)] = guards.map(guard_rows.killed_always, [1], 20.0)
    assert isinstance(lost, Lost)
    assert lost.reason == "killed from outside"


def test_what_a_function_raises_is_the_rows_end(guards: Guards) -> None:
    [(_, left)] = guards.map(guard_rows.dropped, [5], 20.0)
    assert isinstance(left, Drop)
    assert (left.reason, left.detail) == ("not wanted", "row 5")
    [(_, left)] = guards.map(guard_rows.broken, [5], 20.0)
    assert isinstance(left, Quarantine)
    assert left.reason == "unforeseen KeyError"
    assert "guard_rows.py, line" in left.detail
    [(_, left)] = guards.map(guard_rows.unsendable, [5], 20.0)
    assert isinstance(left, Quarantine)
    assert "cannot be sent" in left.detail


def test_an_error_of_the_configuration_stops_everything(guards: Guards) -> None:
    with pytest.raises(ConfigError, match="transnetv2: not installed"):
        list(guards.map(guard_rows.misconfigured, range(5), 20.0))
    assert list(guards.map(guard_rows.same, [1], 20.0)) == [(1, 1)], "the pool is whole afterwards"


@pytest.mark.long
def test_guards_are_renewed_and_what_they_leak_ends_with_them() -> None:
    with Guards(1, Limits(memory_gb=2), renew_after=10) as pool:
        sizes = [size for _, size in pool.map(guard_rows.leaks, [1 << 22] * 60, 20.0) if isinstance(size, int)]
        pids = {pid for _, pid in pool.map(guard_rows.pid_of, range(30), 20.0)}
    assert len(sizes) == 60
    assert max(sizes) - min(sizes) < 12 * (1 << 22), "without renewal it grows by 60 times 4 MiB"
    assert len(pids) == 3 + 0


def test_a_large_row_and_a_large_result_pass(guards: Guards) -> None:
    rows = [bytes([number]) * 3_000_000 for number in range(6)]
    assert sorted(result for _, result in guards.map(guard_rows.same, rows, 20.0)) == rows  # type: ignore[type-var]


@pytest.mark.long
def test_rows_may_come_later_and_deadlines_are_kept_meanwhile(guards: Guards) -> None:
    def rows() -> Iterator[int | Later]:
        yield 13
        began = time.monotonic()
        while time.monotonic() < began + 3 and guards.pids():
            yield LATER
        yield 1

    ended = list(guards.map(guard_rows.poisoned, rows(), 0.4))
    assert [row for row, _ in ended] == [13, 1]


def test_halt_finishes_the_rows_in_work_and_begins_none() -> None:
    begun: list[int] = []

    def rows() -> Iterator[int]:
        for number in range(100):
            begun.append(number)
            yield number

    with Guards(2, LIMITS, halt=lambda: len(begun) >= 10) as pool:
        ended = list(pool.map(guard_rows.same, rows(), 20.0))
    assert [row for row, _ in sorted(ended)] == begun  # type: ignore[type-var]
    assert len(begun) == 10


USER = """
import sys, guard_rows
from opensora.dataset.prepare_config import Limits
from opensora.prepare.guard import Guards
if __name__ == "__main__":
    pool = Guards(2, Limits())
    for row, pid in pool.map(guard_rows.pid_of, range(2), 20):
        print(pid, flush=True)
    print("ready", flush=True)
    for _ in pool.map(guard_rows.hangs_in_c, range(2), 3600): pass
"""


@pytest.mark.long
def test_guards_die_with_whoever_uses_them(tmp_path: Path) -> None:
    """Also while they hang in C with the interpreter's lock held."""
    script = tmp_path / "user.py"
    script.write_text(USER)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True, env=environment) as user:
        assert user.stdout is not None
        lines = [line.strip() for line in iter(user.stdout.readline, "ready\n")]
        time.sleep(0.3)
        children = _descendants(user.pid)
        assert set(map(int, lines)) & children
        user.send_signal(signal.SIGKILL)
        user.wait()
    until = time.monotonic() + 20
    while left := {pid for pid in children if Path(f"/proc/{pid}/stat").exists() and _state(pid) != "Z"}:
        assert time.monotonic() < until, f"{left} are still there"
        time.sleep(0.05)


def _descendants(pid: int) -> set[int]:
    return {process.pid for process in psutil.Process(pid).children(recursive=True)}


def _state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "Z"
