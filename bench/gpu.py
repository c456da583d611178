"""STDiT-XL/2 on one GPU, bf16: speed, memory and what divided attention saves. NOT RUN ON A GPU so far: there was none.

- MFU of a whole training step (the trainer's own strategy: forward, backward, clipping, AdamW, moving average; latents and captions
  cached) at 16x256², 16x512² and 64x512², with the batch and the policy that are fastest of those that fit: 50 steps between CUDA events.
- Most memory of those steps beside `opensora.planning.memory`'s prediction.
- The step with full attention (bench/attention.py) at 64x512², one clip, everything recomputed in both.
- One rank's part of a clip of 1 minute of 1080p on 8 GPUs (180 of 1440 frames, 8,160 tokens each), forward and backward: the exchange with
  the other ranks is a rearrangement of the same size, everything else is what a rank computes. Less than 75 GB.

MFU: model FLOPs (`opensora.planning.flops`, nothing recomputed counted) over 989.5 TFLOP/s. Published: 7.0, 5.5, 6.3%; NeMo's 7B model
48.2% (arXiv:2503.12964). Floor 35%, goal 45%. `--device cpu --tiny` runs the same code at sizes that mean nothing; `--calibration FILE
--price-name h100` also writes the points that `osctl plan` reads.

    .venv/bin/python bench/gpu.py
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import harness
import torch
from attention import with_full_attention
from einops import rearrange
from harness import Measured, Row
from torch import Tensor

from opensora.config import Activations, StageConfig
from opensora.diffusion import guidance, objective
from opensora.distributed import parallel
from opensora.distributed.ranks import Ranks
from opensora.model.stdit import STDiT
from opensora.planning import memory
from opensora.planning.flops import BACKWARD, forward_flops, full_attention_flops

PEAK = 989.5e12  # FLOP/s of an H100 or H800, bf16, dense
WARM = 5  # steps that compile, choose algorithms and fill the allocator
LIMIT = 75e9  # bytes for the part of the long clip
RANKS = 8  # that share it
SKIPPED = "not run on a GPU: no CUDA device here. `bench/gpu.py --device cpu --tiny` runs its code."


@dataclass(frozen=True)
class Scale:
    """Sizes of one run: the real ones, or such as a CPU can do."""

    model: dict[str, Any]
    clips: dict[str, tuple[int, int, int]]
    """Frames, height and width in pixels, by name."""
    batches: tuple[int, ...]
    long: tuple[int, int, int]
    captions: int
    steps: int
    warm: int
    mlp_chunks: int


REAL = Scale(
    model={},
    clips={"16x256²": (16, 256, 256), "16x512²": (16, 512, 512), "64x512²": (64, 512, 512)},
    batches=(1, 2, 4, 8, 16, 32, 64),
    long=(1440, 1088, 1920),
    captions=120,
    steps=50,
    warm=WARM,
    mlp_chunks=16,
)
TINY = Scale(
    model={"depth": 2, "width": 64, "heads": 2, "caption_width": 32, "caption_tokens": 8},
    clips={"16x256²": (2, 32, 32), "64x512²": (4, 32, 32)},
    batches=(1, 2),
    long=(16, 64, 64),
    captions=8,
    steps=2,
    warm=1,
    mlp_chunks=2,
)


def stage(scale: Scale, clip: tuple[int, int, int], batch: int, **changes: Any) -> StageConfig:
    frames, height, width = clip
    content: dict[str, Any] = {
        "model": scale.model,
        "objective": {"kind": "iddpm"},
        "data": {"source": {"kind": "manifest", "path": "none", "clips": 1}, "frames": frames, "height": height, "width": width},
        "autoencoder": {"kind": "kl", "path": "none"},
        "text": {"kind": "t5", "path": "none"},
        "optimizer": {},
        "steps": 1,
        "batch_size": batch,
        "checkpoint": {"every_steps": 1, "background": False},
    }
    return StageConfig.model_validate(content | changes)


# ------------------------------------------------------------------------------------------------------------------
# Clocks
# ------------------------------------------------------------------------------------------------------------------


class Clock:
    """Seconds between marks, on the device's own time line: the host waits once, at the end."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._marks = device, []  # type: tuple[torch.device, list[Any]]

    def mark(self) -> None:
        if self._device.type != "cuda":
            self._marks.append(time.perf_counter())
            return
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self._marks.append(event)

    def seconds(self) -> list[float]:
        if self._device.type != "cuda":
            return [after - before for before, after in zip(self._marks, self._marks[1:], strict=False)]
        torch.cuda.synchronize(self._device)
        return [before.elapsed_time(after) / 1e3 for before, after in zip(self._marks, self._marks[1:], strict=False)]


def peak(device: torch.device) -> int | None:
    """Most bytes allocated since `forget`."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


def forget(device: torch.device) -> None:
    """Give unused memory back, and begin to look for the peak anew."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def capacity(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else 16 << 30


# ------------------------------------------------------------------------------------------------------------------
# A training step
# ------------------------------------------------------------------------------------------------------------------


def model_of(config: StageConfig, device: torch.device, *, full: bool = False) -> STDiT:
    """As the trainer builds it, with random weights."""
    with torch.device(device):
        model = STDiT(config.model, config.latent_shape[1:], config.out_channels)
    if full:
        with_full_attention(model)
    model.keep(config.activations)
    model.train()
    if device.type == "cuda" and config.compile and config.parallel.sequence == 1:
        torch.compiler.reset()  # a second batch size would be compiled for any size, which the trainer's blocks are not
        for block in model.blocks:
            block.compile()
    return model


def autocast(config: StageConfig, device: torch.device) -> torch.autocast:
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda" and config.dtype == "bf16")


def training(config: StageConfig, captions: int, device: torch.device, *, full: bool = False) -> Iterator[None]:
    """A step each time it is asked for one; nothing waits for the device."""
    strategy = parallel.build(model_of(config, device, full=full), config, Ranks(0, 1, device))
    loss_of = objective.build(config.objective)
    generator = torch.Generator(device).manual_seed(0)
    clean = torch.randn(config.batch_size, *config.latent_shape, generator=generator, device=device)
    vectors = torch.randn(config.batch_size, captions, config.model.caption_width, generator=generator, device=device)
    flags = torch.zeros(3, device=device)
    number = 0
    while True:
        moment = loss_of.draw_time(config.batch_size, generator)
        noise = torch.randn(clean.shape, generator=generator, device=device)
        drop = torch.rand(config.batch_size, generator=generator, device=device) < config.model.caption_dropout
        with autocast(config, device):
            loss = loss_of.loss(guidance.conditional(strategy.model, vectors, None, drop), clean, moment, noise).mean()
        strategy.backward(loss)
        strategy.finite()
        strategy.reduce(flags)
        strategy.step(1e-5, (1 / (strategy.norm() + 1e-6)).clamp(max=1), number)
        number += 1
        yield


def timed(steps: Iterator[None], warm: int, count: int, device: torch.device) -> tuple[list[float], int | None]:
    """Seconds of each step after the warm ones, and their peak of memory."""
    forget(device)
    clock = Clock(device)
    for number in range(warm + count):
        if number == warm:
            clock.mark()
        next(steps)
        if number >= warm:
            clock.mark()
    return clock.seconds(), peak(device)


@dataclass(frozen=True)
class Best:
    """The fastest batch, and its policy."""

    config: StageConfig
    predicted: int
    tried: dict[str, float]
    """Clips a second, by batch."""


def best_batch(scale: Scale, clip: tuple[int, int, int], device: torch.device) -> Best:
    """Doubles the batch as long as a policy fits; few steps each."""
    found: list[tuple[float, StageConfig, int]] = []
    tried: dict[str, float] = {}
    kind: Literal["cuda", "cpu"] = "cuda" if device.type == "cuda" else "cpu"
    for batch in scale.batches:
        config = stage(scale, clip, batch)
        try:
            choice = memory.choose(config, capacity(device), 1, device=kind)
            config = memory.with_policy(config, choice.activations)
            seconds, _ = timed(training(config, scale.captions, device), scale.warm, max(2, scale.steps // 10), device)
        except (memory.DoesNotFit, torch.OutOfMemoryError) as error:
            tried[f"{batch}: {type(error).__name__}"] = 0.0
            break
        speed = batch / statistics.median(seconds)
        tried[f"{batch}, {memory.describe(config.activations)}"] = speed
        found.append((speed, config, choice.memory.total))
    if not found:
        raise SystemExit(f"bench/gpu: not one clip of {clip} fits this device")
    _, config, predicted = max(found, key=lambda each: each[0])
    return Best(config, predicted, tried)


def flops_of(config: StageConfig, captions: int, *, full: bool = False) -> float:
    """Of a step, forward and backward."""
    frames, tokens = config.tokens
    if full:
        return full_attention_flops(config.model, config.out_channels, frames, tokens) * (1.0 + BACKWARD) * config.batch_size
    return forward_flops(config.model, config.out_channels, frames, tokens, captions=captions) * (1.0 + BACKWARD) * config.batch_size


# ------------------------------------------------------------------------------------------------------------------
# One rank's part of a long clip
# ------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Alone:
    """Stands in for `opensora.model.sequence_parallel.Sequence`: the first of so many ranks, without the others, whose parts it takes from
    its own."""

    ranks: int

    def own_frames(self, x: Tensor, dim: int, frames: int) -> Tensor:
        return x.narrow(dim, 0, frames // self.ranks)

    def cut(self, frames: int, spatial: int) -> Alone:
        return self

    def to_tokens(self, x: Tensor) -> Tensor:
        """(B, T/n, S, D) -> (B, T, S/n, D): as many numbers, copied once, as the exchange does."""
        return rearrange(x, "B T (n S) D -> B (n T) S D", n=self.ranks).contiguous()

    def to_frames(self, x: Tensor) -> Tensor:
        return rearrange(x, "B (n T) S D -> B T (n S) D", n=self.ranks).contiguous()

    def collect(self, x: Tensor) -> Tensor:
        return x


def part_of_long(scale: Scale, device: torch.device) -> dict[str, Any]:
    """Forward and backward of an eighth of the clip, boundaries in host memory, the MLP in chunks."""
    shared = {"strategy": "fsdp", "sequence": RANKS}
    config = stage(scale, scale.long, 1, parallel=shared, compile=False)
    try:
        policy = memory.choose(config, round(LIMIT / (1 - memory.RESERVE)), RANKS).activations
    except memory.DoesNotFit:
        policy = Activations(recompute="full", offload=True, mlp_chunks=scale.mlp_chunks)
    config = memory.with_policy(config, policy)
    model = model_of(config, device)
    model.sequence = Alone(RANKS)  # type: ignore[assignment]
    channels, frames, rows, columns = config.latent_shape
    noisy = torch.randn(1, channels, frames, rows, columns, device=device)
    target = torch.randn(1, config.out_channels, frames // RANKS, rows, columns, device=device)
    captions = torch.randn(1, scale.captions, config.model.caption_width, device=device)

    def passes() -> Iterator[None]:
        while True:
            model.zero_grad()
            with autocast(config, device):
                loss = (model(noisy, torch.full((1,), 500.0, device=device), captions) - target).square().mean()
            loss.backward()
            yield

    seconds, most = timed(passes(), 1, 2, device)
    step = statistics.median(seconds)
    useful = flops_of(config, scale.captions) / RANKS
    return {
        "policy": memory.describe(policy),
        "step_s": step,
        "mfu": useful / step / PEAK,
        "peak_bytes": most,
        "predicted_bytes": memory.predict(config, devices=RANKS).total,
    }


# ------------------------------------------------------------------------------------------------------------------
# The bench
# ------------------------------------------------------------------------------------------------------------------


def measure(device: torch.device, scale: Scale, points: list[dict[str, Any]], _quick: bool) -> Measured:
    rows: list[Row] = []
    raw: dict[str, Any] = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "libraries": harness.libraries("torch"),
    }
    for name, clip in scale.clips.items():
        best = best_batch(scale, clip, device)
        config = best.config
        seconds, most = timed(training(config, scale.captions, device), scale.warm, scale.steps, device)
        step = statistics.mean(seconds)
        speed = flops_of(config, scale.captions) / step
        told = f"batch {config.batch_size}, {memory.describe(config.activations)}"
        raw[name] = {"batch": told, "tried": best.tried, "seconds": seconds, "peak_bytes": most, "predicted_bytes": best.predicted}
        rows.append(Row(f"MFU at {name} ({told}; published 5.5 to 7.0%)", 100 * speed / PEAK, "%", 35, 45))
        if most is not None:
            rows.append(Row(f"memory at {name}: off the prediction", abs(best.predicted / most - 1), "x", 0.1, 0.1, "less"))
        points.append(point(config, scale, step, speed, most, device))

    name, clip = list(scale.clips.items())[-1]
    both = memory.with_policy(stage(scale, clip, 1), Activations(recompute="full"))
    few = max(2, scale.steps // 10)
    divided, whole = (
        statistics.median(timed(training(both, scale.model.get("caption_tokens", 120), device, full=full), scale.warm, few, device)[0])
        for full in (False, True)
    )
    promised = flops_of(both, both.model.caption_tokens, full=True) / flops_of(both, both.model.caption_tokens)
    raw["full attention"] = {"clip": name, "stdit_s": divided, "full_s": whole, "flops_ratio": promised}
    rows.append(Row(f"STDiT against full attention at {name} (FLOPs: {promised:.2f}x)", whole / divided, "x", 5, 0.95 * promised))

    raw["1 minute of 1080p"] = long = part_of_long(scale, device)
    rows.append(Row(f"an eighth of 1 minute of 1080p ({long['policy']}): MFU", 100 * long["mfu"], "%"))
    if long["peak_bytes"] is not None:
        rows.append(Row("an eighth of 1 minute of 1080p: memory", long["peak_bytes"] / 1e9, "GB", LIMIT / 1e9, LIMIT / 1e9, "less"))
    return rows, raw


def point(config: StageConfig, scale: Scale, step: float, speed: float, most: int | None, device: torch.device) -> dict[str, Any]:
    """As `opensora.planning.calibration` has it."""
    frames, tokens = config.tokens
    return {
        "model": config.model.model_dump(mode="json"),
        "out_channels": config.out_channels,
        "frames": frames,
        "tokens": tokens,
        "captions": scale.captions,
        "batch": config.batch_size,
        "recompute": memory.describe(config.activations),
        "dtype": "bf16" if device.type == "cuda" else "fp32",
        "compiled": device.type == "cuda" and config.compile,
        "step_s": step,
        "tflops": speed / 1e12,
        "mfu": speed / PEAK,
        "peak_bytes": most,
    }


def skip(_quick: bool) -> Measured:
    return [], {"skipped": SKIPPED}


def main() -> None:
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--calibration", type=Path)
    parser.add_argument("--price-name", default="h100")
    chosen, rest = parser.parse_known_args()
    if chosen.device == "cuda" and not torch.cuda.is_available():
        harness.run("gpu", skip, rest)
        return
    points: list[dict[str, Any]] = []
    tiny = chosen.tiny or "--quick" in rest
    device = torch.device("cuda", 0) if chosen.device == "cuda" else torch.device("cpu")
    harness.run("gpu", partial(measure, device, TINY if tiny else REAL, points), [*rest, *(["--quick"] if tiny else [])])
    if chosen.calibration is not None:
        content = {
            "schema": 1,
            "device": chosen.price_name,
            "machine": f"{torch.cuda.get_device_name(device) if device.type == 'cuda' else harness.machine()}, torch {torch.__version__}",
            "date": datetime.date.today().isoformat(),
            "command": "bench/gpu.py --calibration FILE",
            "points": points,
        }
        chosen.calibration.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
