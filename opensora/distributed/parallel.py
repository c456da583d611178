"""Which strategy divides a stage's training step over its ranks.

    ddp         every rank holds all weights (`opensora.distributed.ddp`)
    fsdp        weights, gradients, optimizer and moving average are divided over the ranks (`opensora.distributed.fsdp`)
    colossalai  ColossalAI's Booster (`opensora.distributed.colossal`)

and, under ddp and fsdp, `sequence` ranks that share each clip (`opensora.model.sequence_parallel`). `opensora.distributed.strategy` is
what all of them do.
"""

from __future__ import annotations

from typing import cast

import torch.distributed as dist

from opensora.config import StageConfig
from opensora.distributed.ddp import Replicated
from opensora.distributed.fsdp import Sharded
from opensora.distributed.ranks import Ranks
from opensora.distributed.strategy import Strategy
from opensora.errors import ConfigError
from opensora.model.sequence_parallel import Sequence
from opensora.model.stdit import STDiT


def build(model: STDiT, stage: StageConfig, ranks: Ranks) -> Strategy:
    """The stage's strategy around a model that has its weights already and lies on the rank's device.

    Raises:
        ConfigError: the ranks cannot be divided as asked.
    """
    parallel = stage.parallel
    if parallel.sequence > 1:
        model.sequence = share_clips(ranks, parallel.sequence)
    if parallel.strategy == "colossalai":
        from opensora.distributed.colossal import Colossal  # colossalai takes 15 s to import

        return Colossal(model, stage, ranks)
    if parallel.strategy == "fsdp":
        return Sharded(model, stage, ranks)
    return Replicated(model, stage, ranks)


def data_ranks(ranks: Ranks, sharing: int) -> tuple[int, int]:
    """This rank's number among those with clips of their own, and how many such there are: so many neighbours share theirs.

    Raises:
        ConfigError: the ranks do not divide.
    """
    if ranks.world % sharing:
        raise ConfigError(f"parallel: {sharing} ranks share a clip, which does not divide {ranks.world} ranks; use other numbers")
    return ranks.rank // sharing, ranks.world // sharing


def share_clips(ranks: Ranks, count: int) -> Sequence:
    """The group of neighbouring ranks that share this rank's clips. Raises ConfigError."""
    data_ranks(ranks, count)
    groups = [dist.new_group(list(range(first, first + count))) for first in range(0, ranks.world, count)]  # every rank makes all of them
    return Sequence(cast(dist.ProcessGroup, groups[ranks.rank // count]), ranks.rank % count, count)
