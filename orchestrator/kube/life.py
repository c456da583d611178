"""Whether an attempt lives and how it ended, from what was observed of its job and pods. Pure.

The observations and their times are arguments (`observed`). `waiting` says why one that lives does not train yet.
Refuses to decide what follows: the driver does.

Two facts of the training operator make this longer than one would think (measured on operator 1.9.3):
- It marks a job Failed or Suspended while the job's pods still save, so an attempt lives until none of its pods does.
- It makes a new pod in place of one that vanished too fast to be counted as failed, see `is_broken`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

from orchestrator.kube.kueue import Held, why_held, why_taken
from orchestrator.kube.observed import Job, Notice, Pod
from orchestrator.kube.waiting import why_it_waits
from orchestrator.ledger.records import EXIT_CODES
from orchestrator.ports import Life
from orchestrator.redact import redacted

UNKNOWN = Held()
SETTLE_S = 10.0
"""If all pods are over but the job does not say so, no new pods come after this time."""


def read_life(
    job: Job | None, pods: Iterable[Pod], notices: Sequence[Notice], now: float, *, ended_by_us: bool = False, held: Held = UNKNOWN
) -> Life:
    """What is known of an attempt.

    Args:
        job: the job as it was last seen. None means it was never seen.
        pods: all pods of the attempt, also deleted ones.
        notices: events about the job and its pods, the newest one for each reason.
        now: Unix time.
        ended_by_us: whether this driver has deleted the job.
        held: Kueue's part in it.
    """
    pods = sorted(pods, key=lambda pod: (pod.index, pod.created))
    if job is None and not pods:
        return Life("absent")
    bound = min((pod.bound for pod in pods if pod.bound is not None), default=None)
    living = [pod for pod in pods if not pod.over(now)]
    if living or (job is not None and not _is_over(job, pods, now)):
        if job is None or job.gone is not None:
            return Life("running", bound)
        if bound is not None and not living and len(pods) >= job.pods and not job.suspended:
            return Life("running", bound)  # it has ended, but an operator that was down has not even written yet that it ran
        waiting = why_held(job, held, now) if job.held_back and not pods else why_it_waits(job, living, notices, now)
        return waiting.life(bound)
    ends = [pod.over_since() for pod in pods if pod.bound is not None]
    witnessed = max(ends, default=None)
    if witnessed is None and job is not None and job.has_run:
        witnessed = job.completed
    cause = _cause(job, pods, ended_by_us, held)
    taken = why_taken(held) if cause == "preempted" else ""
    return Life("ended", bound, witnessed, _exit_code(pods), cause, last_words=_last_words(pods), taken=taken)


def is_taken(job: Job, pods: Sequence[Pod]) -> bool:
    """Whether Kueue has suspended a job that had pods already. Kueue would start it again once there is quota; an attempt lives once.

    This is true also if no pod had a host yet: which pods are of which start could not be told later.
    """
    return job.suspended and job.queue is not None and not job.asked and not job.finished and (job.has_run or bool(pods))


def is_broken(pods: Sequence[Pod], now: float) -> bool:
    """Whether a new pod has replaced one that had a host and is over: training cannot go on with it.

    The operator makes such a pod if the old one vanished too fast to be counted as failed: its deletion was forced, or its host is gone.
    """
    lost = {pod.index for pod in pods if pod.bound is not None and pod.over(now)}
    return any(pod.index in lost for pod in pods if not pod.over(now))


def _is_over(job: Job, pods: Sequence[Pod], now: float) -> bool:
    """Whether a job without living pods will get no more pods."""
    if job.gone is not None or job.finished:
        return True
    if job.suspended:
        return not job.held_back or bool(pods)
    return len(pods) >= job.pods and now > max(pod.over_since() for pod in pods) + SETTLE_S


def _cause(job: Job | None, pods: Sequence[Pod], ended_by_us: bool, held: Held) -> Literal["preempted", "oom_killed", "deleted"] | None:
    if any(pod.oom_killed for pod in pods):
        return "oom_killed"
    if any(pod.preempted for pod in pods):
        return "preempted"
    if job is not None and (is_taken(job, pods) or _was_taken(held, pods)):
        return "preempted"
    if len({pod.of_job for pod in pods if pod.of_job}) > 1:
        return "deleted"  # somebody deleted the JobSet or the Job of a TrainJob: Trainer made it anew, with new pods
    if job is None or job.gone is not None:
        expected = ended_by_us or (job is not None and (job.finished or job.suspended))
        return None if expected else "deleted"
    if job.suspended and not job.asked and not job.finished:
        return "preempted"  # Kueue, or a person, wanted the devices back
    overdue = any(not pod.succeeded and pod.ended is None and pod.gone is None for pod in pods)
    return "preempted" if overdue else None


def _was_taken(held: Held, pods: Sequence[Pod]) -> bool:
    """Whether Kueue took the job away and started it again while no driver was there. The agents then refuse to live it a second time."""
    return held.workload is not None and held.workload.evicted is not None and _exit_code(pods) == EXIT_CODES["store"]


def _exit_code(pods: Sequence[Pod]) -> int | None:
    failures = sorted(pod.failed for pod in pods if pod.failed is not None)
    if failures:
        return failures[0][1]
    return 0 if any(pod.succeeded for pod in pods) else None


def _last_words(pods: Sequence[Pod]) -> str:
    failures = sorted((pod.failed, pod.last_words) for pod in pods if pod.failed is not None)
    return redacted(failures[0][1]) if failures else ""
