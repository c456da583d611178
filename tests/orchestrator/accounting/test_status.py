"""What a pipeline is said to be: the step is the newest attempt's, and nothing that was paid leaves the bill."""

from __future__ import annotations

import io
import os
import time
from decimal import Decimal
from pathlib import Path

import pytest
import rich.console
from written_ledger import Writer, pipeline

from orchestrator.accounting.history import History
from orchestrator.accounting.status import AttemptStatus, Snapshot, take_snapshot
from orchestrator.cli import display
from orchestrator.ledger import lineage
from orchestrator.ledger.records import ClipsUsed, LeftOut
from orchestrator.ledger.store import Ledger
from orchestrator.pipelines import accounts
from orchestrator.stores import open_store


@pytest.fixture
def story(tmp_path: Path) -> Writer:
    return Writer(Ledger(open_store(str(tmp_path / "store")), "demo"), pipeline())


def seen(story: Writer) -> Snapshot:
    return take_snapshot(story.pipeline, History(Ledger(story.ledger.store, "demo")), story.now)


def drawn(current: Snapshot) -> str:
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
    assert accounts.comparison(seen(story))[0]["steps"] == 12
    assert "12/30" in drawn(seen(story)) and "steps up to 25 are to be done again" in drawn(seen(story))


@pytest.mark.parametrize("ahead_s", [-600, 600])
def test_silence_is_told_by_the_stores_clock_where_an_agents_clock_is_another_one(story: Writer, ahead_s: float) -> None:
    """`ahead_s`: so far is the agent's clock ahead of that of the one who looks."""
    story.launch()
    intent = story.begin("stage1")
    story.train(intent, 25)

    def look() -> AttemptStatus:
        history = History(Ledger(story.ledger.store, "demo"))
        return take_snapshot(story.pipeline, history, story.now - ahead_s).stages[0].attempts[0]

    assert (look().state, look().reason) == ("running", "")
    for path in Path(story.ledger.store.url).rglob("*.*"):
        os.utime(path, (time.time() - 100, time.time() - 100))
    assert (look().state, look().reason[:21]) == ("silent", "nothing heard for 100")


def test_the_loss_leaves_out_what_is_being_done_again(story: Writer) -> None:
    story.launch()
    first = story.begin("stage1")
    story.train(first, 25)
    story.close(first, "lost")
    second = story.begin("stage1", resume=10)
    story.train(second, 12)
    (last,) = [
        line["loss"] for piece in story.ledger.journal("stage1", second.inputs_digest, 2) for line in piece.metrics if line["step"] == 12
    ]
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
    lines = accounts.comparison(current)
    assert sum(line["usd"] + line["earlier_usd"] for line in lines) == current.usd == display.whole(current, None)["usd"]


def test_a_stage_that_the_recipe_no_longer_names_stays_in_the_bill(story: Writer) -> None:
    story.three_stages()
    whole = seen(story)
    story.pipeline = story.pipeline.model_copy(update={"stages": story.pipeline.stages[:1]})
    short = seen(story)
    assert [one.stage for one in short.former] == ["stage2", "stage3"] and all(one.committed for one in short.former)
    assert short.usd == whole.usd and short.bill.held_s == pytest.approx(whole.bill.held_s)
    lines = accounts.comparison(short)
    assert [line["state"] for line in lines] == ["committed", "former", "former"]
    assert sum(line["usd"] + line["earlier_usd"] for line in lines) == whole.usd
    assert "no longer in the recipe" in drawn(short)


def test_what_of_the_data_is_not_used_stands_beside_the_stages_until_the_end(story: Writer) -> None:
    story.launch()
    first = story.begin("stage1")
    story.train(first, 10)
    assert seen(story).stages[0].data is None and display.not_used(seen(story)) == []
    reasons = (LeftOut(reason="No such file", clips=18, first=("[red]gone\x1b[31m.mp4",)),)
    said = ClipsUsed(clips=20, used=2, left_out=reasons, captions_cut=1, caption_tokens=6, remarks=("1 clip has 60 frames a second",))
    story.ledger.write_clips(first, said, None)
    sentences = "18 of 20 clips are left out: 18 ([red]gone", "captions are cut at 6 words: 1 of 2", "1 clip has 60 frames a second"
    for _ in range(2):
        lines = display.not_used(seen(story))
        assert [line.startswith(f"stage1: {sentence}") for line, sentence in zip(lines, sentences, strict=True)] == [True] * 3
        assert all(sentence in " ".join(drawn(seen(story)).split()) for sentence in sentences) and "\x1b" not in drawn(seen(story))
        row = display.whole(seen(story), None)["stages"][0]["data"]
        assert (row["clips"], row["clips_left_out"], row["captions_cut"], row["sentences"]) == (20, 18, 1, list(said.sentences()))
        assert display.comparison_cells(accounts.comparison(seen(story)))[0][0]["left_out"] == "18 of 20"
        story.finish(first)
    (link,) = lineage.links(Ledger(story.ledger.store, "demo"), "stage1", first.inputs_digest, full=False)
    assert [remark for remark in link.remarks if "left out" in remark] == [said.sentences()[0]]


def test_a_sample_that_was_not_delivered_is_said_at_the_end_whoever_followed(story: Writer, capsys: pytest.CaptureFixture[str]) -> None:
    story.launch()
    intent = story.begin("stage1")
    story.train(intent, 30)
    story.publish(intent, 30)
    story.close(intent, "completed", reason="the sample of prompt 1 (a dog) was not delivered: unknown word 'dog'")
    display.say_not_used(seen(story))
    assert capsys.readouterr().err == "stage1: warning: the sample of prompt 1 (a dog) was not delivered: unknown word 'dog'\n"


def test_stages_that_say_the_same_say_it_once(story: Writer) -> None:
    story.launch()
    for name in ("stage1", "stage2"):
        intent = story.begin(name)
        story.ledger.write_clips(intent, ClipsUsed(clips=20, used=20, captions_cut=7, caption_tokens=6), None)
        story.finish(intent)
    (line,) = display.not_used(seen(story))
    assert line.startswith("stage1, stage2: captions are cut at 6 words: 7 of 20")


def test_a_stage_with_nothing_to_draw_or_to_judge_saves_at_its_end(story: Writer) -> None:
    story.launch()
    intent = story.begin("stage1")
    story.train(intent, 30)
    assert display.describe(seen(story).stages[0]) == "attempt 1, evaluating"
    stage = story.pipeline.stages[0]
    silent = stage.model_copy(update={"config": stage.config.model_copy(update={"prompts": (), "evaluate": None})})
    story.pipeline = story.pipeline.model_copy(update={"stages": (silent, *story.pipeline.stages[1:])})
    assert display.describe(seen(story).stages[0]) == "attempt 1, saving"
