"""Which nodes count as there: those that could hold a pod of an attempt, whoever holds them now."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from pools_rig import profile

from orchestrator.errors import Refused
from orchestrator.kube.nodes import KubeNodes, places, quantity
from orchestrator.kube.trainer_pod import requests_of

SITE = profile().model_copy(
    update={"gpu_resource": "nvidia.com/gpu", "cpu": "4", "memory": "8Gi", "scratch": "10Gi", "exclude_nodes": ("bad",)}
)
REQUESTS = requests_of(8, SITE)


def node(name: str = "a", **status: Any) -> dict[str, Any]:
    has = {"cpu": "8", "memory": "16Gi", "ephemeral-storage": "100Gi", "nvidia.com/gpu": "8"}
    return {
        "metadata": {"name": name, "labels": {"kubernetes.io/hostname": name}},
        "spec": {},
        "status": {"conditions": [{"type": "Ready", "status": "True"}], "allocatable": has, **status},
    }


def with_taint(effect: str) -> dict[str, Any]:
    return {**node(), "spec": {"taints": [{"key": "x", "effect": effect}]}}


@pytest.mark.parametrize(
    ("one", "count"),
    [
        (node(), 1),
        (node("bad"), 0),
        ({**node(), "spec": {"unschedulable": True}}, 0),
        (node(conditions=[{"type": "Ready", "status": "Unknown"}]), 0),
        (node(conditions=[]), 0),
        (with_taint("NoSchedule"), 0),
        (with_taint("PreferNoSchedule"), 1),
        (node(allocatable={"cpu": "8", "memory": "16Gi", "ephemeral-storage": "100Gi", "nvidia.com/gpu": "7"}), 0),
        (node(allocatable={"cpu": "8", "memory": "16Gi", "ephemeral-storage": "100Gi"}), 0),
        (node(allocatable={"cpu": "99", "memory": "160Gi", "ephemeral-storage": "100Gi", "nvidia.com/gpu": "16"}), 2),
        (node(allocatable={"cpu": 8}), 0),
        ({"metadata": None}, 0),
    ],
    ids=[
        "fit",
        "excluded",
        "cordoned",
        "silent",
        "no condition",
        "tainted",
        "preferred",
        "7 GPUs",
        "no GPU",
        "room for two",
        "no text",
        "odd",
    ],
)
def test_a_node_counts_by_what_it_could_hold(one: dict[str, Any], count: int) -> None:
    assert places(one, SITE, REQUESTS) == count


class Cluster:
    """Stands for `client.Api`: lists what it is told to."""

    def __init__(self, answer: Callable[[str], list[dict[str, Any]]]):
        self.answer, self.selectors = answer, [""]

    def list(self, kind: str, selector: str = "") -> tuple[list[dict[str, Any]], str]:
        assert kind == "nodes"
        self.selectors.append(selector)
        return self.answer(selector), "1"


def test_nodes_are_asked_for_by_the_labels_of_the_pool() -> None:
    cluster = Cluster(lambda selector: [node(name) for name in "abc"])
    counter = KubeNodes(cluster, SITE.model_copy(update={"node_selector": {"gpu": "h800"}}))  # type: ignore[arg-type]
    assert counter.count("spot", 8) == 3
    assert cluster.selectors[-1] == "gpu=h800,pool=spot"
    assert counter.count(None, 8) == 3
    assert cluster.selectors[-1] == "gpu=h800"


def test_without_the_right_the_next_step_is_said() -> None:
    def forbidden(selector: str) -> list[dict[str, Any]]:
        raise Refused('nodes is forbidden: User "x" cannot list resource "nodes"')

    with pytest.raises(Refused, match="kubectl apply -k k8s/nodes"):
        KubeNodes(Cluster(forbidden), SITE).count(None, 8)  # type: ignore[arg-type]


@pytest.mark.parametrize("text", ["", "8 Gi", "8Xi", "many"])
def test_what_is_no_quantity_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is no quantity"):
        quantity(text)
