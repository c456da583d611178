"""Journals into time: the one fold that status, watch, cost, compare, MLflow, the budget and the driver share.

`NodeFold` is pure: pieces go in one by one, sums come out, and no piece is kept. `History` reads a ledger again and again and asks only for
what is new: of each node the piece after its newest one. It begins at the sums that agents write beside their journal (`records.Totals`),
so that a process which has just started reads a few dozen pieces of a node and not days of them; `verify` leaves these aside.

Owns what of a journal is remembered, and the price of an attempt: the one in its terms. An attempt of a release that wrote none is billed
by the price list, at the cluster of the revision under which it was launched. Refuses to write.

Pieces of a node are written in order, so one that is there means that all before it are there or will never come. Clocks of two nodes are
never compared here.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar, cast

from pydantic import ValidationError

from orchestrator.cluster import ClusterProfile
from orchestrator.cost import AttemptTime, NodeTime
from orchestrator.errors import UsageError
from orchestrator.ledger import READERS, Ledger, Remark
from orchestrator.prices import Prices, load_prices, price_of
from orchestrator.records import WAITING, Event, Intent, JournalPiece, Outcome, Price, Revision, Totals

Answer = TypeVar("Answer")

WINDOW = 256
"""Steps whose loss and time are remembered. Arbitrary: what a mean over the last tenth of 2,500 steps needs."""
MOST_RUNS = 1024
"""Intervals between two checkpoints that are remembered of a node, 64 KiB; beyond it old ones are put together two by two."""
TOTALS_EVERY = 16
"""Pieces between two sums that an agent writes: what a process that has just started reads of each node at most. On S3 a read takes 2 ms
of a core, so that 8 nodes cost 0.1 CPU-s on average."""
OTHERS = 4
"""Flush intervals between two questions for the pieces of a node that is not the first, to who looks each second."""
SILENT_S = 60.0
"""A node without a new piece for so long is asked for with a listing, which also finds what lies behind a piece that was refused."""
CALM_S = 5.0
"""How old may be, to who looks each second, what folders of stages there are and what is published."""
LATE_S = 900.0
"""Seconds after an attempt's end in which its journal is still looked at: an agent that was given up may live, and what it says is paid."""
CHUNK = 512
"""Pieces in memory at a time, where many are read."""


class Reading(NamedTuple):
    """Of one training step."""

    step: int
    loss: float | None
    wall_s: float
    """Waiting and saving included."""


class NodeFold:
    """One node's journal, added up as it comes. The same pieces in the same order give the same sums, to the last bit."""

    def __init__(self, node: int, resumed_from: int = 0, every_steps: int = 1):
        """`every_steps`: of the attempt's checkpoints. Pieces end with each such step, so steps between two are never told apart."""
        self.node, self.resumed_from, self.every_steps = node, resumed_from, every_steps
        self.devices = 1
        self.seq = -1
        """Number of the newest piece that is in it."""
        self.pieces = 0
        self.read = 0
        """Of these, those that were not in sums to begin with."""
        self.start: float | None = None
        self.end: float | None = None
        self.spent: dict[str, float] = {}
        self.last_step: int | None = None
        self.runs: list[tuple[int, int, float, int]] = []
        """Of finished steps; see `records.Totals.runs`."""
        self.under_way = 0.0
        """Seconds of `step` since the last finished step."""
        self.recent: deque[Reading] = deque(maxlen=WINDOW)
        self.asked = self.due = 0.0
        """When its next piece was last asked for in vain, and before when it need not be; by the clock of who asks."""

    def add(self, piece: JournalPiece) -> None:
        """One that is behind the newest; another changes nothing."""
        if piece.seq <= self.seq:
            return
        self.seq, self.devices = piece.seq, piece.devices
        self.pieces += 1
        self.read += 1
        for category, seconds in piece.spent.items():
            self.spent[category] = self.spent.get(category, 0.0) + seconds
        if not set(piece.spent) <= set(WAITING):
            self.start = piece.start if self.start is None else min(self.start, piece.start)
            self.end = piece.end if self.end is None else max(self.end, piece.end)
        self._steps(piece)
        for line in piece.metrics:
            if isinstance(step := line.get("step"), int):
                times = (line.get(name) for name in ("step_s", "data_wait_s", "checkpoint_s"))
                loss = line.get("loss")
                wall_s = sum(float(time) for time in times if isinstance(time, int | float))
                self.recent.append(Reading(step, float(loss) if isinstance(loss, int | float) else None, wall_s))

    def _steps(self, piece: JournalPiece) -> None:
        """What a piece without a finished step spent belongs to the step under way, and never to the steps before it."""
        seconds = self.under_way + piece.spent.get("step", 0.0)
        if piece.first_step is None or piece.last_step is None:
            self.under_way = seconds
            return
        first, last, self.under_way = piece.first_step, piece.last_step, 0.0
        self.last_step = last
        if self.runs and (self.runs[-1][0] - 1) // self.every_steps == (last - 1) // self.every_steps:
            before = self.runs[-1]
            self.runs[-1] = (min(before[0], first), max(before[1], last), before[2] + seconds, before[3])
            return
        self.runs.append((first, last, seconds, piece.seq))
        if len(self.runs) > MOST_RUNS:
            old, young = self.runs[: MOST_RUNS // 2], self.runs[MOST_RUNS // 2 :]
            pairs = zip(old[::2], old[1::2], strict=True)
            self.runs = [(min(a[0], b[0]), max(a[1], b[1]), a[2] + b[2], a[3]) for a, b in pairs] + young

    def first_piece_with(self, step: int) -> int:
        """Number of a piece that is not behind the first one with this step or a later one."""
        return next((seq for _, last, _, seq in self.runs if last >= step), self.seq + 1)

    def all_runs(self) -> list[tuple[int, int, float, int]]:
        """Those of finished steps, and the step under way."""
        reached = self.last_step if self.last_step is not None else self.resumed_from
        return self.runs + ([(reached + 1, reached + 1, self.under_way, self.seq)] if self.under_way else [])

    def time(self) -> NodeTime:
        runs = tuple((first, last, seconds) for first, last, seconds, _ in self.all_runs())
        return NodeTime(self.node, self.devices, self.start, self.end, dict(self.spent), runs)

    def totals(self) -> Totals:
        """Of at least one piece."""
        return Totals(
            node=self.node, seq=self.seq, pieces=self.pieces, start=self.start, end=self.end, devices=self.devices, spent=self.spent,
            last_step=self.last_step, runs=tuple(self.all_runs()), recent=tuple(self.recent),
        )  # fmt: skip

    def begin_at(self, totals: Totals) -> None:
        """As if every piece up to these had been added."""
        self.seq, self.pieces, self.devices = totals.seq, totals.pieces, totals.devices
        self.start, self.end, self.spent = totals.start, totals.end, dict(totals.spent)
        self.last_step, self.runs, self.under_way = totals.last_step, list(totals.runs), 0.0
        reached = self.last_step if self.last_step is not None else self.resumed_from
        if self.runs and self.runs[-1][0] > reached:
            self.under_way = self.runs.pop()[2]
        self.recent = deque((Reading(*reading) for reading in totals.recent), maxlen=WINDOW)


def fold(pieces: Sequence[JournalPiece], resumed_from: int = 0, every_steps: int = 1) -> tuple[NodeTime, ...]:
    """Pieces of several nodes, in any order, added up."""
    folds: dict[int, NodeFold] = {}
    for piece in sorted(pieces, key=lambda piece: (piece.node, piece.seq)):
        folds.setdefault(piece.node, NodeFold(piece.node, resumed_from, every_steps)).add(piece)
    return tuple(one.time() for one in folds.values())


@dataclass(frozen=True)
class AttemptHistory:
    """An attempt as it stands now."""

    intent: Intent
    outcome: Outcome | None
    time: AttemptTime
    heard: float | None
    """End of the newest piece of any node; none: there is no piece."""
    step: int | None
    """Newest step that it has ended, else the one that it went on from; none: it has not said anything."""
    recent: tuple[Reading, ...]
    """Of its newest steps, ascending."""
    first: NodeFold
    """Sums of its first node."""


@dataclass
class _Open:
    """What is kept of an attempt between two looks."""

    intent: Intent
    price: Price | None
    folds: dict[int, NodeFold]
    begun: bool = False
    closed: bool = False
    listed: float = 0.0
    faults: list[str] = field(default_factory=list)


class History:
    """A ledger's attempts, looked at again and again."""

    def __init__(
        self, ledger: Ledger, prices: Callable[[], Prices] = load_prices, *, verify: bool = False, keep: int = 0, calm: bool = False
    ):
        """
        Args:
            prices: the list for attempts whose ledger holds no price; asked for once, and only where there are such attempts.
            verify: add up every piece of every journal, whatever sums lie beside them.
            calm: who looks each second need not ask for what an agent cannot have written yet.
            keep: how many of the newest pieces of first nodes stay at hand for `pieces`.
        """
        self.ledger, self.verify, self.calm = ledger.lenient(), verify, calm
        self._prices = prices
        self._list: Prices | None = None
        self._revisions: list[Revision] | None = None
        self._open: dict[tuple[str, str, int], _Open] = {}
        self._over: dict[tuple[str, str, int], AttemptHistory] = {}
        self._answers: dict[tuple[str, str], tuple[float, Any]] = {}
        self._events: list[Event] = []
        self._seen: tuple[int, int] | None = None
        self._kept: deque[tuple[str, JournalPiece]] = deque(maxlen=keep)

    def events(self) -> list[Event]:
        """All of them, by epoch and number."""
        for event in self.ledger.events(after=self._seen):
            self._events.append(event)
            self._seen = event.epoch, event.seq
        return self._events

    def stages(self, now: float) -> list[tuple[str, str]]:
        """Every (stage, inputs) that was ever worked on."""
        return self._calmly(("", ""), now, self.ledger.stages)

    def _calmly(self, key: tuple[str, str], now: float, read: Callable[[], Answer]) -> Answer:
        when, answer = self._answers.get(key, (0.0, None))
        if answer is None or not self.calm or not 0 <= now - when < CALM_S:
            answer = read()
            self._answers[key] = now, answer
        return cast(Answer, answer)

    def attempts(self, stage: str, inputs: str, now: float) -> list[AttemptHistory]:
        """Every attempt of a stage's inputs, by number. Raises Unreachable, Refused (a damaged record)."""
        numbers = self.ledger.attempts(stage, inputs)
        unknown = [number for number in numbers if (stage, inputs, number) not in self._over]
        # Outcomes first: where there is one, what is read after it is all that will be there, but for what comes late.
        outcomes = {number: self.ledger.outcome(stage, inputs, number) for number in unknown}
        published = self._calmly((stage, inputs), now, lambda: self.ledger.published(stage, inputs)) if unknown else {}
        found = []
        for number in numbers:
            key = stage, inputs, number
            one = self._over.get(key) or self._attempt(key, outcomes[number], published.get(number), now)
            if one is None:
                continue
            if one.outcome is not None and now - max(one.outcome.ended, one.heard or 0.0) > LATE_S:
                self._over[key] = one
                self._open.pop(key, None)
            found.append(one)
        return found

    def of(self, intent: Intent, now: float) -> tuple[NodeTime, ...]:
        """What the nodes of an attempt have said so far, whatever its outcome."""
        seen = self._look((intent.stage, intent.inputs, intent.attempt), None, now)
        return () if seen is None else tuple(one.time() for one in seen.folds.values() if one.pieces)

    def unwritten(self, intent: Intent) -> list[Totals]:
        """Sums that nobody has written down though many pieces are in them: of an agent of a release that wrote none."""
        seen = self._open.get((intent.stage, intent.inputs, intent.attempt))
        folds = seen.folds.values() if seen is not None else ()
        return [one.totals() for one in folds if one.read >= TOTALS_EVERY]

    def pieces(self, attempt: AttemptHistory, after: int) -> Iterator[JournalPiece]:
        """Pieces of the first node behind number `after`, up to the newest that is in the sums. What cannot be read is left out."""
        intent = attempt.intent
        keys = [
            self.ledger.keys.journal(intent.stage, intent.inputs, intent.attempt, 0, seq) for seq in range(after + 1, attempt.first.seq + 1)
        ]
        kept = dict(self._kept) if keys else {}
        with ThreadPoolExecutor(READERS) as pool:
            for start in range(0, len(keys), READERS):
                batch = pool.map(lambda key: kept.get(key) or self._piece(key, None), keys[start : start + READERS])
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
        """Bring an attempt's sums up to its journal. None: a folder without an intent, which nobody wrote through the ledger."""
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
        with ThreadPoolExecutor(READERS) as pool:
            list(pool.map(lambda one: self._follow(seen, one, now), seen.folds.values()))

    def _follow(self, seen: _Open, one: NodeFold, now: float) -> None:
        """Read piece after piece until one is not there yet: no listing, however long the journal is."""
        intent = seen.intent
        seq = first = one.seq + 1
        pause = intent.flush_s * (OTHERS if one.node else 1)
        while True:
            key = self.ledger.keys.journal(intent.stage, intent.inputs, intent.attempt, one.node, seq)
            before = len(seen.faults)
            piece = self._piece(key, seen)
            if piece is None and len(seen.faults) == before:
                # What was found was not there when it was last asked for: its node flushes again a whole interval after that.
                one.due = one.asked + pause if seq > first else now + pause / 2 if one.node else now
                one.asked = now
                return
            if piece is not None:
                self._add(one, key, piece)
            else:
                one.seq = seq  # damaged: said, and never asked for again
            seq += 1

    def _read_listed(self, seen: _Open, keys: Sequence[str]) -> None:
        with ThreadPoolExecutor(READERS) as pool:
            for start in range(0, len(keys), CHUNK):
                batch = keys[start : start + CHUNK]
                for key, piece in zip(batch, pool.map(lambda key: self._piece(key, seen), batch), strict=True):
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
        terms = self.ledger.terms(intent.stage, intent.inputs, intent.attempt)
        if terms is not None and terms.price is not None:
            return terms.price
        if self._list is None:
            self._list = self._prices()
        prices = self._list
        profile = self._cluster(intent)
        if profile is not None:
            with contextlib.suppress(UsageError):  # its device is in no list: of another one the price is known all the same
                prices = prices.at(profile)
        return price_of(prices, intent.device)

    def _cluster(self, intent: Intent) -> ClusterProfile | None:
        """Of the revision under which the attempt was launched."""
        if self._revisions is None or (self._revisions and self._revisions[-1].created < intent.created):
            self._revisions = [revision for _, revision in self.ledger.lenient().revisions()]  # what cannot be read is said elsewhere
        before = [revision for revision in self._revisions if revision.created <= intent.created] or self._revisions[:1]
        try:
            return ClusterProfile.model_validate(before[-1].pipeline["cluster"]) if before and before[-1].pipeline.get("cluster") else None
        except ValidationError:
            return None  # of another version of this package
