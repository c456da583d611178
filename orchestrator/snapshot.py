"""What is known of a pipeline right now, out of its ledger: the view that status, watch, cost, compare and a launch's display share.

Owns what a stage and an attempt are said to be; their time and bill come from `orchestrator.history` and `orchestrator.cost`. Refuses to
write, to guess (a live attempt that nobody has heard of is `starting`) and to ask anyone but the ledger.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal

from orchestrator.checkpoints import Place
from orchestrator.config import Pipeline, Stage
from orchestrator.cost import Bill, account, merge
from orchestrator.history import AttemptHistory, History, Reading
from orchestrator.inputs import find
from orchestrator.ledger import Ledger, Remark
from orchestrator.records import UNUSED, Committed, Event, JournalPiece, Lease, Trouble, run_key

PACE_STEPS = 200
"""Steps whose median time is a stage's pace. Arbitrary."""
LIVE_S = 60.0
"""An open attempt without a journal piece for so long is shown as silent. Arbitrary: twelve pieces at the default interval."""


@dataclass(frozen=True)
class AttemptStatus:
    number: int
    state: str
    """running, starting, waiting (in a cluster, for devices or an image), silent, unreadable, or the class of its end."""
    run_key: str
    step: int | None
    reason: str
    bound: float | None
    ended: float | None
    usd: Decimal


@dataclass(frozen=True)
class StageStatus:
    name: str
    parent: str | None
    state: str
    """blocked, ready, running, committed, failed."""
    inputs: str | None
    step: int
    """Of the committed result, else of the newest attempt: it may be doing again what an earlier one had reached."""
    reached: int
    """Furthest step that any attempt of these inputs has ended."""
    steps: int
    loss: float | None
    """Mean over the last tenth of the steps up to `step`, at most over the `history.WINDOW` newest."""
    step_s: float | None
    """Median wall seconds of a step, waiting included."""
    eta_s: float | None
    why: str
    """Why it is not running, or how it failed."""
    attempts: tuple[AttemptStatus, ...]
    wall_s: float
    """Seconds in which its devices were held, all attempts."""
    bill: Bill
    evaluation: dict[str, float]
    committed: Committed | None
    published_gpu_hours: float | None
    broken: bool = False
    """Whether its result lies there and cannot be read."""
    earlier: tuple[Earlier, ...] = ()
    """What was spent on this stage under other inputs, oldest first."""

    @property
    def earlier_bill(self) -> Bill:
        return merge(one.bill for one in self.earlier)


@dataclass(frozen=True)
class Earlier:
    """What was spent under inputs that are not the current ones: of another configuration, other data or another parent."""

    stage: str
    inputs: str
    attempts: int
    step: int
    """Furthest step that was reached."""
    committed: bool
    bill: Bill


@dataclass(frozen=True)
class Snapshot:
    name: str
    state: str
    """pending, running, succeeded, failed, suspended, cancelled."""
    driver: str | None
    """Who holds the lease, if anyone does."""
    stages: tuple[StageStatus, ...]
    remarks: tuple[str, ...] = ()
    """What lies in the store and is not shown, or not used: key, what it is, what to do."""
    said: Event | None = None
    """What the live driver last observed about all of it: what it waits for. Of one that is gone: its last word, if it had one."""
    former: tuple[Earlier, ...] = ()
    """What was spent on stages that the recipe no longer names, oldest first."""

    @property
    def bill(self) -> Bill:
        """Everything that was ever paid."""
        return merge([*(stage.bill for stage in self.stages), *(one.bill for one in self.earlier)])

    @property
    def earlier(self) -> tuple[Earlier, ...]:
        """Of stages under other inputs, then of stages that the recipe no longer names."""
        return (*(one for stage in self.stages for one in stage.earlier), *self.former)

    def bills(self) -> Iterator[tuple[str, Bill]]:
        """Each with what it is of."""
        yield from ((stage.name, stage.bill) for stage in self.stages)
        yield from ((f"{one.stage}@{one.inputs}", one.bill) for one in self.earlier)

    @property
    def usd(self) -> Decimal:
        return self.bill.usd


def take(pipeline: Pipeline, history: History, now: float) -> Snapshot:
    """Look at the ledger once. Raises Unreachable. What cannot be read is left out, and said in `remarks`."""
    ledger = history.ledger
    stages: list[StageStatus] = []
    results: dict[str, Committed] = {}
    holder = ledger.holder(now)
    events = history.events()
    worked_on = history.stages(now)
    for stage in pipeline.stages:
        status = _stage(stage, history, results, now, queued=pipeline.backend == "kubernetes")
        others = [inputs for name, inputs in worked_on if name == stage.name and inputs != status.inputs]
        status = replace(status, earlier=_earlier(stage.name, others, history, now))
        if status.committed is not None:
            results[stage.name] = status.committed
        stages.append(status)
    driver = holder.holder if holder else None
    former: tuple[Earlier, ...] = ()
    for name in dict.fromkeys(name for name, _ in worked_on if name not in {stage.name for stage in pipeline.stages}):
        former += _earlier(name, [inputs for other, inputs in worked_on if other == name], history, now)
    current = Snapshot(
        pipeline.name,
        _state(stages, events, holder is not None),
        driver,
        tuple(stages),
        said=_said(events, holder),
        former=former,
    )
    books = (f"{about} {remark}" for about, bill in current.bills() for remark in bill.remarks())
    return replace(current, remarks=(*_remarks(stages, events, ledger), *books))


def _earlier(stage: str, inputs: Sequence[str], history: History, now: float) -> tuple[Earlier, ...]:
    found = []
    for each in inputs:
        attempts = history.attempts(stage, each, now)
        if attempts:
            committed = history.ledger.committed(stage, each) is not None
            reached = max((one.step or 0 for one in attempts), default=0)
            bill = account([one.time for one in attempts])
            found.append((attempts[0].intent.created, Earlier(stage, each, len(attempts), reached, committed, bill)))
    return tuple(one for _, one in sorted(found, key=lambda item: item[0]))


def _remarks(stages: Sequence[StageStatus], events: Sequence[Event], ledger: Ledger) -> tuple[str, ...]:
    """First what the last driver would not use of a stage that is not committed yet, then what cannot be read."""
    committed = {stage.name for stage in stages if stage.committed is not None}
    newest = max((event.epoch for event in events), default=0)
    unused = [event for event in events if event.says_unused and event.epoch == newest and event.stage not in committed]
    said = tuple(dict.fromkeys(f"{event.stage} attempt {event.attempt}: {event.detail}" for event in unused))
    return said + tuple(_told(remark) for key, remark in sorted(ledger.remarks.items()) if not any(key in text for text in said))


def _told(remark: Remark) -> str:
    """What a checkpoint is, is said of one whose manifest cannot be read."""
    place = Place.parse(remark.key)
    return str(remark) if place is None else f"{place.stage} attempt {place.attempt}: step {place.step} {UNUSED}{remark}"


def _said(events: Sequence[Event], holder: Lease | None) -> Event | None:
    if holder is None:
        return events[-1] if events and events[-1].kind == "ended" else None
    observed = [event for event in events if event.epoch == holder.epoch and event.kind == "observed" and event.stage is None]
    return observed[-1] if observed else None


def _state(stages: Sequence[StageStatus], events: Sequence[Event], driven: bool) -> str:
    if all(stage.state == "committed" for stage in stages):
        return "succeeded"
    if driven:
        return "running"
    ended = [event for event in events if event.kind == "ended"]
    if not events:
        return "pending"
    # A driver that was killed leaves no last word: what it left can be taken up again, which is what suspended means.
    return ended[-1].detail.split(":")[0] if ended and ended[-1] is events[-1] else "suspended"


def _stage(stage: Stage, history: History, results: dict[str, Committed], now: float, *, queued: bool) -> StageStatus:
    parent = stage.spec.parent
    published = stage.spec.published.gpu_hours if stage.spec.published else None
    if parent is not None and parent not in results:
        return StageStatus(
            stage.name, parent, "blocked", None, 0, 0, stage.config.steps, None, None, None, f"waits for {parent}", (),
            0.0, account([]), {}, None, published,
        )  # fmt: skip
    inputs = find(history.ledger, stage, results[parent] if parent else None)
    committed = history.ledger.committed(stage.name, inputs)
    broken = history.ledger.remarks.get(history.ledger.keys.committed(stage.name, inputs))
    found = history.attempts(stage.name, inputs, now)
    bill = account([one.time for one in found])
    told = [_attempt(one, line.usd, history.ledger, now, queued) for one, line in zip(found, bill.attempts, strict=True)]
    attempts = tuple(sorted([*told, *_unread(stage, inputs, history.ledger)], key=lambda attempt: attempt.number))
    step = committed.step if committed else (found[-1].step or 0) if found else 0
    recent = _recent(found)
    pace = _median([reading.wall_s for reading in recent[-PACE_STEPS:]])
    losses = [reading.loss for reading in recent if reading.loss is not None]
    tail = losses[-max(1, step // 10) :]
    last = attempts[-1] if attempts else None
    return StageStatus(
        name=stage.name,
        parent=parent,
        state="committed" if committed else "failed" if broken else _open_state(last),
        inputs=inputs,
        step=step,
        reached=max([step, *(one.step or 0 for one in found)]),
        steps=stage.config.steps,
        loss=sum(tail) / len(tail) if tail else None,
        step_s=pace,
        eta_s=(stage.config.steps - step) * pace if pace is not None and not committed else None,
        why="" if committed else str(broken) if broken else "" if last is None else last.reason,
        attempts=attempts,
        wall_s=sum(one.held_s / one.devices for one in bill.attempts),
        bill=bill,
        evaluation=committed.evaluation if committed else {},
        committed=committed,
        published_gpu_hours=published,
        broken=broken is not None,
    )


def _open_state(last: AttemptStatus | None) -> str:
    """Of a stage that is not committed, by its last attempt."""
    if last is None:
        return "ready"
    if last.ended is None or last.state == "completed":  # completed: between the outcome and the commit
        return "running"
    return "ready" if last.state in ("drained", "lost", "signal", "preempted", "peer", "unreadable") else "failed"


def _attempt(one: AttemptHistory, usd: Decimal, ledger: Ledger, now: float, queued: bool) -> AttemptStatus:
    intent, outcome = one.intent, one.outcome
    heard = one.heard if one.heard is not None else intent.created
    unheard = "waiting" if queued else "starting" if now - heard < LIVE_S else "silent"
    live = unheard if one.heard is None else "running" if now - heard < LIVE_S else "silent"
    unread = ledger.remarks.get(ledger.keys.outcome(intent.stage, intent.inputs, intent.attempt))  # its driver has seen it end
    trouble = ledger.trouble(intent.stage, intent.inputs, intent.attempt) if outcome is None else None
    silent = f"nothing heard for {now - heard:.0f} s" if live == "silent" else _at_risk(trouble, one.step)
    return AttemptStatus(
        number=intent.attempt,
        state=outcome.class_ if outcome else "lost" if unread else live,
        run_key=intent.run_key,
        step=one.step,
        reason=outcome.reason if outcome else f"how it ended cannot be told: {unread}" if unread else silent,
        bound=one.time.began,
        ended=outcome.ended if outcome else heard if unread else None,
        usd=usd,
    )


def _recent(attempts: Sequence[AttemptHistory]) -> list[Reading]:
    """Of the newest steps, as the newest attempt did them: what an earlier one had done beyond its checkpoint is being done again."""
    recent: list[Reading] = []
    for one in attempts:
        recent = [reading for reading in recent if reading.step <= one.time.resumed_from] + list(one.recent)
    return recent


def _unread(stage: Stage, inputs: str, ledger: Ledger) -> Iterator[AttemptStatus]:
    """Attempts whose intent is there and cannot be read: without it nobody knows what a second of them cost."""
    for number in ledger.attempts(stage.name, inputs):
        remark = ledger.remarks.get(ledger.keys.intent(stage.name, inputs, number))
        if remark is None:
            continue
        outcome = ledger.outcome(stage.name, inputs, number)
        newest = ledger.piece(keys[-1]) if (keys := ledger.journal_keys(stage.name, inputs, number)) else None
        last = newest if isinstance(newest, JournalPiece) else None
        yield AttemptStatus(
            number=number,
            state=outcome.class_ if outcome else "unreadable",
            run_key=run_key(ledger.pipeline, stage.name, inputs, number),
            step=last.last_step if last else None,
            reason=f"its cost is not counted: {remark}",
            bound=outcome.bound if outcome else None,
            ended=outcome.ended if outcome else last.end if last else 0.0,
            usd=Decimal(0),
        )


def _at_risk(trouble: Trouble | None, step: int | None) -> str:
    if trouble is None:
        return ""
    return f"{trouble.reason}; {max(0, (step or 0) - trouble.published)} steps are at risk"


def _median(values: Sequence[float]) -> float | None:
    return sorted(values)[len(values) // 2] if values else None
