"""What tests of a whole run share: run a stage in this process, read what it left, compare two checkpoints."""

from __future__ import annotations

import json
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from opensora import train
from opensora.training.run_directory import RunDirectory
from opensora.training.trainer import DrainRequest, Trainer


def in_process(run: RunDirectory, drain: DrainRequest | None = None) -> dict[str, Any]:
    """Run the stage as one rank in this process; its result."""
    train.run_reported(run, drain or DrainRequest())
    return result(run)


def result(run: RunDirectory) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((run.path / "result.json").read_text())
    return content


def metrics(run: RunDirectory) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]


def assert_same_state(one: Path, other: Path) -> None:
    names = sorted(path.name for path in one.glob("*.safetensors"))
    assert len(names) >= 5 and names == sorted(path.name for path in other.glob("*.safetensors"))
    for name in names:
        assert (one / name).read_bytes() == (other / name).read_bytes(), name


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """No file of this process may grow beyond so many bytes: what a full disk looks like to whoever writes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def one_step(trainer: Trainer) -> dict[str, float]:
    """One step of a trainer, and its line of metrics."""
    trainer.launch()
    ((line,), _) = trainer.settle(0)
    return line
