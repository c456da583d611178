"""A preparation in a cluster, as a person sees it: asked for, followed, rendered, cancelled; and what its pod runs.

Owns the words; `orchestrator.pipelines.prepare_in_cluster` does the work. Refuses to read what was typed (`cli.prepare`).
"""

from __future__ import annotations

import contextlib
import signal
from dataclasses import dataclass
from typing import TYPE_CHECKING

from orchestrator.cli import output

if TYPE_CHECKING:
    from opensora.dataset.prepare_config import PrepareConfig
    from orchestrator.kube.client import Api
    from orchestrator.pipelines.host import Host
    from orchestrator.pipelines.prepare_in_cluster import There
    from orchestrator.ports import Store
    from orchestrator.recipe.cluster_profile import ClusterProfile

LEFT = 128 + signal.SIGTERM
"""Exit code of a launcher that was asked to leave its node: none of those with which its Job is over."""


@dataclass(frozen=True)
class Wanted:
    """What was typed for a cluster."""

    config: PrepareConfig
    store: Store
    host: Host
    profile: ClusterProfile
    """Without pools."""
    gpus: int
    pods: int
    """That decode: of Ray, or among which the sources are divided."""
    replace: bool
    retry: bool


def launch(wanted: Wanted, *, follow: bool, quiet: bool, dry_run: bool) -> None:
    """Create the Job, or find the one that does the same. With `follow` its exit code is this process's.

    Raises UsageError, Refused, Unreachable.
    """
    from orchestrator.pipelines import prepare_in_cluster as there
    from orchestrator.prepare import same_name

    config, store = wanted.config, wanted.store
    order = there.order_for(
        config, store, wanted.host, wanted.profile, pods=wanted.pods, gpus=wanted.gpus, replace=wanted.replace, retry=wanted.retry
    )
    with contextlib.closing(there.connect(wanted.profile, wanted.host)) as api:
        if not wanted.replace:
            same_name.check(store, config)
        if dry_run:
            there.submit(api, store, order, wanted.profile, pods=wanted.pods, gpus=wanted.gpus, dry_run=True)
            output.note(f"{config.name}: namespace {api.namespace} would take its Job; nothing was written")
            return
        store.probe()
        job, new = there.submit(api, store, order, wanted.profile, pods=wanted.pods, gpus=wanted.gpus, follow=follow)
        assert job is not None
        if new:
            output.note(f"{config.name}: asked for, prepared by {job.name} in namespace {api.namespace}; this machine may be switched off")
        else:
            output.note(f"{config.name}: {job.name} prepares it already; nothing was done twice")
        if follow:
            _follow(api, wanted, job, quiet=quiet)
            return
    output.note(f"next: osctl prepare status {config.name} | osctl prepare cancel {config.name} | the same command with --follow")


def _follow(api: Api, wanted: Wanted, job: There, *, quiet: bool) -> None:
    """Ends the process with the Job's exit code where that is not 0. Raises Refused."""
    from orchestrator.cli.prepare_view import Progress, show
    from orchestrator.errors import Refused
    from orchestrator.pipelines import prepare_in_cluster as there
    from orchestrator.pipelines.preparing import folder_of
    from orchestrator.prepare.watching import look

    store, name = wanted.store, wanted.config.name
    nowhere = folder_of(wanted.host, name) / "not-here"
    with Progress(name, quiet=quiet) as progress:
        try:
            code = there.wait(api, store, job, lambda: progress(look(store, name, nowhere).status), output.note)
        except KeyboardInterrupt:
            output.note(f"\n{name}: the Job goes on. Stop it with: osctl prepare cancel {name}")
            raise SystemExit(130) from None
    words = there.last_words(api, job) if code else ""
    try:
        show(look(store, name, nowhere))
    except Refused:
        words = words or "it ended before it began"
    if words:
        output.note(f"{job.name}: {words}")
    if code:
        raise SystemExit(code)


def waiting(store: Store, name: str, host: Host, profile: ClusterProfile) -> str:
    """A sentence about a Job that lives while nobody holds the lease: why its pod has not begun. Empty: there is none."""
    from orchestrator.errors import Refused, Unreachable
    from orchestrator.pipelines import prepare_in_cluster as there

    try:
        with contextlib.closing(there.connect(profile, host)) as api:
            job = there.live(there.jobs_of(api, store, name))
            if job is None:
                return ""
            waits = there.waits_for(api, job)
            return f"{name}: {job.name} has not begun{f': {waits}' if waits else ''}"
    except (Refused, Unreachable) as error:
        return str(error)


def cancel(store: Store, name: str, host: Host, profile: ClusterProfile | None, *, now: bool) -> None:
    """Raises Refused, Unreachable."""
    from orchestrator.pipelines import prepare_in_cluster as there

    with contextlib.ExitStack() as stack:
        api = stack.enter_context(contextlib.closing(there.connect(profile, host))) if profile is not None else None
        output.note(there.cancel(store, name, api, now=now))


def render(wanted: Wanted) -> None:
    """Print the Job that would be sent. Needs no cluster. Raises UsageError, Refused, Unreachable."""
    from orchestrator.kube import yaml_text
    from orchestrator.pipelines import prepare_in_cluster as there

    order = there.order_for(
        wanted.config, wanted.store, wanted.host, wanted.profile, pods=wanted.pods, gpus=wanted.gpus, replace=wanted.replace
    )
    _, body = there.rendered(order, wanted.store.url, wanted.profile, 1, pods=wanted.pods, gpus=wanted.gpus)
    output.note("its number is 1 here; a run takes the next that is free in the cluster")
    output.raw(yaml_text.dump([body]))


def drive(store: Store, name: str, digest: str, host: Host, shards: int = 1) -> None:
    """What the pod runs: the launcher of a preparation over an order. Ends the process with its exit code.

    Args:
        shards: among how many pods the sources are divided. All but the pod of shard 0 work on theirs alone.

    Raises as `Preparation.run`, and as `ShardWorker.run`.
    """
    from orchestrator.kube.prepare_job import JOB, POD
    from orchestrator.pipelines import prepare_pod
    from orchestrator.pipelines.signals import save_on_signals
    from orchestrator.prepare import order as orders
    from orchestrator.prepare.run import Preparation
    from orchestrator.prepare.shard_worker import ShardWorker

    asked = prepare_pod.asked_by(orders.read(store, name, digest), store, host, shards)
    if asked.place is not None and asked.place.shard:
        worker = ShardWorker(asked, asked.place, host.env.get(POD, ""), output.note)
        with save_on_signals(worker, output.note):
            done = worker.run()
        if not done:
            raise SystemExit(LEFT)
        return
    preparation = Preparation(asked, say=output.note)
    with save_on_signals(preparation, output.note):
        prepare_pod.wait_for_lease(store, name, host.env.get(JOB, ""), lambda: preparation.stopped, output.note)
        prepared = preparation.run()
    if prepared.published is not None:
        about = prepared.published.description
        output.note(f"{name}: prepared; {about.clips:,} clips, digest {about.digest[:16]}, at {prepared.published.place}")
        return
    how = "cancelled" if preparation.cancelled else "leaves its node; the next pod goes on"
    output.note(f"{name}: {how}; what is done is kept")
    raise SystemExit(130 if preparation.cancelled else LEFT)
