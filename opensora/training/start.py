"""Where a stage starts: from its own newest checkpoint, from its parent's last one, from imported weights, or from nothing.

Owns that choice, what is carried over and what is made anew, and every refusal of a checkpoint that is of another stage.
Refuses to read tensors: `opensora.training.network` and the strategies load them from `Start.reader`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from opensora import identity
from opensora.checkpoint import reader as checkpoint
from opensora.config import StageConfig
from opensora.errors import ParentError
from opensora.training.run_directory import RunDirectory

PLACES = ("data.source.path", "weights", "autoencoder.path", "text.path")
"""Fields of a stage that say where something lies. They may differ between a checkpoint and the stage that resumes it, because what lies
there is compared by content: clips by their digest (`opensora.training.clips`), encoders by that of their files (`encoders.protocol`).
Imported weights are in the checkpoint."""

LAYOUT = ("batch_size", "data.buckets", "accumulate", "parallel")
"""Fields that say how the clips of a step are divided over the ranks. With other values at the same global batch the same numbers are added
up in another order."""


@dataclass(frozen=True)
class Start:
    """Where a stage continues, and how far it is. `carried` and `reset` go into CHECKPOINT.json."""

    reader: checkpoint.Reader | None = None
    """The checkpoint that tensors come from. None: the weights are imported or new."""
    weights: Literal["model", "ema"] = "model"
    """Which part of that checkpoint becomes the stage's weights."""
    ema: bool = False
    """Whether the moving average comes from the checkpoint too. If not, it starts as a copy of the weights."""
    optimizer: bool = False
    """Whether the optimizer's moments come from the checkpoint too."""
    step: int = 0
    """Optimizer steps that the stage has taken."""
    seen: tuple[int, ...] | None = None
    """Position in the stream of clips, as `Record.seen`. None means the start of the stream."""
    clips: str | None = None
    """Digest over the clips of that stream, as `Record.clips`. None: any clips will do."""
    carried: tuple[str, ...] = ()
    """What the stage took from the checkpoint, in words."""
    reset: tuple[str, ...] = ()
    """What the stage makes anew, in words."""
    layout: str | None = None
    """How the work is divided otherwise than when the checkpoint was made, in words. None: as then, and the resume is bitwise."""

    @property
    def encoders(self) -> Path | None:
        """Directory of the encoders' files. None: the encoders are made from the stage's own clips."""
        return self.reader.path if self.reader is not None else None


def find_start(run: RunDirectory, stage: StageConfig, world: int) -> Start:
    """The newest checkpoint of this stage, else the parent's checkpoint, else the configured import, else nothing.

    Args:
        world: ranks of the job.

    Raises:
        ParentError: the checkpoint that is there does not fit this stage.
    """
    own = checkpoint.latest(run.checkpoints)
    if own is not None:
        return _resume(own, stage, world)
    if run.parent is not None:
        return _chain(run.parent, stage)
    tables = f"position tables for {_size(stage)}"
    if stage.weights is not None:
        return Start(carried=(f"weights of {stage.weights}",), reset=(tables, "optimizer", "ema", "encoders"))
    return Start(reset=("weights", tables, "optimizer", "ema", "encoders"))


def _resume(path: Path, stage: StageConfig, world: int) -> Start:
    reader = checkpoint.Reader(path)
    record = reader.record
    differences = identity.differences(reader.stage, stage, record.world_size, world)
    others = [one for one in differences if one.kind == "identity" and one.path not in PLACES]
    if others:
        facts = "; ".join(f"{one.path} was {_shown(one.path, one.old)}, is {_shown(one.path, one.new)}" for one in others)
        raise ParentError(
            f"checkpoint {path}: step {record.step} is of another stage ({facts}), and the numbers would be those of neither. "
            "Set these back to go on from it, or start the stage anew in a run directory without checkpoints"
        )
    return Start(
        reader,
        "model",
        ema=True,
        optimizer=True,
        step=record.step,
        seen=record.seen,
        clips=record.clips,
        carried=record.carried,
        reset=record.reset,
        layout=_layout(differences, record.world_size, world),
    )


def _shown(path: str, value: object) -> str:
    if path == "global batch" and isinstance(value, list):
        return " and ".join(f"{clips}" for clips in value) + " clips"
    return json.dumps(value) if isinstance(value, list | dict) else str(value)


def _layout(differences: Sequence[identity.Difference], then: int, now: int) -> str | None:
    """`resumed on 4 of 8 ranks, not bitwise`: why sums are added up in another order than in the checkpoint's steps."""
    changed = [one for one in differences if one.path.startswith(LAYOUT)]
    facts = [f"on {now} of {then} ranks" if now < then else f"on {now} ranks instead of {then}"] if now != then else []
    others = [f"{one.path} {_shown(one.path, one.new)} instead of {_shown(one.path, one.old)}" for one in changed]
    facts += [f"with {' and '.join(others)}"] if others else []
    return f"resumed {' '.join(facts)}, not bitwise" if facts else None


def _chain(path: Path, stage: StageConfig) -> Start:
    reader = checkpoint.Reader(path)
    record, parent = reader.record, reader.stage
    if not record.complete:
        raise ParentError(f"parent {path}: it stopped at step {record.step} of {record.steps}; finish that stage first")
    for one in identity.misfits(stage, parent):
        raise ParentError(f"parent {path}: its {one.path} is {one.old}, this stage's is {one.new}; no rule turns one into the other")
    source, carry = stage.parent.weights, stage.parent.optimizer == "carry"
    carried, reset = [f"weights ({source})", "autoencoder", "text encoder"], ["step", "data position", "ema (starts at the weights)"]
    (carried if carry else reset).append("optimizer")
    reset.append(f"position tables ({_size(parent)} -> {_size(stage)})")
    return Start(reader, source, optimizer=carry, carried=tuple(carried), reset=tuple(reset))


def _size(stage: StageConfig) -> str:
    _, frames, rows, columns = stage.latent_shape
    return f"{frames}x{rows}x{columns}"
