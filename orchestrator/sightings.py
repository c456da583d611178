"""From objects of Kubernetes, as they were seen, to what is known of an attempt's life: whether it lives, why it waits, how it ended.

Owns the reading of PyTorchJobs, pods and events. Pure: what was seen, and when, comes in as arguments. Refuses to decide what follows.

Each `read` raises where an object is not as Kubernetes writes it: whoever looks at many skips that one and says so.

Three things that make it longer than one would think, all measured on the operator 1.9.3:
- A job is marked Failed or Suspended while its pods are still saving: an attempt lives until no pod of it does.
- Pods are deleted with their statuses, so what was seen of one is kept (`Pod.after`).
- Kubernetes tells times in whole seconds. Where we looked within that second, our own clock is nearer to the truth.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any, Literal

from orchestrator.ports import Life

OPERATOR_SILENT_S = 20.0
"""A job without pods for so long waits for an operator that does not act; healthy ones need less than a second."""
SCHEDULER_SILENT_S = 20.0
"""A pod for so long without a word of any scheduler."""
SETTLE_S = 10.0
"""All pods are over and the job does not say so: after this, nobody will make new ones."""
OVERDUE_S = 60.0
"""A pod that should have been gone for so long lies on a node whose kubelet does not answer: it counts as over."""
STARTING = ("", "ContainerCreating", "PodInitializing")
"""Reasons of a waiting container that are no fault."""
SAID_ELSEWHERE = ("FailedScheduling", "Failed", "BackOff")
"""Events that repeat what a pod's own status says."""
PULL = re.compile(r"^Back-off pulling image .*?: (ErrImagePull): (.*)$", re.DOTALL)

MESSAGE_CHARACTERS = 1024
"""Of an event that are kept: as many as an API server takes."""

Told = Mapping[str, Any]


@dataclass(frozen=True)
class Notice:
    """An event that is about a job or one of its pods."""

    about: str
    """Name of the object."""
    uid: str
    """Of that object: events outlive it, and a name is used again."""
    kind: str
    warning: bool
    reason: str
    message: str
    time: float

    @classmethod
    def read(cls, event: Told, seen: float) -> Notice:
        about = event["involvedObject"]
        series = event.get("series") or {}
        times = [series.get("lastObservedTime"), event.get("lastTimestamp"), event.get("eventTime"), event.get("firstTimestamp")]
        stamps = [unix(one) for one in times if one]
        warning = event.get("type") == "Warning"
        return cls(
            about=text(about.get("name")),
            uid=text(about.get("uid")),
            kind=text(about.get("kind")),
            warning=warning,
            reason=text(event.get("reason"))[:MESSAGE_CHARACTERS],
            message=text(event.get("message"))[:MESSAGE_CHARACTERS],
            time=max(stamps, default=seen),
        )


@dataclass(frozen=True)
class Pod:
    """All that is worth remembering of a pod."""

    name: str
    uid: str
    run: str
    """Our label `osctl/run`."""
    index: int
    """Node of the attempt."""
    phase: str
    created: float
    node: str | None = None
    bound: float | None = None
    """When a node was given to it."""
    ended: float | None = None
    """When its last container ended."""
    gone: float | None = None
    """When it was seen to be deleted."""
    due: float | None = None
    """When a deletion that was asked for should be complete."""
    failed: tuple[float, int] | None = None
    """Time and exit code of its first failing container."""
    succeeded: bool = False
    oom_killed: bool = False
    preempted: str = ""
    """Why the cluster took its node away."""
    unscheduled: str = ""
    """The scheduler's own message."""
    unscheduled_since: float | None = None
    looked_at: bool = False
    """Whether any scheduler has said anything."""
    stuck: str = ""
    """Why a container cannot be started."""
    ready: bool = False

    def shown(self, now: float) -> tuple[str, str]:
        """(phase, why it is not what it should be), for people: as Kubernetes calls it, or Leaving (asked to end), or Gone (deleted)."""
        phase = "Gone" if self.gone is not None else "Leaving" if self.due is not None and not self.over(now) else self.phase
        exit_code = f"exit code {self.failed[1]}" if self.failed else ""
        return phase, "out of memory" if self.oom_killed else self.preempted or exit_code or self.stuck or self.unscheduled

    @classmethod
    def read(cls, pod: Told, seen: float, run_label: str, index_label: str) -> Pod:
        metadata, spec, status = pod["metadata"], pod.get("spec") or {}, pod.get("status") or {}
        labels = metadata.get("labels") or {}
        conditions = {one["type"]: one for one in status.get("conditions") or ()}
        containers = [*(status.get("initContainerStatuses") or ()), *(status.get("containerStatuses") or ())]
        over = [one["state"]["terminated"] for one in containers if "terminated" in (one.get("state") or {})]
        failures = sorted((unix(one.get("finishedAt"), seen), int(one.get("exitCode", 0))) for one in over if one.get("exitCode"))
        scheduled = conditions.get("PodScheduled", {})
        phase = text(status.get("phase")) or "Pending"
        is_bound = scheduled.get("status") == "True" or bool(spec.get("nodeName"))
        return cls(
            name=named(metadata["name"]),
            uid=named(metadata["uid"]),
            run=text(labels.get(run_label)),
            index=int(text(labels.get(index_label)) or "0"),
            phase=phase,
            created=unix(metadata.get("creationTimestamp"), seen),
            node=text(spec.get("nodeName")) or None,
            bound=when(unix(scheduled.get("lastTransitionTime"), seen), seen) if is_bound else None,
            ended=_pod_ended(status, over, seen) if phase in ("Succeeded", "Failed") else None,
            due=unix(metadata["deletionTimestamp"]) if metadata.get("deletionTimestamp") else None,
            failed=next(iter(failures), None),
            succeeded=phase == "Succeeded",
            oom_killed=any(one.get("reason") == "OOMKilled" for one in over),
            preempted=_preempted(conditions.get("DisruptionTarget", {}), status),
            unscheduled=first_line(text(scheduled.get("message"))) if scheduled.get("status") == "False" else "",
            unscheduled_since=unix(scheduled.get("lastTransitionTime"), seen) if scheduled.get("status") == "False" else None,
            looked_at=bool(scheduled) or is_bound,
            stuck=_stuck(containers) if phase == "Pending" or not over else "",
            ready=conditions.get("Ready", {}).get("status") == "True",
        )

    def after(self, before: Pod | None) -> Pod:
        """The newer sight of the same pod, with what only the older one knew."""
        if before is None:
            return self
        return replace(
            self,
            node=self.node or before.node,
            bound=before.bound if before.bound is not None else self.bound,
            ended=before.ended if before.ended is not None else self.ended,
            failed=before.failed or self.failed,
            oom_killed=before.oom_killed or self.oom_killed,
            preempted=before.preempted or self.preempted,
        )

    def over(self, now: float) -> bool:
        """Whether it holds nothing any more."""
        return self.ended is not None or self.gone is not None or (self.due is not None and now > self.due + OVERDUE_S)

    def over_since(self) -> float:
        return self.ended if self.ended is not None else self.gone if self.gone is not None else self.due or self.created

    @property
    def short(self) -> str:
        return f"worker-{self.index}"


@dataclass(frozen=True)
class Job:
    """All that is worth remembering of a PyTorchJob."""

    name: str
    uid: str
    owner: tuple[str, str] | None
    """(store URL, run key), by its annotations; none: a foreign one."""
    created: float
    pods: int
    """How many it wants."""
    conditions: frozenset[str]
    """Types of those that are true now."""
    has_run: bool
    """Whether it was ever running."""
    suspended: bool
    """Whether somebody wants it to be."""
    asked: bool
    """Whether a driver wants it to be."""
    queue: str | None = None
    completed: float | None = None
    gone: float | None = None

    @classmethod
    def read(cls, job: Told, seen: float, owner: tuple[str, str] | None, asked_annotation: str, queue_label: str) -> Job:
        metadata, spec, status = job["metadata"], job.get("spec") or {}, job.get("status") or {}
        conditions = status.get("conditions") or ()
        replicas = (spec.get("pytorchReplicaSpecs") or {}).values()
        completed = status.get("completionTime")
        return cls(
            name=named(metadata["name"]),
            uid=named(metadata["uid"]),
            owner=owner,
            created=unix(metadata.get("creationTimestamp"), seen),
            pods=sum(int(one.get("replicas") or 1) for one in replicas),
            conditions=frozenset(one["type"] for one in conditions if one.get("status") == "True"),
            has_run=any(one["type"] in ("Running", "Succeeded", "Failed", "Restarting") for one in conditions),
            suspended=bool((spec.get("runPolicy") or {}).get("suspend")),
            asked=asked_annotation in (metadata.get("annotations") or {}),
            queue=text((metadata.get("labels") or {}).get(queue_label)) or None,
            completed=when(unix(completed), seen) if completed else None,
        )

    @property
    def finished(self) -> bool:
        return bool(self.conditions & {"Succeeded", "Failed"})

    @property
    def held_back(self) -> bool:
        """Whether it is suspended so that it waits for its turn: by a queue, before it ran."""
        return self.suspended and self.queue is not None and not self.asked and not self.has_run

    def forgotten(self, pods: Sequence[Pod], notices: Sequence[Notice]) -> bool:
        """Whether the operator has met it, made nothing of it and says nothing: it does so where its cache was stale."""
        met = "Created" in self.conditions and not self.finished and not self.suspended
        return met and not pods and not self.has_run and not any(note.warning and note.uid == self.uid for note in notices)


def read_life(
    job: Job | None, pods: Iterable[Pod], notices: Sequence[Notice], now: float, *, ended_by_us: bool = False, fault: str = ""
) -> Life:
    """What is known of an attempt.

    Args:
        job: as last seen; none: never seen.
        pods: of the attempt, those that are gone included.
        notices: events about the job and its pods, the newest of a reason.
        ended_by_us: whether this driver has deleted the job.
        fault: why it could not be submitted.
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
            return Life("running", bound)  # it has ended; an operator that was away has not even said yet that it ran
        waits, waits_for, since = why_it_waits(job, living, notices, now)
        return Life("running", bound, waits=waits, waits_for=waits_for, since=since)
    ends = [pod.over_since() for pod in pods if pod.bound is not None]
    witnessed = max(ends, default=None)
    if witnessed is None and job is not None and job.has_run:
        witnessed = job.completed
    return Life("ended", bound, witnessed, _exit_code(pods), _cause(job, pods, ended_by_us))


def is_broken(pods: Sequence[Pod], now: float) -> bool:
    """Whether a gang goes on with a pod in place of one that had a node and is gone. The operator makes such a pod where the old one went
    too fast to be counted as failed (its deletion was forced, or its node is gone); training cannot go on with it."""
    lost = {pod.index for pod in pods if pod.bound is not None and pod.over(now)}
    return any(pod.index in lost for pod in pods if not pod.over(now))


def _is_over(job: Job, pods: Sequence[Pod], now: float) -> bool:
    """Of a job none of whose pods lives."""
    if job.gone is not None or job.finished:
        return True
    if job.suspended:
        return not job.held_back
    return len(pods) >= job.pods and now > max(pod.over_since() for pod in pods) + SETTLE_S


def _cause(job: Job | None, pods: Sequence[Pod], ended_by_us: bool) -> Literal["preempted", "oom_killed", "deleted"] | None:
    if any(pod.oom_killed for pod in pods):
        return "oom_killed"
    if any(pod.preempted for pod in pods):
        return "preempted"
    if job is None or job.gone is not None:
        expected = ended_by_us or (job is not None and (job.finished or job.suspended))
        return None if expected else "deleted"
    if job.suspended and not job.asked and not job.finished:
        return "preempted"  # Kueue, or a person, wanted the devices back
    overdue = any(not pod.succeeded and pod.ended is None and pod.gone is None for pod in pods)
    return "preempted" if overdue else None


def _exit_code(pods: Sequence[Pod]) -> int | None:
    failures = sorted(pod.failed for pod in pods if pod.failed is not None)
    if failures:
        return failures[0][1]
    return 0 if any(pod.succeeded for pod in pods) else None


# --- Why it waits ----------------------------------------------------------------------------------------------------------------------

Waiting = tuple[str, Literal["capacity", "fault"] | None, float | None]


def why_it_waits(job: Job, living: Sequence[Pod], notices: Sequence[Notice], now: float) -> Waiting:
    """(the cluster's own words, what kind of waiting it is, since when); the words are empty once it trains.

    Words are stable: nothing in them counts seconds, so a change of them is news.
    """
    for pod in living:
        if pod.stuck:
            return f"{pod.short}: {pod.stuck}", "fault", pod.bound or pod.created
    if len(living) < job.pods and not job.suspended and not job.has_run:
        refusals = [note for note in notices if note.warning and note.uid == job.uid and "Create" in note.reason]
        if refusals:
            return first_line(max(refusals, key=lambda note: note.time).message), "fault", job.created
    unscheduled = [pod for pod in living if pod.unscheduled]
    if unscheduled:
        since = min(pod.unscheduled_since or pod.created for pod in unscheduled)
        return _clearest([pod.unscheduled for pod in unscheduled]), "capacity", since
    unseen = [pod for pod in living if not pod.looked_at]
    if unseen:
        silent = now - unseen[0].created >= SCHEDULER_SILENT_S
        return f"no scheduler has taken up {unseen[0].short} yet", "fault" if silent else None, unseen[0].created
    for pod in living:
        if pod.phase == "Pending":
            return _starting(pod, notices)
    if living or job.has_run:
        return "", None, None
    if job.suspended:
        return f"waits for its turn in queue {job.queue}", "capacity", job.created
    acted = "made no pods of it" if job.conditions else "has not taken it up"
    silent = now - job.created >= OPERATOR_SILENT_S
    return (f"the training operator {acted}", "fault" if silent else None, job.created)


def _starting(pod: Pod, notices: Sequence[Notice]) -> Waiting:
    """Of a pod that has its node, and does not run yet."""
    mine = sorted((note for note in notices if note.uid == pod.uid), key=lambda note: note.time)
    warnings = [note for note in mine if note.warning and note.reason not in SAID_ELSEWHERE]
    if warnings:
        return f"{pod.short}: {warnings[-1].reason}: {first_line(warnings[-1].message)}", "fault", pod.bound or pod.created
    pulling = mine and mine[-1].reason == "Pulling"
    return f"{pod.short} starts{f': {first_line(mine[-1].message)}' if pulling else ''}", None, pod.bound or pod.created


def _clearest(messages: Sequence[str]) -> str:
    """Of a gang, one pod is told which nodes lack what, and the others that the gang is not complete."""
    return next((message for message in messages if "nodes are available" in message), messages[0])


def _stuck(containers: Sequence[Told]) -> str:
    for container in containers:
        waiting = (container.get("state") or {}).get("waiting") or {}
        reason, message = text(waiting.get("reason")), text(waiting.get("message"))
        if reason not in STARTING:
            pull = PULL.match(message)
            if pull:  # kubelet says the same fault in two ways, in turn
                reason, message = pull.groups()
            return f"{reason}: {first_line(message)}" if message else reason
    return ""


# --- Reading ---------------------------------------------------------------------------------------------------------------------------


def _preempted(disruption: Told, status: Told) -> str:
    if disruption.get("status") == "True":
        return f"{disruption.get('reason') or 'DisruptionTarget'}: {first_line(text(disruption.get('message')))}".rstrip(": ")
    if status.get("reason") in ("Evicted", "NodeLost", "NodeShutdown", "Terminated", "Preempted", "Shutdown"):
        return f"{status['reason']}: {first_line(text(status.get('message')))}".rstrip(": ")
    return ""


def _pod_ended(status: Told, over: Sequence[Told], seen: float) -> float:
    finished = [unix(one["finishedAt"]) for one in over if one.get("finishedAt")]
    turned = [unix(one["lastTransitionTime"]) for one in status.get("conditions") or () if one.get("lastTransitionTime")]
    return when(max(finished or turned, default=seen), seen)


def when(stamp: float, seen: float) -> float:
    """The time of what Kubernetes dates to a whole second and we saw at `seen`: ours, where it lies in that second."""
    return seen if stamp <= seen < stamp + 1 else stamp


def unix(stamp: str | None, otherwise: float = 0.0) -> float:
    """Unix seconds of an RFC 3339 time."""
    return datetime.fromisoformat(stamp).timestamp() if stamp else otherwise


def text(value: Any) -> str:
    """What should be a string, and may be left out. Raises TypeError for anything else."""
    if value is None:
        return ""
    if not isinstance(value, str):
        raise TypeError(f"found {type(value).__name__} where text belongs")
    return value


def named(value: Any) -> str:
    """What must be a string, and not an empty one. Raises TypeError."""
    if not text(value):
        raise TypeError("found nothing where a name belongs")
    return str(value)


def first_line(words: str) -> str:
    return words.strip().partition("\n")[0]
