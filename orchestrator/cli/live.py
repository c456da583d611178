"""What a cluster shows of a pipeline right now: its pods by node, and why it waits, in the cluster's own words.

Looks with the person's own rights and changes nothing. Where the cluster does not answer, or does not let this person look, it says so,
and gives the driver's last word out of the ledger instead: a pipeline can always be looked at.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from orchestrator.cli.remote import Driver, connect, drivers, live
from orchestrator.errors import OsctlError
from orchestrator.redact import redacted

if TYPE_CHECKING:
    from orchestrator.adapters.kube.watch import Watcher
    from orchestrator.cli.workspace import Workspace
    from orchestrator.records import Event
    from orchestrator.sightings import Pod
    from orchestrator.snapshot import Snapshot

DRIVER_LOOK_S = 1.0
"""Seconds between two looks for a driver's Job, while none drives."""
FIRST_LOOK_S = 5.0
"""How long a first look waits for the cluster; after that the ledger alone is shown, and the cluster as soon as it answers."""


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


@dataclass(frozen=True)
class Sight:
    pods: tuple[PodRow, ...] = ()
    waits: tuple[Waiting, ...] = ()
    note: str = ""
    """Why the cluster is not shown; empty where it is."""
    driver: str | None = None
    """Name of a live driver's Job."""

    def rows(self) -> dict[str, list[dict[str, Any]]]:
        """What json and yaml print."""
        return {"pods": [vars(pod) for pod in self.pods], "waits": [vars(waiting) for waiting in self.waits]}


class Live:
    """Watches a pipeline's jobs and pods. Close it."""

    def __init__(self, workspace: Workspace, on_change: Callable[[], None] = lambda: None):
        """Never raises: what keeps it from looking is said in each sight."""
        from orchestrator.adapters.kube.watch import Watcher, selector

        self.workspace = workspace
        self._watcher: Watcher | None = None
        self._fault = ""
        self._patience_s = FIRST_LOOK_S
        self._driver: Driver | None = None
        self._driver_seen = 0.0
        try:
            self._api = connect(workspace)
        except OsctlError as error:
            self._fault = str(error)
        else:
            self._watcher = Watcher(self._api, selector(workspace.pipeline.name, ("trainer", "driver")), on_change)
            self._watcher.start()

    def __enter__(self) -> Live:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        if self._watcher is not None:
            self._watcher.close()
            self._api.close()

    def look(self, current: Snapshot) -> Sight:
        """Never raises: a display that ended would look like a run that stands still."""
        try:
            return self._look(current)
        except Exception as error:  # noqa: BLE001 - whatever a cluster or somebody in it has written
            said = redacted(f"{type(error).__name__}: {error}")
            return Sight(waits=_said(current), note=f"the cluster cannot be shown ({said}); what stands here is out of the ledger")

    def _look(self, current: Snapshot) -> Sight:
        fault = self._trouble()
        if self._watcher is None or fault:
            return Sight(waits=_said(current), note=fault)
        now, pods, waits = time.time(), [], []
        for stage in current.stages:
            for attempt in stage.attempts:
                if attempt.ended is None:
                    rows, waiting = self._attempt(self._watcher, stage.name, attempt.number, attempt.run_key, now)
                    pods += rows
                    waits += waiting
        driver = None
        if current.driver is None and current.state != "succeeded":
            driver, rows, waiting = self._coming(self._watcher, current.said, now)
            pods += rows
            waits += waiting
        return Sight(tuple(pods), tuple(waits), "", driver)

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

    def _attempt(self, watcher: Watcher, stage: str, number: int, run_key: str, now: float) -> tuple[list[PodRow], list[Waiting]]:
        from orchestrator import manifest
        from orchestrator.sightings import read_life

        store_url = self.workspace.store_url
        name, run = manifest.job_name(store_url, run_key), manifest.run_hash(store_url, run_key)
        job, pods = watcher.picture.job(name), watcher.picture.pods(run)
        if job is not None and job.owner != (store_url, run_key):
            return [], [Waiting(stage, number, f"a foreign PyTorchJob is called {name}", "fault", None, "cluster")]
        newest = {pod.index: pod for pod in sorted(pods, key=lambda pod: pod.created)}
        rows = [_row(stage, number, newest[index], now) for index in sorted(newest)]
        life = read_life(job, pods, watcher.picture.notices(name), now)
        waiting = [Waiting(stage, number, life.waits, life.waits_for, life.since, "cluster")] if life.waits else []
        return rows, waiting

    def _coming(self, watcher: Watcher, last_word: Event | None, now: float) -> tuple[str | None, list[PodRow], list[Waiting]]:
        """A driver that has not taken the lease yet, or is about to take it over. None: there is none.

        One that failed is told of where the ledger does not know: `last_word` is not its own.
        """
        from orchestrator import manifest

        if not 0 <= now - self._driver_seen < DRIVER_LOOK_S:
            self._driver_seen = now
            try:
                found = drivers(self._api, self.workspace)
            except OsctlError:  # pods may be looked at and Jobs not; or the server has just gone away
                found = []
            self._driver = live(found) or next(reversed(found), None)
        driver = self._driver
        if driver is None or driver.state == "complete":
            return None, [], []
        if driver.state == "failed":
            if last_word is not None and last_word.time > driver.created:
                return None, [], []
            return None, [], [Waiting("driver", driver.number, f"{driver.name} is over: {driver.reason}", "fault", None, "cluster")]
        run = manifest.run_hash(self.workspace.store_url, manifest.driver_key(self.workspace.pipeline.name, driver.number))
        pods = [pod for pod in watcher.picture.pods(run) if not pod.over(now)]
        rows = [_row("driver", driver.number, pod, now) for pod in pods]
        why = next((pod.stuck or pod.unscheduled for pod in pods if pod.stuck or pod.unscheduled), "is about to drive")
        kind = "fault" if any(pod.stuck for pod in pods) else None
        return driver.name, rows, [Waiting("driver", driver.number, why, kind, min((pod.created for pod in pods), default=None), "cluster")]


def _row(stage: str, attempt: int, pod: Pod, now: float) -> PodRow:
    phase, reason = pod.shown(now)
    return PodRow(stage, attempt, pod.index, pod.name, pod.node, phase, reason)


def _said(current: Snapshot) -> tuple[Waiting, ...]:
    """What the driver last said, where something waits."""
    waits = any(attempt.state == "waiting" for stage in current.stages for attempt in stage.attempts if attempt.ended is None)
    if current.said is None or not waits:
        return ()
    return (Waiting(None, None, current.said.detail, None, current.said.time, "driver"),)
