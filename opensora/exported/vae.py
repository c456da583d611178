"""The patch autoencoder as a model of diffusers. It makes patches of pixels from principal components (`opensora.encoders.embedded`)."""

# mypy: disable-error-code="untyped-decorator, no-untyped-call, attr-defined, misc, assignment"
# (diffusers declares itself typed, but half of it is not)

from __future__ import annotations

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.autoencoders.vae import DecoderOutput
from diffusers.models.modeling_utils import ModelMixin
from einops import rearrange
from torch import Tensor


class OpenSoraPatchAutoencoder(ModelMixin, ConfigMixin):
    mean: Tensor
    components: Tensor
    deviation: Tensor

    @register_to_config
    def __init__(self, factor: int, channels: int) -> None:
        """`factor` is pixels per latent row and column, `channels` those of a latent."""
        super().__init__()
        values = 3 * factor * factor
        for name, shape in (("mean", (values,)), ("components", (channels, values)), ("deviation", ())):
            self.register_parameter(name, torch.nn.Parameter(torch.empty(shape), requires_grad=False))

    def decode(self, latents: Tensor) -> DecoderOutput:
        """(N, C, h, w) -> pixels in about [-1, 1], (N, 3, h·factor, w·factor)."""
        rows, columns = latents.shape[-2:]
        flat = rearrange(latents, "n c h w -> (n h w) c")
        patches = flat @ (self.components * self.deviation) + self.mean
        factor = self.config.factor
        return DecoderOutput(sample=rearrange(patches, "(n h w) (c p q) -> n c (h p) (w q)", h=rows, w=columns, c=3, p=factor, q=factor))
