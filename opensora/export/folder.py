"""Build the folder of an export, and clean up after exports that were killed.

The folder is built under a hidden name and then renamed, so it is either whole or not there. An existing folder is never written to. The
next export into the same parent folder removes what a killed export left there, whatever its name: an export holds a lock on its hidden
folder while it lives.
"""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from opensora.checkpoint import reader as checkpoint
from opensora.config import write_stage
from opensora.errors import ConfigError, DiskFull
from opensora.export.components import TYPES, write_autoencoder, write_scheduler, write_text_encoder, write_transformer
from opensora.export.files import Say, diffusers_version, write_json
from opensora.export.source_code import write_code

NAME_CHARACTERS = 40
"""How much of the target's name is in the hidden folder's name, since names have a maximum length."""


def export(
    source: Path,
    target: Path,
    *,
    weights: Literal["ema", "model"] = "ema",
    dtype: Literal["fp32", "bf16"] = "fp32",
    say: Say = lambda _: None,
) -> None:
    """Write a checkpoint as a folder.

    Args:
        source: a checkpoint directory.
        target: a folder that does not exist, in one that does.
        weights: which of the checkpoint's weights, the moving average or the last ones.
        dtype: type of the transformer's weights in the file.
        say: gets a line for each component that was written.

    Raises:
        ConfigError: the target cannot be made, or an encoder that the checkpoint names is not there.
        ParentError: the checkpoint is not whole, or another model now lies where it names an encoder.
        DiskFull: the disk is full; what was written is removed.
    """
    if target.exists():
        raise ConfigError(f"export {target}: it exists, and nothing is written over; remove it or name another folder")
    if not target.parent.is_dir():
        raise ConfigError(f"export {target}: the folder {target.parent} does not exist; make it first")
    reader = checkpoint.Reader(source)
    try:
        _sweep(target.parent)
        partial, lock = _begin(target)
    except OSError as error:
        raise _refused(target, error) from error
    try:
        index: dict[str, Any] = {"_class_name": ["pipeline", "OpenSoraPipeline"], "_diffusers_version": diffusers_version()}
        index["transformer"] = write_transformer(reader, partial / "transformer", weights, TYPES[dtype], say)
        index |= write_autoencoder(source, reader.stage, partial / "vae", say)
        index |= write_text_encoder(source, reader.stage, partial, say)
        index["scheduler"] = write_scheduler(reader.stage, partial / "scheduler")
        write_code("pipeline", partial, as_name="pipeline")
        write_json(partial / "model_index.json", index)
        write_stage(reader.stage, partial / "stage.yaml")
        (partial / "README.md").write_text(_readme(reader, weights, index))
        partial.rename(target)
    except OSError as error:
        raise _refused(target, error) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        os.close(lock)


def _refused(target: Path, error: OSError) -> Exception:
    if error.errno in checkpoint.FULL:
        return DiskFull(f"export {target}: {error}; nothing is left of it, make room and export again")
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return ConfigError(f"export {target}: {error.strerror}; name a folder that can be written")
    return error


def _begin(target: Path) -> tuple[Path, int]:
    """Make a hidden folder beside the target. Returns it and the descriptor that locks it for as long as this process lives."""
    while True:
        partial = target.parent / f".{target.name[:NAME_CHARACTERS]}.osctl-{secrets.token_hex(4)}.partial"
        partial.mkdir()
        try:
            lock = os.open(partial, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            continue  # another export removed it before it was locked
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if partial.is_dir():
                return partial, lock
        except BlockingIOError:
            pass  # another export is about to remove it: make another one
        os.close(lock)


def _sweep(folder: Path) -> None:
    """Remove what killed exports left in this folder, whatever their targets' names."""
    for left in folder.glob(".*.osctl-????????.partial"):
        with suppress(OSError):  # another user's, in use, or gone
            lock = os.open(left, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(left, ignore_errors=True)
            finally:
                os.close(lock)


def _readme(reader: checkpoint.Reader, weights: str, index: Mapping[str, Any]) -> str:
    stage, encoder = reader.stage, index.get("text_dtype", "fp32")
    kept = ', torch_dtype={"default": torch.float32, "text_encoder": torch.bfloat16}' if encoder == "bf16" else ""
    frames, height, width = stage.data.frames, stage.data.height, stage.data.width
    prompt = stage.prompts[0] if stage.prompts else "a digit 3 moving left"
    return f"""# A text-to-video model, exported by osctl

STDiT of {stage.model.depth} blocks and width {stage.model.width}, step {reader.record.step} of {reader.record.steps}
({"moving average" if weights == "ema" else "last"} weights), for clips of {frames}x{height}x{width}. `stage.yaml` says how it was trained.

```python
import torch
from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained(DIR, custom_pipeline=DIR, trust_remote_code=True{kept})
frames = pipeline({prompt!r}, generator=torch.Generator().manual_seed(0)).frames[0]  # PIL images
```

The code beside the weights is osctl's own, copied; it needs torch 2.11 or newer, diffusers and transformers.
"""
