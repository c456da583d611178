"""How far a preparation is, in its store: for whoever follows it from elsewhere. One object that is replaced, now and then."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from orchestrator.driver.clock import Clock
from orchestrator.errors import NotFound, StoreConflict
from orchestrator.ports import Store

EVERY_S = 10.0


class StatusObject:
    def __init__(self, store: Store, key: str, clock: Clock) -> None:
        self._store, self._key, self._clock = store, key, clock
        self._etag: str | None = None
        self._next = 0.0

    def write_sometimes(self, status: Mapping[str, Any]) -> None:
        """Raises Unreachable."""
        if status and self._clock.elapsed() >= self._next:
            self.write(status)

    def write(self, status: Mapping[str, Any]) -> None:
        """Raises Unreachable. Where another launcher writes it now, this one does not."""
        self._next = self._clock.elapsed() + EVERY_S
        if not status:
            return
        data = json.dumps(status, sort_keys=True).encode()
        try:
            if self._etag is None:
                self._etag = self._store.read(self._key).etag
            self._etag = self._store.replace(self._key, data, self._etag)
        except NotFound:
            self._create(data)
        except StoreConflict:
            self._etag = None

    def _create(self, data: bytes) -> None:
        try:
            self._etag = self._store.create(self._key, data)
        except StoreConflict:
            self._etag = None


def read(store: Store, key: str) -> dict[str, Any]:
    """Empty: nothing is known. Raises Unreachable."""
    try:
        content = json.loads(store.read(key).data)
    except (NotFound, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def newer(one: Mapping[str, Any], other: Mapping[str, Any]) -> Mapping[str, Any]:
    """Of two, by the time that each says."""
    return max(one, other, key=lambda status: float(status.get("time") or 0))
