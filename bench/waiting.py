"""What it costs to watch 200 pipelines that wait in one queue of a real Kueue. Limit: 5% of a core.

"Watched" is what one person who looks at all of them runs: one process with one watch of jobs, pods and events and one of Kueue's
Workloads, that says of each of the 200 once a second why it waits and at which place. Beside it the same with each asked ten times a
second, as often as its own driver would ask.

The quota is held by one job, whose pods no node takes. Every CHANGE_S seconds the first of the queue is deleted and created again
at its end, so that Kueue looks at the queue again and all places change. CPU-seconds of the process, in share of a core; the memory is its
peak. On the API server and the Kueue of the test cluster (tests/cluster/up).

    PYTHONPATH=tests .venv/bin/python bench/waiting.py [pipelines] [pytorchjob|trainjob]
"""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import sys
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from cluster.kueue_rig import queues
from shared_cluster import CLUSTER, environment, namespace
from tiny_attempts import CONFIG, PROFILE

from orchestrator.errors import Unreachable
from orchestrator.kube import operator
from orchestrator.kube.attempt_objects import AttemptObjects
from orchestrator.kube.backend import KubeBackend
from orchestrator.kube.client import Api
from orchestrator.kube.operator import Operator
from orchestrator.ledger.keys import run_key
from orchestrator.ledger.records import Intent
from orchestrator.recipe.cluster_profile import ClusterProfile
from orchestrator.stores.folder import FolderStore

PIPELINES, SECONDS, CHANGE_S = 200, 60.0, 5.0
STORE = "s3://bench/runs"
RATES = (1.0, 10.0)
"""How often a second each pipeline is asked about."""


def profile_of(ns: str) -> ClusterProfile:
    """Each asks for the whole quota of cores, and for a node that is nowhere."""
    return PROFILE.model_copy(update={"namespace": ns, "queue": "kueue", "kueue_queue": "train", "cpu": "8"})


def intended(number: int) -> Intent:
    name = f"many-{number}"
    content: dict[str, Any] = {
        "run_key": run_key(name, "one", "0a1b2c3d4e5f", 1), "pipeline": name, "stage": "one", "inputs": "0a1b2c3d4e5f", "attempt": 1,
        "epoch": 1, "created": time.time(), "config": CONFIG, "config_digest": CONFIG.digest(), "nodes": 1, "devices_per_node": 2,
        "device": "cpu-core", "trainer": (), "hang_timeout_s": 60, "flush_s": 1, "parent": None, "resume": None, "code": "",
    }  # fmt: skip
    return Intent.model_validate(content)


def create(api: Api, kind: Operator, profile: ClusterProfile, number: int) -> tuple[int, str, str]:
    """A pipeline's job: number of the pipeline, name and uid."""
    intent = intended(number)
    objects = kind.objects(intent, profile, STORE)
    while True:
        try:
            _, made = AttemptObjects(api, STORE, lambda: operator.OPERATORS).create(kind, objects, intent.run_key)
        except Unreachable:  # as a driver would: it submits again
            time.sleep(0.5)
            continue
        return number, made["metadata"]["name"], made["metadata"]["uid"]


def hold(pipe: Connection, ns: str, number: int) -> None:
    """The process that is measured."""
    keys = [intended(each).run_key for each in range(1, number + 1)]
    with tempfile.TemporaryDirectory() as folder:
        api = Api.connect(None, ns)
        backend = KubeBackend(FolderStore(Path(folder)), api, profile_of(ns), STORE)
        begun = time.process_time()
        known: set[str] = set()
        while len(known) < number:
            known |= {key for key in keys if f" of {number} in queue train" in backend.observe(key).waits}
            time.sleep(0.5)
        pipe.send(time.process_time() - begun)
        for rate in RATES:
            pipe.recv()
            began, started, asked, said = time.process_time(), time.monotonic(), 0, Counter[str]()
            while not pipe.poll():
                lives = [backend.observe(key) for key in keys]
                asked += 1
                said = Counter(f"{life.waits_on}, place {'said' if ' in queue train' in life.waits else 'not said'}" for life in lives)
                time.sleep(max(0.0, started + asked / rate - time.monotonic()))
            pipe.recv()
            share = (time.process_time() - began) / (time.monotonic() - started)
            pipe.send((share, asked, dict(said), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024))
        backend.close()


def churn(api: Api, kind: Operator, profile: ClusterProfile, waiting: list[tuple[int, str, str]], over: threading.Event) -> None:
    """The first of the queue goes to its end."""
    while not over.wait(CHANGE_S):
        number, name, uid = waiting.pop(0)
        api.delete(kind.plural, name, uid=uid)
        waiting.append(create(api, kind, profile, number))


def measure(ns: str, kind: Operator, number: int) -> dict[str, Any]:
    api, profile = Api.connect(None, ns), profile_of(ns)
    create(api, kind, profile, 0)
    began = time.monotonic()
    with ThreadPoolExecutor(8) as pool:
        waiting = list(pool.map(lambda each: create(api, kind, profile, each), range(1, number + 1)))
    found: dict[str, Any] = {"kind": kind.name, "pipelines": number, "created_in_s": round(time.monotonic() - began, 1)}
    ours, child = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=hold, args=(child, ns, number))
    process.start()
    found["first_look_cpu_s"] = round(ours.recv(), 2)
    for rate in RATES:
        over = threading.Event()
        changer = threading.Thread(target=churn, args=(api, kind, profile, waiting, over))
        changer.start()
        ours.send("begin")
        time.sleep(SECONDS)
        ours.send("end")
        share, asked, said, memory = ours.recv()
        over.set()
        changer.join()
        found[f"asked_{rate:g}_times_a_second"] = {"core_share": round(share, 4), "rounds": asked, "said": said, "max_rss_mb": memory}
    process.join()
    api.close()
    return found


def main() -> None:
    number = int(sys.argv[1]) if len(sys.argv) > 1 else PIPELINES
    kind = next(one for one in operator.OPERATORS if one.name == (sys.argv[2] if len(sys.argv) > 2 else "pytorchjob"))
    with tempfile.TemporaryDirectory() as temporary:
        env = environment(Path(temporary) / "compiled")
        os.environ.clear()
        os.environ.update(env)
        with namespace() as ns, queues(CLUSTER.kubectl, ns, {"bench": ns}) as kueue:
            kueue.open("train", gpus=0, cpu="8")
            print(json.dumps(measure(ns, kind, number)))


if __name__ == "__main__":
    main()
