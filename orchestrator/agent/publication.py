"""A node's checkpoints on their way to the store, alone or as one of several nodes.

Owns the courier for checkpoints and the wait for other nodes. Refuses to say how the attempt ended: it tells what is published, and
why something will not be.

On one node a checkpoint is its files, then its manifest. On several each node uploads its files and says so in a part; node 0 waits for
all parts and writes the manifest. Another node's last checkpoint counts as published when the manifest is there *and* node 0 has
reported: a pod that leaves with 0 makes the whole job succeed, and node 0 may have more to do.

A wait for a node ends when that node has reported without having delivered, or is silent. A node that lives is heard: its journal grows.
The same ends the wait for a save that a node which is gone can no longer take part in.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial

from orchestrator.agent.courier import Courier, Parcel, Refusal
from orchestrator.agent.run_directory import RunDirectory
from orchestrator.errors import NotFound, OsctlError, StoreConflict, Unreachable
from orchestrator.ledger import Ledger
from orchestrator.records import Intent, Report

log = logging.getLogger(__name__)

PENDING_CHECKPOINTS = 2
"""Checkpoints that wait for a slow store; older ones make room, since each holds its disk space."""
POLL_S = 0.3
"""Between two looks at what other nodes have done, once the training is over: every device of the job waits for the last of them."""
TRAINING_POLL_S = 2.0
"""The same while nobody waits."""


class Publication:
    """`wake` is called, from another thread, whenever something was delivered or given up."""

    def __init__(self, ledger: Ledger, intent: Intent, run: RunDirectory, node: int, wake: Callable[[], None], silence_s: float) -> None:
        """`silence_s`: how long another node may be silent before it is given up."""
        self._ledger, self._intent, self._run, self._node = ledger, intent, run, node
        resumed = set() if intent.resume is None else {intent.resume.step}
        self.published, self._offered = resumed, set(resumed)
        self._promised: int | None = None
        self._refused_since: float | None = None
        self._refused_last = ""
        self.courier = Courier("checkpoints", wake, lambda: ledger.store.arrived)
        """Of this node's own files."""
        self.peers = Peers(ledger, intent, node, wake, silence_s, self.published) if intent.nodes > 1 else None

    def offer(self) -> None:
        """Queue what is new in the run directory."""
        for step in self._run.complete_checkpoints():
            if step not in self._offered:
                self._offered.add(step)
                if self._run.pin(step) or self._run.checkpoint(step).is_dir():
                    parcel = Parcel(name_of(step), partial(self._publish, step), partial(self._done_with, step))
                    self.courier.put(parcel, keep=PENDING_CHECKPOINTS)

    def watch(self) -> None:
        """A save was asked for: `lost` says when a node that it needs is gone."""
        if self.peers is not None:
            self.peers.watch()

    def close(self, promised: int | None) -> None:
        """Nothing more will be offered. `promised`: the step that must be published for the ending to be what the trainer said."""
        self._promised = promised
        if self.peers is not None:
            self.peers.close(promised if promised in self._offered else None)

    @property
    def idle(self) -> bool:
        """Whether all is delivered or given up. A node that cannot deliver waits for nobody: the others wait for its report."""
        return self.courier.idle and (self.peers is None or self.peers.idle or name_of(self._promised) in self.courier.refused)

    @property
    def failing_since(self) -> tuple[float | None, ...]:
        """Of the courier and of the wait for others, time.monotonic() of the first failure after the last success."""
        return (self.courier.failing_since, None if self.peers is None else self.peers.failing_since)

    @property
    def failing(self) -> str:
        """Why the newest checkpoint that was tried is not in the store; empty: it is, or none was tried."""
        return self.trouble or self._refused_last

    @property
    def unsaved_since(self) -> float | None:
        """time.monotonic() of the first failure of any kind after the last checkpoint that was published."""
        times = [since for since in (*self.failing_since, self._refused_since) if since is not None]
        return min(times, default=None)

    @property
    def trouble(self) -> str:
        """What the store last said, while it fails."""
        return self.courier.trouble or ("" if self.peers is None else self.peers.trouble)

    @property
    def lost(self) -> str:
        """Why another node will not do its share; empty where nobody is known to fail."""
        return "" if self.peers is None else self.peers.lost

    def refusal(self, step: int | None) -> Refusal | None:
        """Why a checkpoint will never be published by this node, if it will not."""
        mine = self.courier.refused.get(name_of(step))
        return mine if mine or self.peers is None or step is None else self.peers.refused.get(step)

    def _done_with(self, step: int) -> None:
        """Delivered, refused or dropped."""
        refused = self.courier.refused.get(name_of(step))
        if refused is not None:
            self._refused_last, self._refused_since = refused.reason, self._refused_since or time.monotonic()
            if self.peers is None:  # of several nodes, another may still be at it
                try:
                    self._ledger.discard(self._intent, step)
                except (OsctlError, OSError) as error:
                    log.warning("%s: what was uploaded of it stays: %s", name_of(step), error)
        self._run.unpin(step)

    def _publish(self, step: int) -> None:
        self._send(step)
        self._refused_since, self._refused_last = None, ""

    def _send(self, step: int) -> None:
        pinned = self._run.pinned(step)
        directory = pinned if pinned.is_dir() else self._run.checkpoint(step)
        if self.peers is None:
            self._ledger.publish(self._intent, directory)
            self.published.add(step)
            return
        self._ledger.publish_part(self._intent, directory, self._node)
        if self._node == 0:
            self.peers.merge(step, (directory / "CHECKPOINT.json").read_bytes())


def name_of(step: int | None) -> str:
    return f"the checkpoint of step {step}"


class Peers(threading.Thread):
    """The wait for other nodes: node 0 for their parts, the others for node 0."""

    def __init__(self, ledger: Ledger, intent: Intent, node: int, wake: Callable[[], None], silence_s: float, published: set[int]) -> None:
        super().__init__(name="peers", daemon=True)
        self._ledger, self._intent, self._wake, self._silence_s = ledger, intent, wake, silence_s
        self._leads, self._published = node == 0, published
        self._all_others = [other for other in range(intent.nodes) if other != node]
        self._needed = self._all_others if node == 0 else [0]
        self._changed = threading.Condition()
        self._descriptions: dict[int, bytes] = {}
        """Of node 0's own CHECKPOINT.json, by step, while parts are missing."""
        self._promised: int | None = None
        self._closing = self._watching = False
        self._heard: dict[int, tuple[str, float]] = {}
        """By node, its newest journal piece and when it was first seen."""
        self.refused: dict[int, Refusal] = {}
        self.lost = ""
        """Why another node will not do its share; said only while it is watched or waited for."""
        self.failing_since: float | None = None
        self.trouble = ""
        self.start()

    def merge(self, step: int, description: bytes) -> None:
        """Node 0: its own part of a checkpoint is there."""
        with self._changed:
            self._descriptions[step] = description
            self._changed.notify()

    def watch(self) -> None:
        """All nodes are needed until the trainer has ended."""
        with self._changed:
            self._watching = True
            self._changed.notify()

    def close(self, promised: int | None) -> None:
        """The trainer has ended: from now on nobody is waited for who is gone."""
        with self._changed:
            self._closing, self._watching, self.lost = True, False, ""
            self._promised = None if self._leads else promised
            self._changed.notify()

    @property
    def idle(self) -> bool:
        with self._changed:
            return not self._waiting()

    def _waiting(self) -> bool:
        return not self.lost and (self._watching or bool(self._descriptions) or self._promised is not None)

    def run(self) -> None:
        while True:
            with self._changed:
                while not self._waiting():
                    self._changed.wait()
                promised, descriptions = self._promised, dict(self._descriptions)
                nodes = self._needed if self._closing else self._all_others if self._watching else []
            try:
                self._look(nodes, promised, descriptions)
                self.failing_since, self.trouble = None, ""
            except Exception as error:  # noqa: BLE001 - whatever it is, the agent must be able to give up and leave
                self.trouble = f"waiting for other nodes: {error}"
                log.warning("%s", self.trouble)
                self.failing_since = self.failing_since or time.monotonic()
            with self._changed:
                self._changed.wait(POLL_S if self._closing or self._watching else TRAINING_POLL_S)

    def _look(self, nodes: Sequence[int], promised: int | None, descriptions: dict[int, bytes]) -> None:
        """`nodes`: those without which there is nothing to wait for."""
        reports = self._reports() if nodes else []  # before looking for what they have delivered
        delivered = self._merge(descriptions) if self._leads else self._follow(promised, reports)
        if delivered is not None:
            with self._changed:  # nodes deliver in order: what is older and not there was dropped on the way
                self._descriptions = {step: content for step, content in self._descriptions.items() if step > delivered}
                self._promised = None
            self._wake()
        elif why := self._gone(nodes, reports):
            log.warning("%s", why)
            with self._changed:
                if nodes is self._needed or self._watching:  # or it was for a save that has come about meanwhile
                    self.lost = why
            self._wake()

    def _merge(self, descriptions: dict[int, bytes]) -> int | None:
        """The newest step that is dealt with."""
        dealt_with = None
        for step, description in sorted(descriptions.items()):
            try:
                if self._ledger.merge_parts(self._intent, step, description) is None:
                    continue
                self._published.add(step)
            except (StoreConflict, OsctlError, NotFound) as error:
                if isinstance(error, Unreachable):
                    raise
                log.error("%s: %s", name_of(step), error)
                self.refused[step] = Refusal(str(error), disk_full=False)
            dealt_with = step
        return dealt_with

    def _follow(self, promised: int | None, reports: Sequence[Report]) -> int | None:
        if promised is None or not any(report.node == 0 and report.class_ in ("completed", "drained") for report in reports):
            return None
        if promised not in self._published and not self._ledger.is_published(self._intent, promised):
            return None
        self._published.add(promised)
        return promised

    def _reports(self) -> list[Report]:
        return self._ledger.reports(self._intent.stage, self._intent.inputs, self._intent.attempt)

    def _gone(self, nodes: Sequence[int], reports: Sequence[Report]) -> str:
        """Why one of these nodes will not do its share, if it will not."""
        for report in reports:
            if report.node in nodes and (self._closing or report.class_ not in ("completed", "drained")):
                return f"node {report.node} ended before ({report.class_}{f': {report.reason}' if report.reason else ''})"
        now = time.monotonic()
        for node in nodes:
            last, since = self._heard.get(node, ("", now))
            newest = self._ledger.newest_piece(self._intent, node, last)
            self._heard[node] = (newest, now) if newest != last or node not in self._heard else (last, since)
            if now - self._heard[node][1] > self._silence_s:
                return f"node {node} has been silent for {self._silence_s:g} s"
        return ""
