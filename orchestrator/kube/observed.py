"""What is kept of a PyTorchJob, a pod and an event, read from objects of Kubernetes as they were seen at a time. Pure.

Owns reading these objects. Refuses to say what they mean together for an attempt (`life`).

Each `read` raises if an object is not as Kubernetes writes it. The caller skips that object and logs it.

Two things make this longer than one would think, both measured on the training operator 1.9.3:
- A pod is deleted with its status, so what was seen of it is kept (`Pod.after`).
- Kubernetes gives times in whole seconds. If we saw the change within that second, our own clock is more precise.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

from orchestrator.kube import names
from orchestrator.labels import Annotation, Label

OVERDUE_S = 60.0
"""A pod that should have been deleted this long ago is on a node whose kubelet does not answer. It counts as over."""
STARTING = ("", "ContainerCreating", "PodInitializing")
"""Reasons of a waiting container that are not faults."""
PULL = re.compile(r"^Back-off pulling image .*?: (ErrImagePull): (.*)$", re.DOTALL)
"""kubelet's message about a pull that failed and will be tried again."""
MESSAGE_CHARACTERS = 1024
"""How much of an event's message is kept: as much as an API server accepts."""
LAST_WORDS_CHARACTERS = 2048
"""How much of a failing container's last output is kept: as much as kubelet keeps."""

LET_GO = 2
"""The highest generation of a suspended TrainJob that was never let go: Kueue 0.15 writes the pods' places first, and then lets it go. When
it is suspended again, nothing but its generation tells that it has run."""

JsonObject = Mapping[str, Any]


@dataclass(frozen=True)
class Notice:
    """An event about a job or one of its pods."""

    about: str
    """Name of the object."""
    uid: str
    """Uid of the object. Events stay when the object is deleted, and its name may be used again."""
    kind: str
    """Kind of the object."""
    warning: bool
    reason: str
    message: str
    time: float
    """Unix time at which the event happened last."""

    @classmethod
    def read(cls, event: JsonObject, seen: float) -> Notice:
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
    """What is kept of a pod. Times are Unix seconds."""

    name: str
    uid: str
    run: str
    """Its label `osctl/run`: the attempt's hash."""
    index: int
    """Which node of the attempt it is."""
    phase: str
    created: float
    node: str | None = None
    """Name of the host."""
    bound: float | None = None
    """When it was bound to that host."""
    ended: float | None = None
    """When its last container ended."""
    gone: float | None = None
    """When we saw that it was deleted."""
    due: float | None = None
    """When a requested deletion should be complete."""
    failed: tuple[float, int] | None = None
    """Time and exit code of the container that failed first."""
    last_words: str = ""
    """The last output of that container, as kubelet keeps it."""
    succeeded: bool = False
    oom_killed: bool = False
    preempted: str = ""
    """Why the cluster took its node away. Empty means that it did not."""
    unscheduled: str = ""
    """Why no host was found, in the scheduler's words. Empty means that no reason is known."""
    unscheduled_since: float | None = None
    of_job: str = ""
    """Uid of the Job that made it, if the attempt is a TrainJob. Empty: no Job did."""
    looked_at: bool = False
    """Whether a scheduler has written anything about it."""
    selector: str = ""
    """Its node selector, as a label selector. Kept only while it has no host."""
    stuck: str = ""
    """Why a container cannot be started. Empty means that none is stuck."""

    def shown(self, now: float) -> tuple[str, str]:
        """(phase, what is wrong with it), for people. The phase is Kubernetes', or Leaving (asked to end), or Gone (deleted)."""
        phase = "Gone" if self.gone is not None else "Leaving" if self.due is not None and not self.over(now) else self.phase
        exit_code = f"exit code {self.failed[1]}" if self.failed else ""
        return phase, "out of memory" if self.oom_killed else self.preempted or exit_code or self.stuck or self.unscheduled

    @classmethod
    def read(cls, pod: JsonObject, seen: float) -> Pod:
        metadata, spec, status = pod["metadata"], pod.get("spec") or {}, pod.get("status") or {}
        labels = metadata.get("labels") or {}
        conditions = {one["type"]: one for one in status.get("conditions") or ()}
        containers = [*(status.get("initContainerStatuses") or ()), *(status.get("containerStatuses") or ())]
        over = [one["state"]["terminated"] for one in containers if "terminated" in (one.get("state") or {})]
        failed = [one for one in over if one.get("exitCode")]
        failures = sorted((unix(one.get("finishedAt"), seen), int(one.get("exitCode", 0)), text(one.get("message"))) for one in failed)
        scheduled = conditions.get("PodScheduled", {})
        phase = text(status.get("phase")) or "Pending"
        is_bound = scheduled.get("status") == "True" or bool(spec.get("nodeName"))
        return cls(
            name=named(metadata["name"]),
            uid=named(metadata["uid"]),
            run=text(labels.get(Label.RUN)),
            index=int(text(labels.get(Label.REPLICA_INDEX) or labels.get(Label.COMPLETION_INDEX)) or "0"),
            phase=phase,
            created=unix(metadata.get("creationTimestamp"), seen),
            node=text(spec.get("nodeName")) or None,
            bound=when(unix(scheduled.get("lastTransitionTime"), seen), seen) if is_bound else None,
            ended=_pod_ended(status, over, seen) if phase in ("Succeeded", "Failed") else None,
            due=unix(metadata["deletionTimestamp"]) if metadata.get("deletionTimestamp") else None,
            failed=failures[0][:2] if failures else None,
            last_words=failures[0][2][-LAST_WORDS_CHARACTERS:] if failures else "",
            succeeded=phase == "Succeeded",
            oom_killed=any(one.get("reason") == "OOMKilled" for one in over),
            preempted=_preempted(conditions.get("DisruptionTarget", {}), status),
            unscheduled=first_line(text(scheduled.get("message"))) if scheduled.get("status") == "False" else "",
            unscheduled_since=unix(scheduled.get("lastTransitionTime"), seen) if scheduled.get("status") == "False" else None,
            of_job=text(labels.get(Label.CONTROLLER_UID)),
            looked_at=bool(scheduled) or is_bound,
            selector="" if is_bound else ",".join(f"{key}={value}" for key, value in sorted((spec.get("nodeSelector") or {}).items())),
            stuck=_stuck(containers) if phase == "Pending" or not over else "",
        )

    def after(self, before: Pod | None) -> Pod:
        """This state of a pod, completed with what only an earlier state of the same pod (`before`) had."""
        if before is None:
            return self
        return replace(
            self,
            node=self.node or before.node,
            bound=before.bound if before.bound is not None else self.bound,
            ended=before.ended if before.ended is not None else self.ended,
            failed=before.failed or self.failed,
            last_words=before.last_words or self.last_words,
            oom_killed=before.oom_killed or self.oom_killed,
            preempted=before.preempted or self.preempted,
        )

    def over(self, now: float) -> bool:
        """Whether it no longer holds devices."""
        return self.ended is not None or self.gone is not None or (self.due is not None and now > self.due + OVERDUE_S)

    def over_since(self) -> float:
        """Unix time since which a pod that is `over` holds no devices."""
        return self.ended if self.ended is not None else self.gone if self.gone is not None else self.due or self.created

    @property
    def short(self) -> str:
        """Its name for people, of either kind of job: a pod of a TrainJob called `node` would be taken for a host."""
        return f"worker-{self.index}"


@dataclass(frozen=True)
class Job:
    """What is kept of an attempt's job, of any kind. Times are Unix seconds."""

    name: str
    uid: str
    owner: tuple[str, str] | None
    """(store URL, run key) from its annotations. None means that it is foreign."""
    created: float
    pods: int
    """How many pods it asks for."""
    conditions: frozenset[str]
    """Types of the conditions that are true now."""
    has_run: bool
    """Whether it was ever running."""
    suspended: bool
    """Whether its spec suspends it, so that it must have no pods."""
    asked: bool
    """Whether a driver has asked its pods to save and leave."""
    queue: str | None = None
    """The queue of Kueue in which it waits. None means no queue."""
    completed: float | None = None
    gone: float | None = None
    """When we saw that it was deleted."""
    plural: str = "pytorchjobs"
    """Which kind of job it is, by its name in a path of the API (`orchestrator.kube.operator`)."""

    @classmethod
    def read(cls, job: JsonObject, seen: float) -> Job:
        """A PyTorchJob."""
        metadata, spec, status = job["metadata"], job.get("spec") or {}, job.get("status") or {}
        conditions = status.get("conditions") or ()
        replicas = (spec.get("pytorchReplicaSpecs") or {}).values()
        completed = status.get("completionTime")
        return cls(
            name=named(metadata["name"]),
            uid=named(metadata["uid"]),
            owner=names.owner(job),
            created=unix(metadata.get("creationTimestamp"), seen),
            pods=sum(int(one.get("replicas") or 1) for one in replicas),
            conditions=frozenset(one["type"] for one in conditions if one.get("status") == "True"),
            has_run=any(one["type"] in ("Running", "Succeeded", "Failed", "Restarting") for one in conditions),
            suspended=bool((spec.get("runPolicy") or {}).get("suspend")),
            asked=Annotation.ASKED in (metadata.get("annotations") or {}),
            queue=text((metadata.get("labels") or {}).get(Label.QUEUE_NAME)) or None,
            completed=when(unix(completed), seen) if completed else None,
        )

    @classmethod
    def read_train_job(cls, job: JsonObject, seen: float) -> Job:
        """A TrainJob.

        Its conditions never say that it runs, and after a resume they still hold Suspended, as false: only those that are true count.
        """
        metadata, spec, status = job["metadata"], job.get("spec") or {}, job.get("status") or {}
        conditions = {one["type"]: one for one in status.get("conditions") or () if one.get("status") == "True"}
        counts = [one.get(field) for one in status.get("jobsStatus") or () for field in ("ready", "succeeded", "failed")]
        suspended = bool(spec.get("suspend"))
        ends = [conditions[one].get("lastTransitionTime") for one in ("Complete", "Failed") if one in conditions]
        return cls(
            name=named(metadata["name"]),
            uid=named(metadata["uid"]),
            owner=names.owner(job),
            created=unix(metadata.get("creationTimestamp"), seen),
            pods=int((spec.get("trainer") or {}).get("numNodes") or 1),
            conditions=frozenset(conditions) | ({"Created"} if status.get("jobsStatus") else frozenset()),
            has_run=any(counts) or bool(ends) or (suspended and int(metadata.get("generation") or 1) > LET_GO),
            suspended=suspended,
            asked=Annotation.ASKED in (metadata.get("annotations") or {}),
            queue=text((metadata.get("labels") or {}).get(Label.QUEUE_NAME)) or None,
            completed=when(unix(ends[0]), seen) if ends and ends[0] else None,
            plural="trainjobs",
        )

    @property
    def finished(self) -> bool:
        return bool(self.conditions & {"Succeeded", "Complete", "Failed"})

    @property
    def held_back(self) -> bool:
        """Whether a queue has suspended it until its turn comes. This is true only of a job that never ran."""
        return self.suspended and self.queue is not None and not self.asked and not self.has_run

    def forgotten(self, pods: Sequence[Pod], notices: Sequence[Notice]) -> bool:
        """Whether the operator has seen it but made no pods and reported no error. This happens if the operator's cache was stale."""
        met = self.plural == "pytorchjobs" and "Created" in self.conditions and not self.finished and not self.suspended
        return met and not pods and not self.has_run and not any(note.warning and note.uid == self.uid for note in notices)


def _stuck(containers: Sequence[JsonObject]) -> str:
    for container in containers:
        waiting = (container.get("state") or {}).get("waiting") or {}
        reason, message = text(waiting.get("reason")), text(waiting.get("message"))
        if reason not in STARTING:
            pull = PULL.match(message)
            if pull:  # kubelet alternates between two messages about the same fault
                reason, message = pull.groups()
            return f"{reason}: {first_line(message)}" if message else reason
    return ""


# --- Reading ---------------------------------------------------------------------------------------------------------------------------


def _preempted(disruption: JsonObject, status: JsonObject) -> str:
    if disruption.get("status") == "True":
        return f"{disruption.get('reason') or 'DisruptionTarget'}: {first_line(text(disruption.get('message')))}".rstrip(": ")
    if status.get("reason") in ("Evicted", "NodeLost", "NodeShutdown", "Terminated", "Preempted", "Shutdown"):
        return f"{status['reason']}: {first_line(text(status.get('message')))}".rstrip(": ")
    return ""


def _pod_ended(status: JsonObject, over: Sequence[JsonObject], seen: float) -> float:
    finished = [unix(one["finishedAt"]) for one in over if one.get("finishedAt")]
    turned = [unix(one["lastTransitionTime"]) for one in status.get("conditions") or () if one.get("lastTransitionTime")]
    return when(max(finished or turned, default=seen), seen)


def when(stamp: float, seen: float) -> float:
    """Unix time of a change that Kubernetes dates to the whole second `stamp` and we saw at `seen`: `seen` if it is in the same second."""
    return seen if stamp <= seen < stamp + 1 else stamp


def unix(stamp: str | None, otherwise: float = 0.0) -> float:
    """Unix seconds of an RFC 3339 time, or `otherwise` if there is none."""
    return datetime.fromisoformat(stamp).timestamp() if stamp else otherwise


def text(value: Any) -> str:
    """A string, or an empty one if it was left out. Raises TypeError for a value of another type."""
    if value is None:
        return ""
    if not isinstance(value, str):
        raise TypeError(f"found {type(value).__name__} where text belongs")
    return value


def named(value: Any) -> str:
    """A string that must not be empty. Raises TypeError."""
    if not text(value):
        raise TypeError("found nothing where a name belongs")
    return str(value)


def first_line(words: str) -> str:
    return words.strip().partition("\n")[0]
