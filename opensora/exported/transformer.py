"""The STDiT as a model of diffusers, which saves, loads, casts and moves it. The network itself is osctl's own source."""

# mypy: disable-error-code="untyped-decorator, no-untyped-call, attr-defined, misc, assignment"
# (diffusers declares itself typed, but half of it is not)

from __future__ import annotations

from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor

from opensora.config import ModelConfig
from opensora.model.stdit import STDiT


class _Network(STDiT):
    def initialise(self, generator: torch.Generator | None = None) -> None:
        """Does nothing: every weight comes from the file, and to draw 760M random ones takes 10 s."""


class OpenSoraTransformer(ModelMixin, ConfigMixin):
    @register_to_config
    def __init__(self, model: dict[str, Any], input_size: tuple[int, int, int], out_channels: int) -> None:
        """`model` has the fields of ModelConfig; `input_size` is the latent frames, rows and columns that it was trained for."""
        super().__init__()
        frames, rows, columns = input_size
        self.network = _Network(ModelConfig(**{**model, "patch": tuple(model["patch"])}), (frames, rows, columns), out_channels)

    def forward(
        self,
        x: Tensor,
        time: Tensor,
        captions: Tensor,
        mask: Tensor | None = None,
        drop: Tensor | None = None,
        given: Tensor | None = None,
    ) -> Tensor:
        """Same as STDiT.forward: (B, C, T, H, W) noisy latents -> (B, C_out, T, H, W), fp32."""
        prediction: Tensor = self.network(x, time, captions, mask, drop, given)
        return prediction
