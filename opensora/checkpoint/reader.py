"""Checkpoints on disk: the one module that knows their layout (docs/contracts.md, section 1).

A checkpoint is a directory `step-00000100` with safetensors, `stage.yaml` and `CHECKPOINT.json`. It is built under a hidden name,
flushed to the disk and renamed, so a checkpoint that has its name is whole, and a crash or a full disk leaves earlier ones as they were.
A checkpoint is a complete text-to-video model: weights, moving average, optimizer, autoencoder and text encoder.

Each of the three parts is one file, or one file for each rank that wrote: `model-00001-of-00004.safetensors` holds rows of dimension 0 of
every tensor, and its header says which ones. A reader asks for rows of a tensor and need not know how many ranks wrote it.
On several nodes each node writes its ranks' files into its own directory; only together they are a checkpoint.

Owns the record, the names and the contents of files, and reading them; `opensora.checkpoint.writer` writes them. Nothing is pickled. The
agent compares digests; this module compares sizes, names, shapes and rows.
"""

from __future__ import annotations

import errno
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, NonNegativeInt, PositiveInt, ValidationError, model_validator
from safetensors import SafetensorError, safe_open
from torch import Tensor
from yaml import YAMLError

from opensora.config import Autoencoder, DataConfig, Frozen, ModelConfig, Objective, StageConfig, TextEncoder, read_stage
from opensora.errors import ParentError

RECORD = "CHECKPOINT.json"
TENSORS = ("model", "ema", "optimizer")
NAMED = 10  # names of missing or unexpected tensors that a message lists
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class Record(Frozen):
    """CHECKPOINT.json: what the directory holds, and where training continues."""

    schema_: Literal[1] = Field(1, alias="schema")
    step: NonNegativeInt
    """Optimizer steps taken in this stage."""
    steps: NonNegativeInt
    """Optimizer steps of the whole stage."""
    complete: bool
    """Whether this is the stage's last step."""
    seed: NonNegativeInt
    world_size: PositiveInt
    clips_seen: NonNegativeInt
    """Clips that all ranks have taken since the start of the stage: the sum of `seen`."""
    seen: tuple[NonNegativeInt, ...]
    """Position in the stream of clips: how many were taken of each of the stage's sizes (`StageConfig.buckets`)."""
    clips: str
    """Digest over the usable clips in their order. `seen` is a position among these clips and means nothing among others."""
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
    """What the stage initialised anew."""

    @model_validator(mode="after")
    def _adds_up(self) -> Record:
        if sum(self.seen) != self.clips_seen:
            raise ValueError(f"clips_seen is {self.clips_seen}, the sum of seen is {sum(self.seen)}")
        return self


@dataclass(frozen=True)
class TensorShard:
    """What one rank writes of one tensor: all of it, or rows of dimension 0."""

    tensor: Tensor
    """The rows, on any device."""
    start: int = 0
    """First row in the whole tensor."""
    rows: int | None = None
    """Rows of the whole tensor. None means `tensor` is the whole tensor."""

    def __post_init__(self) -> None:
        if self.rows is not None and not 0 <= self.start <= self.start + len(self.tensor) <= self.rows:
            raise ValueError(f"rows {self.start} to {self.start + len(self.tensor)} of {self.rows}")


def directory(folder: Path, step: int) -> Path:
    """Where the checkpoint of `step` lies under `checkpoints/`."""
    return folder / f"step-{step:08d}"


def divide(tensors: Mapping[str, Tensor], writer: int, writers: int) -> dict[str, TensorShard]:
    """What writer `writer` of `writers` writes if each of them holds all tensors: each row once, divided as torch.chunk does."""
    if writers == 1:
        return {name: TensorShard(tensor) for name, tensor in tensors.items()}
    shards = {}
    for name, tensor in tensors.items():
        if tensor.dim():
            each = -(-len(tensor) // writers)
            start = min(writer * each, len(tensor))
            shards[name] = TensorShard(tensor[start : start + each], start, len(tensor))
        elif writer == 0:
            shards[name] = TensorShard(tensor)
    return shards


def file_name(part: str, writer: int = 0, writers: int = 1) -> str:
    """Name of the file that writer `writer` (from 0) of `writers` makes for one of TENSORS."""
    return f"{part}.safetensors" if writers == 1 else f"{part}-{writer + 1:05d}-of-{writers:05d}.safetensors"


def files_of(part: str, names: Iterable[str]) -> list[str]:
    """The files of a checkpoint that make up one of TENSORS, in order.

    Raises:
        ValueError: a file is missing, or there are too many. The message begins with the name of a file.
    """
    pattern = re.compile(rf"{part}(?:-(\d{{5}})-of-(\d{{5}}))?\.safetensors")
    found = sorted(name for name in names if pattern.fullmatch(name))
    match = pattern.fullmatch(found[-1]) if found else None
    writers = int(match[2] or 1) if match else 1
    expected = [file_name(part, writer, writers) for writer in range(writers)]
    for name in expected:
        if name not in found:
            raise ValueError(f"{name} is missing" + (f", {found[-1]} is there" if found else ""))
    if len(found) > writers:
        raise ValueError(f"{sorted(set(found) - set(expected))[0]} is there beside {found[-1]}")
    return found


def is_disk_full(error: Exception) -> bool:
    """Whether a write failed because no room (or no quota) is left. safetensors puts the error number into its text."""
    if isinstance(error, OSError):
        return error.errno in FULL
    return isinstance(error, SafetensorError) and any(f"(os error {number})" in str(error) for number in FULL)


def finished(folder: Path) -> list[Path]:
    """The whole checkpoints of a run directory, oldest first."""
    return sorted((path for path in folder.glob("step-*") if path.name[5:].isdigit() and (path / RECORD).is_file()), key=step_of)


def step_of(path: Path) -> int:
    """The step in a checkpoint's name."""
    return int(path.name.removeprefix("step-"))


def latest(folder: Path) -> Path | None:
    """The whole checkpoint with the highest step."""
    return next(reversed(finished(folder)), None)


def read(path: Path) -> tuple[Record, StageConfig]:
    """The record and the stage of a checkpoint.

    Raises:
        ParentError: the checkpoint is not whole: a file is missing or has another size, or the record cannot be read.
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
    for part in TENSORS:
        _files_of(path, part, record)
    return record, stage


def _files_of(path: Path, part: str, record: Record) -> list[str]:
    try:
        return files_of(part, record.files)
    except ValueError as error:
        raise _broken(path, str(error)) from error


def _broken(path: Path, fact: str) -> ParentError:
    return ParentError(f"checkpoint {path}: {fact}; take it from the store again")


# ------------------------------------------------------------------------------------------------------------------
# Reading tensors
# ------------------------------------------------------------------------------------------------------------------

DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
"""safetensors' names of the types that a checkpoint may hold."""
TYPES = {name: dtype for dtype, name in DTYPES.items()}


@dataclass(frozen=True)
class _Block:
    """What one file holds of a tensor: all of it, or rows of dimension 0."""

    file: str
    start: int
    """First row in the whole tensor."""
    shape: tuple[int, ...]
    """Shape of the part in this file."""
    dtype: str
    """safetensors' name of the type."""
    rows: int | None
    """Rows of the whole tensor. None means this block is the whole tensor."""

    @property
    def stop(self) -> int:
        """The row after the last one."""
        return self.start + (self.shape[0] if self.shape else 1)


@dataclass(frozen=True)
class _Whole:
    """A tensor, and the blocks that hold its rows, in order."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    blocks: list[_Block]


class Reader:
    """Reads tensors of a checkpoint, whatever number of ranks wrote them. Files are mapped: only what is asked for is read."""

    def __init__(self, path: Path) -> None:
        """Raises ParentError as `read` does."""
        self.path = path
        self.record, self.stage = read(path)
        self._parts: dict[str, dict[str, _Whole]] = {}
        self._mapped: dict[str, Any] = {}

    def names(self, part: str) -> dict[str, tuple[int, ...]]:
        """The full shape of every tensor of one of TENSORS.

        Raises:
            ParentError: a file is not a whole safetensors file, or rows are missing.
        """
        return {name: whole.shape for name, whole in self._part(part).items()}

    def tensor(self, part: str, name: str, rows: slice | None = None) -> Tensor:
        """A tensor, or rows of its dimension 0, on the CPU. If one file has all of it, it stays mapped and nothing is copied.

        Raises:
            ParentError: as in `names`.
            KeyError: there is no such tensor.
        """
        whole = self._part(part)[name]
        if not whole.shape:
            return self._map(whole.blocks[0].file).get_tensor(name)  # type: ignore[no-any-return]
        start, stop, _ = (rows or slice(None)).indices(whole.shape[0])
        stop = max(start, stop)
        found = []
        for block in whole.blocks:
            if max(block.start, start) < min(block.stop, stop):
                view = self._map(block.file).get_slice(name)
                found.append(view[max(start, block.start) - block.start : min(stop, block.stop) - block.start])
        if len(found) == 1:
            return found[0]  # type: ignore[no-any-return]
        return torch.cat(found) if found else torch.empty((stop - start, *whole.shape[1:]), dtype=whole.dtype)

    def part(self, part: str) -> dict[str, Tensor]:
        """Every tensor of one of TENSORS, by name, on the CPU. Raises as `names` does."""
        return {name: self.tensor(part, name) for name in self._part(part)}

    def _part(self, part: str) -> dict[str, _Whole]:
        if part not in self._parts:
            found: dict[str, list[_Block]] = {}
            for file in _files_of(self.path, part, self.record):
                for name, block in self._blocks(file):
                    found.setdefault(name, []).append(block)
            self._parts[part] = {name: self._whole(name, blocks) for name, blocks in found.items()}
        return self._parts[part]

    def _map(self, file: str) -> Any:  # safetensors has no types
        if file not in self._mapped:
            try:
                self._mapped[file] = safe_open(self.path / file, "pt")
            except (SafetensorError, OSError) as error:
                raise _broken(self.path, f"{file}: {error}") from error
        return self._mapped[file]

    def _blocks(self, file: str) -> Iterator[tuple[str, _Block]]:
        """What a file holds of each tensor, by name."""
        mapped = self._map(file)
        try:
            sliced = json.loads((mapped.metadata() or {}).get("about", "{}")).get("rows", {})
            for name in mapped.keys():  # noqa: SIM118 - no mapping
                view = mapped.get_slice(name)
                start, rows = sliced.get(name, (0, None))
                yield name, _Block(file, start, tuple(view.get_shape()), view.get_dtype(), rows)
        except (ValueError, TypeError, AttributeError, SafetensorError) as error:
            raise _broken(self.path, f"{file}: its header cannot be read: {error}") from error

    def _whole(self, name: str, blocks: list[_Block]) -> _Whole:
        """Put the blocks of a tensor together. Raises ParentError unless each row is there exactly once."""
        first = blocks[0]
        if first.rows is None:
            if len(blocks) > 1:
                raise _broken(self.path, f"{blocks[1].file}: {name} is whole in {first.file} too")
            return _Whole(first.shape, TYPES[first.dtype], [first])
        end, held = 0, []
        for block in sorted(blocks, key=lambda one: (one.start, one.stop)):
            if (block.shape[1:], block.dtype, block.rows) != (first.shape[1:], first.dtype, first.rows):
                fact = f"{name} is {block.dtype} {block.shape} of {block.rows} rows, unlike in {first.file}"
                raise _broken(self.path, f"{block.file}: {fact}")
            if block.start != block.stop:
                if block.start != end:
                    raise _broken(self.path, f"{block.file}: {name} begins at row {block.start}, the row before it is {end - 1}")
                end = block.stop
                held.append(block)
        if end != first.rows:
            raise _broken(self.path, f"{blocks[-1].file}: {name} ends at row {end} of {first.rows}")
        return _Whole((first.rows, *first.shape[1:]), TYPES[first.dtype], held)


def compare(expected: Mapping[str, Tensor | tuple[int, ...]], found: Mapping[str, Tensor | tuple[int, ...]], subject: str) -> None:
    """Check that `found` has the same names and shapes as `expected` (tensors or their shapes).

    Raises:
        ParentError: they differ. The message has the first names that differ.
    """
    facts = []
    for what, names in (("missing", expected.keys() - found.keys()), ("unexpected", found.keys() - expected.keys())):
        if names:
            facts.append(f"{len(names)} tensors {what} ({_some(sorted(names))})")
    shapes = [
        f"{name} {_shape(found[name])} for {_shape(value)}"
        for name, value in expected.items()
        if name in found and _shape(found[name]) != _shape(value)
    ]
    if shapes:
        facts.append(f"{len(shapes)} shapes differ ({_some(shapes)})")
    if facts:
        raise ParentError(f"{subject}: {'; '.join(facts)}; start from a checkpoint of this architecture")


def _shape(value: Tensor | tuple[int, ...]) -> tuple[int, ...]:
    return tuple(value.shape) if isinstance(value, Tensor) else value


def _some(names: list[str]) -> str:
    return ", ".join(names[:NAMED]) + (", ..." if len(names) > NAMED else "")
