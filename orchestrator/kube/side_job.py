"""A Job of one pod that a command creates and waits for: to read data that only pods can see, or to check an image.

Owns finding a Job that does the same already, the wait, and the message if a Job cannot start or fails. Refuses to write the Job (`jobs`)
and to change one that is not ours.
"""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from orchestrator.errors import NotFound, Refused, Unreachable
from orchestrator.kube import names
from orchestrator.kube.client import Api
from orchestrator.kube.faults import AlreadyExists
from orchestrator.kube.observed import Notice, first_line
from orchestrator.kube.parts import Manifest

POLL_S = 1.0
"""Seconds between two reads of the Job."""


@dataclass(frozen=True)
class Ended:
    job: str
    complete: bool
    words: str
    """The last line of a Job that failed, or why it could not start. Empty means that it is not known."""
    answered: bool = True
    """False: its time was over before its program had ended."""


def find_or_create(api: Api, body: Callable[[int], Manifest], *, again: bool) -> dict[str, Any]:
    """A Job that does the same and still runs, or a new one.

    Args:
        body: gives the Job's manifest for a number, from 1.
        again: whether to run it again if such a Job is complete. False means that the complete Job is returned.

    Raises:
        Refused, Unreachable.
    """
    for number in itertools.count(1):
        wanted = body(number)
        try:
            return api.create("jobs", wanted)
        except AlreadyExists:
            job = api.get("jobs", wanted["metadata"]["name"])
        if names.owner(job) == names.owner(wanted) and (end_of(job) is None or (end_of(job) == "Complete" and not again)):
            return job
    raise AssertionError("numbers do not end")


def wait(api: Api, job: Mapping[str, Any], subject: str, say: Callable[[str], None]) -> Ended:
    """Wait until the Job is over. `say` gets each reason why its pod cannot start, once.

    Raises:
        Refused: somebody deleted the Job.
        Unreachable: the API server does not answer.
    """
    name, said = job["metadata"]["name"], ""
    while (end := end_of(job)) is None:
        if (waits := waits_for(api, name)) not in ("", said):
            say(f"{subject}: Job {name} waits: {waits}")
        said = waits or said
        time.sleep(POLL_S)
        try:
            job = api.get("jobs", name)
        except NotFound:
            raise Refused(f"{subject}: somebody deleted Job {name}. Run it again") from None
    return Ended(name, end == "Complete", "" if end == "Complete" else last_words(api, name) or said, not _ran_out_of_time(job))


def end_of(job: Mapping[str, Any]) -> str | None:
    conditions = job.get("status", {}).get("conditions", ())
    return next((one["type"] for one in conditions if one["status"] == "True" and one["type"] in ("Complete", "Failed")), None)


def _ran_out_of_time(job: Mapping[str, Any]) -> bool:
    conditions = job.get("status", {}).get("conditions", ())
    return any((one["type"], one["status"], one.get("reason")) == ("Failed", "True", "DeadlineExceeded") for one in conditions)


def waits_for(api: Api, job: str, selector: str = "") -> str:
    """Why the Job's pod cannot be made or cannot start, in Kubernetes' words. Empty means that no reason is known.

    `selector`: of pods that no Job has.
    """
    with contextlib.suppress(NotFound, Refused, Unreachable):
        pods, _ = api.list("pods", selector or f"batch.kubernetes.io/job-name={job}")
        if not pods:
            return why_not_made(api, job)
        for pod in pods:
            status = pod.get("status", {})
            unmet = [
                one.get("message") for one in status.get("conditions", ()) if (one["type"], one["status"]) == ("PodScheduled", "False")
            ]
            states = [one.get("state", {}).get("waiting", {}) for one in status.get("containerStatuses", ())]
            unmet += [one.get("message") for one in states if one.get("reason") != "ContainerCreating"]
            if told := next(filter(None, unmet), ""):
                return str(told).splitlines()[0]
    return ""


def why_not_made(api: Api, job: str) -> str:
    """What kept Kubernetes from making a pod for this object, as an account that is not there or a quota. Empty: nothing is known.

    Raises NotFound, Refused, Unreachable.
    """
    events, _ = api.list("events", fields=f"involvedObject.name={job},type=Warning")
    refusals = [note for note in (Notice.read(event, 0.0) for event in events) if "Creat" in note.reason]
    return first_line(max(refusals, key=lambda note: note.time).message) if refusals else ""


def last_words(api: Api, job: str) -> str:
    """The last line of the last pod's output. Empty means that it cannot be read."""
    with contextlib.suppress(NotFound, Refused, Unreachable):
        pods, _ = api.list("pods", f"batch.kubernetes.io/job-name={job}")
        for pod in pods[-1:]:
            return last_line(api, pod["metadata"]["name"])
    return ""


def last_line(api: Api, pod: str) -> str:
    """Raises NotFound, Refused, Unreachable."""
    return b"".join(api.pod_log(pod, tail=1)).decode(errors="replace").strip().removeprefix("error: ")
