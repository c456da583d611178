"""How fast a stage trains on a device: as a share of the device's peak (MFU), with a range. Pure.

Owns which of several sources is used: the caller's own number, the stage's own attempts, a calibration, the price list's assumption.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from opensora.config import Activations, StageConfig
from opensora.planning.calibration import Calibration, Point, nearest
from opensora.planning.flops import executed
from orchestrator.errors import UsageError
from orchestrator.recipe.prices import Device

MEASURED_SPREAD = 0.1
"""A measured step predicts hours to ±10%. Arbitrary: a shared machine's step times vary about this much between runs."""

FAR = 30.0
"""A calibrated point is used for a stage up to this ratio of their FLOPs per clip or tokens per batch. Arbitrary: beyond it the matrix
products have other shapes, and so another speed."""

Basis = Literal["given", "measured", "calibrated", "assumed", "committed", "import"]
"""given: --mfu. measured: steps of this stage's own attempts. calibrated: the nearest point of a calibration. assumed: the price list."""


def check_mfu(value: float | None) -> None:
    """Raise UsageError if an MFU is not in (0, 1]. None means no MFU, which is allowed."""
    if value is not None and not 0 < value <= 1:
        raise UsageError(f"mfu: {value} is not in (0, 1]. Give a fraction, e.g. 0.45 for 45%")


@dataclass(frozen=True)
class Speed:
    """Useful FLOPs over the devices' peak, with a range, and where these numbers come from."""

    basis: Basis
    low: float
    expected: float
    high: float
    source: str


def speed_of(
    config: StageConfig,
    name: str,
    device: Device,
    given: float | None,
    measured: float | None,
    calibrations: Sequence[Calibration],
    activations: Activations,
) -> Speed:
    """The speed of a stage on a device called `name`.

    A given speed, and one that was measured on the stage itself, are used as they are. Any other speed comes from other work, and is
    reduced by the share that `activations` computes again.

    Args:
        given: MFU that the caller wants, in (0, 1].
        measured: MFU of the stage's own attempts.
    """
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
    spread = MEASURED_SPREAD * math.sqrt(far)  # arbitrary: a farther point is less certain
    return Speed("calibrated", expected / (1 + spread), expected, min(1.0, expected / max(0.1, 1 - spread)), origin)


def calibrated(config: StageConfig, device: str, calibrations: Sequence[Calibration]) -> tuple[Point, float, str] | None:
    """(point, distance, source in words) of the calibrated point to use for a stage on a device. None means no point is near enough.

    The distance is that of `opensora.planning.calibration.nearest`.
    """
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
