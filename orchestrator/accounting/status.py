"""What the ledger says of a pipeline right now. Status, watch, cost, compare and a launch's display share this view.

Owns the states of a pipeline, a stage and an attempt. Their time and bill come from `history` and `cost`. Refuses to write, to guess (a
live attempt that has written nothing yet is `starting`) and to read anything but the ledger.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal

from opensora.dataset.usage import LEFT_OUT
from orchestrator.accounting.cost import Bill, account, merge
from orchestrator.accounting.history import AttemptHistory, History
from orchestrator.accounting.node_fold import Reading
from orchestrator.inputs.standing import find
from orchestrator.ledger.checkpoints import Place
from orchestrator.ledger.evaluations import readings
from orchestrator.ledger.keys import run_key
from orchestrator.ledger.objects import Remark
from orchestrator.ledger.records import UNUSED, ClipsUsed, Committed, Evaluation, Event, JournalPiece, Lease, Trouble
from orchestrator.ledger.store import Ledger
from orchestrator.recipe import gates
from orchestrator.recipe.pipeline import Pipeline, Stage

PACE_STEPS = 200
"""A stage's pace is the median time of this many newest steps. Arbitrary."""
LIVE_S = 60.0
"""An open attempt that wrote no journal piece for this long is shown as silent. Arbitrary: twelve pieces at the default interval."""


@dataclass(frozen=True)
class AttemptStatus:
    """One attempt. Times are Unix seconds."""

    number: int
    state: str
    """running, starting, waiting (in a cluster, for devices or an image), silent, unreadable, or the class of its end."""
    run_key: str
    step: int | None
    """The newest step that has ended. None means that the attempt has not written anything."""
    reason: str
    """Why it is in this state. Empty means that no reason is known."""
    bound: float | None
    ended: float | None
    usd: Decimal
    pool: str | None = None
    """The pool of the cluster in which it was made. None means its cluster had no pools."""
    nodes: int = 1
    nodes_asked: int = 1
    """How many nodes its stage asked for."""

    @property
    def where(self) -> str:
        """Its pool and number of nodes, for people. Empty means that it has all nodes of a cluster without pools."""
        fewer = f"on {self.nodes} of {self.nodes_asked} nodes" if self.nodes != self.nodes_asked else ""
        return " ".join(filter(None, (fewer, f"in pool {self.pool}" if self.pool else "")))


@dataclass(frozen=True)
class StageStatus:
    """One stage under its current inputs."""

    name: str
    parent: str | None
    state: str
    """blocked, ready, running, committed, failed."""
    inputs_digest: str | None
    step: int
    """Step of the committed result, or else of the newest attempt, which may be repeating steps of an earlier one."""
    reached: int
    """The furthest step that any attempt under these inputs has ended."""
    steps: int
    """Steps of the whole stage."""
    loss: float | None
    """Mean over the last tenth of the steps up to `step`, at most over the `node_fold.WINDOW` newest."""
    step_s: float | None
    """Median wall seconds of a step, with waiting."""
    eta_s: float | None
    """Seconds until the last step at this pace."""
    why: str
    """Why it is not running, or how it failed."""
    attempts: tuple[AttemptStatus, ...]
    wall_s: float
    """Seconds in which its devices were held, over all attempts."""
    bill: Bill
    evaluation: dict[str, float]
    committed: Committed | None
    published_gpu_hours: float | None
    data: ClipsUsed | None = None
    """How much of its data the newest attempt uses. None means that the attempt has not written that."""
    at_the_end: str = "evaluating"
    """What it does between its last step and its result, in one word."""
    broken: bool = False
    """Whether its result is in the store but cannot be read."""
    evaluations: tuple[Evaluation, ...] = ()
    """Those beside its attempts, the newest last."""
    earlier: tuple[Earlier, ...] = ()
    """What was spent on this stage under other inputs, oldest first."""

    @property
    def earlier_bill(self) -> Bill:
        return merge(one.bill for one in self.earlier)

    @property
    def warning(self) -> str:
        """What failed in the completed attempt without changing its result, e.g. a sample that was not drawn. Empty means nothing."""
        return self.attempts[-1].reason if self.attempts and self.attempts[-1].state == "completed" else ""

    @property
    def not_used(self) -> tuple[str, ...]:
        """Sentences about data that is left out or cut. Empty also if the stage ended because of it, since `why` says it then."""
        return self.data.sentences() if self.data is not None and LEFT_OUT not in self.why else ()


@dataclass(frozen=True)
class Earlier:
    """What was spent on a stage under other inputs than the current ones: another configuration, other data or another parent."""

    stage: str
    inputs_digest: str
    attempts: int
    step: int
    """The furthest step that an attempt has ended."""
    committed: bool
    bill: Bill


@dataclass(frozen=True)
class PreparationStatus:
    """The data set that is made of raw videos before the first stage begins. Its rooms lie above this one: who reads the store fills it in.

    It is billed whole, with all that was ever spent on the data set of that name, whoever asked for it.
    """

    name: str
    state: str
    """asked, running, prepared, stopped, failed; unknown: the store has nothing of it."""
    step: str
    """At which it is. Empty means that it has not said."""
    done: int
    """Rows of that step that are over."""
    rows: int
    eta_s: float | None
    reason: str
    """How it ended. Empty means that it lives, or that no reason is known."""
    attempts: int
    core_hours: float
    gpu_hours: float
    usd: Decimal
    """Of what is priced."""
    not_priced: tuple[str, ...]
    """Devices that it held and that are in no price list."""
    device_seconds: Mapping[str, float]
    """By step."""
    clips: int | None = None
    place: str | None = None
    digest: str | None = None


@dataclass(frozen=True)
class Snapshot:
    """One pipeline."""

    name: str
    state: str
    """pending, running, succeeded, failed, suspended, cancelled."""
    driver: str | None
    """Who holds the lease. None means nobody does."""
    stages: tuple[StageStatus, ...]
    remarks: tuple[str, ...] = ()
    """Objects in the store that are not shown or not used: the key, what is wrong, and what to do."""
    said: Event | None = None
    """What the live driver last observed about the whole pipeline: what it waits for. If the driver is gone, the event with which it ended,
    if any."""
    former: tuple[Earlier, ...] = ()
    """What was spent on stages that the recipe no longer names, oldest first."""
    store: str = ""
    """URL of the store."""
    preparation: PreparationStatus | None = None
    """Of its clips, where its recipe names raw videos."""

    @property
    def bill(self) -> Bill:
        """Everything that was ever paid for this pipeline's stages."""
        return merge([*(stage.bill for stage in self.stages), *(one.bill for one in self.earlier)])

    @property
    def earlier(self) -> tuple[Earlier, ...]:
        """What was spent on stages under other inputs, then on stages that the recipe no longer names."""
        return (*(one for stage in self.stages for one in stage.earlier), *self.former)

    def bills(self) -> Iterator[tuple[str, Bill]]:
        """(stage, or stage@inputs for an earlier one; its bill)."""
        yield from ((stage.name, stage.bill) for stage in self.stages)
        yield from ((f"{one.stage}@{one.inputs_digest}", one.bill) for one in self.earlier)

    @property
    def usd(self) -> Decimal:
        """Of its stages, and of its clips."""
        return self.bill.usd + (self.preparation.usd if self.preparation is not None else 0)


def take_snapshot(pipeline: Pipeline, history: History, now: float) -> Snapshot:
    """What the ledger says at Unix time `now`. What cannot be read is left out, and `remarks` names it. Raises Unreachable."""
    ledger = history.ledger
    stages: list[StageStatus] = []
    results: dict[str, Committed] = {}
    holder = ledger.holder(now)
    events = history.events()
    worked_on = history.stages(now)
    for stage in pipeline.stages:
        status = _stage(stage, history, results, now, queued=pipeline.backend == "kubernetes")
        others = [inputs_digest for name, inputs_digest in worked_on if name == stage.name and inputs_digest != status.inputs_digest]
        status = replace(status, earlier=_earlier(stage.name, others, history, now, queued=pipeline.backend == "kubernetes"))
        if status.committed is not None:
            results[stage.name] = status.committed
        stages.append(status)
    stages = [_held(stage, pipeline, stages, ledger) for stage in stages]
    driver = holder.holder if holder else None
    former: tuple[Earlier, ...] = ()
    for name in dict.fromkeys(name for name, _ in worked_on if name not in {stage.name for stage in pipeline.stages}):
        others = [inputs_digest for other, inputs_digest in worked_on if other == name]
        former += _earlier(name, others, history, now, queued=pipeline.backend == "kubernetes")
    current = Snapshot(
        pipeline.name,
        _state(stages, events, holder is not None),
        driver,
        tuple(stages),
        said=_said(events, holder),
        former=former,
        store=ledger.store.url,
    )
    books = (f"{about} {remark}" for about, bill in current.bills() for remark in bill.remarks())
    return replace(current, remarks=(*_remarks(stages, events, ledger), *books))


def _held(status: StageStatus, pipeline: Pipeline, stages: Sequence[StageStatus], ledger: Ledger) -> StageStatus:
    """The same; where it waits for the gate of its parent, it says so."""
    parent = next((one for one in stages if one.name == status.parent), None)
    gate = pipeline.stage(parent.name).spec.gate if parent is not None else None
    if parent is None or gate is None or parent.committed is None or status.state != "ready":
        return status
    decisions = ledger.gate_decisions(parent.name, parent.committed.inputs_digest)
    before = next((one.evaluation for one in stages if one.name == parent.parent), {})
    stands = gates.stands(gate, parent.name, decisions[-1] if decisions else None, parent.evaluation or None, before)
    return status if stands.state in ("open", "passes") else replace(status, state="blocked", why=stands.why)


def _attempts(history: History, stage: str, inputs_digest: str, now: float, *, queued: bool) -> list[AttemptHistory]:
    """The attempts of a stage, with the pools in which they were made. `queued`: in a cluster; elsewhere there are no pools to look for."""
    found = history.attempts(stage, inputs_digest, now)
    placements = [history.placement(one) if queued else None for one in found]
    return [
        one if placed is None or placed.pool is None else replace(one, time=replace(one.time, pool=placed.pool))
        for one, placed in zip(found, placements, strict=True)
    ]


def _earlier(stage: str, inputs_digest: Sequence[str], history: History, now: float, *, queued: bool) -> tuple[Earlier, ...]:
    found = []
    for each in inputs_digest:
        attempts = _attempts(history, stage, each, now, queued=queued)
        if attempts:
            committed = history.ledger.committed(stage, each) is not None
            reached = max((one.step or 0 for one in attempts), default=0)
            bill = account([one.time for one in attempts], history.ledger.evaluations(stage, each) if committed else ())
            found.append((attempts[0].intent.created, Earlier(stage, each, len(attempts), reached, committed, bill)))
    return tuple(one for _, one in sorted(found, key=lambda item: item[0]))


def _remarks(stages: Sequence[StageStatus], events: Sequence[Event], ledger: Ledger) -> tuple[str, ...]:
    """First checkpoints that the last driver did not use for stages that are not committed yet, then objects that cannot be read."""
    committed = {stage.name for stage in stages if stage.committed is not None}
    newest = max((event.epoch for event in events), default=0)
    unused = [event for event in events if event.says_unused and event.epoch == newest and event.stage not in committed]
    said = tuple(dict.fromkeys(f"{event.stage} attempt {event.attempt}: {event.detail}" for event in unused))
    return said + tuple(_told(remark) for key, remark in sorted(ledger.remarks.items()) if not any(key in text for text in said))


def _told(remark: Remark) -> str:
    """The remark as text. If it is about a manifest, the text also names the checkpoint."""
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
    # A driver that was killed has written no end. Its pipeline can go on, so it is suspended.
    return ended[-1].detail.split(":")[0] if ended and ended[-1] is events[-1] else "suspended"


def _stage(stage: Stage, history: History, results: dict[str, Committed], now: float, *, queued: bool) -> StageStatus:
    parent = stage.spec.parent
    published = stage.spec.published.gpu_hours if stage.spec.published else None
    if parent is not None and parent not in results:
        return StageStatus(
            stage.name, parent, "blocked", None, 0, 0, stage.config.steps, None, None, None, f"waits for {parent}", (),
            0.0, account([]), {}, None, published,
        )  # fmt: skip
    inputs_digest = find(history.ledger, stage, results[parent] if parent else None)
    committed = history.ledger.committed(stage.name, inputs_digest)
    broken = history.ledger.remarks.get(history.ledger.keys.committed(stage.name, inputs_digest))
    found = _attempts(history, stage.name, inputs_digest, now, queued=queued)
    evaluations = history.ledger.evaluations(stage.name, inputs_digest) if committed else []
    bill = account([one.time for one in found], evaluations)
    told = [_attempt(one, line.usd, history, now, queued) for one, line in zip(found, bill.attempts, strict=True)]
    attempts = tuple(sorted([*told, *_unread(stage, inputs_digest, history.ledger)], key=lambda attempt: attempt.number))
    step = committed.step if committed else (found[-1].step or 0) if found else 0
    recent = _recent(found)
    pace = _median([reading.wall_s for reading in recent[-PACE_STEPS:]])
    losses = [reading.loss for reading in recent if reading.loss is not None]
    tail = losses[-max(1, step // 10) :]
    last = attempts[-1] if attempts else None
    asks = bool(stage.config.prompts) or stage.config.evaluate is not None
    return StageStatus(
        name=stage.name,
        parent=parent,
        state="committed" if committed else "failed" if broken else _open_state(last),
        inputs_digest=inputs_digest,
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
        evaluation=readings(committed, evaluations),
        evaluations=tuple(evaluations),
        committed=committed,
        published_gpu_hours=published,
        at_the_end="evaluating" if asks and not (found and found[-1].intent.config.judging == "beside") else "saving",
        data=history.clips(found[-1]) if found else None,
        broken=broken is not None,
    )


def _open_state(last: AttemptStatus | None) -> str:
    """State of a stage that is not committed, by its last attempt."""
    if last is None:
        return "ready"
    if last.ended is None or last.state == "completed":  # completed: between the outcome and the commit
        return "running"
    return "ready" if last.state in ("drained", "lost", "signal", "preempted", "moved", "peer", "unreadable") else "failed"


def _attempt(one: AttemptHistory, usd: Decimal, history: History, now: float, queued: bool) -> AttemptStatus:
    intent, outcome, ledger = one.intent, one.outcome, history.ledger
    placed = history.placement(one) if queued else None
    heard = one.heard if one.heard is not None else intent.created
    silent_s = now - heard
    if outcome is None and not 0 <= silent_s < LIVE_S and (seen := ledger.silent_s(intent)) is not None:
        silent_s = seen  # pieces have times of another host's clock, which may differ from this one
    unheard = "waiting" if queued else "starting" if silent_s < LIVE_S else "silent"
    live = unheard if one.heard is None else "running" if silent_s < LIVE_S else "silent"
    unread = ledger.remarks.get(ledger.keys.outcome(intent.stage, intent.inputs_digest, intent.attempt))  # its driver has seen it end
    trouble = ledger.trouble(intent.stage, intent.inputs_digest, intent.attempt) if outcome is None else None
    silent = f"nothing heard for {silent_s:.0f} s" if live == "silent" else _at_risk(trouble, one.step)
    return AttemptStatus(
        number=intent.attempt,
        state=outcome.class_ if outcome else "lost" if unread else live,
        run_key=intent.run_key,
        step=one.step,
        reason=outcome.reason if outcome else f"how it ended cannot be told: {unread}" if unread else silent,
        bound=one.time.began,
        ended=outcome.ended if outcome else heard if unread else None,
        usd=usd,
        pool=one.time.pool,
        nodes=intent.nodes,
        nodes_asked=placed.nodes_asked if placed is not None else intent.nodes,
    )


def _recent(attempts: Sequence[AttemptHistory]) -> list[Reading]:
    """Readings of the newest steps. A step that was repeated after a resume has the reading of the newest attempt."""
    recent: list[Reading] = []
    for one in attempts:
        recent = [reading for reading in recent if reading.step <= one.time.resumed_from] + list(one.recent)
    return recent


def _unread(stage: Stage, inputs_digest: str, ledger: Ledger) -> Iterator[AttemptStatus]:
    """Attempts whose intent cannot be read. Without the intent their cost is not known."""
    for number in ledger.attempts(stage.name, inputs_digest):
        remark = ledger.remarks.get(ledger.keys.intent(stage.name, inputs_digest, number))
        if remark is None:
            continue
        outcome = ledger.outcome(stage.name, inputs_digest, number)
        newest = ledger.piece(keys[-1]) if (keys := ledger.journal_keys(stage.name, inputs_digest, number)) else None
        last = newest if isinstance(newest, JournalPiece) else None
        yield AttemptStatus(
            number=number,
            state=outcome.class_ if outcome else "unreadable",
            run_key=run_key(ledger.pipeline, stage.name, inputs_digest, number),
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
