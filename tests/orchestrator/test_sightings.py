"""Laws of reading Kubernetes' objects: when an attempt is over, why it waits, who ended it. Objects look as the real ones were seen to."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.ports import Life
from orchestrator.sightings import OPERATOR_SILENT_S, OVERDUE_S, SETTLE_S, Job, Notice, Pod, is_broken, read_life, when, why_it_waits

NOW = 1_795_430_730.4
OWNER = ("s3://b/x", "demo/one@in/a1")
LACKS = "0/9 nodes are available: 8 Insufficient nvidia.com/gpu."


def stamp(time: float) -> str:
    """As Kubernetes writes times: whole seconds."""
    return datetime.fromtimestamp(int(time), UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def job(*conditions: str, pods: int = 2, age: float = 3, suspend: bool = False, asked: bool = False, queue: str | None = None) -> Job:
    told = {
        "metadata": {
            "name": "j",
            "uid": "job-1",
            "creationTimestamp": stamp(NOW - age),
            "annotations": {"asked": "to leave"} if asked else {},
            "labels": {"queue": queue} if queue else {},
        },
        "spec": {"runPolicy": {"suspend": suspend}, "pytorchReplicaSpecs": {"Worker": {"replicas": pods}}},
        "status": {
            "conditions": [{"type": one.lstrip("-"), "status": "False" if one.startswith("-") else "True"} for one in conditions],
            **({"completionTime": stamp(NOW)} if "Succeeded" in conditions else {}),
        },
    }
    return Job.read(told, NOW, OWNER, "asked", "queue")


def told(index: int = 0, phase: str = "Running", *, seen: float = NOW, **changes: Any) -> dict[str, Any]:
    """A pod; `changes`: conditions {type: fields}, state of its container, reason, leaving (seconds from now)."""
    conditions = {"PodScheduled": {"status": "True"}, **changes.get("conditions", {})}
    leaving = {"deletionTimestamp": stamp(NOW + changes["leaving"])} if "leaving" in changes else {}
    return {
        "metadata": {
            "name": f"j-worker-{index}",
            "uid": f"pod-{index}",
            "creationTimestamp": stamp(NOW - 3),
            "labels": {"run": "r", "index": str(index)},
            **leaving,
        },
        "spec": {"nodeName": f"node-{index}"} if conditions["PodScheduled"].get("status") == "True" else {},
        "status": {
            "phase": phase,
            "reason": changes.get("reason"),
            "conditions": [{"type": key, "lastTransitionTime": stamp(NOW - 2), **value} for key, value in conditions.items() if value],
            "containerStatuses": [{"name": "pytorch", "state": changes["state"]}] if "state" in changes else [],
        },
    }


def pod(index: int = 0, phase: str = "Running", **changes: Any) -> Pod:
    return Pod.read(told(index, phase, **changes), NOW, "run", "index")


def over(index: int = 0, exit_code: int = 0, reason: str = "", ago: float = 0.0) -> Pod:
    terminated = {"exitCode": exit_code, "reason": reason, "finishedAt": stamp(NOW - ago)}
    return pod(index, "Failed" if exit_code else "Succeeded", state={"terminated": terminated})


def unscheduled(index: int, message: str = LACKS) -> Pod:
    return pod(index, "Pending", conditions={"PodScheduled": {"status": "False", "reason": "Unschedulable", "message": message}})


def stuck(index: int, reason: str, message: str = "") -> Pod:
    return pod(index, "Pending", state={"waiting": {"reason": reason, "message": message}})


def note(reason: str, message: str, about: str = "job-1", warning: bool = True, kind: str = "PyTorchJob") -> Notice:
    event = {
        "involvedObject": {"kind": kind, "name": "j", "uid": about},
        "type": "Warning" if warning else "Normal",
        "reason": reason,
        "message": message,
        "lastTimestamp": stamp(NOW),
    }
    return Notice.read(event, NOW)


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


def test_what_was_seen_of_a_pod_is_kept_when_its_status_is_gone() -> None:
    marked = pod(0, conditions={"DisruptionTarget": {"status": "True", "reason": "EvictionByEvictionAPI"}})
    later = pod(0, "Failed", state={"terminated": {"exitCode": 137, "finishedAt": stamp(NOW)}}).after(marked)
    assert later.preempted and later.failed == (int(NOW), 137)
    assert pod(0, "Failed").after(later).failed == later.failed
    assert pod(0, seen=NOW + 9).after(marked).bound == marked.bound


def test_out_of_memory_is_told_from_its_consequences() -> None:
    life = read_life(job("Failed"), [over(0, 71), over(1, 137, "OOMKilled")], (), NOW)
    assert life.cause == "oom_killed"


def test_a_job_that_vanished_was_deleted_by_a_person_unless_we_did_it_or_its_time_was_up() -> None:
    gone = [replace(pod(0), gone=NOW)]
    assert read_life(replace(job("Running"), gone=NOW), gone, (), NOW).cause == "deleted"
    assert read_life(None, gone, (), NOW).cause == "deleted"
    assert read_life(replace(job("Running"), gone=NOW), gone, (), NOW, ended_by_us=True).cause is None
    assert read_life(replace(job("Succeeded"), gone=NOW), gone, (), NOW).cause is None


def test_the_exit_code_is_that_of_the_first_container_that_failed() -> None:
    assert read_life(job("Failed"), [over(0, 71, ago=0), over(1, 66, ago=2)], (), NOW).exit_code == 66
    assert read_life(job("Succeeded"), [over(0, 0), replace(pod(1), gone=NOW)], (), NOW).exit_code == 0
    assert read_life(job("Failed"), [replace(pod(0), gone=NOW)], (), NOW).exit_code is None


@given(st.floats(-5, 5), st.integers(0, 1_000))
def test_our_clock_counts_within_the_second_that_kubernetes_names(offset: float, second: int) -> None:
    told_time = when(float(second), second + offset)
    assert second <= told_time < second + 1
    assert told_time == second + offset or not 0 <= offset < 1


def test_devices_are_held_from_the_first_pod_bound_to_the_last_container_ended() -> None:
    first, last = replace(pod(0), bound=100.25, gone=130.0), replace(over(1), bound=100.75, ended=131.5)
    life = read_life(job("Succeeded"), [first, last], (), NOW)
    assert (life.bound, life.ended) == (100.25, 131.5)


# --- Why it waits ------------------------------------------------------------------------------------------------------------------


def why(this: Job, *pods: Pod, notices: tuple[Notice, ...] = (), now: float = NOW) -> tuple[str, str | None]:
    words, kind, _ = why_it_waits(this, pods, notices, now)
    return words, kind


def test_a_gang_that_trains_waits_for_nothing() -> None:
    assert why(job("Running"), pod(0), pod(1)) == ("", None)


def test_the_schedulers_own_words_are_passed_on() -> None:
    gang = unscheduled(0, "gang: not enough siblings\nmore"), unscheduled(1)
    assert why(job("Created"), *gang) == (LACKS, "capacity")
    assert why(job("Created"), gang[0], replace(gang[0], index=1)) == ("gang: not enough siblings", "capacity")


@pytest.mark.parametrize(
    "reason", ["ErrImagePull", "InvalidImageName", "CreateContainerConfigError", "CreateContainerError", "RunContainerError", "New"]
)
def test_a_container_that_cannot_be_started_is_a_fault_of_the_whole_gang(reason: str) -> None:
    assert why(job("Created"), pod(0), stuck(1, reason, "why\nmore")) == (f"worker-1: {reason}: why", "fault")


def test_an_image_that_cannot_be_pulled_is_one_fault_however_kubelet_puts_it() -> None:
    first = stuck(0, "ErrImagePull", "failed to pull: not found")
    again = stuck(0, "ImagePullBackOff", 'Back-off pulling image "x:1": ErrImagePull: failed to pull: not found')
    assert why(job("Created"), first) == why(job("Created"), again) == ("worker-0: ErrImagePull: failed to pull: not found", "fault")


def test_what_keeps_pods_from_being_made_is_a_fault_in_the_api_servers_words() -> None:
    quota = note("FailedCreatePod", 'Error creating: pods "j-worker-0" is forbidden: exceeded quota: q, requested: pods=1')
    assert why(job("Created"), notices=(quota,)) == (quota.message, "fault")
    assert why(job("Created"), unscheduled(0), notices=(quota,)) == (quota.message, "fault")
    assert why(job("Created"), unscheduled(0), unscheduled(1), notices=(quota,)) == (LACKS, "capacity"), "mended since"


def test_events_of_an_earlier_job_of_this_name_say_nothing() -> None:
    old = note("FailedCreatePod", "exceeded quota", about="job-0")
    assert why(job("Created"), notices=(old,))[0] == "the training operator made no pods of it"
    assert job("Created").forgotten((), (old,))


def test_a_volume_that_cannot_be_mounted_is_a_fault() -> None:
    mount = note("FailedMount", 'secret "x" not found', about="pod-0", kind="Pod")
    starting = pod(0, "Pending", state={"waiting": {"reason": "ContainerCreating"}})
    assert why(job("Created", pods=1), starting, notices=(mount,)) == ('worker-0: FailedMount: secret "x" not found', "fault")


def test_starting_and_pulling_are_no_faults() -> None:
    starting = pod(0, "Pending", state={"waiting": {"reason": "ContainerCreating"}})
    assert why(job("Created", pods=1), starting) == ("worker-0 starts", None)
    pulling = note("Pulling", "Pulling image x", about="pod-0", warning=False, kind="Pod")
    assert why(job("Created", pods=1), starting, notices=(pulling,)) == ("worker-0 starts: Pulling image x", None)


@pytest.mark.parametrize("conditions", [(), ("Created",)])
def test_a_silent_operator_is_a_fault_after_a_while_in_words_that_stay(conditions: tuple[str, ...]) -> None:
    young, old = job(*conditions, age=1), job(*conditions, age=OPERATOR_SILENT_S + 1)
    assert why(young)[1] is None and why(old)[1] == "fault"
    assert why(young)[0] == why(old)[0] == why(old, now=NOW + 100)[0] != ""


def test_a_pod_that_no_scheduler_takes_up_is_a_fault_after_a_while() -> None:
    unseen = pod(0, "Pending", conditions={"PodScheduled": {}})
    assert why(job("Created", pods=1), unseen)[1] is None
    assert why(job("Created", pods=1), unseen, now=NOW + 60) == ("no scheduler has taken up worker-0 yet", "fault")


def test_only_a_job_that_was_met_and_left_alone_is_forgotten() -> None:
    assert job("Created").forgotten((), ())
    assert not job().forgotten((), ())
    assert not job("Created").forgotten([unscheduled(0)], ())
    assert not job("Created", "Running").forgotten((), ())
    assert not job("Created", "Suspended", suspend=True).forgotten((), ())
    assert not job("Created").forgotten((), (note("FailedCreatePod", "exceeded quota"),))
