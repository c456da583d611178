"""Attempts as PyTorchJobs of a cluster.

Owns their submission, observation and end. What is sent is written by `orchestrator.manifest`, what is seen is read by
`orchestrator.sightings`; this module asks the API server, and says `unknown` where it does not answer.

Invariants:
- Nothing is adopted, changed or deleted but what carries our store and run key, and only under the uid that was looked at.
- `absent` and `deleted` are never concluded from a list alone: the API server is asked for that very job.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

from orchestrator import manifest
from orchestrator.adapters import open_store
from orchestrator.adapters.kube.api import AlreadyExists, Api, Conflict, Object, OverQuota, WebhookDown
from orchestrator.adapters.kube.watch import ASKED, Watcher, selector
from orchestrator.cluster import ClusterProfile
from orchestrator.config import Pipeline
from orchestrator.errors import NotFound, Refused, Unreachable
from orchestrator.ledger import read_intent
from orchestrator.ports import Life, Store
from orchestrator.sightings import Job, Pod, first_line, is_broken, read_life

log = logging.getLogger(__name__)

SYNC_S = 10.0
"""How long the first look may take; after that the answer is `unknown`."""
GONE_S = 30.0
"""How long a killed attempt may take to be gone from the API server."""
LOOK_S = 0.2
WAKE_AFTER_S, WAKE_EVERY_S = 5.0, 10.0
"""When, and how often, an operator that has met a job and made nothing of it is woken. Healthy ones make pods within a second."""
WOKEN = "osctl/woken"


@dataclass(frozen=True)
class PodView:
    """A pod as people want to see it."""

    name: str
    index: int
    """Node of the attempt."""
    phase: str
    """As Kubernetes calls it, or Gone, or Leaving."""
    node: str | None
    """Host."""
    reason: str
    """Why it is not what it should be; empty where it is."""
    bound: float | None
    """Unix time."""


class KubeBackend:
    """Obeys `ports.Backend`. Close it."""

    def __init__(
        self,
        store: Store,
        api: Api,
        profile: ClusterProfile,
        store_url: str,
        *,
        pipeline: str | None = None,
        on_change: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.time,
    ):
        """
        Args:
            store_url: as pods reach it.
            pipeline: watch this one alone; none: all that are ours in the namespace.
            on_change: called, from another thread, when something that `observe` or `describe` tells may have changed.
        """
        self._store, self._api, self._profile, self._store_url, self._clock = store, api, profile, store_url, clock
        self._watcher = Watcher(api, selector(pipeline), on_change, clock=clock)
        self._picture = self._watcher.picture
        self._faults: dict[str, tuple[str, float]] = {}
        """Why a job could not be made, and since when, by run key."""
        self._bounds: dict[str, float | None] = {}
        self._patience_s = SYNC_S
        self._ended_by_us: set[str] = set()
        """Names of jobs that this driver deletes."""
        self._woken: dict[str, float] = {}
        self._broken_up: set[str] = set()
        """Uids of jobs whose gang has lost a pod."""

    @classmethod
    def of(cls, pipeline: Pipeline, store_url: str, on_change: Callable[[], None] = lambda: None) -> KubeBackend:
        """Of a pipeline that names a cluster. Asks nothing yet. Raises UsageError where there is no usable kubeconfig."""
        profile = pipeline.cluster
        assert profile is not None, f"{pipeline.name}: has no cluster"
        api = Api.connect(profile.context, profile.namespace)
        return cls(open_store(store_url), api, profile, store_url, pipeline=pipeline.name, on_change=on_change)

    def close(self) -> None:
        """Ends its threads and connections."""
        self._watcher.close()
        self._api.close()

    # --- Looking -------------------------------------------------------------------------------------------------------------------

    def observe(self, run_key: str) -> Life:
        """Raises Refused where this account may not look at jobs or pods."""
        if not self._synced():
            return Life("unknown", self._bounds.get(run_key))
        name, now = self._name(run_key), self._clock()
        if self._picture.unread(name):
            return Life("unknown", self._bounds.get(run_key))
        try:
            job = self._job(run_key)
        except Unreachable:
            return Life("unknown", self._bounds.get(run_key))
        pods, notices = self._picture.pods(self._run(run_key)), self._picture.notices(name)
        life = read_life(job, pods, notices, now, ended_by_us=name in self._ended_by_us)
        self._bounds[run_key] = life.bound
        if job is not None and job.gone is None and job.forgotten(pods, notices):
            self._wake(job, now)
        if job is not None and job.gone is None and not job.finished and not job.suspended and is_broken(pods, now):
            self._break_up(job)
        if life.state == "absent" and run_key in self._faults:
            reason, since = self._faults[run_key]
            return Life("absent", waits=reason, waits_for="fault", since=since)
        return life

    def describe(self, run_key: str) -> list[PodView]:
        """Its pods by node, those that are gone last known. Empty where there are none, or where nobody answers."""
        if not self._synced():
            return []
        now = self._clock()
        pods = sorted(self._picture.pods(self._run(run_key)), key=lambda pod: (pod.index, pod.created))
        newest = {pod.index: pod for pod in pods}
        return [_view(pod, now) for pod in newest.values()]

    def fresh(self) -> bool:
        """Whether the cluster answers."""
        return self._synced()

    def _synced(self) -> bool:
        self._watcher.start()
        patience_s, self._patience_s = self._patience_s, 0.0  # the first look alone waits for an answer
        return self._watcher.wait_until_fresh(patience_s)

    def _job(self, run_key: str) -> Job | None:
        """Ours, as last seen. One that seems to be missing is asked for: it may be younger than the list. Raises Unreachable."""
        name = self._name(run_key)
        job = self._picture.job(name)
        if job is not None and job.gone is None:
            return job if job.owner == (self._store_url, run_key) else None
        now = self._clock()
        if any(not pod.over(now) for pod in self._picture.pods(self._run(run_key))):
            return job  # it lives, whatever became of the job
        if job is not None and job.owner != (self._store_url, run_key):
            return None
        try:
            there = self._api.get("pytorchjobs", name)
        except NotFound:
            return job
        if not manifest.is_ours(there, self._store_url, run_key) or (job is not None and there["metadata"]["uid"] != job.uid):
            return job
        if name not in self._ended_by_us:
            self._picture.saw("pytorchjobs", there)
        return self._picture.job(name)

    def _wake(self, job: Job, now: float) -> None:
        """Touch a job that its operator has forgotten: it met its own PodGroup in a stale cache, and does not try again by itself."""
        if now - job.created < WAKE_AFTER_S or now - self._woken.get(job.name, 0.0) < WAKE_EVERY_S:
            return
        self._woken[job.name] = now
        log.info("%s: the operator has made no pods; it is woken", job.name)
        try:
            self._api.patch("pytorchjobs", job.name, {"metadata": {"annotations": {WOKEN: f"{now:.0f}"}}}, uid=job.uid)
        except (NotFound, Conflict, Refused, Unreachable) as error:
            log.info("%s: not woken: %s", job.name, error)

    def _break_up(self, job: Job) -> None:
        """Make the rest of a broken gang leave. Nobody asked it to, so its end is the cluster's doing."""
        if job.uid in self._broken_up:
            return
        log.info("%s: one of its pods was replaced; the others are asked to leave", job.name)
        try:
            if self._profile.queue == "kueue":
                self._ended_by_us.add(job.name)
                self._api.delete("pytorchjobs", job.name, uid=job.uid)
            else:
                self._api.patch("pytorchjobs", job.name, {"spec": {"runPolicy": {"suspend": True}}}, uid=job.uid)
        except (NotFound, Conflict, Unreachable) as error:
            log.info("%s: not asked: %s", job.name, error)
            return
        self._broken_up.add(job.uid)

    # --- Acting --------------------------------------------------------------------------------------------------------------------

    def submit(self, intent_key: str, run_key: str) -> None:
        """Make the job, or find that it is there.

        Raises:
            Refused: by the API server, a webhook or a foreign job of this name; nothing was made.
            Unreachable: nobody knows; submit again. Also where a quota or a webhook that is down stands in the way: `observe` says so.
        """
        sent = manifest.pytorch_job(read_intent(self._store, intent_key), self._profile, self._store_url)
        name = sent["metadata"]["name"]
        try:
            there = self._api.create("pytorchjobs", sent)
        except AlreadyExists:
            there = self._adopted(name, run_key, sent)
        except (WebhookDown, OverQuota) as error:
            _, since = self._faults.get(run_key, ("", self._clock()))
            self._faults[run_key] = first_line(str(error)), since
            raise Unreachable(f"{name}: not made yet: {error}") from error
        except Refused as error:
            raise Refused(f"{name}: {error}") from error
        self._faults.pop(run_key, None)
        self._picture.saw("pytorchjobs", there)

    def _adopted(self, name: str, run_key: str, sent: Object) -> Object:
        """What is there under our name, if it is what we would have made. Raises Refused, Unreachable."""
        try:
            there = self._api.get("pytorchjobs", name)
        except NotFound as error:
            raise Unreachable(f"{name}: was there and is gone again") from error
        where = f"PyTorchJob {name} in namespace {self._api.namespace}"
        if not manifest.is_ours(there, self._store_url, run_key):
            whose = manifest.owner(there)
            said = f"belongs to {whose[1]} in {whose[0]}" if whose else "was not made by osctl"
            raise Refused(f"{where}: is there and {said}; it is left alone. Delete it or choose another namespace")
        ours, theirs = (one["metadata"]["annotations"].get(manifest.SPEC_HASH) for one in (sent, there))
        if ours != theirs:
            raise Refused(f"{where}: was made with another specification ({theirs}, not {ours}). `osctl diff` shows the difference")
        return there

    def drain(self, run_key: str) -> None:
        """Suspend the job: every pod is asked to save and leave. Under Kueue, which would undo that, the job is deleted instead."""
        job = self._ours(run_key)
        if job is None:
            return
        name, uid = job["metadata"]["name"], job["metadata"]["uid"]
        try:
            if self._profile.queue == "kueue":
                self._ended_by_us.add(name)
                self._api.delete("pytorchjobs", name, uid=uid)
            else:
                asked = {"metadata": {"annotations": {ASKED: "to leave"}}, "spec": {"runPolicy": {"suspend": True}}}
                self._api.patch("pytorchjobs", name, asked, uid=uid)
        except (NotFound, Conflict):
            return  # it went by itself

    def kill(self, run_key: str) -> None:
        """Delete the job and its pods without grace. Raises Unreachable where they are not gone in time."""
        name, run = self._name(run_key), self._run(run_key)
        self._ended_by_us.add(name)
        deadline = time.monotonic() + GONE_S
        while True:
            job = self._ours(run_key)
            pods, _ = self._api.list("pods", f"{selector()},{manifest.RUN}={run}")
            if job is None and not pods:
                break
            if time.monotonic() > deadline:
                raise Unreachable(f"{name}: killed {GONE_S:g} s ago and still not gone: {len(pods)} pods")
            try:
                if job is not None:  # first: its operator would make new pods
                    self._api.delete("pytorchjobs", name, uid=job["metadata"]["uid"])
                for pod in pods:
                    self._api.delete("pods", pod["metadata"]["name"], uid=pod["metadata"]["uid"], grace_s=0)
            except Conflict:
                continue  # another one by now: look again
            time.sleep(LOOK_S)
        self._picture.lost("pytorchjobs", name)
        for seen in self._picture.pods(run):
            self._picture.lost("pods", seen.name)

    def forget(self, run_key: str) -> None:
        """Delete what is left of an attempt that is over, unless it is a finished job: people look at those, until its time to live."""
        name, run, now = self._name(run_key), self._run(run_key), self._clock()
        seen = self._picture.job(name)
        if seen is None or not seen.finished:
            job = self._ours(run_key)
            if job is not None and not _finished(job):
                self._ended_by_us.add(name)
                with_uid = job["metadata"]["uid"]
                try:
                    self._api.delete("pytorchjobs", name, uid=with_uid)
                except Conflict:
                    log.info("%s: another job has its name by now; it is left alone", name)
        for pod in self._picture.pods(run):
            if pod.gone is None and pod.ended is None and pod.over(now):  # its node does not answer: nobody else would
                try:
                    self._api.delete("pods", pod.name, uid=pod.uid, grace_s=0)
                except Conflict:
                    log.info("%s: another pod has its name by now; it is left alone", pod.name)
        self._picture.forget(name, run)
        self._faults.pop(run_key, None)
        self._bounds.pop(run_key, None)
        self._woken.pop(name, None)

    def _ours(self, run_key: str) -> Object | None:
        """As it is now. None: not there, or foreign. Raises Unreachable, Refused."""
        try:
            there = self._api.get("pytorchjobs", self._name(run_key))
        except NotFound:
            return None
        return there if manifest.is_ours(there, self._store_url, run_key) else None

    def _name(self, run_key: str) -> str:
        return manifest.job_name(self._store_url, run_key)

    def _run(self, run_key: str) -> str:
        return manifest.run_hash(self._store_url, run_key)


def _finished(job: Object) -> bool:
    conditions = (job.get("status") or {}).get("conditions") or ()
    return any(one["type"] in ("Succeeded", "Failed") and one["status"] == "True" for one in conditions)


def _view(pod: Pod, now: float) -> PodView:
    phase, reason = pod.shown(now)
    return PodView(pod.name, pod.index, phase, pod.node, reason, pod.bound)
