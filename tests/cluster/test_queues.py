"""The queues that helm/osctl makes of its values, on the real Kueue: they admit, lend and take back as the values say.

What is admitted are Jobs of pods that no node takes: quota is Kueue's alone, and it is Kueue that is looked at.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import yaml
from cluster.kube_rig import until
from conftest import Cluster
from deploy.rendering import Manifest, chart, ci, merged

pytestmark = [pytest.mark.cluster("pods"), pytest.mark.timeout(300)]

QUEUES = ("ResourceFlavor", "ClusterQueue", "LocalQueue", "WorkloadPriorityClass")


@dataclass
class Teams:
    """What `kueue` of the chart's values makes in one namespace, with names of its own."""

    cluster: Cluster
    namespace: str
    name: str

    def install(self, **kueue: Any) -> None:
        values = merged(ci("test"), {"kueue": {"create": True, **kueue}})
        objects = [one for one in chart(self.cluster.bin / "helm", values, self.namespace) if one["kind"] in QUEUES]
        self._apply(
            *(
                {**one, "metadata": {**one["metadata"], "namespace": self.namespace}} if one["kind"] == "LocalQueue" else one
                for one in objects
            )
        )
        for one in objects:
            if one["kind"] == "LocalQueue":
                self.kubectl("wait", "--for=condition=Active", "--timeout=30s", f"localqueue/{one['metadata']['name']}")

    def submit(self, name: str, queue: str, cores: int, priority: str | None = None) -> None:
        labels = {"kueue.x-k8s.io/queue-name": queue} | ({"kueue.x-k8s.io/priority-class": priority} if priority else {})
        container = {"name": "main", "image": "localhost/none:v1", "resources": {"requests": {"cpu": str(cores)}}}
        pod = {"restartPolicy": "Never", "containers": [container], "nodeSelector": {"nobody": self.name}}
        spec = {"suspend": True, "template": {"spec": pod}}
        metadata = {"name": name, "namespace": self.namespace, "labels": labels}
        self._apply({"apiVersion": "batch/v1", "kind": "Job", "metadata": metadata, "spec": spec})

    def admitted(self) -> set[str]:
        jobs = json.loads(self.kubectl("get", "jobs", "-o", "json"))["items"]
        return {job["metadata"]["name"] for job in jobs if not job["spec"]["suspend"]}

    def of(self, *queues: str) -> tuple[int, ...]:
        """How many of each queue's jobs are admitted."""
        return tuple(sum(name.startswith(f"{queue}-") for name in self.admitted()) for queue in queues)

    def admits(self, *names: str) -> None:
        until(lambda: self.admitted() == set(names), f"that {', '.join(names)} are admitted, and no others", 30)

    def kubectl(self, *words: str) -> str:
        return self.cluster.kubectl("-n", self.namespace, *words)

    def remove(self) -> None:
        self.kubectl("delete", "jobs,localqueues", "--all", "--wait=false")
        queues = [f"clusterqueue/{self.name}-{queue}" for queue in ("one", "two", "lender")]
        others = [f"resourceflavor/{self.name}", f"workloadpriorityclass/{self.name}-urgent"]
        self.cluster.kubectl("delete", *queues, *others, "--ignore-not-found", "--wait=false")

    def _apply(self, *objects: Manifest) -> None:
        self.cluster.kubectl("apply", "-f", "-", stdin=yaml.safe_dump_all(objects))


@pytest.fixture
def teams(cluster: Cluster, namespace: str) -> Iterator[Teams]:
    made = Teams(cluster, namespace, f"q{secrets.token_hex(4)}")
    yield made
    made.remove()


def quota(name: str, cores: int) -> dict[str, Any]:
    return {"flavors": [{"name": name, "quota": {"cpu": cores}}]}


def test_teams_of_a_cohort_share_what_they_borrow_by_weight_and_an_urgent_job_goes_first(teams: Teams) -> None:
    """Both borrow 8 cores from a queue that uses none. One takes all; two has three times its weight and gets three quarters."""
    shared = {"cohort": teams.name, **quota(teams.name, 0)}
    lender = {"name": f"{teams.name}-lender", "cohort": teams.name, **quota(teams.name, 8)}
    teams.install(
        flavors=[{"name": teams.name}],
        clusterQueues=[lender, {"name": f"{teams.name}-one", **shared}, {"name": f"{teams.name}-two", "weight": 3, **shared}],
        localQueues=[{"name": team, "clusterQueue": f"{teams.name}-{team}"} for team in ("one", "two")],
        priorities=[{"name": f"{teams.name}-urgent", "value": 1000}],
    )
    for number in range(4):
        teams.submit(f"one-{number}", "one", 2)
    teams.admits("one-0", "one-1", "one-2", "one-3")
    for number in range(4):
        teams.submit(f"two-{number}", "two", 2)
    until(lambda: teams.of("one", "two") == (1, 3), "that each holds its share", 30)
    teams.submit("two-urgent", "two", 2, priority=f"{teams.name}-urgent")
    until(lambda: "two-urgent" in teams.admitted() and teams.of("one", "two") == (1, 3), "that the urgent one is among them", 30)
