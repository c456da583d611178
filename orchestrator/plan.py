"""Ahead of a run: FLOPs, hours and dollars of every stage, with a range, beside the published run.

Pure. Refuses to look at a store or a clock. Counts what the arithmetic of training, of the judge and of the drawn clips needs; start-up,
encoding (once, cached), checkpoints, waiting and retries come on top and show in the bill (`orchestrator.cost`).
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass
from decimal import Decimal
from typing import Literal

from opensora.config import StageConfig
from opensora.flops import BACKWARD, stage_flops, train_flops_per_clip
from orchestrator.config import Pipeline, Published, Stage
from orchestrator.errors import Refused, UsageError
from orchestrator.prices import Device, Prices, cost

MEASURED_SPREAD = 0.1
"""A measured step gives its hours to ±10%. Arbitrary: about what a shared machine's step times vary between runs."""

Basis = Literal["given", "measured", "assumed", "committed", "import"]


@dataclass(frozen=True)
class Estimate:
    """One stage, or all of them, at one speed."""

    device_hours: float
    gpu_hours: float
    """0 on a CPU."""
    wall_h: float
    usd: Decimal

    def __add__(self, other: Estimate) -> Estimate:
        return Estimate(
            self.device_hours + other.device_hours, self.gpu_hours + other.gpu_hours, self.wall_h + other.wall_h, self.usd + other.usd
        )


NOTHING = Estimate(0.0, 0.0, 0.0, Decimal(0))


@dataclass(frozen=True)
class Row:
    """What is still to be paid for one stage."""

    stage: str
    parent: str | None
    device: str
    devices: int
    steps: int
    flops: float
    """Training, judging and drawing; the whole stage, whatever is committed."""
    basis: Basis
    """Where the speed comes from."""
    mfu: float | None
    """Useful FLOPs over the devices' peak; none where nothing is computed."""
    expected: Estimate
    low: Estimate
    """Optimistic."""
    high: Estimate
    """Pessimistic."""
    published: Published | None

    @property
    def ratio(self) -> float | None:
        """Planned over published hours; none where nothing is published or nothing is left to do."""
        reference = self.published.gpu_hours if self.published else 0.0
        return self.expected.gpu_hours / reference if reference and self.expected.gpu_hours else None


@dataclass(frozen=True)
class Plan:
    rows: tuple[Row, ...]
    expected: Estimate
    """All stages, one after another."""
    low: Estimate
    high: Estimate

    @property
    def published_gpu_hours(self) -> float:
        return sum(row.published.gpu_hours for row in self.rows if row.published)

    @property
    def published_usd(self) -> Decimal:
        return sum((Decimal(str(row.published.usd)) for row in self.rows if row.published), Decimal(0))

    @property
    def ratio(self) -> float | None:
        """Planned over published hours; none where some published stage is committed already, so that the two are not the same work."""
        reference = self.published_gpu_hours
        partial = any(row.basis == "committed" for row in self.rows)
        return self.expected.gpu_hours / reference if reference and not partial else None


def plan(
    pipeline: Pipeline,
    prices: Prices,
    *,
    mfu: float | Mapping[str, float] | None = None,
    measured: Mapping[str, float] | None = None,
    committed: Set[str] = frozenset(),
) -> Plan:
    """Plan what is left of a pipeline.

    Args:
        mfu: useful FLOPs over peak, in (0, 1], for all stages or by stage; wins over `measured`.
        measured: wall seconds of a training step by stage, waiting included; wins over the price list's assumption.
        committed: stages that have a result already: they cost nothing more.

    Raises:
        UsageError: a device is not in the price list, or an MFU is not in (0, 1].
    """
    rows = tuple(
        _row(stage, prices, _of_stage(mfu, stage.name), (measured or {}).get(stage.name), stage.name in committed)
        for stage in pipeline.stages
    )
    return Plan(
        rows,
        sum((row.expected for row in rows), NOTHING),
        sum((row.low for row in rows), NOTHING),
        sum((row.high for row in rows), NOTHING),
    )


def check_budget(plan: Plan, budget_usd: float | None) -> None:
    """Raises Refused where the expected dollars are above the budget; equal is allowed. None: no budget."""
    if budget_usd is not None and plan.expected.usd > Decimal(str(budget_usd)):
        raise Refused(
            f"budget_usd: the plan costs ${plan.expected.usd:,.2f}, the budget is ${Decimal(str(budget_usd)):,.2f}. "
            "Raise budget_usd, or launch fewer stages"
        )


def extra_flops(config: StageConfig) -> float:
    """The judge's clips and the drawn ones: each sampling step is a forward pass, two under guidance.

    Clips of another length than the stage's count by their frames. A stage of images is judged on as many images beside its clips.
    """
    frames = config.data.frames
    per_clip = train_flops_per_clip(config) / (1 + BACKWARD)
    judged = config.evaluate.clips * (config.evaluate.frames / frames + (frames == 1)) if config.evaluate else 0
    clips = len(config.prompts) + judged
    passes = config.sampling.steps * (1 if config.sampling.guidance == 1 else 2)
    return clips * passes * per_clip


def _of_stage(mfu: float | Mapping[str, float] | None, stage: str) -> float | None:
    value = mfu.get(stage) if isinstance(mfu, Mapping) else mfu
    if value is not None and not 0 < value <= 1:
        raise UsageError(f"mfu: {value} is not in (0, 1]. Give a fraction, e.g. 0.45 for 45%")
    return value


def _row(stage: Stage, prices: Prices, mfu: float | None, step_s: float | None, committed: bool) -> Row:
    device = prices.device(stage.spec.resources.device)
    training = stage_flops(stage.config, stage.devices)
    flops = training + extra_flops(stage.config)
    peak = device.peak_tflops * 1e12 * stage.devices
    speeds = _speeds(device, mfu, training / (stage.config.steps * step_s * peak) if step_s and training else None)
    basis: Basis = "committed" if committed else "import" if not flops else speeds[0]
    idle = basis in ("committed", "import")

    def at(speed: float) -> Estimate:
        return NOTHING if idle else _estimate(flops / (peak * speed), stage.devices, device)

    _, pessimistic, expected, optimistic = speeds
    return Row(
        stage=stage.name,
        parent=stage.spec.parent,
        device=stage.spec.resources.device,
        devices=stage.devices,
        steps=stage.config.steps,
        flops=flops,
        basis=basis,
        mfu=None if idle else expected,
        expected=at(expected),
        low=at(optimistic),
        high=at(pessimistic),
        published=stage.spec.published,
    )


def _speeds(device: Device, given: float | None, measured: float | None) -> tuple[Basis, float, float, float]:
    """(basis, pessimistic MFU, expected MFU, optimistic MFU). A given one is taken at its word."""
    if given is not None:
        return "given", given, given, given
    if measured is not None:
        return "measured", measured / (1 + MEASURED_SPREAD), measured, measured / (1 - MEASURED_SPREAD)
    return "assumed", device.mfu.low, device.mfu.expected, device.mfu.high


def _estimate(wall_s: float, devices: int, device: Device) -> Estimate:
    hours = wall_s * devices / 3600
    usd = cost(Decimal(repr(wall_s)) * devices, device.usd_per_hour)
    return Estimate(hours, hours if device.is_gpu else 0.0, wall_s / 3600, usd)
