"""Our training step beside the recipe of Open-Sora 1.0's: what caching latents and text and keeping activations saves.

v1.0's: VAE and T5 run in every step, captions are padded to 120 tokens and masked, every block is recomputed in the backward pass. Ours:
latents and token vectors are encoded once, before; captions have their true length; nothing is recomputed. Same model, weights, clips,
noise, loss and optimizer, so the same losses: the largest relative difference over the steps is a row.

Everything is a quarter as wide as published (STDiT 288, heads of 72; T5 1024; VAE 32 to 128 channels), and made so that the
encoders take the share of the training FLOPs that they take at 16x256x256: VAE 16 · 0.2727 TF and T5 1.14 TF of 17.1 TF, 32% together
(FlopCounterMode; more than 2% off is refused). The encoders are diffusers' AutoencoderKL and transformers' T5EncoderModel, weights random.
Floor 1.55x, goal 2.2x.

    OMP_NUM_THREADS=1 .venv/bin/python bench/recipe.py
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import harness
import torch
from harness import Measured, Row
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from opensora.config import Activations, ModelConfig, OptimizerConfig
from opensora.model.stdit import STDiT
from opensora.optim.adamw import AdamW
from opensora.planning.flops import BACKWARD, forward_flops

PADDED = 120
SHARES = {"vae": 16 * 0.2727 / 17.1, "t5": 1.14 / 17.1}
"""Of the training FLOPs of a clip of 16x256x256: FlopCounterMode on the published encoders, one frame and 120 tokens."""


@dataclass(frozen=True)
class Size:
    depth: int
    frames: int
    pixels: int
    """Rows and columns of a frame."""
    channels: tuple[int, ...]
    """Of the VAE."""
    layers: int
    """Of T5."""
    hidden: int
    """Of T5's feed-forward layers."""
    lengths: tuple[int, ...]
    """True tokens of the captions, one a clip."""
    quick: bool = False


FULL = Size(depth=27, frames=8, pixels=128, channels=(32, 64, 128, 128), layers=3, hidden=2720, lengths=(23, 41, 17))
QUICK = Size(depth=1, frames=2, pixels=32, channels=(32, 32, 32, 32), layers=1, hidden=64, lengths=(5, 9), quick=True)


class Recipes:
    """The encoders, the clips, and both ways to train on them."""

    def __init__(self, size: Size) -> None:
        from diffusers import AutoencoderKL
        from transformers import T5Config, T5EncoderModel

        torch.manual_seed(0)
        stages = len(size.channels)
        self.vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * stages,
            up_block_types=("UpDecoderBlock2D",) * stages,
            block_out_channels=size.channels,
            layers_per_block=2,
            latent_channels=4,
            norm_num_groups=8,
        ).eval()
        text = T5Config(
            vocab_size=256, d_model=1024, d_kv=64, d_ff=size.hidden, num_layers=size.layers, num_heads=16, feed_forward_proj="gated-gelu"
        )
        self.t5 = T5EncoderModel(text).eval()
        self.config = ModelConfig(depth=size.depth, width=288, heads=4, caption_width=1024, caption_tokens=PADDED, caption_dropout=0)
        self.shape = (size.frames, size.pixels // 8, size.pixels // 8)
        self.clips = torch.randint(0, 256, (len(size.lengths), size.frames, 3, size.pixels, size.pixels), dtype=torch.uint8)
        self.tokens = [torch.randint(1, 256, (1, length)) for length in size.lengths]
        self.noise, self.target = torch.randn(len(size.lengths), 1, 4, *self.shape), torch.randn(1, 8, *self.shape)
        self.weights = STDiT(self.config, self.shape, 8)
        with torch.no_grad():
            for weight in self.weights.parameters():  # layers that start at zero would let a step see neither caption nor other frames
                if not weight.any():
                    weight.normal_(std=0.02)
        self.cache = [(self.latents(clip), self.vectors(tokens)) for clip, tokens in zip(self.clips, self.tokens, strict=True)]

    @torch.no_grad()
    def latents(self, clip: Tensor) -> Tensor:
        """uint8 (T, 3, H, W) -> (1, C, T, h, w): the mode of the posterior."""
        latents: Tensor = self.vae.encode(clip.float() / 127.5 - 1).latent_dist.mode() * 0.18215
        return latents.transpose(0, 1)[None]

    @torch.no_grad()
    def vectors(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        out: Tensor = self.t5(input_ids=tokens, attention_mask=mask).last_hidden_state
        return out

    def published(self, number: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """Latents, token vectors and mask of a clip, encoded now."""
        tokens = self.tokens[number]
        missing = PADDED - tokens.shape[1]
        padded = torch.cat([tokens, torch.zeros(1, missing, dtype=torch.int64)], 1)
        mask = torch.arange(PADDED)[None] < tokens.shape[1]
        return self.latents(self.clips[number]), self.vectors(padded, mask), mask

    def cached(self, number: int) -> tuple[Tensor, Tensor, Tensor | None]:
        return *self.cache[number], None

    def trainer(self, given: Callable[[int], tuple[Tensor, Tensor, Tensor | None]], activations: Activations) -> Callable[[], float]:
        """A step on the next clip; its loss."""
        model = copy.deepcopy(self.weights)
        model.keep(activations)
        weights = dict(model.named_parameters())
        optimizer = AdamW(weights, OptimizerConfig())
        taken = 0

        def step() -> float:
            nonlocal taken
            number, taken = taken % len(self.clips), taken + 1
            clean, vectors, mask = given(number)
            for weight in weights.values():
                weight.grad = None
            noisy = 0.5 * clean + 0.5 * self.noise[number]
            loss = (model(noisy, torch.tensor([500.0]), vectors, mask) - self.target).square().mean()
            loss.backward()
            optimizer.step([weight.grad for weight in weights.values() if weight.grad is not None], 1e-4)
            return float(loss.detach())

        return step


def counted(work: Callable[[], object]) -> int:
    with FlopCounterMode(display=False) as counter:
        work()
    return int(counter.get_total_flops())


def measure(quick: bool) -> Measured:
    torch.set_num_threads(1)
    size = QUICK if quick else FULL
    recipes = Recipes(size)
    frames, rows, columns = recipes.shape
    training = (1 + BACKWARD) * forward_flops(recipes.config, 8, frames, rows * columns // 4)
    flops = {
        "training": training,
        "vae": counted(lambda: recipes.latents(recipes.clips[0])),
        "t5": counted(lambda: recipes.vectors(torch.ones(1, PADDED, dtype=torch.int64))),
    }
    shares = {name: flops[name] / training for name in SHARES}
    off = sum(shares.values()) / sum(SHARES.values()) - 1
    if abs(off) > 0.02 and not quick:
        raise SystemExit(f"bench/recipe: encoders take {shares} of the training FLOPs, not {SHARES}; choose other sizes")
    losses: dict[str, list[float]] = {"v1.0": [], "ours": []}
    steps = {
        "v1.0": recipes.trainer(recipes.published, Activations(recompute="full")),
        "ours": recipes.trainer(recipes.cached, Activations()),
    }

    def recorded(name: str) -> Callable[[], None]:
        return lambda: losses[name].append(steps[name]())

    parts = {
        "vae": lambda: recipes.latents(recipes.clips[0]),
        "t5": lambda: recipes.published(0) if quick else recipes.vectors(torch.ones(1, PADDED, dtype=torch.int64)),
    }
    seconds = harness.interleaved({name: recorded(name) for name in steps} | parts, 1 if quick else 4)
    apart = max(abs(one / other - 1) for one, other in zip(losses["v1.0"], losses["ours"], strict=True))
    rows_ = [
        Row("our recipe (cached, no recompute) against v1.0's", seconds["v1.0"] / seconds["ours"], "x", 1.55, 2.2),
        Row("the same: largest relative difference of a loss", apart, "", 1e-5, 1e-5, "less"),
    ]
    raw: dict[str, Any] = {
        "seconds": seconds,
        "flops": flops,
        "shares": shares,
        "shares_published": SHARES,
        "losses": losses,
        "libraries": harness.libraries("torch", "diffusers", "transformers"),
    }
    return rows_, raw


def main() -> None:
    harness.run("recipe", measure)


if __name__ == "__main__":
    main()
