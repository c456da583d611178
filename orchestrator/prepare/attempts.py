"""The attempts of a preparation as its store has them. Owns their numbers, and how one is closed whose launcher died with it."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from orchestrator.errors import NotFound, StoreConflict
from orchestrator.ledger.lease import RELEASED, TTL_S, LeaseHandle
from orchestrator.ledger.record import Damaged
from orchestrator.ports import Store
from orchestrator.prepare import pods
from orchestrator.prepare.records import Intent, Keys, Outcome, PodHeld, held_of

AnyOne = TypeVar("AnyOne", Intent, Outcome)
NUMBER = re.compile(r"[1-9][0-9]*")


@dataclass(frozen=True)
class Attempt:
    number: int
    intent: Intent | None
    """None: it cannot be read."""
    outcome: Outcome | None
    """None: it lives, or its launcher died."""
    pods: tuple[PodHeld, ...] = ()
    """Of a cluster, that it has held."""


def numbers(store: Store, keys: Keys) -> list[int]:
    return sorted(int(name) for name in store.children(f"{keys.folder}/attempts/") if NUMBER.fullmatch(name))


def all_of(store: Store, keys: Keys) -> list[Attempt]:
    """Oldest first. What cannot be read counts as absent. Raises Unreachable."""
    return [_one(store, keys, number) for number in numbers(store, keys)]


def _one(store: Store, keys: Keys, number: int) -> Attempt:
    intent = _read(store, Intent, keys.intent(number))
    there = pods.held(store, keys, number) if intent is not None and intent.where else ()
    return Attempt(number, intent, _read(store, Outcome, keys.outcome(number)), there)


def close_lost(store: Store, keys: Keys, lease: LeaseHandle, now: float, event: Callable[..., None], status: Mapping[str, Any]) -> None:
    """Write the outcome of attempts whose launcher died with them, so that every second stands in the books.

    Its process died with the launcher, which renewed its lease until then: the last renewal is the end, to 5 s, and
    the last `status`, status.json as it is known, says what its steps held. Raises Unreachable.
    """
    before = lease.before
    renewed = before.expires - TTL_S if before is not None and before.expires != RELEASED else None
    for number in numbers(store, keys):
        intent, outcome = _read(store, Intent, keys.intent(number)), _read(store, Outcome, keys.outcome(number))
        if intent is None or outcome is not None:
            continue
        held, told = held_of(status, since=intent.created), status.get("time")
        seen = told if held and isinstance(told, int | float) else intent.created
        ended = min(now, max(renewed or intent.created, intent.created, seen))
        cores_s = intent.workers * (ended - intent.created)
        if there := pods.held(store, keys, number) if intent.where else ():
            cores_s = sum(one.core_seconds for one in there)
        lost = Outcome(
            class_="lost", exit_code=None, reason="its launcher died with it", bound=intent.created, ended=ended,
            device_seconds=cores_s, held=held, epoch=lease.epoch,
        )  # fmt: skip
        with contextlib.suppress(StoreConflict):  # it was written after all
            store.create(keys.outcome(number), lost.encode())
        event("outcome", attempt=number, detail=f"lost: {lost.reason}")


def _read(store: Store, kind: type[AnyOne], key: str) -> AnyOne | None:
    try:
        return kind.decode(store.read(key).data)
    except (NotFound, Damaged):
        return None
