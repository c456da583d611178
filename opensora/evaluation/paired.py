"""Two models asked for the same clips: `python -m opensora.evaluation.paired A B [--clips 1000]`.

Owns the pairs and the interval of a difference. Clip i has the same prompt and the same noise in both models, so what one prompt makes hard
for both does not count. Refuses to judge pixels: `opensora.evaluation.digit_classifier` does. A and B are checkpoints or exports.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from opensora import last_resort
from opensora.data.digits import caption
from opensora.errors import ConfigError, TrainerError
from opensora.evaluation.digit_classifier import NOTHING, classify
from opensora.evaluation.digits import clip_seed, prompts
from opensora.evaluation.sampler import Sampler
from opensora.evaluation.saved_model import open_model

CLIPS = 1000
AT_ONCE = 50
Z = 1.959963984540054
"""Of a 95% interval."""


@dataclass(frozen=True)
class Difference:
    """Of two shares over the same n clips."""

    first: float
    second: float
    half: float
    """Half of the 95% interval of `second` - `first`."""

    @property
    def is_none(self) -> bool:
        """Whether the interval holds 0."""
        return abs(self.second - self.first) <= self.half


def difference(first: NDArray[np.bool_], second: NDArray[np.bool_]) -> Difference:
    """Which of the n clips were right in each model. The spread is that of the pairs' differences, each -1, 0 or 1 (n - 1 in it)."""
    pairs = second.astype(float) - first.astype(float)
    half = Z * float(pairs.std(ddof=1)) / math.sqrt(len(pairs)) if len(pairs) > 1 else 1.0
    return Difference(float(first.mean()), float(second.mean()), half)


def right(model: Sampler, clips: int, frames: int, seed: int) -> dict[str, NDArray[np.bool_]]:
    """Of each clip, whether it shows the digit, and moves in the direction, that its prompt asks for.

    Raises:
        ConfigError: the model does not know the words of the prompts.
    """
    asked = prompts(clips)
    digits, directions = np.array(asked).T
    found = [
        classify(
            model.generate(
                [caption(*one) for one in asked[first : first + AT_ONCE]],
                frames,
                [clip_seed(seed, index) for index in range(first, min(first + AT_ONCE, clips))],
            )
        )
        for first in range(0, clips, AT_ONCE)
    ]
    shown, moved = np.concatenate([each.digits for each in found]), np.concatenate([each.directions for each in found])
    return {"digit": shown == digits, "direction": (moved == directions) & (moved != NOTHING)}


def compare(first: Path, second: Path, *, clips: int = CLIPS, seed: int = 0) -> dict[str, Difference]:
    """By reading. Raises ConfigError, ParentError."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    models = [open_model(path, device) for path in (first, second)]
    frames = {model.stage.data.frames for model in models}
    if len(frames) != 1:
        one, other = (model.stage.data.frames for model in models)
        raise ConfigError(f"model {second}: clips of {other} frames, those of {first} have {one}. Compare models of the same stage")
    answers = [right(model, clips, frames.copy().pop(), seed) for model in models]
    return {name: difference(answers[0][name], answers[1][name]) for name in answers[0]}


def main(argv: Sequence[str] | None = None) -> int:
    """0 done, whatever came out · 1 it failed · 2 the command is wrong."""
    parser = argparse.ArgumentParser(prog="python -m opensora.evaluation.paired", description="Ask two models for the same digits.")
    parser.add_argument("first", type=Path, metavar="A", help="a checkpoint, or a folder that `osctl export` wrote")
    parser.add_argument("second", type=Path, metavar="B")
    parser.add_argument("--clips", type=int, default=CLIPS, help=f"paired readings [{CLIPS}]")
    parser.add_argument("--seed", type=int, default=0, help="of the noise [0]")
    args = parser.parse_args(argv)
    if args.clips < 1:
        sys.stderr.write(f"error: --clips {args.clips}: ask for at least one\n")
        return 2
    try:
        found = compare(args.first, args.second, clips=args.clips, seed=args.seed)
    except TrainerError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2 if error.kind == "config" else 1
    for name, one in found.items():
        said = "no difference" if one.is_none else "a difference"
        sys.stderr.write(
            f"{name}: {one.first:.1%} and {one.second:.1%}, {100 * (one.second - one.first):+.1f} ± {100 * one.half:.1f} points "
            f"(95%, {args.clips:,} pairs): {said}\n"
        )
    shown = {name: {"first": one.first, "second": one.second, "half": one.half, "none": one.is_none} for name, one in found.items()}
    sys.stdout.write(json.dumps({"clips": args.clips, **shown}) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(last_resort.run("paired", main))
