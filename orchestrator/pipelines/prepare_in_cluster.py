"""A preparation whose launcher lives in a cluster: the order is written, one Job is created, and anybody follows it through the store.

There is at most one live Job of a data set: Jobs are numbered, the next number is free only when none lives, and of two launches that take
the same number at once, the API server lets one be first. Refuses to touch a Job that no osctl has made for this store.
"""

from __future__ import annotations

import contextlib
import getpass
import itertools
import re
import shlex
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from orchestrator.errors import NotFound, Refused, Unreachable, UsageError
from orchestrator.labels import Annotation, Label
from orchestrator.pipelines import own_jobs
from orchestrator.pipelines.host import Host
from orchestrator.pipelines.workspace import Workspace

if TYPE_CHECKING:
    from opensora.dataset.prepare_config import PrepareConfig
    from orchestrator.kube.client import Api
    from orchestrator.ports import Store
    from orchestrator.prepare.records import Order
    from orchestrator.recipe.cluster_profile import ClusterProfile

Kind = Literal["jobs", "rayjobs"]
State = Literal["live", "complete", "failed"]
RAY_EXIT = re.compile(r"exit code (\d+)")
"""Of an entrypoint, in the words of Ray."""
CORE_OF_ACTOR = 0.98
"""Of the cores that a pod tells Ray: an actor for each core leaves room for the task that hands rows out, or nothing is ever worked on."""
POD_HOME = Path("/tmp/osctl")
"""Folder of local state in a pod (`orchestrator.kube.parts.env_of_osctl`)."""
POLL_S = 1.0
"""Seconds between two questions for a Job, and for a lease."""


@dataclass(frozen=True)
class There:
    """A Job or RayJob that prepares, as the API server shows it."""

    kind: Kind
    name: str
    uid: str
    number: int
    run: str
    """Value of the label of its pods."""
    order: str
    """Digest of its order."""
    state: State
    reason: str
    """Why it failed, in the cluster's words."""
    queued: bool = False
    """Whether it waits in a queue of Kueue."""

    @classmethod
    def of(cls, job: Mapping[str, Any], kind: Kind = "jobs") -> There:
        metadata, spec = job["metadata"], job["spec"]
        words = shlex.split(spec["entrypoint"]) if kind == "rayjobs" else spec["template"]["spec"]["containers"][0]["command"]
        end, reason = (_end_of_ray if kind == "rayjobs" else _end_of_job)(job)
        if metadata.get("deletionTimestamp"):
            end = "failed"
        return cls(
            kind=kind,
            name=metadata["name"],
            uid=metadata["uid"],
            number=int(metadata["annotations"][Annotation.RUN_KEY].rpartition("/")[2]),
            run=metadata["labels"][Label.RUN],
            order=next(value for option, value in itertools.pairwise(words) if option == "--order"),
            state=end,
            reason=reason,
            queued=Label.QUEUE_NAME in metadata["labels"] and bool(spec.get("suspend")),
        )


def _end_of_job(job: Mapping[str, Any]) -> tuple[State, str]:
    from orchestrator.kube.side_job import end_of

    end, conditions = end_of(job), job.get("status", {}).get("conditions", ())
    reason = next((one.get("message", "") for one in conditions if one["type"] == "Failed" and one["status"] == "True"), "")
    return "live" if end is None else "complete" if end == "Complete" else "failed", reason


def _end_of_ray(job: Mapping[str, Any]) -> tuple[State, str]:
    status = job.get("status") or {}
    word = status.get("jobDeploymentStatus", "")
    end: State = "complete" if word == "Complete" else "failed" if word in ("Failed", "ValidationFailed") else "live"
    return end, str(status.get("message") or "")


# --- What is asked for -----------------------------------------------------------------------------------


def site_of(profile: ClusterProfile) -> ClusterProfile:
    """The profile without pools: a preparation is made in the first one."""
    order = profile.order()
    return profile.in_pool(order[0] if order else None)


def order_for(config: PrepareConfig, store: Store, host: Host, profile: ClusterProfile, *, pods: int, gpus: int, **how: bool) -> Order:
    """What a pod is to prepare, with the stages of the recipe that `encode` names. Encoders that lie on this machine go into the store.

    Args:
        pods: how many pods decode, with engine ray.
        gpus: how many GPUs it gets.
        how: `replace` and `retry`, as in `orchestrator.prepare.run.Asked`.

    Raises UsageError, Refused, Unreachable.
    """
    from orchestrator.kube.prepare_job import at
    from orchestrator.prepare import order as orders
    from orchestrator.prepare.checks import check_rules
    from orchestrator.prepare.records import Order
    from orchestrator.prepare.run import DEVICE
    from orchestrator.recipe.adapt import gpu_of
    from orchestrator.recipe.cluster_profile import amount
    from orchestrator.recipe.prices import named_prices, price_of

    if not store.url.startswith("s3://"):
        raise UsageError(
            f"prepare {config.name}: store {store.url} is a folder of this machine, which no pod sees. Name a bucket: --store s3://bucket/prefix"
        )
    orders.check_seen_by_pods(config, [volume.path for volume in profile.volumes])
    check_rules(config)
    prices = named_prices(host.env)
    gpu = profile.device if profile.gpu_resource is not None else gpu_of(None, prices)
    stages: Mapping[str, Mapping[str, Any]] = {}
    parents: Mapping[str, str | None] = {}
    imports: dict[str, str] = {}
    if config.encode is not None:
        workspace = Workspace.open(config.encode, store=store.url, host=host)
        stages, parents, imports = _stages_for(workspace, POD_HOME / "prepare" / config.name / "out")
    cores = max(1, int(amount(at(profile, 0).cpu))) * (pods if config.engine == "ray" else 1)
    content = config.model_copy(update={"workers": config.workers or cores})
    if config.engine == "ray":
        on_ray: dict[str, object] = {"num_gpus": 1.0, "gpu_actors": gpus} if gpus else {}
        if config.ray.num_cpus == 1:
            on_ray["num_cpus"] = CORE_OF_ACTOR
        content = content.model_copy(update={"ray": config.ray.model_copy(update={"address": "", **on_ray})})
    own = profile.prepare.price
    core = price_of(prices, DEVICE)
    if own is not None:
        named = {"usd_per_hour": own.usd_per_hour, "basis": "published", "source": own.source, "date": own.date.isoformat()}
        core = core.model_copy(update=named) if core is not None else None
    return Order(
        name=config.name, config=content.model_dump(mode="json"), stages={name: dict(stage) for name, stage in stages.items()},
        parents=dict(parents), imports=imports, price=core, gpu=gpu, gpu_price=price_of(prices.at(profile), gpu),
        replace=how.get("replace", True), retry=how.get("retry", False),
    )  # fmt: skip


def _stages_for(workspace: Workspace, out: Path) -> tuple[dict[str, dict[str, Any]], dict[str, str | None], dict[str, str]]:
    """As `preparing.stages_for`, of a pod; and the digests of their encoders in the store."""
    from orchestrator.inputs import imports
    from orchestrator.recipe import adapt

    nowhere = workspace.of_pipeline(adapt.on_prepared(workspace.pipeline, str(out / "not-there-yet")))
    found = nowhere.with_contents(needed=False, far=False, say=lambda _: None).found
    digests: dict[str, str] = {}
    if found is not None:
        digests = {name: imports.put(workspace.store, one.imported, one.files) for (_, name), one in found.found.items()} | dict(
            found.stored
        )
    pipeline = adapt.on_prepared(workspace.pipeline, str(out))
    stages = {stage.name: stage.config.model_dump(mode="json") for stage in pipeline.stages}
    return stages, {stage.name: stage.spec.parent for stage in pipeline.stages}, digests


# --- From a person's machine -----------------------------------------------------------------------------


def connect(profile: ClusterProfile, host: Host) -> Api:
    """Close it. Raises UsageError where there is no kubeconfig."""
    from orchestrator.kube.client import Api

    return Api.connect(profile.context, profile.namespace, host.env)


def jobs_of(api: Api, store: Store, name: str) -> list[There]:
    """Of this data set in this store, by number. Raises Refused, Unreachable."""
    from orchestrator.kube import names
    from orchestrator.kube.prepare_job import ROLE

    selector = f"{names.selector(roles=(ROLE,))},{Label.DATA_SET}={names.run_hash(store.url, name)}"
    both: dict[Kind, Sequence[Mapping[str, Any]]] = {"jobs": api.list("jobs", selector)[0]}
    with contextlib.suppress(NotFound):  # a cluster without KubeRay
        both["rayjobs"] = api.list("rayjobs", selector)[0]
    found: list[There] = []
    for kind, jobs in both.items():
        look = f"kubectl -n {api.namespace} get {kind} -l {Label.ROLE}={ROLE} -o yaml"
        where = f"{name}: a Job in namespace {api.namespace} {{fact}}: nobody can say whether it prepares. Look at it: {look}"
        found += own_jobs.owned(jobs, store.url, f"prepare/{name}/", partial(There.of, kind=kind), where)
    return sorted(found, key=lambda one: one.number)


def live(found: Sequence[There]) -> There | None:
    return next((one for one in found if one.state == "live"), None)


def submit(
    api: Api, store: Store, order: Order, profile: ClusterProfile, *, pods: int, gpus: int, dry_run: bool = False, follow: bool = False
) -> tuple[There | None, bool]:
    """Write the order and create its Job: (the Job, whether it is new). Nothing of either where one lives.

    Args:
        dry_run: ask the API server whether it would take the Job, and write nothing; the Job is None.
        follow: a Job with another order is taken, too.

    Raises Refused where somebody prepares it otherwise, Unreachable.
    """
    from orchestrator.kube import names
    from orchestrator.kube.faults import AlreadyExists
    from orchestrator.prepare import order as orders

    name, digest = order.name, order.digest()[:16]
    found = jobs_of(api, store, name)
    number = max((one.number for one in found), default=0) + 1
    kind, body = rendered(order, store.url, profile, number, pods=pods, gpus=gpus)
    if dry_run:
        api.create(kind, body, dry_run=True)
        return None, False
    there = live(found)
    if there is None:
        check_nobody_else(store, name)
        orders.write(store, order)
        try:
            return There.of(api.create(kind, body), kind), True
        except AlreadyExists:
            job = api.get(kind, body["metadata"]["name"])
        if not names.is_ours(job, store.url, names.prepare_key(name, number)):
            taken = body["metadata"]["name"]
            raise Refused(
                f"prepare {name}: a Job {taken} is in namespace {api.namespace}, and no osctl has made it for {store.url}. "
                f"It was left alone; look at it with: kubectl -n {api.namespace} describe job {taken}"
            )
        there = There.of(job, kind)  # a launch at the same moment was faster, or our own first try, whose answer was lost
    if there.order != digest and not follow:
        raise Refused(
            f"prepare {name}: Job {there.name} prepares it by another order ({there.order}; this is {digest}). "
            f"Wait for its end (osctl prepare status {name}), or stop it first: osctl prepare cancel {name}"
        )
    return there, False


def rendered(order: Order, store_url: str, profile: ClusterProfile, number: int, *, pods: int, gpus: int) -> tuple[Kind, dict[str, Any]]:
    """The one object of an order, and its kind. Raises Refused where the store's URL holds credentials."""
    from orchestrator.kube.prepare_job import prepare_job
    from orchestrator.kube.ray_job import ray_job

    digest = order.digest()[:16]
    if order.config.get("engine") == "ray":
        return "rayjobs", ray_job(profile, store_url, order.name, digest, number, pods=pods, gpus=gpus)
    return "jobs", prepare_job(profile, store_url, order.name, digest, number, pods=pods, gpus=gpus)


def check_nobody_else(store: Store, name: str) -> None:
    """Raises Refused where a launcher outside of this cluster prepares it, Unreachable."""
    from orchestrator.ledger.store import Ledger
    from orchestrator.prepare.records import Keys

    holder = Ledger(store, Keys(name).folder).lenient().holder(time.time())
    if holder is not None:
        raise Refused(
            f"data set {name}: is being prepared by {holder.holder}. Look at it with: osctl prepare status {name}, "
            f"or stop it: osctl prepare cancel {name}"
        )


def wait(api: Api, store: Store, there: There, look: Callable[[], None], say: Callable[[str], None]) -> int:
    """Wait until the Job is over; its exit code. An API server or a store that is away is asked again.

    Args:
        look: is called between two questions, to show how far it is.

    Raises Refused where somebody deleted the Job.
    """
    said = ""
    while there.state == "live":
        time.sleep(POLL_S)
        try:
            there = There.of(api.get(there.kind, there.name), there.kind)
            look()
            waits = waits_for(api, there)
            words = f"{there.name}: waits: {waits}" if waits and there.state == "live" else ""
        except NotFound:
            raise Refused(f"{there.name}: somebody deleted the Job. What is done is kept; go on with the same command") from None
        except Unreachable as error:
            words = f"{error}; the Job goes on, and so does waiting for it"
        if words and words != said:
            say(words)
        said = words or said
    return exit_code(api, there)


def waits_for(api: Api, there: There) -> str:
    """Why its pods cannot start, in Kueue's or Kubernetes' words; empty: no reason is known. Raises Unreachable."""
    from orchestrator.kube import queue_look, side_job

    if there.queued:
        with contextlib.suppress(NotFound):
            if held := queue_look.why_held_now(api, api.get(there.kind, there.name), time.time()):
                return held
    return side_job.waits_for(api, there.name, f"{Label.RUN}={there.run}")


def last_words(api: Api, there: There) -> str:
    """What one that failed said last; empty: it cannot be read."""
    from orchestrator.kube import side_job

    if there.kind == "jobs":
        with contextlib.suppress(Refused, Unreachable, NotFound):
            last = _last_end(api, there)
            return side_job.last_line(api, last[2]) if last else ""
        return ""
    with contextlib.suppress(Refused, Unreachable, NotFound):
        there = There.of(api.get(there.kind, there.name), there.kind)
    lines = [line.strip() for line in there.reason.splitlines() if line.strip()]
    return lines[-1].removeprefix("error: ") if lines else ""


def exit_code(api: Api, there: There) -> int:
    """With which one that is over has ended: a Job's last pod knows, and KubeRay repeats what Ray said; else 3."""
    if there.state == "complete":
        return 0
    if there.kind == "rayjobs":
        found = RAY_EXIT.search(there.reason)
        return _known(int(found[1])) if found else 3
    with contextlib.suppress(Refused, Unreachable, NotFound):
        if last := _last_end(api, there):
            return _known(last[1])
    return 3


def _last_end(api: Api, there: There) -> tuple[str, int, str] | None:
    """(when, exit code, pod) of the pod whose end was the Job's: of several the others were asked to leave. Raises as `Api.list`."""
    from orchestrator.kube.jobs import DRIVER_EXITS

    pods, _ = api.list("pods", f"batch.kubernetes.io/job-name={there.name}")
    ends = [
        (status["state"]["terminated"].get("finishedAt") or "", int(status["state"]["terminated"]["exitCode"]), pod["metadata"]["name"])
        for pod in pods
        for status in pod.get("status", {}).get("containerStatuses", ())
        if "terminated" in status.get("state", {})
    ]
    return max([end for end in ends if end[1] in DRIVER_EXITS] or ends, default=None)


def _known(code: int) -> int:
    return code if code in (1, 2, 3, 4, 5, 130) else 3


def cancel(store: Store, name: str, api: Api | None, *, now: bool) -> str:
    """Ask whoever prepares it to save and stop, through the store. What was done, in a sentence. Raises Refused, Unreachable.

    Args:
        api: of the cluster in which a Job may be that has not begun yet; None: no cluster is asked.
        now: end without finishing the rows at hand.
    """
    from orchestrator.ledger.store import Ledger
    from orchestrator.prepare.records import Keys

    ledger = Ledger(store, Keys(name).folder).lenient()
    moment = time.time()
    detail = f"{'now, ' if now else ''}by {getpass.getuser()}@{socket.gethostname()}"
    holder = ledger.holder(moment)
    if holder is not None and ledger.ask_cancel(moment, detail):
        return f"{name}: {holder.holder} was asked to {'end now' if now else 'save and stop'}. Follow it with: osctl prepare status {name}"
    there = live(jobs_of(api, store, name)) if api is not None else None
    if api is not None and there is not None:
        api.delete(there.kind, there.name, uid=there.uid)
        return f"{name}: {there.name} held nothing yet, and was removed"
    hint = "" if api is not None else ". For one that has not begun in a cluster, name that: --cluster"
    return f"{name}: nobody prepares it, nothing to cancel{hint}"
