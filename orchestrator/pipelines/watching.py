"""A pipeline while it runs: one view after another of its ledger and, where it lives in a cluster, of its pods. Only reads.

One thread reads the ledger every few seconds, and the cluster reports by itself: what moves there is shown at once, however slow the
store is.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from orchestrator.pipelines.workspace import Workspace

if TYPE_CHECKING:
    from orchestrator.accounting.status import Snapshot
    from orchestrator.pipelines.cluster_view import ClusterView

BURST_S = 0.05
"""Pods of a gang move together: what moves within this time is one view."""


@dataclass(frozen=True)
class View:
    snapshot: Snapshot
    cluster: ClusterView | None = None
    """None: it runs on this machine, or the cluster has not been asked yet (`first`)."""
    trouble: str = ""
    """Why the ledger cannot be read anew; the snapshot is the last one that could be."""
    first: bool = False
    """Whether the cluster may still add to it: the ledger is shown at once."""

    @property
    def over(self) -> bool:
        """Nobody drives the pipeline, and nobody is about to."""
        return self.snapshot.state != "running" and (self.cluster is None or self.cluster.driver is None) and not self.first


def view(workspace: Workspace) -> View:
    """What ledger and cluster show now. Between two drivers nobody holds the lease, and still it runs. Raises Unreachable."""
    from orchestrator.accounting.bound_time import with_bound
    from orchestrator.pipelines.find import snapshot

    current = snapshot(workspace)
    if workspace.pipeline.cluster is None:
        return View(current)
    from orchestrator.pipelines.cluster_view import ClusterWatch

    with ClusterWatch(workspace) as cluster:
        seen = cluster.view(current)
    current = with_bound(current, seen.bounds, time.time())
    return View(replace(current, state="running") if seen.driver is not None else current, seen)


class Views:
    """Iterate over it for a view whenever something may have moved, until `close`. For one reader."""

    def __init__(self, workspace: Workspace, interval_s: float = 1.0):
        """`interval_s`: seconds between two reads of the ledger."""
        from orchestrator.accounting.history import History
        from orchestrator.ledger.store import Ledger

        self.workspace, self.interval_s = workspace, interval_s
        # The reading thread has a ledger of its own.
        self._history = History(Ledger(workspace.store, workspace.pipeline.name), workspace.named_prices, calm=True)
        self._current: Snapshot | None = None
        self._trouble = ""
        self._stopped, self._moved = threading.Event(), threading.Event()
        self._reader = threading.Thread(target=self._read, name=f"reads the ledger of {workspace.pipeline.name}", daemon=True)

    def close(self) -> None:
        """From any thread: the iteration ends."""
        self._stopped.set()
        self._moved.set()
        if self._reader.is_alive():
            self._reader.join(timeout=5)

    def _read(self) -> None:
        from orchestrator.accounting import status
        from orchestrator.errors import OsctlError
        from orchestrator.pipelines import preparing

        made = None
        while not self._stopped.is_set():
            try:
                current = status.take_snapshot(self.workspace.pipeline, self._history, time.time())
                if made is None or made.state != "prepared":  # what is prepared costs no more, and is not asked for again
                    made = preparing.status_of(self.workspace)
                self._current = replace(current, preparation=made)
                self._trouble = ""
            except OsctlError as error:  # the display is no reason to stop a run; the runner reports a store that is gone by itself
                self._trouble = str(error)
            except Exception as error:  # noqa: BLE001 - whatever it is, a display that stands still without a word is worse
                self._trouble = f"the ledger cannot be shown: {type(error).__name__}: {error}"
            self._moved.set()
            self._stopped.wait(self.interval_s)

    def __iter__(self) -> Iterator[View]:
        from orchestrator.accounting.bound_time import with_bound

        self._reader.start()
        with contextlib.ExitStack() as opened:
            opened.callback(self.close)
            cluster = None
            if self.workspace.pipeline.cluster is not None:
                from orchestrator.pipelines.cluster_view import ClusterWatch

                cluster = opened.enter_context(ClusterWatch(self.workspace, self._moved.set))
            first = cluster is not None
            while True:
                self._moved.wait()
                self._moved.clear()
                if self._stopped.is_set():
                    return
                current = self._current
                if current is None:
                    continue
                if first:
                    yield View(current, None, self._trouble, first=True)
                    first = False
                if cluster is None:
                    yield View(current, None, self._trouble)
                    continue
                seen = cluster.view(current)
                yield View(with_bound(current, seen.bounds, time.time()), seen, self._trouble)
                self._stopped.wait(BURST_S)
