"""After a run: where every device-second went, and what it cost.

Pure: turns added-up journals (`orchestrator.history`) into bills. The only way from seconds to dollars: status, watch, cost, compare,
MLflow and the budget all come here. Refuses to read a store, to round money, and to let a second disappear: where booked time is not held
time, the bill says so (`AttemptBill.remarks`) and corrects nothing.

Invariant: held = sum over the nodes of devices x (end - begin) = sum over records.HELD, to within max(0.1%, 50 ms x devices). A node's time
begins when it was bound, or with its own first piece, whichever is earlier, and ends with its death or its own last piece, whichever is
later. So clocks of nodes may differ, and what an agent says late is paid too. Queueing holds nothing and is free.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal

from orchestrator.prices import Prices, cost, load_prices
from orchestrator.records import HELD, WAITING, Price

__all__ = ["AttemptBill", "AttemptTime", "Bill", "NodeTime", "Prices", "account", "load_prices", "merge"]

TOLERANCE = 0.001
"""Share of an attempt's held time."""
SAME_S = 0.001
"""Moments closer than this are one: a journal is written in whole microseconds, and a binding is not."""
TOLERANCE_S = 0.05
"""Seconds a device: process start and death are seen to about so much."""


@dataclass(frozen=True)
class NodeTime:
    """One node's journal of an attempt, added up."""

    node: int
    devices: int
    start: float | None
    """Of its first piece in which a device was held; none: it has said nothing yet."""
    end: float | None
    spent: Mapping[str, float]
    """Seconds by category, waiting included."""
    runs: Sequence[tuple[int, int, float]] = ()
    """(first step, last step, seconds of `step`), ascending. The steps of a run count as equally long."""


@dataclass(frozen=True)
class AttemptTime:
    """What is known of one attempt's time, and its price."""

    attempt: int
    devices: int
    """Of all nodes."""
    device: str
    """Name in the price list."""
    price: Price | None
    """Of one device, when the attempt was made; none: nobody knew one."""
    bound: float | None
    """Unix time at which devices were first held; none: not seen, and each node's own first piece counts."""
    ended: float | None
    """Unix time of death; none: it runs still, and each node is billed up to its last piece."""
    nodes: Sequence[NodeTime]
    """Those that were heard of."""
    resumed_from: int
    """Step of the checkpoint it went on from; 0: from the start."""
    last_published: int
    """Last step of its own, or of the one it resumed from, that is safe in the store."""
    faults: tuple[str, ...] = ()
    """Pieces of its journal that cannot be read."""

    @property
    def began(self) -> float | None:
        """Unix time at which the first device was held, as far as anybody has seen."""
        starts = [node.start for node in self.nodes if node.start is not None]
        return min([*starts, *([self.bound] if self.bound is not None else [])], default=None)


@dataclass(frozen=True)
class AttemptBill:
    """Device-seconds of one attempt by category, and their price."""

    attempt: int
    device: str
    devices: int
    seconds: Mapping[str, float]
    """Device-seconds by category of records.HELD; every category is there."""
    waiting_s: float
    """Device-seconds in the queue; weight 0."""
    held_s: float
    """Device-seconds from each node's beginning to its end."""
    unsaved_s: float
    """Device-seconds under `step` that come after the last published checkpoint: lost, should it die now."""
    price: Price | None
    over: bool = True
    faults: tuple[str, ...] = ()

    @property
    def usd_per_hour(self) -> Decimal:
        """0 where nobody knew a price, which `remarks` says."""
        return self.price.usd_per_hour if self.price else Decimal(0)

    @property
    def is_gpu(self) -> bool:
        return self.price is not None and self.price.is_gpu

    @property
    def booked_s(self) -> float:
        return sum(self.seconds.values())

    @property
    def device_hours(self) -> float:
        return self.held_s / 3600

    @property
    def gpu_hours(self) -> float:
        """0 on a CPU."""
        return self.device_hours if self.is_gpu else 0.0

    @property
    def usd(self) -> Decimal:
        return cost(Decimal(repr(self.held_s)), self.usd_per_hour)

    @property
    def goodput(self) -> float | None:
        """Share of held time in steps that nobody had to do again; none before anything is held."""
        return self.seconds["step"] / self.held_s if self.held_s else None

    def difference_s(self) -> float:
        """Held minus booked device-seconds."""
        return self.held_s - self.booked_s

    def remarks(self) -> Iterator[str]:
        """What is wrong with the books, in words; none where they balance."""
        difference = self.difference_s()
        if abs(difference) > max(TOLERANCE * self.held_s, TOLERANCE_S * self.devices):
            what = "a gap" if difference > 0 else "time that is booked twice"
            yield (
                f"attempt {self.attempt}: {self.held_s:.3f} device-seconds were held, {self.booked_s:.3f} are booked: "
                f"its journal has {what}. What was held is billed"
            )
        yield from (f"attempt {self.attempt}: {fault}" for fault in self.faults)
        if self.price is None and self.held_s:
            yield (
                f"attempt {self.attempt}: no price is known of device {self.device!r}; its {self.device_hours:.4f} device-hours "
                "are billed at $0. Name a price list that has it: OSCTL_PRICES=FILE osctl cost"
            )


@dataclass(frozen=True)
class Bill:
    """A stage's attempts, or a pipeline's. Every number is the sum over the attempts."""

    attempts: tuple[AttemptBill, ...]

    @property
    def seconds(self) -> dict[str, float]:
        """Device-seconds by category of records.HELD."""
        return {category: sum(bill.seconds[category] for bill in self.attempts) for category in HELD}

    @property
    def waiting_s(self) -> float:
        return sum(bill.waiting_s for bill in self.attempts)

    @property
    def held_s(self) -> float:
        return sum(bill.held_s for bill in self.attempts)

    @property
    def unaccounted_s(self) -> float:
        return self.seconds["unaccounted"]

    @property
    def unsaved_s(self) -> float:
        return sum(bill.unsaved_s for bill in self.attempts)

    @property
    def device_hours(self) -> float:
        return sum(bill.device_hours for bill in self.attempts)

    @property
    def gpu_hours(self) -> float:
        return sum(bill.gpu_hours for bill in self.attempts)

    @property
    def usd(self) -> Decimal:
        return sum((bill.usd for bill in self.attempts), Decimal(0))

    @property
    def goodput(self) -> float | None:
        return self.seconds["step"] / self.held_s if self.held_s else None

    def difference_s(self) -> float:
        return sum(bill.difference_s() for bill in self.attempts)

    def remarks(self) -> Iterator[str]:
        for bill in self.attempts:
            yield from bill.remarks()


def account(attempts: Sequence[AttemptTime]) -> Bill:
    """The bill of one stage's attempts.

    All attempts of the stage's inputs belong in one call: a step is lost when a later attempt went on from a checkpoint before it, and what
    an attempt spent on such steps is moved from `step` to `lost`.
    """
    ordered = sorted(attempts, key=lambda time: time.attempt)
    bills: list[AttemptBill] = []
    for place, time in enumerate(ordered):
        kept = min((later.resumed_from for later in ordered[place + 1 :]), default=None)
        bills.append(_bill(time, kept))
    return Bill(tuple(bills))


def merge(bills: Iterable[Bill]) -> Bill:
    """A pipeline's bill from its stages'."""
    return Bill(tuple(attempt for bill in bills for attempt in bill.attempts))


def _bill(time: AttemptTime, kept: int | None) -> AttemptBill:
    seconds = dict.fromkeys(HELD, 0.0)
    waiting, faults = 0.0, list(time.faults)
    for node in sorted(time.nodes, key=lambda node: node.node):
        for category, spent in node.spent.items():
            if category in WAITING:
                waiting += spent * node.devices
            elif category in seconds:
                seconds[category] += spent * node.devices
            else:
                seconds["unaccounted"] += spent * node.devices
                faults.append(f"node {node.node} books {spent:.3f} s as {category!r}, a category that this version does not know")
    held, before, silent = _held(time)
    seconds["pull"] += before
    seconds["unaccounted"] += silent
    lost = 0.0 if kept is None else min(_steps_after(time, kept), seconds["step"])  # added up in another order: the last bit may differ
    seconds["step"] -= lost
    seconds["lost"] += lost
    unsaved = _steps_after(time, time.last_published) if kept is None else 0.0
    return AttemptBill(
        attempt=time.attempt,
        device=time.device,
        devices=time.devices,
        seconds=seconds,
        waiting_s=waiting,
        held_s=held,
        unsaved_s=unsaved,
        price=time.price,
        over=time.ended is not None,
        faults=tuple(faults),
    )


def _held(time: AttemptTime) -> tuple[float, float, float]:
    """(device-seconds held, those of them before each node's first piece, those after its last).

    Before its first piece a node that is bound fetches the image and starts the container: nobody is there yet to write a journal.
    """
    held = before = silent = 0.0
    heard = 0
    for node in sorted(time.nodes, key=lambda node: node.node):
        if node.start is None or node.end is None:
            continue
        begin = node.start if time.bound is None or node.start < time.bound - SAME_S else time.bound
        end = node.end if time.ended is None or node.end > time.ended + SAME_S else time.ended
        held += node.devices * (end - begin)
        before += node.devices * max(0.0, node.start - begin)
        silent += node.devices * max(0.0, end - node.end)
        heard += node.devices
    began = time.bound if time.bound is not None else time.began
    if time.ended is not None and began is not None:
        unheard = (time.devices - heard) * max(0.0, time.ended - began)
        held += unheard
        silent += unheard
    return held, before, silent


def _steps_after(time: AttemptTime, step: int) -> float:
    """Device-seconds of `step` that were spent on steps after this one. The steps of a run count as equally long."""
    total = 0.0
    for node in sorted(time.nodes, key=lambda node: node.node):
        for first, last, seconds in node.runs:
            count = last - first + 1
            total += seconds * node.devices * min(count, max(0, last - step)) / count
    return total
