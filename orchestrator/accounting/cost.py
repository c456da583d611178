"""After a run: how every device-second was spent, and what it cost. Pure.

Turns added-up journals (`node_fold`) into bills. Only this module turns the held seconds of attempts into dollars: status, watch, cost,
compare, MLflow and the budget use it. Plans and preparations have seconds of their own; `recipe.prices.cost` multiplies for all. Refuses
to read a store, to round money, and to lose a second: if booked time differs from held time, the bill says so (`AttemptBill.remarks`) and
corrects nothing.

Invariant: held = sum over the nodes of devices x (end - begin) = sum over records.HELD, to within max(0.1%, 50 ms x devices). A node's time
begins when it was bound, or with its own first piece, whichever is earlier, and ends with its end or its own last piece, whichever is
later. So the clocks of nodes may differ, and time that an agent books late is paid too. Queueing holds no device and is free.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal

from orchestrator.ledger.records import HELD, WAITING, Evaluation, Price
from orchestrator.recipe.prices import cost

TOLERANCE = 0.001
"""Held and booked time may differ by this share of the held time."""
TOLERANCE_S = 0.05
"""They may also differ by this many seconds for each device: start and end of a process are known to about this precision."""
SAME_S = 0.001
"""Two times closer than this count as equal: a journal is written in whole microseconds, and a binding is not."""


@dataclass(frozen=True)
class NodeTime:
    """One node's journal of an attempt, added up."""

    node: int
    devices: int
    start: float | None
    """Unix time at which the first piece with a held device begins. None means there is no such piece yet."""
    end: float | None
    """Unix time at which the last such piece ends."""
    spent: Mapping[str, float]
    """Seconds by category, waiting included."""
    runs: Sequence[tuple[int, int, float]] = ()
    """(first step, last step, seconds of `step`) of each run of steps, ascending. The steps of a run count as equally long."""


@dataclass(frozen=True)
class AttemptTime:
    """What is known of one attempt's time, and its price."""

    attempt: int
    devices: int
    """Number of devices of all nodes."""
    device: str
    """The device's name in the price list."""
    price: Price | None
    """Price of one device when the attempt was made. None means that no price was known."""
    bound: float | None
    """Unix time at which devices were first held. None means that it is not known, and each node's own first piece counts."""
    ended: float | None
    """Unix time of the end. None means it still runs, and each node is billed up to its last piece."""
    nodes: Sequence[NodeTime]
    """Nodes that have written a piece."""
    resumed_from: int
    """Step of the checkpoint that it resumed; 0 means from the start."""
    last_published: int
    """Last step that is safe in the store, of this attempt or of the one that it resumed."""
    faults: tuple[str, ...] = ()
    """Pieces of its journal that cannot be read."""
    pool: str | None = None
    """The pool of the cluster in which it was made. None means its cluster had no pools."""

    @property
    def began(self) -> float | None:
        """Unix time at which the first device was held, as far as is known. None means no device was."""
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
    """Device-seconds in the queue, which are free."""
    held_s: float
    """Device-seconds from each node's beginning to its end."""
    unsaved_s: float
    """Device-seconds under `step` after the last published checkpoint. They would be lost if the attempt ended now."""
    price: Price | None
    over: bool = True
    """Whether the attempt has ended."""
    faults: tuple[str, ...] = ()
    pool: str | None = None

    @property
    def usd_per_hour(self) -> Decimal:
        """Price of one device. 0 if no price was known; `remarks` says so."""
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
        """Share of the held time that was spent on steps that did not have to be repeated. None means nothing is held yet."""
        return self.seconds["step"] / self.held_s if self.held_s else None

    def difference_s(self) -> float:
        """Held minus booked device-seconds, rounded to 0.1 ms: Unix times as doubles are 0.24 µs apart, and sums of many differ by more."""
        return round(self.held_s - self.booked_s, 4) or 0.0  # and no -0.0

    def remarks(self) -> Iterator[str]:
        """Sentences about held time that is not booked, or booked twice, and about missing prices. There are none if all is right."""
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
class EvaluationBill:
    """What one evaluation beside the training cost. None of it is time of an attempt."""

    question: str
    device: str
    device_s: float
    price: Price | None

    @property
    def device_hours(self) -> float:
        return self.device_s / 3600

    @property
    def gpu_hours(self) -> float:
        """0 on a CPU."""
        return self.device_hours if self.price is not None and self.price.is_gpu else 0.0

    @property
    def usd(self) -> Decimal:
        return cost(Decimal(repr(self.device_s)), self.price.usd_per_hour if self.price else Decimal(0))


@dataclass(frozen=True)
class Bill:
    """The bill of a stage's attempts, or of a pipeline's. Hours and dollars are those of the attempts and of the evaluations beside them;
    seconds, and what follows from them, are those of the attempts."""

    attempts: tuple[AttemptBill, ...]
    evaluations: tuple[EvaluationBill, ...] = ()

    @property
    def of_attempts(self) -> Bill:
        """The same without evaluations."""
        return Bill(self.attempts)

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
        return sum(bill.device_hours for bill in self.attempts) + sum(one.device_hours for one in self.evaluations)

    @property
    def gpu_hours(self) -> float:
        return sum(bill.gpu_hours for bill in self.attempts) + sum(one.gpu_hours for one in self.evaluations)

    @property
    def usd(self) -> Decimal:
        return sum((bill.usd for bill in self.attempts), Decimal(0)) + sum((one.usd for one in self.evaluations), Decimal(0))

    @property
    def goodput(self) -> float | None:
        return self.seconds["step"] / self.held_s if self.held_s else None

    def difference_s(self) -> float:
        return sum(bill.difference_s() for bill in self.attempts)

    def remarks(self) -> Iterator[str]:
        for bill in self.attempts:
            yield from bill.remarks()
        for one in self.evaluations:
            if one.price is None:
                hours = f"{one.device_hours:.4f} device-hours"
                yield f"evaluation {one.question}: no price is known of device {one.device!r}; its {hours} are billed at $0"


def account(attempts: Sequence[AttemptTime], evaluations: Sequence[Evaluation] = ()) -> Bill:
    """The bill of one stage's attempts and evaluations.

    Pass all attempts under the stage's inputs in one call: a step is lost if a later attempt resumed from a checkpoint before it, and the
    time that an attempt spent on such steps is moved from `step` to `lost`.
    """
    ordered = sorted(attempts, key=lambda time: time.attempt)
    bills: list[AttemptBill] = []
    for place, time in enumerate(ordered):
        kept = min((later.resumed_from for later in ordered[place + 1 :]), default=None)
        bills.append(_bill(time, kept))
    return Bill(tuple(bills), tuple(EvaluationBill(one.question, one.device, one.device_s, one.price) for one in evaluations))


def merge(bills: Iterable[Bill]) -> Bill:
    """A pipeline's bill from its stages'."""
    bills = tuple(bills)
    return Bill(tuple(attempt for bill in bills for attempt in bill.attempts), tuple(one for bill in bills for one in bill.evaluations))


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
    # `min`, because the two are added up in different orders, so the last bit may differ
    lost = 0.0 if kept is None else min(_steps_after(time, kept), seconds["step"])
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
        pool=time.pool,
    )


def _held(time: AttemptTime) -> tuple[float, float, float]:
    """Device-seconds: (held, held before each node's first piece, held after its last piece).

    Before its first piece a bound node fetches the image and starts the container, so there is no agent yet to write a journal.
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
    """Device-seconds of `step` that were spent on steps after this one."""
    total = 0.0
    for node in sorted(time.nodes, key=lambda node: node.node):
        for first, last, seconds in node.runs:
            count = last - first + 1
            total += seconds * node.devices * min(count, max(0, last - step)) / count
    return total
