"""Published encoders: a diffusers AutoencoderKL and a transformers T5EncoderModel, from a local folder or a hub id.

Owns where they are found, what is refused before a byte of weights is read, and the digest by which a checkpoint names them (they are not
copied into it: T5-XXL has 9.5 GB). Weights are read at the first use: a step over cached latents never needs them. Only safetensors are
opened, and no code of a folder is run.

Letters: N frames · C latent channels · h, w latent rows and columns · L text tokens.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from safetensors.torch import save_file

from opensora import config, encoder_files, imports
from opensora.captions import clean
from opensora.encoder_files import AUTOENCODER_FILE, TEXT_FILE, about
from opensora.errors import ConfigError, ParentError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
HUB_TIMEOUT_S = 5.0
"""For the hub's first answer."""
SCALE = 0.18215
"""Where a config.json says none, diffusers' own default: Stable Diffusion's, one over the standard deviation of its latents."""
TOKENS_AT_ONCE = 8192
"""Tokens that T5 reads at once, padding included: the XXL's largest intermediate has 0.3 GB in bf16."""
SAMPLES, SAMPLE_BYTES = 64, 4096
"""What is read of each weight file for its digest: so many places of so many bytes."""
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "spiece.model")


@dataclass(frozen=True)
class Source:
    """One model on this machine."""

    field: str
    """Of the stage, for messages: `autoencoder.path`."""
    path: str
    """As the stage names it."""
    folder: Path
    """Holds config.json and the weights."""
    tokenizer: Path | None = None
    """Holds the tokenizer's files."""

    @classmethod
    def find(cls, field: str, path: str, part: str, tokenizer: str | None = None) -> Source:
        """In a folder or a model of the hub: either the model itself, or a pipeline whose folder `part` is the model.

        What this machine has of the hub is used as it is. Only what it lacks is fetched: a model on the hub may change.

        Raises:
            ConfigError: it is not there.
        """
        local = Path(imports.local(path)).expanduser()
        if local.is_dir():
            return cls._within(field, path, local, part, tokenizer)
        if not HUB_ID.fullmatch(path.partition("@")[0]):
            raise ConfigError(
                f"{field} {path}: no such folder. Give the folder of the model, its id on the hub (owner/name), "
                "or the name of what osctl weights add brought in"
            )
        try:
            found = cls._within(field, path, _of_hub(field, path, ["*.json", "*spiece.model"], here=True), part, tokenizer)
            found.weights()
        except ConfigError:
            root = _of_hub(field, path, ["*.json", "*spiece.model"])
            found = cls._within(field, path, root, part, tokenizer)
            inside = "" if found.folder == root else f"{part}/"
            _of_hub(field, path, [f"{inside}model*.safetensors", f"{inside}diffusion_pytorch_model*.safetensors"])
        return found

    @classmethod
    def _within(cls, field: str, path: str, root: Path, part: str, tokenizer: str | None) -> Source:
        folder = root / part if (root / part / "config.json").is_file() else root
        if not (folder / "config.json").is_file():
            raise ConfigError(f"{field} {path}: neither {part}/config.json nor config.json in it. Give the folder that holds one of them")
        if tokenizer is None:
            return cls(field, path, folder)
        words = root / tokenizer if (root / tokenizer).is_dir() else root
        if not any((words / name).is_file() for name in TOKENIZER_FILES):
            raise ConfigError(
                f"{field} {path}: no tokenizer in it (a folder {tokenizer}/, tokenizer.json or spiece.model). "
                f"Give a folder with both, such as the one that holds {part}/ and {tokenizer}/"
            )
        return cls(field, path, folder, words)

    @cached_property
    def config(self) -> dict[str, Any]:
        """config.json. Raises ConfigError."""
        try:
            content = json.loads((self.folder / "config.json").read_bytes())
        except (OSError, ValueError) as error:
            raise ConfigError(f"{self.field} {self.path}: config.json cannot be read ({error}). Copy the model again") from error
        if not isinstance(content, dict):
            raise ConfigError(f"{self.field} {self.path}: config.json is no object. Copy the model again")
        return content

    def weights(self) -> list[Path]:
        """Its safetensors files. Raises ConfigError, where it has none."""
        files = sorted(path for path in self.folder.glob("*.safetensors") if ".fp16." not in path.name and ".non_ema." not in path.name)
        if not files:
            raise ConfigError(
                f"{self.field} {self.path}: no .safetensors in {self.folder}. Pickled weights (.bin, .pt) are not opened; "
                f"save the model with save_pretrained(..., safe_serialization=True)"
            )
        for index in self.folder.glob("*.safetensors.index.json"):
            if ".fp16." in index.name:
                continue
            try:
                named = set(json.loads(index.read_bytes())["weight_map"].values())
            except (OSError, ValueError, KeyError) as error:
                raise ConfigError(f"{self.field} {self.path}: {index.name} cannot be read ({error!r}). Copy the model again") from error
            if lost := sorted(named - {path.name for path in files}):
                raise ConfigError(f"{self.field} {self.path}: {index.name} names {lost[0]}, which is not there. Copy the model again")
        return files

    def digest(self) -> str:
        """sha256 in hex over config, tokenizer, and of each weight file its name, size, header and 64 samples of 4 KiB.

        Cheap whatever the size, and it tells two trainings of one architecture apart: their headers are equal, their numbers are nowhere.
        It is no proof against somebody who forges a file.

        Raises:
            ConfigError: a file cannot be read.
        """
        told = {name: value for name, value in self.config.items() if not name.startswith("_") and name != "transformers_version"}
        result = hashlib.sha256(json.dumps(told, sort_keys=True).encode())
        try:
            for path in [self.tokenizer / name for name in TOKENIZER_FILES] if self.tokenizer else []:
                if path.is_file():
                    result.update(path.name.encode() + hashlib.sha256(path.read_bytes()).digest())
            for path in self.weights():
                for piece in _pieces(path):
                    result.update(piece)
        except OSError as error:
            raise ConfigError(f"{self.field} {self.path}: {error.filename}: {error.strerror}. Copy the model again") from error
        return result.hexdigest()

    def refuse_other(self, told: dict[str, Any], file: Path) -> None:
        """Raises ParentError where the file's model is not this one: its name is the same, so nobody would notice."""
        found = self.digest()
        if told.get("digest") != found:
            raise ParentError(
                f"{file}: made with {told.get('path')} of digest {str(told.get('digest'))[:12]}, but {self.field} {self.path} is now of "
                f"digest {found[:12]}: another model under the name. Put the model of before there"
            )


def _pieces(path: Path) -> Iterator[bytes]:
    size = path.stat().st_size
    yield f"{path.name} {size}".encode()
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = file.read(min(length, size))
        yield header
        data = size - 8 - len(header)
        for place in range(SAMPLES):
            file.seek(8 + len(header) + max(data - SAMPLE_BYTES, 0) * place // (SAMPLES - 1))
            yield file.read(SAMPLE_BYTES)


def _of_hub(field: str, path: str, patterns: list[str], *, here: bool = False) -> Path:
    """Folder of what this machine has of a model of the hub, after fetching what it lacks unless `here`."""
    import httpx2
    from huggingface_hub import constants, snapshot_download

    name, _, revision = path.partition("@")
    try:
        return Path(
            snapshot_download(
                name,
                revision=revision or None,
                allow_patterns=patterns,
                ignore_patterns=["*.fp16.*", "*.non_ema.*"],
                etag_timeout=HUB_TIMEOUT_S,
                local_files_only=here,
            )
        )
    except (OSError, httpx2.HTTPError) as error:
        said = " ".join(str(error.__cause__ or error).split())[:200]
        why = "HF_HUB_OFFLINE forbids to ask the hub" if constants.is_offline_mode() else f"{constants.ENDPOINT} did not give it ({said})"
        raise ConfigError(
            f"{field} {path}: no such folder, and {why}. Give a folder, or fetch it first where there is a network: hf download {path}"
        ) from error


class KLAutoencoder:
    """A diffusers AutoencoderKL, frames as images. Implements `opensora.encoders.Autoencoder`."""

    def __init__(self, stage: config.KLAutoencoder, channels: int, device: torch.device | None = None) -> None:
        """Reads its config.json.

        Args:
            channels: what the stage's model expects.
            device: none: this process's CUDA device, where it has one.

        Raises:
            ConfigError: it is not there, is another model, or does not fit.
        """
        self.source = Source.find("autoencoder.path", stage.path, "vae")
        found, subject = self.source.config, f"autoencoder.path {stage.path}"
        if found.get("_class_name") != "AutoencoderKL":
            raise ConfigError(f"{subject}: its config.json is of {_kind(found)}, kind kl is diffusers' AutoencoderKL. Give that")
        self.factor, self.channels = 2 ** (len(found.get("block_out_channels", (64,))) - 1), found.get("latent_channels", 4)
        if self.factor != stage.factor:
            raise ConfigError(
                f"autoencoder.factor is {stage.factor}, but {stage.path} has {self.factor} pixels per latent. Make them equal"
            )
        if self.channels != channels:
            raise ConfigError(f"model.latent_channels is {channels}, but {stage.path} has {self.channels}. Make them equal")
        for name in ("latents_mean", "latents_std"):
            if found.get(name) is not None:
                raise ConfigError(f"{subject}: it normalises its latents by {name}, here one scale is known. Give another autoencoder")
        self.stage, self.device = stage, device or _own_device()
        self.scale: float = stage.scale or found.get("scaling_factor") or SCALE
        self.shift: float = found.get("shift_factor") or 0.0

    @torch.no_grad()
    def encode(self, frames: torch.Tensor, generator: torch.Generator | Sequence[torch.Generator] | None = None) -> torch.Tensor:
        """Where the stage says `posterior: sample`, drawn from the encoder's distribution with what is given; without, its mode.

        Args:
            generator: one for all frames in their order, or one each for as many consecutive frames: a clip's own draws the same
                noise whatever clips are beside it.
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
        """The reference to it."""
        facts = self.stage.model_dump() | {"scale": self.scale, "channels": self.channels, "digest": self.source.digest()}
        save_file({}, directory / AUTOENCODER_FILE, about(**facts))

    @classmethod
    def load(cls, path: Path, device: torch.device | None = None) -> KLAutoencoder:
        """What a file refers to. Raises ParentError where it is now another model, and as the constructor."""
        names = config.KLAutoencoder.model_fields.keys()
        _, told = encoder_files.read(path, "kl", (), (*names, "channels", "digest"))
        fields = {name: told[name] for name in names}
        autoencoder = cls(config.KLAutoencoder.model_validate(fields), told["channels"], device)
        autoencoder.source.refuse_other(told, path)
        return autoencoder

    @cached_property
    def _model(self) -> Any:
        from diffusers import AutoencoderKL

        dtype = DTYPES[self.stage.dtype]
        return _whole(AutoencoderKL, self.source, self.device, torch_dtype=dtype)

    def _parts(self, tensor: torch.Tensor) -> Sequence[torch.Tensor]:
        return torch.split(tensor, self.stage.micro_batch or max(len(tensor), 1))

    def _overflow(self, what: str) -> ConfigError:
        return ConfigError(f"autoencoder.dtype {self.stage.dtype}: {what} of {self.stage.path} is not finite. Use bf16 or fp32")


class T5Encoder:
    """A transformers T5EncoderModel with its tokenizer. Implements `opensora.encoders.TextEncoder`."""

    def __init__(self, stage: config.T5Encoder, width: int, tokens: int, device: torch.device | None = None) -> None:
        """Reads its config.json.

        Args:
            width: channels that the stage's model expects.
            tokens: of a caption that are kept, the end of the sequence included.
            device: none: this process's CUDA device, where it has one.

        Raises:
            ConfigError: it is not there, is another model, or does not fit.
        """
        self.source = Source.find("text.path", stage.path, "text_encoder", "tokenizer")
        found = self.source.config
        if found.get("model_type") != "t5":
            raise ConfigError(f"text.path {stage.path}: its config.json is of {_kind(found)}, kind t5 is transformers' T5. Give that")
        self.width = found.get("d_model", 512)
        if self.width != width:
            raise ConfigError(f"model.caption_width is {width}, but {stage.path} has {self.width}. Make them equal")
        self.stage, self.tokens, self.device = stage, tokens, device or _own_device()

    def encode(self, captions: Sequence[str]) -> list[torch.Tensor]:
        """Cleaned (`opensora.captions`), longest first: what does not fit the memory is known at once."""
        ids = self._tokenize([clean(caption) for caption in captions])
        vectors: dict[int, torch.Tensor] = {}
        for rows in _alike([len(row) for row in ids]):
            found = self._vectors([ids[row] for row in rows], len(ids[rows[0]]))
            vectors |= {row: one[: len(ids[row])].clone() for row, one in zip(rows, found, strict=True)}
        return [vectors[row] for row in range(len(captions))]

    def null_caption(self, tokens: int) -> torch.Tensor:
        """The empty caption, padded as PixArt-α's pipelines pad it: each place holds what T5 says there, looking at the one token alone."""
        found = self._vectors(self._tokenize([""]), tokens)[0]
        vars(self).pop("_model")  # asked for once, as a stage begins: T5-XXL's 9.5 GB would stay on the device for all of it
        return found

    def save(self, directory: Path) -> None:
        """The reference to it."""
        facts = self.stage.model_dump() | {"width": self.width, "tokens": self.tokens, "digest": self.source.digest()}
        save_file({}, directory / TEXT_FILE, about(**facts))

    @classmethod
    def load(cls, path: Path, device: torch.device | None = None) -> T5Encoder:
        """What a file refers to. Raises ParentError where it is now another model, and as the constructor."""
        names = config.T5Encoder.model_fields.keys()
        _, told = encoder_files.read(path, "t5", (), (*names, "width", "tokens", "digest"))
        fields = {name: told[name] for name in names}
        text = cls(config.T5Encoder.model_validate(fields), told["width"], told["tokens"], device)
        text.source.refuse_other(told, path)
        return text

    @torch.no_grad()
    def _vectors(self, ids: Sequence[Sequence[int]], length: int) -> torch.Tensor:
        """float32 (rows, length, width) on the CPU; the mask keeps padding from being looked at."""
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
            raise ConfigError(f"{subject}: its tokenizer cannot be read ({_line(error)}). Copy the tokenizer again") from error
        rows = self.source.config.get("vocab_size", 32128)
        if len(tokenizer) > rows:
            raise ConfigError(
                f"{subject}: its tokenizer has {len(tokenizer)} tokens, the model knows {rows}. Give a model with its own tokenizer"
            )
        return tokenizer

    @cached_property
    def _model(self) -> Any:
        from transformers import T5EncoderModel
        from transformers.utils import logging

        logging.disable_progress_bar()  # type: ignore[no-untyped-call]
        return _whole(T5EncoderModel, self.source, self.device, dtype=DTYPES[self.stage.dtype])


def _own_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _whole(kind: Any, source: Source, device: torch.device, **dtype: torch.dtype) -> Any:
    """The model, every weight of it from the files: libraries fill what is missing with random numbers, and warn.

    Raises:
        ConfigError: a weight is missing or of another shape, or a file is not whole.
    """
    from safetensors import SafetensorError

    source.weights()
    try:
        model, info = kind.from_pretrained(
            source.folder, local_files_only=True, use_safetensors=True, output_loading_info=True, low_cpu_mem_usage=True, **dtype
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ConfigError(
            f"{source.field} {source.path}: {kind.__name__} cannot be loaded ({_line(error)}). Copy the model again"
        ) from error
    lost = sorted({*info["missing_keys"], *(str(key) for key in info["mismatched_keys"])})
    if lost:
        more = ", ..." if len(lost) > 10 else ""
        raise ConfigError(
            f"{source.field} {source.path}: {len(lost)} weights of {kind.__name__} are missing or of another shape "
            f"({', '.join(lost[:10])}{more}). Give the files that belong to its config.json"
        )
    return model.to(device).eval().requires_grad_(False)


def _noise(latents: torch.Tensor, generator: torch.Generator | Sequence[torch.Generator]) -> torch.Tensor:
    generators = [generator] if isinstance(generator, torch.Generator) else list(generator)
    shape = (len(latents) // len(generators), *latents.shape[1:])
    drawn = [torch.randn(shape, generator=one, device=one.device).to(latents.device) for one in generators]
    return rearrange(drawn, "g n c h w -> (g n) c h w")


def _alike(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Indices in batches of like lengths, longest first, each batch of at most TOKENS_AT_ONCE with its padding."""
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    while order:
        count = max(TOKENS_AT_ONCE // max(lengths[order[0]], 1), 1)
        yield order[:count]
        order = order[count:]


def _kind(found: dict[str, Any]) -> str:
    return str(found.get("_class_name") or found.get("model_type") or "nothing known")


def _line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
