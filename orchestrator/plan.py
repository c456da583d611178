"""Ahead of a run: FLOPs, hours and dollars of every stage, with a range, beside the published run.

Pure. Refuses to look at a store or a clock. Counts what the arithmetic of training, of the judge and of the drawn clips needs; start-up,
encoding (once, cached), checkpoints, waiting and retries come on top and show in the bill (`orchestrator.cost`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from decimal import Decimal
from typing import Literal

from opensora import memory
from opensora.calibration import Calibration, Point, nearest
from opensora.config import Activations, Parallel, StageConfig
from opensora.flops import BACKWARD, executed, parameters, stage_flops, step_flops, train_flops_per_clip
from orchestrator.config import Pipeline, Published, Stage
from orchestrator.errors import Refused, UsageError
from orchestrator.prices import Device, Prices, cost

MEASURED_SPREAD = 0.1
"""A measured step gives its hours to ±10%. Arbitrary: about what a shared machine's step times vary between runs."""

FAR = 30.0
"""A calibrated point stands for a stage up to this ratio of their FLOPs a clip or tokens a batch. Arbitrary: beyond it the shapes of the
matrix products, and so their speed, have nothing to do with each other."""

NO_MONEY = Decimal(0)
Basis = Literal["given", "measured", "calibrated", "assumed", "committed", "import"]
"""given: --mfu. measured: steps of this stage's own attempts. calibrated: the nearest point of a calibration. assumed: the price list."""


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
class Fit:
    """What a stage needs of each device's memory, under the policy that it names or that was chosen for it."""

    activations: Activations
    memory: memory.Memory
    device_bytes: int | None
    """None: the price list does not know."""
    reason: str

    @property
    def fits(self) -> bool | None:
        return None if self.device_bytes is None else self.memory.total <= self.device_bytes * (1 - memory.RESERVE)


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
    source: str
    """Of the speed, in words."""
    fit: Fit | None
    """None where nothing is computed."""

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
    calibrations: Sequence[Calibration] = (),
    committed: Set[str] = frozenset(),
) -> Plan:
    """Plan what is left of a pipeline.

    Args:
        mfu: useful FLOPs over peak, in (0, 1], for all stages or by stage; wins over `measured`.
        measured: wall seconds of a training step by stage, waiting included; wins over `calibrations`.
        calibrations: steps that were timed on some machine; the nearest point wins over the price list's assumption.
        committed: stages that have a result already: they cost nothing more.

    Raises:
        UsageError: a device is not in the price list, an MFU is not in (0, 1], or the devices do not divide.
    """
    rows = tuple(
        _row(stage, prices, _of_stage(mfu, stage.name), (measured or {}).get(stage.name), calibrations, stage.name in committed)
        for stage in pipeline.stages
    )
    return Plan(
        rows,
        sum((row.expected for row in rows), NOTHING),
        sum((row.low for row in rows), NOTHING),
        sum((row.high for row in rows), NOTHING),
    )


def check_budget(plan: Plan, budget_usd: float | None, spent: Decimal = NO_MONEY) -> None:
    """Raises Refused where what was spent and what is expected are above the budget together; equal is allowed.

    None: no budget. A plan that costs nothing more is never refused.
    """
    if budget_usd is not None and plan.expected.usd and spent + plan.expected.usd > Decimal(str(budget_usd)):
        costs = f"the plan costs ${plan.expected.usd:,.2f}"
        raise Refused(
            f"budget_usd: {f'${spent:,.2f} are spent (osctl cost), and what is left of ' if spent else ''}{costs}, "
            f"the budget is ${Decimal(str(budget_usd)):,.2f}. Raise budget_usd, or launch fewer stages"
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
    _check_mfu(value)
    return value


def _check_mfu(value: float | None) -> None:
    if value is not None and not 0 < value <= 1:
        raise UsageError(f"mfu: {value} is not in (0, 1]. Give a fraction, e.g. 0.45 for 45%")


def fit(config: StageConfig, devices: int, device: Device) -> Fit:
    """What the stage needs of a device's memory; `auto` is decided as the trainer decides it.

    Raises:
        UsageError: the devices do not divide as the stage's `parallel` says.
    """
    kind: memory.DeviceKind = "cuda" if device.is_gpu else "cpu"
    size = round(device.hardware.memory_gib * 2**30) if device.hardware else None
    policy, reason = config.activations, "as the stage says"
    try:
        if policy.recompute == "auto":
            policy, reason = Activations(), "nothing is computed again where the memory is not known"
            if size is not None:
                choice = memory.choose(config, size, devices, device=kind)
                return Fit(choice.activations, choice.memory, size, choice.reason)
        return Fit(policy, memory.predict(memory.with_policy(config, policy), devices=devices, device=kind), size, reason)
    except memory.DoesNotFit as error:
        return Fit(error.activations, error.memory, size, str(error))
    except ValueError as error:
        raise UsageError(f"{error}. Use another number of devices") from error


def _row(
    stage: Stage, prices: Prices, mfu: float | None, step_s: float | None, calibrations: Sequence[Calibration], committed: bool
) -> Row:
    name = stage.spec.resources.device
    device = prices.device(name)
    training = stage_flops(stage.config, stage.devices)
    flops = training + extra_flops(stage.config)
    peak = device.peak_tflops * 1e12 * stage.devices
    needs = fit(stage.config, stage.devices, device) if training else None
    measured = training / (stage.config.steps * step_s * peak) if step_s and training else None
    speed = _speed(stage.config, name, device, mfu, measured, calibrations, needs.activations if needs else Activations())
    basis: Basis = "committed" if committed else "import" if not flops else speed.basis
    idle = basis in ("committed", "import")

    def at(reached: float) -> Estimate:
        return NOTHING if idle else _estimate(flops / (peak * reached), stage.devices, device)

    return Row(
        stage=stage.name,
        parent=stage.spec.parent,
        device=name,
        devices=stage.devices,
        steps=stage.config.steps,
        flops=flops,
        basis=basis,
        mfu=None if idle else speed.expected,
        expected=at(speed.expected),
        low=at(speed.high),
        high=at(speed.low),
        published=stage.spec.published,
        source=basis if idle else speed.source,
        fit=None if idle else needs,
    )


@dataclass(frozen=True)
class Speed:
    """Useful FLOPs over peak, from the pessimistic end to the optimistic one, and who says so."""

    basis: Basis
    low: float
    expected: float
    high: float
    source: str


def _speed(
    config: StageConfig,
    name: str,
    device: Device,
    given: float | None,
    measured: float | None,
    calibrations: Sequence[Calibration],
    activations: Activations,
) -> Speed:
    """A given speed and the stage's own are taken at their word; others are of other work, and slower by what is computed again."""
    if given is not None:
        return Speed("given", given, given, given, "--mfu")
    if measured is not None:
        return Speed("measured", measured / (1 + MEASURED_SPREAD), measured, measured / (1 - MEASURED_SPREAD), "steps of its own attempts")
    slower = executed(config, config.data, activations)
    found = calibrated(config, name, calibrations)
    if found is None:
        low, expected, high = (end / slower for end in (device.mfu.low, device.mfu.expected, device.mfu.high))
        return Speed("assumed", low, expected, high, f"assumed: {device.mfu_source.removeprefix('assumption: ')}")
    point, far, origin = found
    expected = min(1.0, point.tflops / device.peak_tflops * (4 / 3 if point.recompute.startswith("full") else 1) / slower)
    spread = MEASURED_SPREAD * math.sqrt(far)  # arbitrary: the farther, the less it says
    return Speed("calibrated", expected / (1 + spread), expected, min(1.0, expected / max(0.1, 1 - spread)), origin)


def calibrated(config: StageConfig, device: str, calibrations: Sequence[Calibration]) -> tuple[Point, float, str] | None:
    """The point that stands for a stage on a device, how far it is (`opensora.calibration.nearest`), and where it comes from in words."""
    points = {
        id(point): (point, calibration) for calibration in calibrations if calibration.device == device for point in calibration.points
    }
    frames, tokens = config.tokens
    batch = config.buckets[0].batch_size if config.data.buckets else config.batch_size
    found = nearest(
        [point for point, _ in points.values()],
        model=config.model,
        out_channels=config.out_channels,
        frames=frames,
        tokens=tokens,
        batch=batch,
    )
    if found is None or found[1] > FAR:
        return None
    point, far = found
    calibration = points[id(point)][1]
    return point, far, f"{point.frames}x{point.tokens} tokens at {point.tflops:.3g} TFLOP/s on {calibration.machine}, {calibration.date}"


# ------------------------------------------------------------------------------------------------------------------
# One size of clip on so many devices
# ------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Option:
    """One policy for one size of clip."""

    activations: Activations
    memory: memory.Memory
    fits: bool | None
    step_s: float


@dataclass(frozen=True)
class SizePlan:
    """What one size of clip takes on so many devices."""

    stage: StageConfig
    device: str
    devices: int
    device_bytes: int | None
    frames: int
    """T: tokens along time."""
    tokens: int
    """S: tokens of a frame."""
    flops: float
    """Useful FLOPs of a step, on all devices."""
    mfu: float
    """Without recomputation."""
    source: str
    options: tuple[Option, ...]
    """From fast to slow."""
    chosen: Option | None
    """None: nothing fits."""
    reason: str
    exchanged: int
    """Bytes that a device sends in a step to those it shares a clip with."""
    state_exchanged: int
    """Bytes that it sends for weights and gradients."""
    step_s: float | None
    """Of what was chosen: computing, and exchanging clips, which nothing hides. The way to the host is hidden where it is shorter."""

    @property
    def clip_tokens(self) -> int:
        return self.frames * self.tokens


def size_plan(
    config: StageConfig,
    prices: Prices,
    device_name: str,
    *,
    frames: int,
    height: int,
    width: int,
    devices: int,
    batch_size: int = 1,
    mfu: float | None = None,
    calibrations: Sequence[Calibration] = (),
) -> SizePlan:
    """Plan training steps on clips of one size: the fewest devices that share a clip such that some policy fits.

    Args:
        config: whose model, autoencoder and objective.
        frames, height, width: of the clips, in pixels.
        batch_size: clips of each group of devices.

    Raises:
        UsageError: the size does not divide into patches, or the device is not in the price list.
    """
    device = prices.device(device_name)
    _check_mfu(mfu)
    _check_shape(config, frames, height, width)
    kind: memory.DeviceKind = "cuda" if device.is_gpu else "cpu"
    size = round(device.hardware.memory_gib * 2**30) if device.hardware else None
    data = config.data.model_copy(update={"frames": frames, "height": height, "width": width, "buckets": ()})
    stage = config.model_copy(update={"data": data, "batch_size": batch_size, "accumulate": 1, "freeze": "none"})
    stage = _divided(stage, devices, kind, size)
    speed = _speed(stage, device_name, device, mfu, None, calibrations, Activations())
    step = _Step(stage, device, devices, speed.expected)
    options = tuple(
        Option(policy, needs, _fits(needs, size), step.seconds(policy)) for policy, needs in memory.options(stage, devices, device=kind)
    )
    chosen = next((option for option in options if option.fits is not False), None)
    token_frames, tokens = stage.tokens
    return SizePlan(
        stage=stage,
        device=device_name,
        devices=devices,
        device_bytes=size,
        frames=token_frames,
        tokens=tokens,
        flops=step.flops,
        mfu=speed.expected,
        source=speed.source,
        options=options,
        chosen=chosen,
        reason=_reason(options, chosen, size),
        exchanged=step.exchanged(chosen.activations if chosen else Activations(recompute="full")),
        state_exchanged=step.state_exchanged,
        step_s=chosen.step_s if chosen else None,
    )


def _check_shape(config: StageConfig, frames: int, height: int, width: int) -> None:
    factor, (pt, ph, pw) = config.autoencoder.factor, config.model.patch
    for text, pixels, unit in (("frames", frames, pt), ("height", height, factor * ph), ("width", width, factor * pw)):
        if pixels % unit:
            raise UsageError(f"--shape: {text} {pixels} is not a multiple of {unit}. Use {-(-pixels // unit) * unit}")


def _fits(needs: memory.Memory, size: int | None) -> bool | None:
    """Whether it does on a device of so many bytes; none: nobody knows how many those are."""
    return None if size is None else needs.total <= size * (1 - memory.RESERVE)


def _divided(stage: StageConfig, devices: int, kind: memory.DeviceKind, size: int | None) -> StageConfig:
    """The stage over so many devices, as few of which share a clip as the most saving policy needs to fit."""
    strategy: Literal["fsdp", "ddp"] = "fsdp" if devices > 1 else "ddp"
    shares = [share for share in range(1, devices + 1) if devices % share == 0]
    stages = [stage.model_copy(update={"parallel": Parallel(strategy=strategy, sequence=share)}) for share in shares]

    def fits(stage: StageConfig) -> bool:
        least = memory.with_policy(stage, memory.policies(stage, kind)[-1])
        return _fits(memory.predict(least, devices=devices, device=kind), size) is not False

    return next((stage for stage in stages if fits(stage)), stages[-1])


class _Step:
    """What one training step of a stage costs on so many devices, all of them at this share of their peak."""

    def __init__(self, stage: StageConfig, device: Device, devices: int, mfu: float) -> None:
        self._stage, self._device, self._devices, self._mfu = stage, device, devices, mfu
        self.flops = step_flops(stage, devices)
        self._share, self._value = stage.parallel.sequence, memory.BF16 if device.is_gpu else memory.FP32
        frames, tokens = stage.tokens
        self._stream = stage.batch_size * math.ceil(frames / self._share) * tokens * stage.model.width * self._value
        """Bytes of the token stream that one device holds."""

    def exchanged(self, policy: Activations) -> int:
        """Bytes that one device sends to those that share its clips: two exchanges a block, forward, backward and recomputed."""
        passes = 1 + 1 + (policy.recompute == "full")
        return round(2 * self._stage.model.depth * passes * self._stream * (self._share - 1) / self._share)

    @property
    def state_exchanged(self) -> int:
        """Bytes that one device sends of weights, gathered for the forward and again for the backward pass, and of fp32 gradients."""
        weights = parameters(self._stage.model, self._stage.out_channels)
        return round(weights * (self._devices - 1) / self._devices * (2 * self._value + memory.FP32))

    def seconds(self, policy: Activations) -> float:
        computed = self.flops * executed(self._stage, self._stage.data, policy)
        computing = computed / (self._device.peak_tflops * 1e12 * self._mfu * self._devices)
        hardware = self._device.hardware
        if hardware is None:
            return computing
        sent = 2 * self._stage.model.depth * self._stream / policy.every if policy.offload else 0
        return max(computing, sent / (hardware.host_gb_s * 1e9)) + self.exchanged(policy) / (hardware.link_gb_s * 1e9)


def _reason(options: Sequence[Option], chosen: Option | None, size: int | None) -> str:
    if size is None:
        return "the device's memory is not in the price list"
    limit = f"{size * (1 - memory.RESERVE) / 1e9:.1f} GB ({size / 1e9:.1f} GB less {memory.RESERVE:.0%})"
    best = chosen or min(options, key=lambda option: option.memory.total)
    text = f"{memory.describe(best.activations)} needs {best.memory.total / 1e9:.1f} GB of {limit}"
    return f"the fastest that fits: {text}" if chosen else f"nothing fits: {text}. Use more devices, or shorter clips"


def _estimate(wall_s: float, devices: int, device: Device) -> Estimate:
    hours = wall_s * devices / 3600
    usd = cost(Decimal(repr(wall_s)) * devices, device.usd_per_hour)
    return Estimate(hours, hours if device.is_gpu else 0.0, wall_s / 3600, usd)
