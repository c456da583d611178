"""Why an attempt does not train yet: the one reason that counts, where several hold at once. Pure.

Owns the causes of waiting on a cluster, which of them is said (`why_it_waits` asks in the order of docs/waiting.md) and their kind.
`scheduler_words` reads what a scheduler wrote. Refuses to say whether an attempt lives (`life`), and what follows from waiting: the driver
decides that.

The words contain no running time, so they change only if the reason changes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from orchestrator.kube import scheduler_words
from orchestrator.kube.observed import Job, Notice, Pod, first_line
from orchestrator.ports import Life, WaitCause

OPERATOR_SILENT_S = 20.0
"""A job that has had no pods for this long waits for an operator that does not act. A healthy one needs less than a second."""
SCHEDULER_SILENT_S = 20.0
"""A pod without any condition from a scheduler for this long waits for a scheduler that is not there."""
SAID_ELSEWHERE = ("FailedScheduling", "Failed", "BackOff")
"""Reasons of events that repeat what the pod's own status says."""

NEXT: Mapping[WaitCause, str] = {
    "webhook": "It starts by itself once the webhook answers; `osctl doctor` names what is down",
    "refused": "Raise the namespace's quota, or ask for fewer nodes",
    "operator": "`osctl doctor` says which operator is away",
    "scheduler": "Start the scheduler that the cluster profile names",
    "queue": "Mend the queue, or name another one: `kueue_queue` of the cluster profile",
    "deactivated": "Find out who did it; `osctl cancel` and `osctl launch` give it a new place",
    "priority": "A higher `kueue_priority` goes first",
    "quota": "Ask for fewer nodes (`resources.nodes`), or for a larger quota",
    "secret": "Create the Secret that the cluster profile names",
    "image": "Mend `image` in the cluster profile, or the registry",
    "container": "The node's own words say what is missing; `osctl events` keeps them",
    "gang": "Its nodes are paid for while it waits; make the quota as small as the nodes that are there",
    "volume": "Create the claim that `volumes` of the cluster profile names",
    "taint": "If those nodes are meant for it, add the taint to `tolerations` of the cluster profile",
    "selector": "Compare `node_selector` of the cluster profile with the labels of the nodes",
}
"""What a person can do about a cause, if anything. `quota` is meant for the fault: to wait for others' quota needs nothing."""


@dataclass(frozen=True)
class Waiting:
    """Why an attempt waits. All empty: it waits for nothing."""

    words: str = ""
    """Why, in the cluster's own words."""
    kind: Literal["capacity", "fault"] | None = None
    """As `Life.waits_for`."""
    since: float | None = None
    """Unix time since which it waits for that."""
    cause: WaitCause | None = None
    """Which row of docs/waiting.md it is."""

    def life(self, bound: float | None) -> Life:
        """A living attempt that waits for this."""
        return Life("running", bound, waits=self.words, waits_for=self.kind, since=self.since, waits_on=self.cause)


def why_it_waits(job: Job, living: Sequence[Pod], notices: Sequence[Notice], now: float) -> Waiting:
    """Why a job whose pods are `living` does not train yet.

    The order is that of a start, except that a fault of any pod comes before what the others wait for: it holds all of them up.
    """
    return (
        _stuck(living, notices)
        or _not_made(job, living, notices)
        or _half_bound(living)
        or _unscheduled(living)
        or _unseen(living, now)
        or next((_starting(pod, notices) for pod in living if pod.phase == "Pending"), None)
        or _without_pods(job, living, now)
        or Waiting()
    )


def why_pods_wait(living: Sequence[Pod]) -> Waiting | None:
    """Why pods that no operator made do not run: those of a driver. None: no reason is known."""
    return _stuck(living, ()) or _unscheduled(living)


def _stuck(living: Sequence[Pod], notices: Sequence[Notice]) -> Waiting | None:
    """A container that cannot be started, on a pod that has its host."""
    pod = next((pod for pod in living if pod.stuck), None)
    if pod is None:
        return None
    no_login = any(note.uid == pod.uid and note.reason == "FailedToRetrieveImagePullSecret" for note in notices)
    since = pod.bound or pod.created
    return Waiting(f"{pod.short}: {pod.stuck}", "fault", since, "secret" if no_login else _cause_of_start(pod.stuck))


def _not_made(job: Job, living: Sequence[Pod], notices: Sequence[Notice]) -> Waiting | None:
    """What kept the operator from making pods."""
    if len(living) >= job.pods or job.suspended or job.has_run:
        return None
    refusals = [note for note in notices if note.warning and _is_about(note, job) and "Creat" in note.reason]
    if not refusals:
        return None
    words = first_line(max(refusals, key=lambda note: note.time).message)
    return Waiting(words, "fault", job.created, "webhook" if "failed calling webhook" in words else "refused")


def _is_about(note: Notice, job: Job) -> bool:
    """Whether an event is about a job, or about what its operator made of it: of a TrainJob a JobSet, of that a Job, which makes pods."""
    return note.uid == job.uid or (job.plural == "trainjobs" and note.kind in ("JobSet", "Job") and note.time >= job.created)


def _half_bound(living: Sequence[Pod]) -> Waiting | None:
    """A part of the nodes is held, and the others are not there. A scheduler with gangs binds all or none; Kueue alone does not.

    It is a fault, since devices are held and paid for while nothing trains. `since` is the newest binding: the pods of a gang that was
    found just now are bound one after the other, and each keeps its old refusal until its own turn.
    """
    without = [pod for pod in living if pod.unscheduled]
    bound = [pod.bound for pod in living if pod.bound is not None]
    if not without or not bound:
        return None
    count = len(bound) + len(without)
    words = f"{len(without)} of {count} pods have no node ({scheduler_words.clearest([pod.unscheduled for pod in without])})"
    return Waiting(f"{words}; {len(bound)} hold theirs and wait", "fault", max(bound), "gang")


def _unscheduled(living: Sequence[Pod]) -> Waiting | None:
    unscheduled = [pod for pod in living if pod.unscheduled]
    if not unscheduled:
        return None
    words = scheduler_words.clearest([pod.unscheduled for pod in unscheduled])
    cause = scheduler_words.cause_of(words)
    since = min(pod.unscheduled_since or pod.created for pod in unscheduled)
    return Waiting(words, "fault" if cause == "volume" else "capacity", since, cause)


def _unseen(living: Sequence[Pod], now: float) -> Waiting | None:
    pod = next((pod for pod in living if not pod.looked_at), None)
    if pod is None:
        return None
    silent = now - pod.created >= SCHEDULER_SILENT_S
    return Waiting(f"no scheduler has taken up {pod.short} yet", "fault" if silent else None, pod.created, "scheduler")


def _starting(pod: Pod, notices: Sequence[Notice]) -> Waiting:
    """Why a pod that has its host does not run yet."""
    mine = sorted((note for note in notices if note.uid == pod.uid), key=lambda note: note.time)
    warnings = [note for note in mine if note.warning and note.reason not in SAID_ELSEWHERE]
    since = pod.bound or pod.created
    if warnings:
        words = f"{warnings[-1].reason}: {first_line(warnings[-1].message)}"
        return Waiting(f"{pod.short}: {words}", "fault", since, _cause_of_start(words))
    pulling = mine and mine[-1].reason == "Pulling"
    return Waiting(f"{pod.short} starts{f': {first_line(mine[-1].message)}' if pulling else ''}", None, since, "starting")


def _without_pods(job: Job, living: Sequence[Pod], now: float) -> Waiting | None:
    if living or job.has_run:
        return None
    if job.suspended:
        return Waiting(f"waits for its turn in queue {job.queue}", "capacity", job.created, "quota")
    acted = "made no pods of it" if job.conditions else "has not taken it up"
    who = "the training operator" if job.plural == "pytorchjobs" else "JobSet" if job.conditions else "Kubeflow Trainer"
    silent = now - job.created >= OPERATOR_SILENT_S
    return Waiting(f"{who} {acted}", "fault" if silent else None, job.created, "operator")


def _cause_of_start(words: str) -> WaitCause:
    """The cause that kubelet's words about a container, a volume or an image mean."""
    if "secret" in words.lower():  # a missing Secret keeps a container, a volume and the login of a registry
        return "secret"
    if words.startswith(("FailedMount", "FailedAttachVolume", "FailedMapVolume")):
        return "volume"
    return "image" if "Image" in words.partition(":")[0] else "container"
