"""Encoders: from pixels to latents and back, and from captions to token vectors.

Owns the two protocols, and which encoders a stage has: embedded ones (`embedded`), which are stored whole in each checkpoint, or
published ones (`pretrained`), which a checkpoint only names. Refuses to cache: `opensora.latents.cache` runs each encoder once per
clip.

Letters: N frames · B clips · T frames of a clip · C latent channels · h, w latent rows and columns · L text tokens.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

import torch
from einops import rearrange

from opensora import config
from opensora.data.source import Clips, none_usable, read_all
from opensora.encoders import files as encoder_files
from opensora.encoders.embedded import PatchAutoencoder, WordEncoder
from opensora.encoders.files import AUTOENCODER_FILE, TEXT_FILE, about
from opensora.encoders.pretrained import KLAutoencoder, T5Encoder
from opensora.errors import ConfigError, ParentError
from opensora.planning.sampling import Encoders

__all__ = ["AUTOENCODER_FILE", "TEXT_FILE", "KLAutoencoder", "PatchAutoencoder", "T5Encoder", "WordEncoder", "about"]

FITTED_FRAMES = 8192
"""Number of frames that the principal components are fitted to. More frames change only the third digit of the PSNR."""


class Autoencoder(Protocol):
    factor: int
    """Pixels per latent row and column."""
    channels: int
    """C."""

    def encode(self, frames: torch.Tensor, generator: torch.Generator | Sequence[torch.Generator] | None = None) -> torch.Tensor:
        """uint8 (N, 3, H, W) → float32 (N, C, H/factor, W/factor), about unit variance, on the frames' device.

        Args:
            generator: draws latents where they are random: one generator for all frames, or several that share the frames equally, in
                order.
        """

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """(N, C, h, w) → uint8 (N, 3, h·factor, w·factor), on the latents' device."""

    def save(self, directory: Path) -> None:
        """Write `autoencoder.safetensors`."""


class TextEncoder(Protocol):
    width: int
    """Channels of a token vector."""
    tokens: int
    """How many tokens of a caption are kept; the rest is cut off."""
    unit: str
    """What a token is called in messages: words or tokens."""

    def length(self, caption: str) -> int:
        """Number of tokens of a caption, with those that would be cut off."""

    def encode(self, captions: Sequence[str]) -> list[torch.Tensor]:
        """Vectors float32 (L, width) of each caption on the CPU; L is the caption's own number of tokens.

        Raises:
            ConfigError: a caption cannot be encoded.
        """

    def cut(self, captions: Sequence[str]) -> list[bool]:
        """Which captions are longer than `tokens`; the model does not see the rest of these."""

    def null_caption(self, tokens: int) -> torch.Tensor | None:
        """(tokens, width), the null caption for weights that have none of their own. None means that a model learns it."""

    def save(self, directory: Path) -> None:
        """Write `text.safetensors`."""


def build(
    stage: config.StageConfig, clips: Clips, carried: Path | None, device: torch.device | None = None
) -> tuple[Autoencoder, TextEncoder]:
    """The stage's encoders: those of the checkpoint it starts from, otherwise made from its own clips, or found where the stage says.

    The words of the clips are added to a carried vocabulary.

    Args:
        carried: directory with the files of the checkpoint that the stage starts from. None means it starts from none.
        device: where published encoders run. None means this process's CUDA device if it has one. Embedded encoders compute where their
            input lies.

    Raises:
        ConfigError: encoders are not there or do not fit.
        ParentError: files are not whole, or another model now lies where they point to.
    """
    if carried is not None:
        autoencoder, text = load(carried, stage, device)
    else:
        autoencoder, text = _new_autoencoder(stage, clips, device), _new_text(stage, device)
    return autoencoder, text.extended({*clips.captions, *clips.words}) if isinstance(text, WordEncoder) else text


def read(directory: Path, device: torch.device | None = None) -> tuple[Autoencoder, TextEncoder]:
    """The encoders whose files lie in a directory. Raises ParentError if a file is not whole, and as `build` does."""
    return _read_autoencoder(directory / AUTOENCODER_FILE, device), _read_text(directory / TEXT_FILE, device)


def load(directory: Path, stage: config.StageConfig, device: torch.device | None = None) -> tuple[Autoencoder, TextEncoder]:
    """The encoders of a checkpoint, for this stage. Raises as `build` does."""
    for name, wanted in ((AUTOENCODER_FILE, stage.autoencoder.kind), (TEXT_FILE, stage.text.kind)):
        found = encoder_files.told_by(directory / name).get("kind")
        if found != wanted:
            raise ParentError(f"{directory / name}: kind is {found}, the stage wants {wanted}. Take the right checkpoint")
    autoencoder, text = _loaded_autoencoder(directory / AUTOENCODER_FILE, stage, device), _loaded_text(directory / TEXT_FILE, stage, device)
    for key, ours, theirs in (
        ("autoencoder.factor", stage.autoencoder.factor, autoencoder.factor),
        ("model.latent_channels", stage.model.latent_channels, autoencoder.channels),
        ("model.caption_width", stage.model.caption_width, text.width),
        ("model.caption_tokens", stage.model.caption_tokens, text.tokens),
    ):
        if ours != theirs:
            raise ConfigError(f"{key} is {ours}, but the encoders in {directory} have {theirs}. Make them equal")
    return autoencoder, text


def digests(stage: config.StageConfig) -> dict[str, str]:
    """Digest of each published encoder that the stage names, by kind. They are part of a latent cache's name. Cheap: no weights are read.

    Raises:
        ConfigError: encoders are not there or do not fit.
    """
    return _autoencoder_digest(stage) | _text_digest(stage)


def copy_encoders(source: Path, target: Path) -> None:
    """Copy both files, byte for byte."""
    for name in (AUTOENCODER_FILE, TEXT_FILE):
        shutil.copyfile(source / name, target / name)


def encode_clips(autoencoder: Autoencoder, clips: torch.Tensor, generators: Sequence[torch.Generator] | None = None) -> torch.Tensor:
    """uint8 (B, T, H, W, 3) → (B, C, T, h, w). `generators` has one for each clip to draw latents. None means the mode is taken."""
    latents = autoencoder.encode(rearrange(clips, "b t h w c -> (b t) c h w"), generators)
    return rearrange(latents, "(b t) c h w -> b c t h w", b=len(clips)).contiguous()


def decode_clips(autoencoder: Autoencoder, latents: torch.Tensor) -> torch.Tensor:
    """(B, C, T, h, w) → uint8 (B, T, H, W, 3)."""
    frames = autoencoder.decode(rearrange(latents, "b c t h w -> (b t) c h w"))
    return rearrange(frames, "(b t) c h w -> b t h w c", b=len(latents)).contiguous()


def needs_of(autoencoder: Autoencoder, text: TextEncoder) -> Encoders:
    """The memory of encoders that draw clips. Embedded ones have next to no weights. Raises ConfigError."""
    weights = sum(one.weights_bytes() for one in (autoencoder, text) if isinstance(one, KLAutoencoder | T5Encoder))
    if isinstance(autoencoder, KLAutoencoder):
        return Encoders(weights, autoencoder.stage.micro_batch, autoencoder.decoding_bytes())
    return Encoders(weights)


def padded(vectors: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """B vectors (L, width) → vectors (B, longest L, width), zero where padded, and mask bool (B, longest L), true on tokens."""
    mask = torch.zeros(len(vectors), max(map(len, vectors)), dtype=torch.bool)
    for row, one in zip(mask, vectors, strict=True):
        row[: len(one)] = True
    return torch.nn.utils.rnn.pad_sequence(list(vectors), batch_first=True), mask


def null_caption(text: TextEncoder, tokens: int, width: int) -> torch.Tensor | None:
    """(tokens, width), the null caption for weights that have none (PixArt-α in diffusers' layout). None means that a model learns it.

    Raises:
        ConfigError: the encoder has another width.
    """
    if text.width != width:
        raise ConfigError(f"model.caption_width is {width}, but the text encoder has {text.width}. Make them equal")
    return text.null_caption(tokens)


def _new_autoencoder(stage: config.StageConfig, clips: Clips, device: torch.device | None) -> Autoencoder:
    match stage.autoencoder:
        case config.KLAutoencoder() as named:
            return KLAutoencoder(named, stage.model.latent_channels, device)
        case config.PatchAutoencoder(factor=factor):
            return PatchAutoencoder.fit(_some_frames(clips), factor, stage.model.latent_channels)


def _new_text(stage: config.StageConfig, device: torch.device | None) -> TextEncoder:
    match stage.text:
        case config.T5Encoder() as named:
            return T5Encoder(named, stage.model.caption_width, stage.model.caption_tokens, device)
        case config.WordEncoder():
            return WordEncoder((), stage.model.caption_width, stage.model.caption_tokens)


# Published encoders use the stage's settings (type, batch, posterior), but must be the models that the checkpoint names.


def _loaded_autoencoder(path: Path, stage: config.StageConfig, device: torch.device | None) -> Autoencoder:
    match stage.autoencoder:
        case config.KLAutoencoder() as named:
            encoder = KLAutoencoder(named, stage.model.latent_channels, device)
            encoder.source.refuse_other(encoder_files.told_by(path), path)
            return encoder
        case config.PatchAutoencoder():
            return PatchAutoencoder.load(path)


def _loaded_text(path: Path, stage: config.StageConfig, device: torch.device | None) -> TextEncoder:
    match stage.text:
        case config.T5Encoder() as named:
            encoder = T5Encoder(named, stage.model.caption_width, stage.model.caption_tokens, device)
            encoder.source.refuse_other(encoder_files.told_by(path), path)
            return encoder
        case config.WordEncoder():
            return WordEncoder.load(path)


def _autoencoder_digest(stage: config.StageConfig) -> dict[str, str]:
    match stage.autoencoder:
        case config.KLAutoencoder() as named:
            return {"kl": KLAutoencoder(named, stage.model.latent_channels).source.digest()}
        case config.PatchAutoencoder():
            return {}  # it is made from the stage's clips, or carried in the checkpoint


def _text_digest(stage: config.StageConfig) -> dict[str, str]:
    match stage.text:
        case config.T5Encoder() as named:
            return {"t5": T5Encoder(named, stage.model.caption_width, stage.model.caption_tokens).source.digest()}
        case config.WordEncoder():
            return {}


def _read_autoencoder(path: Path, device: torch.device | None) -> Autoencoder:
    return KLAutoencoder.load(path, device) if encoder_files.told_by(path).get("kind") == "kl" else PatchAutoencoder.load(path)


def _read_text(path: Path, device: torch.device | None) -> TextEncoder:
    return T5Encoder.load(path, device) if encoder_files.told_by(path).get("kind") == "t5" else WordEncoder.load(path)


def _some_frames(clips: Clips) -> Iterator[torch.Tensor]:
    """Frames of each bucket's first clips, uint8 (N, 3, H, W), up to FITTED_FRAMES in all."""
    share, some = FITTED_FRAMES // len(clips.sizes), False
    for bucket in range(len(clips.sizes)):
        seen = 0
        for batch, _ in read_all(clips, bucket):
            frames = rearrange(batch, "b t h w c -> (b t) c h w")[: share - seen]
            yield frames
            seen, some = seen + len(frames), True
            if seen >= share:
                break
    if not some:
        raise none_usable(clips)
