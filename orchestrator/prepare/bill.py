"""The bill of a preparation: device-seconds of each step, by device, and what they cost. Pure.

Owns how the attempts' records become lines, and how a line without a price is told: it is not priced, which is not the same as free.
Refuses to multiply (`orchestrator.recipe.prices.cost`), and prices of today: each attempt is billed at those that it wrote down.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from types import MappingProxyType
from typing import Any

from orchestrator.prepare.attempts import Attempt
from orchestrator.prepare.records import STEPS, Held, Intent, held_of

GPU = "gpu"
"""A GPU whose name in the price list was not written down."""
BETWEEN = "(between)"
"""Device-seconds of no step: start, end, publication, pods that had nothing to do; and of attempts before 0.3.0, which did not tell by
step."""


@dataclass(frozen=True)
class Line:
    """What a step has held of one device, in all attempts together."""

    step: str
    device: str
    """Name in the price list."""
    name: str
    """As the machine names it; `cpu`."""
    is_gpu: bool
    seconds: float
    """Device-seconds."""
    usd: Decimal | None
    """None: not priced."""


@dataclass(frozen=True)
class Bill:
    lines: tuple[Line, ...]
    captions_usd: Decimal
    """What the captions' server asked for."""

    def sorted(self) -> list[Line]:
        """In the order of the steps, cores before GPUs."""
        return sorted(self.lines, key=lambda line: (ORDER.index(line.step) if line.step in ORDER else len(ORDER), line.step, line.is_gpu))

    @property
    def core_hours(self) -> float:
        return sum(line.seconds for line in self.lines if not line.is_gpu) / 3600

    @property
    def gpu_hours(self) -> float:
        return sum(line.seconds for line in self.lines if line.is_gpu) / 3600

    @property
    def usd(self) -> Decimal:
        """Of what is priced."""
        return sum((line.usd for line in self.lines if line.usd is not None), self.captions_usd)

    @property
    def not_priced(self) -> tuple[str, ...]:
        """Names in the price list of devices that were held and have no price."""
        return tuple(dict.fromkeys(line.device for line in self.lines if line.usd is None))


ORDER = (*STEPS, BETWEEN)


def bill(attempts: Iterable[Attempt], status: Mapping[str, Any] = MappingProxyType({})) -> Bill:
    """Of a preparation. `status`: status.json, which tells of the attempt that runs now; what that has held by now is in the bill."""
    found: dict[tuple[str, str, str], Line] = {}
    captions = Decimal(0)
    for one in attempts:
        outcome = one.outcome
        captions += Decimal(repr(outcome.caption_usd)) if outcome is not None else 0
        if one.intent is None:  # it cannot be read, and nobody knows the prices of then
            continue
        held = outcome.held if outcome is not None else held_of(status, since=one.intent.created)
        cores_s = outcome.device_seconds if outcome is not None else None
        gpus_s = None
        if one.pods:  # they were held before the first step and after the last one
            cores_s, gpus_s = sum(pod.core_seconds for pod in one.pods), sum(pod.gpu_seconds for pod in one.pods)
        for line in _lines(one.intent, held, cores_s, gpus_s):
            key = line.step, line.device, line.name
            found[key] = _sum(found[key], line) if key in found else line
    return Bill(tuple(found.values()), captions)


def _lines(intent: Intent, held: Sequence[Held], cores_s: float | None, gpus_s: float | None = None) -> list[Line]:
    """Of one attempt.

    Args:
        cores_s: core-seconds of it all; None: it runs, on one machine.
        gpus_s: the same of its pods' GPUs; None: it has no pods.
    """
    found = []
    for one in held:
        gpu = one.kind == "cuda"
        found.append(
            Line(one.step, (intent.gpu or GPU) if gpu else intent.device, one.name, gpu, one.seconds, intent.usd(one.kind, one.seconds))
        )
    if cores_s is not None:
        rest = max(0.0, cores_s - sum(one.seconds for one in held if one.kind == "cpu"))
        found.append(Line(BETWEEN, intent.device, "cpu", False, rest, intent.usd("cpu", rest)))
    if gpus_s:
        rest = max(0.0, gpus_s - sum(one.seconds for one in held if one.kind == "cuda"))
        found.append(Line(BETWEEN, intent.gpu or GPU, GPU, True, rest, intent.usd("cuda", rest)))
    return found


def _sum(one: Line, other: Line) -> Line:
    usd = one.usd + other.usd if one.usd is not None and other.usd is not None else None
    return Line(one.step, one.device, one.name, one.is_gpu, one.seconds + other.seconds, usd)
