"""Nodes of one test whose kubelet this process plays, for what kwok's nodes cannot show: pods that take their time to leave.

kwok removes a pod in the moment in which it is asked to leave, whatever its preStop or finalizers say. Here a pod runs as soon as it is
bound, and stays until nobody holds it.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from orchestrator.errors import NotFound, Unreachable
from orchestrator.kube.client import Api
from orchestrator.kube.faults import Conflict
from orchestrator.labels import Label

LABEL = "osctl-test/nodes"
LOOK_S = 0.1
GPU_NODE = {
    "cpu": "128",
    "memory": "1800Gi",
    "ephemeral-storage": "4Ti",
    "pods": "110",
    "nvidia.com/gpu": "8",
    "rdma/hca_shared_devices_a": "1000",
}


@dataclass
class PlayedKubelet:
    """A thread that plays the kubelet of some nodes for the pods of one namespace."""

    api: Api
    selector: dict[str, str]
    """Label of the nodes."""
    names: list[str]
    held: set[str] = field(default_factory=set)
    """Runs (label `osctl/run`) whose pods stay although they were asked to leave."""
    _over: threading.Event = field(default_factory=threading.Event)

    def play(self) -> None:
        while not self._over.wait(LOOK_S):
            try:
                for pod in self.api.list("pods")[0]:
                    if (pod["spec"].get("nodeName") or "") in self.names:
                        self._tend(pod["metadata"], pod["status"].get("phase"))
            except Unreachable:
                continue

    def _tend(self, pod: dict[str, object], phase: str | None) -> None:
        name, labels = str(pod["name"]), pod.get("labels") or {}
        assert isinstance(labels, dict)
        try:
            if "deletionTimestamp" not in pod:
                if phase == "Pending":
                    self.api._ask("PATCH", f"{self.api._path('pods', name)}/status", {}, {"status": {"phase": "Running"}})
            elif labels.get(Label.RUN) not in self.held:
                self.api.delete("pods", name, uid=str(pod["uid"]), grace_s=0)
        except (NotFound, Conflict):
            return


@contextmanager
def played_nodes(kubectl: Callable[..., str], api: Api, count: int = 8) -> Iterator[PlayedKubelet]:
    """Nodes like the fake ones, with a label of their own instead of the product's, so that no other test's pods come."""
    name = api.namespace
    status = {
        "allocatable": GPU_NODE,
        "capacity": GPU_NODE,
        "conditions": [{"type": "Ready", "status": "True", "reason": "Played", "message": ""}],
    }
    names = [f"{name}-{index}" for index in range(count)]
    for each in names:
        labels = {"kubernetes.io/hostname": each, LABEL: name}
        taints = [{"key": "nvidia.com/gpu", "value": "present", "effect": "NoSchedule"}]
        node = {
            "apiVersion": "v1",
            "kind": "Node",
            "metadata": {"name": each, "labels": labels},
            "spec": {"taints": taints},
            "status": status,
        }
        kubectl("create", "-f", "-", stdin=json.dumps(node))
    kubelet = PlayedKubelet(api, {LABEL: name}, names)
    thread = threading.Thread(target=kubelet.play, name="played kubelet", daemon=True)
    thread.start()
    try:
        yield kubelet
    finally:
        kubelet.held.clear()
        kubectl("delete", "node", *names, "--wait=false")
        kubectl("-n", name, "delete", "pods", "--all", "--grace-period=0", "--force")
        kubelet._over.set()
        thread.join()
