"""Laws of attempts that are TrainJobs, on the real API server, Kubeflow Trainer v2, JobSet, webhooks and gang scheduler.

Pods are on the fake nodes, and their agents are played (`played_agent`). What a PyTorchJob does in the same places: `test_backend`.
"""

from __future__ import annotations

import time
from typing import Any

import pytest
from cluster.kube_rig import STORE, Drive, gpu_profile, pipeline, until
from cluster.played_agent import PlayedAgents
from cluster.test_backend import evict, lost
from tiny_attempts import intend

from orchestrator.errors import NotFound
from orchestrator.kube.backend import KubeBackend
from orchestrator.kube.client import Api
from orchestrator.labels import Label
from orchestrator.ledger.store import Ledger
from orchestrator.recipe.pipeline import Pipeline

pytestmark = pytest.mark.cluster("gpus")

BESIDE = ("trainjobs", "jobsets", "trainingruntimes", "podgroups", "pods")


def of(api: Api, **changes: Any) -> Pipeline:
    return pipeline(gpu_profile(api.namespace, operator="trainjob", **changes), stages=(("one", None),))


def pod_of(api: Api, job: str, node: int) -> str:
    found = api.list("pods", f"jobset.sigs.k8s.io/jobset-name={job},{Label.COMPLETION_INDEX}={node}")[0]
    return str(found[0]["metadata"]["name"])


def nothing_left(api: Api) -> bool:
    return all(api.list(kind)[0] == [] for kind in BESIDE)


def test_a_gang_trains_to_its_end_and_its_job_stays_for_people(api: Api, ledger: Ledger) -> None:
    with PlayedAgents(api, ledger), Drive.of(of(api), ledger, api) as drive:
        result = drive.ends()
    assert (result.exit_code, drive.outcomes("one")) == (0, ["completed"])
    (job,) = api.list("trainjobs")[0]
    assert api.list("pytorchjobs")[0] == []
    for kind in ("trainingruntimes", "podgroups"):
        (beside,) = api.list(kind)[0]
        assert [one["uid"] for one in beside["metadata"]["ownerReferences"]] == [job["metadata"]["uid"]], kind


def test_an_eviction_makes_a_new_attempt_that_goes_on_from_the_last_checkpoint(api: Api, ledger: Ledger) -> None:
    scripts = {("one", 1): [("publish", 10), ("do", lambda job: evict(api, pod_of(api, job, 5))), ("hold",)]}
    with PlayedAgents(api, ledger, scripts), Drive.of(of(api), ledger, api) as drive:
        assert drive.ends().exit_code == 0
    assert drive.outcomes("one") == ["preempted", "completed"]
    (inputs_digest,) = ledger.inputs_of("one")
    second = ledger.intent("one", inputs_digest, 2)
    assert second is not None and second.resume is not None and second.resume.step == 10


def test_drained_the_gang_leaves_and_the_next_launch_goes_on(api: Api, ledger: Ledger) -> None:
    with PlayedAgents(api, ledger, {("one", 1): [("publish", 10), ("hold",)]}):
        with Drive.of(of(api), ledger, api) as drive:
            drive.trains("one")
            until(lambda: bool(ledger.checkpoints("one", ledger.inputs_of("one")[0])), "a checkpoint")
            drive.runner.drain()
            result = drive.ends()
            assert (result.status, result.exit_code) == ("suspended", 130)
        until(lambda: nothing_left(api), "a suspended job holds a place in nobody's list")
        with Drive.of(of(api), ledger, api) as drive:
            assert drive.ends().exit_code == 0


def test_killed_it_ends_at_once_and_nothing_is_left(api: Api, ledger: Ledger) -> None:
    with PlayedAgents(api, ledger, {("one", 1): [("publish", 10), ("hold",)]}), Drive.of(of(api), ledger, api) as drive:
        drive.trains("one")
        drive.runner.kill()
        assert drive.ends(30).exit_code == 130
    assert api.list("trainjobs")[0] == [] and api.list("jobsets")[0] == [] and api.list("pods")[0] == []
    until(lambda: nothing_left(api), "what the job owned")


@pytest.mark.parametrize("kind", ["trainjob", "jobset"])
def test_a_job_deleted_by_somebody_is_lost_and_goes_on_when_asked(api: Api, ledger: Ledger, cluster: Any, kind: str) -> None:
    """Trainer makes a deleted JobSet anew, with pods that train nothing."""

    def delete(job: str) -> None:
        cluster.kubectl("-n", api.namespace, "delete", kind, job, "--wait=false")

    with PlayedAgents(api, ledger, {("one", 1): [("publish", 10), ("do", delete), ("hold",)]}):
        with Drive.of(of(api), ledger, api) as drive:
            result = drive.ends()
        assert (result.exit_code, drive.outcomes("one")) == (3, ["lost"])
        assert "deleted by someone else" in result.reason
        with Drive.of(of(api), ledger, api) as drive:
            assert drive.ends().exit_code == 0


def test_an_attempt_keeps_its_kind_whatever_the_profile_says_now(api: Api, ledger: Ledger) -> None:
    """A driver with another profile takes over what trains, and makes no second job of it."""
    with PlayedAgents(api, ledger, {("one", 1): [("publish", 10), ("hold",)]}):
        with Drive.of(of(api), ledger, api) as first:
            job = first.trains("one")
            first.runner.detach()
            first.thread.join(10)
        later = pipeline(gpu_profile(api.namespace), stages=(("one", None),))
        with Drive.of(later, ledger, api) as second:
            assert second.trains("one") == job
            assert api.list("pytorchjobs")[0] == []
            evict(api, pod_of(api, job, 0))
            assert second.ends().exit_code == 0
    assert second.outcomes("one") == ["preempted", "completed"]
    (next_one,) = api.list("pytorchjobs")[0]
    assert next_one["metadata"]["labels"][Label.ATTEMPT] == "2", "the profile says which kind the next attempt is"


@pytest.mark.prove("cluster-troubles")  # Kubernetes collects pods of a node that is gone after 40 s
def test_a_lost_node_makes_a_new_attempt(api: Api, ledger: Ledger, cluster: Any) -> None:
    with PlayedAgents(api, ledger, {("one", 1): [("publish", 10), ("hold",)]}), Drive.of(of(api), ledger, api) as drive:
        job = drive.trains("one")
        node = api.get("pods", pod_of(api, job, 2))["spec"]["nodeName"]
        with lost(cluster.kubectl, node):
            until(lambda: drive.outcomes("one")[:1] == ["preempted"], "its end", 180)
            until(lambda: drive.life("one", 2).waits_for == "capacity", "a wait for the eighth node", 30)
        assert drive.ends(120).exit_code == 0
    assert drive.outcomes("one") == ["preempted", "completed"]


def test_submitted_again_under_another_profile_it_is_adopted(api: Api, ledger: Ledger) -> None:
    intent = intend(ledger)
    key = ledger.keys.intent(intent.stage, intent.inputs_digest, intent.attempt)
    for operator in ("trainjob", "pytorchjob"):
        backend = KubeBackend(ledger.store, api, gpu_profile(api.namespace, operator=operator), STORE)
        try:
            backend.submit(key, intent.run_key)
            assert backend.observe(intent.run_key).state == "running"
        finally:
            backend._watcher.close()
    assert len(api.list("trainjobs")[0]) == 1 and api.list("pytorchjobs")[0] == []


def test_a_driver_killed_between_two_creates_leaves_nothing_that_stays(api: Api, ledger: Ledger) -> None:
    intent = intend(ledger)
    key = ledger.keys.intent(intent.stage, intent.inputs_digest, intent.attempt)
    backend = KubeBackend(ledger.store, api, gpu_profile(api.namespace, operator="trainjob"), STORE)
    created = api.create

    def killed(kind: str, body: dict[str, Any], **options: Any) -> dict[str, Any]:
        if kind == "trainjobs":
            raise KeyboardInterrupt
        return created(kind, body, **options)

    try:
        api.create = killed  # type: ignore[method-assign]
        with pytest.raises(KeyboardInterrupt):
            backend.submit(key, intent.run_key)
        assert len(api.list("trainingruntimes")[0]) == 1 and api.list("trainjobs")[0] == []
        backend.forget(intent.run_key)
        until(lambda: nothing_left(api), "the runtime of no job")
        with pytest.raises(KeyboardInterrupt):
            backend.submit(key, intent.run_key)
        api.create = created  # type: ignore[method-assign]
        backend.submit(key, intent.run_key)
        (runtime,) = api.list("trainingruntimes")[0]
        assert [one["kind"] for one in runtime["metadata"]["ownerReferences"]] == ["TrainJob"]
        backend.kill(intent.run_key)
        with pytest.raises(NotFound):
            api.get("trainjobs", backend._name(intent.run_key))
    finally:
        api.create = created  # type: ignore[method-assign]
        backend._watcher.close()


def test_a_finished_job_whose_time_is_over_is_deleted_by_the_next_driver(api: Api, ledger: Ledger) -> None:
    """JobSet's own time to live would make Trainer start it again."""
    with PlayedAgents(api, ledger), Drive.of(of(api, keep_s=600), ledger, api) as drive:
        assert drive.ends().exit_code == 0
    assert api.list("trainjobs")[0], "people can look at it"
    backend = KubeBackend(ledger.store, api, gpu_profile(api.namespace), STORE, clock=lambda: time.time() + 660)
    try:

        def gone() -> bool:
            backend._remove_expired()
            return nothing_left(api)

        until(gone, "it is deleted, with all that it owned", 30)
    finally:
        backend._watcher.close()
