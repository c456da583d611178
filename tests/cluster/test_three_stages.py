"""Three stages end in real pods as jobs of either operator, with and without Kueue, with the weights of as many ranks on this machine.

Under Kueue the driver's Job stands in the same queue, and one quota admits all of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from cluster.kueue_rig import queues
from cluster.pipelines import Site, installed
from conftest import Cluster
from tiny_recipe import FORKED, Osctl, write

pytestmark = [pytest.mark.cluster("pods"), pytest.mark.timeout(600)]

KINDS = {"trainjob": "TrainJob", "pytorchjob": "PyTorchJob"}
OTHERS = pytest.mark.prove("operators")
"""The suite has the two of which clusters have most; PyTorchJobs in a queue and TrainJobs without are in the long version."""


@pytest.fixture(scope="module")
def site(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with installed(cluster, tmp_path_factory.mktemp("site"), mlflow=False) as site:
        yield site


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Weight digests of the stages on this machine: two ranks."""
    osctl = Osctl(write(tmp_path_factory.mktemp("here"), trainer=FORKED))
    osctl("launch", "-q")
    return osctl.digests()


def in_queue(site: Site, folder: Path, **profile: Any) -> Site:
    """The same site with a profile that says more."""
    path = folder / "cluster.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load(site.profile.read_text()) | profile))
    return replace(site, profile=path)


@pytest.mark.parametrize(
    ("operator", "kueue"),
    [
        pytest.param("trainjob", True, id="trainjobs-under-kueue"),
        pytest.param("pytorchjob", False, id="pytorchjobs"),
        pytest.param("trainjob", False, id="trainjobs", marks=OTHERS),
        pytest.param("pytorchjob", True, id="pytorchjobs-under-kueue", marks=OTHERS),
    ],
)
def test_three_stages_end_with_the_same_weights(
    site: Site, here: dict[str, str], tmp_path: Path, operator: str, kueue: bool, request: pytest.FixtureRequest
) -> None:
    name = request.node.callspec.id
    queued = {"queue": "kueue", "kueue_queue": name, "driver_queue": name} if kueue else {}
    with queues(site.cluster.kubectl, site.namespace, {"kubernetes.io/hostname": "node-0"}) as made:
        if kueue:
            made.open(name, gpus=0)
        osctl = in_queue(site, tmp_path, operator=operator, **queued).osctl(tmp_path / name, devices=1)
        osctl("launch", "--wait", "-q")
        assert osctl.digests() == here
        shown = osctl.json("status")
        assert [stage["state"] for stage in shown["stages"]] == ["committed"] * 3
        assert [len(stage["attempts"]) for stage in shown["stages"]] == [1, 1, 1]
        jobs = site.json("get", f"{operator}s", "-l", f"osctl/pipeline={name}")["items"]
        assert [job["kind"] for job in jobs] == [KINDS[operator]] * 3
        admitted = [one for one in site.json("get", "workloads")["items"] if one["spec"]["queueName"] == name]
        owners = sorted(one["metadata"]["ownerReferences"][0]["kind"] for one in admitted)
        assert [kind for kind in owners if kind != "Job"] == ([KINDS[operator]] * 3 if kueue else [])
        assert ("Job" in owners) is kueue
        for one in admitted:
            states = {condition["type"]: condition["status"] for condition in one["status"]["conditions"]}
            assert "Admitted" in states, one  # False once its job is over
