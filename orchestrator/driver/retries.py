"""How an attempt has ended, and whether its stage gets another one: pure functions of the ends so far.

Owns the retry rules (docs/contracts.md, "How an attempt ends") and the next step that an end advises. Refuses to look at the clock but for
the pause before the next attempt.

Failures are counted within one launch (attempts of this lease epoch, and those that it took over alive from a driver before it in the
cluster): launching again is a person's decision to try again.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from opensora.config import StageConfig
from opensora.dataset.usage import LEFT_OUT
from orchestrator.driver.facts import AttemptView
from orchestrator.ledger.records import EXIT_CODES, DamagedCheckpoint, ExitClass, Report
from orchestrator.ports import Life


@dataclass(frozen=True)
class Rule:
    then: Literal["commit", "suspend", "retry", "retry once", "stop"]
    counted: Literal["never", "always", "unless progress"]
    """Whether the end counts against `max_attempts`."""
    hint: str = ""
    """What a person can do about it, and whether the stage then goes on or begins anew. `{stage}`, `{alone}`, `{goes_on}`, `{lr}` and
    `{spike}` are filled in (`_advice`). Empty where the reason of such an end says it already: an end has one next step."""


RULES: dict[ExitClass, Rule] = {
    "completed": Rule("commit", "always"),
    "drained":   Rule("suspend", "never"),
    "config":    Rule("stop", "always"),
    "parent":    Rule("stop", "always"),
    "data":      Rule("retry once", "always", "look at the disk that holds the cache; `osctl logs {stage}` names the shard"),
    "nan":       Rule("stop", "always", "`osctl launch{alone} --set {stage}.optimizer.lr={lr}` trains the stage anew with half the rate"),
    "spike":     Rule("stop", "always", "`osctl launch{alone} --set {stage}.loss_spike={spike}` lets it pass and {goes_on}; "
                                        "a lower {stage}.optimizer.lr trains the stage anew"),
    "oom":       Rule("stop", "always", "`osctl launch{alone} --set {stage}.activations.recompute=full` needs less memory and {goes_on}, "
                                        "as does a smaller batch_size with accumulate raised as much; `osctl plan` shows what fits"),
    "disk":      Rule("stop", "always", "make space; `osctl launch{alone}` {goes_on}"),
    "hang":      Rule("retry", "always"),
    "store":     Rule("retry", "always"),
    "code":      Rule("retry once", "always", "`osctl logs {stage}` shows the traceback"),
    "signal":    Rule("retry", "unless progress"),
    "lost":      Rule("retry", "unless progress"),
    "peer":      Rule("retry", "unless progress"),
    "preempted": Rule("retry", "never"),
    "moved":     Rule("retry", "never"),
    "oom_killed": Rule("retry once", "always", "raise `memory` in the cluster profile; `osctl launch{alone}` {goes_on}"),
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

TIME_OF_A_LINE = re.compile(r"^\d{4}-\d\d-\d\d [\d:,.]+ (error: )?")
"""How a line of an agent's log begins."""
LONGEST_LINE = 600

TOO_FEW = "`osctl launch{alone} --set {stage}.data.max_left_out=1` trains on the clips that are left"
"""What to do where more clips are left out than the stage allows, besides mending them."""

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
                return Ending("preempted", f"{life.taken or 'the cluster took its nodes away'}{said}")
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
        said = _last_line(life.last_words)
        return Ending(said_by[life.exit_code], f"the agent left with exit code {life.exit_code} and no report{f': {said}' if said else ''}")
    seen = (life.where or "nobody saw how") if life.exit_code is None else f"exit code {life.exit_code}"
    return Ending("lost", f"the agent vanished without a report ({seen})")


def _last_line(said: str) -> str:
    """Of what an agent printed before it left: what it says of its end, and a traceback of its error, in the last line."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    return TIME_OF_A_LINE.sub("", lines[-1])[:LONGEST_LINE] if lines else ""


def progress_free(ends: Sequence[AttemptView]) -> int:
    """How many of the last ends brought no new checkpoint."""
    count = 0
    for attempt in reversed(ends):
        if attempt.progressed:
            break
        count += 1
    return count


def blameless(attempt: AttemptView) -> bool:
    """Whether an end says nothing about the stage: the cluster took the devices, or an older checkpoint is to be tried."""
    assert attempt.outcome is not None
    return RULES[attempt.outcome.class_].counted == "never" or attempt.damaged is not None


def moved(attempt: AttemptView) -> bool:
    """Whether its driver ended it to make another one elsewhere: then its end says nothing about how the stage fares."""
    return attempt.outcome is not None and attempt.outcome.class_ == "moved"


def counted(attempt: AttemptView) -> bool:
    """Whether a closed attempt counts against `max_attempts`."""
    assert attempt.outcome is not None
    if attempt.damaged is not None:
        return False
    rule = RULES[attempt.outcome.class_]
    return rule.counted == "always" or (rule.counted == "unless progress" and not attempt.progressed)


def not_before(ends: Sequence[AttemptView], now: float) -> float:
    """Unix time before which no other attempt starts; 0 where nothing has ended yet. It is never further off than two pauses: the end was
    told by a node's clock, which may be ahead of this one by a year."""
    stalled = progress_free([attempt for attempt in ends if not moved(attempt)])
    if not stalled or not ends or ends[-1].damaged is not None or moved(ends[-1]):  # another checkpoint, or other nodes, are tried at once
        return 0.0
    outcome = ends[-1].outcome
    assert outcome is not None
    pause = BACKOFF_S[min(stalled, len(BACKOFF_S)) - 1]
    return outcome.ended + pause if outcome.ended <= now + pause else 0.0


@dataclass(frozen=True)
class Verdict:
    """Whether a stage may have another attempt, and if not, why."""

    state: Literal["go", "suspended", "failed"]
    reason: str = ""
    exit_code: int = 0


def retry_verdict(ends: Sequence[AttemptView], max_attempts: int, config: StageConfig | None = None, *, alone: bool = True) -> Verdict:
    """What the ends of this launch say about a stage that is not committed.

    Args:
        ends: closed attempts, ascending.
        config: the stage's, for the numbers in what is advised.
        alone: whether this stage alone was launched. Else what is advised is to launch again all that was launched.
    """
    if not ends:
        return Verdict("go")
    last = ends[-1]
    assert last.outcome is not None
    class_, rule = last.outcome.class_, RULES[last.outcome.class_]
    what = f"{last.stage}: attempt {last.number} ended with {class_}" + (f": {last.outcome.reason}" if last.outcome.reason else "")
    what += f"; {last.lost}" if last.lost else ""
    saved = last.saved
    only = f" {last.stage}" if alone else ""
    advice = _advice(rule, last.stage, only, saved, config)
    if last.damaged is not None:
        return _after_damage(ends, what)
    if rule.then == "suspend":
        return Verdict("suspended", f"{what}. `osctl launch` goes on from step {saved}", 130)
    if last.outcome.by_person:
        return Verdict("failed", f"{what}. `osctl resume` goes on from step {saved}", 3)
    if rule.then == "stop":
        return Verdict("failed", what + advice, 4 if class_ in ("parent", "refused") else 3)
    if class_ == "data" and LEFT_OUT in last.outcome.reason:
        return Verdict("failed", f"{what}. Mend them, or {TOO_FEW.format(stage=last.stage, alone=only)}", 3)
    if class_ == "data" and OTHER_CLIPS in last.outcome.reason:
        return Verdict("failed", what, 3)
    if rule.then == "retry once" and (again := _seen_before(ends)):
        return Verdict("failed", f"{what}, {again}{advice}", 3)
    if (stalled := progress_free([attempt for attempt in ends if not blameless(attempt)])) >= STALLS:
        return Verdict("failed", f"{what}. {stalled} attempts in a row published no new checkpoint{advice}", 3)
    if (used := sum(map(counted, ends))) >= max_attempts:
        return Verdict("failed", f"{what}. {used} of {max_attempts} counted attempts are used up{advice}", 3)
    return Verdict("go", what)


def _advice(rule: Rule, stage: str, alone: str, saved: int, config: StageConfig | None) -> str:
    goes_on = f"goes on from step {saved}" if saved else "begins again, since nothing was saved"
    lr = f"{config.optimizer.lr / 2:g}" if config else "LR"
    spike = f"{config.loss_spike * 2:g}" if config and config.loss_spike else "null"
    hint = rule.hint.format(stage=stage, alone=alone, goes_on=goes_on, lr=lr, spike=spike)
    return f". {hint[0].upper()}{hint[1:]}" if hint else ""


def _after_damage(ends: Sequence[AttemptView], what: str) -> Verdict:
    """Another attempt goes on from an older checkpoint. Damage that an agent finds is a fact. Where the trainer alone refuses one
    checkpoint after the other, it may be the trainer that cannot read them, and beginning anew would throw good work away.
    """
    refused = [attempt for attempt in ends[-2:] if attempt.damaged is not None and attempt.damaged.by == "trainer"]
    if len(refused) == 2:
        return Verdict("failed", f"{what}. The trainer has refused two checkpoints in a row; `osctl logs` shows why", 4)
    return Verdict("go", what)


def _seen_before(ends: Sequence[AttemptView]) -> str | None:
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


def _failed_at(attempt: AttemptView) -> int | None:
    return attempt.report.step if attempt.report is not None else None
