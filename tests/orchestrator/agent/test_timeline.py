"""Laws of the time ledger, at its source."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.agent.timeline import MICRO, Timeline
from orchestrator.ledger.records import HELD, JournalPiece

START = 1_790_000_000.25
times = st.floats(START - 5, START + 100)
lengths = st.one_of(st.floats(0, 20), st.sampled_from([None, "x", -1.0, float("inf"), float("nan")]))
phases = st.fixed_dictionaries({"phase": st.sampled_from(["init", "evaluate", "checkpoint", "lost", "x"]), "start": times, "end": times})
steps = st.fixed_dictionaries(
    {"step": st.integers(0, 30)}, optional={"time": times, "data_wait_s": lengths, "step_s": lengths, "checkpoint_s": lengths}
)
acts = st.lists(
    st.one_of(
        st.tuples(st.just("line"), st.one_of(phases, steps), times),
        st.tuples(st.just("book"), st.sampled_from(HELD), times),
        st.tuples(st.just("take"), st.none(), st.just(0.0)),
    ),
    max_size=40,
)


def timeline(every_steps: int = 10) -> Timeline:
    return Timeline(START, node=0, devices=2, every_steps=every_steps)


def step(number: int, end: float, *, wait: float = 0.0, compute: float = 1.0, save: float = 0.0) -> dict[str, Any]:
    return {"step": number, "time": end, "data_wait_s": wait, "step_s": compute, "checkpoint_s": save}


def micro(seconds: float) -> int:
    return round(seconds * MICRO)


@given(acts, st.integers(1, 7))
def test_pieces_are_contiguous_and_each_sums_to_its_interval_whatever_is_observed(acts: list[Any], every_steps: int) -> None:
    line = timeline(every_steps)
    pieces: list[JournalPiece] = []
    for act, what, now in acts:
        if act == "line":
            line.line(what, now)
        elif act == "book":
            line.book(what, now)
        else:
            pieces += line.take()
    pieces += line.take()
    edge = START
    for number, piece in enumerate(pieces):
        assert piece.seq == number
        assert piece.start == edge < piece.end
        assert sum(micro(spent) for spent in piece.spent.values()) == micro(piece.end) - micro(piece.start)
        edge = piece.end
    assert edge == line.edge


@given(acts)
def test_no_line_is_lost_and_none_is_told_twice_once_its_time_is_booked(acts: list[Any]) -> None:
    line, told = timeline(), []
    for act, what, now in acts:
        if act == "line":
            line.line(what, now)
            told += [what] if "step" in what else []
        elif act == "take":
            line.take()
    line = timeline()
    for act, what, now in acts:
        if act == "line":
            line.line(what, now)
    line.book("publish", START + 1000)
    assert [entry for piece in line.take() for entry in piece.metrics] == told


def test_a_step_is_cut_into_waiting_computing_and_saving() -> None:
    line = timeline()
    line.line({"phase": "init", "start": START, "end": START + 3}, START + 10)
    line.line(step(1, START + 6, wait=0.5, compute=2, save=0.5), START + 10)
    (piece,) = line.take()
    assert piece.spent == {"init": 3, "data_wait": 0.5, "step": 2, "checkpoint": 0.5}
    assert (piece.first_step, piece.last_step) == (1, 1)


def test_a_piece_ends_with_each_checkpoint_step() -> None:
    line = timeline(every_steps=3)
    for number in range(1, 9):
        line.line(step(number, START + number), START + 100)
    assert [(piece.first_step, piece.last_step) for piece in line.take()] == [(1, 3), (4, 6), (7, 8)]


def test_time_between_two_steps_belongs_to_the_steps_and_before_the_first_to_init() -> None:
    line = timeline()
    line.line(step(1, START + 3), START + 100)
    line.line(step(2, START + 5), START + 100)
    (piece,) = line.take()
    assert piece.spent == {"init": 2, "step": 3}


def test_a_line_that_overlaps_what_is_booked_counts_only_the_rest() -> None:
    line = timeline()
    line.book("init", START + 2.5)
    line.line(step(1, START + 4, wait=1, compute=2, save=0.5), START + 100)
    (piece,) = line.take()
    assert piece.spent == pytest.approx({"init": 2.5, "step": 1.0, "checkpoint": 0.5})


def test_a_line_from_the_future_ends_now() -> None:
    line = timeline()
    line.line(step(1, START + 50, compute=1), START + 4)
    assert line.edge == START + 4


def test_nothing_is_booked_beyond_what_was_shown() -> None:
    line = timeline()
    line.line(step(1, START + 1), START + 60)
    assert line.take()[0].end == START + 1
    assert line.take() == []


def test_a_trainer_cannot_book_what_is_not_its_own() -> None:
    line = timeline()
    line.line({"phase": "unaccounted", "start": START, "end": START + 1}, START + 9)
    assert line.take()[0].spent == {"init": 1}


def test_a_node_other_than_the_first_counts_its_steps_and_leaves_the_metrics_to_it() -> None:
    line = Timeline(START, node=3, devices=2, every_steps=10)
    line.line(step(4, START + 2), START + 9)
    line.line(step(5, START + 3), START + 9)
    (piece,) = line.take()
    assert (piece.node, piece.first_step, piece.last_step, piece.metrics) == (3, 4, 5, ())
    assert piece.spent["step"] == pytest.approx(2.0)
