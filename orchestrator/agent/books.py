"""The books of one node: where each second went, and all that the trainer says or leaves beside its checkpoints, on its way to the store.

Owns the timeline, the upload queue of small objects (journal, log, samples, words of trouble) and what was handed to it. Refuses to judge:
`attempt` says how the attempt ends.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from opensora.printable import one_line
from orchestrator.accounting.node_fold import TOTALS_EVERY, NodeFold
from orchestrator.agent.ending import LONGEST_WARNING
from orchestrator.agent.run_directory import SETTLED_S, Heartbeat, RunDirectory
from orchestrator.agent.timeline import Timeline
from orchestrator.agent.upload_queue import Upload, UploadQueue
from orchestrator.ledger.records import Intent, JournalPiece, Trouble
from orchestrator.ledger.store import Ledger
from orchestrator.local.clock import PARTED_S, AttemptClock

log = logging.getLogger(__name__)

LOG_PIECE_BYTES, LOG_BYTES = 1 << 18, 8 << 20
"""Most bytes of the trainer's output that one piece and one attempt send; of a longer output, the end is sent too."""
SAMPLE, MOST_UNDELIVERED = "samples/", 3
"""Beginning of a sample's path in the run directory; how many that did not arrive are named."""
FLIGHT_BYTES = 64 << 20
"""Most bytes that are sent of what the communication library writes about collectives that did not end."""


class Books:
    def __init__(
        self, ledger: Ledger, intent: Intent, run: RunDirectory, *, node: int, bound: float, clock: AttemptClock, wake: Callable[[], None]
    ) -> None:
        """
        Args:
            bound: Unix time since which the devices are held.
            wake: called, from another thread, whenever an upload is done with.
        """
        self._ledger, self._intent, self._run, self._node, self._clock = ledger, intent, run, node, clock
        self.timeline = Timeline(bound, node=node, devices=intent.devices_per_node, every_steps=intent.config.checkpoint.every_steps)
        self._sums = NodeFold(node, intent.resume.step if intent.resume else 0, intent.config.checkpoint.every_steps)
        """Sums over the pieces that are in the store."""
        self.uploads = UploadQueue("journal", wake, waits_for_space=True)
        self.phase: str | None = "preflight"
        """Category of the time that is not booked yet; None while the trainer's own words decide."""
        self.step = intent.resume.step if intent.resume else None
        """The last step that the trainer has told, or the one that it goes on from."""
        self._sent: set[str] = set()
        """Samples and flight records, by their path in the run directory."""
        self._flight_bytes = 0
        self._told_usage = False
        self._logged, self._log_pieces = 0, 0
        self._troubles, self._trouble = 0, ""

    def enter(self, phase: str) -> None:
        """End the phase before now, and begin this one."""
        assert self.phase is not None
        self.timeline.book(self.phase, self._clock())
        self.phase = phase

    def flush(self, *, final: bool = False) -> None:
        """Book what is known up to now, and hand everything new to the upload queue."""
        now = self._clock()
        if news := self._clock.news():
            log.warning("%s: %s", self._intent.run_key, news)
            self._ship(f"osctl: {news}\n".encode())
        if self.phase in ("init", None):
            beats = self._run.heartbeats()  # before the lines: a beat then never speaks of a time before an unread line
            self.read_lines(now)
            self._book_evidence(beats, now)
        else:
            self.timeline.book(self.phase, now)
        for piece in self.timeline.take():
            self.uploads.put(Upload(f"journal piece {piece.seq}", partial(self._append, piece)))
        self._ship_output(final=final)
        self._offer_usage()
        self._offer_files(0.0 if final else SETTLED_S)

    def undelivered_samples(self) -> list[str]:
        """Samples that the store will not take, or has not taken until now."""
        names = [name.removeprefix(SAMPLE) for name in self._sent if name.startswith(SAMPLE)]
        refused = [(name, self.uploads.refused.get(f"sample {name}")) for name in sorted(names)]
        told = [one_line(f"sample {name} is not in the store: {why.reason}", LONGEST_WARNING) for name, why in refused if why is not None]
        more = f"{len(told) - MOST_UNDELIVERED} more samples are not in the store; they lie in {self._run.samples}"
        return [*told[:MOST_UNDELIVERED], *([more] if len(told) > MOST_UNDELIVERED else [])]

    def _append(self, piece: JournalPiece) -> None:
        """Write one piece, and the sums that are due. In the upload queue's thread, in order; repeated until the store answers."""
        self._ledger.append_journal(self._intent, piece)
        self._sums.add(piece)
        if self._sums.seq % TOTALS_EVERY == TOTALS_EVERY - 1:
            self._ledger.append_totals(self._intent, self._sums.totals())

    def read_lines(self, now: float) -> None:
        for line in map(self._on_our_clock, self._run.new_lines()):
            self.phase = None
            self.timeline.line(line, now)
            if "step" in line:
                self.step = line["step"]

    def _book_evidence(self, beats: list[Heartbeat], now: float) -> None:
        """Between its lines, a trainer is believed in two things: it starts up until its first line, and it judges while it says so."""
        if self.phase == "init":
            self.timeline.book("init", now)
        elif beats and beats[0].rank % self._intent.devices_per_node == 0 and beats[0].phase == "evaluate":
            self.timeline.book("evaluate", self._clock.of_wall(beats[0].time))

    def _on_our_clock(self, line: dict[str, Any]) -> dict[str, Any]:
        """A trainer reads the wall clock. Where that was set, its times are moved; one of before the step is cut to what is booked."""
        parted = self._clock.parted()
        if abs(parted) < PARTED_S:
            return line
        moved = {name: line[name] - parted for name in ("time", "start", "end") if isinstance(line.get(name), int | float)}
        return line | moved

    def _ship_output(self, *, final: bool) -> None:
        left = LOG_BYTES - self._logged
        while left > 0 and (data := self._run.new_output(min(LOG_PIECE_BYTES, left), final=final)):
            left -= len(data)
            self._ship(data)
        if final:
            unread, end = self._run.rest_of_output()
            if unread:
                self._ship(b"\n[%d bytes left out]\n" % (unread - len(end)) + end)

    def _ship(self, data: bytes) -> None:
        seq, self._log_pieces, self._logged = self._log_pieces, self._log_pieces + 1, self._logged + len(data)
        self.uploads.put(Upload(f"log piece {seq}", partial(self._ledger.append_log, self._intent, self._node, seq, data, self._clock())))

    def _offer_usage(self) -> None:
        """Send once what the trainer says of its data. Node 0 speaks for all: a trainer that could use other clips ends."""
        if self._node or self._told_usage or (said := self._run.usage(self._intent.stage)) is None:
            return
        self._told_usage = True
        clips, left_out = said
        intent = self._intent
        if left_out is not None:
            clips = clips.model_copy(update={"listing": self._ledger.keys.left_out(intent.stage, intent.inputs_digest, intent.attempt)})
        self.uploads.put(Upload("what of the data is used", partial(self._ledger.write_clips, intent, clips, left_out)))

    def _offer_files(self, quiet_s: float) -> None:
        """Samples, of node 0 alone as the trainer draws them there, and flight records."""
        for path in self._run.settled_samples(quiet_s) if self._node == 0 else ():
            if self._is_new(path):
                self.uploads.put(Upload(f"sample {path.name}", partial(self._ledger.add_sample, self._intent, path.name, path)))
        for path in self._run.settled_flight_records(quiet_s):
            if self._is_new(path):
                self._flight_bytes += path.stat().st_size
                if self._flight_bytes <= FLIGHT_BYTES:
                    send = partial(self._ledger.add_flight_record, self._intent, self._node, path.name, path)
                    self.uploads.put(Upload(f"flight record {path.name}", send))

    def _is_new(self, path: Path) -> bool:
        name = str(path.relative_to(self._run.path))
        new = name not in self._sent
        self._sent.add(name)
        return new

    def tell_trouble(self, trouble: str, published: int) -> None:
        """Say once that checkpoints do not reach the store (`trouble`), or that they do again (empty).

        The run directory tells the launcher, the store everybody else. `published`: the newest step that reached it.
        """
        if bool(trouble) == bool(self._trouble):
            return
        reason = f"no checkpoint after step {published} could be published: {trouble}" if trouble else ""
        log.warning("%s: %s", self._intent.run_key, reason or "checkpoints are published again")
        self._trouble = trouble
        self._run.tell_trouble(reason)
        word = Trouble(node=self._node, seq=self._troubles, time=self._clock(), reason=reason, published=published)
        self._troubles += 1
        self.uploads.put(Upload("word of trouble", partial(self._ledger.append_trouble, self._intent, word)))
