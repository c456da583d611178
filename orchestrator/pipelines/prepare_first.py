"""A recipe's `prepare:` in a cluster: its driver has the clips made there by a Job or a RayJob, and the stages begin from what came out.

Owns what is asked for at a launch, and how a driver comes from that to the pipeline that it drives. The Job is that of
`osctl prepare run --cluster`, made by the same code. Refuses to prepare anything itself.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from opensora.printable import several
from orchestrator.driver.decide import Finish
from orchestrator.driver.first import NotYet
from orchestrator.errors import Refused, UsageError
from orchestrator.pipelines import prepare_in_cluster as there
from orchestrator.pipelines import preparing
from orchestrator.pipelines.changes import Decisions, settle
from orchestrator.pipelines.workspace import Workspace

if TYPE_CHECKING:
    from orchestrator.inputs.datasets import DataSet
    from orchestrator.kube.client import Api
    from orchestrator.pipelines.prepare_in_cluster import There
    from orchestrator.prepare.records import Order
    from orchestrator.recipe.cluster_profile import ClusterProfile
    from orchestrator.recipe.pipeline import Pipeline

FINAL = (3, 4, 130)
"""Exit codes of a preparation that are its driver's as well; every other one becomes 3."""


# --- At a launch -----------------------------------------------------------------------------------------


def only_here(workspace: Workspace) -> str:
    """Why pods cannot prepare it: what lies on this machine alone. Empty: they can."""
    from orchestrator.prepare.order import check_seen_by_pods

    config, profile = workspace.pipeline.prepare, _profile(workspace)
    assert config is not None
    try:
        check_seen_by_pods(config, [volume.path for volume in profile.volumes])
    except UsageError as error:
        return str(error)
    return ""


def at_launch(workspace: Workspace, say: Callable[[str], None]) -> tuple[Workspace, Order | None]:
    """The pipeline on its clips, if nothing has changed since they were made; else on clips that are still to come, and their order.

    Raises UsageError, Refused, Unreachable; nothing was written then.
    """
    from orchestrator.prepare import order as orders

    order = order_of(workspace)
    made = orders.done(workspace.store, order)
    if made is None:
        return preparing.to_come(workspace), order
    say(f"{order.name}: nothing has changed since it was prepared; {several(made.rows, 'clip')}, at {made.source}")
    return preparing.on_prepared(workspace, made.source), None


def order_of(workspace: Workspace) -> Order:
    """What pods are to prepare. Raises UsageError, Refused, Unreachable."""
    config, profile = workspace.pipeline.prepare, _profile(workspace)
    assert config is not None
    return there.order_for(config, workspace.store, workspace.host, profile, pods=_pods(profile, config.engine), gpus=profile.prepare.gpus)


def _pods(profile: ClusterProfile, engine: str) -> int:
    """That decode."""
    return profile.prepare.ray_pods if engine == "ray" else 1


def check_decisions(name: str, decisions: Decisions) -> None:
    """Raises UsageError: which stages changed is known once their clips are."""
    if given := [*decisions.keep, *decisions.anew]:
        raise UsageError(
            f"launch {name}: whether {given[0]} changed is known once its clips are made. Launch without --keep and --anew first; "
            "where a decision is needed, the driver stops and says so"
        )


def _profile(workspace: Workspace) -> ClusterProfile:
    profile = workspace.pipeline.cluster
    assert profile is not None, f"{workspace.pipeline.name}: backend kubernetes is resolved with a cluster"
    return there.site_of(profile)


# --- In the driver ---------------------------------------------------------------------------------------


def begin(
    workspace: Workspace, revision: int, digest: str, targets: Sequence[str], api: Api, say: Callable[[str], None]
) -> tuple[Pipeline, PreparedFirst | None]:
    """Of a driver that was given an order: the pipeline as it is known so far, and what comes before its first stage.

    Where an earlier driver of the same launch has come to the stages, they go on with the clips that they began with, and nothing comes
    before them. Raises Refused, Unreachable.
    """
    from orchestrator.prepare import order as orders
    from orchestrator.recipe import launched

    for number, found in reversed(workspace.ledger.revisions()):
        if number <= revision:
            break
        later = launched.resolve(workspace.ledger, number, found)
        if preparing.alike(later, workspace.pipeline) and preparing.is_on_version(later):
            return later, None
    config = workspace.pipeline.prepare
    assert config is not None, f"{workspace.pipeline.name}: only a recipe with `prepare:` has an order"
    order = orders.read(workspace.store, config.name, digest)
    return workspace.pipeline, PreparedFirst(workspace, order, tuple(targets), api, say)


@dataclass
class PreparedFirst:
    """Has the clips made, whoever began with it (`orchestrator.driver.first.First`)."""

    workspace: Workspace
    """Of the pipeline on clips that are still to come."""
    order: Order
    targets: tuple[str, ...]
    """Stages; empty: all."""
    api: Api
    say: Callable[[str], None]
    _job: str = ""
    """The Job that this driver has made or found alive."""
    _asked: tuple[str, int | None] | None = field(default=None)
    """What was asked of whom, by the epoch of its lease: a launcher that took over is asked anew."""

    def look(self, stop: Literal["drain", "kill"] | None, *, cancelled: bool) -> Pipeline | Finish | NotYet:
        found = there.jobs_of(self.api, self.workspace.store, self.order.name)
        living = there.live(found)
        if stop is not None:
            return self._stop(living, stop, cancelled=cancelled)
        if living is not None:
            return self._follow(living)
        from orchestrator.prepare import order as orders

        made = orders.done(self.workspace.store, self.order)
        if made is not None:
            return self._on(made)
        if self._job:
            return self._failed(next((one for one in found if one.name == self._job), None))
        profile = _profile(self.workspace)
        pods = _pods(profile, str(self.order.config.get("engine")))
        job, _ = there.submit(
            self.api, self.workspace.store, self.order, profile, pods=pods, gpus=profile.prepare.gpus
        )  # fmt: skip
        assert job is not None
        return self._follow(job)

    def _follow(self, job: There) -> NotYet:
        """Raises Refused where somebody has it prepared otherwise."""
        name = self.order.name
        if job.order != self.order.digest()[:16]:
            raise Refused(
                f"data set {name}: Job {job.name} prepares it by another order. Wait for its end (osctl prepare status {name}), "
                f"or stop it (osctl prepare cancel {name}); then launch again"
            )
        self._job = job.name
        waits = there.waits_for(self.api, job)
        return NotYet(f"{name} is prepared first, by {job.name}{f', which waits: {waits}' if waits else ''}")

    def _stop(self, job: There | None, stop: Literal["drain", "kill"], *, cancelled: bool) -> Finish | NotYet:
        name = self.order.name
        if job is None:
            reason = f"stopped while {name} was prepared, before the first stage; what is prepared of it is kept"
            return Finish("cancelled" if cancelled else "suspended", 130, reason)
        from orchestrator.ledger.store import Ledger
        from orchestrator.prepare.records import Keys

        holder = Ledger(self.workspace.store, Keys(name).folder).lenient().holder(time.time())
        asked = stop, holder.epoch if holder is not None else None
        if asked != self._asked:
            self.say(there.cancel(self.workspace.store, name, self.api, now=stop == "kill"))
            self._asked = asked
        return NotYet(f"{name}: {job.name} was asked to stop")

    def _failed(self, job: There | None) -> Finish:
        name = self.order.name
        see = f"See: osctl prepare status {name}. To go on: osctl launch"
        if job is None:
            return Finish("failed", 3, f"{name} was not prepared: somebody deleted {self._job}. {see}")
        code = there.exit_code(self.api, job)
        if code == 130:
            return Finish("cancelled", code, f"the preparation of {name} was cancelled; what is done is kept. To go on: osctl launch")
        lost = f"{job.name} is complete, and its data set is not in {self.workspace.store_url}"
        words = there.last_words(self.api, job) if code else lost
        return Finish("failed", code if code in FINAL else 3, f"{name} was not prepared: {words or job.reason or job.name}. {see}")

    def _on(self, made: DataSet) -> Pipeline:
        """The pipeline on the clips that were made. Raises Refused where a stage needs a decision, Unreachable."""
        found = preparing.on_prepared(self.workspace, made.source)
        found = found.with_contents(needed=True, imports=False, far=False, say=self.say)
        settle(found, self.targets, Decisions(), self.say)
        found.keep_contents()
        return found.pipeline
