"""Laws of `decide`: lives, commits, targets and waits."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from attempt_views import CHAIN, EPOCH, NOW, ONE, attempt, checkpoint, pipeline, report, see

from orchestrator.driver.decide import CloseAttempt, Commit, Drain, Finish, Kill, StartAttempt, Wait, decide
from orchestrator.driver.facts import AttemptView, Observed, StageView
from orchestrator.ports import Life
from orchestrator.recipe.cluster_profile import ClusterProfile

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


def waiting(what_for: Literal["capacity", "fault"] | None, since: float, state: Literal["running", "absent"] = "running") -> AttemptView:
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
    never_started = attempt(1)
    assert decide(ONE, see(never_started, refused="no"), NOW) == [CloseAttempt(never_started, "refused", "no")]


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
    stray = attempt(1, life=Life("running"), inputs_digest="old", epoch=EPOCH - 1)
    assert decide(ONE, see(orphans=(stray,)), NOW) == [Drain(stray)]
    (action,) = decide(ONE, see(orphans=(replace(stray, draining=True),)), NOW)
    assert isinstance(action, Wait)
    dead = replace(stray, life=Life("ended", 1.0, 2.0, 143))
    assert isinstance(decide(ONE, see(orphans=(dead,)), NOW)[0], CloseAttempt)


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
