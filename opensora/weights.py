"""State dicts from elsewhere into an STDiT: recognised by key names and shapes, loaded whole or refused.

Owns the names. Formats: ours, and Open-Sora 1.0's. Position tables in a file are never read, they are recomputed for the
size of the model. Only safetensors are opened: a pickle is code.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from safetensors import SafetensorError
from safetensors.torch import load_file as read_safetensors
from torch import Tensor

from opensora.errors import WeightsRefused
from opensora.model import STDiT

Format = Literal["opensora", "open-sora-1.0"]

OPEN_SORA_1: dict[str, str] = {
    "patch_embedder.proj": "x_embedder.proj",
    "time_embedder.fc1": "t_embedder.mlp.0",
    "time_embedder.fc2": "t_embedder.mlp.2",
    "time_block": "t_block.1",
    "caption_embedder": "y_embedder.y_proj",
    "null_caption": "y_embedder.y_embedding",
    "spatial_attention": "attn",
    "temporal_attention": "attn_temp",
    "cross_attention.query": "cross_attn.q_linear",
    "cross_attention.key_value": "cross_attn.kv_linear",
    "cross_attention": "cross_attn",
    "modulation": "scale_shift_table",
}
"""Our name of a module or tensor -> Open-Sora 1.0's. What is not here has the same name in both."""

RECOMPUTED: dict[Format, frozenset[str]] = {"opensora": frozenset(), "open-sora-1.0": frozenset({"pos_embed", "pos_embed_temporal"})}
"""Keys that a file of the format may hold and that are not read."""

_OURS = re.compile("|".join(rf"\b{re.escape(name)}\b" for name in OPEN_SORA_1))


@dataclass(frozen=True)
class Report:
    """What `load` did."""

    format: Format
    mapped: dict[str, str]
    """Our key -> the key it was taken from: every parameter and buffer of the model."""
    recomputed: tuple[str, ...]
    """Keys of the file that were left alone because the model computes them."""


def open_sora_1_key(key: str) -> str:
    """Open-Sora 1.0's name of one of our keys."""
    return _OURS.sub(lambda match: OPEN_SORA_1[match.group()], key)


def load(state_dict: Mapping[str, Tensor], model: STDiT) -> Report:
    """Copy a whole state dict into the model.

    Raises:
        WeightsRefused: a key is missing or unknown, or a shape differs; nothing was copied.
    """
    own = model.state_dict()
    formats: dict[Format, dict[str, str]] = {
        "opensora": {key: key for key in own},
        "open-sora-1.0": {key: open_sora_1_key(key) for key in own},
    }
    # the format is the one that explains most of the keys; what it leaves unexplained is then named
    name = max(formats, key=lambda candidate: len(set(formats[candidate].values()) & state_dict.keys()))
    mapped = formats[name]
    recomputed = tuple(sorted(RECOMPUTED[name] & state_dict.keys()))

    missing = [theirs for theirs in mapped.values() if theirs not in state_dict]
    unknown = sorted(state_dict.keys() - set(mapped.values()) - RECOMPUTED[name])
    if missing or unknown:
        raise WeightsRefused(
            f"weights: {len(missing)} of {len(mapped)} keys are missing{_some(missing)} and {len(unknown)} are unknown{_some(unknown)} "
            f"(read as {name}). Give a state dict of this model or of Open-Sora 1.0"
        )
    tensors = {ours: _patches_as_rows(ours, state_dict[theirs], own[ours]) for ours, theirs in mapped.items()}
    differ = [
        f"{mapped[key]} {tuple(tensor.shape)} for {tuple(own[key].shape)}"
        for key, tensor in tensors.items()
        if tensor.shape != own[key].shape
    ]
    if differ:
        raise WeightsRefused(
            f"weights: {len(differ)} shapes differ from the model's{_some(differ)}. Use the model that the weights were made with"
        )
    model.load_state_dict(tensors)
    return Report(name, mapped, recomputed)


def read(path: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors file, or of a directory: its `model.safetensors`, else all its shards.

    Raises:
        WeightsRefused: there is no such file, or it is not safetensors.
    """
    if path.is_dir():
        whole = path / "model.safetensors"
        files = [whole] if whole.is_file() else sorted(path.glob("*.safetensors"))
    else:
        files = [path]
    if not files:
        raise WeightsRefused(f"weights {path}: a directory without .safetensors files. Pickled weights (.pt, .pth, .bin) are not opened")
    tensors: dict[str, Tensor] = {}
    for file in files:
        if file.suffix != ".safetensors":
            raise WeightsRefused(f"weights {file}: {file.suffix or 'no suffix'} where .safetensors is read. Convert pickled weights first")
        try:
            content = read_safetensors(file)
        except (SafetensorError, OSError) as error:
            raise WeightsRefused(f"weights {file}: not readable as safetensors ({error}). Copy the file again") from error
        twice = sorted(content.keys() & tensors.keys())
        if twice:
            raise WeightsRefused(
                f"weights {file}: {len(twice)} keys are in an earlier shard of {path} too{_some(twice)}. Keep one set of weights"
            )
        tensors |= content
    return tensors


def load_file(path: Path, model: STDiT) -> Report:
    """`load` from a file or directory. Raises WeightsRefused."""
    return load(read(path), model)


def _patches_as_rows(key: str, tensor: Tensor, own: Tensor) -> Tensor:
    """Upstream embeds patches by a strided 3D convolution: the same numbers, flattened over (C, pt, ph, pw)."""
    if key == "patch_embedder.proj.weight" and tensor.ndim == 5:
        return tensor.flatten(1)
    return tensor


def _some(names: list[str]) -> str:
    return f" ({', '.join(names[:10])}{', ...' if len(names) > 10 else ''})" if names else ""
