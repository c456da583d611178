"""The files of a published model on this machine: in a local folder, or from the hub.

Owns where a model is found, what is refused before any weights are read, and the digest by which a checkpoint names it. Only safetensors
are opened, and no code from the model's folder is run. `opensora.encoders.pretrained` runs the models.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from opensora import imports
from opensora.errors import ConfigError, ParentError

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
HUB_TIMEOUT_S = 5.0
"""How long to wait for the hub's first answer."""
SAMPLES, SAMPLE_BYTES = 64, 4096
"""How many samples of each weight file are read for its digest, and the bytes of each."""
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "spiece.model")


@dataclass(frozen=True)
class PublishedModel:
    """The files of one model on this machine."""

    field: str
    """The stage's field that names the model, for messages: `autoencoder.path`."""
    path: str
    """The model's path as the stage writes it."""
    folder: Path
    """The folder with config.json and the weights."""
    tokenizer: Path | None = None
    """The folder with the tokenizer's files. None means the model has no tokenizer."""

    @classmethod
    def find(cls, field: str, path: str, part: str, tokenizer: str | None = None) -> PublishedModel:
        """Find a model in a folder or on the hub. The folder holds the model itself, or is a pipeline whose subfolder `part` is the model.

        Files of the hub that this machine already has are used as they are, because a model on the hub may change. Only missing files are
        fetched.

        Raises:
            ConfigError: the model is not there.
        """
        local = Path(imports.local(path)).expanduser()
        if local.is_dir():
            return cls._within(field, path, local, part, tokenizer)
        if not HUB_ID.fullmatch(path.partition("@")[0]):
            raise ConfigError(
                f"{field} {path}: no such folder. Give the folder of the model, its id on the hub (owner/name), "
                "or the name that `osctl weights add` gave it"
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
    def _within(cls, field: str, path: str, root: Path, part: str, tokenizer: str | None) -> PublishedModel:
        folder = root / part if (root / part / "config.json").is_file() else root
        if not (folder / "config.json").is_file():
            raise ConfigError(f"{field} {path}: it has neither {part}/config.json nor config.json. Give the folder that holds one of them")
        if tokenizer is None:
            return cls(field, path, folder)
        words = root / tokenizer if (root / tokenizer).is_dir() else root
        if not any((words / name).is_file() for name in TOKENIZER_FILES):
            raise ConfigError(
                f"{field} {path}: it has no tokenizer (a folder {tokenizer}/, tokenizer.json or spiece.model). "
                f"Give a folder with both, such as the one that holds {part}/ and {tokenizer}/"
            )
        return cls(field, path, folder, words)

    @cached_property
    def config(self) -> dict[str, Any]:
        """The content of config.json. Raises ConfigError."""
        try:
            content = json.loads((self.folder / "config.json").read_bytes())
        except (OSError, ValueError) as error:
            raise ConfigError(f"{self.field} {self.path}: config.json cannot be read ({error}). Copy the model again") from error
        if not isinstance(content, dict):
            raise ConfigError(f"{self.field} {self.path}: config.json is not a JSON object. Copy the model again")
        return content

    def weights(self) -> list[Path]:
        """The model's safetensors files. Raises ConfigError if it has none, or if one that its index names is missing."""
        files = sorted(path for path in self.folder.glob("*.safetensors") if ".fp16." not in path.name and ".non_ema." not in path.name)
        if not files:
            raise ConfigError(
                f"{self.field} {self.path}: there is no .safetensors file in {self.folder}. Pickled weights (.bin, .pt) are not opened; "
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

    def numbers(self) -> int:
        """How many numbers the weight files hold, from their headers. Raises ConfigError."""
        try:
            return sum(_numbers(path) for path in self.weights())
        except (OSError, SafetensorError) as error:
            raise ConfigError(f"{self.field} {self.path}: its weights cannot be read ({error}). Copy the model again") from error

    def digest(self) -> str:
        """sha256 in hex over the config, the tokenizer, and for each weight file its name, size, header and 64 samples of 4 KiB.

        It is cheap for any size. It tells two trainings of one architecture apart: their headers are equal, but their numbers differ
        everywhere. It does not protect against a forged file.

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
                for sample in _samples(path):
                    result.update(sample)
        except OSError as error:
            raise ConfigError(f"{self.field} {self.path}: {error.filename}: {error.strerror}. Copy the model again") from error
        return result.hexdigest()

    def refuse_other(self, told: dict[str, Any], file: Path) -> None:
        """Raise ParentError if the model that a checkpoint's file names is not this one, although it has the same path."""
        found = self.digest()
        if told.get("digest") != found:
            raise ParentError(
                f"{file}: made with {told.get('path')} of digest {str(told.get('digest'))[:12]}, but {self.field} {self.path} is now of "
                f"digest {found[:12]}: another model lies there now. Put the earlier model back"
            )


def _numbers(path: Path) -> int:
    with safe_open(path, "pt") as file:
        return sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118 - it is no dict


def _samples(path: Path) -> Iterator[bytes]:
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
    """The folder of a model of the hub on this machine. Missing files are fetched, unless `here`."""
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


def load_whole(kind: Any, source: PublishedModel, device: torch.device, **dtype: torch.dtype) -> Any:
    """Load a model of diffusers or transformers, and check that every weight came from its files: the libraries fill missing weights with
    random numbers and only warn.

    Args:
        kind: the library's class.
        dtype: one keyword argument with the type, under the name that the class uses for it.

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
            f"{source.field} {source.path}: {kind.__name__} cannot be loaded ({first_line(error)}). Copy the model again"
        ) from error
    lost = sorted({*info["missing_keys"], *(str(key) for key in info["mismatched_keys"])})
    if lost:
        more = ", ..." if len(lost) > 10 else ""
        raise ConfigError(
            f"{source.field} {source.path}: {len(lost)} weights of {kind.__name__} are missing or of another shape "
            f"({', '.join(lost[:10])}{more}). Give the files that belong to its config.json"
        )
    return model.to(device).eval().requires_grad_(False)


def first_line(error: Exception) -> str:
    """The first line of an error, 200 characters at most."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
