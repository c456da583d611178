"""Load state dicts from elsewhere into an STDiT. They are recognised by key names and shapes, and loaded whole or refused.

Owns the key names of other projects, and for each format which keys a file may lack and which keys are not read. Nothing is recognised by
a file's name. Every weight that stays at its random initial value is reported (`Report.missing`). Of a pickle only tensors are read: one
that calls anything is refused. Position tables in a file are never read; they are recomputed for the size of the model.

Files are mapped, not read: beside the model itself, loading needs memory for its largest tensor.

Differences that names and shapes do not show are not noticed: a model with another number of heads has weights of the same shapes. If a
`config.json` lies beside the file, its number of heads is compared.

References: Open-Sora 1.0 (hpcaitech, tag v1.0.0) · PixArt-α (Chen et al., arXiv:2310.00426) · diffusers' PixArtTransformer2DModel.
"""

from __future__ import annotations

import json
import pickle
import re
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file as map_safetensors
from torch import Tensor

from opensora.checkpoint import reader as checkpoint
from opensora.config import ModelConfig
from opensora.errors import WeightsRefused
from opensora.model.stdit import STDiT

Format = Literal["opensora", "osctl export", "open-sora-1.0", "pixart", "pixart-diffusers"]

PATCHES = "patch_embedder.proj.weight"
TEMPORAL = r"\.temporal_attention\."
NAMED = 10  # names that a message lists

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
"""Our name of a module or tensor -> Open-Sora 1.0's. A name that is not here is the same in both. PixArt-α uses these names too."""

DIFFUSERS: dict[str, str] = {
    "patch_embedder.proj": "pos_embed.proj",
    "time_embedder.fc1": "adaln_single.emb.timestep_embedder.linear_1",
    "time_embedder.fc2": "adaln_single.emb.timestep_embedder.linear_2",
    "time_block": "adaln_single.linear",
    "caption_embedder.fc1": "caption_projection.linear_1",
    "caption_embedder.fc2": "caption_projection.linear_2",
    "blocks": "transformer_blocks",
    "spatial_attention.qkv": "attn1.to_q attn1.to_k attn1.to_v",
    "spatial_attention.proj": "attn1.to_out.0",
    "cross_attention.query": "attn2.to_q",
    "cross_attention.key_value": "attn2.to_k attn2.to_v",
    "cross_attention.proj": "attn2.to_out.0",
    "mlp.fc1": "ff.net.0.proj",
    "mlp.fc2": "ff.net.2",
    "modulation": "scale_shift_table",
    "final_layer.modulation": "scale_shift_table",
    "final_layer.linear": "proj_out",
}
"""Our name -> that of PixArt-α in diffusers. If there are several, our tensor's rows are the rows of theirs, one after the other."""


@dataclass(frozen=True)
class Layout:
    """How one format names and shapes the model's tensors."""

    format: Format
    names: Mapping[str, str]
    """Our name of a module or tensor -> theirs."""
    patch_dimensions: Literal[2, 4, 5]
    """Dimensions of the patch embedding's weight: 2 for a linear map, 4 or 5 for a strided convolution in space or in space and time."""
    prefix: str = ""
    """Text before every key."""
    absent: str = r"(?!)"
    """Regular expression for our keys that the format does not have. Nothing else may be missing."""
    dropped: frozenset[str] = frozenset()
    """Keys that a file may hold and that are not read, since the model computes them. Nothing else may be left over."""
    conditions: str = r"(?!)"
    """Regular expression for keys of inputs that an STDiT does not have. Without these inputs the other weights do not work."""

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        longest_first = sorted(self.names, key=len, reverse=True)
        return re.compile("|".join(rf"\b{re.escape(name)}\b" for name in longest_first) or r"(?!)")

    def keys(self, ours: str) -> tuple[str, ...]:
        """Their names for one of our keys: none if the format does not have it, several if our rows are those of several tensors."""
        if re.search(self.absent, ours):
            return ()
        parts = max((len(self.names[found].split()) for found in self._pattern.findall(ours)), default=1)

        def name(part: int) -> str:
            def theirs(found: re.Match[str]) -> str:
                choices = self.names[found.group()].split()
                return choices[part % len(choices)]

            return self._pattern.sub(theirs, ours)

        return tuple(self.prefix + name(part) for part in range(parts))


LAYOUTS = (
    Layout("opensora", {}, 2),
    Layout("osctl export", {}, 2, prefix="network."),
    Layout("open-sora-1.0", OPEN_SORA_1, 5, dropped=frozenset({"pos_embed", "pos_embed_temporal"})),
    Layout(
        "pixart",
        OPEN_SORA_1,
        4,
        absent=TEMPORAL,
        dropped=frozenset({"pos_embed"}),
        conditions=r"^(csize|ar)_embedder\.",
    ),
    Layout(
        "pixart-diffusers",
        DIFFUSERS,
        4,
        absent=rf"{TEMPORAL}|^null_caption$",  # diffusers encodes the empty text in its place
        dropped=frozenset({"pos_embed.pos_embed"}),
        conditions=r"^adaln_single\.emb\.(resolution|aspect_ratio)_embedder\.",
    ),
)
"""All formats, with the keys that each may lack and the keys that it may hold beyond ours."""


@dataclass(frozen=True)
class Report:
    """What `load` did."""

    format: Format
    mapped: dict[str, tuple[str, ...]]
    """Our key -> the keys of the file that it was taken from."""
    recomputed: tuple[str, ...]
    """Keys of the file that were not read because the model computes them."""
    missing: tuple[str, ...]
    """Our keys that the format does not have: they keep their initial values. `load` checks that temporal attention among them has no
    effect. The null caption of an import from diffusers keeps its random initial value."""


def load(source: Path | str | Mapping[str, Any], model: STDiT) -> Report:
    """Copy foreign weights, or our own, into the model.

    Args:
        source: a file, a folder (a pipeline of diffusers, its `transformer`, a checkpoint of ours, or files of one state dict) or a
            state dict. The state dict may be the entry `state_dict_ema` (preferred) or `state_dict` of a larger dict.

    Raises:
        WeightsRefused: the source cannot be read, a key is missing or unknown, a shape differs, or the source has no temporal attention
            and the model's has an effect. Nothing was copied then.
    """
    if isinstance(source, Mapping):
        tensors = _state_dict(source, "weights")
    else:
        path = _inside(Path(source))
        tensors = read(path)
        _compare_heads(path, model)
    own = model.state_dict()
    layout = max(LAYOUTS, key=lambda layout: _likeness(layout, tensors, own))
    mapped = {ours: theirs for ours in own if (theirs := layout.keys(ours))}
    absent = tuple(ours for ours in own if ours not in mapped)
    recomputed = tuple(sorted(layout.dropped & tensors.keys()))

    conditions = sorted(key for key in tensors if re.search(layout.conditions, key))
    if conditions:
        raise WeightsRefused(
            f"weights: {len(conditions)} keys take the picture's size and shape as input{_some(conditions)}: PixArt-α 1024-MS computes "
            "another function than this model. Use PixArt-α 512x512 or 256x256"
        )
    expected = [key for keys in mapped.values() for key in keys]
    missing = [key for key in expected if key not in tensors]
    unknown = sorted(tensors.keys() - set(expected) - layout.dropped)
    if missing or unknown:
        raise WeightsRefused(
            f"weights: {len(missing)} of {len(expected)} keys are missing{_some(missing)} and {len(unknown)} are unknown{_some(unknown)} "
            f"(read as {layout.format}). Give a state dict of this model, of Open-Sora 1.0 or of PixArt-α"
        )
    parts = {
        ours: tuple(zip(_places(own[ours], ours, layout, model.config, len(keys)), keys, strict=True)) for ours, keys in mapped.items()
    }
    differ = [
        f"{key} {tuple(tensors[key].shape)} for {tuple(place.shape)}"
        for places in parts.values()
        for place, key in places
        if tensors[key].shape != place.shape
    ]
    if differ:
        raise WeightsRefused(
            f"weights: {len(differ)} shapes differ from the model's{_some(differ)}. Use the model that the weights were made with"
        )
    kinds = [f"{key} {tensors[key].dtype}" for key in expected if not tensors[key].is_floating_point()]
    if kinds:
        raise WeightsRefused(f"weights: {len(kinds)} tensors are not floating-point{_some(kinds)}. Use weights that are not quantised")
    _refuse_temporal_effect(own, absent)

    with torch.no_grad():
        for places in parts.values():
            for place, key in places:
                place.copy_(tensors[key])
    if model.temporal_frozen:  # temporal attention was skipped while its output was zero; it may have an effect now
        model.freeze_temporal()
    return Report(layout.format, mapped, recomputed, absent)


def _likeness(layout: Layout, tensors: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> tuple[int, bool]:
    """How many keys a format explains. An image model's names are all names of its video model too; there the patch embedding's shape
    decides."""
    (patches,) = layout.keys(PATCHES)
    explained = {key for ours in own for key in layout.keys(ours)}
    return len(explained & tensors.keys()), patches in tensors and tensors[patches].ndim == layout.patch_dimensions


def _places(own: Tensor, ours: str, layout: Layout, config: ModelConfig, parts: int) -> tuple[Tensor, ...]:
    """Views of our tensor in the shapes of theirs."""
    if ours == PATCHES and layout.patch_dimensions > 2:
        kernels: Tensor = own.unflatten(1, (config.latent_channels, *config.patch))  # type: ignore[no-untyped-call]  # (D, C, pt, ph, pw)
        return (kernels.squeeze(2) if layout.patch_dimensions == 4 else kernels,)
    return own.chunk(parts)


def _refuse_temporal_effect(own: Mapping[str, Tensor], absent: Iterable[str]) -> None:
    """Raise if temporal layers that the file lacks have an effect: their output layers must be zero, as `STDiT.initialise` makes them."""
    active = [key for key in absent if re.search(rf"{TEMPORAL}proj\.", key) and own[key].any()]
    if active:
        raise WeightsRefused(
            f"weights: they have no temporal attention, and {len(active)} output layers of the model's temporal attention are not "
            f"zero{_some(active)}, so the frames would change each other. Load image weights into a fresh model"
        )


def read(path: Path) -> dict[str, Tensor]:
    """The tensors of a file or of a folder of shards, mapped: their bytes are read when they are used.

    From a checkpoint of ours the moving average is read.

    Raises:
        WeightsRefused: there is no such file, it is broken, or it is a pickle that holds more than tensors.
    """
    path = _inside(path)
    if (path / checkpoint.RECORD).is_file():
        return checkpoint.Reader(path).part("ema")
    tensors: dict[str, Tensor] = {}
    for file in _files(path):
        content = _read_file(file)
        twice = sorted(content.keys() & tensors.keys())
        if twice:
            raise WeightsRefused(
                f"weights {file}: {len(twice)} keys are in an earlier shard of {path} too{_some(twice)}. Keep one set of weights"
            )
        tensors |= content
    return tensors


def _inside(path: Path) -> Path:
    """The denoiser's folder if `path` is a whole pipeline of diffusers, otherwise `path`."""
    return path / "transformer" if (path / "model_index.json").is_file() else path


def _files(path: Path) -> list[Path]:
    """The files of weights in a folder: its one whole file, the shards that its index names, or all its shards."""
    if not path.is_dir():
        return [path]
    for whole in ("model.safetensors", "diffusion_pytorch_model.safetensors"):
        if (path / whole).is_file():
            return [path / whole]
    for index in sorted(path.glob("*.safetensors.index.json")):
        try:
            names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
        except (ValueError, KeyError, AttributeError) as error:
            raise WeightsRefused(f"weights {index}: is not an index of shards ({error!r}). Copy the file again") from error
        return [path / name for name in names]
    files = sorted(path.glob("*.safetensors")) or sorted(file for kind in ("pt", "pth", "bin") for file in path.glob(f"*.{kind}"))
    if not files:
        raise WeightsRefused(f"weights {path}: the folder has no weights (.safetensors, .pth, .pt or .bin). Name the one that has them")
    return files


def _read_file(file: Path) -> dict[str, Tensor]:
    """The tensors of one file: safetensors or a pickle of torch, recognised by its first bytes."""
    try:
        with file.open("rb") as stream:
            start = stream.read(9)
        if start[8:] == b"{":  # safetensors: eight bytes of length, then JSON
            return map_safetensors(file)
        # mapped if torch can: files in the format before torch 1.6 have to be read
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except pickle.UnpicklingError as error:
        calls = re.search(r"GLOBAL (\S+)", str(error))
        fact = f"holds more than tensors: {calls.group(1)}" if calls else "is neither safetensors nor a whole pickle of torch"
        raise WeightsRefused(f"weights {file}: {fact}. It was not loaded; get the weights as safetensors") from error
    except (SafetensorError, OSError, RuntimeError, EOFError, ValueError) as error:
        raise WeightsRefused(
            f"weights {file}: cannot be read ({(str(error) or type(error).__name__).splitlines()[0]}). Copy the file again"
        ) from error
    if not isinstance(content, Mapping):
        raise WeightsRefused(f"weights {file}: holds a {type(content).__name__}, not a state dict. Save the model's state_dict()")
    return _state_dict(content, f"weights {file}")


def _state_dict(content: Mapping[Any, Any], subject: str) -> dict[str, Tensor]:
    """The tensors by name, taken out of what a training script saved around them."""
    for wrapping in ("state_dict_ema", "state_dict"):
        if isinstance(content.get(wrapping), Mapping):
            content = content[wrapping]
            break
    others = sorted(f"{key} {type(value).__name__}" for key, value in content.items() if not isinstance(value, Tensor))
    if others:
        raise WeightsRefused(f"{subject}: {len(others)} entries are not tensors{_some(others)}. Give a model's state dict")
    return {str(key): tensor for key, tensor in content.items()}


def _compare_heads(path: Path, model: STDiT) -> None:
    """Compare the number of heads with the `config.json` beside the weights, if there is one: weights do not show it."""
    file = (path if path.is_dir() else path.parent) / "config.json"
    if not file.is_file():
        return
    try:
        told = json.loads(file.read_bytes())
        heads = told.get("num_attention_heads", told.get("model", {}).get("heads"))  # diffusers' key, or `osctl export`'s
    except (ValueError, AttributeError) as error:
        raise WeightsRefused(f"weights {file}: is not a JSON object ({error}). Copy the file again") from error
    if heads is not None and heads != model.config.heads:
        raise WeightsRefused(f"weights {file}: {heads} attention heads, the model has {model.config.heads}. Set model.heads to {heads}")


def _some(names: list[str]) -> str:
    """The first names in brackets, for a message."""
    return f" ({', '.join(names[:NAMED])}{', ...' if len(names) > NAMED else ''})" if names else ""
