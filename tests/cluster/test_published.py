"""The published stage 2 for 64 H800, exactly as `osctl render` prints it, on 8 nodes that pretend to have 8 GPUs each."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from cluster.kube_rig import unschedulable
from cluster.pipelines import until
from conftest import REPOSITORY, Cluster
from tiny_recipe import OSCTL

pytestmark = pytest.mark.cluster("gpus")


@pytest.fixture(params=["pytorchjob", "trainjob"])
def rendered(request: pytest.FixtureRequest, cluster: Cluster, namespace: str, tmp_path: Path) -> Iterator[list[dict[str, Any]]]:
    """The attempt's objects; their namespace is this test's, all else the shipped profile's."""
    profile = yaml.safe_load((REPOSITORY / "configs/clusters/h800-64.yaml").read_text()) | {"namespace": namespace}
    (tmp_path / "h800-64.yaml").write_text(yaml.safe_dump(profile))
    cluster.kubectl("apply", "-k", REPOSITORY / "k8s/priority")
    cluster.kubectl("-n", namespace, "create", "serviceaccount", "osctl-trainer")
    command = [OSCTL, "render", "stage2", "-f", "open-sora-1.0", "--cluster", tmp_path / "h800-64.yaml", "--store", tmp_path / "store"]
    done = subprocess.run([*command, "--operator", request.param], capture_output=True, text=True, cwd=tmp_path, timeout=60)
    assert done.returncode == 0, done.stderr
    objects = list(yaml.safe_load_all(done.stdout))
    yield objects
    cluster.kubectl("-n", namespace, "delete", request.param, objects[-1]["metadata"]["name"])


def create(cluster: Cluster, objects: list[dict[str, Any]]) -> None:
    """Trainer's webhook may not see a runtime yet that was created just now; a person would apply it again."""
    for one in objects:
        until(
            f"{one['kind']} is taken",
            lambda one=one: "created" in cluster.kubectl("apply", "-f", "-", stdin=json.dumps(one), check=False),
            15,
        )


def pods(cluster: Cluster, namespace: str) -> list[dict[str, Any]]:
    return list(json.loads(cluster.kubectl("-n", namespace, "get", "pods", "-o", "json"))["items"])


def test_eight_pods_of_eight_gpus_are_bound_to_eight_nodes(cluster: Cluster, namespace: str, rendered: list[dict[str, Any]]) -> None:
    create(cluster, rendered)
    until("8 pods run", lambda: [pod["status"]["phase"] for pod in pods(cluster, namespace)] == ["Running"] * 8, 100)
    assert len({pod["spec"]["nodeName"] for pod in pods(cluster, namespace)}) == 8
    requests = pods(cluster, namespace)[0]["spec"]["containers"][0]["resources"]["requests"]
    assert requests["nvidia.com/gpu"] == "8" and requests["rdma/hca_shared_devices_a"] == "1"


def test_on_seven_nodes_none_is_bound(cluster: Cluster, namespace: str, rendered: list[dict[str, Any]]) -> None:
    cluster.kubectl("cordon", "h800-5")
    try:
        create(cluster, rendered)
        until("8 pods wait", lambda: len(pods(cluster, namespace)) == 8, 30)
        until("the scheduler has given up on each", lambda: all(unschedulable(pod) for pod in pods(cluster, namespace)), 60)
        assert not any("nodeName" in pod["spec"] for pod in pods(cluster, namespace))
    finally:
        cluster.kubectl("uncordon", "h800-5")
