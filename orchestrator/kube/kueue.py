"""What Kueue says of a job that it holds back: why its quota is not there, at which place it waits, and who took it away. Pure.

Owns reading a Workload, a LocalQueue, a ClusterQueue and the list of a queue's waiting Workloads, and what they mean for an attempt
(`why_held`). Kueue makes one Workload for each job; its label `kueue.x-k8s.io/job-uid` has the job's uid.
Refuses to send requests (`queue_watch`) and to say what a job's pods wait for (`waiting`).

Read in Kueue v0.15.0 and seen on it:
- A condition keeps its time while its reason changes, so it does not say since when a queue is stopped. The queue's own condition does.
- Of a preempted job Kueue says Evicted; once it is admitted again, that condition is False and the reason is "QuotaReserved".
- In a StrictFIFO queue, what stands behind the first has no condition at all.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

from orchestrator.kube.observed import Job, first_line, named, text, unix
from orchestrator.kube.waiting import OPERATOR_SILENT_S, Waiting
from orchestrator.labels import Label

UNUSED = re.compile(r"insufficient unused quota for (\S+) in flavor (\S+), (\S+) more needed")
TOO_MUCH = re.compile(
    r"insufficient quota for (\S+) in flavor (\S+), previously considered podsets requests \((\S+)\) \+ current podset request \((\S+)\) "
    r"> maximum capacity \((\S+)\)"
)
POD_SET = re.compile(r"couldn't assign flavors to pod set \S+: ")
ORDINARY = ("cpu", "memory", "ephemeral-storage", "pods")
"""Resources that are said only if no device is short: Kueue names each that is."""
ADAPTERS = "rdma/"
"""How resources of network adapters begin, as their device plugin names them. They are short whenever the devices beside them are."""
MISSING = re.compile(r"(LocalQueue|ClusterQueue) (\S+) (?:doesn't exist|not found|is terminating or missing)")
CLOSED = re.compile(r"(LocalQueue|ClusterQueue) (\S+) is (stopped|inactive)")
PREEMPTOR = re.compile(r"JobUID: ([0-9a-f-]+)\) due to ([^;]+)")

JsonObject = Mapping[str, Any]


@dataclass(frozen=True)
class Condition:
    """A condition of an object of Kueue."""

    true: bool
    reason: str
    message: str
    since: float
    """Unix time since which it is true, or false. Its reason may be newer."""


@dataclass(frozen=True)
class Workload:
    """What is kept of a Workload. Times are Unix seconds."""

    name: str
    uid: str
    job: str
    """Uid of the job for which Kueue made it. Empty if it has none."""
    queue: str
    """Name of its LocalQueue."""
    priority: int
    created: float
    active: bool
    """Whether it may be admitted: false if a person or a limit of Kueue has ended its wait."""
    quota: Condition | None
    """QuotaReserved."""
    admitted: bool
    evicted: Condition | None
    checks: tuple[tuple[str, str], ...]
    """(name, message) of each admission check that is not passed."""
    noticed: float
    """When we first saw the reason for which it waits."""

    @classmethod
    def read(cls, workload: JsonObject, seen: float) -> Self:
        metadata, spec, status = workload["metadata"], workload.get("spec") or {}, workload.get("status") or {}
        conditions = _conditions(status, seen)
        owners = [owner["uid"] for owner in metadata.get("ownerReferences") or () if owner.get("controller")]
        checks = [one for one in status.get("admissionChecks") or () if one.get("state") != "Ready"]
        admitted = conditions.get("Admitted")
        return cls(
            name=named(metadata["name"]),
            uid=named(metadata["uid"]),
            job=text((metadata.get("labels") or {}).get(Label.JOB_UID)) or text(next(iter(owners), "")),
            queue=text(spec.get("queueName")),
            priority=int(spec.get("priority") or 0),
            created=unix(metadata.get("creationTimestamp"), seen),
            active=spec.get("active") is not False,
            quota=conditions.get("QuotaReserved"),
            admitted=admitted is not None and admitted.true,
            evicted=conditions.get("Evicted"),
            checks=tuple((text(one.get("name")), first_line(text(one.get("message")))) for one in checks),
            noticed=seen,
        )

    def after(self, before: Workload | None) -> Workload:
        """This state, completed with when its reason was first seen."""
        same = before is not None and before.uid == self.uid and before._reason == self._reason
        return replace(self, noticed=before.noticed) if before is not None and same else self

    @property
    def _reason(self) -> tuple[bool, str]:
        return self.active, self.quota.message if self.quota is not None and not self.quota.true else ""


@dataclass(frozen=True)
class Place:
    """Where a Workload stands in its queue."""

    number: int
    """From 1."""
    of: int
    """How many wait in the queue."""
    behind: int
    """How many of those before it have a higher priority."""


@dataclass(frozen=True)
class Queue:
    """What is known of a LocalQueue, and of its ClusterQueue if this account may read that."""

    name: str
    cluster_queue: str = ""
    stopped: str = ""
    """Which of the two is stopped and by which policy (Hold, HoldAndDrain), for people. Empty means neither, as far as is known."""
    inactive: Condition | None = None
    """Its condition Active, or its ClusterQueue's, if that is False."""
    gone: bool = False
    """Whether the namespace has no such LocalQueue."""

    @classmethod
    def read(cls, local: JsonObject, cluster: JsonObject | None, seen: float) -> Self:
        name, whole = named(local["metadata"]["name"]), text((local.get("spec") or {}).get("clusterQueue"))
        for what, thing in ((f"queue {name}", local), (f"cluster queue {whole} of queue {name}", cluster or {})):
            stop = text((thing.get("spec") or {}).get("stopPolicy"))
            if stop not in ("", "None"):
                return cls(name, whole, f"{what} is stopped ({stop})", _inactive(thing, seen))
        return cls(name, whole, inactive=_inactive(cluster or {}, seen) or _inactive(local, seen))


@dataclass(frozen=True)
class Held:
    """What is known of Kueue's part in an attempt. All empty: nothing."""

    workload: Workload | None = None
    queue: Queue | None = None
    place: Place | None = None
    preemptor: str = ""
    """For whom Kueue took it away, for people. Empty: it did not, or only a uid is known."""
    watched: bool = False
    """Whether its Workload would have been seen. Without the right to watch them, nothing follows from `workload` being None."""

    @property
    def closed(self) -> bool:
        """Whether Kueue says that its queue admits nothing, so that it is worth asking the queue why."""
        quota = self.workload.quota if self.workload is not None else None
        said = quota.message if quota is not None and not quota.true else ""
        return bool(MISSING.search(said) or CLOSED.search(said))


def places(pending: Sequence[JsonObject]) -> dict[str, Place]:
    """Places by name of the Workload. `pending`: what waits in a queue, as the visibility API lists it, the next one first."""
    priorities = [int(one.get("priority") or 0) for one in pending]
    return {
        named(one["metadata"]["name"]): Place(index + 1, len(pending), sum(before > priorities[index] for before in priorities[:index]))
        for index, one in enumerate(pending)
    }


def why_held(job: Job, held: Held, now: float) -> Waiting:
    """Why Kueue holds a job back."""
    workload, queue, place = held.workload, held.queue, held.place
    turn = Waiting(f"waits for its turn in queue {job.queue}", "capacity", job.created, "quota")
    if workload is None:
        if queue is not None and (closed := _closed(queue, now)):
            return closed
        silent = held.watched and now - job.created >= OPERATOR_SILENT_S
        return Waiting(f"Kueue has not taken it up in queue {job.queue}", "fault", job.created, "operator") if silent else turn
    if not workload.active:
        why = f": {workload.evicted.message}" if workload.evicted is not None and workload.evicted.message else ""
        return Waiting(f"Kueue has deactivated it{why}", "fault", workload.noticed, "deactivated")
    if workload.quota is not None and workload.quota.true:
        return _checked(workload)
    if queue is not None and (closed := _closed(queue, workload.noticed)):
        return closed
    if workload.quota is None or not workload.quota.message:
        return _at(turn, place, job.queue)
    return _at(_refused(workload, workload.quota.message), place, job.queue)


def preemptor(evicted: Condition | None) -> tuple[str, str] | None:
    """(uid of the job for which a job's quota was taken away, why that one goes first). None: it was not, or not for another job."""
    if evicted is None or not evicted.true or evicted.reason != "Preempted":
        return None
    by = PREEMPTOR.search(evicted.message)
    return (by[1], by[2]) if by is not None else None


def why_taken(held: Held) -> str:
    """Why Kueue took a job's quota away, for people. Empty: it did not, or it is not known."""
    evicted = held.workload.evicted if held.workload is not None else None
    if evicted is None or not evicted.true:
        return ""
    if (by := preemptor(evicted)) is not None:
        return f"Kueue preempted it for {held.preemptor or f'job {by[0]}'} ({by[1]})"
    return f"Kueue took its quota away: {first_line(evicted.message)}".rstrip(": ")


def _checked(workload: Workload) -> Waiting:
    """It has its quota. Then it waits for admission checks, or is about to start."""
    since = workload.quota.since if workload.quota is not None else workload.created
    if workload.admitted or not workload.checks:
        return Waiting(f"Kueue has admitted it in queue {workload.queue}", None, since, "starting")
    said = ", ".join(f"{name} ({message})" if message else name for name, message in workload.checks)
    return Waiting(f"has its quota, and waits for the admission check {said}", "capacity", since, "checks")


def _closed(queue: Queue, otherwise: float) -> Waiting | None:
    """What a queue says that admits nothing. `otherwise`: since when, if the queue does not say it."""
    since = queue.inactive.since if queue.inactive is not None else otherwise
    if queue.gone:
        return Waiting(f"the namespace has no queue {queue.name}", "fault", otherwise, "queue")
    if queue.stopped:
        return Waiting(queue.stopped, "capacity", since, "queue_stopped")
    if queue.inactive is None:
        return None
    whole = f"cluster queue {queue.cluster_queue} of queue {queue.name}"
    match queue.inactive.reason:
        case "ClusterQueueDoesNotExist":
            return Waiting(f"there is no {whole}", "fault", since, "queue")
        case "Stopped" | "ClusterQueueIsInactive":  # of the second, only the ClusterQueue says whether it is stopped or broken
            return Waiting(f"{whole} admits nothing", "capacity", since, "queue_stopped")
        case _:
            said = first_line(queue.inactive.message).removeprefix("Can't admit new workloads: ")
            return Waiting(f"{whole} admits nothing: {said}", "fault", since, "queue")


def _refused(workload: Workload, message: str) -> Waiting:
    """What Kueue wrote of a Workload without quota."""
    if missing := MISSING.search(message):
        kind = "queue" if missing[1] == "LocalQueue" else "cluster queue"
        return Waiting(f"there is no {kind} {missing[2]}", "fault", workload.noticed, "queue")
    if closed := CLOSED.search(message):  # which of both it is, its queue says, if this account may read that
        kind = "queue" if closed[1] == "LocalQueue" else "cluster queue"
        return Waiting(f"{kind} {closed[2]} is {closed[3]}", "capacity", workload.noticed, "queue_stopped")
    short = _most_telling(UNUSED.findall(message))
    if short:
        words = ", ".join(f"insufficient unused quota for {what} in flavor {flavor}, {more} more needed" for what, flavor, more in short)
        return Waiting(words, "capacity", workload.created, "quota")
    never = _most_telling(TOO_MUCH.findall(message))
    if never:
        words = ", ".join(f"{asked} {what} asked for, and flavor {flavor} has {most} in all" for what, flavor, _, asked, most in never)
        return Waiting(f"the quota is too small: {words}", "fault", workload.noticed, "quota")
    flavors = "untolerated taint" in message or "doesn't match node affinity" in message
    words = first_line(POD_SET.sub("", message))
    if flavors:
        return Waiting(words, "fault", workload.noticed, "taint" if "untolerated taint" in message else "selector")
    return Waiting(words, "capacity", workload.created, "quota")


def _most_telling(found: Sequence[tuple[str, ...]]) -> Sequence[tuple[str, ...]]:
    """Of what is short, the devices; all of it if no device is. Each begins with its resource."""
    return [one for one in found if one[0] not in ORDINARY and not one[0].startswith(ADAPTERS)] or found


def _at(waiting: Waiting, place: Place | None, queue: str | None) -> Waiting:
    """With its place. Who waits behind a higher priority waits for that one, whatever the quota says."""
    if place is None or waiting.cause != "quota" or waiting.kind != "capacity":
        return waiting
    words = f"{waiting.words}; {_ordinal(place.number)} of {place.of} in queue {queue}"
    if not place.behind:
        return replace(waiting, words=words)
    return replace(waiting, words=f"{words}, behind {place.behind} of higher priority", cause="priority")


def _ordinal(number: int) -> str:
    ending = "th" if 10 <= number % 100 <= 20 else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return f"{number}{ending}"


def _conditions(status: JsonObject, seen: float) -> dict[str, Condition]:
    return {
        one["type"]: Condition(
            one.get("status") == "True", text(one.get("reason")), text(one.get("message")), unix(one.get("lastTransitionTime"), seen)
        )
        for one in status.get("conditions") or ()
    }


def _inactive(thing: JsonObject, seen: float) -> Condition | None:
    active = _conditions(thing.get("status") or {}, seen).get("Active")
    return active if active is not None and not active.true else None
