"""A launch whose driver lives in the cluster: find the one that is there, or make one; follow it; stop it.

There is at most one live driver of a pipeline: Jobs are numbered, the next number is free only when none lives, and of two launches
that take it at once the API server lets one be first. Refuses to touch a Job that no osctl has made for this store.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import TYPE_CHECKING, Any, Literal

from orchestrator import launched
from orchestrator.cli import output
from orchestrator.errors import NotFound, Refused, Unreachable, UsageError

if TYPE_CHECKING:
    from orchestrator.adapters.kube.api import Api
    from orchestrator.cli.run import Changed
    from orchestrator.cli.workspace import Workspace
    from orchestrator.cluster import ClusterProfile
    from orchestrator.ledger import Ledger
    from orchestrator.records import Lease

LOOK_S = 1.0
"""Seconds between two looks at a driver's Job that is waited for."""


@dataclass(frozen=True)
class Driver:
    """A driver's Job, as the API server tells it."""

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

    @classmethod
    def of(cls, job: Mapping[str, Any]) -> Driver:
        from orchestrator import manifest
        from orchestrator.sightings import unix

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
            number=int(metadata["annotations"][manifest.RUN_KEY].rpartition("/")[2]),
            revision=int(next(value for option, value in options if option == "--revision")),
            targets=tuple(value for option, value in options if option == "--target"),
            created=unix(metadata["creationTimestamp"]),
            state="failed" if "Failed" in met or metadata.get("deletionTimestamp") else "complete" if "Complete" in met else "live",
            reason=met.get("Failed", "somebody deleted it" if metadata.get("deletionTimestamp") else ""),
        )


def profile_of(workspace: Workspace) -> ClusterProfile:
    profile = workspace.pipeline.cluster
    assert profile is not None, f"{workspace.pipeline.name}: backend kubernetes is resolved with a cluster"
    return profile


def connect(workspace: Workspace) -> Api:
    """Close it. Raises UsageError where there is no kubeconfig."""
    from orchestrator.adapters.kube.api import Api

    profile = profile_of(workspace)
    return Api.connect(profile.context, profile.namespace)


def drivers(api: Api, workspace: Workspace) -> list[Driver]:
    """Of this pipeline in this store, by number. Raises Refused, Unreachable."""
    from orchestrator import manifest

    name, store = workspace.pipeline.name, workspace.store_url
    jobs, _ = api.list("jobs", f"{manifest.MANAGED_BY}={manifest.MANAGER},{manifest.PIPELINE}={name},{manifest.ROLE}=driver")
    found = []
    for job in jobs:
        try:
            owner = manifest.owner(job)
            if owner is not None and owner[0] == store and owner[1].startswith(f"{name}/driver/"):
                found.append(Driver.of(job))
        except (AttributeError, IndexError, KeyError, StopIteration, TypeError, ValueError) as error:
            labels = f"{manifest.PIPELINE}={name},{manifest.ROLE}=driver"
            raise Refused(
                f"{name}: a driver's Job in namespace {api.namespace} is not as osctl writes one ({type(error).__name__}): nobody can say "
                f"whether a driver lives. Look at it: kubectl -n {api.namespace} get jobs -l {labels} -o yaml"
            ) from error
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


def find_or_submit(api: Api, workspace: Workspace, targets: Sequence[str], changed: Changed, *, attach: bool) -> Driver | None:
    """The live driver, if it does what is asked for (`attach`: whatever it does), else a new one. None: there is nothing left to do.

    Raises Refused, Unreachable; nothing was done then.
    """
    pipeline = workspace.pipeline
    found = drivers(api, workspace)  # first of all: with the cluster away, the store is not written to
    driver, new = live(found), False
    if driver is None:
        workspace.store.probe()
        launched.check_ours(workspace.ledger)
        changed.settle(workspace, targets)
        if nothing_left(workspace, targets):
            return None
        driver, new = submit(api, workspace, targets, found)
    if new:
        output.note(f"{pipeline.name}: launched, driven by Job {driver.name} in namespace {api.namespace}")
        if pipeline.tracking.startswith("sqlite"):
            output.note("MLflow: its database lies on this machine, which the driver does not reach; fill it with: osctl sync")
    else:
        check_same(driver, workspace, None if attach else targets)
        output.note(f"{pipeline.name}: Job {driver.name} drives it already; nothing was done twice")
    return driver


def submit(api: Api, workspace: Workspace, targets: Sequence[str], found: Sequence[Driver]) -> tuple[Driver, bool]:
    """Write the revision and create the driver's Job: (driver, whether it is new). Nothing of either where another one drives.

    Raises Refused, Unreachable.
    """
    from orchestrator import manifest
    from orchestrator.adapters.kube.api import AlreadyExists

    ledger, pipeline, now = workspace.ledger, workspace.pipeline, time.time()
    holder = ledger.holder(now)
    if holder is not None and not drives_in_cluster(holder, pipeline.name, workspace.store_url):
        raise Refused(
            f"launch {pipeline.name}: is driven by {holder.holder}, not in the cluster. "
            "Follow it with `osctl watch`, or stop it: osctl cancel"
        )
    _drop_old_cancels(ledger, now)
    workspace.keep_contents()
    revision = ledger.add_revision(pipeline.model_dump(mode="json"), now)
    number = max((driver.number for driver in found), default=0) + 1
    body = manifest.driver_job(pipeline, workspace.store_url, revision, number, targets)
    name = body["metadata"]["name"]
    try:
        return Driver.of(api.create("jobs", body)), True
    except AlreadyExists:
        there = api.get("jobs", name)
    if not manifest.is_ours(there, workspace.store_url, manifest.driver_key(pipeline.name, number)):
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
    if revision is None or revision.pipeline != workspace.pipeline.model_dump(mode="json"):
        fact = f"launch {name}: {driver.name} drives revision {driver.revision}, and this configuration is another one"
    elif targets is not None and set(targets) != set(driver.targets):
        asked, given = ", ".join(targets) or "all stages", ", ".join(driver.targets) or "all stages"
        fact = f"launch {name}: {driver.name} drives {given}, and {asked} was asked for"
    else:
        return
    raise Refused(f"{fact}. Wait for its end (osctl watch), or stop it first: osctl cancel")


def check_none(api: Api, workspace: Workspace) -> None:
    """Raises Refused where a driver lives in the cluster: a pipeline has one."""
    driver = live(drivers(api, workspace))
    if driver is not None:
        raise Refused(
            f"launch {workspace.pipeline.name}: Job {driver.name} drives it in the cluster. "
            "Follow that with `osctl watch`, or stop it: osctl cancel"
        )


def nothing_left(workspace: Workspace, targets: Sequence[str]) -> bool:
    """Whether all of what is asked for is committed; what is not is planned, and held against the budget.

    Raises Refused beyond the budget, and for a stage whose parent is neither committed nor asked for.
    """
    from orchestrator.cli.look import take
    from orchestrator.cli.recipe import plan_of
    from orchestrator.decide import parentless
    from orchestrator.plan import check_budget

    pipeline = workspace.pipeline
    known = take(workspace) if workspace.ledger.latest_revision() is not None else None
    committed = {stage.name for stage in known.stages if stage.state == "committed"} if known else set()
    wanted = set(targets) or {stage.name for stage in pipeline.stages}
    for stage in pipeline.stages:
        if stage.name in wanted and stage.spec.parent is not None and stage.spec.parent not in wanted | committed:
            raise Refused(parentless(stage))
    estimate = plan_of(workspace, committed=known, target=targets[0] if targets else None)
    check_budget(estimate, pipeline.budget_usd, known.usd if known else Decimal(0))
    return wanted <= committed


def cancel_coming(api: Api, workspace: Workspace, detail: str) -> None:
    """Stop a driver that does not hold the lease yet: one that has not begun is removed, one that takes over will find the request."""
    name, ledger = workspace.pipeline.name, workspace.ledger
    driver = live(drivers(api, workspace))
    if driver is None:
        output.note(f"{name}: nobody drives it, nothing to cancel")
        return
    left = [f"{stage} attempt {number}" for stage, inputs in ledger.stages() for number in ledger.attempts(stage, inputs)
            if ledger.outcome(stage, inputs, number) is None]  # fmt: skip
    if left:
        lease = ledger.lease()
        ledger.ask_cancel(time.time(), detail, epoch=lease.epoch + 1 if lease else 1)
        output.note(
            f"{name}: Job {driver.name} is about to take over {', '.join(left)}, and will be asked to stop. Follow it with: osctl watch"
        )
    else:
        api.delete("jobs", driver.name, uid=driver.uid)
        output.note(f"{name}: Job {driver.name} had started nothing yet, and was removed")


def drives_in_cluster(holder: Lease, pipeline: str, store_url: str) -> bool:
    """Whether a lease is held by a pod of a driver's Job of this pipeline, whatever its number."""
    from orchestrator import manifest

    return f"-driver-{manifest.run_hash(store_url, pipeline)[:8]}-" in holder.host


def wait(api: Api, workspace: Workspace, driver: Driver) -> int:
    """Until a driver's Job is over; the driver's exit code. An API server that is away is asked again."""
    said = False
    while driver.state == "live":
        time.sleep(LOOK_S)
        try:
            driver = Driver.of(api.get("jobs", driver.name))
        except Unreachable as error:
            if not said:
                output.note(f"{error}; the driver goes on, and so does waiting for it")
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
    last = [event for event in workspace.ledger.events() if event.kind == "ended"]
    status = last[-1].detail.partition(":")[0] if last else ""
    return {"cancelled": 130, "suspended": 130}.get(status, 3)
