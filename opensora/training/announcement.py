"""What a stage says in the log before its first step: model, clips, batch, optimizer, and what it starts from."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from torch import nn

from opensora import identity
from opensora.config import StageConfig
from opensora.dataset.usage import Usage
from opensora.distributed.ranks import Ranks
from opensora.latents.prepared import Prepared
from opensora.printable import printable
from opensora.training.start import Start

log = logging.getLogger(__name__)


def announce(stage: StageConfig, ranks: Ranks, network: nn.Module, prepared: Prepared, start: Start) -> None:
    """Log what is about to run. Called by the first rank."""
    model, optimizer = stage.model, stage.optimizer
    count = sum(weight.numel() for weight in network.parameters())
    trained = sum(weight.numel() for weight in network.parameters() if weight.requires_grad)
    rows = [
        ("model", f"STDiT {model.depth}x{model.width}, {model.heads} heads, {count:,} parameters, {trained:,} of them trained"),
        ("objective", f"{stage.objective.kind}, caption dropout {model.caption_dropout:g}, freeze {stage.freeze}"),
        *_clips(stage, ranks, [len(part) for part in prepared.parts], prepared.usage, start.step),
        ("optimizer", f"AdamW, lr {optimizer.lr:g} ({optimizer.warmup_steps} warm-up, {optimizer.decay}), ema {stage.ema_decay:g}"),
        ("carried", ", ".join(start.carried) or "nothing"),
        ("reset", ", ".join(start.reset) or "nothing"),
    ]
    for name, value in rows:
        log.info("%-10s %s", name, printable(value))
    if start.layout:
        log.info("%s", start.layout)


def _clips(stage: StageConfig, ranks: Ranks, counts: Sequence[int], usage: Usage, step: int) -> list[tuple[str, str]]:
    """Clips, tokens and batch of each size, which sizes have fewer clips than a step takes, and what of the data is not used."""
    rows, batches, repeats = [], [], []
    for bucket, clips, batch in zip(stage.buckets, counts, identity.global_batches(stage, ranks.world), strict=True):
        (frames, spatial), size = stage.tokens_of(bucket), f"{bucket.frames}x{bucket.height}x{bucket.width}"
        rows.append(("clips", f"{clips:,} of {size} pixels, {frames}x{spatial} tokens"))
        batches.append((size, f"{bucket.batch_size} x {_readers(stage, ranks)}"))
        if 0 < clips < batch:
            fact = f"bucket {size} has {clips} clips, a step takes {batch}: each step holds a clip more than once"
            repeats.append(("warning", fact))
    repeats += [("data", sentence) for sentence in usage.sentences()]
    rows[-1] = ("clips", f"{rows[-1][1]}; {usage.left_out:,} left out")
    if len(batches) == 1:
        return [*rows, ("steps", f"{step} -> {stage.steps}, batch {batches[0][1]} on {_devices(ranks)}"), *repeats]
    steps = ("steps", f"{step} -> {stage.steps} on {_devices(ranks)}, each of one size")
    return [*rows, steps, *(("batch", f"{batch} of {size}") for size, batch in batches), *repeats]


def _readers(stage: StageConfig, ranks: Ranks) -> str:
    sharing = stage.parallel.ranks_per_clip
    readers = f"{ranks.world} ranks" if sharing == 1 else f"{ranks.world // sharing} groups of {sharing} ranks"
    return f"{readers} x {stage.accumulate} parts" if stage.accumulate > 1 else readers


def _devices(ranks: Ranks) -> str:
    return f"{ranks.device}" if ranks.nodes == 1 else f"{ranks.device}, {ranks.nodes} nodes"
