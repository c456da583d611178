"""Launch to training: how much of it is osctl's own, beside the same PyTorchJob given to kubectl.

Real launches in real pods of the test cluster (tests/cluster/up, chart installed as the tests do it): three stages, one node, one process.
What is osctl's own, and counted:

- submit: from the start of the process `osctl launch` until the API server tells of the driver's Job.
- driver start: from the driver's process until its first event: interpreter, imports, revision, lease.
- driver: from that event until the API server tells of the PyTorchJob: observe, decide, intent, submit.
- agent: from the agent's process until torchrun's process, without staging in the parent's checkpoint.
- chain: from the COMMITTED event of a stage until the API server tells of the next stage's PyTorchJob.

Kubernetes' own is not: webhook, scheduler, image, sandbox and container, from a Job's or PyTorchJob's appearance to its process. Nor is
what comes after torchrun's start: torch's import, rendezvous, the first step. A process begins where the kernel says so (to 10 ms).

Peer: the PyTorchJob as `osctl render` prints it, by `kubectl create -f`, with an intent in the store since its agent asks for one.

    PYTHONPATH=tests .venv/bin/python bench/overhead.py [launches]
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import yaml
from cluster.pipelines import Site, ended, installed, processes_of, until
from shared_cluster import CLUSTER, KUBECTL, environment
from tiny_recipe import OSCTL, Osctl

from opensora import identity
from orchestrator.errors import NotFound, Unreachable
from orchestrator.kube.client import Api
from orchestrator.labels import Label
from orchestrator.ledger.keys import run_key
from orchestrator.ledger.records import Intent
from orchestrator.ledger.store import Ledger
from orchestrator.recipe import resolve
from orchestrator.recipe.pipeline import Pipeline
from orchestrator.stores import open_store

LAUNCHES = 3
TICK_S = 1 / os.sysconf("SC_CLK_TCK")
AGENT, TORCHRUN, DRIVER = "orchestrator.agent", "torch.distributed.run", "osctl drive"
Times = dict[str, float]


def born(pid: int) -> float:
    """When a process began, Unix seconds."""
    ticks = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    return time.time() - time.clock_gettime(time.CLOCK_BOOTTIME) + ticks * TICK_S


class Arrivals:
    """When the API server first told of an object, by kind and labels."""

    def __init__(self, ns: str) -> None:
        self._ns, self._over = ns, threading.Event()
        self.seen: dict[tuple[str, str, str], float] = {}
        """(kind, pipeline, stage) to Unix seconds; the stage of a driver's Job is empty."""
        for kind in ("jobs", "pytorchjobs"):
            threading.Thread(target=self._follow, args=(kind,), daemon=True).start()

    def _follow(self, kind: str) -> None:
        with contextlib.closing(Api.connect(None, self._ns)) as api:
            while not self._over.is_set():
                try:
                    _, version = api.list(kind)
                    for change in api.watch(kind, "", version):
                        labels = change.object["metadata"].get("labels", {})
                        if change.type == "ADDED":
                            self.seen[kind, labels[Label.PIPELINE], labels.get(Label.STAGE, "")] = time.time()
                except (Unreachable, NotFound):
                    self._over.wait(1)

    def of(self, kind: str, pipeline: str, stage: str = "") -> float:
        return float(until(f"{kind} of {pipeline} {stage}", lambda: self.seen.get((kind, pipeline, stage))))

    def close(self) -> None:
        self._over.set()


def processes(site: Site, pipeline: str, stage: str) -> tuple[float, float]:
    """When agent and torchrun of a stage began; waits for them."""

    def look() -> tuple[float, float] | None:
        for pod in site.pods(pipeline):
            if pod["metadata"]["labels"][Label.STAGE] == stage and (found := processes_of(pod, TORCHRUN)):
                return born(min(processes_of(pod, AGENT))), born(min(found))
        return None

    agent, torchrun = until(f"torchrun of {stage}", look, 180, 0.3)
    return agent, torchrun


def ledger_of(osctl: Osctl, env: dict[str, str]) -> tuple[Pipeline, Ledger]:
    pipeline = resolve.load(osctl.folder / "osctl.yaml", env=env)
    return pipeline, Ledger(open_store(pipeline.store), pipeline.name)


def launched(site: Site, arrivals: Arrivals, folder: Path, env: dict[str, str]) -> Iterator[Times]:
    """The parts of one launch: of its first stage, then of each further one."""
    osctl = site.osctl(folder, nodes=1, devices=1)
    name = folder.name
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.time()
    subprocess.run([OSCTL, "launch"], cwd=osctl.folder, env=env, stdin=subprocess.DEVNULL, check=True, capture_output=True)
    returned, after = time.time(), resource.getrusage(resource.RUSAGE_CHILDREN)
    job = arrivals.of("jobs", name)
    [driver] = until("the driver's process", lambda: [pids for pod in site.pods(name, "driver") if (pids := processes_of(pod, DRIVER))])
    drove = born(min(driver))
    agents = {stage: processes(site, name, stage) for stage in ("stage1", "stage2", "stage3")}
    status = ended(osctl)
    assert status["state"] == "succeeded", status
    events = osctl.json("events")
    first = min(event["time"] for event in events)
    committed = {event["stage"]: event["time"] for event in events if event["kind"] == "committed"}
    _, ledger = ledger_of(osctl, env)
    for number, (stage, (agent, torchrun)) in enumerate(agents.items(), 1):
        made = arrivals.of("pytorchjobs", name, stage)
        [(_, inputs_digest)] = [pair for pair in ledger.stages() if pair[0] == stage]
        staged = sum(piece.spent.get("stage_in", 0.0) for piece in ledger.journal(stage, inputs_digest, 1))
        parts = {"kubernetes: job to agent": agent - made, "agent": torchrun - agent - staged, "stage in": staged}
        if number == 1:
            cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
            parts |= {
                "submit": job - began, "submit, whole process": returned - began, "submit, CPU": cpu, "driver start": first - drove,
                "kubernetes: job to driver": drove - job, "driver": made - first, "launch to torchrun": torchrun - began,
            }  # fmt: skip
            parts["osctl's own"] = sum(parts[part] for part in ("submit", "driver start", "driver", "agent"))
        else:
            parts["chain"] = made - committed[f"stage{number - 1}"]
        yield parts


def applied(site: Site, arrivals: Arrivals, folder: Path, env: dict[str, str]) -> Times:
    """The same, by kubectl."""
    osctl = site.osctl(folder, nodes=1, devices=1, stages=1)
    job = yaml.safe_load(osctl("render", "stage1").stdout)
    (folder / "job.yaml").write_text(yaml.safe_dump(job))
    pipeline, ledger = ledger_of(osctl, env)
    [stage] = pipeline.stages
    inputs_digest, resources = identity.name(stage.config, stage.devices, None), stage.spec.resources
    ledger.create_intent(
        Intent(
            run_key=run_key(pipeline.name, stage.spec.name, inputs_digest, 1), pipeline=pipeline.name, stage=stage.spec.name,
            inputs_digest=inputs_digest,
            attempt=1, epoch=1, created=time.time(), config=stage.config, config_digest=stage.config.digest(), nodes=resources.nodes,
            devices_per_node=resources.devices_per_node, device="cpu-core", trainer=(), hang_timeout_s=stage.spec.hang_timeout_s,
            flush_s=pipeline.flush_s, parent=None, resume=None, code="",
        )
    )  # fmt: skip
    began = time.time()
    subprocess.run([KUBECTL, "-n", site.namespace, "create", "-f", folder / "job.yaml"], env=env, check=True, capture_output=True)
    made = arrivals.of("pytorchjobs", folder.name, "stage1")
    agent, torchrun = processes(site, folder.name, "stage1")
    CLUSTER.kubectl("-n", site.namespace, "delete", "-f", str(folder / "job.yaml"))
    CLUSTER.kubectl("-n", site.namespace, "delete", "pods", "-l", "osctl/role=trainer", "--grace-period=1")  # it holds the CPU
    return {
        "submit": made - began, "kubernetes: job to agent": agent - made, "agent": torchrun - agent, "job to torchrun": torchrun - made,
        "launch to torchrun": torchrun - began,
    }  # fmt: skip


def compile_modules(site: Site, folder: Path) -> None:
    """Once on a machine, not once a launch."""
    folder.mkdir()
    osctl = site.osctl(folder, nodes=1, devices=1)
    for command in ("plan", "render", "status"):
        osctl(command)


def main() -> None:
    number = int(sys.argv[1]) if len(sys.argv) > 1 else LAUNCHES
    found: dict[str, dict[str, list[float]]] = {"osctl launch": {}, "kubectl create -f": {}}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        env = environment(folder / "compiled")
        os.environ.clear()
        os.environ.update(env)
        with (
            installed(CLUSTER, folder, mlflow=False, cpu="1") as site,
            contextlib.closing(Arrivals(site.namespace)) as arrivals,
        ):
            compile_modules(site, folder / "first")
            for count in range(1, number + 1):
                (folder / f"peer-{count}").mkdir()
                (folder / f"launch-{count}").mkdir()
                rounds = [("kubectl create -f", applied(site, arrivals, folder / f"peer-{count}", env))]
                rounds += [("osctl launch", parts) for parts in launched(site, arrivals, folder / f"launch-{count}", env)]
                for way, parts in rounds:
                    for part, seconds in parts.items():
                        found[way].setdefault(part, []).append(round(seconds, 3))
    print(json.dumps(found))
    for way, measured in found.items():
        print(way)
        for part, all_s in measured.items():
            print(f"  {part:26s} median {statistics.median(all_s):6.3f} s  {min(all_s):6.3f} to {max(all_s):6.3f}  of {len(all_s)}")


if __name__ == "__main__":
    main()
