"""Laws of the retry rules, row by row."""

from __future__ import annotations

import re
import shlex
from dataclasses import replace
from typing import get_args

import pytest
from attempt_views import EPOCH, NOW, ONE, Cause, attempt, checkpoint, ended, report, see

from opensora import identity
from opensora.dataset.usage import Usage, grouped
from orchestrator.driver.decide import CloseAttempt, Finish, StartAttempt, Wait, decide
from orchestrator.driver.facts import AttemptView
from orchestrator.driver.retries import BACKOFF_S, RULES, STALLS, classify, not_before, retry_verdict
from orchestrator.ledger.records import ExitClass
from orchestrator.ports import Life
from orchestrator.recipe.files import find
from orchestrator.recipe.resolve import load


def test_every_class_has_a_rule() -> None:
    assert set(RULES) == set(get_args(ExitClass))


@pytest.mark.parametrize("class_", ["config", "parent", "nan", "spike", "oom", "disk"])
def test_a_permanent_end_stops_at_once(class_: ExitClass) -> None:
    (action,) = decide(ONE, see(attempt(1, class_, published=20)), NOW)
    assert isinstance(action, Finish)
    assert (action.status, action.exit_code) == ("failed", 4 if class_ == "parent" else 3)
    assert class_ in action.reason and "attempt 1" in action.reason


@pytest.mark.parametrize("class_", ["hang", "store", "code", "data", "signal", "lost"])
def test_a_passing_end_is_tried_again_at_once(class_: ExitClass) -> None:
    assert decide(ONE, see(attempt(1, class_), checkpoints=(checkpoint(10),)), NOW) == [
        StartAttempt("one", "in", 2, checkpoint(10), f"one: attempt 1 ended with {class_}: why")
    ]


def test_a_drained_attempt_waits_for_the_next_launch_and_never_counts() -> None:
    (action,) = decide(ONE, see(attempt(1, "drained", published=30)), NOW)
    assert isinstance(action, Finish)
    assert (action.status, action.exit_code) == ("suspended", 130)
    assert "step 30" in action.reason
    drained = [attempt(number, "drained", epoch=EPOCH - 1) for number in range(1, 9)]
    (action,) = decide(ONE, see(*drained), NOW)
    assert isinstance(action, StartAttempt) and action.number == 9


def test_launching_again_gives_a_failed_stage_another_try() -> None:
    failed = [attempt(number, "code", failed_at=3, epoch=EPOCH - 1) for number in (1, 2)]
    (action,) = decide(ONE, see(*failed), NOW)
    assert isinstance(action, StartAttempt) and action.number == 3


def test_an_attempt_that_was_taken_over_alive_is_judged_by_who_took_it_over() -> None:
    old = attempt(1, "nan", epoch=EPOCH - 1)
    assert isinstance(decide(ONE, see(old), NOW)[0], StartAttempt), "of an earlier launch: a person has decided to try again"
    (action,) = decide(ONE, see(replace(old, adopted=True)), NOW)
    assert isinstance(action, Finish) and action.exit_code == 3, "of a driver that was lost: nobody has"


def test_code_that_fails_twice_at_the_same_step_stops_even_with_progress() -> None:
    twice = attempt(1, "code", published=20, failed_at=33), attempt(2, "code", resumed=20, published=30, failed_at=33)
    (action,) = decide(ONE, see(*twice), NOW)
    assert isinstance(action, Finish) and "same step 33" in action.reason
    moved = attempt(1, "code", published=20, failed_at=25), attempt(2, "code", resumed=20, published=30, failed_at=33)
    assert isinstance(decide(ONE, see(*moved), NOW)[0], StartAttempt)


@pytest.mark.parametrize("class_", ["code", "data"])
def test_what_is_retried_once_stops_at_the_second_end_without_progress(class_: ExitClass) -> None:
    (action,) = decide(ONE, see(attempt(1, class_, failed_at=3), attempt(2, class_, failed_at=5)), NOW)
    assert isinstance(action, Finish) and action.exit_code == 3
    moved = attempt(1, class_, published=10, failed_at=13), attempt(2, class_, resumed=10, published=20, failed_at=25)
    assert isinstance(decide(ONE, see(*moved), NOW)[0], StartAttempt)


@pytest.mark.parametrize(("class_", "advice"), [("oom", "activations.recompute"), ("spike", "loss_spike"), ("data", "cache")])
def test_advice_names_what_a_person_can_change(class_: ExitClass, advice: str) -> None:
    assert advice in retry_verdict([attempt(1, class_, failed_at=3), attempt(2, class_, failed_at=3)], max_attempts=5).reason


@pytest.mark.parametrize("class_", get_args(ExitClass))
@pytest.mark.parametrize("saved", [0, 20])
def test_an_end_has_one_next_step_and_it_is_true(class_: ExitClass, saved: int) -> None:
    """ "Go on from the last checkpoint with a lower optimizer.lr" stood beside "any change of the stage starts it anew"."""
    ends = [attempt(number, class_, resumed=saved, published=saved, failed_at=saved + 3) for number in (1, 2, 3)]
    stage = ONE.stages[0]
    said = retry_verdict(ends, 5, stage.config).reason
    assert "{" not in said and said.count("rains the stage anew") <= 1
    assert f"goes on from step {saved}" in said or "goes on" not in said
    for key, value in re.findall(r"--set (\S+?)=([^`\s]+)", said):
        field = key.removeprefix("one.")
        anew = identity.is_identity(field)
        after = said.split(f"{key}={value}`")[1].split(";")[0]
        assert ("anew" in after) == anew and (("goes on" in after) or ("begins again" in after)) == (not anew), (key, after)


def test_what_is_advised_can_be_pasted() -> None:
    for class_ in get_args(ExitClass):
        said = retry_verdict([attempt(number, class_, failed_at=3) for number in (1, 2, 3)], 5, ONE.stages[0].config).reason
        for command in re.findall(r"`osctl ([^`]+)`", said):
            words = shlex.split(command)
            assert words[0] in {"launch", "logs", "plan", "lineage", "doctor", "render", "resume"}, command
            settings = [words[place + 1] for place, word in enumerate(words) if word == "--set"]
            overrides = dict(setting.replace("one.", "stage1.", 1).split("=", 1) for setting in settings)
            load(find("demo"), overrides=overrides)


@pytest.mark.parametrize("class_", ["hang", "store", "signal", "lost"])
def test_three_ends_without_progress_stop_whatever_their_class(class_: ExitClass) -> None:
    ends = [attempt(1, "hang"), attempt(2, "store"), attempt(3, class_)]
    assert isinstance(decide(ONE, see(*ends[:2]), NOW)[0], StartAttempt)
    (action,) = decide(ONE, see(*ends), NOW)
    assert isinstance(action, Finish) and f"{STALLS} attempts in a row" in action.reason


def test_progress_between_ends_goes_on_for_ever_when_lost_and_is_bounded_when_hung() -> None:
    def ends(class_: ExitClass) -> list[AttemptView]:
        return [attempt(number, class_, resumed=10 * (number - 1), published=10 * number) for number in range(1, 13)]

    assert retry_verdict(ends("lost"), max_attempts=5).state == "go"
    assert retry_verdict(ends("signal"), max_attempts=5).state == "go"
    assert retry_verdict(ends("hang")[:4], max_attempts=5).state == "go"
    assert retry_verdict(ends("hang")[:5], max_attempts=5).state == "failed"


def test_backoff_grows_with_ends_without_progress_only() -> None:
    taken = [attempt(number, "preempted", ended=NOW) for number in range(1, 9)]
    assert [not_before(taken[:count], NOW) - NOW for count in range(1, 9)] == [*BACKOFF_S, *[BACKOFF_S[-1]] * 3]
    lost = [attempt(number, "lost", ended=NOW) for number in (1, 2, 3)]
    assert not_before([*lost[:2], attempt(3, "lost", published=10, ended=NOW)], NOW) == 0
    waiting = see(*lost[:2])
    (action,) = decide(ONE, waiting, NOW)
    assert isinstance(action, Wait) and action.until == NOW + BACKOFF_S[1]
    assert isinstance(decide(ONE, waiting, NOW + BACKOFF_S[1])[0], StartAttempt)


def test_a_nodes_clock_that_is_ahead_delays_no_attempt() -> None:
    """Its agent has told when the attempt ended: a year from now, by this driver's clock."""
    ahead = [attempt(number, "lost", ended=NOW + 3e7) for number in (1, 2)]
    assert not_before(ahead, NOW) == 0


def test_the_agents_word_counts_before_its_exit_code() -> None:
    assert classify(report("nan"), ended(137)).class_ == "nan"
    assert classify(None, ended(69)).class_ == "store"
    assert [classify(None, ended(code)).class_ for code in (None, 0, -9, 137, 143)] == ["lost"] * 5


@pytest.mark.parametrize(
    ("cause", "said", "class_", "by_person"),
    [
        ("preempted", None, "preempted", False),
        ("preempted", "peer", "preempted", False),
        ("preempted", "signal", "preempted", False),
        ("preempted", "drained", "preempted", False),
        ("preempted", "completed", "completed", False),
        ("preempted", "nan", "nan", False),
        ("oom_killed", None, "oom_killed", False),
        ("oom_killed", "peer", "oom_killed", False),
        ("oom_killed", "drained", "oom_killed", False),
        ("oom_killed", "oom", "oom", False),
        ("deleted", None, "lost", True),
        ("deleted", "drained", "lost", True),
        ("deleted", "completed", "completed", False),
        ("deleted", "config", "config", False),
        (None, "drained", "preempted", False),
        (None, "peer", "peer", False),
        (None, "hang", "hang", False),
    ],
)
def test_what_the_cluster_did_explains_what_an_agent_could_not_know(
    cause: Cause | None, said: ExitClass | None, class_: ExitClass, by_person: bool
) -> None:
    over = replace(attempt(1, life=ended(None, cause), traces=True), report=report(said, 30) if said else None)
    (action,) = decide(ONE, see(over), NOW)
    assert isinstance(action, CloseAttempt)
    assert (action.class_, action.by_person) == (class_, by_person)


def test_asked_to_save_it_is_drained_whatever_happens_to_its_job_meanwhile() -> None:
    for cause in ("preempted", "deleted", None):
        over = replace(attempt(1, life=ended(143, cause), traces=True), report=report("drained", 30), draining=True)  # type: ignore[arg-type]
        (action,) = decide(ONE, replace(see(over), stop="drain"), NOW)
        assert isinstance(action, CloseAttempt) and (action.class_, action.by_person) == ("drained", False)


def test_asked_to_leave_before_it_held_a_device_it_is_drained() -> None:
    waiting = replace(attempt(1, life=Life("ended")), draining=True)
    assert decide(ONE, replace(see(waiting), stop="drain"), NOW) == [CloseAttempt(waiting, "drained", "asked to leave before it had begun")]


@pytest.mark.parametrize(("class_", "exit_code"), [("unstarted", 3), ("refused", 4)])
def test_what_the_cluster_did_not_start_stops(class_: ExitClass, exit_code: int) -> None:
    (action,) = decide(ONE, see(attempt(1, class_)), NOW)
    assert isinstance(action, Finish) and (action.status, action.exit_code) == ("failed", exit_code)


def test_preempted_any_number_of_times_with_progress_it_goes_on() -> None:
    often = [attempt(number, "preempted", resumed=number - 1, published=number) for number in range(1, 30)]
    assert retry_verdict(often, max_attempts=1).state == "go"
    assert retry_verdict([attempt(1, "preempted"), attempt(2, "preempted")], max_attempts=1).state == "go"


def test_preempted_any_number_of_times_without_progress_it_goes_on_and_hides_no_stall() -> None:
    taken = [attempt(number, "preempted") for number in range(1, 30)]
    assert retry_verdict(taken, max_attempts=1).state == "go"
    assert retry_verdict([attempt(1, "lost"), *taken, attempt(31, "lost"), attempt(32, "preempted")], max_attempts=9).state == "go"
    mixed = [attempt(1, "lost"), attempt(2, "preempted"), attempt(3, "lost"), attempt(4, "preempted"), attempt(5, "lost")]
    assert retry_verdict(mixed, max_attempts=9).state == "failed"


def test_other_clips_than_those_of_the_checkpoint_are_no_reason_to_try_again() -> None:
    end = attempt(1, "data", failed_at=3)
    assert end.outcome is not None
    reason = "data.source: step 40 was trained on other clips than the 6 that can be used now"
    verdict = retry_verdict([replace(end, outcome=end.outcome.model_copy(update={"reason": reason}))], max_attempts=5)
    assert (verdict.state, verdict.exit_code) == ("failed", 3) and "cache" not in verdict.reason
    assert retry_verdict([end], max_attempts=5).state == "go"


def test_a_stage_that_leaves_out_too_much_is_not_tried_again_and_says_how_to_train_on_the_rest() -> None:
    why = Usage(20, 2, grouped({f"{number}.mp4": "No such file" for number in range(18)}, 18)).refusal(0.5)
    end = attempt(1, "data", failed_at=0)
    assert end.outcome is not None and why is not None
    verdict = retry_verdict([replace(end, outcome=end.outcome.model_copy(update={"reason": why}))], max_attempts=5)
    assert (verdict.state, verdict.exit_code) == ("failed", 3)
    assert "18 of 20" in verdict.reason and f"--set {end.stage}.data.max_left_out=1`" in verdict.reason


def test_memory_is_tried_once_more() -> None:
    assert retry_verdict([attempt(1, "oom_killed")], max_attempts=5).state == "go"
    verdict = retry_verdict([attempt(1, "oom_killed"), attempt(2, "oom_killed")], max_attempts=5)
    assert (verdict.state, verdict.exit_code) == ("failed", 3) and "memory" in verdict.reason


def by_person(number: int, epoch: int, closed_in: int) -> AttemptView:
    closed = attempt(number, "lost", published=20, epoch=epoch)
    assert closed.outcome is not None
    return replace(closed, outcome=closed.outcome.model_copy(update={"by_person": True, "epoch": closed_in}))


def test_what_a_person_deleted_waits_for_a_person() -> None:
    (action,) = decide(ONE, see(by_person(1, EPOCH, EPOCH)), NOW)
    assert isinstance(action, Finish) and action.exit_code == 3 and "`osctl resume` goes on from step 20" in action.reason
    (action,) = decide(ONE, see(by_person(1, EPOCH - 1, EPOCH)), NOW)
    assert isinstance(action, Finish), "found by a driver that did not start it"
    (action,) = decide(ONE, see(by_person(1, EPOCH - 1, EPOCH - 1)), NOW)
    assert isinstance(action, StartAttempt), "launched again"


def test_advice_is_about_what_was_launched() -> None:
    """`osctl launch one --set …` after a launch of all stages trained that stage alone."""
    ends = [attempt(number, "nan", failed_at=3) for number in (1, 2, 3)]
    assert "`osctl launch one --set one.optimizer.lr=" in retry_verdict(ends, 5, ONE.stages[0].config, alone=True).reason
    assert "`osctl launch --set one.optimizer.lr=" in retry_verdict(ends, 5, ONE.stages[0].config, alone=False).reason
