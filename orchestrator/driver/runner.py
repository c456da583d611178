"""The driver: observe, decide, act, until there is nothing left to do.

Owns the lease while it runs, the loop, and what a person wants of it (save and stop, stop, leave). What there is to see is read by
`orchestrator.driver.observe`, what to do is decided in `orchestrator.driver.decide`, and done by `orchestrator.driver.act`.

It keeps nothing that it could not read again: a driver may be killed after any single effect, and the next one carries on from what it
observes. The lease is checked before each effect, and renewed when a third of its life is over; a driver that finds it taken stops at once.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NoReturn

from orchestrator.driver.act import Actor
from orchestrator.driver.clock import Clock, SystemClock
from orchestrator.driver.decide import Finish, Wait, decide, parentless
from orchestrator.driver.facts import Observed, StageView
from orchestrator.driver.first import LOOK_S, First, NotYet
from orchestrator.driver.held_lease import HeldLease
from orchestrator.driver.launch import Launch
from orchestrator.driver.nodes import NodesSeen
from orchestrator.driver.observe import Observer
from orchestrator.driver.results import Results
from orchestrator.errors import Refused, Unreachable, UsageError
from orchestrator.ledger.records import Event
from orchestrator.ledger.store import Ledger
from orchestrator.ports import Backend, Evaluator, Life, NodeCounter
from orchestrator.recipe import launched
from orchestrator.recipe.pipeline import Pipeline
from orchestrator.recipe.prices import Prices, load_prices

log = logging.getLogger(__name__)

LEASE_TTL_S = 15.0

POLL_S = {"local": 0.05, "kubernetes": 0.1}
"""Seconds between two looks at the attempts that live. Local: one read of /proc; kubernetes: one of a cache that a watch keeps.
It bounds the idle time between two stages."""

QUIET_S = {"local": 0.0, "kubernetes": 2.0}
"""Seconds that something must be waited for before it is written down. A gang that finds room is told of several lacks on its way."""

CANCEL_POLL_S = 1.0
"""Seconds between two looks for a `cancel` in the ledger; on S3 each is a request."""

UNREACHABLE_POLL_S = 2.0
"""Seconds before a store or cluster that did not answer is asked again. Attempts go on meanwhile."""

SUMMARY_TRIES = 5
"""Of reading what came of the stages, once the run is over."""


@dataclass(frozen=True)
class StageResult:
    name: str
    state: Literal["committed", "failed", "open", "blocked", "not asked for"]
    inputs_digest: str | None
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
        nodes: NodeCounter | None = None,
        evaluator: Evaluator | None = None,
        first: First | None = None,
    ):
        """
        Args:
            on_event: called with each event once it is written.
            prices: what devices cost where this pipeline runs, written down with each attempt; none: the shipped list, at its cluster.
            nodes: counts the cluster's nodes for stages that may go on with fewer; none: no stage does.
            evaluator: judges committed stages beside the training; none: each stage's own ranks do.
            first: what comes before the first stage, and says which pipeline is then driven; none: nothing does.
        """
        self.pipeline, self.ledger, self.backend = pipeline, ledger, backend
        self.prices = prices if prices is not None else load_prices().at(pipeline.cluster)
        self.clock: Clock = clock or SystemClock()
        self.on_event = on_event
        self.lease_ttl_s = lease_ttl_s
        self._nodes, self._evaluator, self._first = nodes, evaluator, first
        self.detached = False
        """Whether it was asked to leave."""
        self._results = Results(pipeline, ledger)
        self._launch: Launch
        self._observer: Observer
        self._actor: Actor
        self._stop: Literal["drain", "kill"] | None = None
        self._cancelled = False
        self._waiting_for = ""
        """The last wait that was written down."""
        self._heard: tuple[int, int] | None = None
        """(epoch, number) of the last event that was read."""
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
        wanted = self._named(targets)
        if self._first is None:
            self._check_parents(wanted)
        lease = self.ledger.acquire(self.clock.now(), self.lease_ttl_s)
        try:
            with HeldLease(lease, self.clock, self.lease_ttl_s, self.pipeline.name) as held:
                self._begin(held, wanted)
                try:
                    finish = self._before(held, wanted) or self._drive(wanted)
                except Refused as error:
                    with contextlib.suppress(Refused, Unreachable):  # where the lease is lost, the words are another driver's
                        self._launch.event("ended", detail=f"failed: {error}")
                    raise
                self._launch.event("ended", detail=f"{finish.status}: {finish.reason}")
                return Result(finish.status, finish.exit_code, finish.reason, self._summed_up(wanted, finish))
        finally:
            if self._evaluator is not None:
                self._evaluator.close()
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

    def _begin(self, lease: HeldLease, wanted: frozenset[str]) -> None:
        self._take(lease)
        self._heard = (lease.epoch, -1)
        self._launch.event("launched", detail=",".join(stage.name for stage in self.pipeline.stages if stage.name in wanted))
        self._launch.repair_events(tell=False)
        self._observer.remember()

    def _take(self, lease: HeldLease) -> None:
        """Make what drives the pipeline, and write down which one it is."""
        self._launch = Launch(
            self.pipeline, self.ledger, self.backend, self.clock, lease, self._results, lambda event: self.on_event(event), self._evaluator
        )
        self._observer = Observer(self._launch, NodesSeen(self._launch, self._nodes, self.prices))
        self._actor = Actor(self._launch, self.prices)
        self.ledger.add_revision(self.pipeline.model_dump(mode="json"), self.clock.now())

    def _before(self, lease: HeldLease, wanted: frozenset[str]) -> Finish | None:
        """What comes before the first stage. None: the stages may begin. Raises Refused, Detached."""
        said = ""
        while self._first is not None:
            try:
                lease.check()
                if self.detached:
                    self._leave()
                self._listen()
                found = self._first.look(self._stop, cancelled=self._cancelled)
                if isinstance(found, Finish):
                    return found
                if not isinstance(found, NotYet):
                    self.pipeline, self._results = found, Results(found, self.ledger)
                    self._check_parents(wanted)
                    self._take(lease)
                    self._observer.remember()
                    return None
                self._say(found.doing)
                said = ""
            except Unreachable as error:
                if said != (said := str(error)):
                    log.warning("%s; asking again every %.0f s", said, LOOK_S)
            self.clock.sleep(LOOK_S)
        return None

    def _drive(self, wanted: frozenset[str]) -> Finish:
        said = ""
        while True:
            try:
                self._launch.lease.check()
                if said:  # what the store did not answer may have been done
                    self._launch.repair_events(tell=True)
                if self.detached:
                    self._leave()
                self._actor.tidy()
                observed = self._observer.observe(wanted, self._stop, self._cancelled)
                for action in decide(self.pipeline, observed, self.clock.now()):
                    if isinstance(action, Finish):
                        return action
                    if isinstance(action, Wait):
                        self._wait(observed, action)
                    else:
                        self._launch.lease.check()
                        self._actor.act(action)
                said = ""
            except Unreachable as error:
                troubles = [life.trouble for key in self._launch.alive if (life := self.backend.observe(key)).trouble]
                if said != (said := "; ".join([str(error), *troubles])):
                    log.warning("%s; asking again every %.0f s", said, UNREACHABLE_POLL_S)
                with contextlib.suppress(Unreachable):  # where the store is away, nobody can be told
                    self._say(str(error))
                if self._stop is not None:
                    self._stop_unwritten(error)
                self.clock.sleep(UNREACHABLE_POLL_S)

    def _stop_unwritten(self, error: Unreachable) -> None:
        """Stop while the store is away: ask the attempts all the same, and leave once they are gone.

        The next launch finds how they ended. Raises Unreachable.
        """
        ask = self.backend.kill if self._stop == "kill" else self.backend.drain
        living = []
        for key, attempt in self._launch.alive.items():
            if attempt.life.where or self.backend.observe(key).state != "running":
                continue
            living.append(key)
            if self._stop == "kill" or key not in self._launch.draining:
                self._launch.draining.add(key)
                ask(key)
        if not living and self._launch.alive:
            troubles = [life.trouble for key in self._launch.alive if (life := self.backend.observe(key)).trouble]
            why = "; ".join([str(error), *troubles])
            raise Unreachable(f"stopped, and how it ended could not be written: {why}. `osctl launch` finds it once the store answers")

    def _wait(self, observed: Observed, wait: Wait) -> None:
        """Wait until an attempt's life changes, the time has come, or a stop is requested."""
        began, quiet_s = self.clock.now(), QUIET_S[self.pipeline.backend]
        views = observed.stages.values()
        alive = [(one, _news(one.life)) for view in views for one in (*view.orphans, *view.attempts) if one.alive]
        judged = [view for view in views if view.judged is not None and view.judged.state == "running"]
        while self._stop == observed.stop and not self.detached and (wait.until is None or self.clock.now() < wait.until):
            if self.clock.now() >= began + quiet_s:
                self._say(wait.reason)
            if any(_news(self._observer.life(self._launch.intent_of(one))) != known for one, known in alive):
                return
            if any(self._is_judged(view) for view in judged):
                return
            self._launch.lease.check()
            self._listen()
            if self._stop == observed.stop and not self.detached:
                self.clock.sleep(POLL_S[self.pipeline.backend])

    def _is_judged(self, view: StageView) -> bool:
        assert self._evaluator is not None and view.inputs_digest is not None
        return self._evaluator.state(view.name, view.inputs_digest)[0] == "ended"

    def _say(self, detail: str) -> None:
        """Write an event that says what this driver waits for, unless the last one said the same."""
        if detail != self._waiting_for:
            self._launch.event("observed", detail=detail)
            self._waiting_for = detail

    def _leave(self) -> NoReturn:
        """Leave to another driver. A requested stop is requested of the next driver too, which would otherwise go on."""
        if self._cancelled:
            detail = "now, as asked before" if self._stop == "kill" else "as asked before"
            self.ledger.ask_cancel(self.clock.now(), detail, epoch=self._launch.lease.epoch + 1)
        self._launch.event("observed", detail="this driver leaves; attempts go on, and another driver takes over")
        raise Detached(f"{self.pipeline.name}: left to another driver")

    def _listen(self) -> None:
        """Look for a `cancel` that another process wrote into our epoch."""
        now = self.clock.now()
        if 0 <= now - self._listened < CANCEL_POLL_S:
            return
        self._listened = now
        for event in self.ledger.events(after=self._heard):
            self._heard = (event.epoch, event.seq)
            if event.kind == "cancel" and event.epoch == self._launch.lease.epoch:
                self._cancelled = True
                if event.asks_to_kill:
                    self.kill()
                else:
                    self.drain()

    # --- Targets and result --------------------------------------------------------------------------------------------------------

    def _named(self, targets: Sequence[str] | None) -> frozenset[str]:
        names = [stage.name for stage in self.pipeline.stages]
        for target in targets or ():
            if target not in names:
                raise UsageError(f"launch {target}: {self.pipeline.name} has no such stage; it has {', '.join(names)}")
        return frozenset(targets or names)

    def _check_parents(self, wanted: frozenset[str]) -> None:
        """Raises Refused where a parent is neither committed nor asked for."""
        for name in [stage.name for stage in self.pipeline.stages]:
            stage = self.pipeline.stage(name)
            parent = stage.spec.parent
            if name in wanted and parent is not None and parent not in wanted and self._results.of(self.pipeline.stage(parent)) is None:
                raise Refused(self._results.refused.get(parent) or parentless(stage))

    def _summed_up(self, wanted: frozenset[str], finish: Finish) -> tuple[StageResult, ...]:
        """The summary of a run that is over. A store that is away for a moment is asked again: the run must not fail for it."""
        for _ in range(SUMMARY_TRIES - 1):
            try:
                return tuple(self._summary(wanted, finish))
            except Unreachable as error:
                log.warning("%s; asking again in %.0f s", error, UNREACHABLE_POLL_S)
                self.clock.sleep(UNREACHABLE_POLL_S)
        return tuple(self._summary(wanted, finish))

    def _summary(self, wanted: frozenset[str], finish: Finish) -> Iterator[StageResult]:
        for name, view in self._observer.observe(wanted, self._stop, self._cancelled).stages.items():
            committed = self._results.of(self.pipeline.stage(name))
            last = view.attempts[-1].outcome if view.attempts else None
            step = committed.step if committed else max((checkpoint.step for checkpoint in view.checkpoints), default=0)
            failed = finish.status == "failed" and name in wanted and (view.refused is not None or last is not None)
            state: Literal["committed", "failed", "open", "blocked", "not asked for"] = (
                "committed" if committed
                else "not asked for" if name not in wanted
                else "blocked" if view.inputs_digest is None
                else "failed" if failed
                else "open"
            )  # fmt: skip
            reason = "" if committed else view.refused or (last.reason if last else "")
            yield StageResult(
                name, state, view.inputs_digest, len(view.attempts), step, committed.weights_digest if committed else None, reason
            )


def _news(life: Life) -> tuple[str, str, str | None]:
    """The parts of a life whose change calls for a new decision or a new sentence to people."""
    return life.state, life.waits + life.trouble, life.waits_for
