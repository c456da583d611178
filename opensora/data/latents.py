"""Each clip encoded once, so that a training step runs neither encoder.

Owns the latent cache: one directory per (data, encoders), complete or absent, named by the digest of all it depends on. One rank builds it,
every rank maps it. Refuses to order clips (`loader`) and to know how they are decoded (sources).
A directory whose files are not whole (a full disk, a machine that lost power) is built again.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from opensora import encoders
from opensora.config import StageConfig
from opensora.data.source import Clips, none_usable, open_clips
from opensora.errors import DiskFull, ParentError, TrainerError

FILE = "latents.safetensors"
TENSORS = ("latents", "caption_of", "vectors", "mask")
VERSION = 2
"""Raised whenever the same inputs would be encoded differently."""
ENCODED_AT_ONCE = 256
"""Clips."""


@dataclass(frozen=True)
class Prepared:
    """A stage's clips, encoded. Tensors are views of the mapped file: read, never written."""

    directory: Path
    """Holds the encoders' files too, as a checkpoint does."""
    digest: str
    autoencoder: encoders.Autoencoder
    text: encoders.TextEncoder
    latents: torch.Tensor  # (clips, C, T, h, w)
    captions: tuple[str, ...]
    """Different captions, U of them."""
    caption_of: torch.Tensor  # (clips,), row of `captions`
    vectors: torch.Tensor  # (U, L, Dc)
    mask: torch.Tensor  # (U, L)
    skipped: Mapping[str, str]
    """Each clip that could not be read → the reason."""

    def __len__(self) -> int:
        return len(self.latents)

    @classmethod
    def open(cls, directory: Path) -> Prepared:
        """Map a cache that `prepare` returned.

        Raises:
            DiskFull: where a file is missing or not whole.
        """
        try:
            with safe_open(directory / FILE, framework="pt") as file:  # refuses a file shorter than its header says
                told = json.loads((file.metadata() or {})["about"])
                latents, caption_of, vectors, mask = (file.get_tensor(name) for name in TENSORS)
            autoencoder, text = encoders.read(directory)
        except (OSError, SafetensorError, ValueError, KeyError, TrainerError) as error:
            raise DiskFull(f"{directory}: the latent cache is not whole ({error}). Delete this directory and start again") from error
        captions = tuple(told["captions"])
        return cls(directory, told["digest"], autoencoder, text, latents, captions, caption_of, vectors, mask, told["skipped"])


def prepare(stage: StageConfig, cache: Path, carried: Path | None = None) -> Path:
    """Directory of the stage's encoded clips under `cache`; made if it is not there. One rank calls this, every rank opens the result.

    `carried`: the checkpoint that this run starts from (resumed from, or the parent's), whose encoders are used; none: they are made here.
    Idempotent: the same inputs give the same directory. The stage's own prompts are checked against the vocabulary.

    Raises:
        ConfigError: for data or encoders that cannot be used.
        ParentError: for a carried checkpoint that is not whole.
        DiskFull: where the cache cannot be written.
    """
    if stage.evaluate is not None:
        from opensora.data.digits import canvas  # scikit-learn, which clips of a folder do not need

        canvas(stage.data, stage.evaluate.frames)  # what cannot be judged is said now, not after the training
    clips = open_clips(stage.data, stage.seed)
    digest = _digest(stage, clips, carried)
    directory = cache / digest[:16]
    if directory.exists():
        try:
            Prepared.open(directory)
        except TrainerError:
            shutil.rmtree(directory)
        else:
            return directory
    partial = cache / f".{digest[:16]}.{os.getpid()}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        _build(stage, clips, carried, partial, digest)
        _publish(partial, directory)
    except (OSError, SafetensorError) as error:  # safetensors reports a full disk as its own error
        raise DiskFull(f"{cache}: the latent cache cannot be written ({error}). Make room, or choose another place") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return directory


def _digest(stage: StageConfig, clips: Clips, carried: Path | None) -> str:
    """Over what the cache is made of; cheap, so that a resume decodes nothing."""
    made_of: dict[str, object] = {
        "version": VERSION,
        "clips": clips.digest,
        "autoencoder": stage.autoencoder.model_dump(mode="json"),
        "text": stage.text.model_dump(mode="json"),
        "channels": stage.model.latent_channels,
        "caption": [stage.model.caption_width, stage.model.caption_tokens],
        "prompts": stage.prompts,
    }
    if carried is not None:
        for name in (encoders.AUTOENCODER_FILE, encoders.TEXT_FILE):
            try:
                made_of[name] = hashlib.sha256((carried / name).read_bytes()).hexdigest()
            except OSError as error:
                raise ParentError(f"{carried / name}: {error.strerror}. Take the checkpoint from the store again") from error
    return hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()


def _build(stage: StageConfig, clips: Clips, carried: Path | None, directory: Path, digest: str) -> None:
    autoencoder, text = encoders.build(stage, clips, carried)
    tokens = stage.model.caption_tokens
    text.encode(stage.prompts, tokens)  # an unknown word is said now, not after the training
    latents = torch.empty(len(clips), *stage.latent_shape)
    kept: list[int] = []
    for start in range(0, len(clips), ENCODED_AT_ONCE):
        batch, indices = clips.read(start, start + ENCODED_AT_ONCE)
        if indices:
            latents[len(kept) : len(kept) + len(indices)] = encoders.encode_clips(autoencoder, batch)
            kept += indices
    if not kept:
        raise none_usable(clips)
    captions = sorted({clips.captions[index] for index in kept})
    row = {caption: index for index, caption in enumerate(captions)}
    vectors, mask = text.encode(captions, tokens)
    tensors = {
        "latents": latents[: len(kept)],
        "caption_of": torch.tensor([row[clips.captions[index]] for index in kept]),
        "vectors": vectors,
        "mask": mask,
    }
    save_file(tensors, directory / FILE, encoders.about(digest=digest, captions=captions, skipped=dict(clips.skipped)))
    autoencoder.save(directory)
    text.save(directory)


def _publish(partial: Path, directory: Path) -> None:
    try:
        partial.rename(directory)
    except OSError:
        if not directory.exists():
            raise
        Prepared.open(directory)  # another run built the same cache meanwhile; its bits are as good
