"""From pixels to latents and from captions to token vectors, and back to pixels.

Owns the two protocols, and which encoders a stage has: embedded ones (`embedded_encoders`), which lie whole in each checkpoint, or
published ones (`pretrained_encoders`), which a checkpoint names. Refuses to cache: `opensora.data.latents` runs each encoder once per clip.

Letters: N frames · B clips · T frames of a clip · C latent channels · h, w latent rows and columns · L text tokens.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

import torch
from einops import rearrange

from opensora import config, encoder_files
from opensora.data.source import Clips, none_usable, read_all
from opensora.embedded_encoders import PatchAutoencoder, WordEncoder
from opensora.encoder_files import AUTOENCODER_FILE, TEXT_FILE, about
from opensora.errors import ConfigError, ParentError
from opensora.pretrained_encoders import KLAutoencoder, T5Encoder

__all__ = ["AUTOENCODER_FILE", "TEXT_FILE", "KLAutoencoder", "PatchAutoencoder", "T5Encoder", "WordEncoder", "about"]

FITTED_FRAMES = 8192
"""Frames that the principal components are made from; more changes the third digit of the PSNR."""


class Autoencoder(Protocol):
    factor: int
    """Pixels per latent row and column."""
    channels: int
    """C."""

    def encode(self, frames: torch.Tensor, generator: torch.Generator | Sequence[torch.Generator] | None = None) -> torch.Tensor:
        """uint8 (N, 3, H, W) → float32 (N, C, H/factor, W/factor), about unit variance, on the frames' device.

        Args:
            generator: what a random latent is drawn with: one for all frames, or one each for as many consecutive frames.
        """

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """(N, C, h, w) → uint8 (N, 3, h·factor, w·factor), on the latents' device."""

    def save(self, directory: Path) -> None:
        """Write `autoencoder.safetensors`."""


class TextEncoder(Protocol):
    width: int
    """Channels of a token vector."""
    tokens: int
    """Of a caption that are kept; the rest is cut."""

    def encode(self, captions: Sequence[str]) -> list[torch.Tensor]:
        """Vectors float32 (L, width) of each caption, L its own number of tokens, on the CPU.

        Raises:
            ConfigError: for a caption that cannot be encoded.
        """

    def null_caption(self, tokens: int) -> torch.Tensor | None:
        """(tokens, width): what stands for no caption where weights know none of their own; none: a model learns it."""

    def save(self, directory: Path) -> None:
        """Write `text.safetensors`."""


def build(
    stage: config.StageConfig, clips: Clips, carried: Path | None, device: torch.device | None = None
) -> tuple[Autoencoder, TextEncoder]:
    """The stage's encoders: those of the checkpoint it starts from, else made from its own clips, or found where the stage says.

    A carried vocabulary grows by the words of the clips.

    Args:
        carried: directory of the checkpoint's files.
        device: of published encoders; none: this process's CUDA device, where it has one. The embedded ones compute where their input lies.

    Raises:
        ConfigError: for encoders that are not there or do not fit.
        ParentError: for files that are not whole, or that name a model which is now another one.
    """
    if carried is not None:
        autoencoder, text = load(carried, stage, device)
    else:
        autoencoder, text = _new_autoencoder(stage, clips, device), _new_text(stage, device)
    return autoencoder, text.extended({*clips.captions, *clips.words}) if isinstance(text, WordEncoder) else text


def read(directory: Path, device: torch.device | None = None) -> tuple[Autoencoder, TextEncoder]:
    """The encoders whose files lie in a directory. Raises ParentError, for files that are not whole, and as `build`."""
    return _read_autoencoder(directory / AUTOENCODER_FILE, device), _read_text(directory / TEXT_FILE, device)


def load(directory: Path, stage: config.StageConfig, device: torch.device | None = None) -> tuple[Autoencoder, TextEncoder]:
    """The encoders of a checkpoint, for this stage. Raises as `build`."""
    for name, wanted in ((AUTOENCODER_FILE, stage.autoencoder.kind), (TEXT_FILE, stage.text.kind)):
        found = encoder_files.told_by(directory / name).get("kind")
        if found != wanted:
            raise ParentError(f"{directory / name}: kind is {found}, the stage wants {wanted}. Take the right checkpoint")
    autoencoder: Autoencoder
    text: TextEncoder
    # named encoders compute as this stage says (type, batch, point of the distribution), and are the models that the checkpoint names
    if isinstance(stage.autoencoder, config.KLAutoencoder):
        named = KLAutoencoder(stage.autoencoder, stage.model.latent_channels, device)
        named.source.refuse_other(encoder_files.told_by(directory / AUTOENCODER_FILE), directory / AUTOENCODER_FILE)
        autoencoder = named
    else:
        autoencoder = _read_autoencoder(directory / AUTOENCODER_FILE, device)
    if isinstance(stage.text, config.T5Encoder):
        speaker = T5Encoder(stage.text, stage.model.caption_width, stage.model.caption_tokens, device)
        speaker.source.refuse_other(encoder_files.told_by(directory / TEXT_FILE), directory / TEXT_FILE)
        text = speaker
    else:
        text = _read_text(directory / TEXT_FILE, device)
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
    """Of the published encoders that the stage names, by kind: for the name of a cache of what they make. Cheap, no weights are read.

    Raises:
        ConfigError: for encoders that are not there or do not fit.
    """
    found: dict[str, str] = {}
    if isinstance(stage.autoencoder, config.KLAutoencoder):
        found["kl"] = KLAutoencoder(stage.autoencoder, stage.model.latent_channels).source.digest()
    if isinstance(stage.text, config.T5Encoder):
        found["t5"] = T5Encoder(stage.text, stage.model.caption_width, stage.model.caption_tokens).source.digest()
    return found


def copy_encoders(source: Path, target: Path) -> None:
    """Both files, byte for byte."""
    for name in (AUTOENCODER_FILE, TEXT_FILE):
        shutil.copyfile(source / name, target / name)


def encode_clips(autoencoder: Autoencoder, clips: torch.Tensor, generators: Sequence[torch.Generator] | None = None) -> torch.Tensor:
    """uint8 (B, T, H, W, 3) → (B, C, T, h, w). `generators`: one a clip, where latents are drawn; none: their mode."""
    latents = autoencoder.encode(rearrange(clips, "b t h w c -> (b t) c h w"), generators)
    return rearrange(latents, "(b t) c h w -> b c t h w", b=len(clips)).contiguous()


def decode_clips(autoencoder: Autoencoder, latents: torch.Tensor) -> torch.Tensor:
    """(B, C, T, h, w) → uint8 (B, T, H, W, 3)."""
    frames = autoencoder.decode(rearrange(latents, "b c t h w -> (b t) c h w"))
    return rearrange(frames, "(b t) c h w -> b t h w c", b=len(latents)).contiguous()


def padded(vectors: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """(L, width) of B captions → vectors (B, longest L, width), zero where padded, and mask bool (B, longest L), true on tokens."""
    mask = torch.zeros(len(vectors), max(map(len, vectors)), dtype=torch.bool)
    for row, one in zip(mask, vectors, strict=True):
        row[: len(one)] = True
    return torch.nn.utils.rnn.pad_sequence(list(vectors), batch_first=True), mask


def null_caption(text: TextEncoder, tokens: int, width: int) -> torch.Tensor | None:
    """(tokens, width) for weights that know no null caption of their own (PixArt-α in diffusers' layout); none: a model learns it.

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


def _read_autoencoder(path: Path, device: torch.device | None) -> Autoencoder:
    return KLAutoencoder.load(path, device) if encoder_files.told_by(path).get("kind") == "kl" else PatchAutoencoder.load(path)


def _read_text(path: Path, device: torch.device | None) -> TextEncoder:
    return T5Encoder.load(path, device) if encoder_files.told_by(path).get("kind") == "t5" else WordEncoder.load(path)


def _some_frames(clips: Clips) -> Iterator[torch.Tensor]:
    """Frames of each bucket's first clips, uint8 (N, 3, H, W), until there are enough."""
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
