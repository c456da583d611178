"""Preparations whose launcher lives in a pod, on the real cluster: what came out, what it cost, and how a person stops one.

Real: the Job, its pod and its decoders, films in the S3 store, an `osctl` that anybody calls from elsewhere.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import raw_videos
import yaml
from cluster.pipelines import Site, installed, until
from conftest import Cluster
from tiny_recipe import Osctl

from orchestrator.stores import open_store

pytestmark = [pytest.mark.cluster("pods"), pytest.mark.timeout(300)]

FILMS = ("rust", "moss")
QUICK = ("--set", "filter.rules=[]", "--set", "limits.deadline_s=60")


@pytest.fixture(scope="module")
def site(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with installed(cluster, tmp_path_factory.mktemp("site"), mlflow=False, cpu="1") as site:
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


def person(site: Site, folder: Path) -> Osctl:
    """Somebody at a machine that has nothing of the preparation."""
    folder.mkdir(exist_ok=True)
    return Osctl(folder, {**site.env, "OSCTL_CLUSTER": str(site.profile), "OSCTL_STORE": site.store})


def ray_image() -> str:
    """Of this working tree, with Ray. Its layers are built once."""
    words = [Path(__file__).with_name("image"), "ray"]
    lines = subprocess.run(words, capture_output=True, text=True, check=True, timeout=600).stdout.splitlines()
    return dict(line.split() for line in lines)["ray"]


def prepare_jobs(site: Site) -> list[Any]:
    return list(site.json("get", "jobs", "-l", "osctl/role=prepare")["items"])


def test_a_job_makes_the_data_set_that_a_laptop_makes_and_is_billed_by_its_pod(site: Site, films: str, tmp_path: Path) -> None:
    laptop = Osctl(tmp_path, {**site.env, **site.cluster.s3})
    here = laptop.json("prepare", "run", films, "--name", "here", *QUICK, "--quiet")

    osctl = person(site, tmp_path / "elsewhere")
    asked = ("prepare", "run", films, "--name", "there", "--cluster", str(site.profile), *QUICK)
    osctl(*asked, "--dry-run")
    assert prepare_jobs(site) == []
    said = osctl(*asked, "--follow", timeout=240).stderr
    state = osctl.json("prepare", "status", "there")
    assert (state["state"], state["clips"], state["digest"]) == ("prepared", len(FILMS), here["digest"]), said
    assert state["place"].startswith(f"{site.store}/datasets/there/")
    (job,) = prepare_jobs(site)
    (attempt,) = state["attempts"]
    (pod,) = site.json("get", "pods", "-l", f"batch.kubernetes.io/job-name={job['metadata']['name']}")["items"]
    assert attempt["state"] == "completed" and attempt["pods"][0]["name"] == pod["metadata"]["name"]
    ended = pod["status"]["containerStatuses"][0]["state"]["terminated"]
    assert attempt["pods"][0]["core_seconds"] > 0, ended
    assert "there" in osctl("prepare", "why", "rust.mp4", "--of", "there", expect=4).stderr
    again = osctl(*asked, "--follow", timeout=240).stderr
    assert "nothing to do" in again or "prepared" in again


def test_pods_that_divide_the_sources_make_the_same_and_are_all_billed(site: Site, films: str, tmp_path: Path) -> None:
    laptop = Osctl(tmp_path, {**site.env, **site.cluster.s3})
    here = laptop.json("prepare", "run", films, "--name", "one-pod", *QUICK, "--quiet")
    profile = yaml.safe_load(site.profile.read_text())
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(profile | {"prepare": {"cpu": "300m", "memory": "2Gi", "scratch": "2Gi"}}))
    osctl = person(site, tmp_path / "elsewhere")
    asked = ("prepare", "run", films, "--name", "shards", "--pods", "2", "--cluster", str(tmp_path / "small.yaml"), *QUICK)
    said = osctl(*asked, "--follow", timeout=280).stderr
    state = osctl.json("prepare", "status", "shards")
    assert (state["state"], state["clips"], state["digest"]) == ("prepared", len(FILMS), here["digest"]), said
    (job,) = (one for one in prepare_jobs(site) if one["spec"].get("completionMode") == "Indexed")
    assert job["status"]["completedIndexes"] == "0,1"
    (attempt,) = state["attempts"]
    pods = site.json("get", "pods", "-l", f"batch.kubernetes.io/job-name={job['metadata']['name']}")["items"]
    assert {pod["name"] for pod in attempt["pods"]} == {pod["metadata"]["name"] for pod in pods} and len(pods) == 2


def test_a_rayjob_makes_the_same_and_its_workers_are_billed(cluster: Cluster, site: Site, films: str, tmp_path: Path) -> None:
    profile = yaml.safe_load(site.profile.read_text())
    small = {"cpu": "300m", "memory": "3Gi", "scratch": "2Gi", "head_cpu": "300m", "head_memory": "4Gi", "ray_pods": 1}
    (tmp_path / "ray.yaml").write_text(yaml.safe_dump(profile | {"prepare": small | {"ray_image": ray_image()}}))
    osctl = person(site, tmp_path / "elsewhere")
    asked = ("prepare", "run", films, "--name", "rays", "--engine", "ray", "--cluster", str(tmp_path / "ray.yaml"), *QUICK)
    osctl(*asked, "--dry-run")
    said = osctl(*asked, "--follow", timeout=280).stderr
    state = osctl.json("prepare", "status", "rays")
    there = osctl.json("prepare", "status", "there")
    assert (state["state"], state["digest"]) == ("prepared", there["digest"]), said
    (attempt,) = state["attempts"]
    assert {pod["group"] for pod in attempt["pods"]} == {"head", "cpu"}
    until("the pods are gone", lambda: not site.json("get", "pods", "-l", "ray.io/is-ray-node=yes")["items"])
