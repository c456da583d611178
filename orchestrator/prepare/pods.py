"""Which pods of a cluster an attempt holds, written into the store as they are seen: so the bill of a pod outlives whoever watched it.

Owns `attempts/<n>/pods.json`. Refuses to ask a cluster: whoever makes a `Watch` does.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence

from orchestrator.driver.clock import Clock
from orchestrator.errors import NotFound, StoreConflict
from orchestrator.ledger.record import Damaged
from orchestrator.ports import Store
from orchestrator.prepare.records import Keys, PodHeld, Pods

EVERY_S = 10.0
"""Seconds between two looks: so much of a pod's time is not in the bill where its watcher dies with it, and is not known to have gone."""

Watch = Callable[[float], Sequence[PodHeld]]
"""The pods that are there at this Unix time, each seen until then. A pod that has gone is left out. Raises Unreachable, Refused."""


class PodsObject:
    """The object of one attempt, or of one pod of an Indexed Job, kept up to date by who has it."""

    def __init__(self, store: Store, key: str, watch: Watch, clock: Clock) -> None:
        self._store, self._key, self._watch, self._clock = store, key, watch, clock
        self._known: dict[str, PodHeld] = {}
        self._etag: str | None = None
        self._next = 0.0

    @property
    def known(self) -> tuple[PodHeld, ...]:
        """All that was seen of this attempt."""
        return tuple(self._known.values())

    def look_sometimes(self) -> None:
        """Raises Unreachable, Refused."""
        if self._clock.elapsed() >= self._next:
            self.look()

    def look(self) -> tuple[PodHeld, ...]:
        """Look, write down, and say what has been held since the attempt began. Raises Unreachable, Refused."""
        self._next = self._clock.elapsed() + EVERY_S
        before = dict(self._known)
        self._known |= {one.name: one for one in self._watch(self._clock.now())}
        if self._known != before:
            self._write(Pods(pods=self.known).encode())
        return self.known

    def _write(self, data: bytes) -> None:
        """Where somebody else has written it, that one's launcher has taken over: the next look writes over it, and never comes."""
        try:
            if self._etag is None:
                self._etag = self._store.create(self._key, data)
            else:
                self._etag = self._store.replace(self._key, data, self._etag)
        except (StoreConflict, NotFound):
            self._etag = None
            with contextlib.suppress(NotFound):
                self._etag = self._store.read(self._key).etag


def held(store: Store, keys: Keys, number: int) -> tuple[PodHeld, ...]:
    """Of an attempt, as it was written last; empty: none was. Raises Unreachable."""
    try:
        return Pods.decode(store.read(keys.pods(number)).data).pods
    except (NotFound, Damaged):
        return ()
