"""What a pipeline is said to be: the step is the newest attempt's, and nothing that was paid leaves the bill."""

from __future__ import annotations

import io
from decimal import Decimal
from pathlib import Path

import pytest
import rich.console
from written_ledger import Writer, pipeline

from orchestrator import snapshot
from orchestrator.adapters import open_store
from orchestrator.cli import display
from orchestrator.history import History
from orchestrator.ledger import Ledger


@pytest.fixture
def story(tmp_path: Path) -> Writer:
    return Writer(Ledger(open_store(str(tmp_path / "store")), "demo"), pipeline())


def seen(story: Writer) -> snapshot.Snapshot:
    return snapshot.take(story.pipeline, History(Ledger(story.ledger.store, "demo")), story.now)


def drawn(current: snapshot.Snapshot) -> str:
    console = rich.console.Console(file=io.StringIO(), width=200)
    console.print(display.tree(current))
    text: str = console.file.getvalue()  # type: ignore[attr-defined]
    return text


def test_the_step_is_that_of_the_attempt_that_runs(story: Writer) -> None:
    """The first attempt reached 25 of 30 and published 10; the second goes on from 10."""
    story.launch()
    first = story.begin("stage1")
    story.train(first, 25)
    story.publish(first, 10)
    story.close(first, "lost")
    before = seen(story).stages[0]
    second = story.begin("stage1", resume=10)
    started = seen(story).stages[0]
    story.train(second, 12)
    now = seen(story).stages[0]
    assert (before.step, started.step, now.step) == (25, 10, 12)
    assert (started.reached, now.reached) == (25, 25)
    assert [one.step for one in now.attempts] == [25, 12]
    assert now.step_s is not None and now.eta_s == pytest.approx(18 * now.step_s)
    rows = display.whole(seen(story), None)["stages"]
    assert (rows[0]["step"], rows[0]["reached"]) == (12, 25)
    assert display.comparison(seen(story))[0]["steps"] == 12
    assert "12/30" in drawn(seen(story)) and "steps up to 25 are to be done again" in drawn(seen(story))


def test_the_loss_leaves_out_what_is_being_done_again(story: Writer) -> None:
    story.launch()
    first = story.begin("stage1")
    story.train(first, 25)
    story.close(first, "lost")
    second = story.begin("stage1", resume=10)
    story.train(second, 12)
    (last,) = [line["loss"] for piece in story.ledger.journal("stage1", second.inputs, 2) for line in piece.metrics if line["step"] == 12]
    assert seen(story).stages[0].loss == last, "the mean over the last tenth of 12 steps is the last one"


def test_what_was_paid_under_earlier_inputs_stays_in_the_bill(story: Writer) -> None:
    """Eight devices, then four: another stage, and the first one's devices were paid all the same."""
    story.launch()
    story.train(story.begin("stage1"), 20)
    spent = seen(story).usd
    story.end("cancelled")
    story.pipeline = pipeline(devices=4)
    story.launch()
    assert seen(story).usd == spent > 0
    story.train(story.begin("stage1"), 10)
    current = seen(story)
    stage = current.stages[0]
    (earlier,) = stage.earlier
    assert (earlier.step, earlier.attempts, earlier.committed) == (20, 1, False)
    assert stage.earlier_bill.usd == spent and current.usd == spent + stage.bill.usd
    assert current.usd == sum((one.usd for one in current.bill.attempts), Decimal(0))
    assert "20 steps under earlier inputs" in drawn(current)
    lines = display.comparison(current)
    assert sum(line["usd"] + line["earlier_usd"] for line in lines) == current.usd == display.whole(current, None)["usd"]


def test_a_stage_that_the_recipe_no_longer_names_stays_in_the_bill(story: Writer) -> None:
    story.three_stages()
    whole = seen(story)
    story.pipeline = story.pipeline.model_copy(update={"stages": story.pipeline.stages[:1]})
    short = seen(story)
    assert [one.stage for one in short.former] == ["stage2", "stage3"] and all(one.committed for one in short.former)
    assert short.usd == whole.usd and short.bill.held_s == pytest.approx(whole.bill.held_s)
    lines = display.comparison(short)
    assert [line["state"] for line in lines] == ["committed", "former", "former"]
    assert sum(line["usd"] + line["earlier_usd"] for line in lines) == whole.usd
    assert "no longer in the recipe" in drawn(short)
