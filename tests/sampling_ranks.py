"""What test_sampler.py draws on ranks that share each clip: `python sampling_ranks.py CHECKPOINT PICTURE OUT`.
Alone it is the reference."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from opensora.config import SamplingConfig
from opensora.distributed.parallel import share_clips
from opensora.distributed.ranks import Ranks, join
from opensora.evaluation.given import Asked, read
from opensora.evaluation.saved_model import open_model

PROMPTS = ("a digit 3 moving left", "a digit 7 moving up", "a digit 0 moving down")
HEUN = SamplingConfig(method="heun", steps=3, guidance=2.0)


def cases(picture: Path) -> dict[str, dict[str, Any]]:
    """By name: frames and what else is asked for. Neither 5 frames nor 3 x 5 tokens divide by 2 or 3."""
    given = read(Asked(first_frame=picture), 5, (24, 40), 8.0, 1)
    return {
        "ragged": {"frames": 5, "size": (24, 40), "sampling": HEUN, "negative": "a digit 8 moving left"},
        "fewer frames than ranks": {"frames": 1},
        "a given frame": {"frames": 5, "size": (24, 40), "given": given},
        "a loop": {"frames": 4, "loop": True},
    }


def draw(checkpoint: Path, picture: Path, ranks: Ranks) -> dict[str, Tensor]:
    """Latents of each case, and the frames of one of them."""
    sampler = open_model(checkpoint, ranks.device)
    if ranks.world > 1:
        sampler.sequence = share_clips(ranks, ranks.world)
    found = {name: sampler.latents(PROMPTS, seeds=[1, 2, 3], **how) for name, how in cases(picture).items()}
    return found | {"frames": sampler.generate(PROMPTS, seeds=[1, 2, 3], **cases(picture)["ragged"])}


def main(checkpoint: Path, picture: Path, out: Path) -> None:
    with join() as ranks:
        found = draw(checkpoint, picture, ranks)
        if ranks.is_first:
            save_file({name: tensor.contiguous() for name, tensor in found.items()}, out)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*map(Path, sys.argv[1:]))
