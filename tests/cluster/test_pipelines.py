"""Whole pipelines in real pods: gangs of two pods with two gloo processes each, checkpoints through S3, a driver inside the cluster.

Real: API server, kubelet, containerd, scheduler, operator, images, trainer, S3, MLflow.
Not here: GPUs, and the enforcement of network policies.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from cluster.pipelines import Site, ended, installed, kill, processes_of, shim_of, step_of, until
from conftest import Cluster
from one_bill import agree
from tiny_recipe import Osctl, write

from orchestrator.adapters.s3 import S3Store
from orchestrator.ledger import Ledger

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]

LONG: dict[str, Any] = {"steps": 200, "checkpoint": {"every_steps": 40}, "optimizer": {"lr": 1e-4}}
"""One stage that trains for some ten seconds."""
PRICE = {"usd_per_hour": "360", "source": "our contract", "date": "2026-01-01"}
"""This cluster's own: ten cents a device-second, so that a cent is a tenth of one. By the shipped list a core costs $0.04 an hour."""


@pytest.fixture(scope="module")
def site(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with installed(cluster, tmp_path_factory.mktemp("site"), mlflow=True, price=PRICE) as site:
        yield site


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Weight digests of the long stage on this machine: four processes, never disturbed."""
    osctl = Osctl(write(tmp_path_factory.mktemp("unbroken"), devices=4, stages=1, changes=LONG))
    osctl("launch", "-q")
    return osctl.digests()


def test_the_demos_three_stages_run_as_gangs_and_outlive_who_launched_them(site: Site, tmp_path: Path) -> None:
    (tmp_path / "demo").mkdir()
    where = {"OSCTL_BACKEND": "kubernetes", "OSCTL_CLUSTER": str(site.profile), "OSCTL_STORE": site.store, "OSCTL_FILE": "demo"}
    osctl = Osctl(tmp_path / "demo", {**site.env, **where})
    sizes = {"stage1": (40, 8), "stage2": (30, 8), "stage3": (12, 4)}
    shrink = [
        f"{stage}.{key}={value}"
        for stage, (steps, batch) in sizes.items()
        for key, value in (
            ("resources.nodes", 2), ("steps", steps), ("batch_size", batch), ("checkpoint.every_steps", steps // 2),
            ("data.source.clips", 512), ("evaluate", "null"), ("prompts", "[a digit 3 moving left]"),
        )
    ]  # fmt: skip
    launching = subprocess.Popen(
        [Path(sys.executable).with_name("osctl"), "launch", "--wait", *(word for setting in shrink for word in ("--set", setting))],
        cwd=osctl.folder, env=osctl.environment(), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    until("the driver is there", lambda: site.pods("demo", "driver"))
    os.kill(launching.pid, signal.SIGKILL)
    launching.wait()

    pods = until("two pods train", lambda: len(found := site.pods("demo")) == 2 and found, 60)
    begins_later(pods[1])
    until("it ends", lambda: osctl.json("status")["state"] == "succeeded", 420, 2.0)
    stages = osctl.json("compare")
    assert [stage["state"] for stage in stages] == ["committed"] * 3
    assert {line["verdict"] for line in osctl.json("lineage", "stage3", "--verify")} == {"verified"}
    for stage in stages:
        booked, held = sum(stage["device_seconds"].values()), 3600 * stage["device_hours"]
        assert booked == pytest.approx(held, abs=max(0.001 * held, 0.05 * 4))
        assert held >= 4 * stage["wall_s"] * 0.99 > 0
    said = osctl("logs", "stage2", "--rank", "0").stdout
    assert "step " in said and "[rank1]" not in said

    jobs = site.json("get", "pytorchjobs", "-l", "osctl/pipeline=demo")["items"]
    assert len(jobs) == 3 and all(job["spec"]["pytorchReplicaSpecs"]["Worker"]["replicas"] == 2 for job in jobs)
    with site.port_forward("osctl-mlflow", 5000) as url:
        until("MLflow has its end", lambda: all(run["info"]["status"] == "FINISHED" for run in mlflow_runs(url, "demo")), 30, 1.0)
        runs = mlflow_runs(url, "demo")
        total = agree(osctl, url, "demo")
    assert {run["data"]["tags"]["osctl/stage"] for run in runs if run["data"]["tags"]["osctl/kind"] == "stage"} == {
        "stage1",
        "stage2",
        "stage3",
    }
    assert float(total) == pytest.approx(sum(0.1 * row["held_s"] for row in osctl.json("cost"))) and total > 1
    first, *_ = osctl.json("cost", "--by-attempt")
    ledger = Ledger(S3Store(site.store, env=site.cluster.s3), "demo")
    intent = ledger.intent("stage1", first["inputs"], first["attempt"])
    assert intent is not None
    begins = [claim.bound for node in range(2) if (claim := ledger.agent(intent, node)) is not None]
    assert begins[1] - begins[0] > 2, "its second node began later"
    assert abs(first["difference_s"]) <= max(0.001 * first["held_s"], 0.05 * 4), "and its bill balances"
    assert "remark:" not in osctl("cost", "--verify").stderr


def begins_later(pod: Any, seconds: float = 5.0) -> None:
    """A node whose agent is stopped as soon as its process is there, and goes on after a while."""
    agent = until("the agent is there", lambda: processes_of(pod, "orchestrator.agent"), 60, 0.02)[0]
    os.kill(agent, signal.SIGSTOP)
    try:
        time.sleep(seconds)
    finally:
        os.kill(agent, signal.SIGCONT)


def mlflow_runs(url: str, experiment: str) -> list[Any]:
    """As MLflow's own pages ask for them; tags as a dictionary."""
    import urllib.request

    def ask(path: str, content: dict[str, Any]) -> Any:
        request = urllib.request.Request(f"{url}/api/2.0/mlflow/{path}", json.dumps(content).encode(), {"content-type": "application/json"})
        with urllib.request.urlopen(request, timeout=30) as answer:
            return json.load(answer)

    ids = [one["experiment_id"] for one in ask("experiments/search", {"max_results": 50})["experiments"] if one["name"] == experiment]
    runs = ask("runs/search", {"experiment_ids": ids, "max_results": 100}).get("runs", [])
    for run in runs:
        run["data"]["tags"] = {tag["key"]: tag["value"] for tag in run["data"]["tags"]}
    return list(runs)


def launched(site: Site, folder: Path) -> Osctl:
    """The long stage, training in two pods and with a checkpoint in the store."""
    osctl = site.osctl(folder, stages=1, changes=LONG)
    osctl("launch")
    until("it trains", lambda: step_of(osctl) >= 45, 120, 0.5)
    return osctl


def attempts(status: Any) -> list[Any]:
    return list(status["stages"][0]["attempts"])


def test_an_evicted_worker_costs_no_step_and_no_bit(site: Site, unbroken: dict[str, str], tmp_path: Path) -> None:
    osctl = launched(site, tmp_path / "evicted")
    site.evict(site.pods("evicted")[1])
    status = ended(osctl)
    first, second = attempts(status)
    assert (status["state"], first["state"], second["state"]) == ("succeeded", "preempted", "completed"), status
    assert first["step"] < LONG["steps"]
    started = next(event for event in osctl.json("events") if event["kind"] == "retry")
    assert f"from step {first['step']}," in started["detail"], "both pods saved, at the same step, and nothing is done again"
    assert osctl.digests() == unbroken
    assert [stage["device_seconds"]["lost"] for stage in osctl.json("cost") if stage["name"] == "stage1"] == [0]


@pytest.mark.parametrize("victim", ["rank", "agent", "shim"])
def test_what_is_killed_in_a_pod_is_begun_again_from_the_last_checkpoint(
    site: Site, unbroken: dict[str, str], tmp_path: Path, victim: str
) -> None:
    osctl = launched(site, tmp_path / f"killed-{victim}")
    pod = site.pods(f"killed-{victim}")[1]
    match victim:
        case "rank":
            kill(processes_of(pod, "opensora.train")[-1])
        case "agent":
            kill(processes_of(pod, "orchestrator.agent")[0])
        case "shim":
            kill(shim_of(pod))
    status = ended(osctl)
    assert status["state"] == "succeeded", status
    first, *_, last = attempts(status)
    assert first["state"] in {"rank": ("signal",), "agent": ("lost", "peer"), "shim": ("lost", "peer")}[victim]
    assert last["state"] == "completed"
    assert osctl.digests() == unbroken
    steps = [int(event["detail"].split("from step ")[1].split(",")[0]) for event in osctl.json("events") if event["kind"] == "retry"]
    assert steps and all(step >= 40 for step in steps), "no committed step is lost"


def test_a_driver_that_is_evicted_leaves_the_training_alone(site: Site, unbroken: dict[str, str], tmp_path: Path) -> None:
    osctl = launched(site, tmp_path / "driverless")
    (driver,) = site.pods("driverless", "driver")
    site.evict(driver)
    status = ended(osctl)
    assert status["state"] == "succeeded" and [one["state"] for one in attempts(status)] == ["completed"], (
        "one attempt, from beginning to end"
    )
    assert osctl.digests() == unbroken


def test_cancel_saves_and_resume_goes_on(site: Site, unbroken: dict[str, str], tmp_path: Path) -> None:
    osctl = launched(site, tmp_path / "cancelled")
    osctl("cancel")
    status = ended(osctl)
    assert status["state"] == "cancelled" and attempts(status)[0]["state"] == "drained", status
    assert not site.pods("cancelled"), "no device is held by what was cancelled"
    osctl("resume", "--wait", timeout=300)
    assert osctl.digests() == unbroken


def test_the_job_of_a_profile_is_what_render_printed(site: Site, tmp_path: Path) -> None:
    osctl = site.osctl(tmp_path / "rendered", stages=1)
    shown = yaml.safe_load(osctl("render", "stage1").stdout)
    osctl("launch", "--wait", timeout=300)
    sent = site.json("get", "pytorchjob", shown["metadata"]["name"])
    assert sent["metadata"]["annotations"]["osctl/spec-hash"] == shown["metadata"]["annotations"]["osctl/spec-hash"]
    assert (
        sent["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]["spec"]["containers"][0]["command"]
        == (shown["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]["spec"]["containers"][0]["command"])
    )


def test_what_the_readme_says_of_kubernetes_is_what_happens(site: Site, tmp_path: Path) -> None:
    section = (Path(__file__).parents[2] / "README.md").read_text().split("### On Kubernetes")[1].split("\n### ")[0]
    commands = re.findall(r"`(osctl [^`]+)`", "\n".join(line for line in section.splitlines() if line.startswith("| `osctl")))
    osctl = site.osctl(tmp_path / "readme", stages=1)
    osctl("launch", "--wait", timeout=300)
    assert commands
    for command in commands:
        # --wait has been typed; what follows finds everything done, and nothing to cancel or to compare with
        expected = {"osctl diff stage1": (0, 4)}.get(command, (0,))
        done = subprocess.run(
            ["osctl", *command.split()[1:]],
            cwd=osctl.folder,
            env=osctl.environment() | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode in expected and "Traceback" not in done.stderr, f"{command}: {done.returncode}\n{done.stdout}\n{done.stderr}"
