"""Clips from prompts, as a pipeline of diffusers: `DiffusionPipeline.from_pretrained(DIR, trust_remote_code=True)`.

Owns only the order of the steps: tokenizer and text encoder, noise, sampling of latents (the scheduler does it), pixels. The same prompt,
seed and settings give the same frames as `python -m opensora.sample`.
"""

# mypy: disable-error-code="untyped-decorator, no-untyped-call, attr-defined, misc, assignment"
# (diffusers declares itself typed, but half of it is not)

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.utils.outputs import BaseOutput
from PIL import Image
from torch import Tensor

from opensora.encoders.captions import clean

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass
class Clips(BaseOutput):
    frames: Any
    """pil: a list of images for each prompt · np: float32 (B, T, H, W, 3) in [0, 1] · pt: uint8 (B, T, H, W, 3)."""


class OpenSoraPipeline(DiffusionPipeline):
    """Text to video with an STDiT."""

    model_cpu_offload_seq = "text_encoder->transformer->vae"

    def __init__(
        self,
        transformer: Any,
        vae: Any,
        text_encoder: Any,
        tokenizer: Any,
        scheduler: Any,
        text_dtype: str = "fp32",
        vae_dtype: str = "fp32",
        vae_frames: int | None = None,
        clean_captions: bool = False,
    ) -> None:
        """Arguments beside the components:

        text_dtype, vae_dtype: the types that these encoders compute in, unless the caller loads them in another type than fp32.
        vae_frames: how many frames are decoded at once. None means all.
        clean_captions: whether prompts are cleaned in the same way as the training's captions.
        """
        super().__init__()
        for encoder, dtype in ((text_encoder, text_dtype), (vae, vae_dtype)):
            if dtype != "fp32" and encoder.dtype == torch.float32:
                encoder.to(DTYPES[dtype])
        self.register_modules(transformer=transformer, vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, scheduler=scheduler)
        self.register_to_config(text_dtype=text_dtype, vae_dtype=vae_dtype, vae_frames=vae_frames, clean_captions=clean_captions)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str],
        num_frames: int | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> Clips | tuple[Any]:
        """Draw a clip for each prompt.

        Args:
            num_frames, height, width: size of a clip, in frames and pixels [the size that the model was trained for].
            num_inference_steps, guidance_scale: settings of the sampler [those of the stage].
            generator: draws the noise on the CPU, so that every device gives the same clip: one for each prompt, or one for all.
            output_type: pil, np or pt, see `Clips`.

        Raises:
            ValueError: the size does not divide into patches, or there are not as many generators as prompts.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        if output_type not in ("pil", "np", "pt"):
            raise ValueError(f"output_type {output_type}: give pil, np or pt")
        if isinstance(generator, list) and len(generator) != len(prompts):
            raise ValueError(f"{len(generator)} generators for {len(prompts)} prompts: give one for each, or one for all")
        generators = generator if isinstance(generator, list) else [generator or _unseeded()] * len(prompts)

        captions, mask = self._encode(prompts)
        noise = self.scheduler.draw_noise(generators, self._latent_shape(num_frames, height, width))
        latents = self.scheduler.sample(
            self.transformer,
            captions.to(self._execution_device),
            mask.to(self._execution_device),
            noise.to(self._execution_device),
            generators,
            steps=num_inference_steps,
            guidance=guidance_scale,
        )
        frames = self._decode(latents)
        self.maybe_free_model_hooks()
        shown: Any = frames
        if output_type == "np":
            shown = frames.numpy().astype(np.float32) / 255
        elif output_type == "pil":
            shown = [[Image.fromarray(frame) for frame in clip] for clip in frames.numpy()]
        return Clips(frames=shown) if return_dict else (shown,)

    def _encode(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        """Vectors fp32 (B, L, width), zero where padded, and mask bool (B, L), true on tokens. L is the longest prompt's length."""
        most = self.transformer.network.config.caption_tokens
        if self.config.clean_captions:
            prompts = [clean(prompt) for prompt in prompts]
        told = self.tokenizer(prompts, padding="longest", truncation=True, max_length=most, return_tensors="pt")
        device = self._execution_device
        vectors = self.text_encoder(input_ids=told["input_ids"].to(device), attention_mask=told["attention_mask"].to(device))[0]
        mask = told["attention_mask"].bool()
        return vectors.float().cpu() * mask[:, :, None], mask

    def _latent_shape(self, frames: int | None, height: int | None, width: int | None) -> tuple[int, int, int, int]:
        """(C, T, h, w), the shape of latents for a clip of this size in pixels."""
        network, factor = self.transformer.network, self.vae_factor
        pt, ph, pw = network.config.patch
        for name, size, patch in (("num_frames", frames, pt), ("height", height, factor * ph), ("width", width, factor * pw)):
            if size is not None and (size < 1 or size % patch):
                raise ValueError(f"{name} {size} is not a multiple of {patch}")
        trained = network.input_size
        return (
            network.config.latent_channels,
            frames or trained[0],
            height // factor if height else trained[1],
            width // factor if width else trained[2],
        )

    @property
    def vae_factor(self) -> int:
        """Pixels per latent row and column."""
        return int(getattr(self.vae.config, "factor", 0) or 2 ** (len(self.vae.config.block_out_channels) - 1))

    def _decode(self, latents: Tensor) -> Tensor:
        """(B, C, T, h, w) -> uint8 (B, T, H, W, 3) on the CPU."""
        clips, channels, count, rows, columns = latents.shape
        images = latents.transpose(1, 2).reshape(clips * count, channels, rows, columns)
        config = self.vae.config
        scale, shift = getattr(config, "scaling_factor", None) or 1.0, getattr(config, "shift_factor", None) or 0.0
        parts = []
        for some in images.split(self.config.vae_frames or len(images)):
            pixels = self.vae.decode((some.float() / scale + shift).to(self.vae.dtype)).sample.float()
            parts.append(((pixels + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).cpu())
        frames = torch.cat(parts)
        return frames.reshape(clips, count, *frames.shape[1:]).permute(0, 1, 3, 4, 2).contiguous()


def _unseeded() -> torch.Generator:
    generator = torch.Generator()
    generator.seed()
    return generator
