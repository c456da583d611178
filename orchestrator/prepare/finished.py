"""Whether everything is prepared already, told without reading a video: from what it was made, and that its store still has it.

The mark counts the configuration without what is execution, the stages, this package's version, and of every local file below the sources
its path, size and mtime; of an address its text alone, and of what a list names as well. Owns `RUN_DIR/finished.json`.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from typing import Any

from opensora.dataset.beside import text_file
from opensora.dataset.left_out import LeftOut
from opensora.dataset.places import on_disk
from opensora.dataset.prepare_config import EXECUTION, PrepareConfig
from opensora.errors import ConfigError
from orchestrator.driver.act import code_version
from orchestrator.errors import CorruptCheckpoint, NotFound, UsageError
from orchestrator.inputs import datasets
from orchestrator.ports import Store
from orchestrator.prepare import removed
from orchestrator.prepare.publish import Published, described
from orchestrator.prepare.records import Keys
from orchestrator.prepare.run_directory import FINISHED, RunDirectory, read_json, write_json


def mark(config: PrepareConfig, stages: Mapping[str, Mapping[str, Any]], directory: RunDirectory, left_out: LeftOut) -> str:
    """64 hex digits. Raises UsageError, where links lead to the same folders too often."""
    lines = [json.dumps([counted(config), stages, code_version()], sort_keys=True)]
    for given in config.sources:
        lines += _files(given.path, left_out) if "://" not in given.path else []
    return hashlib.sha256("\n".join(lines).encode("utf-8", "surrogateescape")).hexdigest()


def counted(config: PrepareConfig) -> dict[str, Any]:
    """Of a configuration what decides what comes out."""
    content = config.model_dump(mode="json", exclude={"workers", "engine", "ray", "download", "max_quarantined", "exclude"})
    for name in EXECUTION.get(config.caption.kind, ()):
        content["caption"].pop(name, None)
    return content


def remember(directory: RunDirectory, of: str, published: Published) -> None:
    version = published.place.rpartition("/")[2]
    excluded = read_json(directory.config).get("exclude", [])
    write_json(directory.path / FINISHED, {"schema": 1, "mark": of, "version": version, "place": published.place, "exclude": excluded})


def found(directory: RunDirectory, store: Store, name: str, of: str) -> Published | None:
    """What was made of exactly this, where its store has it, whole and under its name. Raises Unreachable."""
    then = read_json(directory.path / FINISHED)
    place = str(then.get("place"))
    if then.get("mark") != of or not place.startswith(f"{store.url}/"):
        return None
    now = datasets.of_name(store, name)
    if not now or now[-1].source != place or {one.sha256 for one in removed.all_of(store, Keys(name))} - set(then.get("exclude", ())):
        return None
    try:
        return Published(place, described(store, name, str(then["version"])), new=False)
    except (NotFound, CorruptCheckpoint):
        return None


def _files(place: str, left_out: LeftOut) -> list[str]:
    """Of a file itself and of the text beside it, of a folder all below it, as the process will list them."""
    if not os.path.isdir(place):  # noqa: PTH112 - a text, as all of these paths
        text = text_file(place)
        return [_state(place), *([_state(str(text))] if text is not None else [])]
    odd: list[str] = []
    try:
        names = [name for name, _ in on_disk(place, odd, left_out)]
    except ConfigError as error:
        raise UsageError(str(error)) from None
    except OSError as error:
        return [f"{place} {error.errno}"]
    return [_state(f"{place}/{name}") for name in sorted(names + odd)]


def _state(path: str) -> str:
    try:
        found = os.stat(path)  # noqa: PTH116 - of each of a million files
    except OSError as error:
        return f"{path} {error.errno}"
    return f"{path} {found.st_size} {found.st_mtime_ns}"
