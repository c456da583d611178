"""The last step of a preparation: the clips of a data set through the encoders of the stages that will train on them.

Owns which stages are encoded, in which order, and whose encoders a later stage takes over: those of its parent, as a checkpoint carries
them. Refuses to encode: `opensora.latents.cache` does, as for a training, so that the cache made here is the one that
`osctl launch --data` finds beside the clips (`opensora.latents.beside`) and nothing is encoded twice.

PARENTS, beside the stages' files, says which stage is whose child: {"stage1": null, "stage2": "stage1"}, parents first. Without it each
stage is the child of the one before it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path

from opensora.config import FolderSource, StageConfig
from opensora.dataset.layouts import read_folder
from opensora.dataset.manifest import DataManifest, Row
from opensora.dataset.places import Folder
from opensora.errors import ConfigError, TrainerError
from opensora.latents.beside import LATENTS
from opensora.latents.cache import prepare
from opensora.latents.prepared import Prepared
from opensora.training.run_directory import stage_of

PARENTS = "parents.json"

Progress = Callable[[int, int], None]
"""(clips encoded so far, clips of all stages together). Clips that are encoded already, or left out, count as done with their stage."""


def encode(out: Path, stages: Mapping[str, Path], progress: Progress | None = None) -> None:
    """Fill `out`/latents with what each stage trains on. What is there already is left alone.

    Args:
        out: the data set: captions.csv and the clips that it names.
        stages: name → resolved StageConfig (YAML), parents first. Its data source is of no account.

    Raises:
        ConfigError: a stage that cannot be trained on these clips; its name comes first.
        DataError: more clips than the stage allows cannot be encoded.
        DiskFull: no room.
    """
    recorded = _recorded(out)
    made: dict[str, Path] = {}
    parents, clips = _parents(stages), len(recorded.rows)
    told = _Told(clips * len(parents), progress)
    for number, (name, parent) in enumerate(parents.items(), 1):
        try:
            stage = _on(stage_of(stages[name]), out)
            made[name] = prepare(stage, out / LATENTS, None if parent is None else made[parent], progress=told, recorded=recorded)
            Prepared.open(made[name], stage).refuse_if_too_few(stage)
        except TrainerError as error:
            raise type(error)(f"encode for {name}: {error}") from error
        told.ended(number * clips)


class _Told:
    """Sums what the cache says of each stage."""

    def __init__(self, total: int, progress: Progress | None) -> None:
        self._total, self._progress, self._done = total, progress, 0

    def __call__(self, clips: int, _of_stage: int) -> None:
        self._done += clips
        if self._progress is not None:
            self._progress(self._done, self._total)

    def ended(self, done: int) -> None:
        self._done = done
        self(0, 0)


def _on(stage: StageConfig, out: Path) -> StageConfig:
    """The stage on these clips. Prompts and judge are checked at the launch: neither is part of what is encoded."""
    source = FolderSource(kind="folder", path=str(out))
    return stage.model_copy(update={"data": stage.data.model_copy(update={"source": source}), "prompts": (), "evaluate": None})


def _parents(stages: Mapping[str, Path]) -> dict[str, str | None]:
    """By name, parents first. Raises ConfigError."""
    if not stages:
        return {}
    file = next(iter(stages.values())).parent / PARENTS
    try:
        told = json.loads(file.read_bytes())
    except FileNotFoundError:
        names = list(stages)
        return dict(zip(names, [None, *names], strict=False))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f'{file}: cannot be read ({error}). It says of each stage whose child it is, as {{"stage2": "stage1"}}'
        ) from error
    found: dict[str, str | None] = {}
    waiting = {name: told.get(name) if isinstance(told, dict) else None for name in stages}
    while waiting:
        ready = [name for name, parent in waiting.items() if parent not in waiting]
        if not ready:
            raise ConfigError(f"{file}: {', '.join(sorted(waiting))} are each other's parents. One of them begins: give it null")
        for name in ready:
            parent = waiting.pop(name)
            found[name] = parent if parent in stages else None
    return found


def _recorded(out: Path) -> DataManifest:
    """The data set as a launch finds it: contents and captions in the order of captions.csv. Raises ConfigError."""
    import fsspec

    read = read_folder(Folder(fsspec.filesystem("file"), str(out)), str(out))
    rows = []
    for row in read.rows:
        path = out / read.files.get(row.path, row.path)
        try:
            with path.open("rb") as file:
                rows.append(Row(row.path, row.text, path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest()))
        except OSError:
            rows.append(Row(row.path, row.text, None, None))  # the source says why
    return DataManifest(tuple(rows))
