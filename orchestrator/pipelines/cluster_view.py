"""What a cluster shows of a pipeline right now: its pods by node, and why it waits, in the cluster's own words.

It reads with the person's own rights and changes nothing. Where the cluster does not answer, or does not let this person read, the view
says so, and gives the driver's last word out of the ledger instead: a pipeline can always be shown.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from orchestrator.errors import OsctlError
from orchestrator.pipelines.cluster_driver import Driver, connect, drivers, live
from orchestrator.redact import redacted

if TYPE_CHECKING:
    from orchestrator.accounting.status import Snapshot
    from orchestrator.kube.node_lookup import NodeLookup
    from orchestrator.kube.observed import Pod
    from orchestrator.kube.queue_watch import QueueWatch
    from orchestrator.kube.watch import Watcher
    from orchestrator.ledger.records import Event
    from orchestrator.pipelines.workspace import Workspace

DRIVER_POLL_S = 1.0
"""Seconds between two questions for a driver's Job, while none drives."""
FIRST_VIEW_S = 5.0
"""How long the first view waits for the cluster. After that the ledger alone is shown, and the cluster as soon as it answers."""


QUEUE_PATIENCE_S = 3.0
"""How long the first view of an attempt that waits in a queue waits for Kueue's reason."""


DRIVERS: Mapping[str, str] = {"image": "Mend `driver_image` in the cluster profile, or the registry; then launch again"}
"""What a person can do about a driver that does not start, where it is something else than for an attempt."""


@dataclass(frozen=True)
class PodRow:
    stage: str
    """`driver` for the driver's own."""
    attempt: int
    node: int
    """Of the attempt, counted from 0."""
    name: str
    host: str | None
    phase: str
    """As Kubernetes calls it; Leaving: asked to end; Gone: deleted."""
    reason: str
    """Why it is not what it should be."""


@dataclass(frozen=True)
class Waiting:
    stage: str | None
    """None: what the driver says of all of it; `driver`: the driver itself."""
    attempt: int | None
    why: str
    kind: str | None
    """capacity: others hold the devices; fault: somebody has to mend something; none: it is about to start."""
    since: float | None
    """Unix time."""
    source: str
    """cluster: as it is now; driver: as the driver last saw it."""
    cause: str | None = None
    """The reason in one word (docs/waiting.md)."""
    next: str = ""
    """What a person can do about it."""


@dataclass(frozen=True)
class ClusterView:
    pods: tuple[PodRow, ...] = ()
    waits: tuple[Waiting, ...] = ()
    note: str = ""
    """Why the cluster is not shown; empty where it is."""
    driver: str | None = None
    """Name of a live driver's Job."""
    bounds: Mapping[str, float] = field(default_factory=dict)
    """By run key, since when (Unix time) a live attempt holds a node."""

    def rows(self) -> dict[str, list[dict[str, Any]]]:
        """What json and yaml print."""
        return {"pods": [vars(pod) for pod in self.pods], "waits": [vars(waiting) for waiting in self.waits]}


class ClusterWatch:
    """Watches a pipeline's jobs and pods. Close it."""

    def __init__(self, workspace: Workspace, on_change: Callable[[], None] = lambda: None):
        """Never raises: each view says what keeps it from reading the cluster."""
        from orchestrator.kube.names import selector
        from orchestrator.kube.node_lookup import NodeLookup
        from orchestrator.kube.queue_watch import QueueWatch
        from orchestrator.kube.watch import Watcher

        self.workspace = workspace
        self._watcher: Watcher | None = None
        self._queues: QueueWatch | None = None
        self._nodes: NodeLookup | None = None
        self._fault = ""
        self._patience_s = FIRST_VIEW_S
        self._driver: Driver | None = None
        self._driver_refused = ""
        """What keeps Kubernetes from making the driver's pod, as of `_driver_seen`."""
        self._driver_seen = 0.0
        try:
            self._api = connect(workspace)
        except OsctlError as error:
            self._fault = str(error)
        else:
            self._watcher = Watcher(self._api, selector(workspace.pipeline.name, ("trainer", "driver")), on_change)
            self._watcher.start()
            self._queues = QueueWatch(self._api, on_change)
            self._nodes = NodeLookup(self._api)

    def __enter__(self) -> ClusterWatch:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        if self._watcher is not None:
            self._watcher.close()
            if self._queues is not None:
                self._queues.close()
            self._api.close()

    def view(self, current: Snapshot) -> ClusterView:
        """What the cluster shows now. Never raises: a display that ended would look like a run that stands still."""
        try:
            return self._view(current)
        except Exception as error:  # noqa: BLE001 - whatever a cluster or somebody in it has written
            said = redacted(f"{type(error).__name__}: {error}")
            return ClusterView(waits=_said(current), note=f"the cluster cannot be shown ({said}); what stands here is out of the ledger")

    def _view(self, current: Snapshot) -> ClusterView:
        fault = self._trouble()
        if self._watcher is None or fault:
            return ClusterView(waits=_said(current), note=fault)
        now, pods, waits = time.time(), [], []
        bounds: dict[str, float] = {}
        for stage in current.stages:
            for attempt in stage.attempts:
                if attempt.ended is None:
                    rows, waiting, bound = self._attempt(self._watcher, stage.name, attempt.number, attempt.run_key, now)
                    pods += rows
                    waits += waiting
                    bounds |= {attempt.run_key: bound} if bound is not None else {}
        driver = None
        if current.driver is None and current.state != "succeeded":
            driver, rows, waiting = self._coming(self._watcher, current.said, now)
            pods += rows
            waits += waiting
        return ClusterView(tuple(pods), tuple(waits), "", driver, bounds)

    def _trouble(self) -> str:
        if self._watcher is None:
            return self._fault
        try:
            fresh = self._watcher.wait_until_fresh(self._patience_s)
        except OsctlError as error:
            return f"{error}; what stands here is out of the ledger"
        finally:
            self._patience_s = 0.0  # whoever waits for a cluster that is away sees the ledger meanwhile
        why = self._watcher.why()
        return "" if fresh else f"the cluster does not answer{f' ({why})' if why else ''}; what stands here is out of the ledger"

    def _attempt(
        self, watcher: Watcher, stage: str, number: int, run_key: str, now: float
    ) -> tuple[list[PodRow], list[Waiting], float | None]:
        """Its pods, what it waits for, and since when it holds a node."""
        from orchestrator.kube import names
        from orchestrator.kube.kueue import Held
        from orchestrator.kube.life import read_life
        from orchestrator.kube.operator import of
        from orchestrator.kube.waiting import NEXT

        store_url = self.workspace.store_url
        name, run = names.job_name(store_url, run_key), names.run_hash(store_url, run_key)
        job, pods = watcher.cache.job(name, (store_url, run_key)), watcher.cache.pods(run)
        if job is not None and job.owner != (store_url, run_key):
            return [], [Waiting(stage, number, f"a foreign {of(job).kind} is called {name}", "fault", None, "cluster")], None
        newest = {pod.index: pod for pod in sorted(pods, key=lambda pod: pod.created)}
        rows = [_row(stage, number, newest[index], now) for index in sorted(newest)]
        queues = self._queues if job is not None and job.held_back else None
        held = queues.held(job, QUEUE_PATIENCE_S) if queues is not None and job is not None else Held()
        life = read_life(job, pods, watcher.cache.notices(name), now, held=held)
        life = self._nodes.clearer(life, pods) if self._nodes is not None else life
        bound = life.bound if life.state == "running" else None
        if not life.waits:
            return rows, [], bound
        patience = life.waits_for is None or (life.waits_on == "quota" and life.waits_for == "capacity")  # others hold it
        advice = "" if patience or life.waits_on is None else NEXT.get(life.waits_on, "")
        waiting = [Waiting(stage, number, life.waits, life.waits_for, life.since, "cluster", life.waits_on, advice)]
        return rows, waiting, bound

    def _coming(self, watcher: Watcher, last_word: Event | None, now: float) -> tuple[str | None, list[PodRow], list[Waiting]]:
        """A driver that has not taken the lease yet, or is about to take it over. None: there is none.

        One that failed is told of where the ledger does not know: `last_word` is not its own.
        """
        from orchestrator.kube import names
        from orchestrator.kube import waiting as held_up
        from orchestrator.kube.waiting import NEXT, why_pods_wait

        if not 0 <= now - self._driver_seen < DRIVER_POLL_S:
            self._driver_seen = now
            try:
                found = drivers(self._api, self.workspace)
            except OsctlError:  # pods may be looked at and Jobs not; or the server has just gone away
                found = []
            self._driver = live(found) or next(reversed(found), None)
            self._driver_refused = self._why_no_pod(self._driver)
        driver = self._driver
        if driver is None or driver.state == "complete":
            return None, [], []
        if driver.state == "failed":
            if last_word is not None and last_word.time > driver.created:
                return None, [], []
            return None, [], [Waiting("driver", driver.number, f"{driver.name} is over: {driver.reason}", "fault", None, "cluster")]
        run = names.run_hash(self.workspace.store_url, names.driver_key(self.workspace.pipeline.name, driver.number))
        made = watcher.cache.pods(run)
        pods = [pod for pod in made if not pod.over(now)]
        rows = [_row("driver", driver.number, pod, now) for pod in pods]
        otherwise = f"waits for its turn in queue {driver.queue}" if driver.queue else "is about to drive"
        since = min((pod.created for pod in pods), default=None)
        waiting = why_pods_wait(pods) or held_up.Waiting(otherwise, since=since)
        if self._driver_refused and not made:
            waiting = held_up.Waiting(self._driver_refused, "fault", driver.created, "refused")
        advice = DRIVERS.get(waiting.cause, NEXT.get(waiting.cause, "")) if waiting.cause is not None else ""
        coming = Waiting("driver", driver.number, waiting.words, waiting.kind, waiting.since, "cluster", waiting.cause, advice)
        return driver.name, rows, [coming]

    def _why_no_pod(self, driver: Driver | None) -> str:
        """Why a living driver's Job has no pod. Empty: it has one, or nothing is known."""
        from orchestrator.kube.side_job import why_not_made

        if driver is None or driver.state != "live":
            return ""
        try:
            return why_not_made(self._api, driver.name)
        except OsctlError:  # events may not be looked at, or the server has just gone away
            return ""


def _row(stage: str, attempt: int, pod: Pod, now: float) -> PodRow:
    phase, reason = pod.shown(now)
    return PodRow(stage, attempt, pod.index, pod.name, pod.node, phase, reason)


def _said(current: Snapshot) -> tuple[Waiting, ...]:
    """What the driver last said, where something waits."""
    waits = any(attempt.state == "waiting" for stage in current.stages for attempt in stage.attempts if attempt.ended is None)
    if current.said is None or not waits:
        return ()
    return (Waiting(None, None, current.said.detail, None, current.said.time, "driver"),)
