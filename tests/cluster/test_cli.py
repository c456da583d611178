"""`osctl` against the real API server: drivers as Jobs, what a person may see, and why a gang waits.

Trainers' pods are put on fake nodes of 8 GPUs, which run nothing; drivers' pods are real.
"""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from cluster.pipelines import Site, installed, until
from conftest import Cluster
from tiny_recipe import OSCTL, Osctl

pytestmark = [pytest.mark.cluster("gpus"), pytest.mark.timeout(300)]
GPUS = 8
"""Of a fake node; there are 8 such nodes."""


@pytest.fixture(scope="module")
def site(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    fake: dict[str, Any] = {
        "device": "h800", "gpu_resource": "nvidia.com/gpu", "cpu": "8", "memory": "64Gi", "shm": "1Gi", "scratch": "10Gi",
        "node_selector": {"nvidia.com/gpu.product": "NVIDIA-H800"},
        "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}],
        "start_deadline_s": 600,
    }  # fmt: skip
    with installed(cluster, tmp_path_factory.mktemp("site"), mlflow=False, **fake) as site:
        yield site


def recipe(site: Site, folder: Path, nodes: int = 1) -> Osctl:
    folder.mkdir(exist_ok=True)
    return site.osctl(folder, nodes=nodes, devices=GPUS, tracking="none")


def jobs(site: Site, pipeline: str) -> list[Any]:
    found: list[Any] = site.json("get", "jobs", "-l", f"osctl/pipeline={pipeline},osctl/role=driver")["items"]
    return found


def as_person(site: Site, name: str) -> dict[str, str]:
    return {**site.env, "KUBECONFIG": str(site.cluster.kubeconfig.parent / f"{name}.kubeconfig")}


def test_launches_at_once_make_one_driver_which_moves_to_another_pod_and_takes_its_attempt_along(site: Site, tmp_path: Path) -> None:
    osctl = recipe(site, tmp_path / "moves")
    command = [OSCTL, "launch", "-o", "json"]
    launches = [
        subprocess.Popen(command, cwd=osctl.folder, env=osctl.environment(), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        for _ in range(3)
    ]
    results = [json.loads(launch.communicate(timeout=60)[0]) for launch in launches]
    assert [launch.returncode for launch in launches] == [0, 0, 0]
    [job] = jobs(site, "moves")
    driver = job["metadata"]["name"]
    assert results == [{"pipeline": "moves", "driver": driver, "revision": 1}] * 3
    refused = osctl("launch", "--set", "stage1.steps=9", expect=4).stderr
    assert driver in refused and "osctl cancel" in refused

    def shown() -> Any:
        return osctl.json("status")

    until("the attempt runs", lambda: [pod["phase"] for pod in shown()["pods"] if pod["stage"] == "stage1"] == ["Running"], 90)
    before = shown()["driver"]
    [pod] = site.pods("moves", "driver")
    assert pod["metadata"]["name"] in before
    site.cluster.kubectl("-n", site.namespace, "delete", "pod", pod["metadata"]["name"], "--wait=false")
    until("another pod drives", lambda: shown()["driver"] not in (None, before), 90)
    seen = shown()
    assert seen["state"] == "running" and [one["attempt"] for one in seen["stages"][0]["attempts"]] == [1]
    said = [event["detail"] for event in osctl.json("events")]
    assert any("this driver leaves" in detail for detail in said) and not any("ended" in detail for detail in said)
    assert "already" in osctl("launch").stderr, "it is the same launch"
    osctl("cancel", "--now")
    until("it is cancelled", lambda: shown()["state"] == "cancelled", 60)
    assert not site.pods("moves"), "nothing is left running"
    [job] = jobs(site, "moves")
    assert job["metadata"]["name"] == driver
    until("the Job is over", lambda: any(one["type"] == "Failed" for one in jobs(site, "moves")[0]["status"].get("conditions", ())), 30)


def test_a_gang_that_does_not_fit_waits_and_says_why(site: Site, tmp_path: Path) -> None:
    osctl = recipe(site, tmp_path / "too-large", nodes=9)
    command = [OSCTL, "watch", "-o", "json"]
    osctl("launch")
    watching = subprocess.Popen(command, cwd=osctl.folder, env=osctl.environment(), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    try:
        assert watching.stdout is not None
        deadline = time.monotonic() + 120
        for line in watching.stdout:
            seen = json.loads(line)
            waits = [one for one in seen["waits"] if one["stage"] == "stage1" and one["kind"] == "capacity"]
            if waits:
                break
            assert time.monotonic() < deadline, line
        events = site.json("get", "events")["items"]
        told = [pod["status"].get("conditions", []) for pod in site.pods("too-large")]
        messages = {one.get("message", "") for conditions in told for one in conditions if one["type"] == "PodScheduled"}
        messages |= {event["message"] for event in events if event["reason"] == "FailedScheduling"}
        assert waits[0]["why"] in {message.strip().partition("\n")[0] for message in messages}, "in the scheduler's own words"
        assert waits[0]["source"] == "cluster" and all(pod["phase"] == "Pending" for pod in seen["pods"] if pod["stage"] == "stage1")
        # A person who may not look into the cluster is told what the driver saw.
        stranger = Osctl(osctl.folder, as_person(site, "alice"))
        until("the driver says it", lambda: stranger.json("status")["waits"], 60)
        [relayed] = stranger.json("status")["waits"]
        assert relayed["source"] == "driver" and "stage1" in relayed["why"]
        fit = {row["name"]: row for row in json.loads(osctl("doctor", "-o", "json", expect=4).stdout)}["nodes"]
        assert fit["verdict"] == "failed" and "needs 9" in fit["fact"] and "8 of 8 nodes" in fit["fact"]
    finally:
        watching.terminate()
        watching.communicate()
        osctl("cancel", "--now")
    until("it is cancelled", lambda: osctl.json("status")["state"] == "cancelled", 60)


def test_doctor_finds_all_that_a_launch_needs(site: Site, tmp_path: Path) -> None:
    osctl = recipe(site, tmp_path / "well")
    done = osctl("doctor", "-o", "json")
    verdicts = {row["name"]: row["verdict"] for row in json.loads(done.stdout)}
    assert "failed" not in verdicts.values() and verdicts["admission"] == verdicts["driver's rights"] == verdicts["store"] == "ok", verdicts


def test_doctor_names_a_missing_right_and_what_it_could_not_see(site: Site, tmp_path: Path) -> None:
    alice = Osctl(recipe(site, tmp_path / "rights").folder, as_person(site, "alice"))

    def rows() -> dict[str, Any]:
        return {row["name"]: row for row in json.loads(alice("doctor", "-o", "json", expect=4).stdout)}

    nobody = rows()
    assert nobody["rights"]["verdict"] == "failed" and "create pytorchjobs.kubeflow.org" in nobody["rights"]["fact"]
    for hidden in ("namespace", "accounts", "s3 secret", "quota", "nodes", "driver's rights"):
        assert nobody[hidden]["verdict"] == "not checked", nobody[hidden]
    bind = ["create", "rolebinding", "of-alice", "--role=osctl-user", "--user=alice"]
    site.cluster.kubectl("-n", site.namespace, *bind)
    try:
        user = {row["name"]: row for row in json.loads(alice("doctor", "-o", "json").stdout)}
        assert user["rights"]["verdict"] == user["quota"]["verdict"] == user["admission"]["verdict"] == "ok"
        assert user["s3 secret"]["verdict"] == "not checked", "the Role gives no secrets"
    finally:
        site.cluster.kubectl("-n", site.namespace, "delete", "rolebinding", "of-alice")


def test_doctor_holds_the_quota_against_the_largest_stage(site: Site, tmp_path: Path) -> None:
    osctl = recipe(site, tmp_path / "quota", nodes=2)
    quota = {"apiVersion": "v1", "kind": "ResourceQuota", "metadata": {"name": "few"}, "spec": {"hard": {"requests.nvidia.com/gpu": "8"}}}
    site.cluster.kubectl("-n", site.namespace, "apply", "-f", "-", stdin=json.dumps(quota))
    try:
        until("the quota is counted", lambda: site.json("get", "resourcequota", "few").get("status", {}).get("hard"))
        row = {row["name"]: row for row in json.loads(osctl("doctor", "-o", "json", expect=4).stdout)}["quota"]
        assert row["verdict"] == "failed" and "needs 16, 8 of 8 are free" in row["fact"] and row["fix"]
    finally:
        site.cluster.kubectl("-n", site.namespace, "delete", "resourcequota", "few")


def test_a_foreign_job_is_left_as_it_is(site: Site, tmp_path: Path) -> None:
    osctl = recipe(site, tmp_path / "foreign")
    objects = osctl("render", "--driver", "-o", "json").stdout
    name = next(one["metadata"]["name"] for one in json.loads(objects)["items"] if one["kind"] == "Job")
    container = {"name": "pause", "image": "busybox"}
    template = {"spec": {"containers": [container], "restartPolicy": "Never"}}
    job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": name}, "spec": {"suspend": True, "template": template}}
    site.cluster.kubectl("-n", site.namespace, "create", "-f", "-", stdin=json.dumps(job))
    before = site.json("get", "job", name)["metadata"]["resourceVersion"]
    assert name in osctl("launch", expect=4).stderr
    assert site.json("get", "job", name)["metadata"]["resourceVersion"] == before


def test_an_api_server_that_is_away_is_exit_5_and_nothing_done(site: Site, tmp_path: Path) -> None:
    config = yaml.safe_load(site.cluster.kubeconfig.read_text())
    config["clusters"][0]["cluster"]["server"] = "https://127.0.0.1:9"
    (tmp_path / "kubeconfig").write_text(yaml.safe_dump(config))
    osctl = Osctl(recipe(site, tmp_path / "away").folder, {**site.env, "KUBECONFIG": str(tmp_path / "kubeconfig")})
    assert "127.0.0.1:9" in osctl("launch", expect=5).stderr
    assert not jobs(site, "away") and osctl.json("events") == []
