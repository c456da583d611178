"""How soon a change in the cluster is seen in `osctl watch`, and what watching 1,000 jobs costs; beside `kubectl get -w` in the same run.

On the API server of the test cluster (tests/cluster/up). Pods are ours by their labels, and no scheduler takes them up, so their status is
what this program writes.

- Late: from before a pod's status is sent to the API server, until the new phase is read from the watcher's output: from a pipe, and from a
  terminal. Goal: 0.2 s.
- Cost: JOBS suspended jobs of one kind and as many pods, RATE of each changing every second: share of one core of a process that holds a
  picture of them all. Goal: 5%.

    PYTHONPATH=tests .venv/bin/python bench/watch.py [jobs] [pytorchjob|trainjob]
"""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import json
import multiprocessing
import os
import pty
import random
import resource
import statistics
import struct
import subprocess
import sys
import tempfile
import termios
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psutil
import tiny_recipe
from shared_cluster import CLUSTER, S3, environment, namespace, peer
from tiny_attempts import CONFIG, PROFILE

from opensora import identity
from orchestrator.errors import Unreachable
from orchestrator.kube import names, operator
from orchestrator.kube.attempt_objects import AttemptObjects
from orchestrator.kube.client import Api
from orchestrator.kube.names import selector
from orchestrator.kube.operator import Operator
from orchestrator.kube.parts import Manifest
from orchestrator.kube.watch import Watcher
from orchestrator.labels import Label
from orchestrator.ledger.keys import run_key
from orchestrator.ledger.records import Intent
from orchestrator.ledger.store import Ledger
from orchestrator.recipe import resolve
from orchestrator.recipe.cluster_profile import ClusterProfile
from orchestrator.stores import open_store

CHANGES, GAP_S = 20, (0.5, 1.5)
JOBS, RATE, SECONDS = 1000, 5, 30
PATIENCE_S = 20.0


def intended(pipeline: str, stage: str, inputs_digest: str, number: int, **changes: Any) -> Intent:
    content = {
        "run_key": run_key(pipeline, stage, inputs_digest, number), "pipeline": pipeline, "stage": stage, "inputs": inputs_digest,
        "attempt": number,
        "epoch": 1, "created": time.time(), "config": CONFIG, "config_digest": CONFIG.digest(), "nodes": 1, "devices_per_node": 2,
        "device": "cpu-core", "trainer": (), "hang_timeout_s": 60, "flush_s": 1, "parent": None, "resume": None, "code": "",
    }  # fmt: skip
    return Intent.model_validate(content | changes)


def suspended(job: Manifest) -> Manifest:
    if job["kind"] == "TrainJob":
        return {**job, "spec": {**job["spec"], "suspend": True}}
    return {**job, "spec": {**job["spec"], "runPolicy": {**job["spec"]["runPolicy"], "suspend": True}}}


def pod_of(kind: Operator, objects: list[Manifest]) -> Manifest:
    """The first pod of an attempt, for a scheduler that does not exist."""
    pod = kind.pods(objects)[0]
    about = {**pod["metadata"], "name": f"{objects[-1]['metadata']['name']}-worker-0"}
    about["labels"] = {**about["labels"], Label.REPLICA_INDEX: "0"}
    spec = {key: value for key, value in pod["spec"].items() if key != "priorityClassName"} | {"schedulerName": "nobody"}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": about, "spec": spec}


def set_phase(api: Api, pod: str, phase: str) -> None:
    api._ask("PATCH", f"{api._path('pods', pod)}/status", {}, {"status": {"phase": phase}})


# --- Late ------------------------------------------------------------------------------------------------------------------------------


class Seen:
    """When a watcher's output first showed a phase, since it was last asked."""

    def __init__(self, read: Callable[[], str]) -> None:
        self._read, self._text, self._lock = read, "", threading.Condition()
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        with contextlib.suppress(OSError):  # a terminal whose process has ended
            while text := self._read():
                now = time.monotonic()
                with self._lock:
                    self._text, self._at = self._text + text, now
                    self._lock.notify_all()

    def forget(self) -> None:
        with self._lock:
            self._text = ""

    def phase(self, phase: str) -> float:
        """On the monotonic clock."""
        with self._lock:
            if not self._lock.wait_for(lambda: phase in self._text, PATIENCE_S):
                raise SystemExit(f"not shown in {PATIENCE_S:g} s: {phase}; there is: {self._text[-500:]}")
            return self._at


@contextlib.contextmanager
def watchers(folder: Path, ns: str, run: str, env: dict[str, str]) -> Iterator[dict[str, Seen]]:
    command = [tiny_recipe.OSCTL, "watch"]
    piped = subprocess.Popen(command, cwd=folder, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 50, 200, 0, 0))
    shown = subprocess.Popen(command, cwd=folder, env=env | {"TERM": "xterm"}, stdin=slave, stdout=slave, stderr=slave)
    os.close(slave)
    theirs = peer(ns, "get", "pods", "-w", "--no-headers", "-l", f"{Label.RUN}={run}", env=env)
    assert piped.stderr is not None and theirs.stdout is not None
    lines, rows = piped.stderr, theirs.stdout
    try:
        yield {
            "osctl watch, to a pipe": Seen(lambda: lines.readline().decode()),
            "osctl watch, on a terminal": Seen(lambda: os.read(master, 65536).decode(errors="replace")),
            "kubectl get pods -w": Seen(rows.readline),
        }
    finally:
        for process in (piped, shown, theirs):
            process.terminate()
            process.wait()


def late(ns: str, folder: Path, env: dict[str, str], kind: Operator) -> dict[str, list[float]]:
    """Seconds, by watcher."""
    profile = PROFILE.model_copy(update={"namespace": ns, "s3_endpoint": S3["OSCTL_S3_ENDPOINT"]})
    (folder / "cluster.yaml").write_text(json.dumps(profile.model_dump(mode="json")))
    where: dict[str, Any] = {"backend": "kubernetes", "cluster": "cluster.yaml", "store": f"s3://{CLUSTER.bucket}/{ns}", "name": "late"}
    tiny_recipe.write(folder, stages=1, **where)
    pipeline = resolve.load(folder / "osctl.yaml", env=env)
    stage, ledger = pipeline.stages[0], Ledger(open_store(pipeline.store), pipeline.name)
    ledger.add_revision(pipeline.model_dump(mode="json"), time.time())
    held = ledger.acquire(time.time(), ttl_s=600)
    ledger.append_event(held, "launched", now=time.time())
    inputs_digest = identity.name(stage.config, stage.devices, None)
    intent = ledger.create_intent(
        intended("late", stage.spec.name, inputs_digest, 1, config=stage.config, config_digest=stage.config.digest(), epoch=held.epoch)
    )
    pod = pod_of(kind, kind.objects(intent, profile, pipeline.store))
    api = Api.connect(None, ns)
    api.create("pods", pod)
    name, run = pod["metadata"]["name"], names.run_hash(pipeline.store, intent.run_key)
    found: dict[str, list[float]] = {}
    with contextlib.closing(api), watchers(folder, ns, run, env) as seen:
        for one in seen.values():
            one.phase("Pending")
        for _, phase in zip(range(CHANGES), itertools.cycle(("Running", "Pending")), strict=False):
            time.sleep(random.uniform(*GAP_S))
            for one in seen.values():
                one.forget()
            sent = time.monotonic()
            set_phase(api, name, phase)
            found.setdefault("the API server's own answer", []).append(time.monotonic() - sent)
            for watcher, one in seen.items():
                found.setdefault(watcher, []).append(one.phase(phase) - sent)
    held.release()
    return found


# --- Cost ------------------------------------------------------------------------------------------------------------------------------


def hold(pipe: Connection, ns: str, kind: Operator) -> None:
    """The process that is measured: nothing but a picture."""
    api = Api.connect(None, ns)
    seen = 0

    def saw() -> None:
        nonlocal seen
        seen += 1

    watcher = Watcher(api, selector(), saw)
    began = time.process_time()
    watcher.start()
    assert watcher.wait_until_fresh(120)
    time.sleep(1)
    pipe.send(time.process_time() - began)
    pipe.recv()
    began, before, started = time.process_time(), seen, time.monotonic()
    pipe.recv()
    share = (time.process_time() - began) / (time.monotonic() - started)
    pipe.send((share, seen - before, len(watcher.cache.names(kind.plural)), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024))
    watcher.close()
    api.close()


def fill(api: Api, ns: str, number: int, kind: Operator) -> list[tuple[str, str, str]]:
    """(name and uid of a job, name of its pod), each."""
    profile: ClusterProfile = PROFILE.model_copy(update={"namespace": ns})
    store = f"s3://{CLUSTER.bucket}/{ns}"

    def make(count: int) -> tuple[str, str, str]:
        intent = intended("many", "one", "0a1b2c3d4e5f", count)
        *beside, job = objects = kind.objects(intent, profile, store)
        while True:
            try:
                _, there = AttemptObjects(api, store, lambda: operator.OPERATORS).create(kind, [*beside, suspended(job)], intent.run_key)
                break
            except Unreachable:  # Trainer's webhook has not seen the runtime yet; a driver submits again too
                time.sleep(0.5)
        made = there["metadata"]
        return made["name"], made["uid"], api.create("pods", pod_of(kind, objects))["metadata"]["name"]

    with ThreadPoolExecutor(8) as pool:
        return list(pool.map(make, range(1, number + 1)))


def change(api: Api, made: list[tuple[str, str, str]], over: threading.Event, plural: str) -> None:
    """RATE jobs and RATE pods every second."""
    began = time.monotonic()
    for count in itertools.count():
        if over.wait(max(0.0, began + count / RATE - time.monotonic())):
            return
        name, uid, pod = made[count % len(made)]
        api.patch(plural, name, {"metadata": {"annotations": {"bench": str(count)}}}, uid=uid)
        set_phase(api, pod, ("Running", "Pending")[count // len(made) % 2])


def cost(ns: str, env: dict[str, str], jobs: int, kind: Operator) -> dict[str, Any]:
    api = Api.connect(None, ns)
    began = time.monotonic()
    made = fill(api, ns, jobs, kind)
    filled = time.monotonic() - began
    time.sleep(5)  # the operator has its say
    ours, child = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=hold, args=(child, ns, kind))
    process.start()
    listed = ours.recv()
    theirs = {plural: peer(ns, "get", plural, "-w", env=env) for plural in (kind.plural, "pods")}
    for one in theirs.values():
        threading.Thread(target=lambda out=one.stdout: [None for _ in out], daemon=True).start()
    time.sleep(5)
    over = threading.Event()
    changer = threading.Thread(target=change, args=(api, made, over, kind.plural))
    before = {plural: sum(psutil.Process(one.pid).cpu_times()[:2]) for plural, one in theirs.items()}
    ours.send("begin")
    began = time.monotonic()
    changer.start()
    time.sleep(SECONDS)
    ours.send("end")
    share, seen, known, memory = ours.recv()
    wall = time.monotonic() - began
    shares = {plural: (sum(psutil.Process(one.pid).cpu_times()[:2]) - before[plural]) / wall for plural, one in theirs.items()}
    over.set()
    changer.join()
    for one in theirs.values():
        one.terminate()
        one.wait()
    process.join()
    api.close()
    return {
        "kind": kind.name, "jobs": known, "pods": len(made), "created_in_s": round(filled, 1),
        "changes_a_second": 2 * RATE, "seconds": SECONDS,
        "osctl_core_share": round(share, 4), "osctl_changes_seen": seen, "osctl_list_cpu_s": round(listed, 3), "osctl_max_rss_mb": memory,
        "kubectl_core_share": {plural: round(one, 4) for plural, one in shares.items()},
    }  # fmt: skip


def main() -> None:
    jobs = int(sys.argv[1]) if len(sys.argv) > 1 else JOBS
    kind = operator.BY_NAME[sys.argv[2] if len(sys.argv) > 2 else "pytorchjob"]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        env = environment(folder / "compiled")
        os.environ.clear()
        os.environ.update(env)
        with namespace() as ns:
            for watcher, seconds in late(ns, folder, env, kind).items():
                ms = [1000 * one for one in seconds]
                print(f"{watcher:28s} median {statistics.median(ms):6.1f} ms  max {max(ms):6.1f} ms  of {len(ms)}", flush=True)
        with namespace() as ns:
            print(json.dumps(cost(ns, env, jobs, kind)))


if __name__ == "__main__":
    main()
