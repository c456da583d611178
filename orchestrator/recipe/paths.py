"""Paths of a stage file. A trainer runs elsewhere, so those that are relative to the file are made absolute."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from orchestrator.environment import at_home
from orchestrator.recipe.yaml_file import Document, Loc

_PATHS: tuple[Loc, ...] = (("data", "source", "path"),)
"""Local paths of a stage file."""


_PATHS_OR_NAMES: tuple[Loc, ...] = (("autoencoder", "path"), ("text", "path"))
"""`org/name` is a model of the hub as well as a path: these are paths where they begin with a dot or a tilde."""


_PATHS_OR_FILES: tuple[Loc, ...] = (("weights",),)
"""These are paths, too, where such a file or folder lies there or a file's ending says so; else an import's name, or a model of the hub."""


_FILE = re.compile(r"\.(safetensors|pth?|bin|ckpt)$")


def with_absolute_paths(document: Document, folder: Path) -> Document:
    """A stage file that lies in `folder`, with its paths absolute. Raises UsageError where one is empty."""
    for loc in (*_PATHS, *_PATHS_OR_NAMES, *_PATHS_OR_FILES):
        inner: Any = document.value
        for part in loc:
            inner = inner.get(part) if isinstance(inner, dict) else None
        if isinstance(inner, str) and not inner.strip():
            raise document.error(loc, "is empty", "Give a path or a name, or leave the key out")
        if isinstance(inner, str) and is_path(loc, inner, folder):
            document = document.with_value(loc, absolute(inner, folder))
    return document


def is_path(place: Loc, value: str, folder: Path) -> bool:
    """Whether a value of this field is a path. `folder`: what it would be relative to."""
    dotted = value.startswith(("./", "../", "~"))
    if place in _PATHS_OR_FILES:
        return dotted or _FILE.search(value) is not None or (folder / value).exists()
    return place in _PATHS or (place in _PATHS_OR_NAMES and dotted)


def absolute(path: str, folder: Path) -> str:
    """An address stays as it is."""
    return path if "://" in path else os.path.normpath(folder.absolute() / at_home(path))
