"""A run's status is the ledger's; where the ledger has no end, silence tells it."""

from __future__ import annotations

from typing import Any

import pytest
from shown_runs import PriceList, again, killed_while_training, runs_of, short, statuses
from written_ledger import Writer, pipeline

from orchestrator.labels import Tag
from orchestrator.ledger.lease import TTL_S
from orchestrator.recipe.prices import Prices
from orchestrator.tracking.client import MlflowTracker
from orchestrator.tracking.statuses import SILENT_S, is_undecided
from orchestrator.tracking.sync import Sync


@pytest.mark.parametrize(
    ("end", "attempt", "stage", "whole"),
    [
        (("nan", "failed"), "FAILED", "FAILED", "FAILED"),
        (("drained", "cancelled"), "KILLED", "KILLED", "KILLED"),
        (("lost", None), "KILLED", "RUNNING", "RUNNING"),
        ((None, None), "RUNNING", "RUNNING", "RUNNING"),
    ],
)
def test_terminal_status_is_the_ledgers(
    story: Writer, tracker: MlflowTracker, prices: PriceList, end: tuple[Any, str | None], attempt: str, stage: str, whole: str
) -> None:
    story.launch()
    intent = story.begin("stage1")
    story.train(intent, 10)
    class_, launch = end
    if class_ is not None:
        story.close(intent, class_)
    if launch is not None:
        story.end(launch)
    Sync(story.ledger, tracker, prices, story.clock).update()
    found = {short(key): run for key, run in runs_of(tracker).items()}
    assert (found["stage1/a1"].status, found["stage1"].status, found["demo"].status) == (attempt, stage, whole)
    if class_ is not None:
        assert found["stage1/a1"].tags[Tag.CLASS] == class_


def test_launching_again_reopens_what_had_ended(story: Writer, tracker: MlflowTracker, prices: PriceList) -> None:
    story.launch()
    intent = story.begin("stage1")
    story.train(intent, 10)
    story.publish(intent, 10)
    story.close(intent, "drained")
    story.end("cancelled")
    Sync(story.ledger, tracker, prices, story.clock).update()
    story.now += 3600
    story.launch()
    resumed = story.begin("stage1", resume=10)
    story.train(resumed, 20)
    Sync(story.ledger, tracker, prices, story.clock).update()
    assert {short(key): run.status for key, run in runs_of(tracker).items()} == {
        "demo": "RUNNING", "stage1": "RUNNING", "stage1/a1": "KILLED", "stage1/a2": "RUNNING",
    }  # fmt: skip
    story.finish(resumed)
    story.end()
    Sync(story.ledger, tracker, prices, story.clock).update()
    demo = runs_of(tracker)["demo"]
    assert demo.status == "FINISHED" and demo.ended == pytest.approx(story.now, abs=1e-3)


def test_runs_of_a_killed_launch_end_when_they_have_been_silent_and_go_on_with_the_next(
    story: Writer, tracker: MlflowTracker, prices: Prices
) -> None:
    """Nobody wrote how it ended: the lease runs out, the journal stands still. The next launch takes the same runs up again."""
    heard = killed_while_training(story)
    names = ("demo", "stage1", "stage1/a1")
    Sync(story.ledger, tracker, prices, story.clock).update()
    assert statuses(tracker) == dict.fromkeys(names, ("RUNNING", None)), "driven"
    story.now = heard + TTL_S + 1
    facts = Sync(again(story.ledger), tracker, prices, story.clock).update()
    assert statuses(tracker) == dict.fromkeys(names, ("RUNNING", None)), "heard a moment ago"
    assert facts is not None and is_undecided(facts)
    story.now = heard + SILENT_S + 1
    for _ in range(2):
        facts = Sync(again(story.ledger), tracker, prices, story.clock).update()
        assert statuses(tracker) == dict.fromkeys(names, ("KILLED", pytest.approx(heard, abs=1e-3)))
        assert facts is not None and not is_undecided(facts)

    story.now = heard + 3600
    story.launch()
    killed = story.ledger.intent("stage1", story.inputs_digest("stage1"), 1)
    assert killed is not None
    Sync(again(story.ledger), tracker, prices, story.clock).update()
    assert statuses(tracker) == dict.fromkeys(names, ("RUNNING", None)), "the next driver has not yet said what became of it"
    story.close(killed, "lost")
    resumed = story.begin("stage1")
    story.train(resumed, 10)
    Sync(again(story.ledger), tracker, prices, story.clock).update()
    assert {name: status for name, (status, _) in statuses(tracker).items()} == {
        "demo": "RUNNING", "stage1": "RUNNING", "stage1/a1": "KILLED", "stage1/a2": "RUNNING",
    }  # fmt: skip
    story.finish(resumed)
    story.end()
    Sync(again(story.ledger), tracker, prices, story.clock).update()
    assert statuses(tracker)["demo"] == ("FINISHED", pytest.approx(story.now, abs=1e-3))
    assert statuses(tracker)["stage1"][0] == statuses(tracker)["stage1/a2"][0] == "FINISHED"


def test_an_agent_that_outlives_its_driver_is_running(story: Writer, tracker: MlflowTracker, prices: Prices) -> None:
    """A driver in a cluster dies, its pods train on."""
    heard = killed_while_training(story)
    story.now = heard + SILENT_S + 60
    Sync(again(story.ledger), tracker, prices, story.clock).update()
    assert {status for status, _ in statuses(tracker).values()} == {"KILLED"}
    intent = story.ledger.intent("stage1", story.inputs_digest("stage1"), 1)
    assert intent is not None
    story.train(intent, 30)
    Sync(again(story.ledger), tracker, prices, story.clock).update()
    assert set(statuses(tracker).values()) == {("RUNNING", None)}


def test_an_attempt_under_other_inputs_is_not_kept_running_by_a_launch(story: Writer, tracker: MlflowTracker, prices: Prices) -> None:
    heard = killed_while_training(story)
    story.now = heard + 3600
    story.pipeline = pipeline(steps=40)
    story.launch()
    story.train(story.begin("stage1"), 10)
    Sync(again(story.ledger), tracker, prices, story.clock).update()
    found = runs_of(tracker)
    assert {run.status for run in found.values() if run.tags.get(Tag.CURRENT) == "true"} == {"RUNNING"}
    old = [run for run in found.values() if run.tags.get(Tag.INPUTS, story.inputs_digest("stage1")) != story.inputs_digest("stage1")]
    assert [(run.status, run.ended) for run in old] == [("KILLED", pytest.approx(heard, abs=1e-3))] * 2
