"""Run attempts as jobs of a cluster.

Owns how an attempt is submitted, observed and ended. `operator` knows the kinds of jobs, `attempt_objects` sends requests about them,
`watch` keeps what is observed, and `life` says what that means; this module reports `unknown` if the API server does not answer.

Invariants:
- It adopts, changes and deletes only an object with our store and run key, and only under the uid that it has read.
  One exception: any driver deletes a finished job of osctl that no controller deletes and whose time, written on it, is over.
- It never concludes `absent` or `deleted` only from a list: it asks the API server for that job.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

from orchestrator.errors import NotFound, Refused, Unreachable
from orchestrator.kube import discovery, names, operator
from orchestrator.kube.attempt_objects import AttemptObjects
from orchestrator.kube.client import Api
from orchestrator.kube.discovery import chosen
from orchestrator.kube.faults import Conflict, OverQuota, WebhookDown
from orchestrator.kube.kueue import Held
from orchestrator.kube.life import is_broken, is_taken, read_life
from orchestrator.kube.node_lookup import NodeLookup
from orchestrator.kube.observed import Job, Pod, first_line
from orchestrator.kube.queue_watch import DRIVER_PLACES_S, QueueWatch
from orchestrator.kube.waiting import Waiting
from orchestrator.kube.watch import Watcher
from orchestrator.labels import Annotation, Label
from orchestrator.ledger.records import Intent
from orchestrator.ledger.store import read_intent
from orchestrator.ports import Life, Store, WaitCause
from orchestrator.recipe.cluster_profile import ClusterProfile

log = logging.getLogger(__name__)

SYNC_S = 10.0
"""How long the first list may take. After that the answer is `unknown`."""
GONE_S = 30.0
"""How long a killed attempt may take to disappear from the API server."""
POLL_S = 0.2
"""Pause between two checks while an attempt is killed."""
WAKE_AFTER_S, WAKE_EVERY_S = 5.0, 10.0
"""How old a job without pods is when osctl wakes its operator, and how often it does so. A healthy operator needs less than a second."""


@dataclass(frozen=True)
class PodView:
    """A pod, for people."""

    name: str
    index: int
    """Which node of the attempt it is."""
    phase: str
    """Kubernetes' name of the phase, or Gone, or Leaving."""
    node: str | None
    """Name of the host. None means it has none."""
    reason: str
    """What is wrong with it. Empty means nothing is."""
    bound: float | None
    """Unix time at which it was bound to its host. None means it was not."""


class KubeBackend:
    """`ports.Backend` on a cluster. Close it."""

    def __init__(
        self,
        store: Store,
        api: Api,
        profile: ClusterProfile,
        store_url: str,
        *,
        pipeline: str | None = None,
        profile_of: Callable[[Intent], ClusterProfile] | None = None,
        on_change: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.time,
    ):
        """
        Args:
            store_url: the store's URL for pods.
            pipeline: watch only this pipeline. None means all of osctl's in the namespace.
            profile_of: gives the profile of an attempt that is submitted: that of its pool. None means `profile` for all.
            on_change: called, from another thread, when the result of `observe` or `describe` may have changed.
        """
        self._store, self._api, self._profile, self._store_url, self._clock = store, api, profile, store_url, clock
        self._profile_of = profile_of or (lambda intent: profile)
        self._watcher = Watcher(api, names.selector(pipeline), on_change, clock=clock)
        self._cache = self._watcher.cache
        self._objects = AttemptObjects(api, store_url, self._served)
        self._queues = QueueWatch(api, on_change, clock=clock, places_s=DRIVER_PLACES_S)
        self._nodes = NodeLookup(api)
        self._faults: dict[str, Waiting] = {}
        """By run key, why a job could not be created."""
        self._bounds: dict[str, float | None] = {}
        self._patience_s = SYNC_S
        self._ended_by_us: set[str] = set()
        """Names of jobs that this driver deletes."""
        self._expired_removed = False
        self._woken: dict[str, float] = {}
        self._broken_up: set[str] = set()
        """Uids of jobs whose other pods were asked to leave because one was lost."""

    def close(self) -> None:
        """End its threads and connections."""
        self._watcher.close()
        self._queues.close()
        self._api.close()

    # --- Looking -------------------------------------------------------------------------------------------------------------------

    def observe(self, run_key: str) -> Life:
        """What is known of an attempt now. Raises Refused if this account may not list or watch jobs or pods."""
        if not self._synced():
            return Life("unknown", self._bounds.get(run_key))
        name, now = self._name(run_key), self._clock()
        if self._cache.unread(name):
            return Life("unknown", self._bounds.get(run_key))
        try:
            job = self._job(run_key)
        except Unreachable:
            return Life("unknown", self._bounds.get(run_key))
        pods, notices = self._cache.pods(self._run(run_key)), self._cache.notices(name)
        if not self._expired_removed:
            self._remove_expired()
        held = self._queues.held(job) if job is not None and job.queue is not None and not job.finished else Held()
        life = self._nodes.clearer(read_life(job, pods, notices, now, ended_by_us=name in self._ended_by_us, held=held), pods)
        self._bounds[run_key] = life.bound
        if job is not None and job.gone is None and job.forgotten(pods, notices):
            self._wake(job, now)
        if job is not None and job.gone is None and not job.finished and not job.suspended and is_broken(pods, now):
            self._break_up(job)
        if job is not None and job.gone is None and is_taken(job, pods):
            self._let_go(job)
        if life.state == "absent" and run_key in self._faults:
            return replace(self._faults[run_key].life(None), state="absent")
        return life

    def describe(self, run_key: str) -> list[PodView]:
        """The attempt's pods by node; a deleted pod as it was last. Empty if there are none, or if the API server does not answer."""
        if not self._synced():
            return []
        now = self._clock()
        pods = sorted(self._cache.pods(self._run(run_key)), key=lambda pod: (pod.index, pod.created))
        newest = {pod.index: pod for pod in pods}
        return [_view(pod, now) for pod in newest.values()]

    def fresh(self) -> bool:
        """Whether the cluster answers, so that the result of `observe` is current."""
        return self._synced()

    def _synced(self) -> bool:
        self._watcher.start()
        patience_s, self._patience_s = self._patience_s, 0.0  # only the first call waits for an answer
        return self._watcher.wait_until_fresh(patience_s)

    def _job(self, run_key: str) -> Job | None:
        """Our job as it was last seen. If it seems to be missing, the server is asked for it: it may be newer than the list.

        Raises Unreachable.
        """
        name, owner = self._name(run_key), (self._store_url, run_key)
        job = self._cache.job(name, owner)
        if job is not None and job.gone is None:
            return job if job.owner == owner else None
        now = self._clock()
        if any(not pod.over(now) for pod in self._cache.pods(self._run(run_key))):
            return job  # the attempt lives, even if the job does not
        if job is not None and job.owner != owner:
            return None
        found = self._objects.find(run_key)
        if found is None or (job is not None and found[1]["metadata"]["uid"] != job.uid):
            return job
        if name not in self._ended_by_us:
            self._cache.on_update(found[0].plural, found[1])
        return self._cache.job(name, owner)

    def _wake(self, job: Job, now: float) -> None:
        """Change an annotation of a job that its operator has forgotten, so that the operator handles it again.

        An operator whose cache was stale finds that its own PodGroup is there already, gives up, and does not try again by itself.
        """
        if now - job.created < WAKE_AFTER_S or now - self._woken.get(job.name, 0.0) < WAKE_EVERY_S:
            return
        self._woken[job.name] = now
        log.info("%s: the training operator has made no pods; osctl wakes it", job.name)
        try:
            self._api.patch(job.plural, job.name, {"metadata": {"annotations": {Annotation.WOKEN: f"{now:.0f}"}}}, uid=job.uid)
        except (NotFound, Conflict, Refused, Unreachable) as error:
            log.info("%s: the training operator could not be woken: %s", job.name, error)

    def _break_up(self, job: Job) -> None:
        """Make the other pods of a broken gang leave. No driver asked for that, so the attempt ends as preempted."""
        if job.uid in self._broken_up:
            return
        log.info("%s: one of its pods was replaced; the others are asked to leave", job.name)
        try:
            if self._profile.queue == "kueue":
                self._ended_by_us.add(job.name)
                self._objects.delete(operator.of(job), job.name, job.uid)
            else:
                self._objects.suspend(operator.of(job), job.name, job.uid, asked=False)
        except (NotFound, Conflict, Unreachable) as error:
            log.info("%s: the others could not be asked to leave: %s", job.name, error)
            return
        self._broken_up.add(job.uid)

    def _let_go(self, job: Job) -> None:
        """Delete a job that Kueue has suspended after it had pods. Kueue would start it again, even while the first pods still save."""
        if job.uid in self._broken_up:
            return
        log.info("%s: Kueue has taken its quota away; the job is deleted once its pods were asked to leave", job.name)
        try:
            self._ended_by_us.add(job.name)
            self._objects.delete(operator.of(job), job.name, job.uid)
        except (NotFound, Conflict, Unreachable) as error:
            log.info("%s: it could not be deleted: %s", job.name, error)
            return
        self._broken_up.add(job.uid)

    # --- Acting --------------------------------------------------------------------------------------------------------------------

    def check(self, run_key: str, nodes: int) -> None:
        """Raise Refused if the names of its pods would be too long. What cannot be asked of the cluster now, `submit` says."""
        kind = None
        with suppress(Refused, Unreachable):
            kind = chosen(self._profile, self._served(), self._api.server)
        if kind is not None:
            kind.check_names(self._name(run_key), run_key, nodes)

    def submit(self, intent_key: str, run_key: str) -> None:
        """Create the job, or find that it exists.

        Raises:
            Refused: the API server or a webhook refused it, or a foreign job has this name. Nothing was created.
            Unreachable: it is not known whether the job was created; submit again. Also if a used-up quota or a webhook that is down keeps
                it from being created: `observe` then says so.
        """
        intent = read_intent(self._store, intent_key)
        name, served = self._name(run_key), self._served()
        try:
            kind = chosen(self._profile, served, self._api.server)
        except Refused:  # it may have been installed just now
            kind = chosen(self._profile, discovery.served(self._api), self._api.server)
        # The profile may have named another kind when this attempt was submitted, and it must not be started twice.
        before = self._objects.find(run_key, [one for one in served if one is not kind])
        sent = kind.objects(intent, self._profile_of(intent), self._store_url)
        try:
            kind, there = before or self._objects.create(kind, sent, run_key)
        except (WebhookDown, OverQuota) as error:
            since = self._faults[run_key].since if run_key in self._faults else self._clock()
            cause: WaitCause = "webhook" if isinstance(error, WebhookDown) else "refused"
            self._faults[run_key] = Waiting(first_line(str(error)), "fault", since, cause)
            raise Unreachable(f"{name}: not made yet: {error}") from error
        self._faults.pop(run_key, None)
        self._cache.on_update(kind.plural, there)

    def drain(self, run_key: str) -> None:
        """Suspend the job: every pod is asked to save and leave. Kueue would undo that, so with Kueue the job is deleted instead."""
        found = self._objects.find(run_key)
        if found is None:
            return
        kind, name, uid = found[0], self._name(run_key), found[1]["metadata"]["uid"]
        try:
            if self._profile.queue == "kueue":
                self._ended_by_us.add(name)
                self._objects.delete(kind, name, uid)
            else:
                self._objects.suspend(kind, name, uid, asked=True)
        except (NotFound, Conflict):
            return  # it has ended by itself

    def kill(self, run_key: str) -> None:
        """Delete the job and its pods without grace. Raises Unreachable if they are not gone within `GONE_S`."""
        name, run = self._name(run_key), self._run(run_key)
        self._ended_by_us.add(name)
        deadline = time.monotonic() + GONE_S
        while True:
            removed = False
            with suppress(Conflict):  # another object has the name by now: read again
                removed = self._objects.is_removed(run_key)  # the job first, since its operator would make new pods
            pods, _ = self._api.list("pods", f"{names.selector()},{Label.RUN}={run}")
            if removed and not pods:
                break
            if time.monotonic() > deadline:
                raise Unreachable(f"{name}: killed {GONE_S:g} s ago and still not gone: {len(pods)} pods")
            try:
                for pod in pods:
                    self._api.delete("pods", pod["metadata"]["name"], uid=pod["metadata"]["uid"], grace_s=0)
            except Conflict:
                continue  # another object has the name by now: read again
            time.sleep(POLL_S)
        for kind in operator.OPERATORS:
            self._cache.on_delete(kind.plural, name)
        for seen in self._cache.pods(run):
            self._cache.on_delete("pods", seen.name)

    def forget(self, run_key: str) -> None:
        """Delete what is left of an attempt that is over. A finished job stays for people to see, until its time to live is over."""
        name, run, now = self._name(run_key), self._run(run_key), self._clock()
        seen = self._cache.job(name, (self._store_url, run_key))
        if seen is None or not seen.finished or operator.of(seen).beside:
            found = self._objects.find(run_key)
            if found is None:
                self._objects.remove_orphans(run_key)
            else:
                self._objects.own(*found)
            if found is not None and not found[0].is_finished(found[1]):
                self._ended_by_us.add(name)
                try:
                    self._objects.delete(found[0], name, found[1]["metadata"]["uid"])
                except Conflict:
                    log.info("%s: another job has this name by now; osctl leaves it alone", name)
        self._remove_expired()
        for pod in self._cache.pods(run):
            if pod.gone is None and pod.ended is None and pod.over(now):  # its host does not answer, so nobody else would delete it
                try:
                    self._api.delete("pods", pod.name, uid=pod.uid, grace_s=0)
                except Conflict:
                    log.info("%s: another pod has this name by now; osctl leaves it alone", pod.name)
        self._cache.forget(name, run)
        self._faults.pop(run_key, None)
        self._bounds.pop(run_key, None)
        self._woken.pop(name, None)

    def _served(self) -> Sequence[operator.Operator]:
        """The kinds of jobs that the cluster serves. Raises Unreachable."""
        return self._watcher.served() if self._watcher.fresh() else discovery.served(self._api)

    def _remove_expired(self) -> None:
        """What no controller deletes. Whether it succeeds concerns nobody who waits for an attempt."""
        self._expired_removed = True
        try:
            self._objects.remove_expired(self._clock())
        except (Refused, Unreachable) as error:
            log.info("finished jobs whose time is over could not be deleted: %s", error)

    def _name(self, run_key: str) -> str:
        return names.job_name(self._store_url, run_key)

    def _run(self, run_key: str) -> str:
        return names.run_hash(self._store_url, run_key)


def _view(pod: Pod, now: float) -> PodView:
    phase, reason = pod.shown(now)
    return PodView(pod.name, pod.index, phase, pod.node, reason, pod.bound)
