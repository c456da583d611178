"""Queues of Kueue for one test: a flavour of the fake nodes, cluster queues with a quota of GPUs, local queues in the test's namespace."""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

API = "kueue.x-k8s.io/v1beta1"
GPU = "nvidia.com/gpu"
Kubectl = Callable[..., str]


@dataclass
class Queues:
    """Names of objects of the whole cluster are this test's own. All are deleted at the end."""

    kubectl: Kubectl
    namespace: str
    labels: Mapping[str, str]
    """Of the nodes whose devices are the quota."""
    name: str = field(default_factory=lambda: f"t{secrets.token_hex(4)}")
    made: list[tuple[str, str]] = field(default_factory=list)

    def apply(self, kind: str, name: str, spec: Mapping[str, Any], **more: Any) -> None:
        namespace = {"namespace": self.namespace} if kind == "LocalQueue" else {}
        thing = {"apiVersion": API, "kind": kind, "metadata": {"name": name, **namespace}, **more}
        self.kubectl("apply", "-f", "-", stdin=json.dumps({**thing, **({"spec": spec} if spec else {})}))
        self.made.insert(0, (kind.lower(), name))

    def flavor(self) -> str:
        self.apply("ResourceFlavor", self.name, {"nodeLabels": self.labels})
        return self.name

    def open(
        self, local: str = "train", gpus: int = 64, cohort: str | None = None, flavor: str | None = None, cpu: str = "10000", **spec: Any
    ) -> str:
        """A local queue in the namespace with a cluster queue of its own; the cluster queue's name."""
        whole = f"{self.name}-{local}"
        flavor = flavor or self.name
        quotas = [
            {"name": "cpu", "nominalQuota": cpu},
            {"name": "memory", "nominalQuota": "100Ti"},
            {"name": GPU, "nominalQuota": str(gpus)},
        ]
        quotas += [{"name": name, "nominalQuota": "100Ti"} for name in ("ephemeral-storage", "rdma/hca_shared_devices_a")]
        groups = [{"coveredResources": [one["name"] for one in quotas], "flavors": [{"name": flavor, "resources": quotas}]}]
        within = {"withinClusterQueue": "LowerPriority", "reclaimWithinCohort": "Any"}
        body = {"namespaceSelector": {}, "resourceGroups": groups, "preemption": within, **({"cohort": cohort} if cohort else {}), **spec}
        self.apply("ClusterQueue", whole, body)
        self.apply("LocalQueue", local, {"clusterQueue": whole})
        return whole

    def priority(self, name: str, value: int) -> str:
        self.apply("WorkloadPriorityClass", f"{self.name}-{name}", {}, value=value)
        return f"{self.name}-{name}"

    def stop(self, whole: str, policy: str) -> None:
        """Hold, HoldAndDrain, or None: on again."""
        self.kubectl("patch", "clusterqueue", whole, "--type=merge", "-p", json.dumps({"spec": {"stopPolicy": policy}}))


@contextmanager
def queues(kubectl: Kubectl, namespace: str, labels: Mapping[str, str]) -> Iterator[Queues]:
    made = Queues(kubectl, namespace, labels)
    try:
        made.flavor()
        yield made
    finally:
        for kind, name in made.made:
            words = ["-n", namespace] if kind == "localqueue" else []
            kubectl(*words, "delete", kind, name, "--wait=false", "--ignore-not-found")
