"""Before a run: what training on clips of one size needs on a number of devices. Memory, time and bytes sent, for each policy. Pure.

Refuses to read a store, a device or a clock: the numbers for GPUs are derived from the code, not measured.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from opensora.config import Activations, Parallel, StageConfig
from opensora.planning import memory
from opensora.planning.calibration import Calibration
from opensora.planning.flops import executed, parameters, step_flops
from opensora.planning.sized_model import BF16, FP32, DeviceKind
from orchestrator.accounting.speed import check_mfu, speed_of
from orchestrator.errors import UsageError
from orchestrator.recipe.prices import Device, Prices


@dataclass(frozen=True)
class Option:
    """One policy of activations for one size of clip."""

    activations: Activations
    memory: memory.Memory
    fits: bool | None
    """None means the device's memory is not known."""
    step_s: float
    """Seconds of a training step."""


@dataclass(frozen=True)
class SizePlan:
    """What training on clips of one size needs on a number of devices."""

    stage: StageConfig
    """The stage with clips of this size, divided over the devices."""
    device: str
    """The device's name in the price list."""
    devices: int
    device_bytes: int | None
    """Memory of a device. None means that the price list does not have it."""
    frames: int
    """T, the tokens along time."""
    tokens: int
    """S, the tokens of a frame."""
    flops: float
    """Useful FLOPs of a step, on all devices."""
    mfu: float
    """Useful FLOPs over the peak, if nothing is computed again."""
    source: str
    """Where that number comes from, in words."""
    options: tuple[Option, ...]
    """The options, the fastest first."""
    chosen: Option | None
    """None means nothing fits."""
    reason: str
    exchanged: int
    """Bytes that a device sends in a step to the devices with which it shares a clip."""
    state_exchanged: int
    """Bytes that a device sends in a step for weights and gradients."""
    step_s: float | None
    """Seconds of a step with the chosen option: computing, plus exchanging parts of clips, which does not overlap with computing. Sending
    to the host overlaps, as long as it takes less time than computing."""

    @property
    def clip_tokens(self) -> int:
        """T × S."""
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
    """Plan training steps on clips of one size. As few devices share a clip as possible, so that some policy fits.

    Args:
        config: the stage; its model, autoencoder and objective count.
        frames, height, width: size of the clips, in frames and pixels.
        devices: number of devices that train.
        batch_size: clips of each group of devices that share a clip.
        mfu: useful FLOPs over peak, in (0, 1]. It is used before `calibrations`.

    Raises:
        UsageError: the size does not divide into patches, the device is not in the price list, or `mfu` is not in (0, 1].
    """
    device = prices.device(device_name)
    check_mfu(mfu)
    _check_shape(config, frames, height, width)
    kind: DeviceKind = "cuda" if device.is_gpu else "cpu"
    size = round(device.hardware.memory_gib * 2**30) if device.hardware else None
    data = config.data.model_copy(update={"frames": frames, "height": height, "width": width, "buckets": ()})
    stage = config.model_copy(update={"data": data, "batch_size": batch_size, "accumulate": 1, "freeze": "none"})
    stage = _divided(stage, devices, kind, size)
    speed = speed_of(stage, device_name, device, mfu, None, calibrations, Activations())
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
    """Whether a device with `size` bytes is large enough. None means its size is not known."""
    return None if size is None else needs.total <= size * (1 - memory.RESERVE)


def _divided(stage: StageConfig, devices: int, kind: DeviceKind, size: int | None) -> StageConfig:
    """The stage divided over the devices. As few of them share a clip as possible, so that the policy that saves most memory fits."""
    strategy: Literal["fsdp", "ddp"] = "fsdp" if devices > 1 else "ddp"
    small = [share for share in range(1, math.isqrt(devices) + 1) if devices % share == 0]
    shares = sorted({*small, *(devices // share for share in small)})
    stages = [stage.model_copy(update={"parallel": Parallel(strategy=strategy, sequence=share)}) for share in shares]

    def fits(stage: StageConfig) -> bool:
        least = memory.with_policy(stage, memory.policies(stage, kind)[-1])
        return _fits(memory.predict(least, devices=devices, device=kind), size) is not False

    return next((stage for stage in stages if fits(stage)), stages[-1])


class _Step:
    """What one training step of a stage costs on a number of devices that all reach the share `mfu` of their peak."""

    def __init__(self, stage: StageConfig, device: Device, devices: int, mfu: float) -> None:
        self._stage, self._device, self._devices, self._mfu = stage, device, devices, mfu
        self.flops = step_flops(stage, devices)
        self._share, self._value = stage.parallel.sequence, BF16 if device.is_gpu else FP32
        frames, tokens = stage.tokens
        self._stream = stage.batch_size * math.ceil(frames / self._share) * tokens * stage.model.width * self._value
        """Bytes of the token stream that one device holds."""

    def exchanged(self, policy: Activations) -> int:
        """Bytes that one device sends to those that share its clips: two exchanges in each block, for each pass through it."""
        passes = 1 + 1 + (policy.recompute == "full")
        return round(2 * self._stage.model.depth * passes * self._stream * (self._share - 1) / self._share)

    @property
    def state_exchanged(self) -> int:
        """Bytes that one device sends of weights, which are gathered for the forward and again for the backward pass, and of gradients."""
        weights = parameters(self._stage.model, self._stage.out_channels)
        return round(weights * (self._devices - 1) / self._devices * (2 * self._value + FP32))

    def seconds(self, policy: Activations) -> float:
        """Seconds of the whole step."""
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
