"""Jobs, pods and events as they were last seen, also deleted ones.

Owns what is kept, and how much. Refuses to send requests to a cluster (`watch` does) and to say what objects mean for an attempt (`life`).
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace

from orchestrator.kube import names
from orchestrator.kube.client import Object
from orchestrator.kube.observed import Job, Notice, Pod
from orchestrator.kube.operator import BY_PLURAL

NOTICES_OF_ONE = 8
"""For how many reasons, the newest ones, events about one job or pod are kept."""
EARLY_JOBS = 200
EARLY_PODS = 64
"""For how many jobs, and pods of each, events are kept before the job was seen. Jobs are listed before events, so few are needed."""


class WatchCache:
    """Jobs by name, pods and notices by job. Safe for several threads. Deleted objects stay until `forget`.

    It keeps only events about our jobs and their pods, and for each job or pod the newest `NOTICES_OF_ONE`. Of events about jobs that were
    not seen yet it keeps a limited number until the job is seen.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._jobs: dict[str, dict[str, Job]] = {}
        """By name, then by kind (`Job.plural`): two operators may have a job of one name."""
        self._pods: dict[str, dict[str, Pod]] = {}
        self._names: dict[str, tuple[str, str]] = {}
        """Run and uid of each existing pod, by name."""
        self._notices: dict[str, dict[str, OrderedDict[str, Notice]]] = {}
        """Notices by job, by name of the object, by reason."""
        self._early: OrderedDict[str, dict[str, OrderedDict[str, Notice]]] = OrderedDict()
        """The same for jobs that were not seen yet."""
        self._unread: set[tuple[str, str]] = set()
        """Kind and name of each existing object that cannot be read."""

    def on_update(self, kind: str, thing: Object) -> None:
        """Keep an object that was created or changed.

        If the object is not as Kubernetes writes it, raises what reading it raises; the cache is then as it was before.
        """
        seen = self._clock()
        match kind:
            case _ if kind in BY_PLURAL:
                job = BY_PLURAL[kind].read(thing, seen)
                with self._lock:
                    self._update_job(job)
                    self._unread.discard((kind, job.name))
            case "pods":
                pod = Pod.read(thing, seen)
                with self._lock:
                    self._update_pod(pod, seen)
                    self._unread.discard((kind, pod.name))
            case "events":
                note = Notice.read(thing, seen)
                with self._lock:
                    self._update_event(note)

    def _update_job(self, job: Job) -> None:
        self._jobs.setdefault(job.name, {})[job.plural] = job
        for of_one in self._early.pop(job.name, {}).values():
            for note in of_one.values():
                self._update_event(note)

    def _update_pod(self, pod: Pod, seen: float) -> None:
        if pod.name in self._names and self._names[pod.name][1] != pod.uid:
            self._delete_pod(pod.name, seen)
        pods = self._pods.setdefault(pod.run, {})
        pods[pod.uid] = pod.after(pods.get(pod.uid))
        self._names[pod.name] = pod.run, pod.uid

    def _update_event(self, note: Notice) -> None:
        ours = names.attempt_of(note.kind, note.about)
        if ours is None:
            return
        name, index = ours
        job = self._newest(name, None)
        if job is not None and index >= max(job.pods, 1):
            return
        kept = self._notices if job is not None else self._early
        of_job = kept.setdefault(name, {})
        of_one = of_job.setdefault(note.about, OrderedDict())
        of_one.pop(note.reason, None)
        of_one[note.reason] = note
        if len(of_one) > NOTICES_OF_ONE:
            of_one.popitem(last=False)
        if job is None:
            self._early.move_to_end(name)
            if len(of_job) > EARLY_PODS:
                of_job.pop(next(iter(of_job)))
            if len(self._early) > EARLY_JOBS:
                self._early.popitem(last=False)

    def on_unreadable(self, kind: str, name: str) -> None:
        """Note that an object of this name was created or changed, and `on_update` raised."""
        with self._lock:
            self._unread.add((kind, name))

    def unread(self, job: str) -> bool:
        """Whether a job, or one of its pods, exists but cannot be read: then what is cached of it may be wrong."""
        with self._lock:
            return any(name == job or name.startswith((f"{job}-worker-", f"{job}-{names.REPLICATED_JOB}-0-")) for _, name in self._unread)

    def on_delete(self, kind: str, name: str) -> None:
        """Note that the object of this name was deleted."""
        seen = self._clock()
        with self._lock:
            self._unread.discard((kind, name))
            if kind in self._jobs.get(name, {}):
                self._jobs[name][kind] = replace(self._jobs[name][kind], gone=seen)
            elif kind == "pods":
                self._delete_pod(name, seen)

    def _delete_pod(self, name: str, seen: float) -> None:
        run, uid = self._names.pop(name, ("", ""))
        if uid in self._pods.get(run, {}):
            self._pods[run][uid] = replace(self._pods[run][uid], gone=seen)

    def names(self, kind: str) -> set[str]:
        """Names of the existing objects of this kind."""
        with self._lock:
            unread = {name for of, name in self._unread if of == kind}
            if kind in BY_PLURAL:
                return unread | {name for name, kinds in self._jobs.items() if kind in kinds and kinds[kind].gone is None}
            return unread | set(self._names) if kind == "pods" else set()

    def job(self, name: str, owner: tuple[str, str] | None = None) -> Job | None:
        """The job. None means that it was never seen, or was forgotten.

        Where there are several kinds of this name: the one of `owner` (store URL, run key), and of those one that exists.
        """
        with self._lock:
            return self._newest(name, owner)

    def _newest(self, name: str, owner: tuple[str, str] | None) -> Job | None:
        kinds = self._jobs.get(name)
        return max(kinds.values(), key=lambda job: (job.owner == owner, job.gone is None, job.created)) if kinds else None

    def pods(self, run: str) -> list[Pod]:
        """Pods of the attempt whose label `osctl/run` is `run`, in no order."""
        with self._lock:
            return list(self._pods.get(run, {}).values())

    def notices(self, job: str) -> list[Notice]:
        """Events about a job and its pods."""
        with self._lock:
            return [note for of_one in self._notices.get(job, {}).values() for note in of_one.values()]

    def forget(self, job: str, run: str) -> None:
        """Drop a job and its pods. If one still exists, it is seen again with its next change."""
        with self._lock:
            self._jobs.pop(job, None)
            self._notices.pop(job, None)
            for uid, pod in self._pods.pop(run, {}).items():
                if self._names.get(pod.name, ("", ""))[1] == uid:
                    del self._names[pod.name]
