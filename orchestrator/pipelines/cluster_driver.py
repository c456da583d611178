"""A launch whose driver lives in the cluster: find the driver that is there, or make one; wait for it; stop it.

There is at most one live driver of a pipeline: Jobs are numbered, the next number is free only when none lives, and of two launches
that take the same number at once, the API server lets one be first. Refuses to touch a Job that no osctl has made for this store.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import TYPE_CHECKING, Any, Literal

from orchestrator.errors import NotFound, Refused, Unreachable, UsageError
from orchestrator.labels import Annotation, Label
from orchestrator.pipelines import own_jobs
from orchestrator.recipe import launched

if TYPE_CHECKING:
    from orchestrator.kube.client import Api
    from orchestrator.ledger.records import Lease, Revision
    from orchestrator.ledger.store import Ledger
    from orchestrator.pipelines.changes import Decisions
    from orchestrator.pipelines.workspace import Workspace
    from orchestrator.prepare.records import Order
    from orchestrator.recipe.cluster_profile import ClusterProfile

POLL_S = 1.0
"""Seconds between two questions for a driver's Job."""


@dataclass(frozen=True)
class Driver:
    """A driver's Job, as the API server shows it."""

    name: str
    uid: str
    number: int
    """Of the launch."""
    revision: int
    targets: tuple[str, ...]
    """Stages; empty: all."""
    created: float
    """Unix time."""
    state: Literal["live", "complete", "failed"]
    reason: str
    """Why it failed, in the cluster's words."""
    queue: str
    """The queue of Kueue in which its Job waits; empty: in none."""

    @classmethod
    def of(cls, job: Mapping[str, Any]) -> Driver:
        from orchestrator.kube.observed import unix

        metadata, words = job["metadata"], job["spec"]["template"]["spec"]["containers"][0]["command"]
        options = list(itertools.pairwise(words))
        met = {
            condition["type"]: condition.get("message", "")
            for condition in job.get("status", {}).get("conditions", ())
            if condition["status"] == "True"
        }
        return cls(
            name=metadata["name"],
            uid=metadata["uid"],
            number=int(metadata["annotations"][Annotation.RUN_KEY].rpartition("/")[2]),
            revision=int(next(value for option, value in options if option == "--revision")),
            targets=tuple(value for option, value in options if option == "--target"),
            created=unix(metadata["creationTimestamp"]),
            state="failed" if "Failed" in met or metadata.get("deletionTimestamp") else "complete" if "Complete" in met else "live",
            reason=met.get("Failed", "somebody deleted it" if metadata.get("deletionTimestamp") else ""),
            queue=metadata["labels"].get(Label.QUEUE_NAME, "") if job["spec"].get("suspend") else "",
        )


def profile_of(workspace: Workspace) -> ClusterProfile:
    profile = workspace.pipeline.cluster
    assert profile is not None, f"{workspace.pipeline.name}: backend kubernetes is resolved with a cluster"
    return profile


def connect(workspace: Workspace) -> Api:
    """Close it. Raises UsageError where there is no kubeconfig."""
    from orchestrator.kube.client import Api

    profile = profile_of(workspace)
    return Api.connect(profile.context, profile.namespace, workspace.host.env)


def drivers(api: Api, workspace: Workspace) -> list[Driver]:
    """Of this pipeline in this store, by number. Raises Refused, Unreachable."""
    from orchestrator.kube import names

    name, store = workspace.pipeline.name, workspace.store_url
    jobs, _ = api.list("jobs", names.selector(name, ("driver",)))
    look = f"kubectl -n {api.namespace} get jobs -l {Label.PIPELINE}={name},{Label.ROLE}=driver -o yaml"
    where = f"{name}: a driver's Job in namespace {api.namespace} {{fact}}: nobody can say whether a driver lives. Look at it: {look}"
    found = own_jobs.owned(jobs, store, f"{name}/driver/", Driver.of, where)
    return sorted(found, key=lambda driver: driver.number)


def live(found: Sequence[Driver]) -> Driver | None:
    return next((driver for driver in found if driver.state == "live"), None)


def check_store(workspace: Workspace) -> None:
    """Raises UsageError where pods would not see what this process sees."""
    if not workspace.store_url.startswith("s3://"):
        raise UsageError(
            f"launch {workspace.pipeline.name}: store {workspace.store_url} is a folder of this machine, which no pod sees. "
            "Name a bucket: --store s3://bucket/prefix"
        )


def find_or_submit(
    api: Api,
    workspace: Workspace,
    targets: Sequence[str],
    decisions: Decisions,
    say: Callable[[str], None],
    *,
    attach: bool,
    order: Order | None = None,
) -> Driver | None:
    """The live driver, if it does what is asked for, else a new one. None: every stage that was asked for is committed.

    Args:
        attach: a live driver is taken whatever it does.
        order: what the driver has prepared first; None: nothing.

    Raises Refused, Unreachable; nothing was done then.
    """
    from orchestrator.kube.image_check import refuse_old_image
    from orchestrator.pipelines import changes
    from orchestrator.pipelines.prepare_first import check_decisions

    pipeline = workspace.pipeline
    found = drivers(api, workspace)  # first of all: with the cluster away, the store is not written to
    driver, new = live(found), False
    if driver is None:
        workspace.store.probe()
        launched.check_ours(workspace.ledger)
        if order is None:
            changes.settle(workspace, targets, decisions, say)
        else:
            check_decisions(pipeline.name, decisions)
        if nothing_left(workspace, targets, say, clips_known=order is None):
            return None
        refuse_old_image(api, pipeline, workspace.store_url, targets, say)
        driver, new = submit(api, workspace, targets, found, order)
    if new:
        first = f"; it has {order.name} prepared first" if order is not None else ""
        say(f"{pipeline.name}: launched, driven by Job {driver.name} in namespace {api.namespace}{first}")
        if pipeline.tracking.startswith("sqlite"):
            say("MLflow: its database lies on this machine, which the driver does not reach; fill it with: osctl sync")
    else:
        check_same(driver, workspace, None if attach else targets)
        say(f"{pipeline.name}: Job {driver.name} drives it already; nothing was done twice")
    return driver


def submit(
    api: Api, workspace: Workspace, targets: Sequence[str], found: Sequence[Driver], order: Order | None = None
) -> tuple[Driver, bool]:
    """Write the revision, and what is prepared first, and create the driver's Job: (driver, whether it is new). Nothing of it where
    another one drives.

    Raises Refused, Unreachable.
    """
    from orchestrator.kube import names
    from orchestrator.kube.faults import AlreadyExists
    from orchestrator.kube.jobs import driver_job
    from orchestrator.prepare import order as orders

    ledger, pipeline, now = workspace.ledger, workspace.pipeline, time.time()
    holder = ledger.holder(now)
    if holder is not None and not drives_in_cluster(holder, pipeline.name, workspace.store_url):
        raise Refused(
            f"launch {pipeline.name}: is driven by {holder.holder}, not in the cluster. "
            "Follow it with `osctl watch`, or stop it: osctl cancel"
        )
    _drop_old_cancels(ledger, now)
    workspace.keep_contents()
    digest = orders.write(workspace.store, order) if order is not None else ""
    revision = ledger.add_revision(pipeline.model_dump(mode="json"), now)
    number = max((driver.number for driver in found), default=0) + 1
    body = driver_job(pipeline, workspace.store_url, revision, number, targets, digest)
    name = body["metadata"]["name"]
    try:
        return Driver.of(api.create("jobs", body)), True
    except AlreadyExists:
        there = api.get("jobs", name)
    if not names.is_ours(there, workspace.store_url, names.driver_key(pipeline.name, number)):
        raise Refused(
            f"launch {pipeline.name}: a Job {name} is in namespace {api.namespace}, and no osctl has made it for {workspace.store_url}. "
            f"It was left alone; look at it with: kubectl -n {api.namespace} describe job {name}"
        )
    return Driver.of(there), False  # a launch at the same moment was faster, or our own first try, whose answer was lost


def _drop_old_cancels(ledger: Ledger, now: float) -> None:
    """A cancel that was left for a driver which never came is not for the one that is launched now: its epoch is used up.

    Raises Refused where somebody holds the lease.
    """
    lease = ledger.lease()
    epoch = lease.epoch if lease is not None else 0
    if any(event.kind == "cancel" and event.epoch > epoch for event in ledger.events()):
        ledger.acquire(now).release()


def check_same(driver: Driver, workspace: Workspace, targets: Sequence[str] | None) -> None:
    """Whether a live driver does what is asked for. `targets` None: whatever it was given. Raises Refused."""
    name = workspace.pipeline.name
    revision = workspace.ledger.revision(driver.revision)
    if revision is None or not _drives(revision, workspace):
        fact = f"launch {name}: {driver.name} drives revision {driver.revision}, and this configuration is another one"
        fact += " (what differs: osctl diff)"
    elif targets is not None and set(targets) != set(driver.targets):
        asked, given = ", ".join(targets) or "all stages", ", ".join(driver.targets) or "all stages"
        fact = f"launch {name}: {driver.name} drives {given}, and {asked} was asked for"
    else:
        return
    raise Refused(f"{fact}. Wait for its end (osctl watch), or stop it first: osctl cancel")


def _drives(revision: Revision, workspace: Workspace) -> bool:
    """Whether it is what is asked for; of clips that are made first, whichever version."""
    from orchestrator.pipelines import preparing

    if revision.pipeline == workspace.pipeline.model_dump(mode="json"):
        return True
    there = launched.read(revision) if workspace.pipeline.prepare is not None else None
    return there is not None and preparing.alike(there, workspace.pipeline)


def check_none(api: Api, workspace: Workspace) -> None:
    """Raises Refused where a driver lives in the cluster: a pipeline has one."""
    driver = live(drivers(api, workspace))
    if driver is not None:
        raise Refused(
            f"launch {workspace.pipeline.name}: Job {driver.name} drives it in the cluster. "
            "Follow that with `osctl watch`, or stop it: osctl cancel"
        )


def nothing_left(workspace: Workspace, targets: Sequence[str], say: Callable[[str], None], *, clips_known: bool = True) -> bool:
    """Whether all that is asked for is committed. What is not is planned, and its cost held against the budget.

    Args:
        clips_known: False: clips are still to be made, and which stages are committed is for the driver to find out.

    Raises Refused beyond the budget, and for a stage whose parent is neither committed nor asked for.
    """
    from orchestrator.accounting.plan import check_budget
    from orchestrator.driver.decide import parentless
    from orchestrator.pipelines.find import say_remarks, snapshot
    from orchestrator.pipelines.plans import plan_of

    pipeline = workspace.pipeline
    known = snapshot(workspace) if workspace.ledger.latest_revision() is not None else None
    say_remarks(known.remarks if known else (), say)
    committed = {stage.name for stage in known.stages if stage.state == "committed"} if known else set()
    wanted = set(targets) or {stage.name for stage in pipeline.stages}
    for stage in pipeline.stages if clips_known else ():
        if stage.name in wanted and stage.spec.parent is not None and stage.spec.parent not in wanted | committed:
            raise Refused(parentless(stage))
    estimate = plan_of(workspace, committed=known, target=targets[0] if targets else None)
    check_budget(estimate, pipeline.budget_usd, known.usd if known else Decimal(0))
    return wanted <= committed


def cancel_coming(api: Api, workspace: Workspace, detail: str) -> str:
    """Stop a driver that holds no lease yet; what was done. One that has not begun is removed, one that takes over finds the request."""
    name, ledger = workspace.pipeline.name, workspace.ledger
    driver = live(drivers(api, workspace))
    if driver is None:
        return f"{name}: nobody drives it, nothing to cancel"
    left = [f"{stage} attempt {number}" for stage, inputs_digest in ledger.stages() for number in ledger.attempts(stage, inputs_digest)
            if ledger.outcome(stage, inputs_digest, number) is None]  # fmt: skip
    left += preparing_now(api, workspace)
    if left:
        lease = ledger.lease()
        ledger.ask_cancel(time.time(), detail, epoch=lease.epoch + 1 if lease else 1)
        return f"{name}: Job {driver.name} is about to take over {', '.join(left)}, and will be asked to stop. Follow it with: osctl watch"
    api.delete("jobs", driver.name, uid=driver.uid)
    return f"{name}: Job {driver.name} had started nothing yet, and was removed"


def preparing_now(api: Api, workspace: Workspace) -> list[str]:
    """A phrase for the Job that makes the pipeline's clips; empty: none lives. Raises Refused, Unreachable."""
    from orchestrator.pipelines import prepare_in_cluster

    config = workspace.pipeline.prepare
    job = prepare_in_cluster.live(prepare_in_cluster.jobs_of(api, workspace.store, config.name)) if config is not None else None
    return [f"the preparation {job.name}"] if job is not None else []


def drives_in_cluster(holder: Lease, pipeline: str, store_url: str) -> bool:
    """Whether a lease is held by a pod of a driver's Job of this pipeline, whatever its number."""
    from orchestrator.kube import names

    return f"-driver-{names.run_hash(store_url, pipeline)[:8]}-" in holder.host


def wait(api: Api, workspace: Workspace, driver: Driver, say: Callable[[str], None], until: float | None = None) -> int | None:
    """Wait until a driver's Job is over; its exit code. An API server that is away is asked again.

    `until`: seconds of time.monotonic() after which None is returned. Raises Refused where somebody deleted the Job.
    """
    said = False
    while driver.state == "live":
        if until is not None and time.monotonic() + POLL_S > until:
            return None
        time.sleep(POLL_S)
        try:
            driver = Driver.of(api.get("jobs", driver.name))
        except Unreachable as error:
            if not said:
                say(f"{error}; the driver goes on, and so does waiting for it")
            said = True
            continue
        except NotFound:
            raise Refused(
                f"{driver.name}: somebody deleted the driver; its attempts go on without one. Take them up again with: osctl resume"
            ) from None
        said = False
    return exit_code(api, workspace, driver)


def exit_code(api: Api, workspace: Workspace, driver: Driver) -> int:
    """With which a driver that is over has ended: its pod knows, and where that is gone the ledger's last word."""
    if driver.state == "complete":
        return 0
    try:
        pods, _ = api.list("pods", f"batch.kubernetes.io/job-name={driver.name}")
    except (Refused, Unreachable):
        pods = []
    ends = [
        (status["state"]["terminated"].get("finishedAt") or "", int(status["state"]["terminated"]["exitCode"]))
        for pod in pods
        for status in pod.get("status", {}).get("containerStatuses", ())
        if "terminated" in status["state"]
    ]
    if ends:
        return max(ends)[1]
    status = last_words(workspace).partition(":")[0]
    return {"cancelled": 130, "suspended": 130}.get(status, 3)


def last_words(workspace: Workspace) -> str:
    """With which the newest driver ended, as the ledger has it: `status: reason`. Empty: none has ended. Raises Unreachable."""
    ends = [event.detail for event in workspace.ledger.events() if event.kind == "ended"]
    return ends[-1] if ends else ""
