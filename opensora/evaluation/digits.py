"""How well a stage's model obeys its prompts, beside chance and beside what the classifier says of real clips.

Owns the prompts, the seeds, the sharing of clips over ranks and the names of the readings. Refuses to sample (the caller hands in
`generate`) and to look at pixels (`opensora.evaluation.digit_classifier`).

Prompts cycle through all 40 combinations of digit and direction, so that counts are balanced and no answer is better than another by habit;
combinations that training never showed are counted in, and read separately too. Clip i has the same prompt and the same noise on any number
of ranks. Counts are integers and additive: ranks classify clips rank::world and sum.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

import numpy as np
import torch
from einops import rearrange

from opensora.config import EvaluateConfig, StageConfig
from opensora.data.digits import COMBINATIONS, HELD_OUT, canvas, caption
from opensora.encoders.protocol import Autoencoder, decode_clips, encode_clips
from opensora.evaluation.digit_classifier import DIGIT_CHANCE, DIRECTION_CHANCE, NOTHING, classify, frozen_directions, wilson

Generate = Callable[[Sequence[str], int, Sequence[int]], torch.Tensor]
"""(captions, frames, seeds) → uint8 (n, frames, H, W, 3); the noise of clip i comes from seeds[i] alone."""

COUNTS = ("clips", "seen", "digit", "direction", "both", "heldout_clips", "heldout_digit", "heldout_direction", "heldout_both", "frozen")
"""What `tally` counts, in its order. seen: clips that show an object at all. frozen: clips whose direction is right if they stand still at
their first frame, which is the control that direction needs motion."""
CEILING_CLIPS = 400
"""Real clips that ceilings are read from: ten of each combination, intervals of about ±2 points."""


def prompts(count: int, *, images: bool = False) -> list[tuple[int, int | None]]:
    """Digit and direction of prompt i; without directions for images."""
    if images:
        return [(index % 10, None) for index in range(count)]
    # Digits run fastest, and directions shift by one each ten: any first 40 hold each combination once, any first 10 each digit.
    return [(index % 10, (index + index // 10) % 4) for index in range(count)]


def clip_seed(seed: int, index: int) -> int:
    """Seed of clip `index`'s noise, below 2^62."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{index}".encode()).digest()[:8], "big") >> 2


def tally(
    generate: Generate, config: EvaluateConfig, *, images: bool = False, rank: int = 0, world: int = 1, batch: int = 50
) -> torch.Tensor:
    """Counts of this rank's share of the clips, int64 in the order of COUNTS: sum over ranks, then hand to `readings`."""
    asked = prompts(config.clips, images=images)
    share = range(rank, config.clips, world)
    counts = torch.zeros(len(COUNTS), dtype=torch.int64)
    for first in range(0, len(share), batch):
        indices = share[first : first + batch]
        captions = [caption(*asked[index]) for index in indices]
        seeds = [clip_seed(config.seed, index) for index in indices]
        counts += count(generate(captions, 1 if images else config.frames, seeds), [asked[index] for index in indices])
    return counts


def count(clips: torch.Tensor, asked: Sequence[tuple[int, int | None]]) -> torch.Tensor:
    """Counts over these clips, in the order of COUNTS."""
    answer = classify(clips)
    digit = answer.digits == np.array([digit for digit, _ in asked])
    ways = np.array([-2 if way is None else way for _, way in asked])
    direction = (answer.directions == ways) & (answer.directions != NOTHING)
    frozen = frozen_directions(clips) == ways
    heldout = np.array([pair in HELD_OUT for pair in asked])
    rows = (
        np.ones(len(asked), bool),
        answer.digits != NOTHING,
        digit,
        direction,
        digit & direction,
        heldout,
        heldout & digit,
        heldout & direction,
        heldout & digit & direction,
        frozen,
    )
    return torch.tensor([int(row.sum()) for row in rows])


def readings(video: torch.Tensor, images: torch.Tensor | None, ceilings: dict[str, float]) -> dict[str, float]:
    """Shares with 95% Wilson intervals, chance levels and ceilings, as flat numbers. Counts are those of all ranks."""
    found = _named(video)
    result = {"clips": float(found["clips"]), "seen": found["seen"] / max(found["clips"], 1)}
    result |= _share("digit", found["digit"], found["clips"]) | {"digit_chance": DIGIT_CHANCE}
    result |= _share("direction", found["direction"], found["clips"]) | {"direction_chance": DIRECTION_CHANCE}
    result |= _share("both", found["both"], found["clips"]) | {"both_chance": DIGIT_CHANCE * DIRECTION_CHANCE}
    result |= {"heldout_clips": float(found["heldout_clips"])}
    result |= _share("heldout_digit", found["heldout_digit"], found["heldout_clips"])
    result |= _share("heldout_direction", found["heldout_direction"], found["heldout_clips"])
    result |= _share("heldout_both", found["heldout_both"], found["heldout_clips"])
    result |= _share("frozen_direction", found["frozen"], found["clips"])
    if images is not None:
        still = _named(images)
        result |= {"image_clips": float(still["clips"])} | _share("image_digit", still["digit"], still["clips"])
    return result | ceilings


def ceilings(stage: StageConfig, autoencoder: Autoencoder, *, images: bool = False) -> dict[str, float]:
    """What the classifier says of real clips from the test split, of the evaluated size: as drawn, and after the autoencoder's round trip.

    The second is the most that a model of these latents can reach, but by luck: `digit_ceiling` and `direction_ceiling`.

    Raises:
        ConfigError: where the stage's data are not digits.
    """
    if stage.evaluate is None:
        return {}
    result = _ceiling(stage, autoencoder, stage.evaluate.frames, "")
    return result | (_ceiling(stage, autoencoder, 1, "image_") if images else {})


def _ceiling(stage: StageConfig, autoencoder: Autoencoder, frames: int, prefix: str) -> dict[str, float]:
    asked = COMBINATIONS * (CEILING_CLIPS // len(COMBINATIONS))
    digits, directions = np.array(asked).T
    drawing = canvas(stage.data, frames).draw(np.random.default_rng(CEILING_CLIPS), digits, directions, "test")
    clips = torch.from_numpy(drawing.clips)[..., None].expand(*drawing.clips.shape, 3)
    real = _named(count(clips, asked))
    decoded = decode_clips(autoencoder, encode_clips(autoencoder, clips))
    through = _named(count(decoded, asked))
    error = (rearrange(decoded, "... -> (...)").double() - rearrange(clips, "... -> (...)").double()).square().mean().item()
    result = {
        f"{prefix}digit_real": real["digit"] / CEILING_CLIPS,
        f"{prefix}digit_ceiling": through["digit"] / CEILING_CLIPS,
    }
    if frames > 1:
        result["direction_real"] = real["direction"] / CEILING_CLIPS
        result["direction_ceiling"] = through["direction"] / CEILING_CLIPS
        result["both_real"], result["both_ceiling"] = real["both"] / CEILING_CLIPS, through["both"] / CEILING_CLIPS
        result["autoencoder_psnr_db"] = float(10 * np.log10(255**2 / max(error, 1e-9)))
    return result


def _named(counts: torch.Tensor) -> dict[str, int]:
    return dict(zip(COUNTS, counts.tolist(), strict=True))


def _share(name: str, right: int, count: int) -> dict[str, float]:
    low, high = wilson(right, count)
    return {f"{name}_accuracy": right / max(count, 1), f"{name}_low": low, f"{name}_high": high}
