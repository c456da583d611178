"""What the pods of one Indexed Job tell each other, through the store: which shards of the sources are done, and what each pod has held.

    datasets/<name>/shards/<job>/<shard>.json       it is done; written once, when all that it kept lies in the store
    datasets/<name>/shards/<job>/pods/<pod>.json    what a pod holds, replaced
    datasets/<name>/shards/<job>/aside/…            its rows that could not be worked on, so that who merges does not try them again

Owns these objects. Refuses to judge rows. Nothing here outlives the next preparation of the data set: results lie in `kept/`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass

from orchestrator.errors import NotFound, StoreConflict
from orchestrator.ledger.record import Damaged
from orchestrator.ports import Store
from orchestrator.prepare.pods import Watch
from orchestrator.prepare.records import Keys, PodHeld, Pods, ShardDone


@dataclass(frozen=True)
class Place:
    """Of a pod among those of its Job."""

    job: str
    """Its Job's uid: Jobs of one name may follow one another."""
    shard: int
    """From 0; 0 merges."""
    of: int

    @property
    def words(self) -> tuple[str, ...]:
        """For `python -m opensora.prepare`."""
        return "--shard", f"{self.shard}/{self.of}"


class Shards:
    def __init__(self, store: Store, keys: Keys, place: Place) -> None:
        self._store, self._keys, self.place = store, keys, place

    @property
    def aside(self) -> str:
        """Key of the folder of rows that could not be worked on."""
        return f"{self._keys.shards(self.place.job)}/aside"

    def pod(self, name: str) -> str:
        """Key of what a pod holds."""
        return f"{self._keys.shards(self.place.job)}/pods/{name}.json"

    def commit(self, done: ShardDone) -> bool:
        """This pod's shard is done; False: another pod of it has said so before. Raises Unreachable, Refused."""
        try:
            self._store.create(self._key(self.place.shard), done.encode())
        except StoreConflict:
            return False
        return True

    def is_done(self, shard: int) -> bool:
        """Raises Unreachable."""
        with contextlib.suppress(NotFound):
            self._store.read(self._key(shard))
            return True
        return False

    def missing(self) -> list[int]:
        """Shards that are not done. Raises Unreachable."""
        there = set(self._store.list(f"{self._keys.shards(self.place.job)}/"))
        return [shard for shard in range(self.place.of) if self._key(shard) not in there]

    def held(self) -> list[PodHeld]:
        """What the other pods hold, as each wrote it last. Raises Unreachable."""
        found: list[PodHeld] = []
        for key in self._store.list(f"{self._keys.shards(self.place.job)}/pods/"):
            with contextlib.suppress(NotFound, Damaged):
                found += Pods.decode(self._store.read(key).data).pods
        return found

    def with_others(self, own: Watch) -> Watch:
        """Says of all pods of the Job what they hold; `own`: of this one."""

        def look(now: float) -> Sequence[PodHeld]:
            return [*own(now), *self.held()]

        return look

    def forget_others(self) -> None:
        """Remove what earlier Jobs told each other. Raises Unreachable, Refused."""
        mine = f"{self._keys.shards(self.place.job)}/"
        for key in list(self._store.list(f"{self._keys.folder}/shards/")):
            if not key.startswith(mine):
                self._store.discard(key)

    def _key(self, shard: int) -> str:
        return f"{self._keys.shards(self.place.job)}/{shard}.json"
