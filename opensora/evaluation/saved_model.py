"""A trained model on disk, ready to sample: a checkpoint, or a folder that `osctl export` wrote.

Owns how an export is read back. No code of an export is run: its weights and tables are read, the code is this package's own.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from yaml import YAMLError

from opensora import config
from opensora.checkpoint import foreign
from opensora.checkpoint import reader as checkpoint
from opensora.encoders import protocol as encoders
from opensora.encoders.embedded import PatchAutoencoder, WordEncoder
from opensora.encoders.pretrained import KLAutoencoder, T5Encoder
from opensora.errors import ConfigError, ParentError
from opensora.evaluation.sampler import Sampler

INDEX = "model_index.json"
"""What tells an export from a checkpoint: diffusers' list of components."""
EXPORTED_WEIGHTS = "diffusion_pytorch_model.safetensors"
NETWORK = "network."
"""What the names of an export's weights begin with."""


def open_model(path: Path, device: torch.device) -> Sampler:
    """A sampler with the moving average of a checkpoint, or with the weights of an export.

    Raises:
        ConfigError: neither lies there, or an encoder that a checkpoint names is not there.
        ParentError: files are missing or not whole, or what a checkpoint names is another model now.
    """
    if (path / INDEX).is_file():
        return _open_export(path, device)
    if not path.is_dir():
        raise ConfigError(f"model {path}: no such folder; name a checkpoint directory, or a folder that `osctl export` wrote")
    if not (path / checkpoint.RECORD).exists() and not any(path.glob("*.safetensors")):
        fact = f"model {path}: holds neither {checkpoint.RECORD} nor {INDEX}"
        raise ConfigError(f"{fact}; name a checkpoint directory, or a folder that `osctl export` wrote")
    reader = checkpoint.Reader(path)
    autoencoder, text = encoders.load(path, reader.stage)
    return Sampler(reader.stage, reader.part("ema"), autoencoder, text, device=device)


def _open_export(path: Path, device: torch.device) -> Sampler:
    try:
        stage = config.read_stage(path / "stage.yaml")
        tensors = {name.removeprefix(NETWORK): tensor for name, tensor in foreign.read(path).items()}
        return Sampler(stage, tensors, _autoencoder(path, stage), _text(path, stage), device=device)
    except (OSError, ValueError, KeyError, TypeError, YAMLError, SafetensorError) as error:
        raise ParentError(f"export {path}: cannot be read ({error!r}); export the checkpoint again") from error


def _autoencoder(path: Path, stage: config.StageConfig) -> encoders.Autoencoder:
    if isinstance(stage.autoencoder, config.KLAutoencoder):  # the export's config.json has the scale that the stage gave it
        here = stage.autoencoder.model_copy(update={"path": str(path / "vae"), "scale": None})
        return KLAutoencoder(here, stage.model.latent_channels)
    tensors = _tensors(path / "vae")
    return PatchAutoencoder(tensors["mean"], tensors["components"], tensors["deviation"], stage.autoencoder.factor)


def _text(path: Path, stage: config.StageConfig) -> encoders.TextEncoder:
    if isinstance(stage.text, config.T5Encoder):
        here = stage.text.model_copy(update={"path": str(path)})
        return T5Encoder(here, stage.model.caption_width, stage.model.caption_tokens)
    told: Any = json.loads((path / "tokenizer" / "words.json").read_text(encoding="utf-8"))
    words, split = (told, 1) if isinstance(told, list) else (told["words"], told["split"])
    return WordEncoder.of(words, _tensors(path / "text_encoder")["vectors"], stage.model.caption_tokens, split)


def _tensors(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / EXPORTED_WEIGHTS)
