"""A preparation as anybody sees it: from its run directory where it lives here, else from what its launcher writes into the store."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from opensora.printable import several
from orchestrator.errors import Refused
from orchestrator.inputs import datasets
from orchestrator.ledger.records import Lease
from orchestrator.ledger.store import Ledger
from orchestrator.ports import Store
from orchestrator.prepare import attempts, order, removed, status_object
from orchestrator.prepare.attempts import Attempt
from orchestrator.prepare.bill import Bill, bill
from orchestrator.prepare.records import STEPS, Keys, Removed
from orchestrator.prepare.run_directory import RunDirectory

LOOK_S = 1.0
SHOWN = 3
"""Sources that were taken out, by name."""


@dataclass(frozen=True)
class State:
    """What is known of a preparation."""

    name: str
    holder: Lease | None
    """None: nobody prepares it now."""
    status: Mapping[str, Any]
    """status.json; empty: nothing is known."""
    attempts: tuple[Attempt, ...]
    data_set: datasets.DataSet | None
    """What the name means now."""
    taken_out: tuple[Removed, ...] = ()
    """Sources that were taken out on request. Not read while somebody prepares it."""
    asked: bool = False
    """Whether a cluster was asked for it. Read only where nothing else is known."""

    @property
    def bill(self) -> Bill:
        """Of all attempts, and of the one that runs what its steps hold by now."""
        return bill(self.attempts, self.status)

    @property
    def word(self) -> str:
        """running | prepared | stopped | failed | asked | unknown"""
        if self.holder is not None:
            return "running"
        last = next((one.outcome for one in reversed(self.attempts) if one.outcome is not None), None)
        if last is not None and last.class_ == "completed" and self.data_set is not None:
            return "prepared"
        if last is not None:
            return "stopped" if last.class_ in ("drained", "signal", "lost", "completed") else "failed"
        without = "asked" if self.asked else "unknown"
        return "prepared" if self.data_set is not None else "stopped" if self.attempts else without

    @property
    def reason(self) -> str:
        """Of the last attempt's end, or what was taken out since then of the data set that it made."""
        last = self.attempts[-1].outcome if self.attempts else None
        if last is None or self.holder is not None:
            return ""
        since = [one.source for one in self.taken_out if one.time >= last.ended]
        if last.class_ != "completed" or not since or self.data_set is None:
            return last.reason
        more = f" and {len(since) - SHOWN} more" if len(since) > SHOWN else ""
        digest = (self.data_set.prepared or "")[:16]
        return f"{', '.join(since[:SHOWN])}{more} taken out since its last run: {several(self.data_set.rows, 'clip')}, digest {digest}"


def look(store: Store, name: str, folder: Path) -> State:
    """`folder`: its run directory here, where there is one. Raises Refused where the store has nothing of it, Unreachable."""
    keys = Keys(name)
    holder = Ledger(store, keys.folder).lenient().holder(time.time())
    here = RunDirectory(folder).status() if folder.is_dir() else {}
    there = status_object.read(store, keys.status)
    status = status_object.newer(here, there)
    known = datasets.of_name(store, name)
    taken_out = tuple(removed.all_of(store, keys)) if holder is None else ()
    found = State(name, holder, status, tuple(attempts.all_of(store, keys)), known[-1] if known else None, taken_out)
    if found.word == "unknown" and not status:
        if order.is_asked(store, name):
            return replace(found, asked=True)
        names = ", ".join(names_in(store)) or "none"
        raise Refused(
            f"data set {name}: nobody has prepared it in {store.url}; there are: {names}. Prepare one: osctl prepare run ~/videos"
        )
    return found


def names_in(store: Store) -> list[str]:
    """Data sets of a store that somebody prepares, or has prepared."""
    return [name for name in store.children(f"{datasets.ROOT}/") if {"asked", "attempts"} & set(store.children(f"{datasets.ROOT}/{name}/"))]


def follow(store: Store, name: str, folder: Path, show: Callable[[State], None], halt: Callable[[], bool] = lambda: False) -> State:
    """Watch until nobody prepares it any more; how it stands then. Raises Unreachable."""
    while True:
        state = look(store, name, folder)
        show(state)
        if state.holder is None or halt():
            return state
        time.sleep(LOOK_S)


def steps_of(status: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row a step: name, in, kept, dropped, quarantined, rate (rows a second), eta_s, cpu_s, device, devices, held_s, reasons."""
    rows = []
    content = status.get("steps")
    steps = content if isinstance(content, dict) else {}
    for name in sorted(steps, key=lambda name: (STEPS.index(name) if name in STEPS else len(STEPS), name)):
        one = steps[name]
        if not isinstance(one, dict):
            continue
        dropped, quarantined = _reasons(one.get("dropped")), _reasons(one.get("quarantined"))
        rows.append(
            {
                "name": name, "in": one.get("in", 0), "kept": one.get("kept", 0), "dropped": sum(dropped.values()),
                "quarantined": sum(quarantined.values()), "rate": one.get("rate"), "eta_s": one.get("eta_s"), "cpu_s": one.get("cpu_s"),
                "device": one.get("device"), "devices": one.get("devices"), "held_s": one.get("held_s"),
                "reasons": {"dropped": dropped, "quarantined": quarantined},
            }
        )  # fmt: skip
    return rows


def _reasons(content: Any) -> dict[str, int]:
    return {str(name): int(count) for name, count in content.items()} if isinstance(content, dict) else {}


def is_held(error: Refused) -> bool:
    return "is being prepared by" in str(error)
