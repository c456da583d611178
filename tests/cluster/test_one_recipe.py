"""One recipe, from films in a bucket to a model: its driver has the clips made in the cluster, three stages follow, and nobody's machine is
needed meanwhile.

Real: driver, preparation and trainers in pods, films in the S3 store, a driver's pod that is killed.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import raw_videos
import yaml
from cluster.pipelines import Site, ended, installed, until
from cluster.test_prepare_in_cluster import ray_image
from conftest import Cluster
from tiny_recipe import Osctl

from orchestrator.stores import open_store

pytestmark = [pytest.mark.cluster("pods"), pytest.mark.timeout(600)]

FILMS = ("rust", "moss")
SMALL = {"cpu": "300m", "memory": "1536Mi", "scratch": "2Gi"}
ON_RAY = {"cpu": "300m", "memory": "3Gi", "scratch": "2Gi", "head_cpu": "300m", "head_memory": "4Gi", "ray_pods": 1}


@pytest.fixture(scope="module")
def site(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with installed(cluster, tmp_path_factory.mktemp("site"), mlflow=False, prepare=SMALL) as site:
        yield site


@pytest.fixture(scope="module")
def films(site: Site, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Address of two films of two seconds, each with its caption beside it."""
    folder = tmp_path_factory.mktemp("films")
    store = open_store(f"{site.store}-films", {**site.env, **site.cluster.s3})
    for seed, name in enumerate(FILMS):
        raw_videos.written(folder / f"{name}.mp4", raw_videos.moving(raw_videos.texture(seed), 48))
        (folder / f"{name}.txt").write_text(f"{name} that moves")
        for file in (f"{name}.mp4", f"{name}.txt"):
            store.upload(file, folder / file)
    return store.url


def recipe(site: Site, folder: Path, films: str, **more: Any) -> Osctl:
    prepare = {
        "name": f"{folder.name}-films",
        "sources": [{"path": films, "licence": "mine"}],
        "filter": {"rules": []},
        "limits": {"deadline_s": 60},
    }
    prepare |= more
    small = {"steps": 2, "checkpoint": {"every_steps": 2}, "batch_size": 1, "prompts": ["rust that moves"]}
    return site.osctl(folder, nodes=1, devices=1, changes=small, prepare=prepare)


def of_role(site: Site, role: str, kind: str = "jobs") -> list[Any]:
    return list(site.json("get", kind, "-l", f"osctl/role={role}")["items"])


def drivers(site: Site, pipeline: str) -> set[str]:
    """Names of the driver's living pods."""
    return {pod["metadata"]["name"] for pod in site.pods(pipeline, "driver")}


def one_bill_and_one_lineage(site: Site, name: str, films: str, folder: Path) -> None:
    """As somebody sees it who has nothing but the store."""
    folder.mkdir()
    anybody = Osctl(folder, {**site.env, "OSCTL_CLUSTER": str(site.profile), "OSCTL_STORE": site.store})
    state = anybody.json("status", name)
    assert [stage["state"] for stage in state["stages"]] == ["committed"] * 3, state
    assert (state["preparation"]["state"], state["preparation"]["clips"]) == ("prepared", len(FILMS))
    clips, *stages = anybody.json("cost", name)
    assert clips["name"] == f"{name}-films" and float(clips["usd"]) > 0
    assert float(state["usd"]) == pytest.approx(sum(float(row["usd"]) for row in (clips, *stages)))
    *links, origin = anybody.json("lineage", name, "--verify")
    assert [link["name"] for link in links] == ["stage3", "stage2", "stage1"]
    assert origin["verdict"] == "verified" and {one["uri"] for one in origin["sources"]} == {f"{films}/{film}.mp4" for film in FILMS}


def test_a_job_prepares_and_three_stages_follow_though_the_driver_is_killed(site: Site, films: str, tmp_path: Path) -> None:
    osctl = recipe(site, tmp_path / "whole", films)
    foretold = osctl("launch", "--dry-run").stderr
    assert "first: its driver has whole-films prepared" in foretold and of_role(site, "driver") == []
    osctl("launch", "-q")
    (job,) = until("the preparation is asked for", lambda: of_role(site, "prepare"))
    assert "drives it already" in osctl("launch", "-q").stderr
    (pod,) = site.pods("whole", "driver")
    site.cluster.kubectl("-n", site.namespace, "delete", "pod", pod["metadata"]["name"], "--grace-period=0", "--force")
    assert until(
        "another driver drives", lambda: [one for one in site.pods("whole", "driver") if one["metadata"]["name"] != pod["metadata"]["name"]]
    )
    assert ended(osctl, 400)["state"] == "succeeded"
    assert [one["metadata"]["name"] for one in of_role(site, "prepare")] == [job["metadata"]["name"]], "nothing is made twice"
    one_bill_and_one_lineage(site, "whole", films, tmp_path / "elsewhere")
    assert "nothing has changed since it was prepared" in osctl("launch", "-q").stderr and len(of_role(site, "driver")) == 1


def test_a_cancel_stops_the_preparation_too(site: Site, films: str, tmp_path: Path) -> None:
    osctl = recipe(site, tmp_path / "stopped", films)
    osctl("launch", "-q")
    until("the preparation is asked for", lambda: [one for one in of_role(site, "prepare") if "stopped" in one["metadata"]["name"]])
    osctl("cancel")
    assert ended(osctl, 120)["state"] == "cancelled"
    living = [one for one in site.json("get", "pods", "-l", "osctl/role=prepare")["items"] if "stopped" in one["metadata"]["name"]]
    assert [one for one in living if one["status"]["phase"] in ("Pending", "Running")] == []


@pytest.mark.prove("one-recipe-on-ray")
def test_a_rayjob_prepares_and_three_stages_follow(site: Site, films: str, tmp_path: Path) -> None:
    profile = yaml.safe_load(site.profile.read_text()) | {"prepare": ON_RAY | {"ray_image": ray_image()}}
    site.profile.write_text(yaml.safe_dump(profile))
    osctl = recipe(site, tmp_path / "rays", films, engine="ray")
    osctl("launch", "-q")
    until("the RayJob is asked for", lambda: of_role(site, "prepare", "rayjobs"))
    assert ended(osctl, 500)["state"] == "succeeded"
    one_bill_and_one_lineage(site, "rays", films, tmp_path / "elsewhere")
