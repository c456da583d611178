"""What a driver does next: a pure function of the pipeline, of what was observed and of the clock.

Owns the order of things: a stage starts only from a committed parent, has at most one live attempt, is never run again once it is
committed, and an attempt that cannot be seen (`unknown`) is left alone. Whether a stage gets another attempt is said by `retries`.
Refuses to read, write or start anything (`observe` and `act` do): a driver may be killed between any two actions, and the next one,
observing afresh, decides the rest.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from orchestrator.driver import placing
from orchestrator.driver.facts import AttemptView, Checkpoint, Observed, StageView
from orchestrator.driver.retries import LEFT_EARLY, Verdict, classify, not_before, retry_verdict
from orchestrator.ledger.records import ExitClass
from orchestrator.ports import Life
from orchestrator.recipe.pipeline import Pipeline, Stage

# --- What a driver can do ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StartAttempt:
    """Write the intent if it is not there, then submit."""

    stage: str
    inputs_digest: str
    number: int
    resume: Checkpoint | None
    why: str
    nodes: placing.NodeSet | None = None
    """None: the cluster has no pools, and the stage does not shrink."""


@dataclass(frozen=True)
class CloseAttempt:
    """Write the outcome of an attempt that is over."""

    attempt: AttemptView
    class_: ExitClass
    reason: str
    by_person: bool = False
    next_pool: str | None = None
    """With class `moved`: where the next one is made; None: in the same pool."""


@dataclass(frozen=True)
class Commit:
    """Verify the complete checkpoint and make it the stage's result."""

    attempt: AttemptView
    checkpoint: Checkpoint


@dataclass(frozen=True)
class Drain:
    attempt: AttemptView


@dataclass(frozen=True)
class Kill:
    attempt: AttemptView
    why: str = ""
    """The fault that kept it from starting; empty where a person asked."""


@dataclass(frozen=True)
class Move:
    """End an attempt so that another one is made elsewhere. One that trains saves first."""

    attempt: AttemptView
    change: placing.Change


@dataclass(frozen=True)
class Evaluate:
    """Judge a committed stage beside what is trained next."""

    stage: str
    inputs_digest: str
    yields: bool = True
    """Whether something else is still to be trained, which goes first."""


@dataclass(frozen=True)
class PassGate:
    """Write down that a stage's gate is passed, before anything starts from it."""

    stage: str
    inputs_digest: str
    why: str


@dataclass(frozen=True)
class TellUnjudged:
    """Write down that a stage could not be evaluated, which stops nothing."""

    stage: str
    inputs_digest: str
    reason: str


@dataclass(frozen=True)
class Note:
    """Write down how many nodes a stage's pool has."""

    stage: str
    detail: str


@dataclass(frozen=True)
class Wait:
    """Nothing to do until an attempt's life changes, or until this time."""

    reason: str
    until: float | None = None


@dataclass(frozen=True)
class Finish:
    status: Literal["succeeded", "failed", "cancelled", "suspended"]
    exit_code: int
    reason: str


Action = StartAttempt | CloseAttempt | Commit | Drain | Kill | Move | Evaluate | TellUnjudged | PassGate | Note | Wait | Finish

# --- Deciding ----------------------------------------------------------------------------------------------------------------------


def decide(pipeline: Pipeline, observed: Observed, now: float) -> list[Action]:
    """The next actions, in order; never empty. What is over is settled first, and everything is observed again before anything starts.

    Args:
        now: Unix time of the driver's clock.
    """
    views = [observed.stages[stage.name] for stage in pipeline.stages]
    settled = [action for view in views for action in _settle(view, observed)]
    settled += [Note(stage.name, text) for stage in pipeline.stages if (text := _counted(stage, observed.stages[stage.name]))]
    if settled:
        return settled
    if observed.stop is not None:
        return _stop(views, observed)
    if judging := _judge(observed):
        return judging
    return _go(pipeline, observed, now)


def _judge(observed: Observed) -> list[Action]:
    """Evaluations to begin, one at a time since they share a machine with the training; and those that failed, to be told once."""
    wanted = [view for view in observed.stages.values() if view.name in observed.targets and view.judged is not None]
    actions: list[Action] = []
    for view in wanted:
        assert view.judged is not None and view.inputs_digest is not None
        if view.judged.state == "failed" and not view.judged.told:
            actions.append(TellUnjudged(view.name, view.inputs_digest, view.judged.reason))
    if not _in_judgement(observed):
        trains = not all(view.committed for view in observed.stages.values() if view.name in observed.targets)
        asked = [view for view in wanted if view.judged is not None and view.judged.state == "asked"]
        actions += [Evaluate(view.name, view.inputs_digest or "", trains) for view in asked[:1]]
    return actions


def _in_judgement(observed: Observed) -> list[str]:
    """Names of the stages that are being evaluated."""
    return [view.name for view in observed.stages.values() if view.judged is not None and view.judged.state == "running"]


def _settle(view: StageView, observed: Observed) -> list[Action]:
    """Write down what is over: outcomes, the stage's result; drain what an earlier configuration left running."""
    actions: list[Action] = []
    for attempt in (*view.orphans, *view.attempts):
        stray = attempt in view.orphans
        if attempt.ended and attempt.report is None and observed.stop == "kill":
            actions.append(CloseAttempt(attempt, "lost", "ended at once, as asked"))
        elif attempt.ended and attempt.report is None and attempt.draining and _left_early(attempt.life):
            actions.append(CloseAttempt(attempt, "drained", "asked to leave before it had begun"))
        elif attempt.ended and attempt.given_up:
            actions.append(CloseAttempt(attempt, "unstarted", attempt.given_up))
        elif attempt.ended and attempt.onward is not None and _has_moved(attempt):
            actions.append(CloseAttempt(attempt, "moved", attempt.onward.why, next_pool=attempt.onward.pool))
        elif attempt.ended:
            asked = attempt.draining or observed.stop is not None
            ending = classify(attempt.report, attempt.life, asked=asked, damaged=attempt.damaged)
            actions.append(CloseAttempt(attempt, ending.class_, ending.reason, ending.by_person))
        elif attempt.never_started and (stray or attempt.epoch < observed.epoch):
            # An agent whose intent is older than the lease refuses to start, so its number is spent.
            actions.append(CloseAttempt(attempt, "lost", placing.NEVER_STARTED))
        elif attempt.never_started and view.refused is not None:
            actions.append(CloseAttempt(attempt, "refused", view.refused))
        elif attempt.never_started and observed.stop is not None:
            actions.append(CloseAttempt(attempt, "drained", "stopped before it was started"))
        elif stray and attempt.life.state == "running" and not attempt.draining:
            actions.append(Drain(attempt))
    if not view.committed and not actions and (commit := _commit(view)):
        actions.append(commit)
    return actions


def _counted(stage: Stage, view: StageView) -> str:
    """What is to be written down of the nodes of a stage's pool; empty: nothing."""
    return "" if view.room is None or view.committed else placing.count_text(view.room, stage.spec.resources.nodes)


def _has_moved(attempt: AttemptView) -> bool:
    """Whether an attempt that is over ended because its driver wants it elsewhere. Where an earlier driver wanted that, it may have been
    killed before it asked: then the attempt has moved only if it never held a device, or, asked to save for another number of nodes, saved
    and left."""
    assert attempt.onward is not None
    if attempt.report is not None:
        return attempt.report.class_ == "drained" and attempt.onward.pool is None
    return attempt.onward.done or attempt.life.bound is None


def _left_early(life: Life) -> bool:
    """Whether an attempt that was asked to leave, and said nothing, had not begun. One that never held a device is known not to have."""
    return life.exit_code in LEFT_EARLY or (life.bound is None and life.exit_code is None)


def _commit(view: StageView) -> Commit | None:
    """A completed attempt's own complete checkpoint, or the one that it found complete when it resumed."""
    for attempt in reversed(view.attempts):
        if attempt.outcome is None or attempt.outcome.class_ != "completed":
            continue
        complete = [checkpoint for checkpoint in view.checkpoints if checkpoint.complete and checkpoint.attempt <= attempt.number]
        if complete:
            return Commit(attempt, max(complete, key=lambda checkpoint: checkpoint.attempt))
    return None


def _stop(views: Sequence[StageView], observed: Observed) -> list[Action]:
    alive = [attempt for view in views for attempt in (*view.orphans, *view.attempts) if attempt.alive]
    if observed.stop == "kill":
        running = [attempt for attempt in alive if attempt.life.state == "running" and not attempt.told_to_end]
        if running:
            return [Kill(attempt) for attempt in running]
    else:
        asked: list[Action] = [Drain(attempt) for attempt in alive if attempt.life.state == "running" and not attempt.draining]
        if asked:
            return asked
        if alive:
            return [Wait(f"{_names(alive)} saves and leaves")]
    if all(view.committed for view in views if view.name in observed.targets):
        return [Finish("succeeded", 0, "every stage is committed")]
    said = "; ".join(filter(None, (_left(view, observed) for view in views if view.name in observed.targets)))
    status: Literal["cancelled", "suspended"] = "cancelled" if observed.cancelled else "suspended"
    return [Finish(status, 130, said or "`osctl launch` goes on")]


def _left(view: StageView, observed: Observed) -> str:
    """What a stop leaves of a stage: how its attempt ended, from where the next one goes on, and what nobody has saved."""
    if view.committed or not view.attempts:
        return ""
    last = view.attempts[-1]
    start = f"from step {view.checkpoints[-1].step}" if view.checkpoints else "from the start"
    onward = f"`osctl launch` goes on with {view.name} {start}"
    if last.outcome is None:
        return f"{onward}, once attempt {last.number} has left ({last.life.where or last.life.state})"
    of_this_launch = last.epoch == observed.epoch or last.adopted or last.outcome.epoch == observed.epoch
    ended = f"attempt {last.number} ended with {last.outcome.class_}" + (f": {last.outcome.reason}" if last.outcome.reason else "")
    how = f"{ended}; " if of_this_launch and last.outcome.class_ not in ("drained", "completed") else ""
    return f"{how}{onward}{f'; {last.lost}' if of_this_launch and last.lost else ''}"


def _go(pipeline: Pipeline, observed: Observed, now: float) -> list[Action]:
    starts: list[Action] = []
    given_up: list[Action] = []
    waits: list[Wait] = []
    ends: list[Verdict] = []
    deadline_s = pipeline.cluster.start_deadline_s if pipeline.cluster is not None else math.inf
    for stage in pipeline.stages:
        view = observed.stages[stage.name]
        if view.committed or stage.name not in observed.targets:
            continue
        step = _next(stage, view, observed, now, deadline_s, pipeline)
        if isinstance(step, StartAttempt):
            starts.append(step)
        elif isinstance(step, Kill | CloseAttempt | Move | PassGate):
            given_up.append(step)
        elif isinstance(step, Wait):
            waits.append(step)
        elif step is not None:
            ends.append(step)
    if given_up:
        return given_up
    alive = [attempt for view in observed.stages.values() for attempt in (*view.orphans, *view.attempts) if attempt.alive]
    if pipeline.backend == "local":
        # One machine: two stages at once would share its devices, and both bills would be wrong.
        starts = [] if alive else starts[:1]
    if starts:
        return starts
    if waits:
        timed = [wait.until for wait in waits if wait.until is not None]
        return [Wait("; ".join(dict.fromkeys(wait.reason for wait in waits)), min(timed, default=None))]
    if alive:
        return [Wait(f"{_names(alive)} runs")]
    if judged := _in_judgement(observed):
        return [Wait(f"{', '.join(judged)} is being evaluated")]
    return [_finish(ends)]


def _next(
    stage: Stage, view: StageView, observed: Observed, now: float, deadline_s: float, pipeline: Pipeline
) -> StartAttempt | Kill | CloseAttempt | Move | PassGate | Wait | Verdict | None:
    """What a wanted, uncommitted stage needs. None: its parent, which somebody else must finish first."""
    alive = [attempt for attempt in (*view.orphans, *view.attempts) if attempt.alive]
    if alive:
        if (move := _move(stage, view, pipeline, now)) is not None:
            return move
        wait = _attend(alive, now, deadline_s)
        return _until_moved(wait, stage, view, pipeline, now) if isinstance(wait, Wait) else wait
    parent = stage.spec.parent
    if parent is not None and not observed.stages[parent].committed:
        return None if parent in observed.targets else Verdict("failed", parentless(stage), 4)
    if view.refused is not None:
        return Verdict("failed", view.refused, 4)
    assert view.inputs_digest is not None, f"{stage.name} has a committed parent and no inputs"
    if parent is not None and (held := _held(observed.stages[parent])) is not None:
        return held
    mine = [one for one in view.attempts if one.epoch == observed.epoch or one.adopted or _ended_by_person(one, observed)]
    ends = [attempt for attempt in mine if attempt.outcome is not None]
    verdict = retry_verdict(ends, stage.spec.max_attempts, stage.config, alone=observed.targets == {stage.name})
    if verdict.state != "go":
        return verdict
    if now < (until := not_before(ends, now)):
        return Wait(f"{verdict.reason}; waits before attempt {ends[-1].number + 1}", until)
    resume = view.checkpoints[-1] if view.checkpoints else None
    never_started = [attempt for attempt in mine if attempt.never_started]
    if never_started and (fault := _given_up(never_started[-1], now, deadline_s)):
        return CloseAttempt(never_started[-1], "unstarted", fault)
    number = never_started[-1].number if never_started else max((attempt.number for attempt in view.attempts), default=0) + 1
    order, shrinks = pipeline.pools_of(stage), view.room is not None
    nodes = placing.choose(stage, order, view, now) if order or shrinks else None
    return StartAttempt(stage.name, view.inputs_digest, number, resume, verdict.reason, nodes)


def _held(parent: StageView) -> PassGate | Wait | Verdict | None:
    """What a parent's gate makes of a stage that would start now. None: it may."""
    gate = parent.gate
    if gate is None or gate.state == "open":
        return None
    if gate.state == "passes":
        assert parent.inputs_digest is not None
        return PassGate(parent.name, parent.inputs_digest, gate.why)
    return Wait(gate.why) if gate.state == "evaluating" else Verdict("suspended", gate.why, 4)


def _move(stage: Stage, view: StageView, pipeline: Pipeline, now: float) -> Move | None:
    """The live attempt, where it is to be made anew in another pool or on another number of nodes."""
    if pipeline.cluster is None:
        return None
    for attempt in view.attempts:
        asked = attempt.draining or (attempt.onward is not None and attempt.onward.done)
        if attempt.outcome is not None or attempt.life.state != "running" or asked:
            continue
        change = placing.change(stage, pipeline.cluster, pipeline.pools_of(stage), view, attempt, now)
        if change is not None:
            return Move(attempt, change)
    return None


def _until_moved(wait: Wait, stage: Stage, view: StageView, pipeline: Pipeline, now: float) -> Wait:
    """The same wait, until its attempt may have to move at the latest, and with the reason for which it cannot shrink."""
    if pipeline.cluster is None:
        return wait
    order, times, said = pipeline.pools_of(stage), [wait.until] if wait.until is not None else [], [wait.reason]
    for attempt in view.attempts:
        waits = placing.waits_for_nodes(attempt)
        if not attempt.alive or not (waits or attempt.nodes < stage.spec.resources.nodes):
            continue
        if waits and (due := placing.waits_until(pipeline.cluster, order, attempt)) is not None:
            times.append(due)
        if view.room is not None:
            due = placing.short_until(stage, view, view.room.pool)
            times += [now + placing.COUNT_EVERY_S, *([due] if due is not None and due > now else [])]
            said += [f"it goes on with no other number of nodes: {why}" for why in placing.obstacles(stage, view) if waits]
    return Wait("; ".join(said), min(times, default=None))


def _attend(alive: Sequence[AttemptView], now: float, deadline_s: float) -> Kill | Wait:
    """What attempts need that live: to be waited for, unless a fault has kept one from starting for too long."""
    for attempt in alive:
        if fault := _given_up(attempt, now, deadline_s):
            return Kill(attempt, fault)
    unseen = [attempt for attempt in alive if attempt.life.state == "unknown"]
    if unseen:
        return Wait(f"the backend cannot say whether {_names(unseen)} lives")
    waiting = [attempt for attempt in alive if attempt.life.waits]
    said = [f"{_names([attempt])} waits: {attempt.life.waits}" for attempt in waiting]
    far = [attempt for attempt in alive if attempt.life.where]
    said += [f"{_names([attempt])} lives elsewhere ({attempt.life.where}); this launch waits for it and starts nothing" for attempt in far]
    troubled = [attempt for attempt in alive if attempt.life.trouble]
    said += [f"{_names([attempt])}: {attempt.life.trouble}" for attempt in troubled]
    running = [attempt for attempt in alive if not (attempt.life.waits or attempt.life.where or attempt.life.trouble)]
    deadlines = [attempt.life.since + deadline_s for attempt in waiting if attempt.life.waits_for == "fault" and attempt.life.since]
    return Wait("; ".join([*said, *([f"{_names(running)} runs"] if running else [])]), min(deadlines, default=None))


def _given_up(attempt: AttemptView, now: float, deadline_s: float) -> str:
    """The fault, where one has kept an attempt from starting until the deadline. A wait for devices has no end."""
    life = attempt.life
    late = life.waits_for == "fault" and life.since is not None and now >= life.since + deadline_s
    return f"not started within {deadline_s:g} s: {life.waits}" if late else ""


def _ended_by_person(attempt: AttemptView, observed: Observed) -> bool:
    """Whether this driver has found it ended by somebody; also one of an earlier driver, so that nothing starts again unasked."""
    return attempt.outcome is not None and attempt.outcome.by_person and attempt.outcome.epoch == observed.epoch


def parentless(stage: Stage) -> str:
    """Why a stage whose parent is neither committed nor wanted cannot run."""
    parent = stage.spec.parent
    return f"{stage.name}: its parent {parent} is not committed with the current configuration. Run: osctl launch {parent}"


def _finish(ends: Sequence[Verdict]) -> Finish:
    for state in ("failed", "suspended"):
        for verdict in ends:
            if verdict.state == state:
                return Finish("failed" if state == "failed" else "suspended", verdict.exit_code, verdict.reason)
    return Finish("succeeded", 0, "every stage is committed")


def _names(attempts: Sequence[AttemptView]) -> str:
    return ", ".join(f"{attempt.stage} attempt {attempt.number}" for attempt in attempts)
