"""What a training step needs of the ranks that divide it: one small interface. `opensora.distributed.parallel` says which strategies are
behind it.

Owns the gradients: from a loss to an update, and what of the state each rank writes into a checkpoint. Refuses to know what a loss is.
Everything from `backward` to `step` stays on the device: nothing here waits for it.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor, nn

from opensora.checkpoint.reader import Reader, TensorShard

Shards = dict[str, dict[str, TensorShard]]
"""By part of a checkpoint (model, ema, optimizer) and tensor."""


class Strategy(Protocol):
    """What a training step needs of its ranks. Every method is called by all of them."""

    @property
    def model(self) -> nn.Module:
        """What a step calls."""

    def backward(self, loss: Tensor, *, first: bool = True, last: bool = True) -> None:
        """Gradients of this rank's loss, added to those of the parts of this step before it.

        Args:
            first: of the step's parts: the gradients of the step before are gone.
            last: of the step's parts: gradients may travel between the ranks. `finite` and `reduce` come after it.
        """

    def finite(self) -> Tensor:
        """0-dim bool on the device: whether the gradients that this rank can see are finite."""

    def reduce(self, flags: Tensor) -> Tensor:
        """Average the gradients over the ranks. `flags`, fp32 (n,), comes back summed over all of them. Raises PeerLost."""

    def norm(self) -> Tensor:
        """0-dim fp32 on the device: of the whole averaged gradient. After `reduce`."""

    def step(self, lr: float, scale: Tensor, step: int) -> None:
        """Update weights with `scale` times the gradients, then their moving average. Where the norm is not finite, do not move weights."""

    def writer(self, rank: int) -> int:
        """A rank's number among those who write a checkpoint: in the order of the rows that they write."""

    def shards(self) -> Shards:
        """What this rank writes of a checkpoint; the ranks together write each row of each tensor once."""

    def load(self, reader: Reader, *, ema: bool, optimizer: bool) -> None:
        """Take moving average and moments from a checkpoint, made by any strategy on any number of ranks."""

    def averaged(self) -> dict[str, Tensor]:
        """The moving average as a whole state dict, on every rank."""


def not_finite(norm: Tensor) -> Tensor:
    """fp32 (1,): 1 where an optimizer must not move the weights."""
    return (~norm.isfinite()).float().reshape(1)
