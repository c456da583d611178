"""Laws of an attempt's life as it is told from what was seen: when it is over, and who ended it."""

from __future__ import annotations

from dataclasses import replace

import pytest
from seen_objects import NOW, job, over, pod, train_job, unscheduled

from orchestrator.kube.life import SETTLE_S, is_broken, read_life
from orchestrator.kube.observed import OVERDUE_S, Job
from orchestrator.ports import Life

# --- Over or not -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("condition", ["Failed", "Succeeded", "Suspended", "Running", "Created"])
def test_it_lives_as_long_as_any_pod_does_whatever_the_job_says(condition: str) -> None:
    life = read_life(job(condition, suspend=condition == "Suspended"), [over(0, 1), pod(1, leaving=60)], (), NOW)
    assert life.state == "running"


@pytest.mark.parametrize("last", [job("Failed"), job("Succeeded"), job("Suspended", suspend=True, asked=True), replace(job(), gone=NOW)])
def test_it_is_over_with_its_last_pod(last: Job) -> None:
    assert read_life(last, [replace(pod(0), gone=NOW), over(1)], (), NOW).state == "ended"


def test_a_job_without_pods_is_running_until_it_says_otherwise() -> None:
    assert read_life(job(), (), (), NOW).state == "running"
    assert read_life(job("Created", "-Running"), (), (), NOW).state == "running"
    assert read_life(None, (), (), NOW) == Life("absent")


def test_all_pods_over_and_a_silent_operator_is_an_end_after_a_while() -> None:
    pods = [over(0, 0, ago=0), over(1, 0, ago=0)]
    silent = job("Created", "Running")
    assert read_life(silent, pods, (), NOW + SETTLE_S - 1).state == "running"
    assert read_life(silent, pods, (), NOW + SETTLE_S + 1).state == "ended"
    assert read_life(silent, pods[:1], (), NOW + SETTLE_S + 1).state == "running", "one pod was never made"


def test_a_gang_that_ended_while_its_operator_was_away_did_start() -> None:
    """The operator came back too late to write Running: its silence then looked like pods that were never made, and the run was lost."""
    pods = [over(0, 0, ago=0), over(1, 0, ago=0)]
    met = job("Created", age=90)
    assert read_life(met, pods, (), NOW) == Life("running", pods[0].bound)
    assert read_life(met, pods, (), NOW + SETTLE_S + 1).state == "ended"
    assert read_life(met, pods[:1], (), NOW).waits_for == "fault", "its other pod was never made"
    assert read_life(met, (), (), NOW).waits_for == "fault"


def test_a_pod_on_a_silent_node_is_given_up_some_time_after_its_grace() -> None:
    lost = pod(0, leaving=0)
    failed = job("Failed", pods=1)
    assert read_life(failed, [lost], (), NOW + OVERDUE_S - 1).state == "running"
    life = read_life(failed, [lost], (), NOW + OVERDUE_S + 1)
    assert (life.state, life.cause) == ("ended", "preempted")


def test_a_queue_holds_a_job_back_without_ending_it() -> None:
    held = job("Suspended", suspend=True, queue="team-a")
    life = read_life(held, (), (), NOW)
    assert (life.state, life.waits_for) == ("running", "capacity") and "team-a" in life.waits
    stopped = job("Suspended", "-Running", suspend=True, queue="team-a")
    assert (read_life(stopped, (), (), NOW).state, read_life(stopped, (), (), NOW).cause) == ("ended", "preempted")


def test_a_gang_with_a_pod_in_place_of_a_lost_one_is_broken() -> None:
    lost = replace(pod(1), gone=NOW)
    again = replace(unscheduled(1), uid="pod-1-again")
    assert is_broken([pod(0), lost, again], NOW)
    assert not is_broken([pod(0), lost], NOW), "the operator will say that it failed"
    assert not is_broken([pod(0), replace(unscheduled(1), gone=NOW), again], NOW), "it never had a node"
    assert not is_broken([pod(0), pod(1)], NOW)


# --- Who ended it ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("disruption", "reason"),
    [
        ("EvictionByEvictionAPI", None),
        ("DeletionByTaintManager", None),
        ("DeletionByPodGC", None),
        ("PreemptionByScheduler", None),
        ("TerminationByKubelet", "Evicted"),
        (None, "Evicted"),
        (None, "NodeLost"),
    ],
)
def test_what_the_cluster_takes_away_is_preempted(disruption: str | None, reason: str | None) -> None:
    conditions = {"DisruptionTarget": {"status": "True", "reason": disruption, "message": "why"}} if disruption else {}
    taken = replace(pod(1, "Failed", conditions=conditions, reason=reason), gone=NOW)
    assert read_life(job("Failed"), [over(0, 137), taken], (), NOW).cause == "preempted"


def test_out_of_memory_is_told_from_its_consequences() -> None:
    life = read_life(job("Failed"), [over(0, 71), over(1, 137, "OOMKilled")], (), NOW)
    assert life.cause == "oom_killed"


def test_a_job_that_vanished_was_deleted_by_a_person_unless_we_did_it_or_its_time_was_up() -> None:
    gone = [replace(pod(0), gone=NOW)]
    assert read_life(replace(job("Running"), gone=NOW), gone, (), NOW).cause == "deleted"
    assert read_life(None, gone, (), NOW).cause == "deleted"
    assert read_life(replace(job("Running"), gone=NOW), gone, (), NOW, ended_by_us=True).cause is None
    assert read_life(replace(job("Succeeded"), gone=NOW), gone, (), NOW).cause is None


def test_a_train_job_whose_job_set_was_deleted_and_made_anew_was_deleted_by_a_person() -> None:
    first = replace(pod(0), of_job="of-the-first", gone=NOW - 5)
    again = replace(pod(0), uid="pod-0-again", of_job="of-the-second", gone=NOW)
    broken_up = train_job("Suspended", suspend=True)
    assert read_life(broken_up, [first, again], (), NOW).cause == "deleted"
    assert read_life(broken_up, [first, replace(again, of_job="of-the-first")], (), NOW).cause == "preempted"
    assert read_life(broken_up, [replace(first, preempted="EvictionByEvictionAPI"), again], (), NOW).cause == "preempted"
    assert read_life(replace(broken_up, gone=NOW), [first, again], (), NOW, ended_by_us=True).cause == "deleted", "as with Kueue"


def test_the_last_words_are_those_of_the_first_container_that_failed_and_outlive_it() -> None:
    first, later = over(0, 1, ago=2, message="Traceback\nImportError: libfoo.so"), over(1, 71, message="peer")
    assert read_life(job("Failed"), [later, first], (), NOW).last_words == "Traceback\nImportError: libfoo.so"
    assert pod(0, "Failed").after(first).last_words == first.last_words
    assert read_life(job("Succeeded"), [over(0, 0, message="done")], (), NOW).last_words == ""


def test_the_exit_code_is_that_of_the_first_container_that_failed() -> None:
    assert read_life(job("Failed"), [over(0, 71, ago=0), over(1, 66, ago=2)], (), NOW).exit_code == 66
    assert read_life(job("Succeeded"), [over(0, 0), replace(pod(1), gone=NOW)], (), NOW).exit_code == 0
    assert read_life(job("Failed"), [replace(pod(0), gone=NOW)], (), NOW).exit_code is None


def test_devices_are_held_from_the_first_pod_bound_to_the_last_container_ended() -> None:
    first, last = replace(pod(0), bound=100.25, gone=130.0), replace(over(1), bound=100.75, ended=131.5)
    life = read_life(job("Succeeded"), [first, last], (), NOW)
    assert (life.bound, life.ended) == (100.25, 131.5)
