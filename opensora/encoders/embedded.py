"""Encoders that are made from a stage's own clips and captions and stored whole in every checkpoint: nothing is downloaded.

The patch autoencoder is a projection, not a variational autoencoder: its posterior has no variance. The word encoder is a table.

Letters: N frames · B clips · C latent channels · h, w latent rows and columns · L text tokens.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from safetensors.torch import save_file

from opensora.dataset.words import VERSION, split_words
from opensora.encoders import files as encoder_files
from opensora.encoders.files import AUTOENCODER_FILE, TEXT_FILE, about
from opensora.errors import ConfigError, ParentError


class PatchAutoencoder:
    """Projects patches of factor x factor pixels onto their principal components, with one scale for all, so that their mean variance is 1.

    Scaling each component to unit variance was tried: it enlarges those that are mostly noise, and a model then learns captions
    much later (docs/log.md).
    """

    def __init__(self, mean: torch.Tensor, components: torch.Tensor, deviation: torch.Tensor, factor: int) -> None:
        """mean (3·f·f,) · components (C, 3·f·f), orthonormal rows · deviation (), of pixels in [−1, 1]."""
        self.mean, self.components, self.deviation = mean, components, deviation
        self.factor = factor
        self.channels = components.shape[0]

    @classmethod
    def fit(cls, frames: Iterable[torch.Tensor], factor: int, channels: int) -> PatchAutoencoder:
        """Fit the components to batches of frames, uint8 (N, 3, H, W). Closed form: equal frames give equal bits with any thread count.

        Raises:
            ConfigError: a patch has fewer values than `channels`.
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
        rows = rows * strongest.sign()  # an eigenvector's sign is arbitrary: here its largest value is positive
        deviation = variances.mean().clamp(min=1 / 12).sqrt()  # at least that of rounding to a byte, since one-coloured frames have none
        return cls((mean / 127.5 - 1).float(), rows.float().contiguous(), (deviation / 127.5).float(), factor)

    def encode(self, frames: torch.Tensor, generator: object = None) -> torch.Tensor:
        """Nothing is drawn from `generator`: a projection is deterministic."""
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
        """Raises ParentError if the file is not a whole patch autoencoder."""
        tensors, told = encoder_files.read(path, "patch", ("mean", "components", "deviation"), ("factor",))
        return cls(tensors["mean"], tensors["components"], tensors["deviation"], told["factor"])


class WordEncoder:
    """One fixed random vector for each word, with the word as the seed: the vectors of old words stay when a vocabulary grows.

    This is a bag of words: vectors have no position. Cross-attention has none either, so the model cannot tell "left of" from "of left".
    """

    unit = "words"

    def __init__(self, vocabulary: Iterable[str], width: int, tokens: int, version: int = VERSION) -> None:
        """
        Args:
            tokens: the number of words of a caption that are kept.
            version: version of the rule that splits text into words (`opensora.dataset.words`). A vocabulary keeps its version when
                words are added.
        """
        self.vocabulary = tuple(sorted(set(vocabulary)))
        self.width, self.tokens, self.version = width, tokens, version
        self._vectors = {word: _word_vector(word, width) for word in self.vocabulary}

    def encode(self, captions: Sequence[str]) -> list[torch.Tensor]:
        return [torch.stack([self._vectors[word] for word in self._words(caption)]) for caption in captions]

    def cut(self, captions: Sequence[str]) -> list[bool]:
        return [self.length(caption) > self.tokens for caption in captions]

    def length(self, caption: str) -> int:
        return len(split_words(caption, self.version))

    def null_caption(self, tokens: int) -> None:
        """None, because a model that is trained with this encoder learns its null caption."""

    def extended(self, captions: Iterable[str]) -> WordEncoder:
        """This encoder with the captions' words added."""
        words = {word for caption in captions for word in split_words(caption, self.version)}
        return WordEncoder({*self.vocabulary, *words}, self.width, self.tokens, self.version)

    def save(self, directory: Path) -> None:
        tensors = {"vectors": torch.stack([self._vectors[word] for word in self.vocabulary])}
        version = {"split": self.version} if self.version > 1 else {}  # files of 0.1.0 have no version, and stay the same byte for byte
        save_file(tensors, directory / TEXT_FILE, about(kind="words", vocabulary=self.vocabulary, tokens=self.tokens, **version))

    @classmethod
    def load(cls, path: Path) -> WordEncoder:
        """Raises ParentError if the file is not a whole word encoder."""
        tensors, told = encoder_files.read(path, "words", ("vectors",), ("vocabulary", "tokens"))
        version = told.get("split", 1)
        if version not in (1, VERSION):
            raise ParentError(f"{path}: its words are split by version {version}, this release knows 1 and {VERSION}. Use a newer release")
        return cls.of(told["vocabulary"], tensors["vectors"], told["tokens"], version)

    @classmethod
    def of(cls, vocabulary: Sequence[str], vectors: torch.Tensor, tokens: int, version: int) -> WordEncoder:
        """An encoder with saved vectors (words, width), however they were made. Raises ValueError unless each word has one."""
        encoder = cls((), vectors.shape[1], tokens, version)
        encoder.vocabulary = tuple(vocabulary)
        encoder._vectors = dict(zip(encoder.vocabulary, vectors, strict=True))
        return encoder

    def _words(self, caption: str) -> list[str]:
        words = split_words(caption, self.version)[: self.tokens]
        if not words:
            raise ConfigError(f"caption {caption!r} has no words. Write at least one")
        for word in words:
            if word not in self._vectors:
                raise ConfigError(f"caption {caption!r}: unknown word {word!r}. Known words: {self._known()}")
        return words

    def _known(self, most: int = 40) -> str:
        rest = len(self.vocabulary) - most
        return ", ".join(self.vocabulary[:most]) + (f" and {rest} more" if rest > 0 else "")


def _word_vector(word: str, width: int) -> torch.Tensor:
    """Normally distributed, N(0, 1) in each channel, with the word as the only seed."""
    seed = int.from_bytes(hashlib.sha256(word.encode()).digest()[:8], "big")
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(width, dtype=np.float32))
