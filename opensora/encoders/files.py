"""The two files of encoders in a checkpoint and in a latent cache: `autoencoder.safetensors` and `text.safetensors`.

Owns their names, the facts in their headers and the errors when one is not whole. The file of an embedded encoder holds its tensors; the
file of a published encoder holds no tensors, only its path and digest (docs/adr/0011-encoders-by-reference.md).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from opensora.errors import ParentError

AUTOENCODER_FILE = "autoencoder.safetensors"
TEXT_FILE = "text.safetensors"


def about(**facts: Any) -> dict[str, str]:
    """Facts as a safetensors file's metadata. They stand under one key, because safetensors writes several keys in random order."""
    return {"about": json.dumps(facts, sort_keys=True)}


def told_by(path: Path) -> dict[str, Any]:
    """The facts in a file's header. Raises ParentError if the file is not whole."""
    with _opened(path) as file:
        return _told(file)


def read(path: Path, kind: str, names: Sequence[str], facts: Iterable[str]) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The named tensors of an encoder of this kind, and its facts.

    Raises:
        ParentError: the file is missing or of another kind, or it lacks a tensor or one of `facts`.
    """
    with _opened(path) as file:
        told = _told(file)
        if told.get("kind") != kind:
            raise ParentError(f"{path}: kind is {told.get('kind')}, the stage wants {kind}. Take the right checkpoint")
        if lost := sorted(set(facts) - told.keys()):
            raise ParentError(f"{path}: its header does not say {', '.join(lost)}. Take the checkpoint from the store again")
        return {name: file.get_tensor(name).clone() for name in names}, told


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (OSError, SafetensorError, ValueError) as error:  # ValueError: the metadata is not JSON
        raise ParentError(f"{path}: cannot be read ({error}). Take the checkpoint from the store again") from error


def _told(file: Any) -> dict[str, Any]:
    told: dict[str, Any] = json.loads((file.metadata() or {}).get("about", "{}"))
    return told
