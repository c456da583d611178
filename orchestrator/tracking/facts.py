"""What the ledger says of a pipeline, as far as MLflow shows it.

Owns reading the records for MLflow: a ledger is read repeatedly, but its events, journals and finished attempts only once. Refuses to say
how a run looks in MLflow (`runs`). Objects that cannot be read are skipped; `osctl status` names them.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from orchestrator.accounting.cost import AttemptTime
from orchestrator.accounting.history import AttemptHistory, History
from orchestrator.errors import Refused
from orchestrator.inputs.standing import results
from orchestrator.ledger.records import ClipsUsed, Committed, Evaluation, Event, Intent, JournalPiece, Outcome, Placement
from orchestrator.ledger.store import Ledger
from orchestrator.prepare import watching
from orchestrator.prepare.watching import State
from orchestrator.recipe.pipeline import Pipeline, Published
from orchestrator.recipe.prices import Prices, load_prices
from orchestrator.tracking.preparations import NOWHERE

KEPT_PIECES = 512
"""How many journal pieces are kept in memory: a stage's curve needs an attempt's pieces again once a checkpoint has their steps."""


@dataclass(frozen=True)
class AttemptFacts:
    """One attempt."""

    intent: Intent
    outcome: Outcome | None
    time: AttemptTime
    samples: tuple[str, ...]
    """Keys of samples in the store."""
    pieces: Callable[[int], Iterable[JournalPiece]]
    """Gives the first node's journal pieces after a number, ascending. They are read one by one. Raises Unreachable."""
    first_piece_with: Callable[[int], int]
    """Gives the number of a piece at or before the first one that has this step."""
    placement: Placement | None = None
    """Where it was made. None means its cluster had no pools and its stage did not shrink."""
    trouble: str = ""
    """Why the checkpoints of a running attempt do not reach the store. Empty means that they do."""


@dataclass(frozen=True)
class StageFacts:
    """One stage under one inputs digest."""

    name: str
    published: Published | None
    """The published run to compare with, from the newest readable revision that names the stage."""
    inputs_digest: str
    current: bool
    """Whether the pipeline as it was launched last would use this result."""
    attempts: tuple[AttemptFacts, ...]
    """The attempts, ascending. There is at least one."""
    committed: Committed | None
    data: str | None = None
    """Digest of the data set. None means not recorded."""
    used: ClipsUsed | None = None
    """How much of the data set the newest attempt uses. None means that the attempt has not written that."""
    evaluations: tuple[Evaluation, ...] = ()
    """Those beside its attempts, the newest last."""


@dataclass(frozen=True)
class Facts:
    """One pipeline."""

    pipeline: Pipeline
    """The pipeline as it was launched last, of the revisions that can be read."""
    ledger: str
    """Digest of the ledger's first revision. It identifies the ledger, even if its store moves."""
    store: str
    """URL of the store."""
    created: float
    """Unix time of the first launch."""
    events: tuple[Event, ...]
    """Events of kind launched or ended, in order."""
    stages: tuple[StageFacts, ...]
    driven: bool = True
    """Whether a driver holds the lease."""
    now: float = 0.0
    """Unix time at which the lease was read."""
    preparation: State | None = None
    """Of its clips. None means that its recipe names no raw videos, or that nothing of them was prepared yet."""


class LedgerReader:
    """Reads the facts of one ledger."""

    def __init__(self, ledger: Ledger, prices: Callable[[], Prices] = load_prices):
        """`prices` gives the price list for attempts without a price in the ledger; see `orchestrator.accounting.history`."""
        self.history = History(ledger, prices, keep=KEPT_PIECES)
        self.ledger = self.history.ledger
        self._made: State | None = None

    def read(self) -> Facts | None:
        """The facts. None means the pipeline was never launched, or this release can read none of its revisions. Raises Unreachable."""
        revisions = self.ledger.revisions()
        pipelines = [pipeline for _, revision in revisions[::-1] if (pipeline := _pipeline(revision.pipeline)) is not None]
        if not pipelines:
            return None
        first = revisions[0][1]
        return Facts(
            pipeline=pipelines[0],
            ledger=first.digest()[:12],
            store=self.ledger.store.url,
            created=first.created,
            events=tuple(event for event in self.events() if event.kind in ("launched", "ended")),
            stages=tuple(self._stages(pipelines, time.time())),
            preparation=self._preparation(pipelines[0]),
        )

    def _preparation(self, pipeline: Pipeline) -> State | None:
        """What is prepared costs no more, so it is read once."""
        if pipeline.prepare is None:
            return None
        if self._made is None or self._made.word != "prepared":
            try:
                found = watching.look(self.ledger.store, pipeline.prepare.name, NOWHERE)
            except Refused:  # nothing of it is there
                return None
            self._made = found if found.attempts else None
        return self._made

    def events(self) -> list[Event]:
        """All events of the ledger, in order. Raises Unreachable."""
        return self.history.events()

    def _stages(self, pipelines: Sequence[Pipeline], now: float) -> Iterator[StageFacts]:
        """Every stage that was ever attempted: first those that revisions name, the newest revision first, then the others."""
        published: dict[str, Published | None] = {}
        for pipeline in pipelines:
            for stage in pipeline.stages:
                published.setdefault(stage.name, stage.spec.published)
        for name, _ in self.ledger.stages():
            published.setdefault(name, None)  # another version of osctl wrote its revisions; its cost counts all the same
        clusters = any(pipeline.cluster is not None for pipeline in pipelines)
        current = {name: inputs_digest for name, (inputs_digest, _) in results(pipelines[0], self.ledger).items()}
        for name, reference in published.items():
            for inputs_digest in reversed(self.ledger.inputs_of(name)):
                found = self.history.attempts(name, inputs_digest, now)
                if found:
                    yield self._stage(name, reference, inputs_digest, current.get(name) == inputs_digest, found, clusters)

    def _stage(
        self, name: str, reference: Published | None, inputs_digest: str, current: bool, attempts: Sequence[AttemptHistory], clusters: bool
    ) -> StageFacts:
        newest = attempts[-1]
        terms = self.ledger.terms(name, inputs_digest, newest.intent.attempt)
        return StageFacts(
            name,
            reference,
            inputs_digest,
            current,
            tuple(self._attempt(one, clusters) for one in attempts),
            (committed := self.ledger.committed(name, inputs_digest)),
            terms.contents.data if terms is not None else None,
            self.history.clips(newest),
            tuple(self.ledger.evaluations(name, inputs_digest)) if committed is not None else (),
        )

    def _attempt(self, one: AttemptHistory, clusters: bool) -> AttemptFacts:
        """`clusters`: whether it may have run in a cluster; else there is no pool to look for."""
        intent = one.intent
        trouble = self.ledger.trouble(intent.stage, intent.inputs_digest, intent.attempt) if one.outcome is None else None
        return AttemptFacts(
            intent,
            one.outcome,
            one.time,
            tuple(self.ledger.samples(intent.stage, intent.inputs_digest, intent.attempt)),
            functools.partial(self.history.pieces, one),
            one.first.first_piece_with,
            self.history.placement(one) if clusters else None,
            trouble.reason if trouble is not None else "",
        )


def _pipeline(content: dict[str, Any]) -> Pipeline | None:
    """The pipeline of a revision. None means that another version of osctl wrote it."""
    try:
        return Pipeline.model_validate(content)
    except ValidationError:
        return None
