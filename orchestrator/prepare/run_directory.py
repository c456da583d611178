"""The run directory of `python -m opensora.prepare`, seen by its launcher: what it writes there, and what it reads (docs/contracts.md).

Owns the names of files in it. Refuses to trust what the process wrote: a file that is half there, or no JSON, counts as not there.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from opensora.dataset import left_out
from opensora.dataset.prepare_config import PrepareConfig
from orchestrator.effects import perform
from orchestrator.prepare.records import DATASET

LOG = "prepare.log"
PARENTS = "parents.json"
"""Beside the stages' files: of each, whose child it is (`opensora.prepare.encode` reads it)."""
FINISHED = "finished.json"
"""What was prepared last, and from what: written once it lies in its store."""


class RunDirectory:
    def __init__(self, path: Path) -> None:
        self.path = path
        self.kept, self.out, self.log = path / "kept", path / "out", path / LOG
        self.quarantined = path / "quarantined"

    @property
    def config(self) -> Path:
        return self.path / "prepare.yaml"

    @property
    def again(self) -> str:
        """The command that goes on."""
        return f"osctl prepare run {shlex.quote(str(self.config))}"

    def lay_out(
        self,
        config: PrepareConfig,
        stages: Mapping[str, Mapping[str, Any]],
        parents: Mapping[str, str | None] | None = None,
        own: Sequence[Path] = (),
    ) -> None:
        """Write what the process is to do, and take away how an earlier one ended. Results of steps stay. Raises OSError.

        Args:
            stages: by name, the resolved StageConfig that clips are encoded for.
            parents: of each stage, whose encoders it takes over. None: each stage is the child of the one before it.
            own: folders that osctl writes itself; no sources are taken from them.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        for name in ("drain", "result.json", "status.json"):
            (self.path / name).unlink(missing_ok=True)
        folder = self.path / "stages"
        folder.mkdir(exist_ok=True)
        for old in folder.iterdir():
            if old.suffix == ".yaml" and old.stem not in stages:
                old.unlink()
        write_json(self.config, config.model_dump(mode="json"))  # JSON is YAML
        write_json(self.path / left_out.FILE, {"schema": 1, "folders": [str(one) for one in own]})
        for name, content in stages.items():
            write_json(folder / f"{name}.yaml", content)
        (folder / PARENTS).unlink(missing_ok=True)
        if parents is not None:
            write_json(folder / PARENTS, dict(parents))

    def ask_to_drain(self) -> None:
        """Once this file is there, workers finish their row and the process leaves."""
        perform("process.drain", self.path.name, lambda: (self.path / "drain").touch())

    def status(self) -> dict[str, Any]:
        """How far it is, as it was written last; empty: nothing is known."""
        return read_json(self.path / "status.json")

    def result(self) -> dict[str, Any]:
        return read_json(self.path / "result.json")

    def description(self) -> dict[str, Any]:
        """DATASET.json; empty: the data set is not whole."""
        return read_json(self.out / DATASET)

    def last_words(self, most: int = 2000) -> str:
        """The last line that the process printed."""
        try:
            with self.log.open("rb") as file:
                file.seek(max(0, os.fstat(file.fileno()).st_size - most))
                lines = [line for line in file.read().decode(errors="replace").splitlines() if line.strip()]
        except OSError:
            return ""
        return lines[-1].strip() if lines else ""


def read_json(path: Path) -> dict[str, Any]:
    with contextlib.suppress(OSError, ValueError):
        content = json.loads(path.read_bytes())
        if isinstance(content, dict):
            return content
    return {}


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Whole or not at all."""
    write_text(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Whole or not at all; names of files that are no UTF-8 are kept as they are."""
    draft = path.with_name(f".{path.name[:100]}.{os.getpid()}")
    draft.write_text(text, encoding="utf-8", errors="surrogateescape")
    draft.replace(path)
