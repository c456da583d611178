"""One launch while it holds the lease: what observing and acting share.

Owns the driver's events, and what this driver has asked of attempts. It keeps nothing that the next driver could not read again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from orchestrator.driver.clock import Clock
from orchestrator.driver.facts import AttemptView, Onward, Room
from orchestrator.driver.held_lease import HeldLease
from orchestrator.driver.results import Results
from orchestrator.ledger.keys import run_key
from orchestrator.ledger.records import UNUSED, Committed, Event, Intent
from orchestrator.ledger.store import Ledger
from orchestrator.ports import Backend, Evaluator
from orchestrator.recipe.pipeline import Pipeline, Stage

NOT_EVALUATED = "was not evaluated: "
"""How the event of an evaluation that failed begins."""
SUBMITTED, ASKED_TO_SAVE, WAS_KILLED = "submitted", "asked to save and leave", "killed"
"""How events begin from which a driver learns what an earlier one did to an attempt whose job is gone."""

EventOfDriver = Literal["launched", "attempt", "observed", "outcome", "retry", "ended"]


@dataclass
class Launch:
    pipeline: Pipeline
    ledger: Ledger
    backend: Backend
    clock: Clock
    lease: HeldLease
    results: Results
    on_event: Callable[[Event], None]
    evaluator: Evaluator | None = None
    """Judges committed stages beside the training. None: each stage's own ranks do."""
    unjudged: set[tuple[str, str]] = field(default_factory=set)
    """(stage, inputs) of evaluations whose failure has its event."""
    draining: set[str] = field(default_factory=set)
    """Run keys of attempts that this driver has asked to save and leave."""
    ended_elsewhere: set[str] = field(default_factory=set)
    """Run keys of attempts elsewhere that this driver has asked to leave without saving."""
    given_up: dict[str, str] = field(default_factory=dict)
    """By run key, the fault for which an attempt was killed before it started."""
    onward: dict[str, Onward] = field(default_factory=dict)
    """By run key, why this driver asked an attempt to leave so that another one is made elsewhere."""
    rooms: dict[tuple[str, str | None], Room] = field(default_factory=dict)
    """By (stage, pool), how many nodes the events say that there are."""
    broken: set[str] = field(default_factory=set)
    """Keys of manifests that did not verify: no attempt goes on from them."""
    alive: dict[str, AttemptView] = field(default_factory=dict)
    """By run key, the attempts that lived at the last look."""
    _announced: set[tuple[str, str]] = field(default_factory=set)
    _logged: set[str] = field(default_factory=set)
    """Stages whose result has its event."""

    def run_key(self, attempt: AttemptView) -> str:
        return run_key(self.pipeline.name, attempt.stage, attempt.inputs_digest, attempt.number)

    def intent_of(self, attempt: AttemptView) -> Intent:
        intent = self.ledger.intent(attempt.stage, attempt.inputs_digest, attempt.number)
        assert intent is not None
        return intent

    def pass_over(self, key: str, step: int, attempt: int, stage: Stage, reason: str) -> None:
        """Write down that a checkpoint cannot be used, and never use it again. `key`: of its manifest."""
        self.broken.add(key)
        self.event("observed", stage=stage.name, attempt=attempt, detail=f"step {step} {UNUSED}{reason}")

    # Events

    def event(
        self,
        kind: EventOfDriver,
        about: AttemptView | None = None,
        detail: str = "",
        *,
        stage: str | None = None,
        attempt: int | None = None,
    ) -> None:
        """Write an event, about an attempt or about what is named. Raises Refused where the lease is lost, Unreachable."""
        if about is not None:
            stage, attempt = about.stage, about.number
        with self.lease.ours():
            event = self.ledger.append_event(self.lease.handle, kind, now=self.clock.now(), stage=stage, attempt=attempt, detail=detail)
        self.on_event(event)

    def announce(self, attempt: AttemptView, detail: str) -> None:
        """Write down what is about to be done to an attempt, once: a driver that takes over must know who ended it."""
        said = self.run_key(attempt), detail
        if said not in self._announced:
            self.event("observed", attempt, detail)
            self._announced.add(said)

    def log_committed(self, committed: Committed, *, tell: bool = True) -> None:
        """Write the event of a result, unless it is there. `tell`: call `on_event` with it."""
        with self.lease.ours():
            event = self.ledger.append_committed(self.lease.handle, committed, self.clock.now())
        self._logged.add(committed.stage)
        if tell:
            self.on_event(event)

    def repair_events(self, *, tell: bool) -> None:
        """Write the events of results that have none: a driver was killed, or the store's answer was lost, between COMMITTED.json and its
        event. `tell` as in `log_committed`."""
        for stage in self.pipeline.stages:
            committed = None if stage.name in self._logged else self.results.of(stage)
            if committed is not None:
                self.log_committed(committed, tell=tell)
