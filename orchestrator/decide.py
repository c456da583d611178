"""What a driver does next: a pure function of the pipeline, of what was observed and of the clock.

Owns the retry rules (docs/contracts.md, "How an attempt ends") and the order of things: a stage starts only from a committed parent,
has at most one live attempt, is never run again once it is committed, and an attempt that cannot be seen (`unknown`) is left alone.
Refuses to read, write or start anything (`orchestrator.runner` does): a driver may be killed between any two actions, and the next
one, observing afresh, decides the rest.

Failures are counted within one launch (attempts of this lease epoch, and those that it took over alive from a driver before it in the
cluster): launching again is a person's decision to try again.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from opensora.config import StageConfig
from orchestrator.config import Pipeline, Stage
from orchestrator.ports import Life
from orchestrator.records import EXIT_CODES, DamagedCheckpoint, ExitClass, Outcome, Report

# --- What a driver sees ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Checkpoint:
    """A published checkpoint that nobody has found broken yet."""

    key: str
    """Key of its MANIFEST.json."""
    digest: str
    step: int
    attempt: int
    complete: bool


@dataclass(frozen=True)
class Attempt:
    stage: str
    inputs: str
    number: int
    epoch: int
    """Lease epoch of the driver that intended it."""
    resumed_from: int
    """Step of the checkpoint it goes on from; 0: from the start."""
    life: Life
    """`absent` where an outcome is there: nobody asks any more."""
    published: int = 0
    """Step of the last checkpoint that it published; 0: none."""
    left_traces: bool = False
    """Whether it wrote a journal, a report or a checkpoint: it lived, even if the backend has forgotten it."""
    report: Report | None = None
    outcome: Outcome | None = None
    draining: bool = False
    """Whether this driver has asked it to save and leave."""
    adopted: bool = False
    """Whether an earlier driver has intended it, and this one has found it alive: its end is this driver's to judge."""
    given_up: str = ""
    """Why this driver has killed it before it started: the fault that kept it from that until the deadline."""
    told: bool = False
    """Whether this driver has asked it, where no signal reaches it, to leave without saving."""
    damaged: DamagedCheckpoint | None = None
    """What it was to go on from, where that is not what was published."""
    reached: int | None = None
    """Last step that is known to have ended; none: not known. Of attempts of this launch that are over."""

    @property
    def alive(self) -> bool:
        """Whether it holds devices, or may hold them."""
        return self.outcome is None and self.life.state in ("running", "unknown")

    @property
    def ended(self) -> bool:
        """Whether it is over, and only its outcome has not been written."""
        return self.outcome is None and (self.life.state == "ended" or (self.life.state == "absent" and self.left_traces))

    @property
    def unborn(self) -> bool:
        """Intended, and never started."""
        return self.outcome is None and self.life.state == "absent" and not self.left_traces

    @property
    def progressed(self) -> bool:
        return self.published > self.resumed_from

    @property
    def saved(self) -> int:
        """Step of its newest published checkpoint, or of the one that it went on from."""
        return max(self.published, self.resumed_from)

    @property
    def lost(self) -> str:
        """Which of its steps nobody has saved, for people; empty where none is known."""
        if self.reached is None or self.reached <= self.saved:
            return ""
        count = self.reached - self.saved
        return f"{'' if self.report is not None else 'at least '}{count} step{'s' if count > 1 else ''} after step {self.saved} lost"


@dataclass(frozen=True)
class StageView:
    name: str
    inputs: str | None
    """None: the parent is not committed, so nobody knows them yet."""
    committed: bool = False
    attempts: tuple[Attempt, ...] = ()
    """Those of these inputs, ascending."""
    checkpoints: tuple[Checkpoint, ...] = ()
    """Ascending by (step, attempt)."""
    strays: tuple[Attempt, ...] = ()
    """Attempts of other inputs without an outcome: left by a launch of an earlier configuration."""
    refused: str | None = None
    """Why this driver must not start the stage: its parent is not what was committed, or the backend says no."""


@dataclass(frozen=True)
class Observed:
    epoch: int
    """Lease epoch of this driver."""
    stages: Mapping[str, StageView]
    targets: frozenset[str]
    """Stages to run; the others are only looked at."""
    stop: Literal["drain", "kill"] | None = None
    """What a person asked for."""
    cancelled: bool = False
    """Whether the drain was asked for by `osctl cancel`."""


# --- What a driver can do ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StartAttempt:
    """Write the intent if it is not there, then submit."""

    stage: str
    inputs: str
    number: int
    resume: Checkpoint | None
    why: str


@dataclass(frozen=True)
class CloseAttempt:
    """Write the outcome of an attempt that is over."""

    attempt: Attempt
    class_: ExitClass
    reason: str
    by_person: bool = False


@dataclass(frozen=True)
class Commit:
    """Verify the complete checkpoint and make it the stage's result."""

    attempt: Attempt
    checkpoint: Checkpoint


@dataclass(frozen=True)
class Drain:
    attempt: Attempt


@dataclass(frozen=True)
class Kill:
    attempt: Attempt
    why: str = ""
    """The fault that kept it from starting; empty where a person asked."""


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


Action = StartAttempt | CloseAttempt | Commit | Drain | Kill | Wait | Finish

# --- How an attempt ends, and what follows -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rule:
    then: Literal["commit", "suspend", "retry", "retry once", "stop"]
    counted: Literal["never", "always", "unless progress"]
    """Whether the end counts against `max_attempts`."""
    hint: str = ""
    """What a person can do about it, and whether the stage then goes on or begins anew. `{stage}`, `{goes_on}`, `{lr}` and `{spike}` are
    filled in (`_advice`). Empty where the reason of such an end says it already: an end has one next step."""


RULES: dict[ExitClass, Rule] = {
    "completed": Rule("commit", "always"),
    "drained":   Rule("suspend", "never"),
    "config":    Rule("stop", "always"),
    "parent":    Rule("stop", "always"),
    "data":      Rule("retry once", "always", "look at the disk that holds the cache; `osctl logs {stage}` names the shard"),
    "nan":       Rule("stop", "always", "`osctl launch {stage} --set {stage}.optimizer.lr={lr}` trains the stage anew with half the rate"),
    "spike":     Rule("stop", "always", "`osctl launch {stage} --set {stage}.loss_spike={spike}` lets it pass and {goes_on}; "
                                        "a lower {stage}.optimizer.lr trains the stage anew"),
    "oom":       Rule("stop", "always", "`osctl launch {stage} --set {stage}.activations.recompute=full` needs less memory and {goes_on}, "
                                        "as does a smaller batch_size with accumulate raised as much; `osctl plan` shows what fits"),
    "disk":      Rule("stop", "always", "make space; `osctl launch {stage}` {goes_on}"),
    "hang":      Rule("retry", "always"),
    "store":     Rule("retry", "always"),
    "code":      Rule("retry once", "always", "`osctl logs {stage}` shows the traceback"),
    "signal":    Rule("retry", "unless progress"),
    "lost":      Rule("retry", "unless progress"),
    "peer":      Rule("retry", "unless progress"),
    "preempted": Rule("retry", "never"),
    "oom_killed": Rule("retry once", "always", "raise `memory` in the cluster profile; `osctl launch {stage}` {goes_on}"),
    "unstarted": Rule("stop", "always", "`osctl doctor` looks for the cause"),
    "refused":   Rule("stop", "always", "`osctl render` shows what was sent"),
}  # fmt: skip

STALLS = 3
"""So many ends in a row without a new checkpoint stop a stage, whatever their class; but for those of `blameless`."""

BACKOFF_S = (0.0, 5.0, 20.0, 60.0, 180.0)
"""Seconds before the next attempt, by the number of ends in a row without a new checkpoint (beyond the first: most faults are passing).
The last counts for all that follow: nodes that the market takes again and again cost a start each time."""

OTHER_CLIPS = "other clips"
"""In the reason of a `data` end: the clips are not those of the checkpoint. Another attempt finds the same ones."""

LEFT_EARLY = (EXIT_CODES["drained"], EXIT_CODES["store"])
"""How an agent leaves that is asked to before it has begun: ended by SIGTERM, or, a moment later, refusing to start."""


CONSEQUENCES = ("peer", "signal", "lost", "drained", "code", "hang")
"""What agents may say of an attempt whose pods the cluster took away: each of them ends because another was taken."""


@dataclass(frozen=True)
class Ending:
    class_: ExitClass
    reason: str
    by_person: bool = False


def classify(report: Report | None, life: Life, *, asked: bool = True, damaged: DamagedCheckpoint | None = None) -> Ending:
    """How an attempt that is over has ended. The agent's own word counts first, but for what it cannot know: that the cluster or a
    person took its pods away. An exit code only says why there is no word.

    Args:
        asked: whether this driver has asked it to save and leave.
        damaged: what it was to go on from, where that is not what was published.
    """
    if damaged is not None and report is not None and report.class_ == "parent":
        return Ending("store", f"step {damaged.step}, from which it was to go on, is damaged: {damaged.reason}")
    if life.cause is not None and (report is None or report.class_ in CONSEQUENCES) and not (asked and report is not None):
        said = "" if report is None else f" ({report.class_} at step {report.step}: {report.reason})"
        match life.cause:
            case "preempted":
                return Ending("preempted", f"the cluster took its nodes away{said}")
            case "oom_killed":
                return Ending("oom_killed", f"a container was killed for memory{said}")
            case "deleted":
                return Ending("lost", f"its job was deleted by someone else{said}", by_person=True)
    if report is not None and report.class_ == "drained" and not asked:
        return Ending("preempted", f"it was made to leave by someone else, and saved: {report.reason}")
    if report is not None:
        return Ending(report.class_, report.reason or "; ".join(report.warnings))
    said_by: dict[int, ExitClass] = {code: name for name, code in EXIT_CODES.items() if name not in ("completed", "drained")}
    if life.exit_code in said_by:
        return Ending(said_by[life.exit_code], f"the agent left with exit code {life.exit_code} and no report")
    seen = (life.where or "nobody saw how") if life.exit_code is None else f"exit code {life.exit_code}"
    return Ending("lost", f"the agent vanished without a report ({seen})")


def progress_free(ends: Sequence[Attempt]) -> int:
    """How many of the last ends brought no new checkpoint."""
    count = 0
    for attempt in reversed(ends):
        if attempt.progressed:
            break
        count += 1
    return count


def blameless(attempt: Attempt) -> bool:
    """Whether an end says nothing about the stage: the cluster took the devices, or an older checkpoint is to be tried."""
    assert attempt.outcome is not None
    return RULES[attempt.outcome.class_].counted == "never" or attempt.damaged is not None


def counted(attempt: Attempt) -> bool:
    """Whether a closed attempt counts against `max_attempts`."""
    assert attempt.outcome is not None
    if attempt.damaged is not None:
        return False
    rule = RULES[attempt.outcome.class_]
    return rule.counted == "always" or (rule.counted == "unless progress" and not attempt.progressed)


def not_before(ends: Sequence[Attempt]) -> float:
    """Unix time before which no other attempt starts; 0 where nothing has ended yet."""
    stalled = progress_free(ends)
    if not stalled or not ends or ends[-1].damaged is not None:  # another checkpoint may be tried at once
        return 0.0
    outcome = ends[-1].outcome
    assert outcome is not None
    return outcome.ended + BACKOFF_S[min(stalled, len(BACKOFF_S)) - 1]


@dataclass(frozen=True)
class Verdict:
    """Whether a stage may have another attempt, and if not, why."""

    state: Literal["go", "suspended", "failed"]
    reason: str = ""
    exit_code: int = 0


def judge(ends: Sequence[Attempt], max_attempts: int, config: StageConfig | None = None) -> Verdict:
    """What the ends of this launch say about a stage that is not committed.

    Args:
        ends: closed attempts, ascending.
        config: the stage's, for the numbers in what is advised.
    """
    if not ends:
        return Verdict("go")
    last = ends[-1]
    assert last.outcome is not None
    class_, rule = last.outcome.class_, RULES[last.outcome.class_]
    what = f"{last.stage}: attempt {last.number} ended with {class_}" + (f": {last.outcome.reason}" if last.outcome.reason else "")
    what += f"; {last.lost}" if last.lost else ""
    saved = last.saved
    advice = _advice(rule, last.stage, saved, config)
    if last.damaged is not None:
        return _after_damage(ends, what)
    if rule.then == "suspend":
        return Verdict("suspended", f"{what}. `osctl launch` goes on from step {saved}", 130)
    if last.outcome.by_person:
        return Verdict("failed", f"{what}. `osctl resume` goes on from step {saved}", 3)
    if rule.then == "stop":
        return Verdict("failed", what + advice, 4 if class_ in ("parent", "refused") else 3)
    if class_ == "data" and OTHER_CLIPS in last.outcome.reason:
        return Verdict("failed", what, 3)
    if rule.then == "retry once" and (again := _seen_before(ends)):
        return Verdict("failed", f"{what}, {again}{advice}", 3)
    if (stalled := progress_free([attempt for attempt in ends if not blameless(attempt)])) >= STALLS:
        return Verdict("failed", f"{what}. {stalled} attempts in a row published no new checkpoint{advice}", 3)
    if (used := sum(map(counted, ends))) >= max_attempts:
        return Verdict("failed", f"{what}. {used} of {max_attempts} counted attempts are used up{advice}", 3)
    return Verdict("go", what)


def _advice(rule: Rule, stage: str, saved: int, config: StageConfig | None) -> str:
    goes_on = f"goes on from step {saved}" if saved else "begins again, since nothing was saved"
    lr = f"{config.optimizer.lr / 2:g}" if config else "LR"
    spike = f"{config.loss_spike * 2:g}" if config and config.loss_spike else "null"
    hint = rule.hint.format(stage=stage, goes_on=goes_on, lr=lr, spike=spike)
    return f". {hint[0].upper()}{hint[1:]}" if hint else ""


def _after_damage(ends: Sequence[Attempt], what: str) -> Verdict:
    """Another attempt goes on from an older checkpoint. Damage that an agent finds is a fact. Where the trainer alone refuses one
    checkpoint after the other, it may be the trainer that cannot read them, and beginning anew would throw good work away.
    """
    refused = [attempt for attempt in ends[-2:] if attempt.damaged is not None and attempt.damaged.by == "trainer"]
    if len(refused) == 2:
        return Verdict("failed", f"{what}. The trainer has refused two checkpoints in a row; `osctl logs` shows why", 4)
    return Verdict("go", what)


def _seen_before(ends: Sequence[Attempt]) -> str | None:
    """How the last end repeats an earlier one of its class: at the same step, or with no new checkpoint between them."""
    last = ends[-1]
    assert last.outcome is not None
    for number, earlier in enumerate(ends[:-1]):
        assert earlier.outcome is not None
        if earlier.outcome.class_ != last.outcome.class_:
            continue
        if _failed_at(earlier) is not None and _failed_at(earlier) == _failed_at(last):
            return f"at the same step {_failed_at(last)} as attempt {earlier.number}"
        if not any(attempt.progressed for attempt in ends[number + 1 :]):
            return f"after attempt {earlier.number} ended so too, with no new checkpoint between"
    return None


def _failed_at(attempt: Attempt) -> int | None:
    return attempt.report.step if attempt.report is not None else None


# --- Deciding ----------------------------------------------------------------------------------------------------------------------


def decide(pipeline: Pipeline, observed: Observed, now: float) -> list[Action]:
    """The next actions, in order; never empty. What is over is settled first, and everything is observed again before anything starts.

    Args:
        now: Unix time of the driver's clock.
    """
    views = [observed.stages[stage.name] for stage in pipeline.stages]
    settled = [action for view in views for action in _settle(view, observed)]
    if settled:
        return settled
    if observed.stop is not None:
        return _stop(views, observed)
    return _go(pipeline, observed, now)


def _settle(view: StageView, observed: Observed) -> list[Action]:
    """Write down what is over: outcomes, the stage's result; drain what an earlier configuration left running."""
    actions: list[Action] = []
    for attempt in (*view.strays, *view.attempts):
        stray = attempt in view.strays
        if attempt.ended and attempt.report is None and observed.stop == "kill":
            actions.append(CloseAttempt(attempt, "lost", "ended at once, as asked"))
        elif attempt.ended and attempt.report is None and attempt.draining and _left_early(attempt.life):
            actions.append(CloseAttempt(attempt, "drained", "asked to leave before it had begun"))
        elif attempt.ended and attempt.given_up:
            actions.append(CloseAttempt(attempt, "unstarted", attempt.given_up))
        elif attempt.ended:
            asked = attempt.draining or observed.stop is not None
            ending = classify(attempt.report, attempt.life, asked=asked, damaged=attempt.damaged)
            actions.append(CloseAttempt(attempt, ending.class_, ending.reason, ending.by_person))
        elif attempt.unborn and (stray or attempt.epoch < observed.epoch):
            # An agent whose intent is older than the lease refuses to start, so its number is spent.
            actions.append(CloseAttempt(attempt, "lost", "its driver ended before it was started"))
        elif attempt.unborn and view.refused is not None:
            actions.append(CloseAttempt(attempt, "refused", view.refused))
        elif attempt.unborn and observed.stop is not None:
            actions.append(CloseAttempt(attempt, "drained", "stopped before it was started"))
        elif stray and attempt.life.state == "running" and not attempt.draining:
            actions.append(Drain(attempt))
    if not view.committed and not actions and (commit := _commit(view)):
        actions.append(commit)
    return actions


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
    alive = [attempt for view in views for attempt in (*view.strays, *view.attempts) if attempt.alive]
    if observed.stop == "kill":
        running = [attempt for attempt in alive if attempt.life.state == "running" and not attempt.told]
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
    return [Finish(status, 130, f"{'cancelled' if observed.cancelled else 'stopped'}; {said or '`osctl launch` goes on'}")]


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
        step = _next(stage, view, observed, now, deadline_s)
        if isinstance(step, StartAttempt):
            starts.append(step)
        elif isinstance(step, Kill | CloseAttempt):
            given_up.append(step)
        elif isinstance(step, Wait):
            waits.append(step)
        elif step is not None:
            ends.append(step)
    if given_up:
        return given_up
    alive = [attempt for view in observed.stages.values() for attempt in (*view.strays, *view.attempts) if attempt.alive]
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
    return [_finish(ends)]


def _next(
    stage: Stage, view: StageView, observed: Observed, now: float, deadline_s: float
) -> StartAttempt | Kill | CloseAttempt | Wait | Verdict | None:
    """What a wanted, uncommitted stage needs. None: its parent, which somebody else must finish first."""
    alive = [attempt for attempt in (*view.strays, *view.attempts) if attempt.alive]
    if alive:
        return _attend(alive, now, deadline_s)
    parent = stage.spec.parent
    if parent is not None and not observed.stages[parent].committed:
        return None if parent in observed.targets else Verdict("failed", parentless(stage), 4)
    if view.refused is not None:
        return Verdict("failed", view.refused, 4)
    assert view.inputs is not None, f"{stage.name} has a committed parent and no inputs"
    mine = [one for one in view.attempts if one.epoch == observed.epoch or one.adopted or _ended_by_person(one, observed)]
    ends = [attempt for attempt in mine if attempt.outcome is not None]
    verdict = judge(ends, stage.spec.max_attempts, stage.config)
    if verdict.state != "go":
        return verdict
    if now < (until := not_before(ends)):
        return Wait(f"{verdict.reason}; waits before attempt {ends[-1].number + 1}", until)
    resume = view.checkpoints[-1] if view.checkpoints else None
    unborn = [attempt for attempt in mine if attempt.unborn]
    if unborn and (fault := _given_up(unborn[-1], now, deadline_s)):
        return CloseAttempt(unborn[-1], "unstarted", fault)
    number = unborn[-1].number if unborn else max((attempt.number for attempt in view.attempts), default=0) + 1
    return StartAttempt(stage.name, view.inputs, number, resume, verdict.reason)


def _attend(alive: Sequence[Attempt], now: float, deadline_s: float) -> Kill | Wait:
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


def _given_up(attempt: Attempt, now: float, deadline_s: float) -> str:
    """The fault, where one has kept an attempt from starting until the deadline. A wait for devices has no end."""
    life = attempt.life
    late = life.waits_for == "fault" and life.since is not None and now >= life.since + deadline_s
    return f"not started within {deadline_s:g} s: {life.waits}" if late else ""


def _ended_by_person(attempt: Attempt, observed: Observed) -> bool:
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


def _names(attempts: Sequence[Attempt]) -> str:
    return ", ".join(f"{attempt.stage} attempt {attempt.number}" for attempt in attempts)
