"""What is known of a pipeline right now, folded out of its ledger: the view that status, watch, compare and a launch's display share.

Owns the fold. Refuses to write, to guess (a live attempt that nobody has heard of is `starting`) and to ask anyone but the ledger.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from orchestrator.checkpoints import Place
from orchestrator.config import Pipeline, Stage
from orchestrator.cost import AttemptTime, Bill, Prices, account
from orchestrator.inputs import find
from orchestrator.ledger import Ledger, Remark
from orchestrator.records import UNUSED, Committed, Event, JournalPiece, Lease, Trouble, run_key

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
    steps: int
    loss: float | None
    """Mean over the last tenth of the steps that were reported."""
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

    @property
    def usd(self) -> Decimal:
        return sum((stage.bill.usd for stage in self.stages), Decimal(0))


def take(pipeline: Pipeline, ledger: Ledger, prices: Prices, now: float) -> Snapshot:
    """Read the ledger once. Raises Unreachable. What cannot be read is left out, and said in `remarks`."""
    ledger = ledger.lenient()
    stages: list[StageStatus] = []
    results: dict[str, Committed] = {}
    holder = ledger.holder(now)
    events = list(ledger.events())
    for stage in pipeline.stages:
        status = _stage(stage, ledger, prices, results, now, queued=pipeline.backend == "kubernetes")
        if status.committed is not None:
            results[stage.name] = status.committed
        stages.append(status)
    driver = holder.holder if holder else None
    return Snapshot(
        pipeline.name,
        _state(stages, events, holder is not None),
        driver,
        tuple(stages),
        remarks=_remarks(stages, events, ledger),
        said=_said(events, holder),
    )


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


def _stage(stage: Stage, ledger: Ledger, prices: Prices, results: dict[str, Committed], now: float, *, queued: bool) -> StageStatus:
    parent = stage.spec.parent
    published = stage.spec.published.gpu_hours if stage.spec.published else None
    if parent is not None and parent not in results:
        return StageStatus(
            stage.name, parent, "blocked", None, 0, stage.config.steps, None, None, None, f"waits for {parent}", (),
            0.0, account([], prices), {}, None, published,
        )  # fmt: skip
    inputs = find(ledger, stage, results[parent] if parent else None)
    committed = ledger.committed(stage.name, inputs)
    broken = ledger.remarks.get(ledger.keys.committed(stage.name, inputs))
    times, attempts, lines = _attempts(stage, inputs, ledger, prices, now, queued)
    bill = account(times, prices)
    steps = [line for line in lines if "step" in line and line.get("loss") is not None]
    reached = committed.step if committed else steps[-1]["step"] if steps else 0
    pace = _median([sum(line.get(part) or 0.0 for part in ("step_s", "data_wait_s", "checkpoint_s")) for line in steps[-200:]])
    tail = [line["loss"] for line in steps[-max(1, len(steps) // 10) :]]
    last = attempts[-1] if attempts else None
    return StageStatus(
        name=stage.name,
        parent=parent,
        state="committed" if committed else "failed" if broken else _open_state(last),
        inputs=inputs,
        step=reached,
        steps=stage.config.steps,
        loss=sum(tail) / len(tail) if tail else None,
        step_s=pace,
        eta_s=(stage.config.steps - reached) * pace if pace is not None and not committed else None,
        why="" if committed else str(broken) if broken else "" if last is None else last.reason,
        attempts=tuple(attempts),
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


def _attempts(
    stage: Stage, inputs: str, ledger: Ledger, prices: Prices, now: float, queued: bool
) -> tuple[list[AttemptTime], list[AttemptStatus], list[dict[str, Any]]]:
    times: list[AttemptTime] = []
    attempts: list[AttemptStatus] = []
    lines: dict[int, dict[str, Any]] = {}
    for time, intent_created, pieces, outcome in attempt_times(stage, inputs, ledger):
        times.append(time)
        for piece in pieces:
            for line in piece.metrics:
                if "step" in line:
                    lines[line["step"]] = line  # a redone step counts with its last reading
        heard = pieces[-1].end if pieces else intent_created
        step = max((piece.last_step or 0 for piece in pieces), default=None)
        trouble = ledger.trouble(stage.name, inputs, time.attempt) if outcome is None else None
        unheard = "waiting" if queued else "starting" if now - heard < LIVE_S else "silent"
        live = unheard if not pieces else "running" if now - heard < LIVE_S else "silent"
        unread = ledger.remarks.get(ledger.keys.outcome(stage.name, inputs, time.attempt))  # its driver has seen it end
        attempts.append(
            AttemptStatus(
                number=time.attempt,
                state=outcome.class_ if outcome else "lost" if unread else live,
                run_key=run_key(ledger.pipeline, stage.name, inputs, time.attempt),
                step=step,
                reason=outcome.reason
                if outcome
                else f"how it ended cannot be told: {unread}"
                if unread
                else _at_risk(trouble, step)
                if live != "silent"
                else f"nothing heard for {now - heard:.0f} s",
                bound=time.bound,
                ended=outcome.ended if outcome else heard if unread else None,
                usd=account([time], prices).usd,
            )
        )
    attempts += _unread(stage, inputs, ledger)
    attempts.sort(key=lambda attempt: attempt.number)
    return times, attempts, [lines[step] for step in sorted(lines)]


def _unread(stage: Stage, inputs: str, ledger: Ledger) -> Iterator[AttemptStatus]:
    """Attempts whose intent is there and cannot be read: without it nobody knows what a second of them cost."""
    for number in ledger.attempts(stage.name, inputs):
        remark = ledger.remarks.get(ledger.keys.intent(stage.name, inputs, number))
        if remark is None:
            continue
        outcome = ledger.outcome(stage.name, inputs, number)
        pieces = ledger.journal(stage.name, inputs, number)
        yield AttemptStatus(
            number=number,
            state=outcome.class_ if outcome else "unreadable",
            run_key=run_key(ledger.pipeline, stage.name, inputs, number),
            step=max((piece.last_step or 0 for piece in pieces), default=None),
            reason=f"its cost is not counted: {remark}",
            bound=outcome.bound if outcome else None,
            ended=outcome.ended if outcome else max((piece.end for piece in pieces), default=0.0),
            usd=Decimal(0),
        )


def _at_risk(trouble: Trouble | None, step: int | None) -> str:
    if trouble is None:
        return ""
    return f"{trouble.reason}; {max(0, (step or 0) - trouble.published)} steps are at risk"


def attempt_times(stage: Stage, inputs: str, ledger: Ledger) -> list[tuple[AttemptTime, float, list[JournalPiece], Any]]:
    """Every attempt of a stage as the bill wants it: (time, intent's creation, journal pieces, outcome or None)."""
    found = []
    manifests = ledger.checkpoints(stage.name, inputs)
    for number in ledger.attempts(stage.name, inputs):
        intent = ledger.intent(stage.name, inputs, number)
        if intent is None:
            continue
        outcome = ledger.outcome(stage.name, inputs, number)
        pieces = ledger.journal(stage.name, inputs, number)
        time = AttemptTime(
            attempt=number,
            devices=intent.nodes * intent.devices_per_node,
            device=intent.device,
            bound=outcome.bound if outcome else pieces[0].start if pieces else None,
            ended=outcome.ended if outcome else None,
            pieces=pieces,
            resumed_from=intent.resume.step if intent.resume else 0,
            last_published=max((m.step for _, m in manifests if m.attempt == number), default=intent.resume.step if intent.resume else 0),
        )
        found.append((time, intent.created, pieces, outcome))
    return found


def _median(values: Sequence[float]) -> float | None:
    return sorted(values)[len(values) // 2] if values else None
