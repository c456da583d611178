"""A picture of our jobs and pods that is kept up to date by watches, so that looking costs nothing.

Owns when the picture may be trusted (`fresh`) and what is remembered of things that are gone. Refuses to say what it means
(`orchestrator.sightings` does) and to change anything in the cluster.

Each kind is listed once and then watched from that version on. A watch that ended as it should goes on where it was; after any fault,
410 (the version is too old) and silence included, the kind is listed anew, and what is missing from the list is gone.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

from orchestrator import manifest
from orchestrator.adapters.kube.api import SILENCE_S, Api, Expired, Object, Stream
from orchestrator.errors import NotFound, OsctlError, Refused, Unreachable
from orchestrator.sightings import Job, Notice, Pod

log = logging.getLogger(__name__)

STALE_S = 3.0
"""So long after its watch broke, a picture is still taken for true: most breaks are mended at once."""
PAUSE_S = 1.0
"""Before a server that does not answer is asked again."""
REFUSED_PAUSE_S = 15.0
"""Before a question that was refused is asked again: somebody may grant the right."""
ASKED = "osctl/asked"
"""Annotation of a job that a driver has asked to leave."""


class Picture:
    """Jobs by name, pods and notices by job. Safe for several threads. Holds what is over until `forget`."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._jobs: dict[str, Job] = {}
        self._pods: dict[str, dict[str, Pod]] = {}
        self._names: dict[str, tuple[str, str]] = {}
        """Run and uid of each living pod, by name."""
        self._notices: dict[str, dict[tuple[str, str], Notice]] = {}

    def saw(self, kind: str, thing: Object) -> None:
        seen = self._clock()
        with self._lock:
            match kind:
                case "pytorchjobs":
                    job = Job.read(thing, seen, manifest.owner(thing), ASKED, manifest.KUEUE_QUEUE)
                    self._jobs[job.name] = job
                case "pods":
                    pod = Pod.read(thing, seen, manifest.RUN, manifest.NODE_LABEL)
                    if pod.name in self._names and self._names[pod.name][1] != pod.uid:
                        self._lost_pod(pod.name, seen)
                    pods = self._pods.setdefault(pod.run, {})
                    pods[pod.uid] = pod.after(pods.get(pod.uid))
                    self._names[pod.name] = pod.run, pod.uid
                case "events":
                    note = Notice.read(thing, seen)
                    if note.kind in ("PyTorchJob", "Pod"):
                        job_name = note.about if note.kind == "PyTorchJob" else note.about.rpartition("-worker-")[0]
                        self._notices.setdefault(job_name, {})[note.about, note.reason] = note

    def lost(self, kind: str, name: str) -> None:
        """An object of this name is gone."""
        seen = self._clock()
        with self._lock:
            if kind == "pytorchjobs" and name in self._jobs:
                self._jobs[name] = replace(self._jobs[name], gone=seen)
            elif kind == "pods":
                self._lost_pod(name, seen)

    def _lost_pod(self, name: str, seen: float) -> None:
        run, uid = self._names.pop(name, ("", ""))
        if uid in self._pods.get(run, {}):
            self._pods[run][uid] = replace(self._pods[run][uid], gone=seen)

    def names(self, kind: str) -> set[str]:
        """Of what is there now."""
        with self._lock:
            if kind == "pytorchjobs":
                return {name for name, job in self._jobs.items() if job.gone is None}
            return set(self._names) if kind == "pods" else set()

    def job(self, name: str) -> Job | None:
        with self._lock:
            return self._jobs.get(name)

    def pods(self, run: str) -> list[Pod]:
        with self._lock:
            return list(self._pods.get(run, {}).values())

    def notices(self, job: str) -> list[Notice]:
        with self._lock:
            return list(self._notices.get(job, {}).values())

    def forget(self, job: str, run: str) -> None:
        with self._lock:
            self._jobs.pop(job, None)
            self._notices.pop(job, None)
            for uid, pod in self._pods.pop(run, {}).items():
                if self._names.get(pod.name, ("", ""))[1] == uid:
                    del self._names[pod.name]


class Watcher:
    """Keeps a picture of what carries a label, in one background thread a kind. Close it."""

    def __init__(
        self,
        api: Api,
        selector: str,
        on_change: Callable[[], None] = lambda: None,
        *,
        clock: Callable[[], float] = time.time,
        silence_s: float = SILENCE_S,
    ):
        self.picture = Picture(clock)
        self._api, self._selector, self._on_change, self._silence_s = api, selector, on_change, silence_s
        self._over = threading.Event()
        self._lock = threading.Condition()
        self._broken: dict[str, float] = dict.fromkeys(("pytorchjobs", "pods"), 0.0)
        """Since when (monotonic clock) a kind that must be known is not watched."""
        self._refused: dict[str, Refused] = {}
        self._streams: dict[str, Stream] = {}
        self._threads: list[threading.Thread] = []

    def start(self) -> None:
        """Idempotent."""
        with self._lock:
            if self._threads or self._over.is_set():
                return
            for kind in ("pytorchjobs", "pods", "events"):
                thread = threading.Thread(target=self._follow, args=(kind,), name=f"watch {kind}", daemon=True)
                self._threads.append(thread)
                thread.start()

    def close(self) -> None:
        """Returns when no thread of it is left."""
        self._over.set()
        with self._lock:
            streams, threads = list(self._streams.values()), list(self._threads)
            self._lock.notify_all()
        for stream in streams:
            stream.close()
        for thread in threads:
            thread.join()

    def fresh(self) -> bool:
        """Whether what the picture shows is so, but for a moment's delay. Raises Refused where this person may not look."""
        with self._lock:
            for kind in self._broken:
                if kind in self._refused:
                    raise self._refused[kind]
            return all(time.monotonic() - since < STALE_S for since in self._broken.values())

    def wait_until_fresh(self, patience_s: float) -> bool:
        """`fresh`, once it has become so or the patience is over."""
        deadline = time.monotonic() + patience_s
        while not self.fresh():
            with self._lock:
                left = deadline - time.monotonic()
                if left <= 0 or self._over.is_set():
                    return False
                self._lock.wait(min(left, 1.0))
        return True

    # --- Threads -------------------------------------------------------------------------------------------------------------------

    def _follow(self, kind: str) -> None:
        version: str | None = None
        while not self._over.is_set():
            try:
                if version is None:
                    version = self._list(kind)
                version = self._watch(kind, version)
            except Expired:
                version = None
            except (Unreachable, NotFound, Refused) as error:
                version = None
                self._break(kind, error)
                self._over.wait(PAUSE_S if isinstance(error, Unreachable) else REFUSED_PAUSE_S)

    def _list(self, kind: str) -> str:
        things, version = self._api.list(kind, self._selector_of(kind))
        names = {thing["metadata"]["name"] for thing in things}
        for name in self.picture.names(kind) - names:
            self.picture.lost(kind, name)
        for thing in things:
            self.picture.saw(kind, thing)
        return version

    def _watch(self, kind: str, version: str) -> str:
        """The version that it came to, when the server ended the watch as it should."""
        stream = self._api.watch(kind, self._selector_of(kind), version, silence_s=self._silence_s)
        with self._lock:
            self._streams[kind] = stream
        if self._over.is_set():  # closed while it was opened
            stream.close()
        self._mend(kind)
        for change in stream:
            version = change.object["metadata"]["resourceVersion"]
            if change.type == "DELETED":
                self.picture.saw(kind, change.object)  # its last state, then its end
                self.picture.lost(kind, change.object["metadata"]["name"])
            elif change.type != "BOOKMARK":
                self.picture.saw(kind, change.object)
            else:
                continue
            self._on_change()
        return version

    def _selector_of(self, kind: str) -> str:
        return "" if kind == "events" else self._selector  # events carry no labels

    def _mend(self, kind: str) -> None:
        with self._lock:
            self._refused.pop(kind, None)
            if kind in self._broken:
                self._broken[kind] = float("inf")
            self._lock.notify_all()
        self._on_change()

    def _break(self, kind: str, error: OsctlError | NotFound) -> None:
        if self._over.is_set():
            return
        with self._lock:
            if kind in self._broken:
                self._broken[kind] = min(self._broken[kind], time.monotonic())
            if isinstance(error, NotFound):
                error = Refused(f"{self._api.server}: knows no {kind}: {error}; install the training operator (osctl doctor)")
            if isinstance(error, Refused):
                self._refused[kind] = error
            self._lock.notify_all()
        log.info("watch of %s: %s", kind, error)
        self._on_change()


def selector(pipeline: str | None = None, roles: Sequence[str] = ("trainer",)) -> str:
    """Labels of what is ours: of one pipeline, or of all."""
    of = f",{manifest.PIPELINE}={pipeline}" if pipeline else ""
    return f"{manifest.MANAGED_BY}={manifest.MANAGER},{manifest.ROLE} in ({','.join(roles)}){of}"
