"""Who drives a pipeline: one object that is only ever replaced by If-Match, so that of two drivers exactly one goes on.

A lease is free when it was released, when its process of this very host is dead, or when it has expired. Clocks of two hosts may
differ by more than a lease's life: one that another host let expire is watched for half its life, and taken only if nobody renewed it.
Whoever takes it raises the epoch, and the old holder's next renewal fails: that, not the clock, is what makes it safe.
Refuses to wait for a live holder, and never deletes: a lease that is given back expires at 0.
"""

from __future__ import annotations

import contextlib
import getpass
import os
import time
from collections.abc import Callable

from orchestrator.errors import NotFound, Refused, StoreConflict, Unreachable
from orchestrator.ports import Object, Store
from orchestrator.processes import Process
from orchestrator.records import Damaged, Lease

TTL_S = 15.0
"""Life of a lease. Renewed every third of it, so that two renewals may fail before it is over."""
RELEASED = 0.0


class LeaseHandle:
    """A lease that is ours, until `renew` says otherwise."""

    def __init__(self, store: Store, key: str, lease: Lease, etag: str, ttl_s: float):
        self.record = lease
        self.lost = False
        self.before: Lease | None = None
        """Whose it was."""
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
        """Raises StoreConflict where somebody else took it (then this driver has to stop), Unreachable."""
        self._replace(self.record.model_copy(update={"expires": now + self.ttl_s}))

    def release(self) -> None:
        """Give it back. A lease that was lost, or a store that does not answer, is no error: it is over either way."""
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
            self.lost = True
            raise StoreConflict(f"{self._key}: epoch {self.epoch} has lost its lease") from error
        self.record = lease


def acquire(
    store: Store, key: str, now: float, ttl_s: float = TTL_S, *, me: Process | None = None, pause: Callable[[float], None] = time.sleep
) -> LeaseHandle:
    """Raises Refused, naming the live holder."""
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
    """Raises Refused."""
    try:
        return Lease.decode(data)
    except Damaged as error:
        raise Refused(f"{key}: {error}; {_lease_advice(error)}") from error


def _lease_advice(error: Damaged) -> str:
    """A lease is no result: where nobody drives, nothing is lost with it."""
    return error.advice if error.kind == "newer" else "make sure that nobody drives this pipeline, and remove it"


def is_free(lease: Lease, now: float) -> bool | None:
    """None: it has expired, by the clock of another host."""
    if lease.expires == RELEASED:
        return True
    alive = Process(lease.host, lease.pid, lease.started, lease.boot).alive()
    if alive is False:
        return True
    if now < lease.expires:
        return False
    return True if alive else None


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
    pipeline = key.partition("/")[0]
    runs = f"its lease runs for another {lease.expires - now:.0f} s" if lease.expires > now else "it has just renewed its lease"
    return f"pipeline {pipeline}: is driven by {lease.holder} (epoch {lease.epoch}), {runs}; see `osctl watch` and `osctl cancel`"
