"""The trainer's side of the run directory (docs/contracts.md, section 1): what it finds there and what it says there.

Owns `result.json`, `metrics.jsonl`, `heartbeat-<rank>.json` and the `drain` flag. `checkpoint` owns the checkpoints.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import yaml
from pydantic import ValidationError

from opensora.config import StageConfig, read_stage
from opensora.data.manifest import DataManifest
from opensora.errors import ConfigError, DataError, Kind

DATA = "data.jsonl.gz"
"""The data set as the launch found it (`opensora.data.manifest`); absent where nobody wrote it down."""
RESULT_BYTES = 16_384
"""Space kept for result.json: the longest reason, and some hundred readings."""
LONGEST_REASON = 4_000
MOST_WARNINGS, LONGEST_WARNING = 5, 600

Status = Literal["completed", "drained", "failed"]
Phase = Literal["init", "train", "checkpoint", "evaluate"]


def stage_of(path: Path) -> StageConfig:
    """The resolved stage in a file. Raises ConfigError."""
    try:
        return read_stage(path)
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: no such file; a run directory holds the resolved stage") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not YAML ({' '.join(str(error).split())})") from error
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        raise ConfigError(f"{path}: {field}: {first['msg']} (given: {first['input']!r})") from error


def recorded_data(file: Path) -> DataManifest | None:
    """What the launch found of the data; None: nobody wrote it down. Raises DataError."""
    try:
        return DataManifest.decode(file.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise DataError(f"{file}: cannot be read ({error}). Launch again: the agent brings it in anew") from error


@dataclass
class RunDirectory:
    path: Path
    rank: int
    lowest: int = 0
    """The first rank of this node, the one that keeps its books."""
    step: int = 0
    """The last step that a heartbeat of this process told of."""

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def samples(self) -> Path:
        return self.path / "samples"

    @property
    def latents(self) -> Path:
        """Clips, encoded once: a folder that runs share (`OSCTL_LATENTS`, filled ahead by `osctl encode`), else this run's own.

        May be deleted whenever nobody trains from it.
        """
        return Path(os.environ.get("OSCTL_LATENTS") or self.path / "latents")

    @property
    def parent(self) -> Path | None:
        path = self.path / "parent"
        return path if path.is_dir() else None

    def stage(self) -> StageConfig:
        """Raises ConfigError."""
        return stage_of(self.path / "stage.yaml")

    def recorded_data(self) -> DataManifest | None:
        """Raises DataError."""
        return recorded_data(self.path / DATA)

    def drain_asked(self) -> bool:
        return (self.path / "drain").exists()

    def heartbeat(self, step: int, phase: Phase) -> None:
        """Say that this rank lives. Replaced by rename, so that a reader never sees half of it."""
        self.step = step
        target = self.path / f"heartbeat-{self.rank}.json"
        content = {"schema": 1, "rank": self.rank, "pid": os.getpid(), "step": step, "phase": phase, "time": time.time()}
        temporary = target.with_suffix(".partial")
        temporary.write_text(json.dumps(content))
        temporary.replace(target)

    def record(self, line: Mapping[str, float | int | str]) -> None:
        """Append one line to metrics.jsonl, if this is the node's first rank."""
        if self.rank == self.lowest:
            with (self.path / "metrics.jsonl").open("a") as file:
                file.write(json.dumps(line) + "\n")

    def reserve_result(self) -> None:
        """Take the space of result.json: blanks until somebody has something to say. Any rank may find that it has."""
        with (self.path / "result.json").open("a+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            if file.tell() < RESULT_BYTES:
                file.write(b" " * (RESULT_BYTES - file.tell()))
                file.flush()
                os.fsync(file.fileno())

    def finish(
        self,
        status: Status,
        *,
        reason: str = "",
        kind: Kind | None = None,
        evaluation: Mapping[str, float] | None = None,
        warnings: Sequence[str] = (),
    ) -> bool:
        """Write result.json in place, into the space that was kept for it. The first to come wins: later ends follow from the first.

        Args:
            warnings: what went wrong and changed nothing about the end.

        Returns:
            whether this was the first.
        """
        content: dict[str, object] = {"schema": 1, "status": status, "step": self.step, "reason": reason[:LONGEST_REASON]}
        content |= {"class": kind, "rank": self.rank if kind else None, "evaluation": dict(evaluation or {})}
        if warnings:
            content["warnings"] = [warning[:LONGEST_WARNING] for warning in warnings[:MOST_WARNINGS]]
        data = (json.dumps(content) + "\n").encode().ljust(RESULT_BYTES)
        with (self.path / "result.json").open("r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            if file.read().strip():
                return False
            file.seek(0)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        return True
