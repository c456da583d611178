"""Clips from prompts: `python -m opensora.sample CHECKPOINT --prompt "a digit 3 moving left" --out three.mp4`.

Owns the way from a checkpoint's moving average to pixels, for the command, for the samples that a stage leaves and for its evaluation.
A clip is a function of (checkpoint, prompt, seed, frames, sampling): not of the clips beside it, the ranks or the device.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from opensora import checkpoint, guidance, objective
from opensora.config import SamplingConfig, StageConfig
from opensora.encoders import Autoencoder, TextEncoder, decode_clips, load, padded
from opensora.errors import ConfigError, TrainerError
from opensora.model import STDiT
from opensora.pictures import write_mp4, write_sheet, written


class Sampler:
    """Weights, text encoder and autoencoder put together. The weights serve any number of frames: position tables are made for each."""

    def __init__(
        self,
        stage: StageConfig,
        weights: Mapping[str, Tensor],
        autoencoder: Autoencoder,
        text: TextEncoder,
        *,
        device: torch.device,
        sampling: SamplingConfig | None = None,
    ) -> None:
        self.stage, self.autoencoder, self.text, self.device = stage, autoencoder, text, device
        self.sampling = sampling or stage.sampling
        self._weights = weights
        self._models: dict[int, STDiT] = {}

    @classmethod
    def open(cls, path: Path, *, device: torch.device, sampling: SamplingConfig | None = None) -> Sampler:
        """From a checkpoint directory alone. Raises ParentError where it is not whole."""
        _, stage = checkpoint.read(path)
        autoencoder, text = load(path, stage)
        return cls(stage, checkpoint.load(path, "ema"), autoencoder, text, device=device, sampling=sampling)

    @torch.no_grad()
    def generate(self, captions: Sequence[str], frames: int, seeds: Sequence[int]) -> Tensor:
        """uint8 (n, frames, H, W, 3), clip i from caption i and the noise of seed i.

        Raises:
            ConfigError: a caption has unknown words, or the frames do not divide into patches.
        """
        vectors, mask = padded(self.text.encode(captions))
        model, sampling = self._model(frames), self.sampling
        network = guidance.guided(model, vectors.to(self.device), mask.to(self.device), sampling.guidance, sampling.guidance_channels)
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]  # on the CPU: the same noise on every device
        channels, _, rows, columns = self.stage.latent_shape
        noise = objective.draw_noise(generators, (channels, frames, rows, columns)).to(self.device)
        latents = objective.build(self.stage.objective).sample(network, noise, sampling, generators)
        return decode_clips(self.autoencoder, latents.cpu())

    def _model(self, frames: int) -> STDiT:
        if frames not in self._models:
            if frames % self.stage.model.patch[0]:
                raise ConfigError(
                    f"frames {frames}: not a multiple of the model's patch of {self.stage.model.patch[0]} frames; ask for one"
                )
            model = STDiT(self.stage.model, (frames, *self.stage.latent_shape[2:]), self.stage.out_channels, initial=False)
            checkpoint.compare(model.state_dict(), self._weights, "weights to sample from")
            model.load_state_dict(self._weights)
            model.freeze_temporal()  # an image model asked for video: what has no effect is not computed
            self._models[frames] = model.to(self.device).eval()
        return self._models[frames]


def draw(
    sampler: Sampler, prompts: Sequence[str], frames: int, seeds: Sequence[int], batch: int = 16, beat: Callable[[], None] = lambda: None
) -> Tensor:
    """`generate` in batches of so many clips; `beat` is called before each."""
    parts = []
    for first in range(0, len(prompts), batch):
        beat()
        parts.append(sampler.generate(prompts[first : first + batch], frames, seeds[first : first + batch]))
    return torch.cat(parts)


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m opensora.sample", description="Draw a clip for each prompt from a checkpoint's moving average."
    )
    parser.add_argument("checkpoint", type=Path, help="a checkpoint directory, for example run/checkpoints/step-00000100")
    parser.add_argument(
        "--prompt", action="append", required=True, help='what to show, for example "a digit 3 moving left"; may be repeated'
    )
    parser.add_argument("--out", type=Path, required=True, help=".mp4 (one prompt) or .png (a sheet, a row per prompt)")
    parser.add_argument("--seed", type=int, default=0, help="of the noise; prompt i uses seed + i [0]")
    parser.add_argument("--frames", type=int, help="of a clip [the stage's]")
    parser.add_argument("--steps", type=int, help="network evaluations on the way from noise to clip [the stage's]")
    parser.add_argument("--guidance", type=float, help="classifier-free guidance scale; 1: off [the stage's]")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """0 done · 1 it failed · 2 the command is wrong."""
    args = _arguments(argv)
    try:
        if args.out.suffix not in (".mp4", ".png") or (args.out.suffix == ".mp4" and len(args.prompt) > 1):
            raise ConfigError(f"--out {args.out}: an .mp4 holds one prompt ({len(args.prompt)} given), a .png any number; name one of them")
        if not args.out.parent.is_dir():
            raise ConfigError(f"--out {args.out}: the folder {args.out.parent} does not exist; make it first")
        for name in ("frames", "steps"):
            if getattr(args, name) is not None and getattr(args, name) < 1:
                raise ConfigError(f"--{name} {getattr(args, name)}: at least 1")
        sampler = Sampler.open(args.checkpoint, device=torch.device("cuda" if torch.cuda.is_available() else "cpu"))
        changed = {name: getattr(args, name) for name in ("steps", "guidance") if getattr(args, name) is not None}
        sampler.sampling = sampler.sampling.model_copy(update=changed)
        clips = draw(sampler, args.prompt, args.frames or sampler.stage.data.frames, [args.seed + i for i in range(len(args.prompt))])
        with written(args.out) as path:
            if args.out.suffix == ".mp4":
                write_mp4(path, clips[0])
            else:
                write_sheet(path, clips, args.prompt)
    except TrainerError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2 if error.kind == "config" else 1
    except OSError as error:
        sys.stderr.write(f"error: --out {args.out}: {error.strerror or error}; make room, or name a file that can be written\n")
        return 1
    sys.stdout.write(f"{args.out}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
