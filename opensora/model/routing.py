"""Tokens that skip the middle blocks in training, as whole tubes: of each clip some places of the frame, in all of its frames.

Owns which tubes go through the middle blocks, and how they leave the residual stream and come back. Refuses to know what a block does.
A tube is a place in all frames, so that every frame keeps equally many tokens and temporal attention still sees all frames of a token.

Reference: TREAD, Krause et al. (arXiv:2501.04765 §3: a share of the tokens is routed from an early block to a late one, and sampling uses
all tokens).
Legend: B batch · T latent frames · S spatial tokens of a frame · D width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from opensora.config import RoutingConfig


@dataclass(frozen=True)
class Route:
    """Where the tokens of a batch go."""

    through: Tensor
    """(B, S') places of the tubes of each clip that go through all blocks, rising."""
    first: int
    """The first block that the other tubes skip."""
    stop: int
    """The block after the last one that they skip: they are back before it."""

    def take(self, x: Tensor) -> Tensor:
        """(B, T, S, D) -> (B, T, S', D): the tubes that go through."""
        return x.gather(2, self._index(x))

    def put(self, x: Tensor, routed: Tensor) -> Tensor:
        """x (B, T, S, D), of which the tubes that went through are now `routed` (B, T, S', D)."""
        return x.scatter(2, self._index(x), routed)

    def _index(self, x: Tensor) -> Tensor:
        return self.through[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3])


def draw(config: RoutingConfig, depth: int, clips: int, tubes: int, generator: torch.Generator) -> Route | None:
    """Which tubes of each clip go through, each set equally likely. None, and nothing drawn, where all of them do.

    Args:
        depth: blocks of the model.
        tubes: S, spatial tokens of a frame.
    """
    kept = config.tubes_through(tubes)
    if kept == tubes:
        return None
    order = torch.rand(clips, tubes, generator=generator, device=generator.device).argsort(1)
    return Route(order[:, :kept].sort(1).values, config.first_blocks, depth - config.last_blocks)
