"""A training step on one thread of a CPU, fp32: forward, backward and AdamW. As a share of sgemm, and beside diffusers' Latte.

sgemm is torch.mm of 2048 x 2048 matrices in the same process; our own layers use a faster one on some CPUs (`opensora.model.linear`), so a
step can be above it: the share of that product is told beside it. Latte (LatteTransformer3DModel: spatial and temporal blocks in turn, each
with an MLP of its own) has the same width, heads, tokens and captions, and as many blocks as make the same FLOPs; torch's FlopCounterMode
counts both, and a difference above 2% is refused. Both are updated by the same AdamW and see the same latents, times and captions.
Floors 80% of sgemm and 1.05x Latte, goals 90% and 1.2x. `--calibration FILE` also writes the points that `osctl plan` reads.

    OMP_NUM_THREADS=1 .venv/bin/python bench/step.py
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import harness
import torch
from gpu import training
from harness import Measured, Row
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from opensora.config import ModelConfig, OptimizerConfig, StageConfig, read_stage
from opensora.model import linear
from opensora.model.stdit import STDiT
from opensora.optim.adamw import AdamW
from opensora.planning.flops import BACKWARD, forward_flops

PEAK_TFLOPS = 0.1  # of `cpu-core` in configs/prices.yaml: what `mfu` of a calibration point is a share of


@dataclass(frozen=True)
class Size:
    """Of model and clip."""

    width: int
    heads: int
    depth: int
    pairs: int
    """Of Latte's blocks, spatial and temporal."""
    frames: int
    side: int
    """Tokens along rows and columns."""
    captions: int

    @property
    def tokens(self) -> int:
        return self.side**2

    @property
    def model(self) -> ModelConfig:
        return ModelConfig(
            depth=self.depth, width=self.width, heads=self.heads, caption_width=self.width, caption_tokens=self.captions, caption_dropout=0
        )


FULL = Size(width=384, heads=6, depth=3, pairs=2, frames=16, side=8, captions=32)
WIDE = Size(width=768, heads=12, depth=3, pairs=2, frames=16, side=8, captions=32)
QUICK = Size(width=192, heads=3, depth=3, pairs=2, frames=8, side=4, captions=8)
DEMO = Path(__file__).resolve().parent.parent / "configs" / "demo" / "stage2.yaml"


@dataclass(frozen=True)
class Inputs:
    noisy: Tensor  # (B, C, T, H, W)
    time: Tensor  # (B,)
    captions: Tensor  # (B, L, D)
    target: Tensor  # (B, 2C, T, H, W)


def inputs_digest(size: Size) -> Inputs:
    generator = torch.Generator().manual_seed(0)
    shape = (size.frames, 2 * size.side, 2 * size.side)
    return Inputs(
        torch.randn(1, 4, *shape, generator=generator),
        torch.randint(0, 1000, (1,), generator=generator),
        torch.randn(1, size.captions, size.width, generator=generator),
        torch.randn(1, 8, *shape, generator=generator),
    )


def training_step(network: nn.Module, call: Callable[[], Tensor], target: Tensor) -> Callable[[], None]:
    """Forward, backward, update."""
    weights = {name: weight for name, weight in network.named_parameters() if weight.requires_grad}
    optimizer = AdamW(weights, OptimizerConfig())

    def step() -> None:
        for weight in weights.values():
            weight.grad = None
        loss = (call() - target).square().mean()
        loss.backward()
        gradients = [torch.zeros_like(weight) if weight.grad is None else weight.grad for weight in weights.values()]
        optimizer.step(gradients, 1e-4)

    return step


def ours(size: Size) -> Callable[[], None]:
    model, given = STDiT(size.model, (size.frames, 2 * size.side, 2 * size.side), 8), inputs_digest(size)
    return training_step(model, lambda: model(given.noisy, given.time, given.captions), given.target)


def latte(size: Size) -> Callable[[], None]:
    from diffusers import LatteTransformer3DModel

    model = LatteTransformer3DModel(
        num_attention_heads=size.heads,
        attention_head_dim=size.width // size.heads,
        in_channels=4,
        out_channels=8,
        num_layers=size.pairs,
        cross_attention_dim=size.width,
        attention_bias=True,
        sample_size=2 * size.side,
        patch_size=2,
        activation_fn="gelu-approximate",
        num_embeds_ada_norm=1000,
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        norm_eps=1e-6,
        caption_channels=size.width,
        video_length=size.frames,
    ).train()
    given = inputs_digest(size)

    def call() -> Tensor:
        out: Tensor = model(given.noisy, timestep=given.time, encoder_hidden_states=given.captions, return_dict=False)[0]
        return out

    return training_step(model, call, given.target)


def counted(step: Callable[[], None]) -> int:
    """FLOPs of one call, as torch counts them, who has no formula for the product of `opensora.model.linear`."""

    def product(x: Sequence[int], weight: Sequence[int], *_: object, out_shape: object = None, **__: object) -> int:
        return 2 * math.prod(x) * weight[0]

    with FlopCounterMode(
        display=False, custom_mapping={torch.ops.mkldnn._linear_pointwise: product} if linear.AVAILABLE else {}
    ) as counter:
        step()
    return int(counter.get_total_flops())


def square(side: int) -> Callable[[], object]:
    """torch.mm: MKL on x86."""
    a, b = torch.randn(side, side), torch.randn(side, side)
    return lambda: a @ b


def square_of_linear(side: int) -> Callable[[], object]:
    """The product that our layers use on a CPU: oneDNN."""
    layer, a = linear.Linear(side, side), torch.randn(side, side)
    return torch.no_grad()(lambda: layer(a))


def compare(size: Size, rounds: int, side: int) -> dict[str, float]:
    """GFLOP/s of sgemm, ours and Latte's, and the FLOPs of both, from one interleaved run."""
    ways = {"ours": ours(size), "latte": latte(size)}
    flops = {name: counted(step) for name, step in ways.items()}
    apart = flops["latte"] / flops["ours"] - 1
    if abs(apart) > 0.02:
        raise SystemExit(f"bench/step: Latte's FLOPs are {apart:+.1%} of ours, at most 2% is equal work; choose other depths")
    seconds = harness.interleaved(ways | {"sgemm": square(side), "own_sgemm": square_of_linear(side)}, rounds)
    done = flops | {"sgemm": 2 * side**3, "own_sgemm": 2 * side**3}
    speeds = {f"{name}_gflops": done[name] / took / 1e9 for name, took in seconds.items()}
    return speeds | {f"{name}_s": took for name, took in seconds.items()} | {f"{name}_flops": float(count) for name, count in flops.items()}


def measure(quick: bool) -> Measured:
    torch.set_num_threads(1)
    rounds, side = (1, 256) if quick else (8, 2048)
    sizes = {"quick": QUICK} if quick else {"width 384": FULL, "width 768": WIDE}
    rows: list[Row] = []
    raw: dict[str, Any] = {"rounds": rounds, "sgemm_side": side, "libraries": harness.libraries("torch", "diffusers")}
    for name, size in sizes.items():
        raw[name] = found = compare(size, rounds if size is not WIDE else 3, side)
        rows += [
            Row(f"CPU step, {name}: share of sgemm", found["ours_gflops"] / found["sgemm_gflops"], "x", 0.8, 0.9),
            Row(f"CPU step, {name}: share of the product that its own layers use", found["ours_gflops"] / found["own_sgemm_gflops"], "x"),
            Row(f"CPU step, {name}: against Latte at equal FLOPs", found["ours_gflops"] / found["latte_gflops"], "x", 1.05, 1.2),
        ]
    return rows, raw


def calibrated_stages(quick: bool) -> list[StageConfig]:
    """The demo's videos, and wider models on more tokens."""
    demo = read_stage(DEMO)
    if quick:
        return [demo.model_copy(update={"batch_size": 1})]
    wide = [demo.model.model_copy(update={"width": size.width, "heads": size.heads, "depth": size.depth}) for size in (FULL, WIDE)]
    larger = demo.data.model_copy(update={"frames": FULL.frames, "height": 8 * FULL.side, "width": 8 * FULL.side})
    return [demo, *(demo.model_copy(update={"model": model, "data": larger, "batch_size": 1}) for model in wide)]


def calibrate(path: Path, quick: bool) -> None:
    """The points of one CPU core, for `osctl plan`: the trainer's whole step, moving average included, on cached clips. CPU-seconds of a
    process of one thread: its wall time on an idle core."""
    torch.set_num_threads(1)
    points = []
    for stage in calibrated_stages(quick):
        captions, (frames, tokens) = stage.model.caption_tokens, stage.tokens
        steps = training(stage, captions, torch.device("cpu"))
        seconds = harness.interleaved({"ours": lambda steps=steps: next(steps)}, 1 if quick else 8)["ours"]
        forward = forward_flops(stage.model, stage.out_channels, frames, tokens, captions=captions)
        tflops = forward * (1 + BACKWARD) * stage.batch_size / seconds / 1e12
        points.append(
            {
                "model": stage.model.model_dump(mode="json"),
                "out_channels": stage.out_channels,
                "frames": frames,
                "tokens": tokens,
                "captions": captions,
                "batch": stage.batch_size,
                "dtype": "fp32",
                "step_s": seconds,
                "tflops": tflops,
                "mfu": tflops / PEAK_TFLOPS,
            }
        )
    content = {
        "schema": 1,
        "device": "cpu-core",
        "machine": f"{harness.machine()}, torch {torch.__version__}, one thread",
        "date": datetime.date.today().isoformat(),
        "command": "bench/step.py --calibration FILE",
        "points": points,
    }
    path.write_text(json.dumps(content, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--calibration", type=Path)
    chosen, rest = parser.parse_known_args()
    if chosen.calibration is not None:
        calibrate(chosen.calibration, "--quick" in rest)
    else:
        harness.run("step", measure, rest)


if __name__ == "__main__":
    main()
