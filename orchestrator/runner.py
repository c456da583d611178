"""The driver: observe, decide, act, until there is nothing left to do.

Owns the lease while it runs, and every record that a driver writes: intents, outcomes, COMMITTED, events. What to do is decided in
`orchestrator.decide`; how records lie in a store is known to `orchestrator.ledger`; how a process or job is started, to the backend.

It keeps nothing that it could not read again. Every effect is written down before it is done (an intent before a submit) or can be
repeated (put-if-absent), so a driver may be killed after any single one, and the next one carries on from what it observes. Before
each effect the lease is checked, and renewed when a third of its life is over; a driver that finds it taken stops at once.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import logging
import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NoReturn, Protocol

from opensora import identity
from orchestrator import inputs as stage_inputs
from orchestrator import launched
from orchestrator.checkpoints import Place
from orchestrator.clock import boottime
from orchestrator.config import Pipeline, Stage
from orchestrator.cost import NodeTime
from orchestrator.decide import (
    Action,
    Attempt,
    Checkpoint,
    CloseAttempt,
    Commit,
    Drain,
    Finish,
    Kill,
    Observed,
    StageView,
    StartAttempt,
    Wait,
    decide,
    parentless,
)
from orchestrator.elsewhere import Elsewhere
from orchestrator.errors import CorruptCheckpoint, Refused, StoreConflict, Unreachable, UsageError
from orchestrator.history import History
from orchestrator.lease import LeaseHandle
from orchestrator.ledger import Ledger
from orchestrator.ports import Backend, Life
from orchestrator.prices import Prices, load_prices, price_of
from orchestrator.records import (
    EXIT_CODES,
    NO_NEWER,
    UNUSED,
    Asked,
    Committed,
    DamagedCheckpoint,
    Event,
    Intent,
    Manifest,
    Outcome,
    ParentRef,
    Report,
    ResumeRef,
    Terms,
    run_key,
)

log = logging.getLogger(__name__)

LEASE_TTL_S = 15.0

POLL_S = {"local": 0.05, "kubernetes": 0.1}
"""Seconds between two looks at the attempts that live. Local: one read of /proc; kubernetes: of a picture that a watch keeps.
It bounds the idle time between two stages."""

QUIET_S = {"local": 0.0, "kubernetes": 2.0}
"""Seconds that something must be waited for before it is written down. A gang that finds room is told of several lacks on its way."""

SUBMITTED, ASKED, KILLED = "submitted", "asked to save and leave", "killed"
"""Beginnings of events from which a driver learns what an earlier one did to an attempt whose job is gone."""

CANCEL_POLL_S = 1.0
"""Seconds between two looks for a `cancel` in the ledger; on S3 each is a request."""

TROUBLE_POLL_S = 5.0
"""Seconds between two looks for an agent that cannot publish; on S3 each is a request for each attempt that lives."""

UNREACHABLE_POLL_S = 2.0
"""Seconds before a store or cluster that did not answer is asked again. Attempts go on meanwhile."""

SUMMARY_TRIES = 5
"""Of reading what came of the stages, once the run is over."""

HASH_AT_MOST_BYTES = 64 * 2**20
"""What an attempt starts from is hashed before it is intended where it lies in a folder, up to this size (0.2 s). Beyond that its agent
is the first to read every byte, as it does anyway."""


class Clock(Protocol):
    def now(self) -> float:
        """Unix time in seconds."""

    def elapsed(self) -> float:
        """Seconds of a clock that nobody sets, and that goes on while the machine sleeps."""

    def sleep(self, seconds: float) -> None: ...


class SystemClock:
    def now(self) -> float:
        return time.time()

    def elapsed(self) -> float:
        return boottime()

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)


@dataclass(frozen=True)
class StageResult:
    name: str
    state: Literal["committed", "failed", "open", "blocked", "not asked for"]
    inputs: str | None
    attempts: int
    step: int
    """Step of the newest published checkpoint; of the committed one where there is one."""
    weights_digest: str | None
    reason: str


@dataclass(frozen=True)
class Result:
    """How a launch ended."""

    status: Literal["succeeded", "failed", "cancelled", "suspended"]
    exit_code: int
    """0 succeeded · 3 failed · 4 refused (a parent that is not what was committed) · 130 stopped."""
    reason: str
    stages: tuple[StageResult, ...]


class Detached(Exception):
    """A driver that was asked to leave its attempts running has left, and given its lease back."""


class Runner:
    """Drives one pipeline. One instance, one launch."""

    def __init__(
        self,
        pipeline: Pipeline,
        ledger: Ledger,
        backend: Backend,
        clock: Clock | None = None,
        on_event: Callable[[Event], None] = lambda event: None,
        *,
        lease_ttl_s: float = LEASE_TTL_S,
        prices: Prices | None = None,
    ):
        """`prices`: what devices cost where this pipeline runs, written down with each attempt; none: the shipped list, at its cluster."""
        self.pipeline, self.ledger, self.backend = pipeline, ledger, backend
        self.prices = prices if prices is not None else load_prices().at(pipeline.cluster)
        self.clock: Clock = clock or SystemClock()
        self.on_event = on_event
        self.lease_ttl_s = lease_ttl_s
        self._stop: Literal["drain", "kill"] | None = None
        self._cancelled = False
        self.detached = False
        """Whether it was asked to leave."""
        self._lease: _HeldLease
        self._elsewhere: Elsewhere
        self._finished: dict[str, Attempt] = {}
        """Attempts with an outcome, by run key. Their records never change again, so they are read once."""
        self._results: dict[tuple[str, str], Committed] = {}
        self._named: dict[str, str] = {}
        """`<inputs>` by stage."""
        self._strays: dict[str, set[tuple[str, int]]] | None = None
        """By stage: (inputs, number) of open attempts of other inputs. Only a driver makes attempts, so they are listed once."""
        self._alive: dict[str, Attempt] = {}
        """Those that were seen alive at the last look, by run key."""
        self._draining: set[str] = set()
        self._told: set[str] = set()
        """Run keys of attempts elsewhere that were asked to leave without saving."""
        self._damaged: dict[str, DamagedCheckpoint | None] = {}
        """What attempts were to go on from and found damaged, by run key; of those whose agent says `parent`."""
        self._trouble: dict[str, tuple[float, str]] = {}
        """By run key, why checkpoints do not reach the store, as its agent wrote into the ledger, and when that was read."""
        self._broken: set[str] = set()
        """Keys of manifests that did not verify."""
        self._refused: dict[str, str] = {}
        self._unreadable: set[str] = set()
        """Stages whose COMMITTED.json is there and cannot be read. They are among the refused."""
        self._given_up: dict[str, str] = {}
        """Why attempts were killed before they started, by run key."""
        self._submitted: set[tuple[int, str, int]] = set()
        """(epoch, stage, number) of attempts that an earlier driver has surely submitted."""
        self._ended_by_us: dict[tuple[str, int], int] = {}
        """(stage, number) of attempts that a driver has asked to end, with the last epoch in which it did."""
        self._adopted: set[str] = set()
        """Run keys of attempts of earlier drivers that this one has found alive."""
        self._announced: set[tuple[str, str]] = set()
        self._unforgotten: list[str] = []
        """Run keys that have an outcome, and perhaps something lying around."""
        self._said = ""
        self._heard: tuple[int, int] | None = None
        self._listened = 0.0

    # --- For the caller ------------------------------------------------------------------------------------------------------------

    def run(self, targets: Sequence[str] | None = None) -> Result:
        """Run the stages named, or all, until they are committed or cannot be.

        Raises:
            UsageError: an unknown stage.
            Refused: a parent that is neither committed nor asked for; another driver holds the lease, or took it over.
            Unreachable: the store did not answer at the start; nothing was done.
            Detached: `detach` was called.
        """
        launched.check_ours(self.ledger)
        wanted = self._wanted(targets)
        lease = self.ledger.acquire(self.clock.now(), self.lease_ttl_s)
        try:
            with _HeldLease(lease, self.clock, self.lease_ttl_s, self.pipeline.name) as self._lease:
                self._heard = (lease.epoch, -1)
                self._elsewhere = Elsewhere(self.ledger, lease.before, self.clock.elapsed)
                self.ledger.add_revision(self.pipeline.model_dump(mode="json"), self.clock.now())
                self._event("launched", detail=",".join(stage.name for stage in self.pipeline.stages if stage.name in wanted))
                self._repair_events()
                self._remember()
                try:
                    finish = self._drive(wanted)
                except Refused as error:
                    with contextlib.suppress(Refused, Unreachable):  # where the lease is lost, the words are another driver's
                        self._event("ended", detail=f"failed: {error}")
                    raise
                self._event("ended", detail=f"{finish.status}: {finish.reason}")
                return Result(finish.status, finish.exit_code, finish.reason, self._summed_up(wanted, finish))
        finally:
            lease.release()

    def drain(self) -> None:
        """Save and stop. Only sets a flag, so a signal handler may call it."""
        self._stop = self._stop or "drain"

    def kill(self) -> None:
        """Stop without saving. Only sets a flag, so a signal handler may call it."""
        self._stop = "kill"

    def detach(self) -> None:
        """Leave everything as it is, for another driver. Only sets a flag, so a signal handler may call it."""
        self.detached = True

    # --- The loop ------------------------------------------------------------------------------------------------------------------

    def _drive(self, wanted: frozenset[str]) -> Finish:
        said = ""
        while True:
            try:
                self._lease.check()
                if self.detached:
                    self._leave()
                self._tidy()
                observed = self._observe(wanted)
                for action in decide(self.pipeline, observed, self.clock.now()):
                    if isinstance(action, Finish):
                        return action
                    if isinstance(action, Wait):
                        self._wait(observed, action)
                    else:
                        self._lease.check()
                        self._act(action)
                said = ""
            except Unreachable as error:
                troubles = [life.trouble for key in self._alive if (life := self.backend.observe(key)).trouble]
                if said != (said := "; ".join([str(error), *troubles])):
                    log.warning("%s; asking again every %.0f s", said, UNREACHABLE_POLL_S)
                with contextlib.suppress(Unreachable):  # where the store is away, nobody can be told
                    self._say(str(error))
                if self._stop is not None:
                    self._stop_unwritten(error)
                self.clock.sleep(UNREACHABLE_POLL_S)

    def _stop_unwritten(self, error: Unreachable) -> None:
        """A person wants a stop, and the store takes no word of it: attempts are asked all the same, and once they are gone so is this.

        The next launch finds how they ended. Raises Unreachable.
        """
        ask = self.backend.kill if self._stop == "kill" else self.backend.drain
        living = []
        for key, attempt in self._alive.items():
            if attempt.life.where or self.backend.observe(key).state != "running":
                continue
            living.append(key)
            if self._stop == "kill" or key not in self._draining:
                self._draining.add(key)
                ask(key)
        if not living and self._alive:
            troubles = [life.trouble for key in self._alive if (life := self.backend.observe(key)).trouble]
            why = "; ".join([str(error), *troubles])
            raise Unreachable(f"stopped, and how it ended could not be written: {why}. `osctl launch` finds it once the store answers")

    def _wait(self, observed: Observed, wait: Wait) -> None:
        """Until an attempt's life changes, the time has come, or somebody wants a stop."""
        began, quiet_s = self.clock.now(), QUIET_S[self.pipeline.backend]
        views = observed.stages.values()
        alive = [(one, _news(one.life)) for view in views for one in (*view.strays, *view.attempts) if one.alive]
        while self._stop == observed.stop and not self.detached and (wait.until is None or self.clock.now() < wait.until):
            if self.clock.now() >= began + quiet_s:
                self._say(wait.reason)
            if any(_news(self._life(self._intent_of(one))) != known for one, known in alive):
                return
            self._lease.check()
            self._listen()
            if self._stop == observed.stop and not self.detached:
                self.clock.sleep(POLL_S[self.pipeline.backend])

    def _say(self, detail: str) -> None:
        """Write down what is waited for, once."""
        if detail != self._said:
            self._event("observed", detail=detail)
            self._said = detail

    def _tidy(self) -> None:
        """Let the backend clear away what is over. Where it cannot be asked, that waits: nothing else depends on it."""
        with contextlib.suppress(Unreachable):
            while self._unforgotten:
                self.backend.forget(self._unforgotten[-1])
                self._unforgotten.pop()

    def _leave(self) -> NoReturn:
        """What a person asked for is asked of the next driver too, which would otherwise go on."""
        if self._cancelled:
            detail = "now, as asked before" if self._stop == "kill" else "as asked before"
            self.ledger.ask_cancel(self.clock.now(), detail, epoch=self._lease.epoch + 1)
        self._event("observed", detail="this driver leaves; attempts go on, and another driver takes over")
        raise Detached(f"{self.pipeline.name}: left to another driver")

    def _listen(self) -> None:
        """Look for a `cancel` that another process wrote into our epoch."""
        now = self.clock.now()
        if 0 <= now - self._listened < CANCEL_POLL_S:
            return
        self._listened = now
        for event in self.ledger.events(after=self._heard):
            self._heard = (event.epoch, event.seq)
            if event.kind == "cancel" and event.epoch == self._lease.epoch:
                self._cancelled = True
                if event.asks_to_kill:
                    self.kill()
                else:
                    self.drain()

    def _intent_of(self, attempt: Attempt) -> Intent:
        intent = self.ledger.intent(attempt.stage, attempt.inputs, attempt.number)
        assert intent is not None
        return intent

    def _life(self, intent: Intent) -> Life:
        """What the backend sees; of what a local backend does not see, what the ledger tells."""
        life = self.backend.observe(intent.run_key)
        if life.state == "absent" and self.pipeline.backend == "local" and intent.epoch < self._lease.epoch:
            life = self._elsewhere.life(intent) or life
        if life.state == "running" and not life.trouble:
            life = replace(life, trouble=self._trouble_of(intent))
        return life

    def _trouble_of(self, intent: Intent) -> str:
        now = self.clock.elapsed()
        looked, reason = self._trouble.get(intent.run_key, (-math.inf, ""))
        if now - looked >= TROUBLE_POLL_S:
            trouble = self.ledger.trouble(intent.stage, intent.inputs, intent.attempt)
            reason = trouble.reason if trouble is not None else ""
            self._trouble[intent.run_key] = now, reason
        return reason

    # --- Observing -----------------------------------------------------------------------------------------------------------------

    def _observe(self, wanted: frozenset[str]) -> Observed:
        first = self._strays is None
        strays: dict[str, set[tuple[str, int]]] = {} if self._strays is None else self._strays
        views: dict[str, StageView] = {}
        for stage in self.pipeline.stages:
            inputs = self._inputs(stage)
            if first:
                strays[stage.name] = {
                    (other, number)
                    for other in self.ledger.inputs_of(stage.name)
                    if other != inputs
                    for number in self.ledger.attempts(stage.name, other)
                }
            views[stage.name] = self._look(stage, inputs, strays[stage.name])
            strays[stage.name] = {(attempt.inputs, attempt.number) for attempt in views[stage.name].strays}
        self._strays = strays
        found = (attempt for view in views.values() for attempt in (*view.strays, *view.attempts) if attempt.alive)
        self._alive = {_run_key(self.pipeline, attempt): attempt for attempt in found}
        return Observed(self._lease.epoch, views, wanted, self._stop, self._cancelled)

    def _inputs(self, stage: Stage) -> str | None:
        """None while the parent is not committed. Found once: what lies in the ledger under other names changes nothing any more."""
        parent = self._parent_of(stage)
        if stage.spec.parent is not None and parent is None:
            return None
        if stage.name not in self._named:
            try:
                self._named[stage.name] = stage_inputs.find(self.ledger, stage, parent)
            except Refused as error:  # which result is meant cannot be told; other stages go on
                self._refused[stage.name] = str(error)
                return None
        return self._named[stage.name]

    def _parent_of(self, stage: Stage) -> Committed | None:
        """The parent's result, where there is one."""
        return self._result(self.pipeline.stage(stage.spec.parent)) if stage.spec.parent is not None else None

    def _result(self, stage: Stage) -> Committed | None:
        inputs = self._inputs(stage)
        if inputs is None:
            return None
        key = stage.name, inputs
        if key not in self._results:
            try:
                committed = self.ledger.committed(stage.name, inputs)
            except Refused as error:  # its result can neither be used nor be made again; other stages go on
                self._refused[stage.name] = str(error)
                self._unreadable.add(stage.name)
                return None
            if committed is None:
                return None
            self._results[key] = committed
        return self._results[key]

    def _look(self, stage: Stage, inputs: str | None, strays: set[tuple[str, int]]) -> StageView:
        open_strays = tuple(
            attempt
            for other, number in sorted(strays)
            if (attempt := self._attempt(stage.name, other, number, 0)) is not None and attempt.outcome is None
        )
        if inputs is None:
            return StageView(stage.name, None, strays=open_strays, refused=self._refused.get(stage.name))
        # Lives are read before checkpoints: what an attempt that is seen dead has published is then seen too.
        lives = [self._attempt(stage.name, inputs, number, 0) for number in self.ledger.attempts(stage.name, inputs)]
        attempts = [attempt for attempt in lives if attempt is not None]
        committed = self._result(stage) is not None
        refused = self._refused.get(stage.name)
        if stage.name in self._unreadable:  # without checkpoints: nothing is committed over what lies there
            return StageView(stage.name, inputs, False, tuple(attempts), strays=open_strays, refused=refused)
        if committed and all(attempt.outcome is not None for attempt in attempts):
            return StageView(stage.name, inputs, True, tuple(attempts), strays=open_strays, refused=refused)
        manifests = self.ledger.checkpoints(stage.name, inputs)
        for place, remark in self.ledger.unread_manifests(stage.name, inputs):
            if remark.key not in self._broken:
                self._broke(remark.key, place.step, place.attempt, stage, str(remark))
        published = {number: max(m.step for _, m in manifests if m.attempt == number) for number in {m.attempt for _, m in manifests}}
        attempts = [self._with_reached(_with_published(attempt, published.get(attempt.number, 0))) for attempt in attempts]
        self._finished |= {_run_key(self.pipeline, attempt): attempt for attempt in attempts if attempt.outcome is not None}
        checkpoints = tuple(
            Checkpoint(key, manifest.digest(), manifest.step, manifest.attempt, manifest.complete)
            for key, manifest in manifests
            if key not in self._broken
        )
        return StageView(stage.name, inputs, committed, tuple(attempts), checkpoints, open_strays, refused)

    def _with_reached(self, attempt: Attempt) -> Attempt:
        """How far an attempt of this launch came. The others' are nobody's loss today."""
        if attempt.outcome is None or attempt.outcome.epoch != self._lease.epoch:
            return attempt
        heard = [
            piece.last_step for piece in self.ledger.journal(attempt.stage, attempt.inputs, attempt.number) if piece.last_step is not None
        ]
        said = attempt.report.step if attempt.report is not None else None
        return replace(attempt, reached=said if said is not None else max(heard, default=None))

    def _damage(self, stage: str, inputs: str, number: int, report: Report | None) -> DamagedCheckpoint | None:
        """What an attempt was to go on from, where that is not what was published: nobody uses it again."""
        if report is None or report.class_ != "parent":
            return None
        key = run_key(self.pipeline.name, stage, inputs, number)
        if key not in self._damaged:
            self._damaged[key] = self.ledger.damaged(stage, inputs, number)
        found = self._damaged[key]
        if found is not None:
            self._broken.add(found.key)
        return found

    def _attempt(self, stage: str, inputs: str, number: int, published: int) -> Attempt | None:
        """None: a folder without an intent, which nobody wrote through the ledger."""
        key = run_key(self.pipeline.name, stage, inputs, number)
        if key in self._finished:
            return self._finished[key]
        try:
            intent = self.ledger.intent(stage, inputs, number)
        except Refused as error:
            return self._without_intent(stage, inputs, number, error)
        if intent is None:
            return self._without_terms(stage, inputs, number)
        try:
            outcome = self.ledger.outcome(stage, inputs, number)
        except Refused as error:  # a driver has written it, so the attempt is over; how it ended is no longer known
            outcome = _unknown_end(
                f"how it ended cannot be told: {error}", intent.created, intent.nodes * intent.devices_per_node, intent.epoch
            )
        life = self._life(intent) if outcome is None else Life("absent")
        report = self.ledger.report(stage, inputs, number)  # after its life: one that is seen dead has no more to say
        traces = report is not None or (life.state == "absent" and outcome is None and self.ledger.has_journal(intent))
        lived = traces or (intent.epoch, stage, number) in self._submitted
        if self.pipeline.backend == "kubernetes" and outcome is None and life.state == "absent" and lived:
            # No process of ours deletes a job that nobody asked to end: one that lived and is not there was deleted by a person.
            ours = self._ended_by_us.get((stage, number), 0) >= intent.epoch
            life, traces = Life("ended", cause=None if ours else "deleted"), True
        if life.state == "running" and intent.epoch < self._lease.epoch:
            self._adopted.add(key)
        return Attempt(
            stage,
            inputs,
            number,
            intent.epoch,
            intent.resume.step if intent.resume else 0,
            life,
            published,
            traces,
            report,
            outcome,
            draining=key in self._draining,
            adopted=key in self._adopted,
            given_up=self._given_up.get(key, ""),
            told=key in self._told,
            damaged=self._damage(stage, inputs, number, report),
        )

    def _without_terms(self, stage: str, inputs: str, number: int) -> Attempt | None:
        """A number without an intent is free, unless terms lie there that cannot be read: they would be another attempt's."""
        try:
            self.ledger.terms(stage, inputs, number)
        except Refused as error:
            return self._without_intent(stage, inputs, number, error)
        return None

    def _without_intent(self, stage: str, inputs: str, number: int, error: Refused) -> Attempt:
        """An attempt whose intent cannot be read. Raises Refused unless it is over, or never began: it could hold devices."""
        outcome = None
        with contextlib.suppress(Refused):
            outcome = self.ledger.outcome(stage, inputs, number)
        if outcome is None:
            life = self.backend.observe(run_key(self.pipeline.name, stage, inputs, number))
            if life.state in ("running", "unknown"):
                raise Refused(f"{stage} attempt {number} may hold devices, and its intent cannot be read: {error}") from error
            outcome = _unknown_end(f"its intent cannot be read: {error}", life.ended or self.clock.now(), 1, 0)
        return Attempt(stage, inputs, number, outcome.epoch, 0, Life("absent"), outcome=outcome)

    def _remember(self) -> None:
        """What earlier drivers did to attempts whose jobs may be gone by now. A process of this machine leaves its run directory."""
        if self.pipeline.backend != "kubernetes":
            return
        for event in self.ledger.events():
            if event.kind != "observed" or event.stage is None or event.attempt is None:
                continue
            if event.detail == SUBMITTED:
                self._submitted.add((event.epoch, event.stage, event.attempt))
            elif event.detail.startswith((ASKED, KILLED)):
                self._ended_by_us[event.stage, event.attempt] = event.epoch

    # --- Acting --------------------------------------------------------------------------------------------------------------------

    def _act(self, action: Action) -> None:
        match action:
            case StartAttempt():
                self._start(action)
            case CloseAttempt():
                self._close(action)
            case Commit():
                self._commit(action)
            case Drain(attempt):
                self._announce(attempt, ASKED)
                if attempt.life.where:
                    self._ask(attempt, "save")
                else:
                    self.backend.drain(_run_key(self.pipeline, attempt))
                self._draining.add(_run_key(self.pipeline, attempt))
            case Kill(attempt, why):
                self._announce(attempt, f"{KILLED}: {why}" if why else KILLED)
                if attempt.life.where:
                    self._ask(attempt, "now")
                    self._told.add(_run_key(self.pipeline, attempt))
                    return
                self.backend.kill(_run_key(self.pipeline, attempt))
                self._given_up[_run_key(self.pipeline, attempt)] = why
            case Wait() | Finish():
                raise AssertionError(f"{action} is no effect")

    def _ask(self, attempt: Attempt, how: Literal["save", "now"]) -> None:
        """By way of the ledger, where its agent looks for it."""
        self.ledger.ask_attempt(self._intent_of(attempt), Asked(how=how, epoch=self._lease.epoch, by=self._lease.handle.record.holder))

    def _announce(self, attempt: Attempt, detail: str) -> None:
        """Said before it is done, and once: a driver that takes over must know who ended it."""
        said = _run_key(self.pipeline, attempt), detail
        if said not in self._announced:
            self._event("observed", attempt, detail)
            self._announced.add(said)

    def _start(self, action: StartAttempt) -> None:
        intent = self.ledger.intent(action.stage, action.inputs, action.number)
        if intent is None:
            intent = self._intend(action)
        if intent is None:
            return
        self._lease.check()
        try:
            self.backend.submit(self.ledger.keys.intent(intent.stage, intent.inputs, intent.attempt), intent.run_key)
        except Refused as error:
            self._refused[action.stage] = str(error)
            return
        if self.pipeline.backend == "kubernetes":
            self._event("observed", stage=intent.stage, attempt=intent.attempt, detail=SUBMITTED)

    def _intend(self, action: StartAttempt) -> Intent | None:
        """Write the intent. None where what it would start from does not verify: then something else is to be decided."""
        stage = self.pipeline.stage(action.stage)
        try:
            parent = self._verified_parent(stage)
        except Refused as error:
            self._refused[stage.name] = str(error)
            return None
        if action.resume is not None and not self._verified(action.resume, stage, action.inputs):
            return None
        resume = action.resume
        resources = stage.spec.resources
        self._lease.check()
        named_by = identity.VERSION if action.inputs == stage_inputs.name_of(stage, self._parent_of(stage)) else 1
        terms = Terms(identity=named_by, contents=stage.contents, price=price_of(self.prices, resources.device))
        self.ledger.write_terms(stage.name, action.inputs, action.number, terms)
        intent = self.ledger.create_intent(
            Intent(
                run_key=run_key(self.pipeline.name, stage.name, action.inputs, action.number),
                pipeline=self.pipeline.name,
                stage=stage.name,
                inputs=action.inputs,
                attempt=action.number,
                epoch=self._lease.epoch,
                created=self.clock.now(),
                config=stage.config,
                config_digest=stage.config.digest(),
                nodes=resources.nodes,
                devices_per_node=resources.devices_per_node,
                device=resources.device,
                trainer=self.pipeline.trainer,
                hang_timeout_s=stage.spec.hang_timeout_s,
                flush_s=self.pipeline.flush_s,
                parent=parent,
                resume=ResumeRef(key=resume.key, manifest_digest=resume.digest, step=resume.step) if resume else None,
                code=code_version(),
            )
        )
        start = f"from step {resume.step}" if resume else f"from {parent.stage}" if parent else "from the start"
        if resume and (otherwise := self.ledger.resumed_otherwise(intent)):
            start += f", {otherwise}"
        for place in self.ledger.unfinished(stage.name, action.inputs):  # nobody uploads any more: no attempt of this stage lives
            key = f"{self.ledger.keys.checkpoint(place.stage, place.inputs, place.step, place.attempt)}/MANIFEST.json"
            if key not in self._broken and _is_newer(place, stage.name, action):
                self._broke(key, place.step, place.attempt, stage, f"{key} is not there: its upload was not finished")
        places = map(Place.parse, self._broken)
        if any(place is not None and _is_newer(place, stage.name, action) for place in places):
            start += f", {NO_NEWER}"
        detail = f"{start}, after {action.why}" if action.why else start
        self._event("retry" if action.why else "attempt", stage=stage.name, attempt=action.number, detail=detail)
        return intent

    def _verified_parent(self, stage: Stage) -> ParentRef | None:
        """Raises Refused where the parent's result is not what was committed."""
        if stage.spec.parent is None:
            return None
        parent = self.pipeline.stage(stage.spec.parent)
        inputs = self._inputs(parent)
        assert inputs is not None
        ref = self.ledger.parent_ref(parent.name, inputs)
        self._verify(ref.key, ref.manifest_digest)
        return ref

    def _verify(self, manifest_key: str, manifest_digest: str) -> Manifest:
        """Raises CorruptCheckpoint."""
        manifest = self.ledger.verify(manifest_key, manifest_digest, full=False)
        size = sum(file.size for file in manifest.files.values())
        if not self.ledger.store.url.startswith("s3://") and size <= HASH_AT_MOST_BYTES:
            self.ledger.verify(manifest_key, manifest_digest, full=True)
        return manifest

    def _verified(self, checkpoint: Checkpoint, stage: Stage, inputs: str) -> Manifest | None:
        """The manifest; None, and never used again, where the checkpoint is not what was published or not of this stage."""
        try:
            manifest = self._verify(checkpoint.key, checkpoint.digest)
        except CorruptCheckpoint as error:
            self._broke(checkpoint.key, checkpoint.step, checkpoint.attempt, stage, str(error))
            return None
        if (manifest.stage, manifest.inputs) != (stage.name, inputs):
            other = f"{checkpoint.key}: is of {manifest.stage}@{manifest.inputs}, not of {stage.name}@{inputs}"
            self._broke(checkpoint.key, checkpoint.step, checkpoint.attempt, stage, other)
            return None
        return manifest

    def _broke(self, key: str, step: int, attempt: int, stage: Stage, reason: str) -> None:
        self._broken.add(key)
        self._event("observed", stage=stage.name, attempt=attempt, detail=f"step {step} {UNUSED}{reason}")

    def _close(self, action: CloseAttempt) -> None:
        attempt = action.attempt
        intent = self.ledger.intent(attempt.stage, attempt.inputs, attempt.number)
        assert intent is not None
        history = History(self.ledger)
        heard = history.of(intent, self.clock.now())
        for totals in history.unwritten(intent):
            with contextlib.suppress(StoreConflict):
                self.ledger.append_totals(intent, totals)
        bound, ended, unaccounted_s = held_time(attempt, heard, intent.nodes, self.clock.now())
        manifests = self.ledger.checkpoints(attempt.stage, attempt.inputs)
        published = max((manifest.step for _, manifest in manifests if manifest.attempt == attempt.number), default=attempt.resumed_from)
        exit_code = attempt.life.exit_code
        if exit_code is None and attempt.report is not None:
            exit_code = EXIT_CODES.get(attempt.report.class_)
        outcome = Outcome.model_validate(
            {
                "class": action.class_,
                "exit_code": exit_code,
                "reason": action.reason,
                "step": published or None,
                "bound": bound,
                "ended": ended,
                "devices": intent.nodes * intent.devices_per_node,
                "unaccounted_s": unaccounted_s,
                "by_person": action.by_person,
                "evaluation": attempt.report.evaluation if attempt.report else {},
                "epoch": self._lease.epoch,
            }
        )
        written = self.ledger.write_outcome(intent, outcome)
        self._unforgotten.append(intent.run_key)
        self._event("outcome", attempt, f"{written.class_}: {written.reason}" if written.reason else written.class_)

    def _commit(self, action: Commit) -> None:
        attempt, outcome = action.attempt, action.attempt.outcome
        assert outcome is not None
        stage = self.pipeline.stage(attempt.stage)
        manifest = self._verified(action.checkpoint, stage, attempt.inputs)
        if manifest is None:
            return
        parent = self._parent_of(stage)
        # Nothing in it depends on who commits or when: a driver that takes over commits the very same bytes.
        committed = Committed(
            run_key=manifest.run_key,  # an earlier attempt's, where this one found its complete checkpoint and only evaluated it
            stage=attempt.stage,
            inputs=attempt.inputs,
            attempt=manifest.attempt,
            step=manifest.step,
            manifest=action.checkpoint.key,
            manifest_digest=action.checkpoint.digest,
            weights_digest=manifest.weights_digest,
            parent_committed=parent.digest() if parent else None,
            evaluation=outcome.evaluation,
            time=outcome.ended,
            epoch=outcome.epoch,
        )
        self._lease.check()
        try:
            written = self.ledger.commit(committed)
        except StoreConflict as error:
            raise Refused(f"{attempt.stage}: another result is already committed ({error}). See: osctl lineage --verify") from error
        self._log_committed(written)

    # --- Events --------------------------------------------------------------------------------------------------------------------

    def _event(
        self,
        kind: Literal["launched", "attempt", "observed", "outcome", "retry", "ended"],
        about: Attempt | None = None,
        detail: str = "",
        *,
        stage: str | None = None,
        attempt: int | None = None,
    ) -> None:
        if about is not None:
            stage, attempt = about.stage, about.number
        with self._lease.ours():
            event = self.ledger.append_event(self._lease.handle, kind, now=self.clock.now(), stage=stage, attempt=attempt, detail=detail)
        self.on_event(event)

    def _log_committed(self, committed: Committed) -> None:
        with self._lease.ours():
            self.on_event(self.ledger.append_committed(self._lease.handle, committed, self.clock.now()))

    def _repair_events(self) -> None:
        """A driver that was killed between COMMITTED.json and its event left it to us. Says nothing twice."""
        for stage in self.pipeline.stages:
            committed = self._result(stage)
            if committed is not None:
                with self._lease.ours():
                    self.ledger.append_committed(self._lease.handle, committed, self.clock.now())

    # --- Targets and result --------------------------------------------------------------------------------------------------------

    def _wanted(self, targets: Sequence[str] | None) -> frozenset[str]:
        names = [stage.name for stage in self.pipeline.stages]
        for target in targets or ():
            if target not in names:
                raise UsageError(f"launch {target}: {self.pipeline.name} has no such stage; it has {', '.join(names)}")
        wanted = frozenset(targets or names)
        for name in names:
            stage = self.pipeline.stage(name)
            parent = stage.spec.parent
            if name in wanted and parent is not None and parent not in wanted and self._result(self.pipeline.stage(parent)) is None:
                raise Refused(self._refused.get(parent) or parentless(stage))
        return wanted

    def _summed_up(self, wanted: frozenset[str], finish: Finish) -> tuple[StageResult, ...]:
        """The run is over and written down: a store that is away for a moment must not make a failure of it."""
        for _ in range(SUMMARY_TRIES - 1):
            try:
                return tuple(self._summary(wanted, finish))
            except Unreachable as error:
                log.warning("%s; asking again in %.0f s", error, UNREACHABLE_POLL_S)
                self.clock.sleep(UNREACHABLE_POLL_S)
        return tuple(self._summary(wanted, finish))

    def _summary(self, wanted: frozenset[str], finish: Finish) -> Iterator[StageResult]:
        for name, view in self._observe(wanted).stages.items():
            committed = self._result(self.pipeline.stage(name))
            last = view.attempts[-1].outcome if view.attempts else None
            step = committed.step if committed else max((checkpoint.step for checkpoint in view.checkpoints), default=0)
            failed = finish.status == "failed" and name in wanted and (view.refused is not None or last is not None)
            state: Literal["committed", "failed", "open", "blocked", "not asked for"] = (
                "committed" if committed
                else "not asked for" if name not in wanted
                else "blocked" if view.inputs is None
                else "failed" if failed
                else "open"
            )  # fmt: skip
            reason = "" if committed else view.refused or (last.reason if last else "")
            yield StageResult(name, state, view.inputs, len(view.attempts), step, committed.weights_digest if committed else None, reason)


class _HeldLease:
    """A lease that is kept alive by a thread while the driver acts or waits for a slow store, and checked before each effect."""

    def __init__(self, handle: LeaseHandle, clock: Clock, ttl_s: float, pipeline: str):
        self.handle, self.clock, self.ttl_s, self.pipeline = handle, clock, ttl_s, pipeline
        self._lock = threading.Lock()
        self._renewed = clock.now()
        self._lost = False
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="lease", daemon=True)

    def __enter__(self) -> _HeldLease:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    @property
    def epoch(self) -> int:
        return self.handle.epoch

    def check(self) -> None:
        """Renew where a third of its life is over. Raises Refused where another driver has taken it."""
        with self.ours(), self._lock:
            if self._lost:
                raise StoreConflict(f"{self.pipeline}: lease")
            now = self.clock.now()
            if not 0 <= now - self._renewed < self.ttl_s / 3:
                self.handle.renew(now)
                self._renewed = now

    @contextlib.contextmanager
    def ours(self) -> Iterator[None]:
        """Turns the loss of the lease into a refusal."""
        try:
            yield
        except StoreConflict as error:
            self._lost = True
            raise Refused(
                f"{self.pipeline}: another launch has taken over the lease (epoch {self.epoch} is over). "
                "This one stops; follow the other with: osctl watch"
            ) from error

    def _keep(self) -> None:
        """Goes on after any fault but the loss of the lease: a driver whose lease is not renewed is taken for dead."""
        said = ""
        while not self._over.wait(self.ttl_s / 3):
            try:
                self.check()
                said = ""
            except Exception as error:  # noqa: BLE001 - whatever it is, the next renewal may succeed, and `check` tells the driver too
                if self._lost:
                    return
                if said != (said := f"{type(error).__name__}: {error}"):
                    log.warning("lease not renewed: %s", error if isinstance(error, Unreachable) else said)


def held_time(attempt: Attempt, nodes: Sequence[NodeTime], count: int, now: float) -> tuple[float | None, float, float]:
    """(bound, ended, unaccounted_s) of an attempt of `count` nodes that is over; `nodes`: what was heard of them.

    `ended` is death as seen from outside; where nobody saw it, the last thing that was heard. `unaccounted_s` is the time between a
    node's last journal piece and death, averaged over the nodes, so that devices × unaccounted_s is what the bill must add.
    """
    if attempt.unborn:
        return None, now, 0.0
    last = {node.node: node.end for node in nodes if node.end is not None}
    heard = [*last.values(), *([attempt.report.ended] if attempt.report else [])]
    starts = [node.start for node in nodes if node.start is not None]
    bound = attempt.life.bound if attempt.life.bound is not None else min(starts, default=None)
    ended = max([attempt.life.ended, *last.values()]) if attempt.life.ended is not None else max(heard, default=bound or now)
    if bound is None:
        return None, ended, 0.0
    ends = [max(bound, last.get(node, bound)) for node in range(count)]
    return bound, ended, max(0.0, sum(ended - end for end in ends) / len(ends))


def _unknown_end(reason: str, ended: float, devices: int, epoch: int) -> Outcome:
    """What stands for an outcome that cannot be read. It is never written."""
    content = {"class": "lost", "exit_code": None, "reason": reason, "step": None, "bound": None, "ended": ended, "devices": devices}
    return Outcome.model_validate(content | {"unaccounted_s": 0.0, "epoch": epoch})


def _is_newer(place: Place, stage: str, action: StartAttempt) -> bool:
    """Whether a checkpoint would be what this attempt goes on from, if it could be used."""
    resumed = action.resume.step if action.resume else 0
    return (place.stage, place.inputs) == (stage, action.inputs) and place.step >= resumed


def _news(life: Life) -> tuple[str, str, str | None]:
    """What of a life is worth a new decision, or a word to people."""
    return life.state, life.waits + life.trouble, life.waits_for


def _with_published(attempt: Attempt, step: int) -> Attempt:
    return replace(attempt, published=step, left_traces=attempt.left_traces or step > 0)


def _run_key(pipeline: Pipeline, attempt: Attempt) -> str:
    return run_key(pipeline.name, attempt.stage, attempt.inputs, attempt.number)


def code_version() -> str:
    """Version of this package, and the git revision where it runs from a checkout."""
    version = importlib.metadata.version("osctl")
    git = Path(__file__).resolve().parents[1] / ".git"
    try:
        head = (git / "HEAD").read_text().strip()
        revision = (git / head.removeprefix("ref: ")).read_text().strip() if head.startswith("ref: ") else head
    except OSError:
        return version
    return f"{version}+g{revision[:12]}"
