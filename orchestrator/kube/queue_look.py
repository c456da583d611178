"""One look at what Kueue says of a Job or a RayJob that it holds back: for whoever asks now and then, and watches nothing.

Owns these requests. Refuses to keep anything (`queue_watch` does), and to say what it means (`kueue`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

from orchestrator.errors import NotFound, Refused
from orchestrator.kube.client import Api
from orchestrator.kube.kueue import Held, Queue, Workload, why_held
from orchestrator.kube.observed import Job, unix
from orchestrator.labels import Label


def why_held_now(api: Api, job: Mapping[str, Any], now: float) -> str:
    """Why Kueue holds a job back, in a sentence. Empty: it does not. Raises Unreachable.

    Args:
        job: a Job or a RayJob, as the API server shows it.
        now: Unix time.
    """
    metadata = job["metadata"]
    queue = metadata.get("labels", {}).get(Label.QUEUE_NAME)
    if queue is None or not job["spec"].get("suspend"):
        return ""
    held = Held(watched=False)
    with contextlib.suppress(Refused, NotFound):  # without the right, or without Kueue, nothing follows
        found = api.list("workloads", f"{Label.JOB_UID}={metadata['uid']}")[0]
        workload = Workload.read(found[0], now) if found else None
        held = Held(workload, _queue(api, queue, now), watched=True)
    created = unix(metadata["creationTimestamp"], now)
    waits = Job(
        name=metadata["name"], uid=metadata["uid"], owner=None, created=created, pods=1, conditions=frozenset(), has_run=False,
        suspended=True, asked=False, queue=queue,
    )  # fmt: skip
    return why_held(waits, held, now).words


def _queue(api: Api, name: str, now: float) -> Queue | None:
    try:
        local = api.get("localqueues", name)
    except NotFound:
        return Queue(name, gone=True)
    except Refused:
        return None
    cluster = None
    with contextlib.suppress(Refused, NotFound):  # outside of the namespace: mostly not this account's to read
        cluster = api.get("clusterqueues", str(local.get("spec", {}).get("clusterQueue")))
    return Queue.read(local, cluster, now)
