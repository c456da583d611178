"""From pixels to latents and from captions to token vectors, and back to pixels.

Owns the two protocols, the embedded encoders behind them (made on the machine, nothing downloaded) and their files in a checkpoint:
`autoencoder.safetensors` and `text.safetensors`. Refuses to cache: `opensora.data.latents` runs each encoder once per clip.

The patch autoencoder is a projection, not a variational autoencoder: its posterior has no variance.

Letters: N frames · B clips · T frames of a clip · C latent channels · h, w latent rows and columns · L text tokens.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from einops import rearrange
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from opensora import config
from opensora.data.source import Clips, none_usable
from opensora.errors import ConfigError, ParentError

AUTOENCODER_FILE = "autoencoder.safetensors"
TEXT_FILE = "text.safetensors"

FITTED_FRAMES = 8192
"""Frames that the principal components are made from; more changes the third digit of the PSNR."""
READ_AT_ONCE = 256
"""Clips."""


class Autoencoder(Protocol):
    factor: int
    """Pixels per latent row and column."""
    channels: int
    """C."""

    def encode(self, frames: torch.Tensor) -> torch.Tensor:
        """uint8 (N, 3, H, W) → float32 (N, C, H/factor, W/factor), about unit variance."""

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """(N, C, h, w) → uint8 (N, 3, h·factor, w·factor)."""

    def save(self, directory: Path) -> None:
        """Write `autoencoder.safetensors`."""


class TextEncoder(Protocol):
    width: int
    """Channels of a token vector."""

    def encode(self, captions: Sequence[str], tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Vectors float32 (B, tokens, width), zero where padded, and mask bool (B, tokens), true on tokens. Longer captions are cut.

        Raises:
            ConfigError: for a caption that cannot be encoded.
        """

    def save(self, directory: Path) -> None:
        """Write `text.safetensors`."""


class PatchAutoencoder:
    """Patches of factor x factor pixels onto their principal components, with one scale for all: their mean variance is 1.

    Scaling each component to unit variance was tried: it blows up those that are mostly noise, and a model then learns captions
    much later (docs/log.md).
    """

    def __init__(self, mean: torch.Tensor, components: torch.Tensor, deviation: torch.Tensor, factor: int) -> None:
        """mean (3·f·f,) · components (C, 3·f·f), orthonormal rows · deviation (), of pixels in [−1, 1]."""
        self.mean, self.components, self.deviation = mean, components, deviation
        self.factor = factor
        self.channels = components.shape[0]

    @classmethod
    def fit(cls, frames: Iterable[torch.Tensor], factor: int, channels: int) -> PatchAutoencoder:
        """The components of these frames, uint8 (N, 3, H, W) each. Closed form: equal frames give equal bits, whatever the thread count.

        Raises:
            ConfigError: where a patch has fewer values than `channels`.
        """
        values = 3 * factor * factor
        if channels > values:
            raise ConfigError(
                f"model.latent_channels {channels}: a patch of {factor}x{factor} pixels has {values} values, so at most as many channels"
            )
        count, total, products = 0, torch.zeros(values, dtype=torch.float64), torch.zeros(values, values, dtype=torch.float64)
        for batch in frames:  # sums of products of bytes are integers below 2^53: exact in fp64, in any order of summation
            patches = rearrange(batch, "n c (h p) (w q) -> (n h w) (c p q)", p=factor, q=factor).double()
            count, total, products = count + len(patches), total + patches.sum(0), products + patches.T @ patches
        mean = total / count
        variances, vectors = torch.linalg.eigh(products / count - torch.outer(mean, mean))  # ascending
        variances, rows = variances.flip(0)[:channels], vectors.T.flip(0)[:channels]
        strongest = rows.gather(1, rows.abs().argmax(1, keepdim=True))
        rows = rows * strongest.sign()  # an eigenvector's sign is arbitrary: the strongest pixel is bright
        deviation = variances.mean().clamp(min=1 / 12).sqrt()  # at least that of rounding to a byte: one-coloured frames have none
        return cls((mean / 127.5 - 1).float(), rows.float().contiguous(), (deviation / 127.5).float(), factor)

    def encode(self, frames: torch.Tensor) -> torch.Tensor:
        rows, columns = frames.shape[-2] // self.factor, frames.shape[-1] // self.factor
        patches = rearrange(frames, "n c (h p) (w q) -> (n h w) (c p q)", p=self.factor, q=self.factor).float() / 127.5 - 1
        latents = (patches - self.mean.to(frames.device)) @ (self.components / self.deviation).T.to(frames.device)
        return rearrange(latents, "(n h w) c -> n c h w", h=rows, w=columns).contiguous()

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        rows, columns = latents.shape[-2:]
        flat = rearrange(latents, "n c h w -> (n h w) c").float()
        patches = flat @ (self.components * self.deviation).to(latents.device) + self.mean.to(latents.device)
        pixels = ((patches + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
        return rearrange(pixels, "(n h w) (c p q) -> n c (h p) (w q)", h=rows, w=columns, c=3, p=self.factor, q=self.factor)

    def save(self, directory: Path) -> None:
        tensors = {"mean": self.mean, "components": self.components, "deviation": self.deviation}
        save_file(tensors, directory / AUTOENCODER_FILE, about(kind="patch", factor=self.factor))

    @classmethod
    def load(cls, path: Path) -> PatchAutoencoder:
        """Raises ParentError, where the file is not a whole patch autoencoder."""
        tensors, told = _read(path, "patch", ("mean", "components", "deviation"))
        return cls(tensors["mean"], tensors["components"], tensors["deviation"], told["factor"])


class WordEncoder:
    """One fixed random vector a word, drawn from the word itself: vectors of old words stay when a vocabulary grows.

    A bag of words: vectors carry no position. Cross-attention has none either, so "left of" and "of left" are the same to the model.
    """

    def __init__(self, vocabulary: Iterable[str], width: int) -> None:
        self.vocabulary = tuple(sorted(set(vocabulary)))
        self.width = width
        self._vectors = {word: _word_vector(word, width) for word in self.vocabulary}

    def encode(self, captions: Sequence[str], tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        vectors = torch.zeros(len(captions), tokens, self.width)
        mask = torch.zeros(len(captions), tokens, dtype=torch.bool)
        for row, caption in enumerate(captions):
            words = split_words(caption)[:tokens]
            if not words:
                raise ConfigError(f"caption {caption!r} has no words. Write at least one")
            for column, word in enumerate(words):
                if word not in self._vectors:
                    raise ConfigError(f"caption {caption!r}: unknown word {word!r}. Known words: {self._known()}")
                vectors[row, column] = self._vectors[word]
            mask[row, : len(words)] = True
        return vectors, mask

    def extended(self, captions: Iterable[str]) -> WordEncoder:
        """This encoder with the captions' words added."""
        return WordEncoder({*self.vocabulary, *(word for caption in captions for word in split_words(caption))}, self.width)

    def save(self, directory: Path) -> None:
        tensors = {"vectors": torch.stack([self._vectors[word] for word in self.vocabulary])}
        save_file(tensors, directory / TEXT_FILE, about(kind="words", vocabulary=self.vocabulary))

    @classmethod
    def load(cls, path: Path) -> WordEncoder:
        """Raises ParentError, where the file is not a whole word encoder."""
        tensors, told = _read(path, "words", ("vectors",))
        encoder = cls((), tensors["vectors"].shape[1])
        encoder.vocabulary = tuple(told["vocabulary"])
        encoder._vectors = dict(zip(encoder.vocabulary, tensors["vectors"], strict=True))  # as saved, whatever made them
        return encoder

    def _known(self, most: int = 40) -> str:
        rest = len(self.vocabulary) - most
        return ", ".join(self.vocabulary[:most]) + (f" and {rest} more" if rest > 0 else "")


def split_words(caption: str) -> list[str]:
    """Lower-case words of any script; punctuation goes."""
    return re.findall(r"\w+", caption.casefold())


def _word_vector(word: str, width: int) -> torch.Tensor:
    """N(0, 1) in each channel, from the word alone."""
    seed = int.from_bytes(hashlib.sha256(word.encode()).digest()[:8], "big")
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(width, dtype=np.float32))


def build(stage: config.StageConfig, clips: Clips, carried: Path | None) -> tuple[Autoencoder, TextEncoder]:
    """The stage's encoders: those of the checkpoint it starts from, else made from its own clips.

    A carried vocabulary grows by the words of the clips.

    Raises:
        ConfigError: for encoders that are not part of this release or do not fit.
        ParentError: for files that are not whole.
    """
    _refuse_real(stage)
    if carried is not None:
        autoencoder, text = _load(carried, stage)
        return autoencoder, text.extended({*clips.captions, *clips.words})
    text = WordEncoder((), stage.model.caption_width).extended({*clips.captions, *clips.words})
    return PatchAutoencoder.fit(_some_frames(clips), stage.autoencoder.factor, stage.model.latent_channels), text


def read(directory: Path) -> tuple[Autoencoder, TextEncoder]:
    """The encoders that lie in a directory. Raises ParentError, for files that are not whole."""
    return PatchAutoencoder.load(directory / AUTOENCODER_FILE), WordEncoder.load(directory / TEXT_FILE)


def load(directory: Path, stage: config.StageConfig) -> tuple[Autoencoder, TextEncoder]:
    """The encoders of a checkpoint. Raises as `build`."""
    _refuse_real(stage)
    return _load(directory, stage)


def copy_encoders(source: Path, target: Path) -> None:
    """Both files, byte for byte."""
    for name in (AUTOENCODER_FILE, TEXT_FILE):
        shutil.copyfile(source / name, target / name)


def encode_clips(autoencoder: Autoencoder, clips: torch.Tensor) -> torch.Tensor:
    """uint8 (B, T, H, W, 3) → (B, C, T, h, w)."""
    latents = autoencoder.encode(rearrange(clips, "b t h w c -> (b t) c h w"))
    return rearrange(latents, "(b t) c h w -> b c t h w", b=len(clips)).contiguous()


def decode_clips(autoencoder: Autoencoder, latents: torch.Tensor) -> torch.Tensor:
    """(B, C, T, h, w) → uint8 (B, T, H, W, 3)."""
    frames = autoencoder.decode(rearrange(latents, "b c t h w -> (b t) c h w"))
    return rearrange(frames, "(b t) c h w -> b t h w c", b=len(latents)).contiguous()


def _refuse_real(stage: config.StageConfig) -> None:
    for key, encoder, embedded in (("autoencoder", stage.autoencoder, "patch"), ("text", stage.text, "words")):
        if encoder.kind != embedded:
            raise ConfigError(
                f"{key}.kind {encoder.kind}: not part of this release, it arrives with the full-fidelity encoders. Use kind: {embedded}"
            )


def _load(directory: Path, stage: config.StageConfig) -> tuple[PatchAutoencoder, WordEncoder]:
    autoencoder, text = PatchAutoencoder.load(directory / AUTOENCODER_FILE), WordEncoder.load(directory / TEXT_FILE)
    for key, wanted, found in (
        ("autoencoder.factor", stage.autoencoder.factor, autoencoder.factor),
        ("model.latent_channels", stage.model.latent_channels, autoencoder.channels),
        ("model.caption_width", stage.model.caption_width, text.width),
    ):
        if wanted != found:
            raise ConfigError(f"{key} is {wanted}, but the encoders in {directory} have {found}. Make them equal")
    return autoencoder, text


def _some_frames(clips: Clips) -> Iterator[torch.Tensor]:
    """Frames of the first clips, uint8 (N, 3, H, W), until there are enough."""
    seen = 0
    for start in range(0, len(clips), READ_AT_ONCE):
        batch, _ = clips.read(start, min(start + READ_AT_ONCE, len(clips)))
        frames = rearrange(batch, "b t h w c -> (b t) c h w")[: FITTED_FRAMES - seen]
        if len(frames):
            yield frames
        seen += len(frames)
        if seen >= FITTED_FRAMES:
            return
    if not seen:
        raise none_usable(clips)


def about(**facts: Any) -> dict[str, str]:
    """Facts as a safetensors file's metadata, under one key: several are written in an order that changes from run to run."""
    return {"about": json.dumps(facts, sort_keys=True)}


def _read(path: Path, kind: str, names: Sequence[str]) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    try:
        with safe_open(path, framework="pt") as file:
            told = json.loads((file.metadata() or {}).get("about", "{}"))
            tensors = {name: file.get_tensor(name).clone() for name in names}
    except (OSError, SafetensorError, ValueError) as error:  # ValueError: metadata that is no JSON
        raise ParentError(f"{path}: cannot be read ({error}). Take the checkpoint from the store again") from error
    if told.get("kind") != kind:
        raise ParentError(f"{path}: kind is {told.get('kind')}, the stage wants {kind}. Take the right checkpoint")
    return tensors, told
