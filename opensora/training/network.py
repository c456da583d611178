"""The network of a stage: an STDiT with the weights that the stage starts from, on the device of its rank.

Owns the building: weights from a checkpoint, from an import or new ones; frozen layers; what is kept for the backward pass; compiling.
Refuses to divide it over the ranks: `opensora.distributed.parallel` does that.
"""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path
from typing import Literal

import torch

from opensora import imports
from opensora.checkpoint import foreign
from opensora.checkpoint import reader as checkpoint
from opensora.config import Activations, StageConfig
from opensora.distributed.ranks import Ranks
from opensora.encoders.protocol import null_caption
from opensora.errors import ConfigError, OutOfMemory
from opensora.latents.prepared import Prepared
from opensora.model.stdit import STDiT
from opensora.planning import memory
from opensora.training.seeds import generator_for
from opensora.training.start import Start

log = logging.getLogger(__name__)

RECOMPILE_LIMIT = 64
"""Versions of the blocks that torch may compile, of all blocks together: sizes, lengths of captions, with and without mask or position."""


def build(stage: StageConfig, ranks: Ranks, start: Start, prepared: Prepared) -> STDiT:
    """The network with the weights that the stage starts from, on the rank's device, in training mode.

    Raises:
        ConfigError: the model cannot be made for the size of the stage's clips, or the ranks do not divide.
        ParentError: the weights are not those of this model.
        OutOfMemory: no policy of `activations: auto` fits the device.
    """
    try:
        model = STDiT(
            stage.model,
            stage.latent_shape[1:],
            stage.out_channels,
            generator=generator_for(stage.seed, "weights", 0, 0, torch.device("cpu")),
            initial=start.reader is None,
        )
    except ValueError as error:
        raise ConfigError(f"model: {error}") from error
    if start.reader is not None:
        _load(start.reader, start.weights, model)
    elif stage.weights is not None:
        _import(Path(imports.local(stage.weights)), model, prepared)
    if stage.freeze == "temporal":
        model.freeze_temporal()
    model.keep(_activations(stage, ranks))
    model.to(ranks.device).train()
    if ranks.device.type == "cuda" and stage.compile:
        _compile(model, stage)
    return model


@torch.no_grad()
def _load(reader: checkpoint.Reader, part: Literal["model", "ema"], model: STDiT) -> None:
    """Copy a checkpoint's weights, one tensor after the other: the files are mapped, so no second copy of the model is made."""
    own = model.state_dict()
    checkpoint.compare(own, reader.names(part), f"{part} weights to start from")
    for name, weight in own.items():
        weight.copy_(reader.tensor(part, name))


@torch.no_grad()
def _import(path: Path, model: STDiT, prepared: Prepared) -> None:
    report = foreign.load(path, model)
    log.info("weights: %d tensors of %s (%s); recomputed: %s", len(report.mapped), path, report.format, report.recomputed)
    missing = set(report.missing)
    if "null_caption" in missing:  # diffusers' layout has none: its pipeline encodes an empty prompt
        null = null_caption(prepared.text, *model.null_caption.shape)
        if null is not None:
            model.null_caption.copy_(null)
            missing.remove("null_caption")
    log.info("weights: not in the file and as in a new model: %s", ", ".join(sorted(missing)) or "nothing")


def _activations(stage: StageConfig, ranks: Ranks) -> Activations:
    """The stage's policy. For `auto`: on CUDA the fastest policy that fits the device, on a CPU the one that keeps everything."""
    if stage.activations.recompute != "auto":
        return stage.activations
    if ranks.device.type != "cuda":
        return stage.activations.model_copy(update={"recompute": "none"})
    try:
        choice = memory.choose(stage, torch.cuda.get_device_properties(ranks.device).total_memory, ranks.world)
    except memory.DoesNotFit as error:
        raise OutOfMemory(str(error)) from error
    except ValueError as error:  # ranks that do not divide
        raise ConfigError(str(error)) from error
    log.info("activations: %s", choice.reason)
    return choice.activations


def _compile(model: STDiT, stage: StageConfig) -> None:
    if reason := why_not_compiled(stage):
        log.info("compile: off, %s", reason)
        return
    torch._dynamo.config.recompile_limit = RECOMPILE_LIMIT
    for block in model.blocks:
        block.compile()


def why_not_compiled(stage: StageConfig) -> str | None:
    """Why the blocks are not compiled on CUDA. None: nothing speaks against compiling them."""
    if stage.parallel.sequence > 1 or stage.parallel.plugin != "torch_ddp":
        return "exchanges inside of a block would cut its graph in three"
    if stage.activations.recompute == "selective":
        return "torch does not see into a compiled block what `selective` would keep, and would compute all of it again"
    if not any(shutil.which(name) for name in (os.environ.get("CC", "cc"), "gcc", "clang")):
        return "this machine has no C compiler, which Triton needs"
    return None
