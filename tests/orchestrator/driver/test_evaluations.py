"""Laws of evaluations beside the training: they hold nothing up, one goes on at a time, and none is lost with a driver."""

from __future__ import annotations

import pytest
from attempt_views import CHAIN, NOW
from driver_rig import Rig
from judging_rig import Judge, asking, seen

from orchestrator.driver.decide import Evaluate, Finish, StartAttempt, TellUnjudged, Wait, decide
from orchestrator.driver.facts import Judged
from orchestrator.driver.launch import NOT_EVALUATED
from orchestrator.driver.runner import Runner

ASKED, RUNNING, DONE, FAILED = Judged("asked"), Judged("running"), Judged("done"), Judged("failed", "why")


def test_the_next_stage_does_not_wait_for_the_evaluation() -> None:
    assert decide(CHAIN, seen(ASKED), NOW) == [Evaluate("one", "0a")]
    (action,) = decide(CHAIN, seen(RUNNING), NOW)
    assert isinstance(action, StartAttempt) and action.stage == "two"


def test_one_evaluation_goes_on_at_a_time() -> None:
    assert decide(CHAIN, seen(ASKED, ASKED, ASKED), NOW) == [Evaluate("one", "0a", yields=False)]
    assert decide(CHAIN, seen(DONE, RUNNING, ASKED), NOW) == [Wait("two is being evaluated")]
    assert decide(CHAIN, seen(DONE, DONE, ASKED), NOW) == [Evaluate("three", "0a", yields=False)], "nothing is left to train"


def test_a_launch_ends_when_the_last_evaluation_has() -> None:
    assert decide(CHAIN, seen(DONE, DONE, RUNNING), NOW) == [Wait("three is being evaluated")]
    assert decide(CHAIN, seen(DONE, DONE, DONE), NOW) == [Finish("succeeded", 0, "every stage is committed")]


def test_one_that_fails_is_told_once_and_stops_nothing() -> None:
    assert decide(CHAIN, seen(None, FAILED, DONE), NOW) == [TellUnjudged("two", "0a", "why")]
    told = Judged("failed", "why", told=True)
    assert decide(CHAIN, seen(None, told, DONE), NOW) == [Finish("succeeded", 0, "every stage is committed")]


def test_whoever_stops_begins_no_evaluation_and_waits_for_none() -> None:
    (action,) = decide(CHAIN, seen(ASKED, stop="drain"), NOW)
    assert isinstance(action, Finish) and action.status == "suspended"


# --- With a driver and a ledger ----------------------------------------------------------------------------------------------------


def test_every_stage_is_evaluated_and_its_ranks_are_told_not_to(rig: Rig) -> None:
    judge = Judge(rig)
    result = Runner(asking(), rig.ledger, rig.backend, rig.clock, evaluator=judge).run()
    assert result.status == "succeeded" and judge.began == ["one", "two", "three"] and judge.closed == 1
    for name in judge.began:
        (inputs_digest,) = rig.ledger.inputs_of(name)
        intent = rig.ledger.intent(name, inputs_digest, 1)
        assert intent is not None and intent.config.judging == "beside"
        assert [one.readings for one in rig.ledger.evaluations(name, inputs_digest)] == [{"accuracy": 0.9}]
    Runner(asking(), rig.ledger, rig.backend, rig.clock, evaluator=judge).run()
    assert judge.began == ["one", "two", "three"], "an answer is there"


def test_a_failure_is_an_event_and_the_next_launch_tries_again(rig: Rig) -> None:
    for launch in (1, 2):
        judge = Judge(rig, fails="no memory")
        assert Runner(asking(), rig.ledger, rig.backend, rig.clock, evaluator=judge).run().status == "succeeded"
        said = [event.detail for event in rig.ledger.events() if event.detail.startswith(NOT_EVALUATED)]
        assert said == [f"{NOT_EVALUATED}no memory. Try again with: osctl eval {name}" for name in ("one", "two", "three")] * launch


@pytest.mark.parametrize("change", ["prompts", "evaluate"])
def test_what_the_ranks_have_answered_is_not_asked_again_until_the_question_changes(rig: Rig, change: str) -> None:
    """Ledgers of 0.2.0 and before have readings in COMMITTED.json."""
    Runner(asking(), rig.ledger, rig.backend, rig.clock).run()
    judge = Judge(rig)
    Runner(asking(), rig.ledger, rig.backend, rig.clock, evaluator=judge).run()
    assert judge.began == []
    stages = list(asking().stages)
    more = {"prompts": ("a digit 4",)} if change == "prompts" else {"evaluate": {"kind": "digits", "frames": 1}}
    config = type(stages[1].config).model_validate(stages[1].config.model_dump() | more)
    stages[1] = stages[1].model_copy(update={"config": config})
    judge.fails = "not asked here"
    submitted = len(rig.backend.submitted)
    Runner(asking().model_copy(update={"stages": tuple(stages)}), rig.ledger, rig.backend, rig.clock, evaluator=judge).run()
    assert judge.began == ["two"] and len(rig.backend.submitted) == submitted, "judged again, and nothing is trained"
