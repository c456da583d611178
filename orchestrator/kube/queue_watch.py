"""Keeps what Kueue says of the jobs that somebody asks about: Workloads by a watch, places in the queue by a request now and then.

Owns two threads, and how often Kueue is asked. Refuses to say what the answers mean (`kueue` does) and to change anything in the cluster.

Nothing depends on it: without the right, or without Kueue, `held` knows nothing, an attempt still lives, and no fault is raised. The
threads are started by the first question about a job, and ask for nothing while no job waits.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import TypeVar

from orchestrator.errors import NotFound, OsctlError, Refused
from orchestrator.kube import names
from orchestrator.kube.client import Api, Object, Stream
from orchestrator.kube.faults import Expired
from orchestrator.kube.kueue import Held, Place, Queue, Workload, places, preemptor
from orchestrator.kube.observed import Job
from orchestrator.kube.operator import OPERATORS
from orchestrator.labels import Label
from orchestrator.redact import redacted

log = logging.getLogger(__name__)

Answer = TypeVar("Answer")

PLACES_S = 30.0
"""Pause between two questions for the places in a queue and for its state: three requests for each queue in which a job waits."""
DRIVER_PLACES_S = 300.0
"""The same pause of a driver: it writes each new place into the ledger, and 200 drivers of one queue send two requests a second."""
NOWHERE: Object = {}
"""Stands for a queue that is not there."""
HURRY_S = 2.0
"""The same pause if a job has just come into a queue, or Kueue has just said that the queue is closed, so that the reason comes soon."""
PAUSE_S = 1.0
"""Pause before the Workloads are listed again after the server did not answer."""
REFUSED_PAUSE_S = 600.0
"""Pause after a refusal, and where the API is not served."""
ASKED_S = 600.0
"""Workloads of a job are watched for this long after somebody asked about it last."""
SELECTED = 50
"""For more jobs than this, all Workloads of the namespace are watched instead of those of these jobs: a selector has its limits."""


class QueueWatch:
    """What Kueue says of jobs, safe for several threads. Close it."""

    def __init__(
        self,
        api: Api,
        on_change: Callable[[], None] = lambda: None,
        *,
        clock: Callable[[], float] = time.time,
        places_s: float = PLACES_S,
    ):
        """`on_change` is called, from another thread, when the answer of `held` may have changed."""
        self._api, self._on_change, self._clock, self._places_s = api, on_change, clock, places_s
        self._lock = threading.Condition()
        self._over = threading.Event()
        self._hurry = threading.Event()
        self._asked: dict[str, float] = {}
        """Uids of the jobs that are watched, and when (monotonic clock) somebody asked about each."""
        self._selected: set[str] | None = set()
        """Uids whose Workloads the open watch shows. None means those of all jobs."""
        self._watched: set[str] = set()
        """Uids whose Workloads were listed, and are watched since."""
        self._settled: set[str] = set()
        """Uids for which a list was tried, whether this account may list or not."""
        self._workloads: dict[str, Workload] = {}
        """By uid of the job."""
        self._queues: dict[str, Queue] = {}
        self._places: dict[str, dict[str, Place]] = {}
        """By queue, by name of the Workload."""
        self._preemptors: dict[str, str] = {}
        """By uid of a job for which another was preempted, what people call it. Empty: it cannot be known."""
        self._refused_until: dict[str, float] = {}
        """Until when (monotonic clock) a question is not asked again."""
        self._stream: Stream | None = None
        self._threads: list[threading.Thread] = []

    def close(self) -> None:
        """End its threads and its watch."""
        self._over.set()
        self._hurry.set()
        with self._lock:
            stream, threads = self._stream, list(self._threads)
            self._lock.notify_all()
        if stream is not None:
            stream.close()
        for thread in threads:
            thread.join(10.0)  # a request may hang for its own time limit

    def held(self, job: Job, patience_s: float = 0.0) -> Held:
        """What is known of a job in a queue, and watch it from now on. The first question about a job waits for up to `patience_s`."""
        with self._lock:
            new = job.uid not in self._asked
            self._asked[job.uid] = time.monotonic()
            if not self._threads and not self._over.is_set():
                for work in (self._keep_up, self._keep_asking):
                    self._threads.append(threading.Thread(target=work, name=f"kueue {work.__name__}", daemon=True))
                    self._threads[-1].start()
            stream = self._stream if new and self._selected is not None and job.uid not in self._selected else None
            if new:
                self._lock.notify_all()
        if stream is not None:
            stream.close()  # to be opened anew, with this job
        with self._lock:
            if new and patience_s:
                self._lock.wait_for(lambda: self._is_answered(job) or self._over.is_set(), patience_s)
            workload = self._workloads.get(job.uid)
            queue = job.queue or ""
            place = self._places.get(queue, {}).get(workload.name) if workload is not None else None
            by = preemptor(workload.evicted) if workload is not None else None
            name = self._preemptors.get(by[0], "") if by is not None else ""
            return Held(workload, self._queues.get(queue), place, name, job.uid in self._watched)

    def _is_answered(self, job: Job) -> bool:
        workload = self._workloads.get(job.uid)
        waits = workload is not None and (workload.quota is None or not workload.quota.true)
        return job.uid in self._settled and (not waits or job.queue in self._places)

    # --- Workloads -----------------------------------------------------------------------------------------------------------------

    def _keep_up(self) -> None:
        version: str | None = None
        while not self._over.is_set():
            uids = self._wanted()
            pause = 0.0
            try:
                if uids is not None and not uids:
                    with self._lock:
                        self._lock.wait_for(lambda: bool(self._asked) or self._over.is_set(), PAUSE_S)
                    continue
                if version is None or uids != self._selected:
                    version = self._list(uids)
                version = self._watch(version)
            except Expired:
                version = None
            except Exception as error:  # noqa: BLE001 - nothing depends on it, and the thread must go on
                version, pause = None, self._on_fault(error)
                with self._lock:
                    self._watched = set()
                    self._settled |= set(self._asked)
                    self._lock.notify_all()
            self._over.wait(pause)

    def _wanted(self) -> set[str] | None:
        """Uids of the jobs whose Workloads are of interest. None means that all are."""
        now = time.monotonic()
        with self._lock:
            self._asked = {uid: asked for uid, asked in self._asked.items() if now - asked < ASKED_S}
            self._workloads = {uid: one for uid, one in self._workloads.items() if uid in self._asked}
            return None if len(self._asked) > SELECTED else set(self._asked)

    def _list(self, uids: set[str] | None) -> str:
        found, version = self._api.list("workloads", _selector(uids))
        with self._lock:
            self._selected = uids
            listed = set(self._asked) if uids is None else set(uids)
        for thing in found:
            self._update(thing)
        with self._lock:  # not before their Workloads are known, or who asks meanwhile takes them for missing
            self._watched = listed
            self._settled |= listed
        self._changed()
        return version

    def _watch(self, version: str) -> str:
        stream = self._api.watch("workloads", _selector(self._selected), version)
        with self._lock:
            self._stream = stream
        try:
            if self._over.is_set() or self._wanted() != self._selected:  # somebody asked while the stream was opened
                return version
            for change in stream:
                version = str((change.object.get("metadata") or {}).get("resourceVersion") or version)
                if change.type in ("ADDED", "MODIFIED"):  # of a deleted one, its last state says why the job was taken
                    self._update(change.object)
                    self._changed()
        finally:
            with self._lock:
                self._stream = None
            stream.leave()
        return version

    def _update(self, thing: Object) -> None:
        workload = Workload.read(thing, self._clock())
        by = preemptor(workload.evicted)
        if by is not None and by[0] not in self._preemptors and workload.job in self._asked:
            self._preemptors[by[0]] = self._called(by[0])  # before anybody sees that it was preempted
        with self._lock:
            if workload.job not in self._asked:
                return
            self._watched.add(workload.job)
            self._workloads[workload.job] = workload.after(self._workloads.get(workload.job))
            waits = workload.quota is None or not workload.quota.true
            new = waits and workload.name not in self._places.get(workload.queue, {})
            if new or (Held(workload).closed and not self._is_known_closed(workload.queue)):
                self._hurry.set()
                self._lock.notify_all()

    def _called(self, uid: str) -> str:
        """What people call the job of this uid: an attempt of a pipeline, or kind and name of what others made. Empty: it cannot be known,
        as in another namespace."""
        found = self._allowed(f"the Workload of job {uid}", lambda: self._api.list("workloads", f"{Label.JOB_UID}={uid}")[0]) or ()
        owners = (owner for one in found for owner in one["metadata"].get("ownerReferences") or () if owner.get("controller"))
        owner = next(owners, None)
        if owner is None:
            return ""
        kind, name = str(owner.get("kind")), str(owner.get("name"))
        plural = next((one.plural for one in OPERATORS if one.kind == kind), None)
        job = self._allowed(f"{kind} {name}", lambda: self._api.get(plural, name)) if plural is not None else None
        ours = names.owner(job) if job is not None else None
        return names.told(ours[1]) if ours is not None else f"{kind} {name}"

    def _is_known_closed(self, name: str) -> bool:
        queue = self._queues.get(name)
        return queue is not None and (queue.gone or bool(queue.stopped) or queue.inactive is not None)

    def _changed(self) -> None:
        with self._lock:
            self._lock.notify_all()
        try:
            self._on_change()
        except Exception as error:  # noqa: BLE001 - the watch goes on whatever a listener does
            log.warning("a listener of Kueue's watch fails: %s", redacted(f"{type(error).__name__}: {error}"))

    def _on_fault(self, error: Exception) -> float:
        """Seconds until the next try."""
        log.info("Kueue's Workloads are not watched: %s", redacted(f"{type(error).__name__}: {error}"))
        return REFUSED_PAUSE_S if isinstance(error, NotFound | Refused) else PAUSE_S

    # --- Places and queues ---------------------------------------------------------------------------------------------------------

    def _keep_asking(self) -> None:
        while not self._over.is_set():
            before = self._queues, self._places
            self._hurry.clear()
            try:
                self._ask()
            except Exception as error:  # noqa: BLE001 - nothing depends on it, and the thread must go on
                log.info("Kueue's queues are not read: %s", redacted(f"{type(error).__name__}: {error}"))
            if (self._queues, self._places) != before:
                self._changed()
            if self._waiting():
                self._over.wait(HURRY_S)
                self._hurry.wait(self._places_s - HURRY_S)
            else:
                with self._lock:
                    self._lock.wait(PLACES_S)

    def _waiting(self) -> set[str]:
        """Queues in which a watched job waits for its quota."""
        with self._lock:
            return {one.queue for one in self._workloads.values() if one.quota is None or not one.quota.true}

    def _ask(self) -> None:
        waiting = self._waiting()
        found: dict[str, dict[str, Place]] = {}
        queues: dict[str, Queue] = {}
        for name in waiting:
            pending = self._allowed(f"places in {name}", partial(self._api.pending_workloads, name))
            found[name] = places(pending) if pending is not None else {}
            if (queue := self._queue(name)) is not None:
                queues[name] = queue
        with self._lock:
            self._places, self._queues = found, queues
            self._lock.notify_all()

    def _queue(self, name: str) -> Queue | None:
        try:
            local = self._allowed(f"queue {name}", lambda: self._api.get("localqueues", name), missing=NOWHERE)
            if local is None:
                return None
            if not local:
                return Queue(name, gone=True)
            whole = str((local.get("spec") or {}).get("clusterQueue") or "")
            cluster = self._allowed(f"cluster queue {whole}", lambda: self._api.get("clusterqueues", whole))
            return Queue.read(local, cluster, self._clock())
        except (KeyError, TypeError, ValueError) as error:  # not as Kueue writes it
            log.info("queue %s cannot be read: %s", name, redacted(str(error)))
            return None

    def _allowed(self, what: str, question: Callable[[], Answer], missing: Answer | None = None) -> Answer | None:
        """An answer, or None if this account may not have it or nobody answers; then it is not asked again for a while."""
        if time.monotonic() < self._refused_until.get(what, 0.0):
            return None
        try:
            return question()
        except NotFound:
            if missing is None:
                self._refused_until[what] = time.monotonic() + REFUSED_PAUSE_S
            return missing
        except Refused as error:
            log.info("%s: %s", what, error)
            self._refused_until[what] = time.monotonic() + REFUSED_PAUSE_S
        except OsctlError as error:
            log.info("%s: %s", what, error)
        return None


def _selector(uids: set[str] | None) -> str:
    return Label.JOB_UID if uids is None else f"{Label.JOB_UID} in ({','.join(sorted(uids))})"
