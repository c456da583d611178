"""From journal pieces to the points of a curve."""

from __future__ import annotations

from pathlib import Path

from shown_runs import PriceList, again, short, shown
from written_ledger import Writer

from orchestrator.ports import Point
from orchestrator.tracking.client import MlflowTracker
from orchestrator.tracking.curves import attempt_curve, points, stage_curve
from orchestrator.tracking.facts import LedgerReader
from orchestrator.tracking.sync import Sync


def test_curves_are_the_ledgers_points(story: Writer, tracker: MlflowTracker, prices: PriceList, home: Path) -> None:
    story.three_stages()
    Sync(story.ledger, tracker, prices).update()
    runs = {short(key): run["curve"] for key, run in shown(home / "mlflow.db").items()}
    inputs_digest = story.results["stage2"].inputs_digest
    for attempt, last in ((1, 15), (2, 30)):
        lines = [line for piece in story.ledger.journal("stage2", inputs_digest, attempt) for line in piece.metrics]
        expected = sorted((p.key, p.step, round(p.time * 1000), p.value) for line in lines for p in points(line))
        assert runs[f"stage2/a{attempt}"] == expected
        assert max(point[1] for point in expected) == last
    # On the stage's own curve each step stands once, and the steps that were lost stand with the attempt that was not.
    losses = [point for point in runs["stage2"] if point[0] == "loss"]
    assert [step for _, step, _, _ in losses] == list(range(1, 31))
    second = {point for point in runs["stage2/a2"] if point[0] == "loss"}
    assert {point for point in losses if point[1] > 10} == second


def test_a_piece_that_was_refused_is_left_out_of_the_curve(story: Writer) -> None:
    """A node writes its pieces in order: where a later one is there, the missing one will never come."""
    story.launch()
    intent = story.begin("stage1")
    story.train(intent, 30)
    Path(story.ledger.store.url, story.ledger.keys.journal("stage1", intent.inputs_digest, 1, 0, 2)).unlink()
    facts = LedgerReader(again(story.ledger)).read()
    assert facts is not None
    pieces = facts.stages[0].attempts[0].pieces
    assert [seq for seq, _ in attempt_curve(pieces(-1))] == [0, 1, 3]
    assert [seq for seq, _ in attempt_curve(pieces(1))] == [3]


def test_a_steps_curve_waits_for_its_checkpoint(story: Writer) -> None:
    story.launch()
    intent = story.begin("stage1")
    story.train(intent, 20)
    read = lambda: LedgerReader(again(story.ledger)).read()  # noqa: E731
    steps = lambda cursor: [step for step, _ in stage_curve(read().stages[0].attempts, cursor)]  # noqa: E731
    assert steps(-1) == []
    story.publish(intent, 10)
    assert steps(-1) == list(range(1, 11)) and steps(7) == [8, 9, 10]


def test_only_numbers_of_steps_are_points() -> None:
    line = {"step": 3, "time": 9.5, "loss": 0.25, "note": "warm", "flag": True, "empty": None}
    assert list(points(line)) == [Point("loss", 0.25, 9.5, 3)]
    assert list(points({"phase": "init", "start": 1.0, "end": 2.0})) == []
