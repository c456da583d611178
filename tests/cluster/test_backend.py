"""Laws of the driver and its backend on the real API server, operator, webhook and gang scheduler; pods on 8 fake nodes of 8 GPUs.

The published stage 2 takes all of them. Agents are played (`played_agent`), since fake nodes run nothing; everything else is real.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from cluster.kube_rig import STORE, Drive, folder_ledger, gpu_profile, pipeline, unschedulable, until
from cluster.played_agent import PlayedAgents
from tiny_attempts import intend

from opensora import identity
from orchestrator.errors import NotFound
from orchestrator.kube import manifest
from orchestrator.kube.backend import KubeBackend
from orchestrator.kube.client import Api
from orchestrator.kube.parts import Manifest
from orchestrator.labels import Annotation, Label
from orchestrator.ledger.store import Ledger
from orchestrator.recipe.pipeline import Pipeline

pytestmark = pytest.mark.cluster("gpus")
Kubectl = Callable[..., str]


@pytest.fixture
def kubectl(cluster: Any) -> Kubectl:
    return cluster.kubectl  # type: ignore[no-any-return]


def pods(api: Api, job: str) -> list[dict[str, Any]]:
    found = api.list("pods", f"training.kubeflow.org/job-name={job}")[0]
    return sorted(found, key=lambda pod: int(pod["metadata"]["labels"][Label.REPLICA_INDEX]))


def evict(api: Api, pod: str) -> None:
    eviction = {"apiVersion": "policy/v1", "kind": "Eviction", "metadata": {"name": pod, "namespace": api.namespace}}
    api._ask("POST", f"{api._path('pods', pod)}/eviction", {}, eviction)


@contextmanager
def cordoned(kubectl: Kubectl, node: str) -> Iterator[None]:
    kubectl("cordon", node)
    try:
        yield
    finally:
        kubectl("uncordon", node)


@contextmanager
def lost(kubectl: Kubectl, node: str) -> Iterator[None]:
    """A node that is taken out of the cluster and comes back later."""
    before = json.loads(kubectl("get", "node", node, "-o", "json"))
    for field in ("uid", "resourceVersion", "creationTimestamp"):
        del before["metadata"][field]
    back = threading.Event()

    def stay_away() -> None:
        """Another test session that begins meanwhile brings missing nodes back."""
        while not back.is_set():
            kubectl("delete", "node", node, "--ignore-not-found")
            back.wait(3)

    keeper = threading.Thread(target=stay_away, daemon=True)
    keeper.start()
    try:
        yield
    finally:
        back.set()
        keeper.join()
        kubectl("create", "-f", "-", stdin=json.dumps(before))


# --- Gangs -------------------------------------------------------------------------------------------------------------------------


def test_a_chain_of_gangs_is_trained_and_the_next_stage_starts_within_two_seconds(api: Api, ledger: Ledger) -> None:
    of = pipeline(gpu_profile(api.namespace))
    with PlayedAgents(api, ledger), Drive.of(of, ledger, api) as drive:
        result = drive.ends()
    assert (result.exit_code, drive.outcomes("one"), drive.outcomes("two")) == (0, ["completed"], ["completed"])
    (one,), (two,) = ledger.inputs_of("one"), ledger.inputs_of("two")
    first, born = ledger.committed("one", one), ledger.intent("two", two, 1)
    outcome = ledger.outcome("two", two, 1)
    assert first is not None and born is not None and outcome is not None and outcome.bound is not None
    assert born.created - first.time < 2, "from the end of one stage to the start of the next"
    assert outcome.devices == 64 and outcome.bound >= born.created - 1
    assert outcome.unaccounted_s < 5


def test_a_gang_is_bound_whole_or_not_at_all(api: Api, ledger: Ledger, kubectl: Kubectl) -> None:
    of = pipeline(gpu_profile(api.namespace), stages=(("one", None),))
    with PlayedAgents(api, ledger), cordoned(kubectl, "h800-3"), Drive.of(of, ledger, api) as drive:
        until(lambda: drive.life("one").waits_for == "capacity", "a wait for devices")
        key = drive.key("one")
        assert key is not None
        found = lambda: pods(api, drive.backend._name(key))  # noqa: E731
        until(lambda: len(gang := found()) == 8 and all(map(unschedulable, gang)), "the scheduler has given up on each of eight")
        assert all("nodeName" not in pod["spec"] for pod in found()), "seven nodes: none"
        kubectl("uncordon", "h800-3")
        assert drive.ends(150).exit_code == 0
    (inputs_digest,) = ledger.inputs_of("one")
    assert drive.outcomes("one") == ["completed"], inputs_digest


def test_a_second_pipeline_waits_and_everybody_can_see_why(api: Api, ledger: Ledger, tmp_path: Path) -> None:
    profile = gpu_profile(api.namespace)
    other = folder_ledger(tmp_path / "other", "second")
    players = PlayedAgents(api, ledger, {("one", 1): [("hold",)]}), PlayedAgents(api, other)
    driver = Drive.of(pipeline(profile, stages=(("one", None),)), ledger, api)
    with players[0], players[1], driver as first:
        first.trains("one")
        with Drive.of(pipeline(profile, "second", (("one", None),)), other, api) as second:
            until(lambda: second.life("one").waits_for == "capacity", "a wait for devices")
            until(lambda: "0/9 nodes are available" in second.life("one").waits, "the scheduler's own words")
            until(lambda: any("0/9 nodes" in event.detail for event in second.events), "an event that says so")
            key = second.key("one")
            assert key is not None
            until(lambda: all("nodes" in pod.reason for pod in second.backend.describe(key)), "every pod's reason")
            first.runner.kill()
            first.ends()
            assert second.ends(150).exit_code == 0


# --- What the cluster does to them -------------------------------------------------------------------------------------------------


def test_an_eviction_makes_a_new_attempt_that_goes_on_from_the_last_checkpoint(api: Api, ledger: Ledger) -> None:
    of = pipeline(gpu_profile(api.namespace), stages=(("one", None),))
    scripts = {("one", 1): [("publish", 10), ("do", lambda job: evict(api, f"{job}-worker-5")), ("hold",)]}
    with PlayedAgents(api, ledger, scripts), Drive.of(of, ledger, api) as drive:
        assert drive.ends().exit_code == 0
    assert drive.outcomes("one") == ["preempted", "completed"]
    (inputs_digest,) = ledger.inputs_of("one")
    second = ledger.intent("one", inputs_digest, 2)
    assert second is not None and second.resume is not None and second.resume.step == 10


@pytest.mark.prove("cluster-troubles")  # Kubernetes collects pods of a node that is gone after 40 s; of one that is tainted at once
def test_a_lost_node_makes_a_new_attempt(api: Api, ledger: Ledger, kubectl: Kubectl) -> None:
    of = pipeline(gpu_profile(api.namespace), stages=(("one", None),))
    with PlayedAgents(api, ledger, {("one", 1): [("publish", 10), ("hold",)]}), Drive.of(of, ledger, api) as drive:
        drive.trains("one")
        with lost(kubectl, "h800-2"):
            until(lambda: drive.outcomes("one")[:1] == ["preempted"], "its end", 180)
            until(lambda: drive.life("one", 2).waits_for == "capacity", "a wait for the eighth node", 30)
        assert drive.ends(120).exit_code == 0
    assert drive.outcomes("one") == ["preempted", "completed"]


def test_a_node_that_is_tainted_gives_its_pods_back(api: Api, ledger: Ledger, kubectl: Kubectl) -> None:
    of = pipeline(gpu_profile(api.namespace), stages=(("one", None),))
    with PlayedAgents(api, ledger, {("one", 1): [("publish", 10), ("hold",)]}), Drive.of(of, ledger, api) as drive:
        drive.trains("one")
        kubectl("taint", "node", "h800-1", "osctl-test/out=yes:NoExecute")
        try:
            until(lambda: drive.outcomes("one")[:1] == ["preempted"], "its end", 30)
        finally:
            kubectl("taint", "node", "h800-1", "osctl-test/out-")
        assert drive.ends(90).exit_code == 0


def test_a_pod_killed_for_memory_is_tried_once_more_and_then_fails(api: Api, ledger: Ledger) -> None:
    of = pipeline(gpu_profile(api.namespace), stages=(("one", None),))
    scripts = {("one", 1): [("oom",)], ("one", 2): [("oom",)]}
    with PlayedAgents(api, ledger, scripts), Drive.of(of, ledger, api) as drive:
        result = drive.ends()
    assert (result.exit_code, drive.outcomes("one")) == (3, ["oom_killed", "oom_killed"])
    assert "memory" in result.reason
    (inputs_digest,) = ledger.inputs_of("one")
    outcome = ledger.outcome("one", inputs_digest, 1)
    assert outcome is not None and outcome.exit_code == 137


def test_an_image_that_is_not_there_is_shown_and_fails_at_the_deadline(api: Api, ledger: Ledger) -> None:
    """On the real node, whose kubelet really asks for it."""
    nowhere = "registry.invalid/osctl@sha256:" + "0" * 64
    profile = gpu_profile(
        api.namespace, image=nowhere, gpu_resource=None, rdma_resource=None, device="cpu-core", cpu="50m", memory="64Mi", shm="8Mi",
        scratch="16Mi", node_selector={}, tolerations=(), start_deadline_s=12,
    )  # fmt: skip
    with Drive.of(pipeline(profile, stages=(("one", None),), nodes=1), ledger, api) as drive:
        until(lambda: "ErrImagePull" in drive.life("one").waits, "the fault")
        life = drive.life("one")
        assert life.waits_for == "fault" and "registry.invalid" in life.waits
        result = drive.ends()
    assert (result.exit_code, drive.outcomes("one")) == (3, ["unstarted"])
    assert "ErrImagePull" in result.reason and "12 s" in result.reason
    assert api.list("pods")[0] == [] and api.list("pytorchjobs")[0] == []


def quota(api: Api, hard: dict[str, str]) -> dict[str, Any]:
    """Made, and counted by the controller: from then on the API server holds to it."""
    made = api.create("resourcequotas", {"apiVersion": "v1", "kind": "ResourceQuota", "metadata": {"name": "q"}, "spec": {"hard": hard}})
    until(lambda: api.get("resourcequotas", "q").get("status", {}).get("hard") == hard, "the quota is counted")
    return made


@pytest.mark.parametrize("what", ["pods", "count/pytorchjobs.kubeflow.org"])
def test_a_quota_is_shown_and_fails_at_the_deadline(api: Api, ledger: Ledger, what: str) -> None:
    quota(api, {what: "0"})
    of = pipeline(gpu_profile(api.namespace, start_deadline_s=6), stages=(("one", None),))
    with Drive.of(of, ledger, api) as drive:
        until(lambda: "exceeded quota" in drive.life("one").waits, "the reason")
        result = drive.ends()
    assert (result.exit_code, drive.outcomes("one")) == (3, ["unstarted"])
    assert "exceeded quota: q" in result.reason
    assert api.list("pytorchjobs")[0] == []


def test_a_quota_that_is_raised_in_time_only_delays(api: Api, ledger: Ledger) -> None:
    made = quota(api, {"pods": "3"})
    of = pipeline(gpu_profile(api.namespace, start_deadline_s=60), stages=(("one", None),))
    with PlayedAgents(api, ledger), Drive.of(of, ledger, api) as drive:
        until(lambda: drive.life("one").waits_for == "fault", "the fault")
        api.delete("resourcequotas", "q", uid=made["metadata"]["uid"])
        assert drive.ends(60).exit_code == 0
    assert drive.outcomes("one") == ["completed"]


def test_pods_that_the_namespace_does_not_admit_are_a_fault_in_its_words(api: Api, ledger: Ledger) -> None:
    account = api.get("serviceaccounts", "osctl-trainer")
    api.delete("serviceaccounts", "osctl-trainer", uid=account["metadata"]["uid"])
    of = pipeline(gpu_profile(api.namespace, start_deadline_s=6), stages=(("one", None),))
    with Drive.of(of, ledger, api) as drive:
        result = drive.ends()
    assert (result.exit_code, drive.outcomes("one")) == (3, ["unstarted"])
    assert 'serviceaccount "osctl-trainer" not found' in result.reason


def test_a_webhooks_denial_ends_with_4_in_its_words_and_leaves_nothing(api: Api, ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    render = manifest.pytorch_job

    def wrong(*arguments: Any, **options: Any) -> Manifest:
        job = render(*arguments, **options)
        job["spec"]["pytorchReplicaSpecs"]["Wrker"] = job["spec"]["pytorchReplicaSpecs"].pop("Worker")
        return job

    monkeypatch.setattr(manifest, "pytorch_job", wrong)
    of = pipeline(gpu_profile(api.namespace), stages=(("one", None),))
    with Drive.of(of, ledger, api) as drive:
        result = drive.ends()
    assert (result.exit_code, drive.outcomes("one")) == (4, ["refused"])
    assert "denied the request" in result.reason and "Wrker" in result.reason
    assert api.list("pytorchjobs")[0] == [] and api.list("pods")[0] == []


# --- What people do to them --------------------------------------------------------------------------------------------------------


def test_a_job_deleted_by_somebody_is_lost_and_goes_on_when_asked(api: Api, ledger: Ledger, kubectl: Kubectl) -> None:
    of = pipeline(gpu_profile(api.namespace), stages=(("one", None),))

    def delete(job: str) -> None:
        kubectl("-n", api.namespace, "delete", "pytorchjob", job, "--wait=false")

    with PlayedAgents(api, ledger, {("one", 1): [("publish", 10), ("do", delete), ("hold",)]}):
        with Drive.of(of, ledger, api) as drive:
            result = drive.ends()
        assert (result.exit_code, drive.outcomes("one")) == (3, ["lost"])
        assert "deleted by someone else" in result.reason and "osctl resume" in result.reason
        with Drive.of(of, ledger, api) as drive:
            assert drive.ends().exit_code == 0
    assert drive.outcomes("one") == ["lost", "completed"]
    (inputs_digest,) = ledger.inputs_of("one")
    second = ledger.intent("one", inputs_digest, 2)
    assert second is not None and second.resume is not None and second.resume.step == 10


def test_a_foreign_job_of_our_name_ends_with_4_and_stays_as_it_was(api: Api, ledger: Ledger, tmp_path: Path) -> None:
    of = pipeline(gpu_profile(api.namespace), stages=(("one", None),))
    key = f"demo/one@{_inputs(of)}/a1"
    twin = intend(folder_ledger(tmp_path / "twin")).model_copy(update={"run_key": key})
    job = manifest.pytorch_job(twin, gpu_profile(api.namespace), STORE)
    job["metadata"] |= {"labels": {"made-by": "somebody"}, "annotations": {}}
    job["spec"]["runPolicy"]["suspend"] = True
    before = api.create("pytorchjobs", job)
    with Drive.of(of, ledger, api) as drive:
        result = drive.ends()
    assert (result.exit_code, drive.outcomes("one")) == (4, ["refused"])
    assert "was not made by osctl" in result.reason and "left alone" in result.reason
    after = api.get("pytorchjobs", before["metadata"]["name"])
    assert after["metadata"]["uid"] == before["metadata"]["uid"] and after["spec"] == before["spec"]


def _inputs(of: Pipeline) -> str:
    stage = of.stages[0]
    return identity.name(stage.config, stage.devices, None)


def test_drained_the_gang_leaves_and_the_next_launch_goes_on(api: Api, ledger: Ledger) -> None:
    of = pipeline(gpu_profile(api.namespace), stages=(("one", None),))
    with PlayedAgents(api, ledger, {("one", 1): [("publish", 10), ("hold",)]}):
        with Drive.of(of, ledger, api) as drive:
            drive.trains("one")
            until(lambda: bool(ledger.checkpoints("one", ledger.inputs_of("one")[0])), "a checkpoint")
            drive.runner.drain()
            result = drive.ends()
            assert (result.status, result.exit_code) == ("suspended", 130)
        assert api.list("pytorchjobs")[0] == [], "a suspended job holds a place in nobody's list"
        with Drive.of(of, ledger, api) as drive:
            assert drive.ends().exit_code == 0


def test_stopped_while_it_waits_for_devices_it_leaves_nothing(api: Api, ledger: Ledger) -> None:
    of = pipeline(gpu_profile(api.namespace), stages=(("one", None),), nodes=9)
    with Drive.of(of, ledger, api) as drive:
        until(lambda: drive.life("one").waits_for == "capacity", "a wait")
        drive.runner.drain()
        result = drive.ends()
    assert (result.exit_code, drive.outcomes("one")) == (130, ["drained"])
    assert api.list("pytorchjobs")[0] == []
    until(lambda: api.list("pods")[0] == [], "no pods")


def test_killed_it_ends_at_once_and_nothing_is_left(api: Api, ledger: Ledger) -> None:
    of = pipeline(gpu_profile(api.namespace), stages=(("one", None),))
    with PlayedAgents(api, ledger, {("one", 1): [("publish", 10), ("hold",)]}), Drive.of(of, ledger, api) as drive:
        drive.trains("one")
        drive.runner.kill()
        assert drive.ends(30).exit_code == 130
    assert api.list("pytorchjobs")[0] == [] and api.list("pods")[0] == []


# --- Drivers that come and go ------------------------------------------------------------------------------------------------------


def test_another_driver_takes_over_what_trains_and_ends_it(api: Api, ledger: Ledger) -> None:
    of = pipeline(gpu_profile(api.namespace), stages=(("one", None),))
    with PlayedAgents(api, ledger, {("one", 1): [("publish", 10), ("hold",)]}):
        with Drive.of(of, ledger, api) as first:
            job = first.trains("one")
            first.runner.detach()
            first.thread.join(10)
        with Drive.of(of, ledger, api) as second:
            until(lambda: second.life("one").bound is not None, "what the first has started")
            assert second.trains("one") == job
            evict(api, f"{job}-worker-0")
            assert second.ends().exit_code == 0
    assert second.outcomes("one") == ["preempted", "completed"]


def test_what_somebody_deleted_while_no_driver_looked_is_found_out(api: Api, ledger: Ledger, kubectl: Kubectl) -> None:
    of = pipeline(gpu_profile(api.namespace), stages=(("one", None),))
    with PlayedAgents(api, ledger, {("one", 1): [("hold",)]}):
        with Drive.of(of, ledger, api) as first:
            job = first.trains("one")
            first.runner.detach()
            first.thread.join(10)
        kubectl("-n", api.namespace, "delete", "pytorchjob", job)
        until(lambda: pods(api, job) == [], "its pods are gone")
        with Drive.of(of, ledger, api) as second:
            result = second.ends()
        assert (result.exit_code, second.outcomes("one")) == (3, ["lost"])


# --- An operator that does not act -------------------------------------------------------------------------------------------------


@pytest.mark.prove("cluster-troubles")  # 20 s of silence are a fault; in the suite test_life.py, with a clock of its own
def test_an_operator_that_never_takes_it_up_is_shown_and_fails_at_the_deadline(
    api: Api, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The real operator leaves alone what another controller manages."""
    render = manifest.pytorch_job

    def left_alone(*arguments: Any, **options: Any) -> Manifest:
        job = render(*arguments, **options)
        job["spec"]["runPolicy"]["managedBy"] = "kueue.x-k8s.io/multikueue"
        return job

    monkeypatch.setattr(manifest, "pytorch_job", left_alone)
    of = pipeline(gpu_profile(api.namespace, start_deadline_s=25), stages=(("one", None),))
    with Drive.of(of, ledger, api) as drive:
        until(lambda: drive.life("one").waits_for == "fault", "the fault", 40)
        assert drive.life("one").waits == "the training operator has not taken it up"
        result = drive.ends()
    assert (result.exit_code, drive.outcomes("one")) == (3, ["unstarted"])
    assert "the training operator has not taken it up" in result.reason
    assert api.list("pytorchjobs")[0] == []


def test_a_healthy_job_is_not_woken(api: Api, ledger: Ledger) -> None:
    intent = intend(ledger)
    backend = KubeBackend(ledger.store, api, gpu_profile(api.namespace), STORE)
    try:
        backend.submit(ledger.keys.intent(intent.stage, intent.inputs_digest, intent.attempt), intent.run_key)
        until(lambda: backend.observe(intent.run_key).bound is not None, "a node", 30)
        name = backend._name(intent.run_key)
        assert Annotation.WOKEN not in api.get("pytorchjobs", name)["metadata"]["annotations"]
        backend.kill(intent.run_key)
        with pytest.raises(NotFound):
            api.get("pytorchjobs", name)
    finally:
        backend._watcher.close()
