"""Laws of the one fold of journals into time: however a journal comes, the sums are those of its pieces."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from orchestrator.accounting.node_fold import MOST_RUNS, WINDOW, NodeFold, fold
from orchestrator.ledger.records import JournalPiece, Totals

LAW = settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])


@st.composite
def nodes(draw: st.DrawFn) -> list[JournalPiece]:
    """One node's pieces: steps between checkpoints of every 7, some pieces without a step, some without anything."""
    pieces, now, step = [], draw(st.floats(1e9, 2e9)), draw(st.integers(0, 20))
    for seq in range(draw(st.integers(1, 30))):
        left = 7 - step % 7
        count = draw(st.integers(0, min(3, left)))
        spent = draw(st.dictionaries(st.sampled_from(["step", "data_wait", "checkpoint", "queue"]), st.floats(0, 100), max_size=3))
        lines = tuple({"step": step + each, "loss": 1 / (step + each), "step_s": 0.5} for each in range(1, count + 1))
        pieces.append(
            JournalPiece(
                node=0, seq=seq, start=now, end=now + sum(spent.values()), devices=2, spent=spent, metrics=lines,
                first_step=step + 1 if count else None, last_step=step + count if count else None,
            )
        )  # fmt: skip
        now, step = pieces[-1].end, step + count
    return pieces


@LAW
@given(nodes(), st.data())
def test_sums_that_were_written_down_go_on_to_the_same_bit(pieces: list[JournalPiece], data: st.DataObject) -> None:
    whole, first = NodeFold(0, 3, 7), NodeFold(0, 3, 7)
    cut = data.draw(st.integers(1, len(pieces)))
    for piece in pieces:
        whole.add(piece)
    for piece in pieces[:cut]:
        first.add(piece)
    second = NodeFold(0, 3, 7)
    second.begin_at(Totals.decode(first.totals().encode()))
    for piece in pieces:  # those that are in it change nothing
        second.add(piece)
    assert second.totals() == whole.totals() and second.time() == whole.time()


@LAW
@given(nodes(), st.integers(0, 8))
def test_steps_of_a_checkpoint_interval_are_never_told_apart_and_need_not_be(pieces: list[JournalPiece], interval: int) -> None:
    """At each step from which an attempt can be resumed, the coarse sums lose exactly what the pieces lose."""
    fine, coarse = fold(pieces, 0, 1), fold(pieces, 0, 7)
    for node_fine, node_coarse in zip(fine, coarse, strict=True):
        lost = [
            sum(s * min(b - a + 1, max(0, b - 7 * interval)) / (b - a + 1) for a, b, s in node.runs) for node in (node_fine, node_coarse)
        ]
        assert lost[0] == pytest.approx(lost[1])
        assert len(node_coarse.runs) <= len(node_fine.runs)


def test_what_is_remembered_of_a_node_is_bounded() -> None:
    sums = NodeFold(0)
    for seq in range(3 * MOST_RUNS):
        line = {"step": seq + 1, "loss": 1.0, "step_s": 1.0}
        sums.add(
            JournalPiece(
                node=0, seq=seq, start=seq, end=seq + 1, devices=1, spent={"step": 1.0}, first_step=seq + 1, last_step=seq + 1,
                metrics=(line,),
            )
        )  # fmt: skip
    assert len(sums.runs) <= MOST_RUNS and len(sums.recent) == WINDOW
    assert sum(seconds for *_, seconds, _ in sums.runs) == sums.spent["step"] == 3 * MOST_RUNS
    assert len(sums.totals().encode()) < 64 * 1024


def test_what_follows_the_last_step_takes_nothing_from_the_steps_before_it() -> None:
    """A drained attempt: its last checkpoint is of its last step, and what it did afterwards is no step that has to be done again."""

    def piece(seq: int, first: int | None, last: int | None, **spent: float) -> JournalPiece:
        return JournalPiece(node=0, seq=seq, start=float(seq), end=float(seq + 1), devices=2, spent=spent, first_step=first, last_step=last)

    pieces = [piece(0, 1, 30, step=3.0), piece(1, 31, 38, step=0.8), piece(2, None, None, drain=1.0), piece(3, None, None, publish=1.0)]
    node = NodeFold(0, every_steps=100)
    for each in pieces:
        node.add(each)
    assert node.time().runs == ((1, 38, 3.8),)
    node.add(piece(4, None, None, step=0.5))
    assert node.time().runs == ((1, 38, 3.8), (39, 39, 0.5))
    later = NodeFold(0, every_steps=100)
    later.begin_at(node.totals())
    for each in (node, later):
        each.add(piece(5, 39, 40, step=0.1))
        assert each.time().runs == ((1, 40, pytest.approx(4.4)),)
