"""Laws of what Kueue says of a job that it holds back: objects as Kueue v0.15.0 writes them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from seen_objects import NOW, job, over, pod, stamp

from orchestrator.kube.kueue import Held, Place, Queue, Workload, places, why_held, why_taken
from orchestrator.kube.life import is_taken, read_life
from orchestrator.kube.waiting import OPERATOR_SILENT_S, Waiting
from orchestrator.labels import Label

IN_SET = "couldn't assign flavors to pod set worker: "
SHORT = "insufficient unused quota for nvidia.com/gpu in flavor h800, 64 more needed"
UNUSED = f"{IN_SET}insufficient unused quota for cpu in flavor h800, 96 more needed, {SHORT}"
TOO_MUCH = (
    IN_SET + "insufficient quota for nvidia.com/gpu in flavor h800, previously considered podsets requests (0) "
    "+ current podset request (128) > maximum capacity (64)"
)
PREEMPTED = (
    "Preempted to accommodate a workload (UID: 1f, JobUID: 2e-9) due to prioritization in the ClusterQueue; "
    "preemptor path: /a; preemptee path: /b"
)
NO_FLAVOR = "references missing ResourceFlavor(s): h800."
WAITS = job("Suspended", suspend=True, queue="train")


def told(message: str | None = None, *, quota: str = "False", reason: str = "Pending", **changes: Any) -> dict[str, Any]:
    """A Workload. `message`: of QuotaReserved; None: Kueue has not looked at it."""
    conditions = [] if message is None else [("QuotaReserved", quota, reason, message)]
    conditions += changes.get("conditions", [])
    return {
        "metadata": {"name": "pytorchjob-j-1a2b3", "uid": "w-1", "creationTimestamp": stamp(NOW - 60), "labels": {Label.JOB_UID: "job-1"}},
        "spec": {"queueName": "train", "priority": 5, **changes.get("spec", {})},
        "status": {
            "conditions": [
                {"type": kind, "status": status, "reason": why, "message": said, "lastTransitionTime": stamp(NOW - 50)}
                for kind, status, why, said in conditions
            ],
            **changes.get("status", {}),
        },
    }


def workload(message: str | None = None, **changes: Any) -> Workload:
    return Workload.read(told(message, **changes), NOW)


def queue(active: tuple[str, str] | None = None, stop: str = "", cluster: tuple[str, str] | None = None, cluster_stop: str = "") -> Queue:
    """`active`, `cluster`: (reason, message) of a condition Active that is False."""

    def thing(spec: dict[str, str], inactive: tuple[str, str] | None) -> dict[str, Any]:
        condition = {"type": "Active", "status": "False", "lastTransitionTime": stamp(NOW - 30)}
        found = [{**condition, "reason": inactive[0], "message": inactive[1]}] if inactive else []
        return {"metadata": {"name": "train"}, "spec": spec, "status": {"conditions": found}}

    whole = thing({"stopPolicy": cluster_stop}, cluster) if cluster or cluster_stop else None
    return Queue.read(thing({"clusterQueue": "gpus", "stopPolicy": stop}, active), whole, NOW)


def held(message: str | None = None, at: Queue | None = None, place: Place | None = None, **changes: Any) -> Waiting:
    return why_held(WAITS, Held(workload(message, **changes), at, place, watched=True), NOW)


def test_kueues_reason_is_said_by_its_devices_with_the_place() -> None:
    found = held(UNUSED, place=Place(3, 7, 0))
    assert (found.words, found.kind, found.cause) == (f"{SHORT}; 3rd of 7 in queue train", "capacity", "quota")
    assert held(IN_SET + "insufficient unused quota for cpu in flavor h800, 96 more needed").words.startswith(
        "insufficient unused quota for cpu"
    )
    assert held(UNUSED).words == SHORT, "without the right to see places"


def test_what_no_quota_will_ever_hold_is_a_fault_since_we_saw_it() -> None:
    found = held(TOO_MUCH)
    assert (found.kind, found.cause, found.since) == ("fault", "quota", NOW)
    assert found.words == "the quota is too small: 128 nvidia.com/gpu asked for, and flavor h800 has 64 in all"
    assert held(f"{UNUSED}, {TOO_MUCH}").kind == "capacity", "another flavor will do"


def test_who_waits_behind_a_higher_priority_waits_for_that() -> None:
    found = held(UNUSED, place=Place(2, 3, 1))
    assert (found.cause, found.kind) == ("priority", "capacity")
    assert found.words == f"{SHORT}; 2nd of 3 in queue train, behind 1 of higher priority"


def test_what_stands_behind_the_first_of_a_strict_queue_says_its_place() -> None:
    assert held(place=Place(12, 200, 0)).words == "waits for its turn in queue train; 12th of 200 in queue train"


@pytest.mark.parametrize(
    ("message", "at", "words", "kind", "cause"),
    [
        ("LocalQueue train doesn't exist", None, "there is no queue train", "fault", "queue"),
        ("ClusterQueue gpus doesn't exist", None, "there is no cluster queue gpus", "fault", "queue"),
        ("ClusterQueue gpus is inactive", None, "cluster queue gpus is inactive", "capacity", "queue_stopped"),
        ("LocalQueue train is stopped", None, "queue train is stopped", "capacity", "queue_stopped"),
        (UNUSED, queue(("Stopped", ""), stop="Hold"), "queue train is stopped (Hold)", "capacity", "queue_stopped"),
        (
            UNUSED, queue(("ClusterQueueIsInactive", ""), cluster=("Stopped", ""), cluster_stop="HoldAndDrain"),
            "cluster queue gpus of queue train is stopped (HoldAndDrain)", "capacity", "queue_stopped",
        ),
        (
            "ClusterQueue gpus is inactive",
            queue(("ClusterQueueIsInactive", ""), cluster=("FlavorNotFound", f"Can't admit new workloads: {NO_FLAVOR}")),
            f"cluster queue gpus of queue train admits nothing: {NO_FLAVOR}", "fault", "queue",
        ),
        (
            "ClusterQueue gpus is inactive", queue(("ClusterQueueIsInactive", "")),
            "cluster queue gpus of queue train admits nothing", "capacity", "queue_stopped",
        ),
        (
            "ClusterQueue gpus doesn't exist", queue(("ClusterQueueDoesNotExist", "")),
            "there is no cluster queue gpus of queue train", "fault", "queue",
        ),
        ("LocalQueue train doesn't exist", Queue("train", gone=True), "the namespace has no queue train", "fault", "queue"),
    ],
)  # fmt: skip
def test_a_queue_that_admits_nothing_says_which_and_why(message: str, at: Queue | None, words: str, kind: str, cause: str) -> None:
    found = held(message, at)
    assert (found.words, found.kind, found.cause) == (words, kind, cause)


def test_since_when_a_queue_is_stopped_is_what_the_queue_says() -> None:
    assert held(UNUSED, queue(("Stopped", ""), stop="Hold")).since == float(int(NOW - 30))
    assert held("LocalQueue train is stopped").since == NOW, "its Workload keeps an older time"


def test_a_profile_that_no_flavor_takes_is_a_fault() -> None:
    assert held(IN_SET + "untolerated taint {team  NoSchedule} in flavor h800").cause == "taint"
    found = held(IN_SET + "flavor h800 doesn't match node affinity")
    assert (found.cause, found.kind, found.words) == ("selector", "fault", "flavor h800 doesn't match node affinity")


def test_admission_checks_and_a_deactivated_workload_are_told() -> None:
    checks = {"admissionChecks": [{"name": "capacity", "state": "Pending", "message": "no node group"}, {"name": "ok", "state": "Ready"}]}
    found = held("Quota reserved", quota="True", status=checks)
    assert (found.words, found.cause) == ("has its quota, and waits for the admission check capacity (no node group)", "checks")
    off = held(UNUSED, spec={"active": False}, conditions=[("Evicted", "True", "Deactivated", "The workload is deactivated")])
    assert (off.kind, off.cause, off.words) == ("fault", "deactivated", "Kueue has deactivated it: The workload is deactivated")


def test_a_kueue_that_is_away_is_a_fault_only_where_its_workloads_can_be_seen() -> None:
    old = job("Suspended", suspend=True, queue="train", age=OPERATOR_SILENT_S + 1)
    assert why_held(old, Held(watched=True), NOW).cause == "operator"
    unseen = why_held(old, Held(watched=False), NOW)
    assert (unseen.words, unseen.kind, unseen.cause) == ("waits for its turn in queue train", "capacity", "quota")
    assert why_held(job("Suspended", suspend=True, queue="train", age=1), Held(watched=True), NOW).kind == "capacity"


def test_a_reason_is_new_when_it_changes_and_not_when_it_is_said_again() -> None:
    first = workload("LocalQueue train doesn't exist")
    again = replace(first, noticed=NOW + 40)
    assert again.after(first).noticed == NOW
    assert replace(workload(UNUSED), noticed=NOW + 40).after(first).noticed == NOW + 40


def test_places_are_counted_in_the_order_of_the_queue() -> None:
    pending = [{"metadata": {"name": name}, "priority": priority} for name, priority in (("a", 9), ("b", 5), ("c", 5), ("d", 1))]
    assert places(pending) == {"a": Place(1, 4, 0), "b": Place(2, 4, 1), "c": Place(3, 4, 1), "d": Place(4, 4, 3)}


# --- Taken away --------------------------------------------------------------------------------------------------------------------


def test_who_preempted_it_is_said() -> None:
    taken = workload(UNUSED, conditions=[("Evicted", "True", "Preempted", PREEMPTED)])
    assert why_taken(Held(taken)) == "Kueue preempted it for job 2e-9 (prioritization in the ClusterQueue)"
    named = Held(taken, preemptor="stage2 attempt 1 of pipeline urgent")
    assert why_taken(named) == "Kueue preempted it for stage2 attempt 1 of pipeline urgent (prioritization in the ClusterQueue)"
    stopped = workload(UNUSED, conditions=[("Evicted", "True", "ClusterQueueStopped", "The ClusterQueue is stopped")])
    assert why_taken(Held(stopped)) == "Kueue took its quota away: The ClusterQueue is stopped"
    assert why_taken(Held(workload(UNUSED))) == why_taken(Held()) == ""


def test_a_job_that_had_pods_and_is_suspended_by_kueue_is_over_once_they_are_gone_and_never_lives_again() -> None:
    ran, asked = (
        job("Suspended", "-Running", suspend=True, queue="train"),
        job("Suspended", "-Running", suspend=True, queue="train", asked=True),
    )
    leaving = pod(0, leaving=60)
    assert is_taken(ran, [leaving]) and not is_taken(asked, [leaving]) and not is_taken(WAITS, [])
    gone = replace(leaving, gone=NOW)
    assert is_taken(WAITS, [gone]), "also if its pods had no node yet"
    taken = Held(workload(UNUSED, conditions=[("Evicted", "True", "Preempted", PREEMPTED)]))
    assert read_life(ran, [leaving], (), NOW, held=taken).state == "running", "it saves"
    for last in (ran, replace(ran, gone=NOW)):  # Kueue may start it again, so this driver deletes it at once
        life = read_life(last, [gone], (), NOW, ended_by_us=True, held=taken)
        assert (life.state, life.cause, life.taken) == ("ended", "preempted", why_taken(taken))
    assert read_life(WAITS, [gone], (), NOW).state == "ended"


def test_a_second_start_that_its_agents_refused_is_still_a_preemption() -> None:
    """No driver was there when Kueue took the job away and started it again."""
    back = Held(workload("Quota reserved", quota="True", conditions=[("Evicted", "False", "QuotaReserved", "Previously: Preempted")]))
    failed = job("Failed", queue="train")
    assert read_life(failed, [over(0, 69), over(1, 69)], (), NOW, held=back).cause == "preempted"
    assert read_life(failed, [over(0, 1), over(1, 69)], (), NOW, held=back).cause is None
    assert read_life(failed, [over(0, 69)], (), NOW, held=Held(workload())).cause is None, "Kueue never took it away"
