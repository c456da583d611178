"""The trainer's part of the run directory (docs/contracts.md, section 1): what it reads there and what it writes there.

Owns `result.json`, `metrics.jsonl`, `heartbeat-<rank>.json`, `clips.json`, `left-out.csv` and the `drain` flag. `opensora.checkpoint` owns
the checkpoints.
"""

from __future__ import annotations

import csv
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
from opensora.dataset.manifest import DataManifest
from opensora.dataset.usage import Usage
from opensora.errors import ConfigError, DataError, Kind

DATA = "data.jsonl.gz"
"""The data set as the launch found it (`opensora.dataset.manifest`); absent where nobody wrote it down."""
USAGE, LEFT_OUT = "clips.json", "left-out.csv"
"""What of the data is used (`opensora.dataset.usage`), written before the first step; every clip that is not, and why, where there are
any."""
RESULT_BYTES = 16_384
"""Bytes kept for result.json: the longest reason, and some hundred readings."""
LONGEST_REASON = 4_000
MOST_WARNINGS, LONGEST_WARNING = 5, 600

Status = Literal["completed", "drained", "failed"]
Phase = Literal["init", "train", "checkpoint", "evaluate"]


def stage_of(path: Path) -> StageConfig:
    """Read the resolved stage from a file. Raises ConfigError."""
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
    """The data set as the launch found it. None if nobody wrote it down. Raises DataError."""
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
    """The first rank of this node, which writes metrics.jsonl and result.json."""
    step: int = 0
    """The step of the last heartbeat of this process."""

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
        """Say that this rank lives. The file is replaced by a rename, so nobody ever reads half of it."""
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

    def tell_usage(self, usage: Usage, left_out: Mapping[str, str]) -> None:
        """What of the data is used, if this is the node's first rank. The list first: who reads the counts finds it."""
        if self.rank != self.lowest:
            return
        if left_out:
            with (self.path / LEFT_OUT).open("w", encoding="utf-8", errors="backslashreplace", newline="") as file:
                csv.writer(file).writerows([("path", "reason"), *left_out.items()])
        content = {"schema": 1, **usage.encode(), "sentences": usage.sentences(), "listing": LEFT_OUT if left_out else None}
        partial = self.path / f".{USAGE}.partial"
        partial.write_text(json.dumps(content) + "\n")
        partial.replace(self.path / USAGE)

    def reserve_result(self) -> None:
        """Take the space of result.json: it holds blanks until a rank reports. Any rank may report. Raises OSError."""
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
        remarks: Sequence[str] = (),
    ) -> bool:
        """Write result.json in place, into the space that was kept for it. The first rank to report wins: later ends follow from the first.

        Args:
            warnings: what went wrong and changed nothing about the end.
            remarks: what of the data was not used.

        Returns:
            whether this was the first.
        """
        content: dict[str, object] = {
            "schema": 1,
            "status": status,
            "step": self.step,
            "reason": reason[:LONGEST_REASON],
            "time": time.time(),
        }
        content |= {"class": kind, "rank": self.rank if kind else None, "evaluation": dict(evaluation or {})}
        if warnings:
            content["warnings"] = [warning[:LONGEST_WARNING] for warning in warnings[:MOST_WARNINGS]]
        if remarks:
            content["remarks"] = [remark[:LONGEST_WARNING] for remark in remarks[:MOST_WARNINGS]]
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
