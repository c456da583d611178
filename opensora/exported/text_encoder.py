"""The word encoder as a model of diffusers: a table with a vector for each word (`opensora.encoders.embedded`)."""

# mypy: disable-error-code="untyped-decorator, no-untyped-call, attr-defined, misc, assignment"
# (diffusers declares itself typed, but half of it is not)

from __future__ import annotations

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor


class OpenSoraWordEncoder(ModelMixin, ConfigMixin):
    @register_to_config
    def __init__(self, words: int, width: int) -> None:
        super().__init__()
        self.vectors = torch.nn.Parameter(torch.empty(words, width), requires_grad=False)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor]:
        """(B, L) word numbers -> ((B, L, width),), zero where the mask is zero."""
        return (self.vectors[input_ids] * attention_mask[:, :, None],)
