"""What a training step took on a device: the files that `osctl plan` takes its speeds from, instead of assuming one.

Owns their schema and which of their points stands for a stage. Refuses to know prices and peaks of devices, and never imports torch.

A file is made by a script of `bench/` and tells the device (by its name in the price list), the machine, the date and the command that
made it. The shipped ones lie in `configs/calibration/`; a user's own is named by `--calibration` or OSCTL_CALIBRATION.
"""

from __future__ import annotations

import datetime
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from opensora.config import Frozen, ModelConfig
from opensora.planning.flops import BACKWARD, forward_flops


class Point(Frozen):
    """One size of model and clip, timed."""

    model: ModelConfig
    """The network."""
    out_channels: PositiveInt
    """C of the prediction: `latent_channels` for flow, twice that for iddpm."""
    frames: PositiveInt
    """T: tokens along time."""
    tokens: PositiveInt
    """S: tokens of a frame."""
    captions: PositiveInt
    """L: caption tokens that the step computed with."""
    batch: PositiveInt
    """Clips of a data-parallel rank and step."""
    devices: PositiveInt = 1
    """Ranks of the run, one a device."""
    sequence: PositiveInt = 1
    """Of them, ranks that shared each clip."""
    strategy: Literal["ddp", "fsdp", "colossalai"] = "ddp"
    """As in a stage's `parallel`."""
    recompute: str = "none"
    """What was computed again, e.g. `none`, `selective`, `full`, `full every 4 offload`."""
    dtype: Literal["fp32", "bf16"]
    """Type of the matrix products."""
    compiled: bool = False
    """Whether the blocks were compiled."""
    step_s: PositiveFloat
    """Wall seconds of a whole step: forward, backward, exchange and update."""
    tflops: PositiveFloat
    """Useful TFLOP/s of one device, as `opensora.planning.flops` counts them: `flops() / step_s` to within 1%."""
    mfu: PositiveFloat
    """`tflops` over the peak of the device in the price list."""
    peak_bytes: NonNegativeInt | None = None
    """Most memory of one device; none: not measured."""

    def flops(self) -> float:
        """Useful FLOPs of one device in one step, recomputation not counted."""
        forward = forward_flops(self.model, self.out_channels, self.frames, self.tokens, captions=self.captions)
        return forward * (1 + BACKWARD) * self.batch / self.sequence

    @model_validator(mode="after")
    def _says_one_thing(self) -> Point:
        tflops = self.flops() / self.step_s / 1e12
        if not math.isclose(tflops, self.tflops, rel_tol=0.01):
            raise ValueError(f"tflops {self.tflops} is not what {self.step_s} s a step make: {tflops:.4g}")
        return self


class Calibration(Frozen):
    """One file: the points of one device, timed by one command."""

    schema_: Literal[1] = Field(alias="schema", default=1)
    """Version of this format."""
    device: str
    """Name in the price list, e.g. `h100` or `cpu-core`."""
    machine: str
    """What it really was, in words: processor or GPU, cores, memory, libraries."""
    date: datetime.date
    """Of the measurement."""
    command: str
    """That repeats it."""
    points: tuple[Point, ...] = Field(min_length=1)
    """What was timed."""


def read(path: Path) -> Calibration:
    """Raises OSError; pydantic.ValidationError for what does not fit the schema."""
    return Calibration.model_validate_json(path.read_bytes())


def nearest(
    points: Iterable[Point], *, model: ModelConfig, out_channels: int, frames: int, tokens: int, batch: int
) -> tuple[Point, float] | None:
    """The point that stands for a stage, and how far it is: the largest ratio, at least 1, between the FLOPs of a clip or the tokens of a
    batch of the two. None where there are no points.

    Speed follows from how large the matrix products are (tokens of a batch) and how wide (FLOPs of a clip), so those are compared.
    """

    def distance(point: Point) -> float:
        clip = forward_flops(point.model, point.out_channels, point.frames, point.tokens, captions=point.captions)
        ours = forward_flops(model, out_channels, frames, tokens)
        work, size = math.log(clip / ours), math.log(point.frames * point.tokens * point.batch / (frames * tokens * batch))
        return max(abs(work), abs(size))

    found = min(points, key=distance, default=None)
    return None if found is None else (found, math.exp(distance(found)))
