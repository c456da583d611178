"""Sampling from noise to latents, as a scheduler of diffusers. Its configuration is the stage's objective and sampling.

It samples whole clips rather than single steps, because guidance and the variance of a step depend on each other here.
"""

# mypy: disable-error-code="untyped-decorator, no-untyped-call, attr-defined, misc, assignment"
# (diffusers declares itself typed, but half of it is not)

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch import Tensor

from opensora.config import IDDPM, Flow, SamplingConfig
from opensora.diffusion import guidance as guiding
from opensora.diffusion import objective as objectives

KINDS: dict[str, type[IDDPM | Flow]] = {"iddpm": IDDPM, "flow": Flow}


class OpenSoraScheduler(SchedulerMixin, ConfigMixin):
    @register_to_config
    def __init__(self, objective: dict[str, Any], sampling: dict[str, Any]) -> None:
        """Fields of the stage's objective and SamplingConfig."""
        self.objective = objectives.build(KINDS[objective["kind"]](**objective))
        self.sampling = dict(sampling)

    def draw_noise(self, generators: Sequence[torch.Generator], shape: tuple[int, ...]) -> Tensor:
        """(B, *shape) standard normal noise; generator i draws that of clip i."""
        return objectives.draw_noise(generators, shape)

    def sample(
        self,
        model: guiding.CaptionedNetwork,
        captions: Tensor,
        mask: Tensor | None,
        noise: Tensor,
        generators: Sequence[torch.Generator],
        *,
        steps: int | None = None,
        guidance: float | None = None,
    ) -> Tensor:
        """Clean latents from noise. None means the configuration's own steps or guidance. See `opensora.diffusion.objective`."""
        asked = {"steps": steps, "guidance": guidance}
        sampling = SamplingConfig(**(self.sampling | {name: value for name, value in asked.items() if value is not None}))
        network = guiding.guided(model, captions, mask, guiding.Guidance.of(sampling), last_time=self.objective.last_time)
        return self.objective.sample(network, noise, sampling, generators)
