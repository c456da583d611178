"""Laws of asking Kueue: nothing depends on it, it is asked for many jobs at once, and a job that has just come is not kept waiting."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from seen_objects import NOW, job, stamp

from orchestrator.errors import NotFound, Refused, Unreachable
from orchestrator.kube.kueue import Held, Place, why_taken
from orchestrator.kube.queue_watch import QueueWatch
from orchestrator.labels import Annotation, Label

WAITS = job("Suspended", suspend=True, queue="train")


PREEMPTED = "Preempted to accommodate a workload (UID: 1f, JobUID: 2e-9) due to prioritization in the ClusterQueue; preemptor path: /a"


def workload(name: str = "w", of: str = "job-1") -> dict[str, Any]:
    metadata = {"name": name, "uid": name, "creationTimestamp": stamp(NOW), "labels": {Label.JOB_UID: of}}
    return {"metadata": metadata, "spec": {"queueName": "train", "priority": 0}, "status": {}}


class Stream:
    """A watch in which nothing happens until it is closed."""

    def __init__(self) -> None:
        self.closed = threading.Event()

    def __iter__(self) -> Iterator[Any]:
        self.closed.wait(30)
        return iter(())

    def close(self) -> None:
        self.closed.set()

    def leave(self) -> None:
        return None


class Kueue:
    """The requests of an API server that are needed here. `fault`: what every one of them raises."""

    def __init__(self, workloads: list[dict[str, Any]], fault: Exception | None = None):
        self.workloads, self.fault = workloads, fault
        self.jobs: dict[tuple[str, str], dict[str, Any]] = {}
        self.asked: list[str] = []

    def _answer(self, what: str, answer: Any) -> Any:
        self.asked.append(what)
        if self.fault is not None:
            raise self.fault
        return answer

    def list(self, kind: str, selector: str) -> tuple[list[dict[str, Any]], str]:
        found = [one for one in self.workloads if one["metadata"]["labels"][Label.JOB_UID] in selector]
        return self._answer(f"list {selector}", (found, "1"))  # type: ignore[no-any-return]

    def watch(self, kind: str, selector: str, version: str) -> Stream:
        return self._answer("watch", Stream())  # type: ignore[no-any-return]

    def get(self, kind: str, name: str) -> dict[str, Any]:
        there = {"metadata": {"name": name}, "spec": {"clusterQueue": "gpus"}}
        return self._answer(f"get {kind}", self.jobs.get((kind, name), there))  # type: ignore[no-any-return]

    def pending_workloads(self, queue: str) -> list[dict[str, Any]]:
        return self._answer("places", self.workloads)  # type: ignore[no-any-return]


@pytest.fixture
def watching() -> Iterator[Any]:
    made: list[QueueWatch] = []

    def of(kueue: Kueue) -> QueueWatch:
        made.append(QueueWatch(kueue))  # type: ignore[arg-type]
        return made[-1]

    yield of
    for one in made:
        one.close()


@pytest.mark.parametrize("fault", [Refused("may not list workloads"), NotFound("no such kind"), Unreachable("away")])
def test_without_right_or_kueue_nothing_is_known_and_nothing_fails(watching: Any, fault: Exception) -> None:
    assert watching(Kueue([workload()], fault)).held(WAITS, patience_s=20) == Held()


def test_the_first_question_waits_for_reason_and_place(watching: Any) -> None:
    kueue = Kueue([workload("first", "other"), workload()])
    held = watching(kueue).held(WAITS, patience_s=20)
    assert held.workload is not None and held.workload.name == "w" and held.watched
    assert held.place == Place(2, 2, 0) and held.queue is not None and held.queue.cluster_queue == "gpus"


def test_one_request_gives_the_places_of_all_jobs_of_a_queue(watching: Any) -> None:
    kueue = Kueue([workload(f"w{number}", f"uid-{number}") for number in range(10)])
    queues = watching(kueue)
    jobs = [replace(WAITS, uid=f"uid-{number}") for number in range(10)]
    found = [queues.held(one, patience_s=20) for one in jobs]
    assert [held.place.number for held in found if held.place is not None] == list(range(1, 11))
    assert kueue.asked.count("places") < 5, "not one for each job"


def preempted(*, by: tuple[str, str] | None) -> Kueue:
    """A job that was preempted for job 2e-9. `by`: kind and name of that one, where its Workload can be seen."""
    taken = workload()
    taken["status"] = {"conditions": [{"type": "Evicted", "status": "True", "reason": "Preempted", "message": PREEMPTED}]}
    found = [taken]
    if by is not None:
        other = workload("other", "2e-9")
        other["metadata"]["ownerReferences"] = [{"kind": by[0], "name": by[1], "uid": "2e-9", "controller": True}]
        found.append(other)
    return Kueue(found)


@pytest.mark.parametrize("kind", ["PyTorchJob", "TrainJob"])
def test_who_preempted_it_is_an_attempt_of_a_pipeline_where_that_can_be_seen(watching: Any, kind: str) -> None:
    kueue = preempted(by=(kind, "urgent-one-a1-0a1b2c3d"))
    annotations = {Annotation.STORE: "s3://b/x", Annotation.RUN_KEY: "urgent/one@0a1b2c3d4e5f/a1"}
    metadata = {"name": "urgent-one-a1-0a1b2c3d", "labels": {Label.MANAGED_BY: "osctl"}, "annotations": annotations}
    kueue.jobs[f"{kind.lower()}s", "urgent-one-a1-0a1b2c3d"] = {"metadata": metadata}
    held = watching(kueue).held(WAITS, patience_s=20)
    assert why_taken(held) == "Kueue preempted it for one attempt 1 of pipeline urgent (prioritization in the ClusterQueue)"


@pytest.mark.parametrize(
    ("by", "said"), [(("Job", "encode"), "Job encode"), (("PyTorchJob", "theirs"), "PyTorchJob theirs"), (None, "job 2e-9")]
)
def test_who_is_not_ours_is_called_as_its_makers_call_it(watching: Any, by: tuple[str, str] | None, said: str) -> None:
    assert why_taken(watching(preempted(by=by)).held(WAITS, patience_s=20)) == (
        f"Kueue preempted it for {said} (prioritization in the ClusterQueue)"
    )
