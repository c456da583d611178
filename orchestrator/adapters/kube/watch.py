"""A picture of our jobs and pods that is kept up to date by watches, so that looking costs nothing.

Owns when the picture may be trusted (`fresh`) and what is remembered of things that are gone. Refuses to say what it means
(`orchestrator.sightings` does) and to change anything in the cluster.

Each kind is listed once and then watched from that version on. A watch that ended as it should goes on where it was; after any fault,
410 (the version is too old) and silence included, the kind is listed anew, and what is missing from the list is gone.

No thread of it ends before `close`, whatever is raised in it, and none stops working without a word: a kind that is not watched is not
fresh, also while a login hangs between two watches. A fault is logged once and mended by a new list after a pause. An object that cannot
be read is skipped with a line in the log, and what is asked about its job is unknown until it can be read.
"""

from __future__ import annotations

import contextlib
import logging
import re
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from orchestrator import manifest
from orchestrator.adapters.kube.api import SILENCE_S, Api, Expired, Object, Stream
from orchestrator.errors import NotFound, OsctlError, Refused
from orchestrator.redact import redacted
from orchestrator.sightings import Job, Notice, Pod

log = logging.getLogger(__name__)

STALE_S = 3.0
"""So long after its watch broke, a picture is still taken for true: most breaks are mended at once."""
PAUSE_S = 1.0
"""Before a server that does not answer is asked again."""
REFUSED_PAUSE_S = 15.0
"""Before a question that was refused is asked again: somebody may grant the right."""
CLOSE_S = 10.0
"""How long `close` waits for a thread: a login's plugin may hang, and nothing ends it."""
SAY_AGAIN_S = 600.0
"""After this, a fault that was logged before is news again."""
REMEMBERED = 1000
"""Faults and odd objects that were logged, so that each is logged once."""
NOTICES_OF_ONE = 8
"""Newest reasons that are kept of the events about one job or pod."""
EARLY_JOBS = 200
EARLY_PODS = 64
"""Jobs, and pods of each, of which events are kept before the job was seen. Jobs are listed before events are, so few are needed."""
LISTED_WAIT_S = 10.0
"""How long the first list of events waits for that of jobs."""
OURS = re.compile(r"(?P<job>.+-a[0-9]+-[0-9a-f]{8})(?:-worker-(?P<index>[0-9]+))?")
"""What the name of a job of ours, or of its pod, looks like (`manifest.job_name`). Whatever else events are about is foreign."""
ASKED = "osctl/asked"
"""Annotation of a job that a driver has asked to leave."""


class Picture:
    """Jobs by name, pods and notices by job. Safe for several threads. Holds what is over until `forget`.

    Of events it holds those about our jobs and their pods, the newest `NOTICES_OF_ONE` of each; those of a job that was not seen yet wait
    for it in a small room.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._jobs: dict[str, Job] = {}
        self._pods: dict[str, dict[str, Pod]] = {}
        self._names: dict[str, tuple[str, str]] = {}
        """Run and uid of each living pod, by name."""
        self._notices: dict[str, dict[str, OrderedDict[str, Notice]]] = {}
        """By job, name of the object and reason."""
        self._early: OrderedDict[str, dict[str, OrderedDict[str, Notice]]] = OrderedDict()
        """The same of jobs that were not seen yet."""
        self._unread: set[tuple[str, str]] = set()
        """Kind and name of what is there and cannot be read."""

    def saw(self, kind: str, thing: Object) -> None:
        """Raises anything where the object is not as Kubernetes writes it; the picture is as it was then."""
        seen = self._clock()
        match kind:
            case "pytorchjobs":
                job = Job.read(thing, seen, manifest.owner(thing), ASKED, manifest.KUEUE_QUEUE)
                with self._lock:
                    self._saw_job(job)
                    self._unread.discard((kind, job.name))
            case "pods":
                pod = Pod.read(thing, seen, manifest.RUN, manifest.NODE_LABEL)
                with self._lock:
                    self._saw_pod(pod, seen)
                    self._unread.discard((kind, pod.name))
            case "events":
                note = Notice.read(thing, seen)
                with self._lock:
                    self._saw_event(note)

    def _saw_job(self, job: Job) -> None:
        self._jobs[job.name] = job
        for of_one in self._early.pop(job.name, {}).values():
            for note in of_one.values():
                self._saw_event(note)

    def _saw_pod(self, pod: Pod, seen: float) -> None:
        if pod.name in self._names and self._names[pod.name][1] != pod.uid:
            self._lost_pod(pod.name, seen)
        pods = self._pods.setdefault(pod.run, {})
        pods[pod.uid] = pod.after(pods.get(pod.uid))
        self._names[pod.name] = pod.run, pod.uid

    def _saw_event(self, note: Notice) -> None:
        ours = OURS.fullmatch(note.about)
        if ours is None or note.kind != ("Pod" if ours["index"] else "PyTorchJob"):
            return
        job = self._jobs.get(ours["job"])
        if job is not None and int(ours["index"] or 0) >= max(job.pods, 1):
            return
        kept = self._notices if job is not None else self._early
        of_job = kept.setdefault(ours["job"], {})
        of_one = of_job.setdefault(note.about, OrderedDict())
        of_one.pop(note.reason, None)
        of_one[note.reason] = note
        if len(of_one) > NOTICES_OF_ONE:
            of_one.popitem(last=False)
        if job is None:
            self._early.move_to_end(ours["job"])
            if len(of_job) > EARLY_PODS:
                of_job.pop(next(iter(of_job)))
            if len(self._early) > EARLY_JOBS:
                self._early.popitem(last=False)

    def could_not_read(self, kind: str, name: str) -> None:
        """An object of this name is there, and `saw` raised."""
        with self._lock:
            self._unread.add((kind, name))

    def unread(self, job: str) -> bool:
        """Whether a job, or one of its pods, is there and cannot be read: what is known of it may be wrong."""
        with self._lock:
            return any(name == job or name.startswith(f"{job}-worker-") for _, name in self._unread)

    def lost(self, kind: str, name: str) -> None:
        """An object of this name is gone."""
        seen = self._clock()
        with self._lock:
            self._unread.discard((kind, name))
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
            unread = {name for of, name in self._unread if of == kind}
            if kind == "pytorchjobs":
                return unread | {name for name, job in self._jobs.items() if job.gone is None}
            return unread | set(self._names) if kind == "pods" else set()

    def job(self, name: str) -> Job | None:
        with self._lock:
            return self._jobs.get(name)

    def pods(self, run: str) -> list[Pod]:
        with self._lock:
            return list(self._pods.get(run, {}).values())

    def notices(self, job: str) -> list[Notice]:
        with self._lock:
            return [note for of_one in self._notices.get(job, {}).values() for note in of_one.values()]

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
        self._was_fresh = False
        self._refused: dict[str, Refused] = {}
        self._faults: dict[str, str] = {}
        """Why a kind is not watched, for people."""
        self._said: OrderedDict[str, float] = OrderedDict()
        """What was logged, and when (monotonic clock)."""
        self._jobs_listed = threading.Event()
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
        """Returns when no thread of it is left, but for one whose login hangs."""
        self._over.set()
        self._jobs_listed.set()
        with self._lock:
            streams, threads = list(self._streams.values()), list(self._threads)
            self._lock.notify_all()
        for stream in streams:
            stream.close()
        for thread in threads:
            thread.join(CLOSE_S)

    def fresh(self) -> bool:
        """Whether what the picture shows is so, but for a moment's delay.

        Raises Refused where this person may not look, unless it could be looked before: a right or a login that was there may come back.
        """
        with self._lock:
            for kind in () if self._was_fresh else self._broken:
                if kind in self._refused:
                    raise self._refused[kind]
            return all(time.monotonic() - since < STALE_S for since in self._broken.values())

    def why(self) -> str:
        """Why it is not fresh, as far as that is known."""
        with self._lock:
            return next((self._faults[kind] for kind in self._broken if kind in self._faults), "")

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
        if kind == "events":
            self._jobs_listed.wait(LISTED_WAIT_S)
        while not self._over.is_set():
            try:
                if version is None:
                    version = self._list(kind)
                version = self._watch(kind, version)
            except Expired:
                version = None
            except BaseException as error:  # noqa: BLE001 - a thread that ended here would leave a picture that looks true for ever
                version = None
                self._over.wait(self._break(kind, error))

    def _list(self, kind: str) -> str:
        things, version = self._api.list(kind, self._selector_of(kind))
        names = {name for thing in things if (name := _name_of(thing))}
        for name in self.picture.names(kind) - names:
            self.picture.lost(kind, name)
        for thing in things:
            self._saw(kind, thing)
        if kind == "pytorchjobs":
            self._jobs_listed.set()
        return version

    def _watch(self, kind: str, version: str) -> str:
        """The version that it came to, when the server ended the watch as it should."""
        stream = self._api.watch(kind, self._selector_of(kind), version, silence_s=self._silence_s)
        with self._lock:
            self._streams[kind] = stream
        if self._over.is_set():  # closed while it was opened
            stream.close()
        self._mend(kind)
        try:
            for change in stream:
                version = _version_of(change.object) or version
                if change.type == "BOOKMARK":
                    continue
                self._saw(kind, change.object)
                if change.type == "DELETED" and (name := _name_of(change.object)):
                    self.picture.lost(kind, name)  # after its last state
                self._tell()
        finally:
            self._unwatched(kind)
            stream.leave()
        return version

    def _saw(self, kind: str, thing: Any) -> None:
        try:
            self.picture.saw(kind, thing)
        except MemoryError:  # of this process, not of the object
            raise
        except Exception as error:  # noqa: BLE001 - whatever is odd about it, the others must be seen
            name, version = _name_of(thing), _version_of(thing)
            if name and kind != "events":
                self.picture.could_not_read(kind, name)
            what = f"{name} at version {version}" if name else f"one without a name: {redacted(repr(thing))[:200]}"
            self._say(f"watch of {kind}: an object that cannot be read is skipped: {what}: {_told(error)}")

    def _tell(self) -> None:
        """A listener's fault is not the picture's."""
        try:
            self._on_change()
        except BaseException as error:  # noqa: BLE001 - see _follow
            self._say(f"a listener of the watches fails and may miss changes: {_told(error)}")

    def _say(self, line: str) -> None:
        """Into the log, once."""
        now = time.monotonic()
        with self._lock:
            if now - self._said.get(line, float("-inf")) < SAY_AGAIN_S:
                return
            self._said[line] = now
            self._said.move_to_end(line)
            if len(self._said) > REMEMBERED:
                self._said.popitem(last=False)
        log.warning("%s", line)

    def _selector_of(self, kind: str) -> str:
        return "" if kind == "events" else self._selector  # events carry no labels

    def _mend(self, kind: str) -> None:
        with self._lock:
            self._refused.pop(kind, None)
            self._faults.pop(kind, None)
            if kind in self._broken:
                self._broken[kind] = float("inf")
            self._was_fresh = self._was_fresh or all(since == float("inf") for since in self._broken.values())
            self._lock.notify_all()
        self._tell()

    def _unwatched(self, kind: str) -> None:
        with self._lock:
            self._streams.pop(kind, None)
            if kind in self._broken:
                self._broken[kind] = min(self._broken[kind], time.monotonic())

    def _break(self, kind: str, error: BaseException) -> float:
        """What follows from a fault; seconds until the kind is listed anew."""
        if self._over.is_set():
            return 0.0
        self._unwatched(kind)
        if isinstance(error, NotFound):
            error = Refused(f"{self._api.server}: knows no {kind}: {error}; install the training operator (osctl doctor)")
        with self._lock:
            self._faults[kind] = _told(error)
            if isinstance(error, Refused):
                self._refused[kind] = error
            self._lock.notify_all()
        self._say(f"watch of {kind}: {self._faults[kind]}; it is listed anew")
        self._tell()
        return REFUSED_PAUSE_S if isinstance(error, Refused) else PAUSE_S


def _name_of(thing: Any) -> str:
    with contextlib.suppress(AttributeError, KeyError, TypeError):
        return name if isinstance(name := thing["metadata"]["name"], str) else ""
    return ""


def _version_of(thing: Any) -> str:
    with contextlib.suppress(AttributeError, KeyError, TypeError):
        return str(thing["metadata"]["resourceVersion"] or "")
    return ""


def _told(error: BaseException) -> str:
    """Our own errors in their words; of others also where they came from."""
    try:
        words = " ".join(redacted(str(error)).split())
    except Exception:  # noqa: BLE001 - its own words fail
        words = ""
    if isinstance(error, OsctlError):
        return words
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    place = f" ({Path(trace.tb_frame.f_code.co_filename).name}:{trace.tb_lineno})" if trace is not None else ""
    return f"{type(error).__name__}{f': {words}' if words else ''}{place}"


def selector(pipeline: str | None = None, roles: Sequence[str] = ("trainer",)) -> str:
    """Labels of what is ours: of one pipeline, or of all."""
    of = f",{manifest.PIPELINE}={pipeline}" if pipeline else ""
    return f"{manifest.MANAGED_BY}={manifest.MANAGER},{manifest.ROLE} in ({','.join(roles)}){of}"
