"""Laws of `decide`: the retry table row by row, and a model world in which anything may happen in any order."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Literal, get_args

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from opensora import identity
from opensora.config import StageConfig
from orchestrator.cluster import ClusterProfile
from orchestrator.config import Pipeline, Stage, StageSpec, find, load
from orchestrator.decide import (
    BACKOFF_S,
    RULES,
    STALLS,
    Attempt,
    Checkpoint,
    CloseAttempt,
    Commit,
    Drain,
    Finish,
    Kill,
    Observed,
    StageView,
    StartAttempt,
    Wait,
    classify,
    decide,
    judge,
    not_before,
)
from orchestrator.ports import Life
from orchestrator.records import EXIT_CODES, ExitClass, Outcome, Report

CONFIG = StageConfig.model_validate(
    {
        "objective": {"kind": "flow"},
        "sampling": {"method": "euler"},
        "data": {"source": {"kind": "digits", "clips": 4}, "frames": 1, "height": 16, "width": 16},
        "autoencoder": {"kind": "patch"},
        "text": {"kind": "words"},
        "steps": 40,
        "batch_size": 1,
        "checkpoint": {"every_steps": 10},
    }
)
NOW = 1000.0
Cause = Literal["preempted", "oom_killed", "deleted"]
EPOCH = 7


def pipeline(*parents: tuple[str, str | None], backend: str = "local", max_attempts: int = 5) -> Pipeline:
    return Pipeline.model_validate(
        {
            "name": "demo",
            "backend": backend,
            "store": "store",
            "tracking": "none",
            "experiment": "demo",
            "budget_usd": None,
            "flush_s": 1.0,
            "trainer": (),
            "stages": tuple(
                Stage(spec=StageSpec(name=name, config="x.yaml", parent=parent, max_attempts=max_attempts), config=CONFIG)
                for name, parent in parents
            ),
        }
    )


ONE = pipeline(("one", None))
CHAIN = pipeline(("one", None), ("two", "one"), ("three", "two"))


def outcome(class_: ExitClass, ended: float = NOW - 100, step: int | None = None) -> Outcome:
    return Outcome.model_validate(
        {
            "class": class_, "exit_code": EXIT_CODES.get(class_), "reason": "why", "step": step, "bound": ended - 1, "ended": ended,
            "devices": 1, "unaccounted_s": 0, "epoch": EPOCH,
        }
    )  # fmt: skip


def report(class_: ExitClass, step: int | None = None) -> Report:
    return Report.model_validate({"class": class_, "reason": "why", "step": step, "started": 1.0, "ended": 2.0})


def attempt(
    number: int,
    class_: ExitClass | None = None,
    *,
    life: Life | None = None,
    resumed: int = 0,
    published: int = 0,
    failed_at: int | None = None,
    epoch: int = EPOCH,
    traces: bool = False,
    ended: float = NOW - 100,
    stage: str = "one",
    inputs: str = "in",
) -> Attempt:
    return Attempt(
        stage,
        inputs,
        number,
        epoch,
        resumed,
        life or Life("absent"),
        published,
        traces or class_ is not None,
        report(class_, failed_at) if class_ is not None and class_ != "lost" else None,
        outcome(class_, ended) if class_ is not None else None,
    )


def see(*attempts: Attempt, targets: frozenset[str] | None = None, **view: object) -> Observed:
    only = StageView("one", "in", attempts=attempts, **view)  # type: ignore[arg-type]
    return Observed(EPOCH, {"one": only}, targets or frozenset({"one"}))


def ended(exit_code: int | None = None, cause: Cause | None = None, bound: float | None = NOW - 50) -> Life:
    return Life("ended", bound, NOW - 1, exit_code, cause)


def checkpoint(step: int, number: int = 1, complete: bool = False) -> Checkpoint:
    return Checkpoint(f"step-{step}-a{number}", f"digest-{step}-{number}", step, number, complete)


# --- The retry table ---------------------------------------------------------------------------------------------------------------


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
    assert advice in judge([attempt(1, class_, failed_at=3), attempt(2, class_, failed_at=3)], max_attempts=5).reason


@pytest.mark.parametrize("class_", get_args(ExitClass))
@pytest.mark.parametrize("saved", [0, 20])
def test_an_end_has_one_next_step_and_it_is_true(class_: ExitClass, saved: int) -> None:
    """ "Go on from the last checkpoint with a lower optimizer.lr" stood beside "any change of the stage starts it anew"."""
    ends = [attempt(number, class_, resumed=saved, published=saved, failed_at=saved + 3) for number in (1, 2, 3)]
    stage = ONE.stages[0]
    said = judge(ends, 5, stage.config).reason
    assert "{" not in said and said.count("rains the stage anew") <= 1
    assert f"goes on from step {saved}" in said or "goes on" not in said
    for key, value in re.findall(r"--set (\S+?)=([^`\s]+)", said):
        field = key.removeprefix("one.")
        anew = identity.is_identity(field)
        after = said.split(f"{key}={value}`")[1].split(";")[0]
        assert ("anew" in after) == anew and (("goes on" in after) or ("begins again" in after)) == (not anew), (key, after)


def test_what_is_advised_can_be_pasted() -> None:
    for class_ in get_args(ExitClass):
        said = judge([attempt(number, class_, failed_at=3) for number in (1, 2, 3)], 5, ONE.stages[0].config).reason
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
    def ends(class_: ExitClass) -> list[Attempt]:
        return [attempt(number, class_, resumed=10 * (number - 1), published=10 * number) for number in range(1, 13)]

    assert judge(ends("lost"), max_attempts=5).state == "go"
    assert judge(ends("signal"), max_attempts=5).state == "go"
    assert judge(ends("hang")[:4], max_attempts=5).state == "go"
    assert judge(ends("hang")[:5], max_attempts=5).state == "failed"


def test_backoff_grows_with_ends_without_progress_only() -> None:
    taken = [attempt(number, "preempted", ended=NOW) for number in range(1, 9)]
    assert [not_before(taken[:count]) - NOW for count in range(1, 9)] == [*BACKOFF_S, *[BACKOFF_S[-1]] * 3]
    lost = [attempt(number, "lost", ended=NOW) for number in (1, 2, 3)]
    assert not_before([*lost[:2], attempt(3, "lost", published=10, ended=NOW)]) == 0
    waiting = see(*lost[:2])
    (action,) = decide(ONE, waiting, NOW)
    assert isinstance(action, Wait) and action.until == NOW + BACKOFF_S[1]
    assert isinstance(decide(ONE, waiting, NOW + BACKOFF_S[1])[0], StartAttempt)


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
    assert judge(often, max_attempts=1).state == "go"
    assert judge([attempt(1, "preempted"), attempt(2, "preempted")], max_attempts=1).state == "go"


def test_preempted_any_number_of_times_without_progress_it_goes_on_and_hides_no_stall() -> None:
    taken = [attempt(number, "preempted") for number in range(1, 30)]
    assert judge(taken, max_attempts=1).state == "go"
    assert judge([attempt(1, "lost"), *taken, attempt(31, "lost"), attempt(32, "preempted")], max_attempts=9).state == "go"
    mixed = [attempt(1, "lost"), attempt(2, "preempted"), attempt(3, "lost"), attempt(4, "preempted"), attempt(5, "lost")]
    assert judge(mixed, max_attempts=9).state == "failed"


def test_other_clips_than_those_of_the_checkpoint_are_no_reason_to_try_again() -> None:
    end = attempt(1, "data", failed_at=3)
    assert end.outcome is not None
    reason = "data.source: step 40 was trained on other clips than the 6 that can be used now"
    verdict = judge([replace(end, outcome=end.outcome.model_copy(update={"reason": reason}))], max_attempts=5)
    assert (verdict.state, verdict.exit_code) == ("failed", 3) and "cache" not in verdict.reason
    assert judge([end], max_attempts=5).state == "go"


def test_memory_is_tried_once_more() -> None:
    assert judge([attempt(1, "oom_killed")], max_attempts=5).state == "go"
    verdict = judge([attempt(1, "oom_killed"), attempt(2, "oom_killed")], max_attempts=5)
    assert (verdict.state, verdict.exit_code) == ("failed", 3) and "memory" in verdict.reason


def by_person(number: int, epoch: int, closed_in: int) -> Attempt:
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


# --- Waiting for a cluster ---------------------------------------------------------------------------------------------------------

PATIENT = ONE.model_copy(
    update={
        "backend": "kubernetes",
        "cluster": ClusterProfile.model_validate(
            {
                "name": "test", "image": "t", "driver_image": "d", "allow_unpinned": ("t", "d"), "device": "cpu-core", "cpu": "1",
                "memory": "1Gi", "shm": "64Mi", "start_deadline_s": 60,
            }
        ),
    }
)  # fmt: skip


def waiting(what_for: Literal["capacity", "fault"] | None, since: float, state: Literal["running", "absent"] = "running") -> Attempt:
    return attempt(1, life=Life(state, waits="why not", waits_for=what_for, since=since))


def test_a_fault_is_waited_for_until_its_deadline_and_capacity_for_ever() -> None:
    assert decide(PATIENT, see(waiting("fault", NOW - 59)), NOW) == [Wait("one attempt 1 waits: why not", NOW + 1)]
    (action,) = decide(PATIENT, see(waiting("fault", NOW - 60)), NOW)
    assert isinstance(action, Kill) and "why not" in action.why and "60 s" in action.why
    for what_for in ("capacity", None):
        assert decide(PATIENT, see(waiting(what_for, 0.0)), NOW) == [Wait("one attempt 1 waits: why not")]  # type: ignore[arg-type]


def test_given_up_it_is_closed_as_unstarted_once_it_is_gone() -> None:
    gone = replace(attempt(1, life=Life("ended")), given_up="not started within 60 s: why not")
    assert decide(PATIENT, see(gone), NOW) == [CloseAttempt(gone, "unstarted", "not started within 60 s: why not")]


def test_a_submission_that_a_fault_stands_in_the_way_of_is_tried_until_the_deadline() -> None:
    (action,) = decide(PATIENT, see(waiting("fault", NOW - 59, "absent")), NOW)
    assert isinstance(action, StartAttempt) and action.number == 1
    (action,) = decide(PATIENT, see(waiting("fault", NOW - 60, "absent")), NOW)
    assert isinstance(action, CloseAttempt) and action.class_ == "unstarted"


def test_a_refused_attempt_is_closed_so_that_nothing_unborn_stays() -> None:
    unborn = attempt(1)
    assert decide(ONE, see(unborn, refused="no"), NOW) == [CloseAttempt(unborn, "refused", "no")]


# --- Lives -------------------------------------------------------------------------------------------------------------------------


def test_an_attempt_that_cannot_be_seen_is_left_alone() -> None:
    observed = see(attempt(1, life=Life("unknown"), traces=True))
    (action,) = decide(ONE, observed, NOW)
    assert isinstance(action, Wait) and "cannot say" in action.reason
    (action,) = decide(ONE, replace(observed, stop="drain"), NOW)
    assert isinstance(action, Wait)


def test_an_intent_that_never_lived_is_started_under_its_own_number() -> None:
    (action,) = decide(ONE, see(attempt(1, "lost"), attempt(2)), NOW)
    assert isinstance(action, StartAttempt) and action.number == 2


def test_an_intent_of_a_dead_driver_is_closed_and_its_number_spent() -> None:
    old = attempt(1, epoch=EPOCH - 1)
    assert decide(ONE, see(old), NOW) == [CloseAttempt(old, "lost", "its driver ended before it was started")]
    (action,) = decide(ONE, see(attempt(1, "lost", epoch=EPOCH - 1)), NOW)
    assert isinstance(action, StartAttempt) and action.number == 2


def test_a_live_attempt_of_a_dead_driver_is_adopted() -> None:
    (action,) = decide(ONE, see(attempt(1, life=Life("running"), epoch=EPOCH - 1)), NOW)
    assert isinstance(action, Wait)


def test_an_attempt_that_left_traces_is_closed_even_if_the_backend_forgot_it() -> None:
    forgotten = attempt(1, traces=True)
    (action,) = decide(ONE, see(forgotten), NOW)
    assert isinstance(action, CloseAttempt) and action.class_ == "lost"


def test_what_an_earlier_configuration_left_running_is_drained_before_anything_starts() -> None:
    stray = attempt(1, life=Life("running"), inputs="old", epoch=EPOCH - 1)
    assert decide(ONE, see(strays=(stray,)), NOW) == [Drain(stray)]
    (action,) = decide(ONE, see(strays=(replace(stray, draining=True),)), NOW)
    assert isinstance(action, Wait)
    dead = replace(stray, life=Life("ended", 1.0, 2.0, 143))
    assert isinstance(decide(ONE, see(strays=(dead,)), NOW)[0], CloseAttempt)


# --- Commits and targets -----------------------------------------------------------------------------------------------------------


def test_completed_is_closed_then_committed_then_done() -> None:
    done = replace(attempt(1, life=Life("ended", 1.0, 2.0, 0), traces=True), report=report("completed", 40))
    last = checkpoint(40, complete=True)
    assert decide(ONE, see(done, checkpoints=(checkpoint(30), last)), NOW) == [CloseAttempt(done, "completed", "why")]
    closed = attempt(1, "completed", published=40)
    assert decide(ONE, see(closed, checkpoints=(checkpoint(30), last)), NOW) == [Commit(closed, last)]
    assert decide(ONE, see(closed, committed=True), NOW) == [Finish("succeeded", 0, "every stage is committed")]


def test_nothing_is_committed_without_a_complete_checkpoint_that_holds() -> None:
    (action,) = decide(ONE, see(attempt(1, "completed", published=40), checkpoints=(checkpoint(30),)), NOW)
    assert isinstance(action, StartAttempt) and action.resume == checkpoint(30)


def test_a_complete_checkpoint_of_an_attempt_that_died_before_its_last_word_is_resumed_not_committed() -> None:
    last = checkpoint(40, complete=True)
    (action,) = decide(ONE, see(attempt(1, "lost", published=40), checkpoints=(last,)), NOW)
    assert isinstance(action, StartAttempt) and action.resume == last
    found = attempt(1, "lost", published=40), attempt(2, "completed", resumed=40)
    (action,) = decide(ONE, see(*found, checkpoints=(last,)), NOW)
    assert isinstance(action, Commit) and (action.attempt.number, action.checkpoint) == (2, last)


def views(*committed: str, **given: StageView) -> dict[str, StageView]:
    known = {stage.name: StageView(stage.name, None) for stage in CHAIN.stages}
    for name in committed:
        known[name] = StageView(name, "in", committed=True)
    return known | given


def test_stages_run_in_order_of_their_parents() -> None:
    everything = frozenset(stage.name for stage in CHAIN.stages)
    first = views(one=StageView("one", "in"))
    assert [action.stage for action in decide(CHAIN, Observed(EPOCH, first, everything), NOW) if isinstance(action, StartAttempt)] == [
        "one"
    ]
    second = views("one", two=StageView("two", "in"))
    assert [action.stage for action in decide(CHAIN, Observed(EPOCH, second, everything), NOW) if isinstance(action, StartAttempt)] == [
        "two"
    ]


def test_one_target_alone() -> None:
    wanted = frozenset({"two"})
    (action,) = decide(CHAIN, Observed(EPOCH, views(one=StageView("one", "in")), wanted), NOW)
    assert isinstance(action, Finish) and action.exit_code == 4 and "osctl launch one" in action.reason
    (action,) = decide(CHAIN, Observed(EPOCH, views("one", "two"), wanted), NOW)
    assert action == Finish("succeeded", 0, "every stage is committed")


def test_a_refused_parent_ends_the_launch_with_4() -> None:
    observed = Observed(EPOCH, views("one", two=StageView("two", "in", refused="one: damaged")), frozenset({"two"}))
    assert decide(CHAIN, observed, NOW) == [Finish("failed", 4, "one: damaged")]


def test_a_laptop_runs_one_attempt_at_a_time_and_a_cluster_runs_branches_together() -> None:
    fork = ("one", None), ("left", "one"), ("right", "one")
    seen = {"one": StageView("one", "in", committed=True), "left": StageView("left", "in"), "right": StageView("right", "in")}
    observed = Observed(EPOCH, seen, frozenset(seen))
    assert len(decide(pipeline(*fork), observed, NOW)) == 1
    assert len(decide(pipeline(*fork, backend="kubernetes"), observed, NOW)) == 2


def test_drain_then_kill() -> None:
    running = attempt(1, life=Life("running"), traces=True)
    observed = replace(see(running), stop="drain")
    assert decide(ONE, observed, NOW) == [Drain(running)]
    asked = replace(see(replace(running, draining=True)), stop="drain")
    assert isinstance(decide(ONE, asked, NOW)[0], Wait)
    assert decide(ONE, replace(asked, stop="kill"), NOW) == [Kill(replace(running, draining=True))]
    (action,) = decide(ONE, replace(see(attempt(1, "drained")), stop="drain"), NOW)
    assert isinstance(action, Finish) and (action.status, action.exit_code) == ("suspended", 130)
    (action,) = decide(ONE, replace(see(attempt(1, "drained")), stop="drain", cancelled=True), NOW)
    assert isinstance(action, Finish) and action.status == "cancelled"


# --- Any history -------------------------------------------------------------------------------------------------------------------


@dataclass
class Truth:
    """One attempt as it really is, whatever anybody can see of it."""

    attempt: Attempt
    state: str = "absent"
    exit_code: int | None = None
    draining: bool = False


@dataclass
class World:
    """A store, a backend and at most one driver, all in memory. Acts as the runner does, and counts what must not happen."""

    pipeline: Pipeline
    epoch: int = 1
    now: float = NOW
    attempts: dict[tuple[str, str, int], Truth] = field(default_factory=dict)
    checkpoints: dict[tuple[str, str], list[Checkpoint]] = field(default_factory=dict)
    committed: set[tuple[str, str]] = field(default_factory=set)
    hidden: set[tuple[str, str, int]] = field(default_factory=set)
    version: int = 0
    stop: str | None = None
    finished: Finish | None = None

    def inputs(self, name: str) -> str | None:
        parent = self.pipeline.stage(name).spec.parent
        if parent is None:
            return f"v{self.version}"
        above = self.inputs(parent)
        return f"{above}.{name}" if above is not None and (parent, above) in self.committed else None

    def observe(self) -> Observed:
        seen = {}
        for stage in self.pipeline.stages:
            inputs = self.inputs(stage.name)
            mine = [self._see(key) for key in sorted(self.attempts) if key[0] == stage.name]
            published = (
                () if inputs is None else tuple(sorted(self.checkpoints.get((stage.name, inputs), []), key=lambda c: (c.step, c.attempt)))
            )
            seen[stage.name] = StageView(
                stage.name,
                inputs,
                committed=(stage.name, inputs or "") in self.committed,
                attempts=tuple(one for one in mine if one.inputs == inputs),
                checkpoints=published,
                strays=tuple(one for one in mine if one.inputs != inputs and one.outcome is None),
            )
        return Observed(self.epoch, seen, frozenset(seen), self.stop)  # type: ignore[arg-type]

    def _see(self, key: tuple[str, str, int]) -> Attempt:
        truth = self.attempts[key]
        state = "unknown" if key in self.hidden else truth.state
        bound, ended = (None, None) if state == "absent" else (self.now, self.now if state == "ended" else None)
        return replace(
            truth.attempt,
            life=Life(state, bound, ended, truth.exit_code) if truth.attempt.outcome is None else Life("absent"),  # type: ignore[arg-type]
            draining=truth.draining,
        )

    def tick(self, effects: int | None = None) -> list[object]:
        """One round of the driver; with `effects`, it is killed after so many of them."""
        actions = decide(self.pipeline, self.observe(), self.now)
        assert actions, "decide must always say something"
        done = 0
        for action in actions:
            for effect in self._effects(action):
                if effects is not None and done >= effects:
                    return list(actions)
                effect()
                done += 1
        return list(actions)

    def _effects(self, action: object) -> list[Callable[[], None]]:
        if isinstance(action, StartAttempt):
            return [lambda: self._intend(action), lambda: self._submit((action.stage, action.inputs, action.number))]
        if isinstance(action, CloseAttempt):
            return [lambda: self._close(action)]
        if isinstance(action, Commit):
            return [lambda: self._commit(action)]
        if isinstance(action, Drain | Kill):
            return [lambda: self._signal(action)]
        if isinstance(action, Finish):
            self.finished = action
        return []

    def _intend(self, action: StartAttempt) -> None:
        parent = self.pipeline.stage(action.stage).spec.parent
        assert parent is None or (parent, self.inputs(parent) or "") in self.committed, "started without a committed parent"
        assert (action.stage, action.inputs) not in self.committed, "a committed stage was started again"
        assert self.stop is None, "started while stopping"
        assert action.inputs == self.inputs(action.stage)
        resumed = action.resume.step if action.resume else 0
        key = action.stage, action.inputs, action.number
        self.attempts.setdefault(key, Truth(Attempt(action.stage, action.inputs, action.number, self.epoch, resumed, Life("absent"))))

    def _submit(self, key: tuple[str, str, int]) -> None:
        truth = self.attempts[key]
        if truth.state == "absent" and truth.attempt.epoch == self.epoch:  # an agent with an older intent refuses
            truth.state = "running"

    def _close(self, action: CloseAttempt) -> None:
        key = action.attempt.stage, action.attempt.inputs, action.attempt.number
        truth = self.attempts[key]
        assert truth.state != "running", "an attempt was closed while it lived"
        assert truth.attempt.outcome is None, "an attempt was closed twice"
        truth.attempt = replace(truth.attempt, outcome=outcome(action.class_, self.now))

    def _commit(self, action: Commit) -> None:
        key = action.attempt.stage, action.attempt.inputs
        assert key not in self.committed, "a stage was committed twice"
        assert action.checkpoint.complete
        self.committed.add(key)

    def _signal(self, action: Drain | Kill) -> None:
        truth = self.attempts[action.attempt.stage, action.attempt.inputs, action.attempt.number]
        truth.draining = True
        if isinstance(action, Kill):
            truth.state, truth.exit_code = "ended", -9

    # What attempts do by themselves.

    def running(self) -> list[tuple[str, str, int]]:
        return [key for key in sorted(self.attempts) if self.attempts[key].state == "running"]

    def publish(self, key: tuple[str, str, int], step: int, complete: bool) -> None:
        truth = self.attempts[key]
        step = max(step, truth.attempt.resumed_from, truth.attempt.published)
        self.checkpoints.setdefault(key[:2], []).append(checkpoint(step, key[2], complete))
        truth.attempt = replace(truth.attempt, published=step, left_traces=True)

    def end(self, key: tuple[str, str, int], class_: ExitClass) -> None:
        truth = self.attempts[key]
        truth.state, truth.exit_code = "ended", EXIT_CODES.get(class_)
        if class_ == "completed":
            self.publish(key, CONFIG.steps, complete=True)
        if class_ != "lost":
            truth.attempt = replace(truth.attempt, report=report(class_, truth.attempt.published), left_traces=True)

    def relaunch(self, survivors: bool) -> None:
        """The driver is gone, another comes. Locally its attempts die with it; in a cluster they live on."""
        for key in [] if survivors else self.running():
            self.end(key, "lost")
        self.epoch, self.stop, self.finished = self.epoch + 1, None, None
        for truth in self.attempts.values():
            truth.draining = False


class AnyHistory(RuleBasedStateMachine):
    world: World

    @initialize(backend=st.sampled_from(["local", "kubernetes"]))
    def build(self, backend: str) -> None:
        self.world = World(pipeline(("one", None), ("two", "one"), ("left", "two"), ("right", "two"), backend=backend))

    @rule()
    def tick(self) -> None:
        self.world.tick()

    @rule(effects=st.integers(0, 3), survivors=st.booleans())
    def driver_is_killed_within_a_round(self, effects: int, survivors: bool) -> None:
        self.world.tick(effects)
        self.world.relaunch(survivors)

    @precondition(lambda self: self.world.running())
    @rule(data=st.data(), step=st.integers(1, CONFIG.steps - 1))
    def publishes(self, data: st.DataObject, step: int) -> None:
        self.world.publish(data.draw(st.sampled_from(self.world.running())), step, complete=False)

    @precondition(lambda self: self.world.running())
    @rule(data=st.data(), class_=st.sampled_from(["completed", "completed", *RULES]))
    def ends(self, data: st.DataObject, class_: ExitClass) -> None:
        self.world.end(data.draw(st.sampled_from(self.world.running())), class_)

    @precondition(lambda self: self.world.attempts)
    @rule(data=st.data())
    def cannot_be_seen(self, data: st.DataObject) -> None:
        self.world.hidden.add(data.draw(st.sampled_from(sorted(self.world.attempts))))

    @rule()
    def can_be_seen_again(self) -> None:
        self.world.hidden.clear()

    @precondition(lambda self: any(self.world.checkpoints.values()))
    @rule(data=st.data())
    def checkpoint_is_found_broken(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(key for key, found in self.world.checkpoints.items() if found)))
        if name not in self.world.committed:
            self.world.checkpoints[name].pop()

    @rule(stop=st.sampled_from(["drain", "kill"]))
    def is_stopped(self, stop: str) -> None:
        self.world.stop = stop if self.world.stop != "kill" else "kill"

    @rule(seconds=st.floats(0, 60))
    def time_passes(self, seconds: float) -> None:
        self.world.now += seconds

    @precondition(lambda self: self.world.version < 2)
    @rule(survivors=st.booleans())
    def is_launched_with_another_configuration(self, survivors: bool) -> None:
        self.world.relaunch(survivors)
        self.world.version += 1

    @invariant()
    def at_most_one_live_attempt_a_stage(self) -> None:
        live = [key[0] for key in self.world.running()]
        assert len(live) == len(set(live)), live

    @invariant()
    def deciding_twice_says_the_same_and_acting_settles(self) -> None:
        observed = self.world.observe()
        assert decide(self.world.pipeline, observed, self.world.now) == decide(self.world.pipeline, observed, self.world.now)

    def teardown(self) -> None:
        """When faults stop, one more launch ends within a bounded number of rounds, with every stage committed."""
        if not hasattr(self, "world"):
            return
        world = self.world
        world.hidden.clear()
        world.relaunch(survivors=True)
        bound = 8 * len(world.pipeline.stages) + 2 * len(world.attempts)
        for _ in range(bound):
            actions = world.tick()
            if world.finished is not None:
                break
            if isinstance(actions[0], Wait):
                for key in world.running():
                    world.end(key, "drained" if world.attempts[key].draining else "completed")
                world.now += 60
        assert world.finished == Finish("succeeded", 0, "every stage is committed"), (world.finished, actions)
        assert not world.running()


AnyHistory.TestCase.settings = settings(max_examples=150, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck))
TestAnyHistory = AnyHistory.TestCase


@pytest.mark.prove
def test_any_history_at_length() -> None:
    from hypothesis.stateful import run_state_machine_as_test

    run_state_machine_as_test(
        AnyHistory, settings=settings(max_examples=1000, stateful_step_count=50, deadline=None, suppress_health_check=list(HealthCheck))
    )
