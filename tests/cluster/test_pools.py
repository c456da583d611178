"""docs/pools.md on the real cluster, with pools of fake nodes of this file's own: what waits too long goes on in the second pool at its
price, and a stage that misses one of 8 nodes goes on with 4, and with all once the eighth is there."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from cluster.kube_rig import STORE, Drive, folder_ledger, gpu_profile, pipeline, until
from cluster.kueue_rig import queues
from cluster.played_agent import PlayedAgents
from conftest import REPOSITORY, Cluster
from doc_commands import commands_of

from opensora import identity
from orchestrator.accounting.history import History
from orchestrator.accounting.status import take_snapshot
from orchestrator.driver import placing
from orchestrator.kube import operator
from orchestrator.kube.client import Api
from orchestrator.ledger import lineage
from orchestrator.ledger.store import Ledger
from orchestrator.pipelines.checks import of_cluster
from orchestrator.recipe.pipeline import Pipeline

pytestmark = pytest.mark.cluster("gpus")
PAGE = "docs/pools.md"
TAINT = "osctl-test/pool"
KINDS = ["pytorchjob", pytest.param("trainjob", marks=pytest.mark.prove("cluster-troubles"))]
"""Pools know nothing of the kinds of jobs: the suite has one, the long version both."""
HAS = {
    "cpu": "128",
    "memory": "1800Gi",
    "ephemeral-storage": "4Ti",
    "pods": "110",
    "nvidia.com/gpu": "8",
    "rdma/hca_shared_devices_a": "10",
}


@dataclass
class Pools:
    """Fake nodes that no other test's pods are placed on."""

    cluster: Cluster
    name: str

    def add(self, pool: str, *numbers: int) -> None:
        """Nodes of 8 GPUs in a pool. Waits until they are Ready."""
        names = [f"{self.name}-{pool}-{number}" for number in numbers]
        items = [
            {
                "apiVersion": "v1",
                "kind": "Node",
                "metadata": {
                    "name": name,
                    "labels": {"type": "kwok", "kubernetes.io/hostname": name, "osctl-test": self.name, "pool": pool},
                    "annotations": {"kwok.x-k8s.io/node": "fake"},
                },
                "spec": {"taints": [{"key": TAINT, "value": self.name, "effect": "NoSchedule"}]},
                "status": {"allocatable": HAS, "capacity": HAS},
            }
            for name in names
        ]
        self.cluster.kubectl("apply", "-f", "-", stdin=json.dumps({"apiVersion": "v1", "kind": "List", "items": items}))
        self.cluster.kubectl("wait", "--for=condition=Ready", "--timeout=50s", *[f"node/{name}" for name in names])

    def profile(self, namespace: str, *names: str, **changes: Any) -> Any:
        """The published profile on these nodes; each pool has its own price."""
        pools = [
            {
                "name": name,
                "node_selector": {"pool": name},
                "price": {"usd_per_hour": f"{1 + place}.50", "source": "the contract", "date": "2026-11-01"},
                "wait_minutes": 0.1,
            }
            for place, name in enumerate(names)
        ]
        own = {"node_selector": {"osctl-test": self.name}, "tolerations": [{"key": TAINT, "operator": "Equal", "value": self.name}]}
        content = gpu_profile(namespace).model_dump(mode="json") | own | {"pools": pools} | changes
        return type(gpu_profile(namespace)).model_validate(content)


@pytest.fixture
def pools(cluster: Cluster) -> Iterator[Pools]:
    made = Pools(cluster, f"pools-{secrets.token_hex(3)}")
    yield made
    cluster.kubectl("delete", "nodes", "-l", f"osctl-test={made.name}", "--ignore-not-found")


@pytest.fixture(autouse=True)
def counts_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placing, "COUNT_EVERY_S", 1.0)


def of_nodes(profile: Any, nodes: int, batch: int = 8, **resources: Any) -> Pipeline:
    made = pipeline(profile, stages=(("one", None),), nodes=nodes)
    (stage,) = made.stages
    changed = {**stage.spec.resources.model_dump(), **resources}
    spec = stage.spec.model_copy(update={"resources": type(stage.spec.resources).model_validate(changed)})
    config = stage.config.model_copy(update={"batch_size": batch})
    return made.model_copy(update={"stages": (stage.model_copy(update={"spec": spec, "config": config}),)})


def rows(ledger: Ledger) -> list[tuple[str | None, str, int]]:
    """(pool, class of the end, nodes) of each attempt."""
    (inputs_digest,) = ledger.inputs_of("one")
    found = []
    for number in ledger.attempts("one", inputs_digest):
        intent, outcome = ledger.intent("one", inputs_digest, number), ledger.outcome("one", inputs_digest, number)
        placement = ledger.placement("one", inputs_digest, number)
        assert intent is not None
        found.append((placement.pool if placement else None, outcome.class_ if outcome else "open", intent.nodes))
    return found


def kinds_of_jobs(api: Api) -> set[str]:
    return {kind.name for kind in operator.OPERATORS if api.list(kind.plural)[0]}


@pytest.mark.parametrize("kind", KINDS)
def test_what_waits_too_long_trains_in_the_second_pool_at_its_price(
    kind: str, pools: Pools, namespace: str, api: Api, ledger: Ledger
) -> None:
    pools.add("reserved", 0)
    pools.add("on-demand", 0, 1)
    of = of_nodes(pools.profile(namespace, "reserved", "on-demand", operator=kind), 2)
    with PlayedAgents(api, ledger), Drive.of(of, ledger, api) as drive:
        assert drive.ends(90).status == "succeeded"
    assert rows(ledger) == [("reserved", "moved", 2), ("on-demand", "completed", 2)]
    assert kinds_of_jobs(api) == {kind}
    first, second = take_snapshot(of, History(ledger), time.time()).stages[0].bill.attempts
    assert (first.held_s, first.usd) == (0, 0), "waiting costs nothing"
    assert second.held_s > 0 and second.usd_per_hour == Decimal("2.50") and second.is_gpu
    said = [event.detail for event in drive.events]
    assert any(line.startswith("moves on to pool on-demand: waited 0.1 min for nodes of pool reserved: ") for line in said), said


@pytest.mark.parametrize("kind", KINDS)
def test_under_kueue_each_pool_is_a_queue_of_its_own(
    kind: str, pools: Pools, namespace: str, api: Api, ledger: Ledger, tmp_path: Path
) -> None:
    """Somebody holds the first queue's quota; the job waits there in Kueue's own words, and the second queue admits it."""
    pools.add("reserved", 0, 1)
    pools.add("on-demand", 0, 1)
    with queues(pools.cluster.kubectl, namespace, {"osctl-test": pools.name}) as kueue:
        kueue.open("team-reserved", gpus=16)
        kueue.open("team-on-demand", gpus=16)
        both = [
            {"name": name, "kueue_queue": f"team-{name}", "node_selector": {"pool": name}, "wait_minutes": 0.15}
            for name in ("reserved", "on-demand")
        ]
        of = of_nodes(pools.profile(namespace, queue="kueue", pools=both, operator=kind), 2)
        other = of.model_copy(update={"name": "other"})
        with Drive.of(other, folder_ledger(tmp_path, "other"), api) as holder:
            holder.trains("one", patience_s=60)
            with PlayedAgents(api, ledger), Drive.of(of, ledger, api) as drive:
                result = drive.ends(90)
            assert result.status == "succeeded", result.reason
    assert rows(ledger) == [("reserved", "moved", 2), ("on-demand", "completed", 2)]
    assert kinds_of_jobs(api) == {kind}
    said = [event.detail for event in drive.events if event.detail.startswith("moves on to pool on-demand")]
    assert len(said) == 1 and "insufficient unused quota for nvidia.com/gpu" in said[0], said


@pytest.mark.parametrize("kind", KINDS)
def test_seven_of_eight_nodes_are_four_at_batch_512_and_eight_again(
    kind: str, pools: Pools, namespace: str, api: Api, ledger: Ledger
) -> None:
    pools.add("all", *range(7))
    profile = pools.profile(namespace, operator=kind)
    of = of_nodes(profile, 8, min_nodes=4, shrink_after_minutes=0.1)
    assert identity.global_batches(of.stages[0].config, 64) == (512,)
    scripts = {("one", 2): [("publish", 10), ("do", lambda job: pools.add("all", 7)), ("hold",)]}
    with PlayedAgents(api, ledger, scripts), Drive.of(of, ledger, api) as drive:  # type: ignore[arg-type]
        until(lambda: drive.life("one", 3).bound is not None, "the third attempt has its nodes", 100)
        assert drive.ends(60).status == "succeeded"
    assert rows(ledger) == [(None, "moved", 8), (None, "moved", 4), (None, "completed", 8)]
    assert kinds_of_jobs(api) == {kind}
    (inputs_digest,) = ledger.inputs_of("one")
    intents = [ledger.intent("one", inputs_digest, number) for number in (1, 2, 3)]
    assert [one.config.accumulate for one in intents if one is not None] == [1, 2, 1]
    assert [identity.global_batches(one.config, 8 * one.nodes) for one in intents if one is not None] == [(512,)] * 3
    (link,) = lineage.links(ledger, "one", inputs_digest, full=False)
    assert link.ok and "steps 1-10 on 4 of 8 nodes" in link.remarks, link.remarks
    said = [event.detail for event in drive.events if event.attempt is None]
    assert [line for line in said if placing.COUNTED.fullmatch(line)] == ["the cluster has 7 of 8 nodes", "the cluster has 8 of 8 nodes"]


def test_doctor_looks_at_each_pool_and_counts_its_nodes(pools: Pools, namespace: str, api: Api) -> None:
    pools.add("reserved", 0, 1)
    pools.add("on-demand", 0)
    of = of_nodes(pools.profile(namespace, "reserved", "on-demand"), 2, min_nodes=1)
    assert of.cluster is not None
    found = {check.name: check for check in of_cluster(of, of.cluster, api, STORE)}
    assert found["nodes"].verdict == "ok" and "room for 2 pods on 2 fit nodes" in found["nodes"].fact
    fallback = found["pool on-demand"]
    assert fallback.verdict == "failed" and "one needs 2 pods at once, 1 of 1 nodes that match the selector are fit" in fallback.fact
    assert found["node count"].fact == "pool reserved has 2, pool on-demand has 1 of 2 nodes for one"


@contextmanager
def right_to_list_nodes(cluster: Cluster) -> Iterator[None]:
    """What the page tells an administrator to type, word by word."""
    (command,) = commands_of(PAGE, "tests/cluster/test_pools.py")
    words = command.split()
    assert words[0] == "kubectl"
    cluster.kubectl(*[str(REPOSITORY / word) if word.startswith("k8s/") else word for word in words[1:]])
    yield
    cluster.kubectl("delete", "-k", str(REPOSITORY / "k8s/nodes"))


def test_only_with_the_right_that_the_page_names_the_driver_sees_nodes(cluster: Cluster) -> None:
    who = ("--as=system:serviceaccount:osctl:osctl-driver", "--as-group=system:serviceaccounts")
    assert "no" in cluster.kubectl("auth", "can-i", "list", "nodes", *who, check=False)
    with right_to_list_nodes(cluster):
        assert cluster.kubectl("auth", "can-i", "list", "nodes", *who, check=False).splitlines()[0] == "yes"
        assert "no" in cluster.kubectl("auth", "can-i", "delete", "nodes", *who, check=False)
