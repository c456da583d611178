"""A ledger's attempts with their time and price, read repeatedly. Status, watch, cost, compare, MLflow and the driver share it.

`History` reads only what is new: for each node the piece after the newest one that it has. It begins at the sums that agents write beside
their journal (`records.Totals`), so that a process which has just started reads a few dozen pieces of a node and not days of them. With
`verify` it does not use these sums.

Owns what is read when, and the price of an attempt: the one in its terms. An attempt of a release that wrote no terms is billed by the
price list, for the cluster of the revision under which it was launched. Refuses to write, and to add up (`node_fold`).
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

from pydantic import ValidationError

from orchestrator.accounting.cost import AttemptTime, NodeTime
from orchestrator.accounting.node_fold import TOTALS_EVERY, NodeFold, Reading
from orchestrator.errors import UsageError
from orchestrator.ledger.objects import Remark
from orchestrator.ledger.reading import READERS, read_many
from orchestrator.ledger.records import ClipsUsed, Event, Intent, JournalPiece, Outcome, Placement, Price, Revision, Totals
from orchestrator.ledger.store import Ledger
from orchestrator.recipe.cluster_profile import ClusterProfile
from orchestrator.recipe.prices import Prices, load_prices, price_of

Answer = TypeVar("Answer")

OTHERS = 4
"""With `calm`, how many flush intervals pass between two reads of the next piece, for every node but the first."""
SILENT_S = 60.0
"""After this long without a new piece a node's journal is listed, which also finds pieces after a piece that the store refused."""
CALM_S = 5.0
"""With `calm`, how old the list of stages and of published checkpoints may be."""
LATE_S = 900.0
"""How long an attempt's journal is still read after its end: an agent that was given up may live, and the time that it books is paid."""
CHUNK = 512
"""How many pieces are in memory at a time if many are read."""


@dataclass(frozen=True)
class AttemptHistory:
    """An attempt as it is in the ledger now."""

    intent: Intent
    outcome: Outcome | None
    time: AttemptTime
    heard: float | None
    """Unix time at which the newest piece of any node ends. None means there is no piece."""
    step: int | None
    """The newest step that has ended, or else the step that the attempt resumed. None means it has not written anything."""
    recent: tuple[Reading, ...]
    """Losses and times of the newest steps, ascending."""
    first: NodeFold
    """The sums of the first node."""


@dataclass
class _Open:
    """What is kept of an attempt between two reads."""

    intent: Intent
    price: Price | None
    folds: dict[int, NodeFold]
    begun: bool = False
    closed: bool = False
    listed: float = 0.0
    faults: list[str] = field(default_factory=list)


class History:
    """Reads a ledger's attempts repeatedly."""

    def __init__(
        self, ledger: Ledger, prices: Callable[[], Prices] = load_prices, *, verify: bool = False, keep: int = 0, calm: bool = False
    ):
        """
        Args:
            prices: gives the price list for attempts without a price in the ledger. Called once, and only if there are such attempts.
            verify: add up every piece of every journal, and do not use the sums beside them.
            calm: for a caller that reads each second. Do not read what an agent cannot have written yet.
            keep: how many of the newest pieces of first nodes stay in memory for `pieces`.
        """
        self.ledger, self.verify, self.calm = ledger.lenient(), verify, calm
        self._prices = prices
        self._list: Prices | None = None
        self._revisions: list[Revision] | None = None
        self._open: dict[tuple[str, str, int], _Open] = {}
        self._over: dict[tuple[str, str, int], AttemptHistory] = {}
        self._clips: dict[tuple[str, str, int], ClipsUsed | None] = {}
        self._placements: dict[tuple[str, str, int], Placement | None] = {}
        self._answers: dict[tuple[str, str], tuple[float, Any]] = {}
        self._events: list[Event] = []
        self._seen: tuple[int, int] | None = None
        self._kept: deque[tuple[str, JournalPiece]] = deque(maxlen=keep)

    def events(self) -> list[Event]:
        """All events, by epoch and number. Raises Unreachable."""
        for event in self.ledger.events(after=self._seen):
            self._events.append(event)
            self._seen = event.epoch, event.seq
        return self._events

    def stages(self, now: float) -> list[tuple[str, str]]:
        """Every (stage, inputs digest) that was ever worked on. Raises Unreachable."""
        return self._calmly(("", ""), now, self.ledger.stages)

    def _calmly(self, key: tuple[str, str], now: float, read: Callable[[], Answer]) -> Answer:
        when, answer = self._answers.get(key, (0.0, None))
        if answer is None or not self.calm or not 0 <= now - when < CALM_S:
            answer = read()
            self._answers[key] = now, answer
        return cast(Answer, answer)

    def attempts(self, stage: str, inputs_digest: str, now: float) -> list[AttemptHistory]:
        """Every attempt of a stage under these inputs, by number. `now`: Unix time.

        Raises:
            Unreachable: the store.
            Refused: a record is damaged.
        """
        numbers = self.ledger.attempts(stage, inputs_digest)
        unknown = [number for number in numbers if (stage, inputs_digest, number) not in self._over]
        # Outcomes first: if there is one, no more pieces will come, except from an agent that was given up.
        outcomes = {number: self.ledger.outcome(stage, inputs_digest, number) for number in unknown}
        published = self._calmly((stage, inputs_digest), now, lambda: self.ledger.published(stage, inputs_digest)) if unknown else {}
        found = []
        for number in numbers:
            key = stage, inputs_digest, number
            one = self._over.get(key) or self._attempt(key, outcomes[number], published.get(number), now)
            if one is None:
                continue
            if one.outcome is not None and now - max(one.outcome.ended, one.heard or 0.0) > LATE_S:
                self._over[key] = one
                self._open.pop(key, None)
            found.append(one)
        return found

    def clips(self, one: AttemptHistory) -> ClipsUsed | None:
        """How much of its data an attempt uses. None means the attempt has not written that. Raises Unreachable."""
        intent = one.intent
        key = intent.stage, intent.inputs_digest, intent.attempt
        if key not in self._clips:
            found = self.ledger.clips(*key)
            if found is None and key not in self._over:
                return None
            self._clips[key] = found
        return self._clips[key]

    def placement(self, one: AttemptHistory) -> Placement | None:
        """Where an attempt was made. None means its cluster had no pools and its stage did not shrink. Raises Unreachable."""
        key = one.intent.stage, one.intent.inputs_digest, one.intent.attempt
        if key not in self._placements:
            self._placements[key] = self.ledger.placement(*key)  # it is written before the intent, so one look is enough
        return self._placements[key]

    def of(self, intent: Intent, now: float) -> tuple[NodeTime, ...]:
        """The time that the nodes of an attempt have booked so far, whatever its outcome. `now`: Unix time. Raises Unreachable."""
        seen = self._look((intent.stage, intent.inputs_digest, intent.attempt), None, now)
        return () if seen is None else tuple(one.time() for one in seen.folds.values() if one.pieces)

    def unwritten(self, intent: Intent) -> list[Totals]:
        """Sums over many pieces that the store does not have, because the agent's release wrote no sums."""
        seen = self._open.get((intent.stage, intent.inputs_digest, intent.attempt))
        folds = seen.folds.values() if seen is not None else ()
        return [one.totals() for one in folds if one.read >= TOTALS_EVERY]

    def pieces(self, attempt: AttemptHistory, after: int) -> Iterator[JournalPiece]:
        """The first node's pieces after number `after`, up to the newest one in the sums. Pieces that cannot be read are left out."""
        intent = attempt.intent
        keys = [
            self.ledger.keys.journal(intent.stage, intent.inputs_digest, intent.attempt, 0, seq)
            for seq in range(after + 1, attempt.first.seq + 1)
        ]
        kept = dict(self._kept) if keys else {}
        for start in range(0, len(keys), READERS):
            batch = read_many(lambda key: kept.get(key) or self._piece(key, None), keys[start : start + READERS])
            yield from (piece for piece in batch if piece is not None)

    # --- Reading -------------------------------------------------------------------------------------------------------------------

    def _attempt(self, key: tuple[str, str, int], outcome: Outcome | None, published: int | None, now: float) -> AttemptHistory | None:
        seen = self._look(key, outcome, now)
        if seen is None:
            return None
        intent = seen.intent
        nodes = [one for one in seen.folds.values() if one.pieces]
        resumed = intent.resume.step if intent.resume else 0
        time = AttemptTime(
            attempt=intent.attempt,
            devices=intent.nodes * intent.devices_per_node,
            device=intent.device,
            price=seen.price,
            bound=outcome.bound if outcome else None,
            ended=outcome.ended if outcome else None,
            nodes=tuple(one.time() for one in nodes),
            resumed_from=resumed,
            last_published=published if published is not None else resumed,
            faults=tuple(seen.faults),
        )
        step = max((one.last_step for one in nodes if one.last_step is not None), default=resumed if nodes or resumed else None)
        heard = max((one.end for one in nodes if one.end is not None), default=None)
        return AttemptHistory(intent, outcome, time, heard, step, tuple(seen.folds[0].recent), seen.folds[0])

    def _look(self, key: tuple[str, str, int], outcome: Outcome | None, now: float) -> _Open | None:
        """Bring an attempt's sums up to date with its journal. None means that the attempt has no intent, so no driver made it."""
        seen = self._open.get(key)
        if seen is None:
            intent = self.ledger.intent(*key)
            if intent is None:
                return None
            every, resumed = intent.config.checkpoint.every_steps, intent.resume.step if intent.resume else 0
            folds = {node: NodeFold(node, resumed, every) for node in range(intent.nodes)}
            seen = self._open[key] = _Open(intent, self._price(intent), folds)
        if seen.begun:
            for one in seen.folds.values():
                if not self.calm or outcome is not None or now >= one.due:
                    self._follow(seen, one, now)
        else:
            self._begin(key, seen, now)
            seen.begun, seen.listed = True, now
        silent: list[NodeFold] = []
        if outcome is not None and not seen.closed:
            seen.closed = True
            silent = [one for one in seen.folds.values() if one.pieces and outcome.ended - (one.end or outcome.ended) > SILENT_S]
        elif outcome is None and now - seen.listed > SILENT_S:
            seen.listed = now
            silent = [one for one in seen.folds.values() if now - (one.end or seen.intent.created) > SILENT_S]
        for one in silent:
            self._read_listed(seen, self.ledger.journal_keys(*key, one.node, one.seq))
        return seen

    def _begin(self, key: tuple[str, str, int], seen: _Open, now: float) -> None:
        totals = [] if self.verify else self.ledger.newest_totals(*key, seen.intent.nodes)
        for one in totals:
            if one.node in seen.folds:
                seen.folds[one.node].begin_at(one)
        if not totals:
            self._read_listed(seen, self.ledger.journal_keys(*key))
            return
        read_many(lambda one: self._follow(seen, one, now), list(seen.folds.values()))

    def _follow(self, seen: _Open, one: NodeFold, now: float) -> None:
        """Read piece after piece until one is not there yet. This lists nothing, however long the journal is."""
        intent = seen.intent
        seq = first = one.seq + 1
        pause = intent.flush_s * (OTHERS if one.node else 1)
        while True:
            key = self.ledger.keys.journal(intent.stage, intent.inputs_digest, intent.attempt, one.node, seq)
            before = len(seen.faults)
            piece = self._piece(key, seen)
            if piece is None and len(seen.faults) == before:
                # A piece that was found now was not there at the last read, so its node flushes again a whole interval after that read.
                one.due = one.asked + pause if seq > first else now + pause / 2 if one.node else now
                one.asked = now
                return
            if piece is not None:
                self._add(one, key, piece)
            else:
                one.seq = seq  # a damaged piece is listed as a fault, and never read again
            seq += 1

    def _read_listed(self, seen: _Open, keys: Sequence[str]) -> None:
        for start in range(0, len(keys), CHUNK):
            batch = keys[start : start + CHUNK]
            for key, piece in zip(batch, read_many(lambda key: self._piece(key, seen), batch), strict=True):
                if piece is not None and piece.node in seen.folds:
                    self._add(seen.folds[piece.node], key, piece)

    def _add(self, one: NodeFold, key: str, piece: JournalPiece) -> None:
        one.add(piece)
        if piece.node == 0 and self._kept.maxlen:
            self._kept.append((key, piece))

    def _piece(self, key: str, seen: _Open | None) -> JournalPiece | None:
        found = self.ledger.piece(key)
        if isinstance(found, Remark):
            if seen is not None:
                seen.faults.append(f"{found}. Its time is not in the bill")
            return None
        return found

    # --- Prices --------------------------------------------------------------------------------------------------------------------

    def _price(self, intent: Intent) -> Price | None:
        terms = self.ledger.terms(intent.stage, intent.inputs_digest, intent.attempt)
        if terms is not None and terms.price is not None:
            return terms.price
        if self._list is None:
            self._list = self._prices()
        prices = self._list
        profile = self._cluster(intent)
        if profile is not None:
            with contextlib.suppress(UsageError):  # the list may lack the cluster's device but have the attempt's
                prices = prices.at(profile)
        return price_of(prices, intent.device)

    def _cluster(self, intent: Intent) -> ClusterProfile | None:
        """The cluster of the revision under which the attempt was launched."""
        if self._revisions is None or (self._revisions and self._revisions[-1].created < intent.created):
            self._revisions = [revision for _, revision in self.ledger.lenient().revisions()]  # `status` names what cannot be read
        before = [revision for revision in self._revisions if revision.created <= intent.created] or self._revisions[:1]
        try:
            return ClusterProfile.model_validate(before[-1].pipeline["cluster"]) if before and before[-1].pipeline.get("cluster") else None
        except ValidationError:
            return None  # another version of this package wrote it
