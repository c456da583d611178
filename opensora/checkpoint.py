"""Checkpoints on disk: the one file that knows their layout (docs/contracts.md, section 1).

A checkpoint is a directory `step-00000100` of safetensors, `stage.yaml` and `CHECKPOINT.json`. It is built under a hidden name,
flushed to the disk and renamed, so one that has its name is whole: a crash or a full disk leaves the earlier ones as they were.
It is a text-to-video model by itself: weights, moving average, optimizer, autoencoder and text encoder.
On several nodes each writes its share of the files into a directory of its own: only together they are a checkpoint.
Nothing is pickled. Digests are the agent's; here sizes, names and shapes are compared.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from pydantic import Field, NonNegativeInt, PositiveInt, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from yaml import YAMLError

from opensora.config import Autoencoder, DataConfig, Frozen, ModelConfig, Objective, StageConfig, TextEncoder, read_stage, write_stage
from opensora.encoders import copy_encoders
from opensora.errors import DiskFull, ParentError

RECORD = "CHECKPOINT.json"
TENSORS = ("model", "ema", "optimizer")
NAMED = 10  # names of missing or unexpected tensors that a message lists
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class Record(Frozen):
    """CHECKPOINT.json: what the directory holds, and from where it continues."""

    schema_: Literal[1] = Field(1, alias="schema")
    step: NonNegativeInt
    """Optimizer steps taken in this stage."""
    steps: NonNegativeInt
    """Optimizer steps of the whole stage."""
    complete: bool
    """Whether the stage is at its end."""
    seed: NonNegativeInt
    world_size: PositiveInt
    clips_seen: NonNegativeInt
    """Position in the stream of clips: over all ranks, since the start of the stage."""
    files: dict[str, NonNegativeInt]
    """Bytes of every other file."""
    model: ModelConfig
    objective: Objective
    data: DataConfig
    autoencoder: Autoencoder
    text: TextEncoder
    carried: tuple[str, ...]
    """What the stage took from its parent."""
    reset: tuple[str, ...]
    """What it made anew."""


def directory(folder: Path, step: int) -> Path:
    """Where the checkpoint of `step` lies under `checkpoints/`."""
    return folder / f"step-{step:08d}"


def save(
    folder: Path,
    stage: StageConfig,
    tensors: Mapping[str, Mapping[str, Tensor]],
    encoders: Path,
    *,
    step: int,
    world_size: int,
    clips_seen: int,
    carried: tuple[str, ...],
    reset: tuple[str, ...],
    node: int = 0,
    nodes: int = 1,
) -> Path:
    """Write one checkpoint, whole or not at all; then forget those that `stage.checkpoint.keep_last` no longer covers.

    Args:
        tensors: of each of TENSORS by name.
        encoders: directory that holds autoencoder.safetensors and text.safetensors.
        node: of `nodes` that share the work: this one writes its files only.

    Raises:
        DiskFull: the disk is full; what was written is removed.
    """
    target = directory(folder, step)
    with _building(target) as partial:
        for name in TENSORS[node::nodes]:
            save_file({key: value.detach().cpu().contiguous() for key, value in tensors[name].items()}, partial / f"{name}.safetensors")
        if node == 0:
            copy_encoders(encoders, partial)
            write_stage(stage, partial / "stage.yaml")
        record = Record(
            schema=1,
            step=step,
            steps=stage.steps,
            complete=step == stage.steps,
            seed=stage.seed,
            world_size=world_size,
            clips_seen=clips_seen,
            files={path.name: path.stat().st_size for path in sorted(partial.iterdir())},
            model=stage.model,
            objective=stage.objective,
            data=stage.data,
            autoencoder=stage.autoencoder,
            text=stage.text,
            carried=carried,
            reset=reset,
        )
        (partial / RECORD).write_text(json.dumps(record.model_dump(mode="json", by_alias=True), indent=1) + "\n")
    _prune(folder, stage.checkpoint.keep_last)
    return target


@contextmanager
def _building(target: Path) -> Iterator[Path]:
    """A hidden directory that becomes `target` when the block ends well, and vanishes when it does not."""
    partial = target.parent / f".{target.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        for path in (*partial.iterdir(), partial):
            _flush(path)
        partial.rename(target)
        _flush(target.parent)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        if is_disk_full(error):
            raise DiskFull(f"checkpoint {target}: {error}; earlier checkpoints are intact, make room and launch again") from error
        raise


def is_disk_full(error: Exception) -> bool:
    """Whether a failed write says that there is no room (or no quota) left. safetensors puts the number into its text."""
    if isinstance(error, OSError):
        return error.errno in FULL
    return isinstance(error, SafetensorError) and any(f"(os error {number})" in str(error) for number in FULL)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _prune(folder: Path, keep_last: int) -> None:
    for old in finished(folder)[:-keep_last]:
        shutil.rmtree(old)


def finished(folder: Path) -> list[Path]:
    """The whole checkpoints of a run directory, oldest first."""
    return sorted(path for path in folder.glob("step-*") if (path / RECORD).is_file())


def latest(folder: Path) -> Path | None:
    """The whole checkpoint with the highest step."""
    return next(reversed(finished(folder)), None)


def read(path: Path) -> tuple[Record, StageConfig]:
    """What a checkpoint says it is.

    Raises:
        ParentError: it is not whole: a file is missing or has another size, or the record cannot be read.
    """
    try:
        record = Record.model_validate_json((path / RECORD).read_bytes())
        stage = read_stage(path / "stage.yaml")
    except FileNotFoundError as error:
        raise _broken(path, f"{Path(error.filename).name} is missing") from error
    except (ValidationError, ValueError, YAMLError) as error:
        raise _broken(path, f"a record cannot be read: {str(error).splitlines()[0]}") from error
    for name, size in record.files.items():
        found = (path / name).stat().st_size if (path / name).is_file() else None
        if found != size:
            raise _broken(path, f"{name} has {'no' if found is None else found} bytes, {RECORD} says {size}")
    if (
        record.model != stage.model
        or record.data != stage.data
        or record.steps != stage.steps
        or record.complete != (record.step == stage.steps)
    ):
        raise _broken(path, f"{RECORD} and stage.yaml do not describe the same stage")
    return record, stage


def _broken(path: Path, fact: str) -> ParentError:
    return ParentError(f"checkpoint {path}: {fact}; take it from the store again")


def load(path: Path, name: str) -> dict[str, Tensor]:
    """The tensors of one of TENSORS, on the CPU.

    Raises:
        ParentError: the file is not whole or not safetensors.
    """
    try:
        return load_file(path / f"{name}.safetensors")
    except (SafetensorError, FileNotFoundError) as error:
        raise _broken(path, f"{name}.safetensors: {error}") from error


def compare(expected: Mapping[str, Tensor], found: Mapping[str, Tensor], subject: str) -> None:
    """Accept `found` in place of `expected` only where every name and shape is the same.

    Raises:
        ParentError: with the first names that differ.
    """
    facts = []
    for what, names in (("missing", expected.keys() - found.keys()), ("unexpected", found.keys() - expected.keys())):
        if names:
            facts.append(f"{len(names)} tensors {what} ({_some(sorted(names))})")
    shapes = [
        f"{name} {tuple(found[name].shape)} for {tuple(value.shape)}"
        for name, value in expected.items()
        if name in found and found[name].shape != value.shape
    ]
    if shapes:
        facts.append(f"{len(shapes)} shapes differ ({_some(shapes)})")
    if facts:
        raise ParentError(f"{subject}: {'; '.join(facts)}; start from a checkpoint of this architecture")


def _some(names: list[str]) -> str:
    return ", ".join(names[:NAMED]) + (", ..." if len(names) > NAMED else "")
