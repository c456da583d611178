"""A profile that loads makes manifests that a cluster accepts; what it would refuse is said in words, with the line."""

from __future__ import annotations

import json
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from orchestrator.errors import UsageError
from orchestrator.recipe import files, resolve
from orchestrator.recipe.cluster_profile import ClusterProfile, amount, shipped_clusters
from orchestrator.recipe.pipeline import Pipeline
from orchestrator.recipe.yaml_file import read, validate

PROFILE = {
    "name": "mine", "image": "trainer:dev", "driver_image": "driver:dev", "allow_unpinned": ["trainer:dev", "driver:dev"], "device": "h800",
    "cpu": "4", "memory": "5Gi", "shm": "1Gi",
}  # fmt: skip


def load(path: Path, **changes: Any) -> Pipeline:
    path.write_text(json.dumps(PROFILE | changes))
    return resolve.load(files.find("open-sora-1.0"), overrides={"cluster": str(path)})


@pytest.mark.parametrize("path", shipped_clusters(files.shipped_folder()).values(), ids=lambda path: path.stem)
def test_every_shipped_profile_loads_under_its_own_name(path: Path) -> None:
    assert validate(ClusterProfile, read(path), "cluster").name == path.stem


def test_a_pipeline_carries_the_whole_profile(tmp_path: Path) -> None:
    pipeline = load(tmp_path / "mine.yaml")
    assert pipeline.cluster is not None
    assert pipeline.cluster.name == "mine"
    assert Pipeline.model_validate(pipeline.model_dump(mode="json")) == pipeline, "a driver reads it back from the ledger"


def test_without_a_name_kubernetes_means_the_published_pool() -> None:
    cluster = resolve.load(files.find("open-sora-1.0")).cluster
    assert cluster is not None
    assert cluster.name == "h800-64"
    assert resolve.load(files.find("demo")).cluster is None, "a laptop needs no profile"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cpu": 4}, ":1: cpu: expected text, found 4"),
        ({"cpu": "4Ki"}, ":1: cpu: expected cores such as '16' or '500m', found '4Ki'"),
        ({"memory": "5"}, ":1: memory: expected bytes with a unit such as 64Gi, found '5'"),
        ({"memory": "0Gi"}, ": memory is 0Gi; a pod with none of it cannot run"),
        ({"scratch": "2Gi", "latents_gb": 2.5}, ": latents_gb 2.5 (GB) is not below scratch 2Gi, in which it lies; lower latents_gb"),
        ({"shm": "5Gi"}, ": shm 5Gi is not below memory 5Gi, and counts as memory; lower shm"),
        ({"node_selector": {"a b": "c"}}, ":1: node_selector: expected a label's key such as nvidia.com/gpu.product, found 'a b'"),
        ({"node_selector": {"a": "c c"}}, ":1: node_selector.a: expected a label's value"),
        ({"exclude_nodes": ["a/b"]}, ":1: exclude_nodes.0: expected a label's value"),
        ({"rdma_resource": "hca"}, ":1: rdma_resource: expected a resource as nodes call it, such as nvidia.com/gpu, found 'hca'"),
        ({"namespace": "A"}, ":1: namespace: expected lower-case letters, digits and '-', at most 63, found 'A'"),
        ({"tolerations": [{"key": "a", "operator": "Equal"}]}, ":1: tolerations.0: operator Equal with value None"),
        ({"tolerations": [{"key": "a", "value": "b"}]}, ":1: tolerations.0: operator Exists with value b"),
        ({"volumes": [{"claim": "x", "path": "/"}]}, ":1: volumes.0.path: expected an absolute path without ':', found '/'"),
        ({"volumes": [{"claim": "x", "path": "/tmp/data"}]}, ": volumes: /tmp/data and /tmp lie in each other; mount it elsewhere"),
        ({"volumes": [{"claim": "x", "path": "/dev"}]}, ": volumes: /dev and /dev/shm lie in each other; mount it elsewhere"),
        (
            {"volumes": [{"claim": "x", "path": "/data"}, {"claim": "y", "path": "/b/../data/x"}]},
            ": volumes: /b/../data/x and /data lie in each other",
        ),
        ({"image": "trainer:new"}, ": image 'trainer:new' is not pinned; write name@sha256:<64 digits>, or name it under allow_unpinned"),
        ({"driver_image": "x@sha256:00"}, ": image 'x@sha256:00' is not pinned"),
        ({"queue": "kueue"}, ": queue kueue with kueue_queue None; Kueue needs the name of its LocalQueue"),
        ({"kueue_queue": "team"}, ": queue gang with kueue_queue team"),
        ({"kueue_priority": "urgent"}, ": queue gang with kueue_priority urgent"),
        ({"lost_node_s": 300}, ":1: lost_node_s: must be at most 120, found 300"),
        ({"imag": "x"}, ":1: imag: unknown key 'imag'. Did you mean 'image'?"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_a_cluster_would_refuse_is_refused_here_in_words(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        load(tmp_path / "mine.yaml", **changes)
    assert f"{tmp_path / 'mine.yaml'}{message}" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", ["", " ", "eu\nnorth", "\x1b[31meu", "eu\u2028north"])
@pytest.mark.parametrize("field", ["region", "device"])
def test_what_people_are_shown_of_a_pool_is_one_line_that_says_something(field: str, value: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        load(tmp_path / "mine.yaml", pools=[{"name": "reserved", field: value}])
    assert f": pools.reserved.{field}: expected one line of text, found" in str(caught.value)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("name", ["", "a\n", "a\x1b[0m", "A"])
def test_the_name_of_a_pool_is_a_name(name: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="expected lower-case letters, digits and '-', at most 63"):
        load(tmp_path / "mine.yaml", pools=[{"name": name}])


@pytest.mark.parametrize("field", ["s3_endpoint", "tracking"])
def test_a_profile_holds_no_credentials_and_an_error_does_not_show_them(field: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        load(tmp_path / "mine.yaml", **{field: "https://AKIA:hunter2@s3.example.com"})
    assert "hunter2" not in str(caught.value)
    assert "put them into a Secret" in str(caught.value)


def test_an_unknown_profile_is_answered_with_the_closest() -> None:
    with pytest.raises(UsageError, match=r"no such file or shipped cluster profile: 'h800-46'\. Did you mean 'h800-64'\?"):
        resolve.load(files.find("open-sora-1.0"), overrides={"cluster": "h800-46"})


def test_grace_is_two_saves_and_a_minute(tmp_path: Path) -> None:
    cluster = load(tmp_path / "mine.yaml", save_s=100).cluster
    assert cluster is not None
    assert cluster.grace_s == 260


@pytest.mark.parametrize(
    ("quantity", "value"),
    [("500m", "0.5"), ("2", "2"), ("1k", "1000"), ("1Ki", "1024"), ("1.5Gi", "1610612736"), ("2T", "2000000000000"), ("64Mi", "67108864")],
)
def test_quantities_are_what_kubernetes_takes_them_for(quantity: str, value: str) -> None:
    assert amount(quantity) == Decimal(value)
