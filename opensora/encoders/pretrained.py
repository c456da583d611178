"""Published encoders: a diffusers AutoencoderKL and a transformers T5EncoderModel, from a local folder or a hub id.

Owns how they are run. A checkpoint names them by path and digest and does not copy them, since T5-XXL has 9.5 GB. Weights are read at the
first use, because a step over cached latents never needs them. `opensora.encoders.published` finds their files.

Letters: N frames · C latent channels · h, w latent rows and columns · L text tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from safetensors.torch import save_file

from opensora import config
from opensora.encoders import files as encoder_files
from opensora.encoders.captions import clean
from opensora.encoders.files import AUTOENCODER_FILE, TEXT_FILE, about
from opensora.encoders.published import PublishedModel, first_line, load_whole
from opensora.errors import ConfigError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

SCALE = 0.18215
"""Used if a config.json has no scale. It is diffusers' default, from Stable Diffusion: one over the standard deviation of its latents."""
DECODER_MAPS = 8
"""Maps as wide as the decoder's last block and as large as the frame that are alive at once, measured on a CPU: 6.1 to 7.8."""
TOKENS_AT_ONCE = 8192
"""Tokens that T5 reads at once, padding included: the XXL's largest intermediate has 0.3 GB in bf16."""


class KLAutoencoder:
    """A diffusers AutoencoderKL that encodes each frame as an image. Implements `opensora.encoders.protocol.Autoencoder`."""

    def __init__(self, stage: config.KLAutoencoder, channels: int, device: torch.device | None = None) -> None:
        """Read its config.json, but no weights.

        Args:
            channels: the number of latent channels that the stage's model expects.
            device: where it runs. None means this process's CUDA device if it has one, otherwise the CPU.

        Raises:
            ConfigError: the model is not there, is another model, or does not fit.
        """
        self.source = PublishedModel.find("autoencoder.path", stage.path, "vae")
        found, subject = self.source.config, f"autoencoder.path {stage.path}"
        if found.get("_class_name") != "AutoencoderKL":
            raise ConfigError(f"{subject}: its config.json is of {_kind(found)}, but kind kl is diffusers' AutoencoderKL. Give one")
        self.factor, self.channels = 2 ** (len(found.get("block_out_channels", (64,))) - 1), found.get("latent_channels", 4)
        if self.factor != stage.factor:
            raise ConfigError(
                f"autoencoder.factor is {stage.factor}, but {stage.path} has {self.factor} pixels per latent. Make them equal"
            )
        if self.channels != channels:
            raise ConfigError(f"model.latent_channels is {channels}, but {stage.path} has {self.channels}. Make them equal")
        for name in ("latents_mean", "latents_std"):
            if found.get(name) is not None:
                raise ConfigError(
                    f"{subject}: it normalises latents by {name}, but osctl supports only one scale. Give another autoencoder"
                )
        self.stage, self.device = stage, device or _own_device()
        self.scale: float = stage.scale or found.get("scaling_factor") or SCALE
        self.shift: float = found.get("shift_factor") or 0.0

    @torch.no_grad()
    def encode(self, frames: torch.Tensor, generator: torch.Generator | Sequence[torch.Generator] | None = None) -> torch.Tensor:
        """Latents of these frames: samples of the posterior if the stage says `posterior: sample` and there is a generator, else its mode.

        Args:
            generator: one generator for all frames in their order, or several that share the frames equally, in order. With one for each
                clip a clip gets the same noise whatever clips are in the batch.
        """
        dtype, means, deviations = DTYPES[self.stage.dtype], [], []
        for some in self._parts(frames):
            posterior = self._model.encode((some.to(self.device).float() / 127.5 - 1).to(dtype)).latent_dist
            means.append(posterior.mean.float())
            deviations.append(posterior.std.float())
        latents = torch.cat(means)
        if generator is not None and self.stage.posterior == "sample":
            latents = latents + torch.cat(deviations) * _noise(latents, generator)
        if not latents.isfinite().all():
            raise self._overflow("a latent")
        return ((latents - self.shift) * self.scale).to(frames.device)

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        dtype, parts = DTYPES[self.stage.dtype], []
        for some in self._parts(latents):
            pixels = self._model.decode((some.to(self.device).float() / self.scale + self.shift).to(dtype)).sample.float()
            if not pixels.isfinite().all() and some.isfinite().all():
                raise self._overflow("a pixel")
            parts.append(((pixels + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).to(latents.device))
        return torch.cat(parts)

    def save(self, directory: Path) -> None:
        """Write the reference: path, settings and digest, but no weights."""
        facts = self.stage.model_dump() | {"scale": self.scale, "channels": self.channels, "digest": self.source.digest()}
        save_file({}, directory / AUTOENCODER_FILE, about(**facts))

    @classmethod
    def load(cls, path: Path, device: torch.device | None = None) -> KLAutoencoder:
        """The autoencoder that a file refers to. Raises ParentError if another model lies there now, and as the constructor does."""
        names = config.KLAutoencoder.model_fields.keys()
        _, told = encoder_files.read(path, "kl", (), (*names, "channels", "digest"))
        fields = {name: told[name] for name in names}
        autoencoder = cls(config.KLAutoencoder.model_validate(fields), told["channels"], device)
        autoencoder.source.refuse_other(told, path)
        return autoencoder

    def weights_bytes(self) -> int:
        """Of the weights, as far as they are not loaded yet. Raises ConfigError."""
        return 0 if "_model" in vars(self) else self.source.numbers() * DTYPES[self.stage.dtype].itemsize

    def decoding_bytes(self) -> float:
        """Of a pixel of a frame while it is decoded: the decoder's last blocks have so many maps at the frame's own size."""
        width: int = self.source.config.get("block_out_channels", (64,))[0]
        return DECODER_MAPS * width * DTYPES[self.stage.dtype].itemsize

    @cached_property
    def _model(self) -> Any:
        from diffusers import AutoencoderKL

        dtype = DTYPES[self.stage.dtype]
        return load_whole(AutoencoderKL, self.source, self.device, torch_dtype=dtype)

    def _parts(self, tensor: torch.Tensor) -> Sequence[torch.Tensor]:
        return torch.split(tensor, self.stage.micro_batch or max(len(tensor), 1))

    def _overflow(self, what: str) -> ConfigError:
        return ConfigError(f"autoencoder.dtype {self.stage.dtype}: {what} of {self.stage.path} is not finite. Use bf16 or fp32")


class T5Encoder:
    """A transformers T5EncoderModel with its tokenizer. Implements `opensora.encoders.protocol.TextEncoder`."""

    unit = "tokens"

    def __init__(self, stage: config.T5Encoder, width: int, tokens: int, device: torch.device | None = None) -> None:
        """Read its config.json, but no weights.

        Args:
            width: the number of channels that the stage's model expects.
            tokens: the number of tokens of a caption that are kept, including the end of the sequence.
            device: where it runs. None means this process's CUDA device if it has one, otherwise the CPU.

        Raises:
            ConfigError: the model is not there, is another model, or does not fit.
        """
        self.source = PublishedModel.find("text.path", stage.path, "text_encoder", "tokenizer")
        found = self.source.config
        if found.get("model_type") != "t5":
            raise ConfigError(f"text.path {stage.path}: its config.json is of {_kind(found)}, but kind t5 is transformers' T5. Give a T5")
        self.width = found.get("d_model", 512)
        if self.width != width:
            raise ConfigError(f"model.caption_width is {width}, but {stage.path} has {self.width}. Make them equal")
        self.stage, self.tokens, self.device = stage, tokens, device or _own_device()

    def length(self, caption: str) -> int:
        return len(self._tokenizer(clean(caption), truncation=False, verbose=False)["input_ids"])

    def knows(self, caption: str) -> bool:
        """Whether any token of a caption is in the vocabulary: of a script that it lacks, every token is the unknown one."""
        special = {*self._tokenizer.all_special_ids}
        return any(token not in special for token in self._tokenizer(clean(caption), truncation=False, verbose=False)["input_ids"])

    def encode(self, captions: Sequence[str]) -> list[torch.Tensor]:
        """Clean the captions (`opensora.encoders.captions`) and encode them, longest first, so that a lack of memory shows at once."""
        ids = self._tokenize([clean(caption) for caption in captions])
        vectors: dict[int, torch.Tensor] = {}
        for rows in _alike([len(row) for row in ids]):
            found = self._vectors([ids[row] for row in rows], len(ids[rows[0]]))
            vectors |= {row: one[: len(ids[row])].clone() for row, one in zip(rows, found, strict=True)}
        return [vectors[row] for row in range(len(captions))]

    def cut(self, captions: Sequence[str]) -> list[bool]:
        """Which captions are longer than `tokens`, end of sequence included. Only those that reach `tokens` are tokenised a second time."""
        cleaned = [clean(caption) for caption in captions]
        full = [row for row, ids in enumerate(self._tokenize(cleaned)) if len(ids) >= self.tokens]
        longer = {row for row in full if len(self._tokenizer(cleaned[row])["input_ids"]) > self.tokens}
        return [row in longer for row in range(len(cleaned))]

    def null_caption(self, tokens: int) -> torch.Tensor:
        """The empty caption, padded as in PixArt-α's pipelines: every position holds T5's output there, which attends to the one token."""
        found = self._vectors(self._tokenize([""]), tokens)[0]
        vars(self).pop("_model")  # needed once, at the start of a stage; T5-XXL's 9.5 GB would stay on the device during training
        return found

    def weights_bytes(self) -> int:
        """Of the weights, as far as they are not loaded yet. Raises ConfigError."""
        return 0 if "_model" in vars(self) else self.source.numbers() * DTYPES[self.stage.dtype].itemsize

    def save(self, directory: Path) -> None:
        """Write the reference: path, settings and digest, but no weights."""
        facts = self.stage.model_dump() | {"width": self.width, "tokens": self.tokens, "digest": self.source.digest()}
        save_file({}, directory / TEXT_FILE, about(**facts))

    @classmethod
    def load(cls, path: Path, device: torch.device | None = None) -> T5Encoder:
        """The encoder that a file refers to. Raises ParentError if another model lies there now, and as the constructor does."""
        names = config.T5Encoder.model_fields.keys()
        _, told = encoder_files.read(path, "t5", (), (*names, "width", "tokens", "digest"))
        fields = {name: told[name] for name in names}
        text = cls(config.T5Encoder.model_validate(fields), told["width"], told["tokens"], device)
        text.source.refuse_other(told, path)
        return text

    @torch.no_grad()
    def _vectors(self, ids: Sequence[Sequence[int]], length: int) -> torch.Tensor:
        """float32 (rows, length, width) on the CPU. A mask keeps tokens from attending to padding."""
        padded, mask = torch.zeros(len(ids), length, dtype=torch.long), torch.zeros(len(ids), length, dtype=torch.long)
        for number, row in enumerate(ids):
            padded[number, : len(row)], mask[number, : len(row)] = torch.tensor(row), 1
        found = self._model(input_ids=padded.to(self.device), attention_mask=mask.to(self.device)).last_hidden_state
        vectors: torch.Tensor = found.float().cpu()
        return vectors

    def _tokenize(self, captions: Sequence[str]) -> list[list[int]]:
        if not captions:
            return []
        ids: list[list[int]] = self._tokenizer(list(captions), truncation=True, max_length=self.tokens)["input_ids"]
        return ids

    @cached_property
    def _tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        subject = f"text.path {self.stage.path}"
        try:
            tokenizer = AutoTokenizer.from_pretrained(self.source.tokenizer, local_files_only=True, trust_remote_code=False)
        except (OSError, ValueError, KeyError, ImportError) as error:
            raise ConfigError(f"{subject}: its tokenizer cannot be read ({first_line(error)}). Copy the tokenizer again") from error
        rows = self.source.config.get("vocab_size", 32128)
        if len(tokenizer) > rows:
            raise ConfigError(
                f"{subject}: its tokenizer has {len(tokenizer)} tokens, but the model knows {rows}. Give a model with its own tokenizer"
            )
        return tokenizer

    @cached_property
    def _model(self) -> Any:
        from transformers import T5EncoderModel
        from transformers.utils import logging

        logging.disable_progress_bar()  # type: ignore[no-untyped-call]
        return load_whole(T5EncoderModel, self.source, self.device, dtype=DTYPES[self.stage.dtype])


def _own_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _noise(latents: torch.Tensor, generator: torch.Generator | Sequence[torch.Generator]) -> torch.Tensor:
    generators = [generator] if isinstance(generator, torch.Generator) else list(generator)
    shape = (len(latents) // len(generators), *latents.shape[1:])
    drawn = [torch.randn(shape, generator=one, device=one.device).to(latents.device) for one in generators]
    return rearrange(drawn, "g n c h w -> (g n) c h w")


def _alike(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Indices in batches of similar lengths, longest first. Each batch has at most TOKENS_AT_ONCE tokens, padding included."""
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    while order:
        count = max(TOKENS_AT_ONCE // max(lengths[order[0]], 1), 1)
        yield order[:count]
        order = order[count:]


def _kind(found: dict[str, Any]) -> str:
    return str(found.get("_class_name") or found.get("model_type") or "nothing known")
