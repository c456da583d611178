"""A run's status in MLflow, from the ledger. Pure.

If the ledger has an end, that is the status. If there is none (a launcher was killed), silence counts as an end: nobody holds the lease,
and no journal has grown for a while. The run is then KILLED at the time of the last sign of life, and RUNNING again once there is another
sign, or a driver drives the pipeline again.
"""

from __future__ import annotations

from orchestrator.ledger.records import Outcome
from orchestrator.ports import RunStatus
from orchestrator.tracking import preparations
from orchestrator.tracking.facts import AttemptFacts, Facts, StageFacts

KILLED = frozenset({"drained", "signal", "lost", "moved"})
"""Classes of ends that are not failures of the work: somebody or something stopped it."""
SILENT_S = 30.0
"""A living agent adds to its journal more often than this, or at the latest after three of its own intervals."""

Status = tuple[RunStatus, float | None]
"""(status, Unix time of the end)."""


def attempt_status(facts: Facts, stage: StageFacts, attempt: AttemptFacts) -> Status:
    if attempt.outcome is not None:
        return _status_of(attempt.outcome), attempt.outcome.ended
    return ("RUNNING", None) if _lives(facts, stage, attempt) else ("KILLED", _last_sign(attempt))


def stage_status(facts: Facts, stage: StageFacts) -> Status:
    """A stage's status. Between two attempts it is running as long as a driver drives it."""
    if stage.committed is not None:
        return "FINISHED", stage.committed.time
    last = stage.attempts[-1]
    if last.outcome is None:
        return attempt_status(facts, stage, last)
    if _in_flight(facts) and facts.driven and stage.current:
        return "RUNNING", None
    return ("FAILED" if _status_of(last.outcome) == "FAILED" else "KILLED"), last.outcome.ended


def pipeline_status(facts: Facts) -> Status:
    if _in_flight(facts):
        return ("RUNNING", None) if facts.driven or is_undecided(facts) else ("KILLED", newest_record(facts))
    last = facts.events[-1]
    ends: dict[str, RunStatus] = {"succeeded": "FINISHED", "failed": "FAILED"}
    return ends.get(last.detail.partition(":")[0], "KILLED"), last.time


def is_undecided(facts: Facts) -> bool:
    """Whether no driver drives the pipeline but an attempt gave a sign of life recently: whether it lives will be known after SILENT_S."""
    return not facts.driven and any(_lives(facts, stage, attempt) for stage in facts.stages for attempt in stage.attempts)


def newest_record(facts: Facts) -> float:
    """Unix time of the newest record."""
    times = [facts.created, *(event.time for event in facts.events)]
    times += [preparations.newest(facts.preparation)] if facts.preparation is not None else []
    for stage in facts.stages:
        times += [stage.committed.time] if stage.committed else []
        times += [evaluation.ended for evaluation in stage.evaluations]
        for attempt in stage.attempts:
            times += [attempt.intent.created, *([attempt.outcome.ended] if attempt.outcome else [])]
            times += [node.end for node in attempt.time.nodes if node.end is not None]
    return max(times)


def _last_sign(attempt: AttemptFacts) -> float:
    """Unix time of the last sign of life that is in the ledger."""
    return max((node.end for node in attempt.time.nodes if node.end is not None), default=attempt.intent.created)


def _lives(facts: Facts, stage: StageFacts, attempt: AttemptFacts) -> bool:
    """Whether an attempt goes on, as far as the ledger says: it has no outcome, and is driven or gave a sign of life recently."""
    if attempt.outcome is not None:
        return False
    silent_s = facts.now - _last_sign(attempt)
    return (facts.driven and stage.current) or silent_s < max(SILENT_S, 3 * attempt.intent.flush_s)


def _status_of(outcome: Outcome) -> RunStatus:
    return "FINISHED" if outcome.class_ == "completed" else "KILLED" if outcome.class_ in KILLED else "FAILED"


def _in_flight(facts: Facts) -> bool:
    """Whether a launch began and has not written that it ended."""
    return not facts.events or facts.events[-1].kind != "ended"
