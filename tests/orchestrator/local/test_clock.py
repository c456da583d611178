"""A clock that is set changes no bill."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
from live_attempts import Attempts, stage_config

from orchestrator.agent.attempt import Attempt, Patience
from orchestrator.agent.events import Events
from orchestrator.agent.run_directory import RunDirectory
from orchestrator.local.clock import AttemptClock

HOUR = 3600.0


class Hands:
    """A wall clock that can be set, and one that cannot."""

    def __init__(self) -> None:
        self.boot, self.set_by = 100.0, 0.0

    def wall(self) -> float:
        return 1_790_000_000.0 + self.boot + self.set_by

    def pass_(self, seconds: float) -> None:
        self.boot += seconds


class NoTrainer:
    def reap_strangers(self) -> None: ...


@pytest.fixture
def hands() -> Iterator[Hands]:
    """What an attempt changes of this very process is put back."""
    kept = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    yield Hands()
    for number, handler in kept.items():
        signal.signal(number, handler)
    signal.set_wakeup_fd(-1)


def clock_of(hands: Hands) -> AttemptClock:
    return AttemptClock(hands.wall(), hands.boot, read_wall=hands.wall, read_boot=lambda: hands.boot)


@pytest.mark.parametrize("step", [HOUR, -HOUR])
def test_a_clock_that_is_set_moves_no_time_of_an_attempt_and_is_told_once(hands: Hands, step: float) -> None:
    clock = clock_of(hands)
    began = clock()
    hands.pass_(10)
    assert not clock.news()
    hands.set_by = step
    hands.pass_(5)
    assert clock() - began == 15
    assert clock.of_wall(hands.wall()) == pytest.approx(clock(), abs=0.01)
    news = clock.news()
    assert f"{step:+.0f}"[:5] in news and f"{clock():.3f}" in news and f"{hands.wall():.3f}" in news
    assert not clock.news()


@pytest.mark.parametrize("step", [HOUR, -HOUR])
def test_a_clock_that_is_set_between_two_steps_is_not_booked(tmp_path: Path, hands: Hands, step: float) -> None:
    """The trainer reads the wall clock: of the step in which it is set, its own times make no sense."""
    attempts = Attempts(tmp_path)
    intent = attempts.intend(config=stage_config(steps=100, every_steps=100), devices=2)
    run_dir = attempts.run_dir(intent)
    run_dir.mkdir(parents=True)
    clock = clock_of(hands)
    began = clock()
    attempt = Attempt(
        attempts.ledger, intent, RunDirectory(run_dir), NoTrainer(), Events(None), node=0, bound=began,  # type: ignore[arg-type]
        patience=Patience(store_s=1, peer_s=1), clock=clock,
    )  # fmt: skip
    attempt._books.phase = "init"
    booked = hands.wall()
    with (run_dir / "metrics.jsonl").open("a") as file:
        for number in range(1, 31):
            hands.pass_(1.0)
            if number == 12:
                hands.set_by = step
            now = hands.wall()
            line = {"step": number, "time": now, "loss": 0.5, "step_s": now - booked, "data_wait_s": 0.0, "checkpoint_s": 0.0}
            file.write(json.dumps(line) + "\n")
            file.flush()
            booked = now
            if number % 5 == 0:
                attempt._flush()
    attempt._books.timeline.book("step", clock())
    pieces = _taken(attempts, attempt)
    assert all(left.end == right.start for left, right in pairwise(pieces))
    assert pieces[0].start == began and pieces[-1].end == pytest.approx(began + 30, abs=0.01)
    spent = {name: sum(piece.spent.get(name, 0) for piece in pieces) for name in ("init", "step", "data_wait", "checkpoint")}
    assert sum(spent.values()) == pytest.approx(30) and spent["step"] >= 28, spent
    times = [line["time"] for piece in pieces for line in piece.metrics]
    assert [round(time - began) for time in times[-18:]] == list(range(13, 31)), "what is shown is of the attempt's clock too"


def _taken(attempts: Attempts, attempt: Attempt) -> list:  # type: ignore[type-arg]
    from live_attempts import until

    attempt._flush(final=True)
    until(lambda: attempt._books.uploads.idle, "everything is delivered")
    return attempts.journal(attempt.intent)
