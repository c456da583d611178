"""After a run: where every device-second went, and what it cost.

Pure: turns journals and outcomes into bills. Refuses to read a store, to round money, and to let a second disappear: a bill whose booked
time is not its held time is an error (`AttemptBill.check`), never a correction.

Invariant: held = devices × (ended − bound) = Σ over records.HELD, to within max(0.1%, 50 ms × devices). Queueing holds nothing and is free.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal

from orchestrator.errors import OsctlError
from orchestrator.prices import Device, Prices, cost, load_prices
from orchestrator.records import HELD, WAITING, JournalPiece

__all__ = ["AttemptBill", "AttemptTime", "Bill", "Prices", "Unbalanced", "account", "load_prices", "merge"]

TOLERANCE = 0.001
"""Share of an attempt's held time."""
TOLERANCE_S = 0.05
"""Seconds a device: process start and death are seen to about so much."""


class Unbalanced(OsctlError):
    """Booked and held time differ."""


@dataclass(frozen=True)
class AttemptTime:
    """What is known of one attempt's time."""

    attempt: int
    devices: int
    """Of all nodes."""
    device: str
    """Name in the price list."""
    bound: float | None
    """Unix time at which devices were first held; none: not seen, the first journal piece counts."""
    ended: float | None
    """Unix time of death; none: it runs still, and each node is billed up to its last piece."""
    pieces: Sequence[JournalPiece]
    """Of all nodes, in any order."""
    resumed_from: int
    """Step of the checkpoint it went on from; 0: from the start."""
    last_published: int
    """Last step of its own, or of the one it resumed from, that is safe in the store."""


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
    """Device-seconds: devices × (ended − bound), from outside the journal."""
    unsaved_s: float
    """Device-seconds under `step` that come after the last published checkpoint: lost, should it die now."""
    is_gpu: bool
    usd_per_hour: Decimal

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

    def check(self) -> float:
        """The difference, in device-seconds. Raises Unbalanced where it is above the tolerance."""
        difference = self.difference_s()
        if abs(difference) > max(TOLERANCE * self.held_s, TOLERANCE_S * self.devices):
            raise Unbalanced(
                f"attempt {self.attempt}: {self.held_s:.3f} device-seconds were held, {self.booked_s:.3f} are booked. "
                "Its journal has a gap or an overlap; see `osctl cost -o json`"
            )
        return difference


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

    def check(self) -> float:
        """Sum of the differences, in device-seconds. Raises Unbalanced for the first attempt that does not balance."""
        return sum(bill.check() for bill in self.attempts)


def account(attempts: Sequence[AttemptTime], prices: Prices) -> Bill:
    """The bill of one stage's attempts.

    All attempts of the stage belong in one call: a step is lost when a later attempt went on from a checkpoint before it, and what an
    attempt spent on such steps is moved from `step` to `lost`.

    Raises:
        UsageError: a device is not in the price list.
        Unbalanced: a journal books time under a category that is none.
    """
    ordered = sorted(attempts, key=lambda time: time.attempt)
    bills: list[AttemptBill] = []
    for place, time in enumerate(ordered):
        kept = min((later.resumed_from for later in ordered[place + 1 :]), default=None)
        bills.append(_bill(time, prices.device(time.device), kept))
    return Bill(tuple(bills))


def merge(bills: Iterable[Bill]) -> Bill:
    """A pipeline's bill from its stages'."""
    return Bill(tuple(attempt for bill in bills for attempt in bill.attempts))


def _bill(time: AttemptTime, device: Device, kept: int | None) -> AttemptBill:
    seconds = dict.fromkeys(HELD, 0.0)
    waiting = 0.0
    for piece in time.pieces:
        for category, spent in piece.spent.items():
            if category in WAITING:
                waiting += spent * piece.devices
            elif category in seconds:
                seconds[category] += spent * piece.devices
            else:
                raise Unbalanced(f"attempt {time.attempt}: node {piece.node} books {category!r}. Known: {', '.join((*HELD, *WAITING))}")
    held, before, silent = _held(time)
    seconds["pull"] += before
    seconds["unaccounted"] += silent
    lost = 0.0 if kept is None else _steps_after(time, kept)
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
        is_gpu=device.is_gpu,
        usd_per_hour=device.usd_per_hour,
    )


def _held(time: AttemptTime) -> tuple[float, float, float]:
    """(device-seconds held, those of them before each node's first piece, those after its last).

    Before its first piece a node that is bound fetches the image and starts the container: nobody is there yet to write a journal.
    """
    pieces = [piece for piece in time.pieces if not set(piece.spent) <= set(WAITING)]
    ends = {piece.node: (piece.end, piece.devices) for piece in sorted(pieces, key=lambda piece: piece.end)}
    starts = {piece.node: (piece.start, piece.devices) for piece in sorted(pieces, key=lambda piece: -piece.start)}
    bound = time.bound if time.bound is not None else min((piece.start for piece in pieces), default=None)
    if bound is None:
        return 0.0, 0.0, 0.0
    before = sum(devices * max(0.0, start - bound) for start, devices in starts.values())
    if time.ended is None:
        return sum(devices * max(0.0, end - bound) for end, devices in ends.values()), before, 0.0
    unheard = time.devices - sum(devices for _, devices in ends.values())
    silent = sum(devices * max(0.0, time.ended - end) for end, devices in ends.values()) + unheard * (time.ended - bound)
    return time.devices * (time.ended - bound), before, silent


def _steps_after(time: AttemptTime, step: int) -> float:
    """Device-seconds of `step` that were spent on steps after this one.

    A piece's steps are taken as equally long. What a piece without a finished step spent belongs to the step under way.
    """
    total = 0.0
    reached: dict[int, int] = {}
    for piece in sorted(time.pieces, key=lambda piece: (piece.node, piece.seq)):
        spent = piece.spent.get("step", 0.0) * piece.devices
        last = reached.get(piece.node, time.resumed_from)
        if piece.first_step is None or piece.last_step is None:
            total += spent if last >= step else 0.0
            continue
        reached[piece.node] = piece.last_step
        count = piece.last_step - piece.first_step + 1
        after = min(count, max(0, piece.last_step - step))
        total += spent * after / count
    return total
