"""Publish a node's checkpoints, for a single node or for one of several.

Owns the upload queue for checkpoints and the wait for other nodes. Refuses to say how the attempt ended: it says what is published, and
why a checkpoint will not be.

A single node uploads a checkpoint's files, then writes its manifest. With several, each node uploads its files and then writes a part;
node 0 waits for all parts and writes the manifest. For another node its last checkpoint counts as published when the manifest is there
*and* node 0 has reported: a pod that exits with 0 makes the whole job succeed, and node 0 may have more to do.

The wait for a node ends when that node has reported without having uploaded its part, or is silent. A living node is not silent, because
its journal grows. The wait for a save ends in the same way if a node that takes part in it is gone.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial

from orchestrator.agent.run_directory import RunDirectory
from orchestrator.agent.upload_queue import Refusal, Upload, UploadQueue
from orchestrator.errors import NotFound, OsctlError, StoreConflict, Unreachable
from orchestrator.ledger.checkpoints import Over, check_counts
from orchestrator.ledger.records import Intent, Report
from orchestrator.ledger.store import Ledger

log = logging.getLogger(__name__)

PENDING_CHECKPOINTS = 2
"""How many checkpoints may wait for a slow store. If there are more, the oldest is dropped, since each occupies disk space."""
POLL_S = 0.3
"""Seconds between two checks of the other nodes once the training has ended, when every device of the job waits for the last node."""
TRAINING_POLL_S = 2.0
"""The same during training, when no device waits."""


class Publication:
    """Publishes a node's checkpoints. Calls `wake`, from another thread, whenever one was published or given up."""

    def __init__(
        self,
        ledger: Ledger,
        intent: Intent,
        run: RunDirectory,
        node: int,
        wake: Callable[[], None],
        silence_s: float,
        over: Over,
    ) -> None:
        """
        Args:
            silence_s: how long another node may be silent before it is given up.
            over: says why this attempt is over. Empty means that it counts. Once it is over, no manifest is written any more.
        """
        self._ledger, self._intent, self._run, self._node, self._over = ledger, intent, run, node, over
        resumed = set() if intent.resume is None else {intent.resume.step}
        self.published, self._offered = resumed, set(resumed)
        self._promised: int | None = None
        self._refused_since: float | None = None
        self._refused_last = ""
        self.uploads = UploadQueue("checkpoints", wake, lambda: ledger.store.arrived)
        """Uploads of this node's own files."""
        self.peers = Peers(ledger, intent, node, wake, silence_s, self.published, over) if intent.nodes > 1 else None

    def offer(self) -> None:
        """Queue the new checkpoints in the run directory; none once the attempt is over."""
        if self._over():
            return
        for step in self._run.complete_checkpoints():
            if step not in self._offered:
                self._offered.add(step)
                if self._run.pin(step) or self._run.checkpoint(step).is_dir():
                    upload = Upload(name_of(step), partial(self._publish, step), partial(self._done_with, step))
                    self.uploads.put(upload, keep=PENDING_CHECKPOINTS)

    def watch(self) -> None:
        """Say that a save was requested. From now on `lost` says if a node that takes part in it is gone."""
        if self.peers is not None:
            self.peers.watch()

    def close(self, promised: int | None) -> None:
        """Say that no more checkpoints come. `promised` is the step whose manifest must exist before the agent reports `completed` or
        `drained`. None means there is no such step."""
        self._promised = promised
        if self.peers is not None:
            self.peers.close(promised if promised in self._offered else None)

    @property
    def idle(self) -> bool:
        """Whether every checkpoint is published or given up. A node that cannot publish does not wait for others, as they wait for its
        report."""
        return self.uploads.idle and (self.peers is None or self.peers.idle or name_of(self._promised) in self.uploads.refused)

    @property
    def failing_since(self) -> tuple[float | None, ...]:
        """time.monotonic() of the first failure after the last success, for the upload queue and for the wait for other nodes."""
        return (self.uploads.failing_since, None if self.peers is None else self.peers.failing_since)

    @property
    def failing(self) -> str:
        """Why the newest checkpoint that was sent is not in the store. Empty means that it is there, or that none was sent."""
        return self.trouble or self._refused_last

    @property
    def unsaved_since(self) -> float | None:
        """time.monotonic() of the first failure of any kind after the last checkpoint that was published."""
        times = [since for since in (*self.failing_since, self._refused_since) if since is not None]
        return min(times, default=None)

    @property
    def trouble(self) -> str:
        """The store's last error while it fails, otherwise empty."""
        return self.uploads.trouble or ("" if self.peers is None else self.peers.trouble)

    @property
    def lost(self) -> str:
        """Why another node will not do its part. Empty means that no node is known to fail."""
        return "" if self.peers is None else self.peers.lost

    def refusal(self, step: int | None) -> Refusal | None:
        """Why this node will never publish a checkpoint. None means that it may."""
        mine = self.uploads.refused.get(name_of(step))
        return mine if mine or self.peers is None or step is None else self.peers.refused.get(step)

    def _done_with(self, step: int) -> None:
        """Called when a checkpoint was published, refused or dropped."""
        refused = self.uploads.refused.get(name_of(step))
        if refused is not None:
            self._refused_last, self._refused_since = refused.reason, self._refused_since or time.monotonic()
            # With several nodes another may still be uploading, unless the attempt is over. Only node 0 would write the manifest.
            if self.peers is None or (self._node == 0 and self._over()):
                _discard(self._ledger, self._intent, step)
        self._run.unpin(step)

    def _publish(self, step: int) -> None:
        self._send(step)
        self._refused_since, self._refused_last = None, ""

    def _send(self, step: int) -> None:
        check_counts(step, self._over)
        pinned = self._run.pinned(step)
        directory = pinned if pinned.is_dir() else self._run.checkpoint(step)
        if self.peers is None:
            self._ledger.publish(self._intent, directory, self._over)
            self.published.add(step)
            return
        self._ledger.publish_part(self._intent, directory, self._node)
        check_counts(step, self._over)
        if self._node == 0:
            self.peers.merge(step, (directory / "CHECKPOINT.json").read_bytes())


def name_of(step: int | None) -> str:
    return f"the checkpoint of step {step}"


def _discard(ledger: Ledger, intent: Intent, step: int) -> None:
    """Remove what was uploaded of a checkpoint that will have no manifest. If that fails, the files stay and are never used."""
    try:
        ledger.discard(intent, step)
    except (OsctlError, OSError) as error:
        log.warning("%s: its uploaded files could not be removed: %s", name_of(step), error)


class Peers(threading.Thread):
    """Waits for other nodes: node 0 waits for their parts, the others wait for node 0."""

    def __init__(
        self, ledger: Ledger, intent: Intent, node: int, wake: Callable[[], None], silence_s: float, published: set[int], over: Over
    ) -> None:
        super().__init__(name="peers", daemon=True)
        self._ledger, self._intent, self._wake, self._silence_s = ledger, intent, wake, silence_s
        self._leads, self._published, self._over = node == 0, published, over
        self._all_others = [other for other in range(intent.nodes) if other != node]
        self._needed = self._all_others if node == 0 else [0]
        self._changed = threading.Condition()
        self._descriptions: dict[int, bytes] = {}
        """Node 0's own CHECKPOINT.json by step, while parts are missing."""
        self._promised: int | None = None
        self._closing = self._watching = False
        self._heard: dict[int, tuple[str, float]] = {}
        """By node, its newest journal piece, and when that piece was first seen."""
        self.refused: dict[int, Refusal] = {}
        self.lost = ""
        """Why another node will not do its part. It is set only while that node is watched or waited for."""
        self.failing_since: float | None = None
        self.trouble = ""
        self.start()

    def merge(self, step: int, description: bytes) -> None:
        """Say that node 0's own part of a checkpoint is in the store. Only node 0 calls this."""
        with self._changed:
            self._descriptions[step] = description
            self._changed.notify()

    def watch(self) -> None:
        """Say that all nodes are needed until the trainer has ended."""
        with self._changed:
            self._watching = True
            self._changed.notify()

    def close(self, promised: int | None) -> None:
        """Say that the trainer has ended. From now on the wait for a node ends if that node is gone."""
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
            except Exception as error:  # noqa: BLE001 - after any error the agent must be able to give up and leave
                self.trouble = f"waiting for other nodes: {error}"
                log.warning("%s", self.trouble)
                self.failing_since = self.failing_since or time.monotonic()
            with self._changed:
                self._changed.wait(POLL_S if self._closing or self._watching else TRAINING_POLL_S)

    def _look(self, nodes: Sequence[int], promised: int | None, descriptions: dict[int, bytes]) -> None:
        """Check once what other nodes have done. `nodes` are those that must be alive for the wait to make sense."""
        reports = self._reports() if nodes else []  # read before checking what they have uploaded
        delivered = self._merge(descriptions) if self._leads else self._follow(promised, reports)
        if delivered is not None:
            with self._changed:  # nodes upload in order, so an older checkpoint that is not there was dropped
                self._descriptions = {step: content for step, content in self._descriptions.items() if step > delivered}
                self._promised = None
            self._wake()
        elif why := self._gone(nodes, reports):
            log.warning("%s", why)
            with self._changed:
                if nodes is self._needed or self._watching:  # otherwise it was for a save that has succeeded in the meantime
                    self.lost = why
            self._wake()

    def _merge(self, descriptions: dict[int, bytes]) -> int | None:
        """Merge parts where all are there. Returns the newest step that was merged or refused. None means no step was."""
        dealt_with = None
        for step, description in sorted(descriptions.items()):
            try:
                check_counts(step, self._over)
                if self._ledger.merge_parts(self._intent, step, description, self._over) is None:
                    continue
                self._published.add(step)
            except (StoreConflict, OsctlError, NotFound) as error:
                if isinstance(error, Unreachable):
                    raise
                log.error("%s: %s", name_of(step), error)
                self.refused[step] = Refusal(str(error), disk_full=False)
                if self._over():
                    _discard(self._ledger, self._intent, step)
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
        return self._ledger.reports(self._intent.stage, self._intent.inputs_digest, self._intent.attempt)

    def _gone(self, nodes: Sequence[int], reports: Sequence[Report]) -> str:
        """Why one of these nodes will not do its part. Empty means that none is known to fail."""
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
