"""From a model to pixels: the sampler that draws clips for commands, for the samples that a stage leaves and for its evaluation.

Owns the way from prompts and seeds to frames. A clip is a function of (checkpoint, prompt, seed, size, sampling): not of the clips beside
it, the ranks or the device. `opensora.evaluation.saved_model` makes a sampler from files.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from opensora.checkpoint import reader as checkpoint
from opensora.config import SamplingConfig, StageConfig
from opensora.diffusion import guidance, objective
from opensora.encoders.protocol import Autoencoder, TextEncoder, decode_clips, padded
from opensora.errors import ConfigError
from opensora.model.stdit import STDiT


class Sampler:
    """Weights, text encoder and autoencoder put together. The weights serve clips of any size: position tables are made for each.

    Not safe for several threads at once: the encoders load themselves at their first use.
    """

    def __init__(
        self,
        stage: StageConfig,
        weights: Mapping[str, Tensor],
        autoencoder: Autoencoder,
        text: TextEncoder,
        *,
        device: torch.device,
    ) -> None:
        """
        Args:
            weights: a whole state dict of the stage's model, on any device and of any floating-point type.
            device: of the network. The autoencoder decodes where it lies.
        """
        self.stage, self.autoencoder, self.text, self.device = stage, autoencoder, text, device
        self.weights = weights
        self._models: dict[int, STDiT] = {}

    @torch.no_grad()
    def generate(
        self,
        captions: Sequence[str],
        frames: int,
        seeds: Sequence[int],
        sampling: SamplingConfig | None = None,
        *,
        size: tuple[int, int] | None = None,
        negative: str | None = None,
        on_step: Callable[[], None] = lambda: None,
    ) -> Tensor:
        """uint8 (n, frames, H, W, 3) on the CPU; clip i is from caption i and the noise of seed i.

        Args:
            sampling: None means the stage's own.
            size: height and width in pixels. None means the stage's.
            negative: what no clip should show; None means the null caption that the model was trained with.
            on_step: called before each evaluation of the network.

        Raises:
            ConfigError: a caption has unknown words, or frames or size do not divide into patches.
            ParentError: the weights are not those of the stage's model.
        """
        how = sampling or self.stage.sampling
        model, latent_size = self._model(frames), self._latent_size(size)
        chosen = objective.build(self.stage.objective)
        network = self._network(model, captions, how, negative, chosen.last_time)
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]  # on the CPU: the same noise on every device
        noise = objective.draw_noise(generators, (self.stage.model.latent_channels, frames, *latent_size)).to(self.device)

        def counted(x: Tensor, time: Tensor) -> Tensor:
            on_step()
            return network(x, time)

        return decode_clips(self.autoencoder, chosen.sample(counted, noise, how, generators).cpu())

    def generate_in_batches(
        self,
        captions: Sequence[str],
        frames: int,
        seeds: Sequence[int],
        sampling: SamplingConfig | None = None,
        *,
        batch: int = 16,
        beat: Callable[[], None] = lambda: None,
        **how: Any,
    ) -> Tensor:
        """As `generate`, at most `batch` clips at once; `beat` is called before each batch."""
        parts = []
        for first in range(0, len(captions), batch):
            beat()
            parts.append(self.generate(captions[first : first + batch], frames, seeds[first : first + batch], sampling, **how))
        return torch.cat(parts)

    def _network(
        self, model: STDiT, captions: Sequence[str], how: SamplingConfig, negative: str | None, last_time: float
    ) -> objective.Network:
        others = [] if negative is None else [negative]
        vectors, mask = (part.to(self.device) for part in padded(self.text.encode([*captions, *others])))
        clips = len(captions)
        away = None if negative is None else (vectors[clips:].expand(clips, -1, -1), mask[clips:].expand(clips, -1))
        return guidance.guided(model, vectors[:clips], mask[:clips], guidance.Guidance.of(how), last_time=last_time, negative=away)

    def _latent_size(self, size: tuple[int, int] | None) -> tuple[int, int]:
        """Latent rows and columns of clips of so many pixels. Raises ConfigError."""
        if size is None:
            return self.stage.latent_shape[2], self.stage.latent_shape[3]
        factor = self.stage.autoencoder.factor
        for name, pixels, patch in zip(("height", "width"), size, self.stage.model.patch[1:], strict=True):
            if pixels < 1 or pixels % (factor * patch):
                raise ConfigError(
                    f"{name} {pixels}: not a multiple of {factor * patch} pixels (autoencoder factor {factor} x patch {patch}); ask for one"
                )
        return size[0] // factor, size[1] // factor

    def network(self, frames: int) -> STDiT:
        """The model for clips of so many frames of the stage's own size, ready to be evaluated. Raises as `generate` does."""
        return self._model(frames)

    def _model(self, frames: int) -> STDiT:
        if frames not in self._models:
            if frames % self.stage.model.patch[0]:
                raise ConfigError(
                    f"frames {frames}: not a multiple of the model's patch of {self.stage.model.patch[0]} frames; ask for one"
                )
            model = STDiT(self.stage.model, (frames, *self.stage.latent_shape[2:]), self.stage.out_channels, initial=False)
            checkpoint.compare(model.state_dict(), self.weights, "weights to sample from")
            model.load_state_dict(self.weights)
            model.freeze_temporal()  # if an image model is asked for video: what has no effect is not computed
            self._models[frames] = model.to(self.device).eval()
        return self._models[frames]


def evaluations(sampling: SamplingConfig) -> int:
    """How often the network is evaluated for one batch of clips; one under guidance counts once."""
    return 2 * sampling.steps - 1 if sampling.method == "heun" else sampling.steps


def too_long(text: TextEncoder, prompt: str) -> str | None:
    """A sentence about a prompt that is longer than what the model ever saw: its end changes nothing in the clip. None: it fits."""
    length = text.length(prompt)
    if length <= text.tokens:
        return None
    return (
        f'prompt "{prompt}": {length} {text.unit}, the model saw at most {text.tokens}, so the last {length - text.tokens} count for '
        "nothing. Say what matters first"
    )
