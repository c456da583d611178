"""A preparation inside of a cluster: what an order means in this pod, which pods are paid for, and the lease of a pod before.

Refuses to create anything in the cluster: whoever asked for it did.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.pipelines.host import Host

if TYPE_CHECKING:
    from orchestrator.ports import Store
    from orchestrator.prepare.records import Order, PodHeld
    from orchestrator.prepare.run import Asked
    from orchestrator.prepare.shards import Place

POLL_S = 1.0
"""Seconds between two questions for a lease."""


def asked_by(order: Order, store: Store, host: Host, shards: int = 1) -> Asked:
    """What an order means in this pod, one of `shards`. Encoders are brought out of the store. Raises Refused, CorruptCheckpoint,
    Unreachable."""
    from opensora.dataset.prepare_config import PrepareConfig
    from orchestrator.inputs import imports
    from orchestrator.kube.prepare_job import JOB, SELECTOR
    from orchestrator.pipelines.preparing import folder_of
    from orchestrator.prepare.order import made_of
    from orchestrator.prepare.records import Keys
    from orchestrator.prepare.run import Asked
    from orchestrator.prepare.shards import Shards

    config = PrepareConfig.model_validate(order.config)
    places = {name: str(imports.fetch(store, digest, host.imports / digest)) for name, digest in order.imports.items()}
    told = host.told_of(places)
    watch = all_pods(host.env) if SELECTOR in host.env else own_pod(host.env)
    place = place_in(host.env, shards)
    if place is not None and not place.shard:
        watch = Shards(store, Keys(order.name), place).with_others(watch)
    return Asked(
        config, order.stages, store, folder_of(host, config.name), told.env, parents=order.parents, price=order.price, gpu=order.gpu,
        gpu_price=order.gpu_price, holder=f"osctl@{socket.gethostname()}", own=(host.home,), replace=order.replace, retry=order.retry,
        where=host.env.get(JOB, ""), made_of=made_of(order), pods=watch, place=place,
    )  # fmt: skip


def place_in(env: Mapping[str, str], shards: int) -> Place | None:
    """Of this pod among those of its Indexed Job. None: it is alone. Raises Refused."""
    from orchestrator.errors import Refused
    from orchestrator.kube.prepare_job import INDEX, JOB_UID
    from orchestrator.prepare.shards import Place

    if shards == 1:
        return None
    index, job = env.get(INDEX, ""), env.get(JOB_UID, "")
    if not (index.isdigit() and int(index) < shards and job):
        raise Refused(f"--shards {shards}: {INDEX} is {index or 'not set'}, {JOB_UID} is {job or 'not set'}: no pod of an Indexed Job")
    return Place(job, int(index), shards)


def all_pods(env: Mapping[str, str]) -> Callable[[float], Sequence[PodHeld]]:
    """Says of all pods of this RayJob what they hold, as the API server shows them to its head."""
    from orchestrator.kube.client import Api
    from orchestrator.kube.prepare_job import NAMESPACE, SELECTOR

    api = Api.connect(None, env[NAMESPACE], env)

    def look(now: float) -> Sequence[PodHeld]:
        seen = (held_by(pod, now) for pod in api.list("pods", env[SELECTOR])[0])
        return [one for one in seen if one is not None]

    return look


def held_by(pod: Mapping[str, Any], now: float) -> PodHeld | None:
    """What a pod holds of its node, as the API server shows it at this Unix time. None: nothing, or nothing any more."""
    from orchestrator.kube.nodes import quantity
    from orchestrator.kube.observed import unix
    from orchestrator.prepare.records import PodHeld

    status, labels = pod.get("status", {}), pod["metadata"].get("labels", {})
    conditions = status.get("conditions", ())
    bound = next((unix(one["lastTransitionTime"]) for one in conditions if (one["type"], one["status"]) == ("PodScheduled", "True")), None)
    if bound is None or status.get("phase") in ("Succeeded", "Failed"):
        return None
    requests = pod["spec"]["containers"][0].get("resources", {}).get("requests", {})
    gpus = sum(int(value) for key, value in requests.items() if key.endswith("/gpu"))
    group = "head" if labels.get("ray.io/node-type") == "head" else str(labels.get("ray.io/group", "job"))
    cores = float(quantity(requests.get("cpu", "0")))
    return PodHeld(name=pod["metadata"]["name"], group=group, cores=cores, gpus=gpus, bound=min(bound, now), seen=now)


def own_pod(env: Mapping[str, str], since: Path | None = None) -> Callable[[float], Sequence[PodHeld]]:
    """Says of this pod what it holds, and since when: kubelet filled a folder of it as soon as it had got the pod."""
    from orchestrator.kube.prepare_job import CORES, GPUS, POD, SINCE
    from orchestrator.prepare.records import PodHeld
    from orchestrator.recipe.cluster_profile import amount

    bound = _changed(since or Path(SINCE))
    cores, gpus, name = env.get(CORES, "0"), env.get(GPUS, "0"), env.get(POD, "")

    def look(now: float) -> Sequence[PodHeld]:
        return [PodHeld(name=name, group="job", cores=float(amount(cores)), gpus=int(gpus), bound=min(bound, now), seen=now)]

    return look


def _changed(folder: Path) -> float:
    times = [os.lstat(one).st_mtime for one in _below(folder)]
    return min(times, default=time.time())


def _below(folder: Path) -> Iterator[Path]:
    with contextlib.suppress(OSError):
        yield from folder.iterdir()


def wait_for_lease(store: Store, name: str, job: str, stopped: Callable[[], bool], say: Callable[[str], None]) -> None:
    """An earlier pod of the same Job that has just died still holds the lease for some seconds. Any other holder is for the launcher to
    refuse. Raises Unreachable."""
    from orchestrator.ledger.store import Ledger
    from orchestrator.prepare.records import Keys

    ledger, said = Ledger(store, Keys(name).folder).lenient(), False
    while (holder := ledger.holder(time.time())) is not None and job and holder.host.startswith(f"{job}-") and not stopped():
        if not said:
            say(f"{name}: waits for the lease of {holder.holder}, which is gone or about to be")
        said = True
        time.sleep(POLL_S)
