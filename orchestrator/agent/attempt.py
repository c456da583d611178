"""One attempt on one node: stage in, train, leave.

Owns the order of the steps, and the reasons to end or to leave. `books` owns time and uploads, `publication` checkpoints. Invariants:
- The main loop never waits for the store: pieces, logs and checkpoints go through upload queues, and training goes on while the store does
  not answer.
- The agent reports `completed` or `drained` only if the attempt's last checkpoint is published, by all of its nodes.
- A node reports its own failure with its class, and another node's as `peer`: all reports together show which node caused the end.
- When the last piece is written, no process that the trainer started is running.
- The trainer is ended at once if another attempt counts, or if nothing has reached the store for so long that another attempt may count.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

from opensora import last_resort
from orchestrator.agent.books import Books
from orchestrator.agent.contents import DataTakenOut, with_places
from orchestrator.agent.ending import LONGEST_REASON, Ending, ending_of
from orchestrator.agent.events import Events, Task
from orchestrator.agent.publication import Publication, name_of
from orchestrator.agent.ranks_watch import RanksWatch
from orchestrator.agent.run_directory import FLIGHT_RECORDER, RunDirectory
from orchestrator.agent.stage_in import DamagedResume, fetch
from orchestrator.agent.standing import Standing
from orchestrator.agent.trainer_process import RENDEZVOUS, TrainerProcess, command, environment
from orchestrator.agent.upload_queue import Upload, is_disk_full
from orchestrator.errors import NotFound, Refused, Unreachable
from orchestrator.inputs import taken_out
from orchestrator.ledger.records import DamagedCheckpoint, Intent, Report
from orchestrator.ledger.store import Ledger
from orchestrator.local.attempt_lock import take_asked
from orchestrator.local.clock import AttemptClock, boottime
from orchestrator.local.processes import Process

log = logging.getLogger(__name__)

LEAVE_S = 3.0
"""How long a trainer may take to exit after it wrote its result. Its devices are held until then, and collectives often hang at exit."""
LOOK_S = 1.0
"""The longest time between two checks of heartbeats and checkpoints."""
HURRY_S = 5.0
"""How long an agent whose launcher died, or that was asked twice to leave, may take to upload what is finished."""
HEIR_S = 2.0
"""How long a trainer whose launcher died goes on while the agent checks whether another launcher has taken over."""
SAVE_AT, END_AT = 0.7, 0.9
"""Shares of `Patience.silent_s`. If an agent cannot reach the store, its trainer is asked to save after the first, and ended after the
second."""


@dataclass(frozen=True)
class Patience:
    """How long the agent waits for others, in seconds."""

    store_s: float
    """Wait this long at the end for a store that does not answer."""
    peer_s: float
    """Wait this long at the end for another node that writes nothing."""
    silent_s: float = 300.0
    """If nothing has reached the store for this long, other launches take this attempt for gone. In a pod the job's state tells."""
    unsaved_s: float = 1800.0
    """If a checkpoint could not be published and none was published for this long, the trainer is asked to save and leave."""


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
        """`bound` is the Unix time since which the devices are held."""
        self.ledger, self.intent, self.run, self.trainer, self.events = ledger, intent, run, trainer, events
        self._node, self._patience, self._clock = node, patience, clock or AttemptClock.here()
        self._bound = bound
        self._books = Books(ledger, intent, run, node=node, bound=bound, clock=self._clock, wake=events.wake)
        self._ranks = RanksWatch(intent, node)
        silence_s = max(patience.peer_s, 3 * intent.flush_s)  # a living node adds to its journal every `flush_s`
        self._checkpoints = Publication(ledger, intent, run, node, events.wake, silence_s, lambda: self.standing.over)
        self._next_flush = time.monotonic() + intent.flush_s
        self._draining = False
        self._said: float | None = None
        """When result.json was first seen to be written."""
        self._hurry: float | None = None
        self._orphaned_at: float | None = None
        """time.monotonic() when the launcher was found dead."""
        self._leave = ""
        """Why the trainer was asked to save and leave, if not by a signal."""
        events.tell_launchers_requests(partial(take_asked, run.path))
        self.standing = Standing(ledger, intent, node, events.wake, self._last_heard, patience.silent_s)

    def _last_heard(self) -> float | None:
        return max(filter(None, (self._books.uploads.delivered, self._checkpoints.uploads.delivered)), default=None)

    def live(self) -> Ending:
        """Run the whole attempt. When it returns, everything is published or given up, and the process only has to exit."""
        try:
            ending = self._stage_in() or self._train()
        except Exception as error:  # noqa: BLE001 - if the run directory or this program fails, the report must still say so
            ending = self._failed(error)
        log.info("%s: %s at step %s%s", self.intent.run_key, ending.class_, ending.step, f": {ending.reason}" if ending.reason else "")
        try:
            ending = self._deliver(ending)
        except Exception as error:  # noqa: BLE001 - likewise
            ending = self._failed(error)
        self._report(ending)
        return ending

    def _failed(self, error: Exception) -> Ending:
        """The ending if this node itself fails, and not its trainer. The trainer is killed."""
        self.trainer.kill(self._clock())
        if isinstance(error, OSError):
            return Ending("disk" if is_disk_full(error) else "code", str(error), self._books.step)
        log.error("the agent itself failed", exc_info=error)
        return Ending("code", f"the agent itself failed: {last_resort.said(error)}", self._books.step)

    # --- Stage in ------------------------------------------------------------------------------------------------------

    def _stage_in(self) -> Ending | None:
        """Fetch and verify the checkpoints. None means that the trainer may start."""
        self._books.enter("stage_in")
        task = Task(partial(fetch, self.ledger, self.intent, self.run, self._patience.store_s), self.events.wake)
        while not task.done:
            self._wait()
            if (cut := self._called_off()) is not None:
                return replace(cut, step=self._books.step)
            if self._asked_to_leave():
                return Ending("drained", f"{self._leave or 'asked to leave'}, before the trainer was started", self._books.step)
        try:
            task.check()
        except DamagedResume as error:
            return self._damaged_resume("agent", str(error))
        except DataTakenOut as error:
            return Ending("config", str(error))
        except (Refused, NotFound) as error:
            return Ending("parent", str(error))
        except Unreachable as error:
            return Ending("disk" if is_disk_full(error) else "store", str(error))
        return None

    def _damaged_resume(self, by: Literal["agent", "trainer"], reason: str) -> Ending:
        """Record in the ledger that the checkpoint is damaged, so that the driver lets the next attempt resume from an older one."""
        resume = self.intent.resume
        assert resume is not None
        damaged = DamagedCheckpoint(key=resume.key, step=resume.step, reason=reason, by=by)
        self._books.uploads.put(Upload("word of a damaged checkpoint", partial(self.ledger.write_damaged, self.intent, damaged)))
        return Ending("parent", f"step {resume.step}, from which this attempt was to go on: {reason}")

    def _refuses_resume(self, reason: str) -> bool:
        """Whether a trainer that refuses to start gives damaged files of its own checkpoint as the reason, and not that they are of another
        stage."""
        resume = self.intent.resume
        return resume is not None and f"checkpoint {self.run.checkpoint(resume.step)}" in reason and "is of another stage" not in reason

    # --- Train ---------------------------------------------------------------------------------------------------------

    def _train(self) -> Ending:
        self._books.enter("init")
        if self.intent.nodes > 1 and not self.intent.trainer and RENDEZVOUS not in os.environ:
            nodes = f"{self.intent.nodes} nodes cannot meet: {RENDEZVOUS} is not set"
            return Ending("config", f"{nodes}; start the agents where it is, as in the pods of a cluster")
        (self.run.path / FLIGHT_RECORDER).mkdir(exist_ok=True)
        variables = with_places(environment(self.intent, os.environ, self.run.path, self._node), self.run.path)
        self.trainer.start(command(self.intent, self.run.path, self._node), variables, log=self.run.log)
        self.events.listen_to(self.trainer)
        self._ranks.begin()
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
        """Why the trainer must be ended now. None means that it may go on."""
        if (off := self._called_off()) is not None:
            return off
        if self.events.asked_to_leave > 1:
            return Ending("signal", "asked a second time to leave, before the trainer had saved")
        if self._checkpoints.lost:
            return Ending("peer", f"nothing can be saved any more: {self._checkpoints.lost}")
        beats = self.run.heartbeats()
        if self._draining and self.intent.nodes > 1 and not beats:  # a node that waits for others does not check `drain`
            return Ending("drained", "asked to leave before the nodes had met")
        return self._ranks.misplaced(beats) or self._ranks.hung(beats)

    def _called_off(self) -> Ending | None:
        """Why this attempt must end at once, whatever its trainer does. None means that it may go on."""
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
        """Whether other launches may take this attempt for gone if nothing new from it reaches the store."""
        return not self.events.outlives_launcher

    def _asked_to_leave(self) -> bool:
        """Whether the trainer must save and leave. `_leave` then says why, unless the reason is a signal."""
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
        """Whether the launcher is dead and no other one has taken over. If the new launcher is on this host, the agent follows it from now
        on; if it is on another host, the attempt saves and leaves, so that the new launcher can start another one."""
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

    def _ended(self, cut: Ending | None) -> Ending:
        """Account for the trainer's time up to its end, and say how it ended. If it had saved before that, its own result counts."""
        ended = self.trainer.ended
        assert ended is not None
        self._books.read_lines(ended.time)
        result = self.run.result()
        said = ending_of(result, ended.status, self.run.output_tail().decode(errors="replace"), self._books.step)
        ending = self._judged_by_its_data(said) if cut is None or said.saved else replace(cut, step=self._books.step)
        working = "step" if self._books.timeline.trained else "init"
        if ending.class_ == "parent" and self._refuses_resume(ending.reason):
            ending = replace(self._damaged_resume("trainer", ending.reason), rank=ending.rank)
        if ending.class_ == "completed":
            self._books.timeline.book(working, min(ended.time, self._said_at(result)))
            self._books.timeline.book("publish", ended.time)
        else:
            tail = {"drained": "drain", "hang": "hang"}.get(ending.class_, "drain" if self._draining else working)
            self._books.timeline.book(tail, ended.time)
        if result is None:
            failure = {"status": "failed", "step": ending.step, "reason": ending.reason, "class": ending.class_, "rank": ending.rank}
            with contextlib.suppress(OSError):  # the report says it too
                self.run.write_result({**failure, "evaluation": {}})
        return ending

    def _judged_by_its_data(self, ending: Ending) -> Ending:
        """A source may have been taken out of the data set meanwhile: then clips are gone, or the model knows what it should not."""
        try:
            why = taken_out.said(self.ledger.store, self.intent)
        except (Unreachable, Refused):  # then it stays with what the trainer said
            return ending
        if why and ending.saved:
            return replace(ending, warnings=(*ending.warnings, f"it has trained on what is no longer wanted: {why}"))
        if why and ending.class_ in ("config", "data", "code"):
            return replace(ending, class_="config", reason=f"{ending.reason[: LONGEST_REASON // 2]}; {why}")
        return ending

    def _said_at(self, result: Mapping[str, Any] | None) -> float:
        """When the trainer wrote its result: the time in the result, or else when the agent first saw it."""
        said = result.get("time") if result is not None else None
        if isinstance(said, int | float):
            return self._clock.of_wall(said)
        return self._clock() - (time.monotonic() - self._said if self._said is not None else 0.0)

    # --- Leave ---------------------------------------------------------------------------------------------------------

    def _deliver(self, ending: Ending) -> Ending:
        """Upload what is finished. Returns the ending, changed if the checkpoint that it promises did not reach the store."""
        self._books.phase = "publish"
        if self.standing.over:
            self._checkpoints.uploads.drop()  # pieces of the journal are still uploaded, since the devices were held
        self._flush(final=True)
        self._checkpoints.close(ending.step if ending.saved and not self._as_resumed(ending) else None)
        while not (self._checkpoints.idle and self._books.uploads.idle) and not self._give_up():
            self._wait()
        if not ending.saved or ending.step is None or ending.step in self._checkpoints.published:
            return ending
        return self._undelivered(ending)

    def _as_resumed(self, ending: Ending) -> bool:
        """Whether the attempt drained at the step at which it began: then it has no new checkpoint to publish."""
        return ending.class_ == "drained" and self.intent.resume is not None and ending.step == self.intent.resume.step

    def _give_up(self) -> bool:
        now = time.monotonic()
        if self._hurry is None and (
            self._orphaned() or self.standing.over or self.events.asked_to_leave > 1 or self._books.uploads.disk_full
        ):
            self._hurry = now + HURRY_S
        if self._hurry is not None and now > self._hurry:
            return True
        failing = [self._books.uploads.failing_since, *self._checkpoints.failing_since]
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
        """Send the last piece of the journal, then the report. If the store does not answer, neither arrives, and only the exit code says
        how the attempt ended."""
        self._flush(final=True)
        content = {
            "class": ending.class_,
            "reason": ending.reason,
            "step": ending.step,
            "rank": ending.rank,
            "evaluation": dict(ending.evaluation),
            "warnings": (*ending.warnings, *self._books.undelivered_samples()),
            "started": self._bound,
            "ended": self._books.timeline.edge,
            "node": self._node,
        }
        report = Report.model_validate(content)
        self._books.uploads.put(Upload("report", partial(self.ledger.write_report, self.intent, report)))
        while not self._books.uploads.idle and not self._give_up():
            self.events.wait(LOOK_S)

    # --- Books ---------------------------------------------------------------------------------------------------------

    def _wait(self) -> set[int]:
        """Wait for an event, a second at most. Flush when it is time."""
        self.trainer.reap_strangers()
        ready = self.events.wait(min(self._next_flush - time.monotonic(), LOOK_S, self.intent.hang_timeout_s / 4))
        if time.monotonic() >= self._next_flush:
            self._flush()
        elif self._books.phase is None:
            self._checkpoints.offer()  # soon, because the trainer deletes old ones, and a killed attempt keeps only what is published
        self._books.tell_trouble(self._checkpoints.failing, max(self._checkpoints.published, default=0))
        return ready

    def _flush(self, *, final: bool = False) -> None:
        """Account for the time up to now, and give everything new to the upload queues."""
        self._next_flush = time.monotonic() + self.intent.flush_s
        self._books.flush(final=final)
        self._checkpoints.offer()
