"""How much memory drawing clips needs on each device, from configuration and sizes alone: no torch.

Owns the prediction. `opensora.evaluation.memory_plan` holds it against what a device has free.

What was measured (tests/opensora/planning/test_sampling.py): on a CPU, in fp32, the peak of torch's allocations of the whole way from noise
to latents, over shapes, samplers and guidance; the prediction is within 10%. AutoencoderKL's decoder takes 6.1 to 7.8 maps, and 8 are
counted. Not measured on a GPU: there libraries and fragments come on top, for which the plan leaves a share free.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from opensora.config import StageConfig
from opensora.planning.flops import parameters

FP32 = 4
STREAMS, STREAMS_IN_IMAGES = 7, 5
"""Tensors as wide as the residual stream that a block has at its MLP, beside the hidden one before and after its GELU."""
AT_ATTENTION = 10
"""The same at its attention, with queries, keys and values."""
LATENTS = 8
"""Latent-sized tensors of a sampler and of guidance around the network, the prediction in two halves included."""


@dataclass(frozen=True)
class SamplingMemory:
    """Bytes of one device."""

    network: int
    """Its weights, fp32."""
    encoders: int
    """Weights of text encoder and autoencoder."""
    drawing: int
    """The most while the network is evaluated."""
    decoding: int
    """The most while frames are decoded, after that."""

    @property
    def total(self) -> int:
        return self.network + self.encoders + max(self.drawing, self.decoding)


@dataclass(frozen=True)
class Encoders:
    """What encoders need, as far as they are not loaded yet."""

    weights: int = 0
    """Bytes."""
    decoded_at_once: int | None = None
    """Frames that the autoencoder decodes at once; None means all."""
    decoding: float = 3 * FP32 * 3
    """Bytes of a pixel of these frames while they are decoded. The default is that of patches on principal components."""


def predict(
    stage: StageConfig,
    *,
    clips: int,
    frames: int,
    size: tuple[int, int],
    guided: bool,
    encoders: Encoders,
    ranks: int = 1,
    loaded: bool = False,
) -> SamplingMemory:
    """The memory of `clips` clips that are drawn at once.

    Args:
        size: rows and columns in pixels.
        guided: whether the network is evaluated with and without the caption.
        ranks: that share each clip.
        loaded: whether the network is on the device already.
    """
    model, factor = stage.model, stage.autoencoder.factor
    pt, ph, pw = model.patch
    rows, columns = size[0] // factor, size[1] // factor
    own = math.ceil(frames / pt / ranks)
    evaluated = clips * (2 if guided else 1)
    tokens = evaluated * own * (rows // ph) * (columns // pw)
    streams = STREAMS if frames > 1 else STREAMS_IN_IMAGES
    block = max(AT_ATTENTION, streams + 2 * model.mlp_ratio) * tokens * model.width * FP32
    latents = LATENTS * clips * model.latent_channels * frames * rows * columns * FP32
    words = 2 * evaluated * model.caption_tokens * (model.caption_width + model.width) * FP32
    decoded = min(encoders.decoded_at_once or clips * frames, clips * math.ceil(frames / ranks))
    weights = 0 if loaded else FP32 * (parameters(model, stage.out_channels) + model.caption_tokens * model.caption_width)
    decoding = decoded * size[0] * size[1] * encoders.decoding
    return SamplingMemory(weights, encoders.weights, round(block + latents + words), round(decoding))
