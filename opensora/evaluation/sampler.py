"""From a model to pixels: the sampler that draws clips for commands, for the samples that a stage leaves and for its evaluation.

Owns the way from prompts and seeds to frames. A clip is a function of (checkpoint, prompt, seed, size, sampling): not of the clips beside
it, the ranks or the device. `opensora.evaluation.saved_model` makes a sampler from files.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from opensora.checkpoint import reader as checkpoint
from opensora.config import SamplingConfig, StageConfig
from opensora.diffusion import guidance, objective
from opensora.diffusion.given_frames import Held, holding, quarter, with_given
from opensora.encoders.protocol import Autoencoder, TextEncoder, decode_clips, encode_clips, padded
from opensora.errors import ConfigError
from opensora.evaluation.given import Given
from opensora.model.sequence_parallel import Sequence as SharedClips
from opensora.model.sequence_parallel import all_of
from opensora.model.stdit import STDiT
from opensora.printable import quoted

SECOND = 2**62
"""Added to a clip's seed for the clip that leads back in a loop."""


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
        self.sequence: SharedClips | None = None
        """Ranks that draw each clip together. All of them call `generate` with the same arguments, and all get the frames."""
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
        given: Given | None = None,
        loop: bool = False,
        on_step: Callable[[], None] = lambda: None,
    ) -> Tensor:
        """uint8 (n, frames, H, W, 3) on the CPU; clip i is from caption i and the noise of seed i.

        With `loop` a second clip is drawn that leads from the last quarter of the first to its first quarter: (n, `loop_frames`, H, W, 3).

        Args:
            sampling: None means the stage's own.
            size: height and width in pixels. None means the stage's.
            negative: what no clip should show; None means the null caption that the model was trained with.
            given: frames that every clip has.
            on_step: called before each evaluation of the network.

        Raises:
            ConfigError: a caption has unknown words, or frames or size do not divide into patches.
            ParentError: the weights are not those of the stage's model.
            PeerLost: another rank of `sequence` ended.
        """
        drawn = self.latents(captions, frames, seeds, sampling, size=size, negative=negative, given=given, loop=loop, on_step=on_step)
        return self._decoded(drawn)

    @torch.no_grad()
    def latents(
        self,
        captions: Sequence[str],
        frames: int,
        seeds: Sequence[int],
        sampling: SamplingConfig | None = None,
        *,
        size: tuple[int, int] | None = None,
        negative: str | None = None,
        given: Given | None = None,
        loop: bool = False,
        on_step: Callable[[], None] = lambda: None,
    ) -> Tensor:
        """(n, C, frames, h, w) on the sampler's device: what `generate` decodes, of the same arguments."""
        how = sampling or self.stage.sampling
        model, latent_size = self._model(frames), self._latent_size(size)
        vectors, mask = (part.to(self.device) for part in padded(self.text.encode([*captions, *([] if negative is None else [negative])])))
        held = None if given is None else self._held(given, len(captions), latent_size)

        def draw(seeds: Sequence[int], held: Held | None) -> Tensor:
            chosen = objective.build(self.stage.objective)
            told = held.given if held is not None and held.learned else None
            network = _guided(model, vectors, mask, len(captions), how, last_time=chosen.last_time, given=told)
            generators = [torch.Generator().manual_seed(seed) for seed in seeds]  # on the CPU: the same noise on every device
            noise = objective.draw_noise(generators, (self.stage.model.latent_channels, frames, *latent_size)).to(self.device)
            if held is not None:
                network = holding(network, held, noise, chosen.noised)

            def counted(x: Tensor, time: Tensor) -> Tensor:
                on_step()
                return network(x, time)

            drawn = chosen.sample(counted, noise, how, generators)
            return drawn if held is None else with_given(drawn, held.clean, held.given)

        drawn = draw(seeds, held)
        if loop:
            share = self._loop_share(frames)
            back = draw([(seed + SECOND) % 2**63 for seed in seeds], self._ends_of(drawn, share))
            drawn = torch.cat([drawn, back[:, :, share:-share]], dim=2)
        return drawn

    def _decoded(self, latents: Tensor) -> Tensor:
        """(n, C, T, h, w) -> uint8 (n, T, H, W, 3) on the CPU. Ranks that share the clips decode a part of the frames each."""
        shared = self.sequence
        if shared is None:
            return decode_clips(self.autoencoder, latents.cpu())
        own = decode_clips(self.autoencoder, shared.own_frames(latents, 2, latents.shape[2]).cpu()).to(self.device)
        whole = rearrange(all_of(own, shared), "n B T H W C -> B (n T) H W C")
        return whole[:, : latents.shape[2]].cpu()

    def loop_frames(self, frames: int) -> int:
        """Frames of a loop that is drawn as two clips of so many. Raises ConfigError."""
        return 2 * (frames - self._loop_share(frames))

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

    def _held(self, given: Given, clips: int, latent_size: tuple[int, int]) -> Held:
        """Raises ConfigError: a token would have frames that are given and others."""
        which, patch = given.which, self.stage.model.patch[0]
        if not torch.equal(which, which[::patch].repeat_interleave(patch)):
            raise ConfigError(f"{given.named}: the model makes one token of {patch} frames, and can be given these only together")
        clean = torch.zeros(1, self.stage.model.latent_channels, len(which), *latent_size)
        clean[:, :, which] = encode_clips(self.autoencoder, given.pixels[which][None]).cpu()
        held = (clean.to(self.device).expand(clips, -1, -1, -1, -1), which.to(self.device).expand(clips, -1))
        return Held(*held, learned=self.stage.masks is not None)

    def _loop_share(self, frames: int) -> int:
        """Frames at each end of a clip that it shares with the clip that leads back. Raises ConfigError."""
        patch = self.stage.model.patch[0]
        share = patch * quarter(frames // patch)
        if 2 * share >= frames:
            raise ConfigError(f"loop of {frames} frames: too short to lead from its end to its beginning; ask for {3 * patch} or more")
        return share

    def _ends_of(self, drawn: Tensor, share: int) -> Held:
        """The ends of clips (B, C, T, h, w) as those of the clips that lead back."""
        clean = torch.zeros_like(drawn)
        clean[:, :, :share], clean[:, :, -share:] = drawn[:, :, -share:], drawn[:, :, :share]
        given = torch.zeros(len(drawn), drawn.shape[2], dtype=torch.bool, device=drawn.device)
        given[:, :share] = given[:, -share:] = True
        return Held(clean, given, learned=self.stage.masks is not None)

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

    def has_network(self, frames: int) -> bool:
        """Whether the network for clips of so many frames is on the device."""
        return frames in self._models

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
            model.sequence = self.sequence
            self._models[frames] = model.to(self.device).eval()
        return self._models[frames]


def _guided(
    model: STDiT, vectors: Tensor, mask: Tensor, clips: int, how: SamplingConfig, *, last_time: float, given: Tensor | None
) -> objective.Network:
    """The network with the prompts' vectors; behind those of the clips may stand that of the negative prompt."""
    away = None if len(vectors) == clips else (vectors[clips:].expand(clips, -1, -1), mask[clips:].expand(clips, -1))
    return guidance.guided(model, vectors[:clips], mask[:clips], guidance.Guidance.of(how), last_time=last_time, negative=away, given=given)


def evaluations(sampling: SamplingConfig) -> int:
    """How often the network is evaluated for one batch of clips; one under guidance counts once."""
    return 2 * sampling.steps - 1 if sampling.method == "heun" else sampling.steps


def too_long(text: TextEncoder, prompt: str) -> str | None:
    """A sentence about a prompt that is longer than what the model ever saw: its end changes nothing in the clip. None: it fits."""
    length = text.length(prompt)
    if length <= text.tokens:
        return None
    fact = f"{length} {text.unit}, the model saw at most {text.tokens}, so the last {length - text.tokens} count for nothing"
    return f'prompt "{quoted(prompt, 200)}": {fact}. Say what matters first'
