"""The life of one attempt: stage in, train, leave.

Owns the order of things and the books. Invariants:
- The main loop never waits for the store: pieces, logs and checkpoints go through couriers, and training goes on while it is away.
- `completed` and `drained` are said only of an attempt whose last checkpoint is published, by all of its nodes.
- A node's own failure is reported as what it is, and another's as `peer`: which node is to blame is read from all reports.
- Nothing the trainer started is running when the last piece is written.
- Where another attempt counts, or nothing has reached the store for so long that another may, the trainer is ended at once.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from orchestrator.agent.contents import bring_in, with_places
from orchestrator.agent.courier import Courier, Parcel, is_disk_full
from orchestrator.agent.ending import Ending, ending_of
from orchestrator.agent.events import Events, Task
from orchestrator.agent.publication import Publication, name_of
from orchestrator.agent.run_directory import FLIGHT_RECORDER, SETTLED_S, Heartbeat, RunDirectory
from orchestrator.agent.standing import Standing
from orchestrator.agent.timeline import Timeline
from orchestrator.agent.trainer_process import JOIN_S, RENDEZVOUS, TrainerProcess, command, environment
from orchestrator.claim import take_asked
from orchestrator.clock import PARTED_S, AttemptClock, boottime
from orchestrator.errors import CorruptCheckpoint, NotFound, Refused, Unreachable
from orchestrator.history import TOTALS_EVERY, NodeFold
from orchestrator.ledger import Ledger
from orchestrator.processes import Process
from orchestrator.records import DamagedCheckpoint, Intent, JournalPiece, Report, Trouble

log = logging.getLogger(__name__)

LEAVE_S = 3.0
"""What a trainer has to leave after its last word. Its devices are held meanwhile, and leaving is where collectives like to hang."""
LOOK_S = 1.0
"""Longest time between two looks at heartbeats and checkpoints."""
HURRY_S = 5.0
"""What is left to an agent whose launcher died, or that was asked twice to leave, to hand over what is finished."""
HEIR_S = 2.0
"""How long a trainer whose launcher died goes on while the agent looks whether another launcher has taken over."""
SAVE_AT, END_AT = 0.7, 0.9
"""Parts of `Patience.silent_s` after which the trainer of an agent that cannot reach the store is asked to save, and ended."""
LOG_PIECE_BYTES, LOG_BYTES = 1 << 18, 8 << 20
"""Of the trainer's output, at most so much is sent a piece and an attempt; of a longer one, the end."""


FLIGHT_BYTES = 64 << 20
"""Of what the communication library writes about collectives that did not end, so much is sent."""


@dataclass(frozen=True)
class Patience:
    """How long others are waited for at the end, in seconds."""

    store_s: float
    """A store that does not answer."""
    peer_s: float
    """Another node that says nothing."""
    silent_s: float = 300.0
    """Once nothing has reached the store for so long, other launches take this attempt for gone. In a pod nobody does: its job tells."""
    unsaved_s: float = 1800.0
    """Since the first checkpoint that could not be published, with none published since: then the trainer is asked to save and leave."""


class Attempt:
    def __init__(
        self,
        ledger: Ledger,
        intent: Intent,
        run: RunDirectory,
        trainer: TrainerProcess,
        events: Events,
        *,
        node: int,
        bound: float,
        patience: Patience,
        clock: AttemptClock | None = None,
    ) -> None:
        """`bound`: Unix time since which the devices are held."""
        self.ledger, self.intent, self.run, self.trainer, self.events = ledger, intent, run, trainer, events
        self._node, self._patience, self._clock = node, patience, clock or AttemptClock.here()
        self._bound = bound
        self._timeline = Timeline(bound, node=node, devices=intent.devices_per_node, every_steps=intent.config.checkpoint.every_steps)
        self._sums = NodeFold(node, intent.resume.step if intent.resume else 0, intent.config.checkpoint.every_steps)
        """Of the pieces that are in the store."""
        self._small = Courier("journal", events.wake, waits_for_space=True)
        silence_s = max(patience.peer_s, 3 * intent.flush_s)  # a node that lives adds to its journal that often
        self._checkpoints = Publication(ledger, intent, run, node, events.wake, silence_s)
        self._next_flush = time.monotonic() + intent.flush_s
        self._phase: str | None = "preflight"
        """Category of whatever is not booked yet; none while the trainer's own words decide."""
        self._sent: set[str] = set()
        """Samples and flight records, by their path in the run directory."""
        self._flight_bytes = 0
        self._step = intent.resume.step if intent.resume else None
        self._logged, self._log_pieces = 0, 0
        self._draining = False
        self._said: float | None = None
        """When result.json was first seen to be written."""
        self._beats: list[Heartbeat] = []
        self._heard = time.monotonic()
        """When a heartbeat was last seen to change. Not by the heartbeats' own clock, which may be set."""
        self._hurry: float | None = None
        self._orphaned_at: float | None = None
        """time.monotonic() when the launcher was found dead."""
        self._leave = ""
        """Why the trainer was asked to save and leave, if not by a signal."""
        self._troubles = 0
        self._trouble = ""
        events.tell_launchers_requests(partial(take_asked, run.path))
        self.standing = Standing(ledger, intent, node, events.wake, self._last_heard, patience.silent_s)

    def _last_heard(self) -> float | None:
        return max(filter(None, (self._small.delivered, self._checkpoints.courier.delivered)), default=None)

    def live(self) -> Ending:
        """The whole life. When it returns, everything is published or given up, and the process has only to leave."""
        try:
            ending = self._stage_in() or self._train()
        except OSError as error:  # the run directory itself fails
            self.trainer.kill(self._clock())
            ending = Ending("disk" if is_disk_full(error) else "code", str(error), self._step)
        log.info("%s: %s at step %s%s", self.intent.run_key, ending.class_, ending.step, f": {ending.reason}" if ending.reason else "")
        ending = self._deliver(ending)
        self._report(ending)
        return ending

    # --- Stage in ------------------------------------------------------------------------------------------------------

    def _stage_in(self) -> Ending | None:
        """Bring the checkpoints in, verified. None: the trainer may start."""
        self._book_phase("stage_in")
        task = Task(self._fetch, self.events.wake)
        while not task.done:
            self._wait()
            if (cut := self._called_off()) is not None:
                return replace(cut, step=self._step)
            if self._asked_to_leave():
                return Ending("drained", f"{self._leave or 'asked to leave'}, before the trainer was started", self._step)
        try:
            task.check()
        except _DamagedResume as error:
            return self._damaged_resume("agent", str(error))
        except (Refused, NotFound) as error:
            return Ending("parent", str(error))
        except Unreachable as error:
            return Ending("disk" if is_disk_full(error) else "store", str(error))
        return None

    def _fetch(self) -> None:
        """Raises Refused, NotFound, Unreachable, OSError."""
        intent, run = self.intent, self.run
        run.write_stage(intent.config)
        run.checkpoints.mkdir(exist_ok=True)
        bring = partial(self.ledger.fetch, patience_s=self._patience.store_s)
        self._patiently(self._fetch_contents)
        if intent.parent is not None:
            self._patiently(partial(bring, intent.parent.key, intent.parent.manifest_digest, run.parent))
        if intent.resume is not None:
            target = run.checkpoint(intent.resume.step)
            try:
                self._patiently(partial(bring, intent.resume.key, intent.resume.manifest_digest, target))
            except (CorruptCheckpoint, NotFound) as error:
                raise _DamagedResume(str(error)) from error

    def _damaged_resume(self, by: Literal["agent", "trainer"], reason: str) -> Ending:
        """Another attempt goes on from an older checkpoint: whoever drives finds in the ledger which one is not to be used."""
        resume = self.intent.resume
        assert resume is not None
        damaged = DamagedCheckpoint(key=resume.key, step=resume.step, reason=reason, by=by)
        self._small.put(Parcel("word of a damaged checkpoint", partial(self.ledger.write_damaged, self.intent, damaged)))
        return Ending("parent", f"step {resume.step}, from which this attempt was to go on: {reason}")

    def _refuses_resume(self, reason: str) -> bool:
        """Whether a trainer that refuses what it starts from means the files of its own checkpoint, and not that it fits no longer."""
        resume = self.intent.resume
        return resume is not None and f"checkpoint {self.run.checkpoint(resume.step)}" in reason and "is of another stage" not in reason

    def _fetch_contents(self) -> None:
        terms = self.ledger.terms(self.intent.stage, self.intent.inputs, self.intent.attempt)
        if terms is not None:  # a driver of 0.1.0 writes none
            bring_in(self.ledger.store, self.intent, terms.contents, self.run.path)

    def _patiently(self, fetch: Callable[[], object]) -> None:
        """Patience counts from the first failure: a checkpoint of hundreds of gigabytes is on its way for longer."""
        deadline: float | None = None
        while True:
            try:
                fetch()
                return
            except Unreachable as error:
                now = time.monotonic()
                deadline = now + self._patience.store_s if deadline is None else deadline
                if now > deadline or is_disk_full(error):
                    raise
                log.warning("%s; again in 1 s", error)
                time.sleep(1.0)

    # --- Train ---------------------------------------------------------------------------------------------------------

    def _train(self) -> Ending:
        self._book_phase("init")
        if self.intent.nodes > 1 and not self.intent.trainer and RENDEZVOUS not in os.environ:
            nodes = f"{self.intent.nodes} nodes cannot meet: {RENDEZVOUS} is not set"
            return Ending("config", f"{nodes}; start the agents where it is, as the training operator does")
        (self.run.path / FLIGHT_RECORDER).mkdir(exist_ok=True)
        variables = with_places(environment(self.intent, os.environ, self.run.path), self.run.path)
        self.trainer.start(command(self.intent, self.run.path, self._node), variables, log=self.run.log)
        self.events.listen_to(self.trainer)
        self._heard = time.monotonic()
        cut: Ending | None = None
        while self.trainer.ended is None:
            ready = self._wait()
            if self.trainer.fileno() in ready:
                self.trainer.listen(self._clock())
                continue
            if self._asked_to_leave() and not self._draining:
                self._draining = True
                self.run.ask_drain()
                self._checkpoints.watch()
            cut = self._cut()
            if cut is not None or self._has_had_its_say():
                self.trainer.kill(self._clock())
        self.events.forget(self.trainer)
        return self._ended(cut)

    def _cut(self) -> Ending | None:
        """Why the trainer must be ended now, if it must."""
        if (off := self._called_off()) is not None:
            return off
        if self.events.asked_to_leave > 1:
            return Ending("signal", "asked a second time to leave, before the trainer had saved")
        if self._checkpoints.lost:
            return Ending("peer", f"nothing can be saved any more: {self._checkpoints.lost}")
        beats = self.run.heartbeats()
        if self._draining and self.intent.nodes > 1 and not beats:  # a node that waits for others does not look at `drain`
            return Ending("drained", "asked to leave before the nodes had met")
        return self._misplaced(beats) or self._hung(beats)

    def _called_off(self) -> Ending | None:
        """Why this attempt must end at once, whatever its trainer does."""
        if self._orphaned():
            return Ending("lost", "the launcher died")
        if self.standing.over:
            return Ending("lost", f"{self.standing.over}; this one ends")
        if self.standing.asked == "now":
            return Ending("lost", "ended at once, as another launch asked")
        if self._fences and (silent_s := boottime() - self.standing.heard) > END_AT * self._patience.silent_s:
            return Ending(
                "store", f"nothing has reached the store for {silent_s:.0f} s, and soon another attempt may take this one's place"
            )
        return None

    @property
    def _fences(self) -> bool:
        """Whether others may take this attempt for gone because they hear nothing of it."""
        return not self.events.outlives_launcher

    def _asked_to_leave(self) -> bool:
        """By whom or what, for people, is in `_leave` where no signal said so."""
        if not self._leave and self.standing.asked == "save":
            self._leave = "asked to leave by the launch that drives now"
        if not self._leave and self._fences and boottime() - self.standing.heard > SAVE_AT * self._patience.silent_s:
            self._leave = f"nothing reached the store for {SAVE_AT * self._patience.silent_s:g} s"
        since = self._checkpoints.unsaved_since
        if not self._leave and since is not None and time.monotonic() - since > self._patience.unsaved_s:
            self._leave = f"no checkpoint could be published for {self._patience.unsaved_s:g} s"
        if self._leave and not self._draining:
            log.warning("%s: the trainer is asked to save and leave: %s", self.intent.run_key, self._leave)
        return bool(self.events.asked_to_leave or self._leave)

    def _orphaned(self) -> bool:
        """Whether the launcher is dead and no other one has taken over. One of this host is followed from now on; to leave the attempt to
        one that is elsewhere, it saves and leaves."""
        if not self.events.launcher_died:
            return False
        now = time.monotonic()
        if self._orphaned_at is None:
            self._orphaned_at = now
            self.standing.look()
        if self.standing.looked < self._orphaned_at:
            return now - self._orphaned_at > HEIR_S
        heir = self.standing.heir
        if heir is None:
            return True
        self._orphaned_at = None
        if self.events.follow(Process(heir.host, heir.pid, heir.started, heir.boot)):
            log.warning(
                "%s: its launcher is gone; follows %s (epoch %d), which has taken over", self.intent.run_key, heir.holder, heir.epoch
            )
        else:
            self._leave = f"its launcher is gone, and {heir.holder} drives from elsewhere"
            self.events.outlive_launcher()
        return False

    def _has_had_its_say(self) -> bool:
        if self._said is None and self.run.result() is not None:
            self._said = time.monotonic()
        return self._said is not None and time.monotonic() - self._said > LEAVE_S

    def _misplaced(self, beats: list[Heartbeat]) -> Ending | None:
        """Global rank 0 draws, judges and keeps the metrics, and node 0 publishes them: they must be the same."""
        if self._node or not beats or beats[0].rank < self.intent.devices_per_node:
            return None
        fact = f"torchrun gave rank {beats[0].rank} to node 0, which must have rank 0"
        return Ending("config", f"{fact}; it orders nodes by host name (PET_LOCAL_ADDR), so the first node's must sort first")

    def _hung(self, beats: list[Heartbeat]) -> Ending | None:
        """No rank of this node has shown life for too long. While one works alone, as at the end of a stage, the others may be silent."""
        if beats != self._beats:
            self._beats, self._heard = beats, time.monotonic()
        silent_s = time.monotonic() - self._heard
        allowed_s = self.intent.hang_timeout_s + (JOIN_S if self.intent.nodes > 1 and not beats else 0)
        if silent_s < allowed_s:
            return None
        ranks, where = _who_stands(beats, self.intent.devices_per_node, self._node)
        names = f"rank {ranks[0]} stands" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))} stand"
        reason = f"no heartbeat for {silent_s:.1f} s (allowed: {allowed_s:g} s); {names if ranks else 'all ranks stand'} {where}"
        return Ending("hang", reason, rank=ranks[0] if len(ranks) == 1 else None)

    def _ended(self, cut: Ending | None) -> Ending:
        """Close the trainer's books, and say how it ended. What it managed to say before it was ended counts."""
        ended = self.trainer.ended
        assert ended is not None
        self._read_lines(ended.time)
        result = self.run.result()
        said = ending_of(result, ended.status, self.run.output_tail().decode(errors="replace"), self._step)
        ending = said if cut is None or said.saved else replace(cut, step=self._step)
        working = "step" if self._timeline.trained else "init"
        if ending.class_ == "parent" and self._refuses_resume(ending.reason):
            ending = replace(self._damaged_resume("trainer", ending.reason), rank=ending.rank)
        if ending.class_ == "completed":
            said_at = self._clock.of_wall((self.run.path / "result.json").stat().st_mtime)
            self._timeline.book(working, min(ended.time, said_at))
            self._timeline.book("publish", ended.time)
        else:
            tail = {"drained": "drain", "hang": "hang"}.get(ending.class_, "drain" if self._draining else working)
            self._timeline.book(tail, ended.time)
        if result is None:
            failure = {"status": "failed", "step": ending.step, "reason": ending.reason, "class": ending.class_, "rank": ending.rank}
            with contextlib.suppress(OSError):  # the report says it too
                self.run.write_result({**failure, "evaluation": {}})
        return ending

    # --- Leave ---------------------------------------------------------------------------------------------------------

    def _deliver(self, ending: Ending) -> Ending:
        """Hand over what is finished; the ending, corrected where the store did not take what it promises."""
        self._phase = "publish"
        self._flush(final=True)
        if self.standing.over:
            self._checkpoints.courier.drop()  # pieces of the journal still go: the devices were held
        self._checkpoints.close(ending.step if ending.saved and not self._as_resumed(ending) else None)
        while not (self._checkpoints.idle and self._small.idle) and not self._give_up():
            self._wait()
        if not ending.saved or ending.step is None or ending.step in self._checkpoints.published:
            return ending
        return self._undelivered(ending)

    def _as_resumed(self, ending: Ending) -> bool:
        """Whether it ended where it began, so that no other node has anything to do for what it promises."""
        return ending.class_ == "drained" and self.intent.resume is not None and ending.step == self.intent.resume.step

    def _give_up(self) -> bool:
        now = time.monotonic()
        if self._hurry is None and (self._orphaned() or self.standing.over or self.events.asked_to_leave > 1 or self._small.disk_full):
            self._hurry = now + HURRY_S
        if self._hurry is not None and now > self._hurry:
            return True
        failing = [self._small.failing_since, *self._checkpoints.failing_since]
        return any(now - since > self._patience.store_s for since in failing if since is not None)

    def _undelivered(self, ending: Ending) -> Ending:
        name = name_of(ending.step)
        refused = self._checkpoints.refusal(ending.step)
        lies = f"; it lies in {self.run.checkpoint(ending.step or 0)}"
        if refused is not None:
            return Ending("disk" if refused.disk_full else "store", f"{name} could not be published: {refused.reason}{lies}", ending.step)
        if self._checkpoints.trouble:
            trouble = f"{name} could not be published in {self._patience.store_s:g} s: {self._checkpoints.trouble}{lies}"
            return Ending("store", trouble, ending.step)
        if self._checkpoints.lost:
            return Ending("peer", f"{name} was not published: {self._checkpoints.lost}", ending.step)
        if self.events.launcher_died:
            return Ending("lost", f"the launcher died before {name} was published", ending.step)
        if self.events.asked_to_leave > 1:
            return Ending("signal", f"asked a second time to leave, before {name} was published", ending.step)
        return Ending(
            "code", f"result.json says {ending.class_} at step {ending.step}, but there is no whole {self.run.checkpoint(ending.step or 0)}"
        )

    def _report(self, ending: Ending) -> None:
        """The last piece of the journal, then the last word. Both in vain if the store is away: the exit code says it too."""
        self._flush(final=True)
        content = {
            "class": ending.class_,
            "reason": ending.reason,
            "step": ending.step,
            "rank": ending.rank,
            "evaluation": dict(ending.evaluation),
            "warnings": ending.warnings,
            "started": self._bound,
            "ended": self._timeline.edge,
            "node": self._node,
        }
        report = Report.model_validate(content)
        self._small.put(Parcel("report", partial(self.ledger.write_report, self.intent, report)))
        while not self._small.idle and not self._give_up():
            self.events.wait(LOOK_S)

    # --- Books ---------------------------------------------------------------------------------------------------------

    def _book_phase(self, phase: str) -> None:
        """The phase before ends now."""
        assert self._phase is not None
        self._timeline.book(self._phase, self._clock())
        self._phase = phase

    def _wait(self) -> set[int]:
        """Wait for something to happen, a second at most; flush when it is time."""
        self.trainer.reap_strangers()
        ready = self.events.wait(min(self._next_flush - time.monotonic(), LOOK_S, self.intent.hang_timeout_s / 4))
        if time.monotonic() >= self._next_flush:
            self._flush()
        elif self._phase is None:
            self._checkpoints.offer()  # the trainer deletes old ones, and a killed attempt keeps what is published
        self._tell_trouble()
        return ready

    def _tell_trouble(self) -> None:
        """Checkpoints do not reach the store, or do again: in the run directory for the launcher, in the store for everybody else."""
        trouble = self._checkpoints.failing
        if bool(trouble) == bool(self._trouble):
            return
        published = max(self._checkpoints.published, default=0)
        reason = f"no checkpoint after step {published} could be published: {trouble}" if trouble else ""
        log.warning("%s: %s", self.intent.run_key, reason or "checkpoints are published again")
        self._trouble = trouble
        self.run.tell_trouble(reason)
        word = Trouble(node=self._node, seq=self._troubles, time=self._clock(), reason=reason, published=published)
        self._troubles += 1
        self._small.put(Parcel("word of trouble", partial(self.ledger.append_trouble, self.intent, word)))

    def _flush(self, *, final: bool = False) -> None:
        """Book what is known up to now, and hand everything new to the couriers."""
        now = self._clock()
        self._next_flush = time.monotonic() + self.intent.flush_s
        if news := self._clock.news():
            log.warning("%s: %s", self.intent.run_key, news)
            self._ship(f"osctl: {news}\n".encode())
        if self._phase in ("init", None):
            beats = self.run.heartbeats()  # before the lines: a beat then never speaks of a time before an unread line
            self._read_lines(now)
            self._book_evidence(beats, now)
        else:
            self._timeline.book(self._phase, now)
        for piece in self._timeline.take():
            self._small.put(Parcel(f"journal piece {piece.seq}", partial(self._append, piece)))
        self._ship_output(final=final)
        self._offer_files(time.time() - (0 if final else SETTLED_S))
        self._checkpoints.offer()

    def _append(self, piece: JournalPiece) -> None:
        """In the courier's thread, in order; again where the store did not answer."""
        self.ledger.append_journal(self.intent, piece)
        self._sums.add(piece)
        if self._sums.seq % TOTALS_EVERY == TOTALS_EVERY - 1:
            self.ledger.append_totals(self.intent, self._sums.totals())

    def _read_lines(self, now: float) -> None:
        for line in map(self._on_our_clock, self.run.new_lines()):
            self._phase = None
            self._timeline.line(line, now)
            if "step" in line:
                self._step = line["step"]

    def _book_evidence(self, beats: list[Heartbeat], now: float) -> None:
        """Between its lines, a trainer is believed in two things: it starts up until its first line, and it judges while it says so."""
        if self._phase == "init":
            self._timeline.book("init", now)
        elif beats and beats[0].rank % self.intent.devices_per_node == 0 and beats[0].phase == "evaluate":
            self._timeline.book("evaluate", self._clock.of_wall(beats[0].time))

    def _on_our_clock(self, line: dict[str, Any]) -> dict[str, Any]:
        """A trainer reads the wall clock. Where that was set, its times are moved; one of before the step is cut to what is booked."""
        parted = self._clock.parted()
        if abs(parted) < PARTED_S:
            return line
        moved = {name: line[name] - parted for name in ("time", "start", "end") if isinstance(line.get(name), int | float)}
        return line | moved

    def _ship_output(self, *, final: bool) -> None:
        left = LOG_BYTES - self._logged
        while left > 0 and (data := self.run.new_output(min(LOG_PIECE_BYTES, left), final=final)):
            left -= len(data)
            self._ship(data)
        if final:
            unread, end = self.run.rest_of_output()
            if unread:
                self._ship(b"\n[%d bytes left out]\n" % (unread - len(end)) + end)

    def _ship(self, data: bytes) -> None:
        seq, self._log_pieces, self._logged = self._log_pieces, self._log_pieces + 1, self._logged + len(data)
        self._small.put(Parcel(f"log piece {seq}", partial(self.ledger.append_log, self.intent, self._node, seq, data, self._clock())))

    def _offer_files(self, before: float) -> None:
        """Samples, of node 0 alone as the trainer draws them there, and flight records."""
        for path in self.run.settled_samples(before) if self._node == 0 else ():
            if self._is_new(path):
                self._small.put(Parcel(f"sample {path.name}", partial(self.ledger.add_sample, self.intent, path.name, path)))
        for path in self.run.settled_flight_records(before):
            if self._is_new(path):
                self._flight_bytes += path.stat().st_size
                if self._flight_bytes <= FLIGHT_BYTES:
                    send = partial(self.ledger.add_flight_record, self.intent, self._node, path.name, path)
                    self._small.put(Parcel(f"flight record {path.name}", send))

    def _is_new(self, path: Path) -> bool:
        name = str(path.relative_to(self.run.path))
        new = name not in self._sent
        self._sent.add(name)
        return new


def _who_stands(beats: list[Heartbeat], devices: int, node: int) -> tuple[list[int], str]:
    """The ranks of a node that hold the others up, and where: those that never spoke, else those with the lowest step.

    Inside a collective all ranks stand at the same step; then all are named, since their heartbeats cannot tell who is to blame.
    Which ranks a node has is for torchrun to say: none are named while all are silent, but node 0 always has the first.
    """
    if not beats and node:
        return [], "before their first heartbeat"
    lowest = beats[0].rank // devices * devices if beats else 0
    silent = [rank for rank in range(lowest, lowest + devices) if rank not in {beat.rank for beat in beats}]
    if silent:
        return silent, "before their first heartbeat"
    step = min(beat.step for beat in beats)
    behind = [beat for beat in beats if beat.step == step]
    return [beat.rank for beat in behind], f"at step {step} in phase {'/'.join(sorted({beat.phase for beat in behind}))}"


class _DamagedResume(Exception):
    """What the attempt was to go on from is not what was published."""
