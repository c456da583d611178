"""The lease says who drives a pipeline. It is one object that is only replaced with If-Match, so that of two drivers exactly one goes on.

A lease is free when it was released, when it belongs to a dead process of this host, or when it has expired. The clocks of two hosts may
differ by more than a lease's life, so an expired lease of another host is watched for half its life and taken only if nobody renewed it.
The driver that takes it raises the epoch, and the old holder's next renewal fails. This makes it safe, not the clock.
Refuses to wait for a live holder, and never deletes: a lease that is given back expires at 0.
"""

from __future__ import annotations

import contextlib
import getpass
import os
import time
from collections.abc import Callable

from orchestrator.errors import NotFound, Refused, StoreConflict, Unreachable
from orchestrator.ledger.record import Damaged
from orchestrator.ledger.records import Lease
from orchestrator.local.processes import Process
from orchestrator.ports import Object, Store

TTL_S = 15.0
"""How long a lease is valid. It is renewed every third of that, so that two renewals may fail before it expires."""
RELEASED = 0.0


class LeaseHandle:
    """A lease that this process holds, until `renew` raises."""

    def __init__(self, store: Store, key: str, lease: Lease, etag: str, ttl_s: float):
        self.record = lease
        self.lost = False
        self.gone = ""
        """What is no longer there, where it was lost because somebody has removed the lease or the whole store."""
        self.before: Lease | None = None
        """The lease before, of another holder. None means there was none."""
        self.next_seq = 0
        """Sequence number of this epoch's next event."""
        self.ttl_s = ttl_s
        self._store = store
        self._key = key
        self._etag = etag

    @property
    def epoch(self) -> int:
        return self.record.epoch

    @property
    def expires(self) -> float:
        return self.record.expires

    def valid(self, now: float) -> bool:
        return not self.lost and now < self.expires

    def renew(self, now: float) -> None:
        """Renew the lease. Raises StoreConflict if another driver took it or somebody removed it (`gone` says so); then this driver has
        to stop. Raises Unreachable."""
        self._replace(self.record.model_copy(update={"expires": now + self.ttl_s}))

    def release(self) -> None:
        """Give the lease back. If it was lost, or the store does not answer, nothing is raised: this driver ends in any case."""
        if not self.lost:
            with contextlib.suppress(StoreConflict, Unreachable):
                self._replace(self.record.model_copy(update={"expires": RELEASED}))
            self.lost = True

    def _replace(self, lease: Lease) -> None:
        if self.lost:
            raise StoreConflict(f"{self._key}: epoch {self.epoch} has lost its lease")
        try:
            self._etag = self._store.replace(self._key, lease.encode(), self._etag)
        except (StoreConflict, NotFound) as error:
            self.lost = True  # also where nobody else has it: the next driver begins at epoch 1 without knowing of this one
            if isinstance(error, NotFound):
                self.gone = self._what_is_gone()
            raise StoreConflict(f"{self._key}: epoch {self.epoch} has lost its lease") from error
        self.record = lease

    def _what_is_gone(self) -> str:
        with contextlib.suppress(Unreachable):
            if not self._store.children(""):
                return f"the store {self._store.url} is gone, or empty"
        return f"its lease is gone: {self._store.url} has no {self._key} any more"


def acquire(
    store: Store, key: str, now: float, ttl_s: float = TTL_S, *, me: Process | None = None, pause: Callable[[float], None] = time.sleep
) -> LeaseHandle:
    """Take the lease. Raises Refused, which names the live holder, if another driver has it."""
    me = me or Process.of(os.getpid())
    watched: str | None = None
    while True:
        there = _look(store, key)
        if there is None:
            taken = _claim(me, 1, now + ttl_s)
            with contextlib.suppress(StoreConflict):
                return LeaseHandle(store, key, taken, store.create(key, taken.encode()), ttl_s)
            continue
        lease = decode_lease(key, there.data)
        free = is_free(lease, now)
        if free is False and clocks_differ(lease, now, ttl_s) and not process_of(lease).is_here:
            free = None  # its clock is not ours, so its expiry says nothing: the lease is watched instead
        if free is False:
            raise Refused(_held(key, lease, now))
        if free is None and watched != there.etag:
            if watched is not None:
                raise Refused(_held(key, lease, now))
            watched = there.etag
            pause(ttl_s / 2)
            now += ttl_s / 2
            continue
        taken = _claim(me, lease.epoch + 1, now + ttl_s)
        with contextlib.suppress(StoreConflict):
            handle = LeaseHandle(store, key, taken, store.replace(key, taken.encode(), there.etag), ttl_s)
            handle.before = lease
            return handle


def decode_lease(key: str, data: bytes) -> Lease:
    """The lease. Raises Refused if it cannot be read."""
    try:
        return Lease.decode(data)
    except Damaged as error:
        raise Refused(f"{key}: {error}; {_lease_advice(error)}") from error


def _lease_advice(error: Damaged) -> str:
    """What to do about a lease that cannot be read. If no driver runs, nothing is lost by removing it."""
    return error.advice if error.kind == "newer" else "make sure that nobody drives this pipeline, and remove it"


def is_free(lease: Lease, now: float) -> bool | None:
    """Whether a lease may be taken. None means that it has expired, but by the clock of another host."""
    if lease.expires == RELEASED:
        return True
    alive = process_of(lease).alive()
    if alive is False:
        return True
    if now < lease.expires:
        return False
    return True if alive else None


def process_of(lease: Lease) -> Process:
    return Process(lease.host, lease.pid, lease.started, lease.boot)


def clocks_differ(lease: Lease, now: float, ttl_s: float = TTL_S) -> bool:
    """Whether a lease is valid for longer than any is given: then its holder's clock is ahead of this host's."""
    return lease.expires - now > ttl_s


def _look(store: Store, key: str) -> Object | None:
    try:
        return store.read(key)
    except NotFound:
        return None


def _claim(me: Process, epoch: int, expires: float) -> Lease:
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container's user may have no name
        user = str(os.getuid())
    holder = f"{user}@{me.host}:{me.pid}"
    return Lease(holder=holder, host=me.host, pid=me.pid, started=me.started, boot=me.boot, epoch=epoch, expires=expires)


def _held(key: str, lease: Lease, now: float) -> str:
    *folders, pipeline, _ = key.split("/")
    runs = f"its lease runs for another {lease.expires - now:.0f} s" if lease.expires > now else "it has just renewed its lease"
    if folders == ["datasets"]:
        follow = f"osctl prepare status {pipeline}, or wait for it: run the same command with --follow"
        return f"data set {pipeline}: is being prepared by {lease.holder} (epoch {lease.epoch}), {runs}. Look at it with: {follow}"
    return f"pipeline {pipeline}: is driven by {lease.holder} (epoch {lease.epoch}), {runs}; see `osctl watch` and `osctl cancel`"
