"""CLIP and aesthetic scores of a clip, from a folder that the user names.

Owns loading (CLIPModel with its processor, and the head in `aesthetic.safetensors`), and what the two numbers are. Refuses to fetch
anything, to run code of the folder, and to open pickles: LAION's published head is one, and `docs/datasets.md` says how it is written anew.

    clip        cosine between picture and caption, -1 … 1, the mean over the pictures; Open-Sora's `matching score` is 100 times this
    aesthetic   what the head makes of a picture's normalised vector, the mean over the pictures; LAION's gives 1 … 10

The head is layers of `weight` and `bias`, applied one after the other in the order of the numbers in their names (`layers.0.weight` …;
`weight` alone for the linear one): LAION's `sac+logos+ava1-l14-linearMSE` has five, with nothing between them but dropout.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file

from opensora.dataset.rows import Quarantine
from opensora.errors import ConfigError

VERSION = 1
"""Raised whenever the same clip would get other scores."""
HEAD = "aesthetic.safetensors"
PICKLES = ("*.pth", "*.pt", "*.pkl", "*.bin", "*.ckpt")


class Scorer:
    def __init__(self, folder: Path) -> None:
        """Loads both, onto the GPU where there is one.

        Raises:
            ConfigError: the folder does not hold them.
        """
        import transformers

        try:
            processor: Any = transformers.CLIPProcessor  # untyped
            self._processor = processor.from_pretrained(folder, local_files_only=True)
            model: Any = transformers.CLIPModel.from_pretrained(folder, dtype=torch.float32, local_files_only=True, use_safetensors=True)
        except Exception as error:  # transformers, tokenizers and safetensors raise many kinds for what is missing or damaged
            why = " ".join(str(error).split())[:300]
            raise ConfigError(
                f"filter.scores {folder}: no CLIP model with its processor can be loaded ({why}). Name a folder with config.json, "
                "model.safetensors, the tokenizer and preprocessor_config.json"
            ) from error
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._model = model.to(device).eval()
        self._head = [(weight.to(device), bias.to(device)) for weight, bias in _head(folder, int(model.config.projection_dim))]
        self._words = int(model.config.text_config.max_position_embeddings)

    def score(self, jpegs: Sequence[bytes], caption: str) -> dict[str, float]:
        """`aesthetic`, and `clip` where there is a caption (its first 77 tokens). Raises Quarantine, where a picture cannot be read."""
        pictures = [_picture(jpeg) for jpeg in jpegs]
        if not pictures:
            raise Quarantine("no frames", "scores are of at least one")
        with torch.inference_mode():
            inputs = self._processor(images=pictures, return_tensors="pt").to(self._model.device)
            seen = _normal(self._model.get_image_features(**inputs).pooler_output)
            scores = {"aesthetic": float(self._aesthetic(seen).mean())}
            if caption.strip():
                told = {"padding": True, "truncation": True, "max_length": self._words}
                words = self._processor(text=[caption], return_tensors="pt", **told).to(self._model.device)
                read = _normal(self._model.get_text_features(**words).pooler_output)
                scores["clip"] = float((seen @ read.T).mean())
        return scores

    def _aesthetic(self, vectors: torch.Tensor) -> torch.Tensor:
        """(pictures, dim) → (pictures, 1)."""
        for weight, bias in self._head:
            vectors = torch.nn.functional.linear(vectors, weight, bias)
        return vectors


def _normal(vectors: torch.Tensor) -> torch.Tensor:
    normal: torch.Tensor = vectors / vectors.norm(dim=-1, keepdim=True)
    return normal


def _picture(jpeg: bytes) -> Image.Image:
    try:
        with Image.open(io.BytesIO(jpeg)) as opened:
            return opened.convert("RGB")
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise Quarantine("frame cannot be read", str(error)) from None


def _head(folder: Path, width: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(weight, bias) of each layer, that lead from `width` numbers to one. Raises ConfigError."""
    path = folder / HEAD
    if not path.exists():
        found = sorted(one.name for pattern in PICKLES for one in folder.glob(pattern))
        fact = f"{found[0]} may be it, but is a pickle, which is never opened" if found else "there is none"
        raise ConfigError(f"filter.scores {folder}: no {HEAD} ({fact}). Write the head as safetensors (docs/datasets.md says how)")
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise ConfigError(f"{path}: cannot be read ({' '.join(str(error).split())[:200]}). Write it anew") from None
    layers = [(tensors[name].float(), tensors.get(f"{name[:-6]}bias")) for name in sorted(tensors, key=_number) if name.endswith("weight")]
    head, into = [], width
    for weight, bias in layers:
        if weight.dim() != 2 or weight.shape[1] != into:
            raise ConfigError(f"{path}: a layer of {tuple(weight.shape)} numbers, {into} go into it. Give the head of this CLIP model")
        into = int(weight.shape[0])
        head.append((weight, torch.zeros(into) if bias is None else bias.float()))
    if not head or into != 1:
        raise ConfigError(f"{path}: gives {into if head else 'no'} numbers, a score is one. Give the head of an aesthetic model")
    return head


def _number(name: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", name))
