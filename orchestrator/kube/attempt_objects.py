"""Requests about the objects of an attempt, whichever kind of job it is: find, create or adopt, suspend, delete.

Owns the check that an object is ours before anything is done to it, and what is left when a request fails in the middle. Refuses to say
what an attempt's state is (`life`) and when something is to be done (`backend`).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence

from orchestrator.errors import NotFound, Refused, Unreachable
from orchestrator.kube import names
from orchestrator.kube.client import Api, Object
from orchestrator.kube.faults import AlreadyExists, Conflict, OverQuota
from orchestrator.kube.operator import Operator
from orchestrator.kube.parts import Manifest
from orchestrator.labels import Annotation

log = logging.getLogger(__name__)

SEEN_S, SEEN_POLL_S = 5.0, 0.2
"""How long a webhook may take to see an object that was created just now, and the pause between two tries: webhooks read from a cache."""

Found = tuple[Operator, Object]
"""An attempt's job as the server has it, and its kind."""


class AttemptObjects:
    """Objects of attempts whose ledger lies in one store. Safe for several threads."""

    def __init__(self, api: Api, store_url: str, served: Callable[[], Sequence[Operator]]):
        """`served` returns the kinds of jobs that the cluster serves."""
        self._api, self._store_url, self._served = api, store_url, served

    def find(self, run_key: str, among: Sequence[Operator] | None = None) -> Found | None:
        """The attempt's job, of one of the kinds `among`; None means of any that the cluster serves.

        Returns None if there is no job, or what has its name is foreign. Raises Unreachable, Refused.
        """
        for operator in self._served() if among is None else among:
            try:
                there = self._api.get(operator.plural, names.job_name(self._store_url, run_key))
            except NotFound:
                continue
            if names.is_ours(there, self._store_url, run_key):
                return operator, there
        return None

    def create(self, operator: Operator, sent: Sequence[Manifest], run_key: str) -> Found:
        """Create an attempt's objects, or find that they exist; its job then owns the others. Returns its job.

        Raises:
            Refused: the API server or a webhook refused one, or what exists is foreign or was made with another specification.
            Unreachable: not all could be created; call again. Also OverQuota and WebhookDown.
        """
        there: Object = {}
        for one in sent:
            try:
                there = self._created(operator, one)
            except AlreadyExists:
                there = self._adopted(operator, one, run_key)
            except OverQuota:
                raise
            except Refused as error:
                self.remove_orphans(run_key)
                raise Refused(f"{one['metadata']['name']}: {error}") from error
        self.own(operator, there)
        return operator, there

    def _created(self, operator: Operator, sent: Manifest) -> Object:
        deadline = time.monotonic() + SEEN_S
        while True:
            try:
                return self._api.create(operator.plurals[sent["kind"]], sent)
            except Refused as error:
                if not operator.is_early(str(error)):
                    raise
                if time.monotonic() > deadline:
                    raise Unreachable(f"{sent['metadata']['name']}: not made yet: {error}") from error
            time.sleep(SEEN_POLL_S)

    def own(self, operator: Operator, job: Object) -> None:
        """Make a job the owner of the attempt's other objects, so that they are deleted with it. Raises Refused, Unreachable."""
        about = job["metadata"]
        owner = {"apiVersion": operator.api.removeprefix("/apis/"), "kind": operator.kind, "name": about["name"], "uid": about["uid"]}
        for plural in operator.beside:
            try:
                there = self._api.get(plural, about["name"])
                if names.owner(there) == names.owner(job) and not there["metadata"].get("ownerReferences"):
                    self._api.patch(plural, about["name"], {"metadata": {"ownerReferences": [owner]}}, uid=there["metadata"]["uid"])
            except (NotFound, Conflict):
                continue  # it is deleted just now

    def remove_orphans(self, run_key: str) -> None:
        """Delete what a driver created that was killed before it could create the job. Raises Unreachable, Refused."""
        name = names.job_name(self._store_url, run_key)
        for plural in (plural for operator in self._served() for plural in operator.beside):
            try:
                there = self._api.get(plural, name)
                if names.is_ours(there, self._store_url, run_key) and not there["metadata"].get("ownerReferences"):
                    self._api.delete(plural, name, uid=there["metadata"]["uid"])
            except (NotFound, Conflict):
                continue

    def is_removed(self, run_key: str) -> bool:
        """Delete an attempt's job, and what its operator keeps for a moment when the job is gone. Pods are left to the caller.

        Returns whether nothing is left that would make a pod; call until it does. Raises Conflict, Refused, Unreachable.
        """
        name = names.job_name(self._store_url, run_key)
        found = self.find(run_key)
        if found is not None:  # first, since it would make the others anew
            self.delete(found[0], name, found[1]["metadata"]["uid"])
        left = found is not None
        for plural in (plural for operator in self._served() for plural in operator.below):
            try:
                there = self._api.get(plural, name)
            except NotFound:
                continue
            if names.is_ours(there, self._store_url, run_key):
                self._api.delete(plural, name, uid=there["metadata"]["uid"], wait_for_dependents=True)
                left = True
        if not left:
            self.remove_orphans(run_key)
        return not left

    def remove_expired(self, now: float) -> None:
        """Delete finished jobs of osctl in the namespace whose time is over, where no controller does it. `now` is Unix time.

        Each such job says itself how long it is kept (`Annotation.KEEP_S`), so any driver may delete it. Raises Unreachable, Refused.
        """
        for operator in self._served():
            if not operator.expires_by_driver:
                continue
            for there in self._api.list(operator.plural, names.selector())[0]:
                kept = (there["metadata"].get("annotations") or {}).get(Annotation.KEEP_S, "")
                job = operator.read(there, now)
                if kept.isdecimal() and job.finished and job.completed is not None and now > job.completed + int(kept):
                    log.info("%s: is over since more than %s s; osctl deletes it", job.name, kept)
                    try:
                        self.delete(operator, job.name, job.uid)
                    except Conflict:
                        continue

    def _adopted(self, operator: Operator, sent: Manifest, run_key: str) -> Object:
        """The existing object with our name, if it is what we would have created. Raises Refused, Unreachable."""
        kind, name = sent["kind"], sent["metadata"]["name"]
        try:
            there = self._api.get(operator.plurals[kind], name)
        except NotFound as error:
            raise Unreachable(f"{name}: was there a moment ago and is gone now") from error
        where = f"{kind} {name} in namespace {self._api.namespace}"
        if not names.is_ours(there, self._store_url, run_key):
            whose = names.owner(there)
            said = f"belongs to {whose[1]} in {whose[0]}" if whose else "was not made by osctl"
            raise Refused(f"{where}: is there and {said}; it is left alone. Delete it or choose another namespace")
        ours, theirs = (one["metadata"]["annotations"].get(Annotation.SPEC_HASH) for one in (sent, there))
        if ours != theirs:
            raise Refused(f"{where}: was made with another specification ({theirs}, not {ours}). `osctl diff` shows the difference")
        return there

    def suspend(self, operator: Operator, name: str, uid: str, *, asked: bool) -> None:
        """Make all pods of a job save and leave. Raises NotFound, Conflict, Refused, Unreachable."""
        self._api.patch(operator.plural, name, operator.suspend(asked=asked), uid=uid)

    def delete(self, operator: Operator, name: str, uid: str) -> None:
        """Delete a job with all that it owns; its pods are asked to leave. Raises Conflict, Refused, Unreachable."""
        self._api.delete(operator.plural, name, uid=uid)
