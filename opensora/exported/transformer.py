"""The STDiT as a model of diffusers: saved, loaded, cast and moved as those are. The network itself is osctl's own source."""

# mypy: disable-error-code="untyped-decorator, no-untyped-call, attr-defined, misc, assignment"
# (diffusers says that it is typed, and half is)

from __future__ import annotations

from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor

from opensora.config import ModelConfig
from opensora.model import STDiT


class _Network(STDiT):
    def initialise(self, generator: torch.Generator | None = None) -> None:
        """Not at all: every weight comes from the file, and random ones for 760M take 10 s."""


class OpenSoraTransformer(ModelMixin, ConfigMixin):
    @register_to_config
    def __init__(self, model: dict[str, Any], input_size: tuple[int, int, int], out_channels: int) -> None:
        """model: fields of ModelConfig · input_size: latent frames, rows and columns that it was trained for."""
        super().__init__()
        frames, rows, columns = input_size
        self.network = _Network(ModelConfig(**{**model, "patch": tuple(model["patch"])}), (frames, rows, columns), out_channels)

    def forward(self, x: Tensor, time: Tensor, captions: Tensor, mask: Tensor | None = None, drop: Tensor | None = None) -> Tensor:
        """As STDiT's: (B, C, T, H, W) noisy latents -> (B, C_out, T, H, W), fp32."""
        prediction: Tensor = self.network(x, time, captions, mask, drop)
        return prediction
