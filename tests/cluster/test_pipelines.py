"""A whole pipeline in real pods that goes through one trouble after the other, and ends as if there had been none.

Three stages as gangs of two pods, with two gloo processes each in the first two; checkpoints through S3; a driver inside the cluster. Who
launched it is killed; a node begins late; stage 1 loses a worker, stage 2 a rank; stage 3 is cancelled and resumed. Meanwhile it is read by
osctl, by the Python API and by kubeflow-training's client.

Real: API server, kubelet, containerd, scheduler, operator, images, trainer, S3, MLflow.
Not here: GPUs, and the enforcement of network policies. Each trouble by itself, and more of them: test_pod_kills.py.
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
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import yaml
from cluster.pipelines import Site, ended, installed, kill, processes_of, until
from conftest import REPOSITORY, Cluster
from kubeflow.training import TrainingClient
from one_bill import agree
from tiny_recipe import FORKED, Osctl, write

from orchestrator.api import Pipeline, Result
from orchestrator.ledger.store import Ledger
from orchestrator.stores.s3 import S3Store

pytestmark = [pytest.mark.cluster("pods"), pytest.mark.timeout(1200)]

PRICE = {"usd_per_hour": "360", "source": "our contract", "date": "2026-01-01"}
"""This cluster's own: ten cents a device-second, so that a cent is a tenth of one. By the shipped list a core costs $0.04 an hour."""
STEPS = {"stage1": 200, "stage2": 120, "stage3": 160}
DEVICES = {"stage1": 2, "stage2": 2, "stage3": 1}
"""Of each of two nodes."""
EVERY = 20
"""Steps from one checkpoint to the next."""
NAME = "troubled"


def recipe(folder: Path, *, nodes: int, **pipeline: Any) -> Path:
    """The same stages on one node or on two."""
    write(folder, name=NAME, **pipeline)
    content = yaml.safe_load((folder / "osctl.yaml").read_text())
    if "cluster" in pipeline:
        del content["tracking"]  # the profile names this cluster's MLflow
    for stage in content["stages"]:
        stage["resources"] = {"nodes": nodes, "devices_per_node": DEVICES[stage["name"]] * 2 // nodes}
        path = folder / stage["config"]
        trained = {"steps": STEPS[stage["name"]], "checkpoint": {"every_steps": EVERY}, "optimizer": {"lr": 1e-4}}
        path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | trained))
    (folder / "osctl.yaml").write_text(yaml.safe_dump(content))
    return folder


@pytest.fixture(scope="module")
def site(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with installed(cluster, tmp_path_factory.mktemp("site"), mlflow=True, price=PRICE) as site:
        yield site


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Weight digests of the stages on this machine: as many processes on one node, never disturbed."""
    osctl = Osctl(recipe(tmp_path_factory.mktemp("unbroken"), nodes=1, trainer=FORKED))
    osctl("launch", "-q")
    return osctl.digests()


@dataclass(frozen=True)
class Read:
    """What kubeflow-training's client said of an attempt."""

    running: Any
    """The job, when it ran."""
    done: Any
    """And at its end."""
    names: list[str]
    """Of its pods."""
    logs: dict[str, str]
    events: list[str]


class Troubled:
    """The pipeline on its way. What happens once is kept for the tests to look at."""

    sent: Any
    """PyTorchJob of the first attempt."""
    read: Read
    cancelled: Any
    """`osctl status` when the cancelled pipeline had ended."""
    left: list[Any]
    """Pods then."""
    result: Result
    """Of the launch that resumed it."""

    def __init__(self, site: Site, folder: Path):
        self.site = site
        recipe(folder, nodes=2, backend="kubernetes", cluster=str(site.profile), store=site.store)
        self.osctl = Osctl(folder, site.env)
        self.ledger = Ledger(S3Store(site.store, env=site.cluster.s3), NAME)
        self.pipeline = Pipeline.load(folder, env=self.osctl.environment())
        self.rendered = yaml.safe_load(self.osctl("render", "stage1").stdout)
        self.drivers: list[str | None] = []
        """As each launch calls it."""

    @cached_property
    def client(self) -> TrainingClient:
        return TrainingClient(config_file=str(self.site.cluster.kubeconfig), namespace=self.site.namespace)

    def launch_and_die(self) -> None:
        """`osctl launch --wait`, killed as soon as its driver is there."""
        command = [Path(sys.executable).with_name("osctl"), "launch", "--wait"]
        launching = subprocess.Popen(
            command, cwd=self.osctl.folder, env=self.osctl.environment(), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )  # fmt: skip
        until("the driver is there", lambda: self.site.pods(NAME, "driver"))
        os.kill(launching.pid, signal.SIGKILL)
        launching.wait()
        (job,) = self.site.json("get", "jobs", "-l", f"osctl/pipeline={NAME},osctl/role=driver")["items"]
        self.drivers.append(job["metadata"]["name"])

    def first_checkpoint(self, stage: str) -> None:
        """Waits until the stage trains and has published one."""
        until(f"a checkpoint of {stage}", lambda: any(self.ledger.checkpoints(stage, it) for it in self.ledger.inputs_of(stage)), 300, 0.2)

    def pods_of(self, stage: str) -> list[Any]:
        found = [pod for pod in self.site.pods(NAME) if pod["metadata"]["labels"]["osctl/stage"] == stage]
        return found if len(found) == 2 else []

    def job_of(self, attempt: str) -> Any:
        """Of "stage1-a2", as kubeflow-training's client finds it."""
        jobs = until("its job", lambda: [one for one in self.client.list_jobs() if f"{NAME}-{attempt}-" in one.metadata.name])
        assert jobs[0].metadata.labels["osctl/pipeline"] == NAME
        return jobs[0]

    def read_by_client(self, attempt: str) -> Read:
        """From its beginning to its end: a job has succeeded with its first pod that has, and cleanPodPolicy then removes the other."""
        client, job = self.client, self.job_of(attempt)
        name = job.metadata.name
        running = client.wait_for_job_conditions(name, expected_conditions={"Running"}, wait_timeout=120, polling_interval=1)
        names = [f"{name}-worker-{index}" for index in range(2)]
        until("both pods are found", lambda: sorted(client.get_job_pod_names(name)) == names)

        said: dict[str, str] = {}

        def read() -> list[str]:
            logs, events = client.get_job_logs(name, is_master=False, verbose=True)
            said.update({pod: text for pod, text in logs.items() if text.strip()})
            return list(events) if sorted(said) == names else []

        events = until("both pods' logs are read", read)
        done = client.wait_for_job_conditions(name, expected_conditions={"Succeeded"}, wait_timeout=240, polling_interval=1)
        return Read(running, done, names, said, events)

    def attempts(self, stage: str) -> list[Any]:
        (found,) = [one for one in self.osctl.json("status")["stages"] if one["name"] == stage]
        return list(found["attempts"])

    def began_again_from(self, stage: str) -> list[int]:
        """Steps."""
        events = [event for event in self.osctl.json("events") if (event["kind"], event["stage"]) == ("retry", stage)]
        return [int(event["detail"].split("from step ")[1].split(",")[0]) for event in events]


@pytest.fixture(scope="module")
def troubled(site: Site, tmp_path_factory: pytest.TempPathFactory) -> Troubled:
    run = Troubled(site, tmp_path_factory.mktemp("launched") / NAME)
    run.launch_and_die()
    for _ in range(2):
        run.drivers.append(run.pipeline.launch().driver)
    begins_later(until("two pods of stage 1", lambda: run.pods_of("stage1"), 60)[1])
    run.sent = site.json("get", "pytorchjob", run.job_of("stage1-a1").metadata.name)
    run.first_checkpoint("stage1")
    site.evict(run.pods_of("stage1")[1])
    run.read = run.read_by_client("stage1-a2")

    run.first_checkpoint("stage2")
    kill(processes_of(run.pods_of("stage2")[1], "opensora.train")[-1])

    run.first_checkpoint("stage3")
    run.osctl("cancel")
    run.cancelled = ended(run.osctl)
    run.left = site.pods(NAME)
    run.result = run.pipeline.resume().wait(300)
    return run


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


def test_three_stages_run_as_gangs_and_outlive_who_launched_them(troubled: Troubled) -> None:
    assert len(troubled.drivers) == 3 and len(set(troubled.drivers)) == 1, "said again, it is the same driver"
    osctl = troubled.osctl
    assert [stage["state"] for stage in osctl.json("compare")] == ["committed"] * 3
    assert {line["verdict"] for line in osctl.json("lineage", "stage3", "--verify")} == {"verified"}
    said = osctl("logs", "stage2", "--rank", "0").stdout
    assert "step " in said and "[rank1]" not in said
    jobs = troubled.site.json("get", "pytorchjobs", "-l", f"osctl/pipeline={NAME}")["items"]
    assert {job["metadata"]["labels"]["osctl/stage"] for job in jobs} == set(STEPS)
    assert all(job["spec"]["pytorchReplicaSpecs"]["Worker"]["replicas"] == 2 for job in jobs)


def test_whatever_happened_to_it_no_bit_is_different(troubled: Troubled, unbroken: dict[str, str]) -> None:
    assert set(unbroken) == set(STEPS)
    assert troubled.osctl.digests() == unbroken


def test_an_evicted_worker_costs_no_step(troubled: Troubled) -> None:
    first, second = troubled.attempts("stage1")
    assert (first["state"], second["state"]) == ("preempted", "completed")
    assert EVERY <= first["step"] < STEPS["stage1"]
    assert troubled.began_again_from("stage1") == [first["step"]], "both pods saved, at the same step, and nothing is done again"
    assert [stage["device_seconds"]["lost"] for stage in troubled.osctl.json("cost") if stage["name"] == "stage1"] == [0]


def test_what_lost_a_rank_is_begun_again_from_the_last_checkpoint(troubled: Troubled) -> None:
    first, *_, last = troubled.attempts("stage2")
    assert (first["state"], last["state"]) == ("signal", "completed")
    steps = troubled.began_again_from("stage2")
    assert steps and all(step >= EVERY for step in steps), "no committed step is lost"


def test_cancel_saves_and_resume_goes_on(troubled: Troubled) -> None:
    assert troubled.cancelled["state"] == "cancelled"
    assert not troubled.left, "no device is held by what was cancelled"
    first, second = troubled.attempts("stage3")
    assert (first["state"], second["state"]) == ("drained", "completed")
    assert EVERY <= first["step"] < STEPS["stage3"]


def test_everybody_says_the_same_of_what_it_cost_and_each_bill_balances(troubled: Troubled) -> None:
    osctl, site = troubled.osctl, troubled.site
    rows = osctl.json("cost", "--by-attempt")
    assert len(rows) == 6
    for row in rows:
        assert sum(row["device_seconds"].values()) == pytest.approx(row["held_s"], abs=max(0.001 * row["held_s"], 0.05 * 4))
        assert abs(row["difference_s"]) <= max(0.001 * row["held_s"], 0.05 * 4)
    for stage in osctl.json("compare"):
        assert 3600 * stage["device_hours"] >= 2 * DEVICES[stage["name"]] * stage["wall_s"] * 0.99 > 0
    with site.port_forward("osctl-mlflow", 5000) as url:
        until("MLflow has its end", lambda: all(run["info"]["status"] != "RUNNING" for run in mlflow_runs(url, NAME)), 30, 1.0)
        runs = mlflow_runs(url, NAME)
        bare = Osctl(
            osctl.folder, {**site.env, **site.cluster.s3, "OSCTL_STORE": site.store}
        )  # `osctl list` reads no recipe, nor its profile
        total = agree(bare, url, NAME)
    ends = {
        run["data"]["tags"].get("osctl/stage", NAME): run["info"]["status"]
        for run in runs
        if run["data"]["tags"]["osctl/kind"] != "attempt"
    }
    assert ends == dict.fromkeys((NAME, *STEPS), "FINISHED")
    assert float(total) == pytest.approx(sum(0.1 * row["held_s"] for row in osctl.json("cost"))) and total > 1
    assert "remark:" not in osctl("cost", "--verify").stderr
    first = rows[0]
    intent = troubled.ledger.intent("stage1", first["inputs"], first["attempt"])
    assert intent is not None
    begins = [claim.bound for node in range(2) if (claim := troubled.ledger.agent(intent, node)) is not None]
    assert begins[1] - begins[0] > 2, "its second node began later, and its bill balances"


def test_the_training_client_finds_reads_and_waits_for_what_was_launched(troubled: Troubled) -> None:
    """Whoever knows kubeflow-training's client works with our jobs by it."""
    read, client = troubled.read, troubled.client
    assert read.running.spec.pytorch_replica_specs["Worker"].replicas == 2
    assert read.running.spec.run_policy.clean_pod_policy == "Running"
    assert read.running.spec.elastic_policy.rdzv_backend == "c10d"
    assert sorted(read.logs) == read.names and all("completed at step" in text for text in read.logs.values())
    assert any(read.running.metadata.name in about for about in read.events)
    assert client.is_job_succeeded(job=read.done) and not client.is_job_failed(job=read.done)


def test_what_the_api_resumed_it_waits_for_and_bills(troubled: Troubled) -> None:
    result = troubled.result
    assert result.status == "succeeded" and [stage.state for stage in result.snapshot.stages] == ["committed"] * 3
    assert [row["usd"] for row in troubled.pipeline.cost()] == [float(row["usd"]) for row in troubled.osctl.json("cost")]


def test_the_job_of_a_profile_is_what_render_printed(troubled: Troubled) -> None:
    shown, sent = troubled.rendered, troubled.sent
    assert sent["metadata"]["name"] == shown["metadata"]["name"]
    assert sent["metadata"]["annotations"]["osctl/spec-hash"] == shown["metadata"]["annotations"]["osctl/spec-hash"]
    command = [job["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]["spec"]["containers"][0]["command"] for job in (sent, shown)]
    assert command[0] == command[1]


def test_what_the_readme_says_of_kubernetes_is_what_happens(troubled: Troubled) -> None:
    """Everything is done, and nothing is left to cancel or to compare with."""
    section = (REPOSITORY / "README.md").read_text().split("## On Kubernetes")[1].split("\n## ")[0]
    commands = re.findall(r"`(osctl [^`]+)`", "\n".join(line for line in section.splitlines() if line.startswith("| `osctl")))
    assert commands
    for command in commands:
        expected = {"osctl diff stage1": (0, 4)}.get(command, (0,))
        done = subprocess.run(
            ["osctl", *command.split()[1:]],
            cwd=troubled.osctl.folder,
            env=troubled.osctl.environment() | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode in expected and "Traceback" not in done.stderr, f"{command}: {done.returncode}\n{done.stdout}\n{done.stderr}"
