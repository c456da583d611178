"""Twelve causes of waiting, injected into a real cluster beside one another: twelve named right, each with its kind.

Each is an attempt of its own in one namespace, seen by one backend. Scheduler, kubelet, operator and Kueue are real; the GPU nodes are the
test's own, with a played kubelet, so that a node that is held is held by this test.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from cluster.kube_rig import STORE, folder_ledger, gpu_profile, until
from cluster.kueue_rig import Queues, queues
from cluster.played_kubelet import LABEL, PlayedKubelet, played_nodes
from tiny_attempts import intend

from orchestrator.errors import Unreachable
from orchestrator.kube import names, operator
from orchestrator.kube.attempt_objects import AttemptObjects
from orchestrator.kube.backend import KubeBackend
from orchestrator.kube.client import Api
from orchestrator.kube.operator import Operator
from orchestrator.labels import Label
from orchestrator.ledger.keys import Keys
from orchestrator.ports import Life, WaitCause
from orchestrator.recipe.cluster_profile import ClusterProfile, Volume

pytestmark = pytest.mark.cluster("gpus")
CPU = {"gpu_resource": None, "rdma_resource": None, "cpu": "20m", "memory": "32Mi", "shm": "8Mi", "scratch": "16Mi", "tolerations": ()}
PRESENT = "localhost/pause:3.6"
"""An image that the real node has."""

EXPECTED: dict[WaitCause, str | None] = {
    "quota": "capacity",
    "priority": "capacity",
    "queue_stopped": "capacity",
    "no_fit": "capacity",
    "taint": "capacity",
    "selector": "capacity",
    "gang": "fault",
    "volume": "fault",
    "image": "fault",
    "secret": "fault",
    "webhook": "fault",
    "operator": "fault",
}


class Injected:
    """Attempts that wait, by the cause that was injected."""

    def __init__(self, api: Api, folder: Path, base: ClusterProfile, kind: Operator):
        self.api, self.folder, self.base, self.kind = api, folder, base, kind
        self.keys: dict[str, str] = {}
        self.seen = KubeBackend(folder_ledger(folder).store, api, base, STORE)

    def submit(self, cause: str, *, nodes: int = 1, unmanaged: bool = False, **profile: Any) -> None:
        """Create an attempt's objects. Each pod asks for a GPU and most of a node's cores, so one holds a node."""
        intent = intend(folder_ledger(self.folder, cause.replace("_", "-")), nodes=nodes)
        self.keys[cause] = intent.run_key
        objects = self.kind.objects(intent, self.base.model_copy(update=profile), STORE)
        for sent in objects:
            if unmanaged and sent["kind"] in ("PyTorchJob", "TrainingRuntime"):  # the operator, or JobSet's, leaves it alone
                policy = sent["spec"]["runPolicy"] if "runPolicy" in sent["spec"] else sent["spec"]["template"]["spec"]
                policy["managedBy"] = "kueue.x-k8s.io/multikueue"
        AttemptObjects(self.api, STORE, lambda: operator.OPERATORS).create(self.kind, objects, intent.run_key)

    def life(self, cause: str) -> Life:
        return self.seen.observe(self.keys[cause])

    def refused(self, profile: ClusterProfile) -> Life:
        """An attempt that a driver cannot create."""
        ledger = folder_ledger(self.folder, "webhook")
        intent = intend(ledger)
        backend = KubeBackend(ledger.store, self.api, profile, STORE, pipeline=ledger.pipeline)
        try:
            with pytest.raises(Unreachable):
                backend.submit(Keys(ledger.pipeline).intent(intent.stage, intent.inputs_digest, intent.attempt), intent.run_key)
            return backend.observe(intent.run_key)
        finally:
            backend._watcher.close()


def schedule_without_gangs(injected: Injected, cause: str, nodes: Sequence[str]) -> None:
    """Play a scheduler that knows no gangs: it binds pods one after the other, and one finds no node."""
    api = injected.api
    select = f"{Label.RUN}={names.run_hash(STORE, injected.keys[cause])}"
    until(lambda: len(api.list("pods", select)[0]) == 3, "its pods are there")
    pods = [pod["metadata"]["name"] for pod in api.list("pods", select)[0]]
    for pod, node in zip(pods[1:], nodes, strict=False):
        binding = {"apiVersion": "v1", "kind": "Binding", "metadata": {"name": pod}, "target": {"kind": "Node", "name": node}}
        api._ask("POST", f"{api._path('pods', pod)}/binding", {}, binding)
    refusal = {
        "type": "PodScheduled",
        "status": "False",
        "reason": "Unschedulable",
        "message": "0/3 nodes are available: 3 Insufficient cpu.",
    }
    api._ask("PATCH", f"{api._path('pods', pods[0])}/status", {}, {"status": {"conditions": [refusal]}})


@pytest.fixture
def kubelet(cluster: Any, api: Api) -> Iterator[PlayedKubelet]:
    with played_nodes(cluster.kubectl, api, 3) as nodes:
        yield nodes


@pytest.fixture
def kueue(cluster: Any, kubelet: PlayedKubelet) -> Iterator[Queues]:
    with queues(cluster.kubectl, kubelet.api.namespace, kubelet.selector) as made:
        yield made


@pytest.fixture
def no_webhook(cluster: Any, namespace: str) -> Iterator[None]:
    """A webhook for the jobs of one pipeline of this namespace, whose server is not there."""
    rules = [{"operations": ["CREATE"], "apiGroups": ["*"], "apiVersions": ["*"], "resources": ["pytorchjobs", "trainjobs"]}]
    webhook = {
        "name": "away.osctl.test", "rules": rules, "sideEffects": "None", "admissionReviewVersions": ["v1"], "timeoutSeconds": 2,
        "clientConfig": {"service": {"namespace": namespace, "name": "nobody", "port": 443}},
        "namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": namespace}},
        "objectSelector": {"matchLabels": {Label.PIPELINE: "webhook"}},
    }  # fmt: skip
    kind = {"apiVersion": "admissionregistration.k8s.io/v1", "kind": "ValidatingWebhookConfiguration"}
    cluster.kubectl("create", "-f", "-", stdin=json.dumps({**kind, "metadata": {"name": namespace}, "webhooks": [webhook]}))
    yield
    cluster.kubectl("delete", "validatingwebhookconfiguration", namespace)


@pytest.mark.usefixtures("no_webhook")
@pytest.mark.parametrize(
    "kind",
    [operator.PYTORCH_JOB, pytest.param(operator.TRAIN_JOB, marks=pytest.mark.prove("cluster-troubles"))],
    ids=lambda kind: kind.name,
)
def test_twelve_causes_are_injected_and_twelve_are_named_right(
    kind: Operator, api: Api, kueue: Queues, kubelet: PlayedKubelet, tmp_path: Path
) -> None:
    base = gpu_profile(api.namespace, node_selector=kubelet.selector)
    injected = Injected(api, tmp_path, base, kind)
    in_train = {"queue": "kueue", "kueue_queue": "train"}
    kueue.open("train", gpus=1, preemption={"withinClusterQueue": "Never"})
    kueue.open("closed", stopPolicy="Hold")
    try:
        injected.submit("holder", **in_train)
        until(lambda: injected.life("holder").bound is not None and not injected.life("holder").waits, "one node is held", 60)

        injected.submit("quota", kueue_priority=kueue.priority("high", 100), **in_train)
        injected.submit("priority", **in_train)
        injected.submit("queue_stopped", queue="kueue", kueue_queue="closed")
        injected.submit("gang", nodes=3, scheduler="without-gangs")
        injected.submit("no_fit", cpu="500")
        injected.submit("taint", tolerations=())
        injected.submit("selector", node_selector={LABEL: "nowhere"})
        injected.submit("volume", volumes=(Volume(claim="clips", path="/clips"),))
        injected.submit("image", image="registry.invalid/osctl@sha256:" + "0" * 64, node_selector={}, **CPU)
        injected.submit("secret", image=PRESENT, s3_secret="not-there", node_selector={}, **CPU)
        injected.submit("operator", unmanaged=True)
        schedule_without_gangs(injected, "gang", kubelet.names)
        lives = {"webhook": injected.refused(base)}

        known = {cause: kind for cause, kind in EXPECTED.items() if cause != "webhook"}
        until(
            lambda: {cause: (life := injected.life(cause)).waits_on == cause and life.waits_for for cause in known} == known,
            "named right",
            90,
        )
        lives |= {cause: injected.life(cause) for cause in known}
        assert {cause: (life.waits_on, life.waits_for) for cause, life in lives.items()} == {
            cause: (cause, kind) for cause, kind in EXPECTED.items()
        }
    except AssertionError:
        for cause in injected.keys:
            print(cause, injected.life(cause))  # which one is not named right
        raise
    finally:
        injected.seen._watcher.close()
        injected.seen._queues.close()
