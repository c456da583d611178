"""What it costs to watch 1,000 jobs of two pods each, and how soon a change is seen: share of one core, milliseconds, memory.

The API server is the tests' small one, in a process of its own; every second 20 pods of it change. Goals: below 5% of a core, below 0.2 s.

    PYTHONPATH=tests .venv/bin/python bench/watch.py
"""

from __future__ import annotations

import json
import multiprocessing
import resource
import statistics
import time
from multiprocessing.connection import Connection
from typing import Any

import httpx2
from fake_api_server import serve
from tiny_attempts import CONFIG, PROFILE

from orchestrator import manifest
from orchestrator.adapters.kube.api import Api
from orchestrator.adapters.kube.watch import Watcher, selector
from orchestrator.records import Intent, run_key

JOBS, CHANGES_A_SECOND, SECONDS = 1000, 20, 20
STORE = "s3://bucket/prefix"
PLACE = "/apis/kubeflow.org/v1/namespaces/osctl/pytorchjobs"
PODS = "/api/v1/namespaces/osctl/pods"


def job(number: int) -> manifest.Manifest:
    intent = Intent(
        run_key=run_key("demo", "one", "0a1b2c3d4e5f", number), pipeline="demo", stage="one", inputs="0a1b2c3d4e5f", attempt=number,
        epoch=1, created=0.0, config=CONFIG, config_digest="", nodes=2, devices_per_node=8, device="h800", trainer=(), hang_timeout_s=60,
        flush_s=1, parent=None, resume=None, code="",
    )  # fmt: skip
    return manifest.pytorch_job(intent, PROFILE, STORE)


def pod(of: manifest.Manifest, index: int, at: float) -> manifest.Manifest:
    template = of["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]
    labels = {**template["metadata"]["labels"], manifest.NODE_LABEL: str(index)}
    condition = {"type": "PodScheduled", "status": "True", "lastTransitionTime": "2026-11-23T10:00:00Z", "message": repr(at)}
    return {
        "metadata": {"name": f"{of['metadata']['name']}-worker-{index}", "labels": labels},
        "spec": {**template["spec"], "nodeName": "n"},
        "status": {"phase": "Running", "conditions": [condition]},
    }


def play(pipe: Connection) -> None:
    """The server: fills itself, says where it is, and then changes until it is told to end."""
    with serve() as server:
        jobs = [job(number) for number in range(1, JOBS + 1)]
        for one in jobs:
            server.put(f"{PLACE}/{one['metadata']['name']}", one)
            for index in (0, 1):
                made = pod(one, index, 0.0)
                server.put(f"{PODS}/{made['metadata']['name']}", made)
        server.changes.clear()
        pipe.send(server.url)
        number = 0
        while not pipe.poll(1 / CHANGES_A_SECOND):
            number += 1
            made = pod(jobs[number % JOBS], number % 2, time.time())
            server.put(f"{PODS}/{made['metadata']['name']}", made)


def main() -> None:
    ours, theirs = multiprocessing.Pipe()
    server = multiprocessing.Process(target=play, args=(theirs,))
    server.start()
    url: str = ours.recv()
    api = Api(httpx2.Client(base_url=url, timeout=30, trust_env=False), "osctl", url)
    watcher = Watcher(api, selector())
    late: list[float] = []
    saw = watcher.picture.saw

    def timed(kind: str, thing: dict[str, Any]) -> None:
        saw(kind, thing)
        if kind == "pods" and (sent := float(thing["status"]["conditions"][0]["message"])):
            late.append(time.time() - sent)

    watcher.picture.saw = timed  # type: ignore[method-assign]
    began = time.process_time()
    watcher.start()
    assert watcher.wait_until_fresh(60)
    listed = time.process_time() - began
    late.clear()
    began, started = time.process_time(), time.monotonic()
    time.sleep(SECONDS)
    cpu, wall = time.process_time() - began, time.monotonic() - started
    ours.send("end")
    watcher.close()
    api.close()
    server.join()
    result = {
        "jobs": JOBS,
        "changes_seen": len(late),
        "list_cpu_s": round(listed, 3),
        "core_share": round(cpu / wall, 4),
        "seen_after_ms_median": round(1000 * statistics.median(late), 1),
        "seen_after_ms_max": round(1000 * max(late), 1),
        "max_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
