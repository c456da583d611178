"""Each clip encoded once, so that a training step runs neither encoder.

Owns the latent cache: one directory per (data, encoders), complete or absent. One rank builds it, streaming to disk; every rank maps it.
Refuses to order clips (`loader`), to know how they are decoded (sources) and how a file is laid out (`shard`).

    bucket-<i>.safetensors   latents (rows, C, T, h, w) · rows (clips, 2): a clip's own row, and its mirror image's (the same one
                             where it has none)
    captions.safetensors     vectors (tokens + 1, Dc) of all captions, one after the other at their true lengths, then one of zeros ·
                             offsets (captions + 1,) · caption_of_<i> (clips,): a clip's caption, for each bucket
    captions.json            the captions, each once
    cache.json               what it was made of, and the size of every file: written last
    the encoders' files      as a checkpoint holds them

Latents are kept in fp32, or in fp16 where the autoencoder computes in a half type: what it rounds away is not there to be kept. Token
vectors likewise, but in bf16, whose range T5 needs.

With `data.horizontal_flip` each clip that may be mirrored (`sides`) is encoded twice, its pixels mirrored for the second: the mirror image
of a latent is not the latent of the mirror image.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from opensora import encoders
from opensora.config import Bucket, StageConfig
from opensora.data.buckets import sizes
from opensora.data.manifest import DataManifest
from opensora.data.shard import AGAIN, Shard, Writer, writing
from opensora.data.sides import names_a_side
from opensora.data.source import Clips, none_usable, open_clips, read_all
from opensora.errors import ConfigError, DataError, DiskFull, ParentError

INDEX = "cache.json"
CAPTIONS = "captions.json"
VECTORS = "captions.safetensors"
VERSION = 4
"""Raised whenever the same inputs would be encoded differently."""
CAPTIONS_AT_ONCE = 256

Progress = Callable[[int, int], None]
"""(clips encoded since the last call, clips of all buckets, readable or not)"""

log = logging.getLogger(__name__)


def latents_file(bucket: int) -> str:
    return f"bucket-{bucket}.safetensors"


@dataclass(frozen=True)
class Part:
    """The clips of one bucket, encoded."""

    shard: Shard
    caption_of: Tensor
    """(clips,)"""

    @property
    def latents(self) -> Tensor:
        """(rows, C, T, h, w), mapped: read, never written."""
        return self.shard.large

    @property
    def rows(self) -> Tensor:
        """(clips, 2): of the clip itself, of its mirror image."""
        return self.shard.small["rows"]

    def __len__(self) -> int:
        """Clips."""
        return len(self.rows)


@dataclass(frozen=True)
class Prepared:
    """A stage's clips, encoded."""

    directory: Path
    """Holds the encoders' files too, as a checkpoint does."""
    digest: str
    buckets: tuple[Bucket, ...]
    """The stage's."""
    parts: tuple[Part, ...]
    """Of each bucket; some may be empty, never all."""
    text_shard: Shard
    mirrored: bool
    """Whether clips are mirrored at random."""
    skipped: Mapping[str, str]
    """Each clip that could not be used → the reason."""
    clips: str
    """Digest over the clips that can be used, by bucket and caption in their order, and the names of the others: equal where a position in
    the stream means the same clips. `digest` is of the bits, which two machines may round differently."""

    def __len__(self) -> int:
        """Clips of all buckets."""
        return sum(map(len, self.parts))

    @property
    def vectors(self) -> Tensor:
        """(tokens + 1, Dc) of all captions, mapped; the last one is zero, for padding."""
        return self.text_shard.large

    @property
    def offsets(self) -> Tensor:
        """(captions + 1,): caption i's tokens are rows offsets[i]..offsets[i+1]−1 of `vectors`."""
        return self.text_shard.small["offsets"]

    @cached_property
    def captions(self) -> tuple[str, ...]:
        """Different captions; read when asked for, since training never asks."""
        return tuple(json.loads((self.directory / CAPTIONS).read_text()))

    @cached_property
    def _encoders(self) -> tuple[encoders.Autoencoder, encoders.TextEncoder]:
        return encoders.read(self.directory)

    @property
    def autoencoder(self) -> encoders.Autoencoder:
        """Loaded when asked for: training itself needs none."""
        return self._encoders[0]

    @property
    def text(self) -> encoders.TextEncoder:
        """Loaded when asked for."""
        return self._encoders[1]

    @classmethod
    def open(cls, directory: Path, stage: StageConfig) -> Prepared:
        """Map the stage's cache, which `prepare` returned.

        Raises:
            DataError: where a file is missing or not whole.
        """
        index = directory / INDEX
        try:
            told = json.loads(index.read_bytes())
            files: dict[str, int] = told["files"]
            digest, skipped, mirrored, clips = told["digest"], told["skipped"], told["mirrored"], told["clips"]
        except OSError as error:
            raise DataError(f"{index}: {error.strerror}; the latent cache is not whole. {AGAIN}") from error
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{index}: not an index of a latent cache ({error}). {AGAIN}") from error
        for name, size in files.items():
            try:
                found = (directory / name).stat().st_size
            except OSError as error:
                raise DataError(f"{directory / name}: {error.strerror}; the latent cache has {size} bytes there. {AGAIN}") from error
            if found != size:
                raise DataError(f"{directory / name}: {found} bytes, the latent cache has {size} there. {AGAIN}")
        text = Shard(directory / VECTORS, "vectors")
        parts = tuple(
            Part(Shard(directory / latents_file(bucket), "latents"), text.small[f"caption_of_{bucket}"])
            for bucket in range(len(stage.buckets))
        )
        for part, bucket in zip(parts, stage.buckets, strict=True):
            if part.latents.shape[1:] != stage.latent_shape_of(bucket):
                raise DataError(
                    f"{directory}: latents of {tuple(part.latents.shape[1:])}, the stage's are {stage.latent_shape_of(bucket)}. {AGAIN}"
                )
        return cls(directory, digest, stage.buckets, parts, text, mirrored, skipped, clips)

    def check(self, bucket: int) -> None:
        """Raises DataError, where a file of this bucket's batches was cut since it was mapped."""
        self.parts[bucket].shard.check()
        self.text_shard.check()


def prepare(
    stage: StageConfig,
    cache: Path,
    carried: Path | None = None,
    *,
    progress: Progress | None = None,
    recorded: DataManifest | None = None,
) -> Path:
    """Directory of the stage's encoded clips under `cache`; made if it is not there. One rank calls this, every rank opens the result.

    `carried`: the checkpoint that this run starts from (resumed from, or the parent's), whose encoders are used; none: they are made here.
    `progress` hears of clips as they are encoded, and of none where the cache is there already.
    `recorded`: the data as the launch found it. Then a cache of the same contents serves wherever the files lie and whatever their dates
    are; one that was made before contents were recorded serves while the dates are those of then.
    Idempotent: the same inputs give the same directory. A cache that is not whole is made again. The stage's own prompts are checked
    against the vocabulary.

    Raises:
        ConfigError: for data or encoders that cannot be used.
        ParentError: for a carried checkpoint that is not whole.
        DataError: for a cache that is not whole and cannot be made again, and for data that is not what was recorded.
        DiskFull: where the cache cannot be written.
    """
    if stage.evaluate is not None:
        from opensora.data.digits import canvas  # scikit-learn, which clips of a folder do not need

        canvas(stage.data, stage.evaluate.frames)  # what cannot be judged is said now, not after the training
    clips = open_clips(stage.data, stage.seed, recorded)
    inputs, taken = _inputs(stage, clips.digest), _identity(stage, carried)
    broken = ""
    directory = _find(cache, inputs, taken)
    if directory is None and recorded is not None:
        directory = _find(cache, _inputs(stage, clips.dated), taken, dated=True)
    if directory is not None:
        try:
            prepared = Prepared.open(directory, stage)
        except DataError as error:
            broken = str(error).removesuffix(f" {AGAIN}")
            log.warning("%s It is built again now", broken)
        else:
            if stage.text.kind == "words":
                prepared.text.encode(stage.prompts)
            return directory
    _sweep(cache)
    origin = {"inputs": inputs, "taken": taken} | ({"content": recorded.digest} if recorded is not None else {})
    partial = cache / f".{socket.gethostname()}.{os.getpid()}.partial"
    with writing(cache):
        partial.mkdir(parents=True)
    try:
        digest = _build(stage, clips, carried, partial, origin, progress)
        return _publish(partial, cache / digest[:16], stage)
    except ConfigError as error:
        if not broken:
            raise
        raise DataError(f"{broken} It cannot be built again: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _sweep(cache: Path) -> None:
    """Remove what killed builders left: those of this machine whose processes are gone, or whose number this one has now."""
    for left in cache.glob(f".{socket.gethostname()}.*.partial"):
        process = int(left.name.split(".")[-2])
        if process == os.getpid() or not Path(f"/proc/{process}").exists():
            shutil.rmtree(left, ignore_errors=True)


def _inputs(stage: StageConfig, clips: str) -> str:
    """Digest over what the cache is made of, but for the encoders' weights; cheap, so that a resume decodes nothing. Prompts are no part:
    whoever asks for another clip at the end of a stage need not encode the others again. `clips`: their digest."""
    drawn = stage.autoencoder.kind == "kl" and stage.autoencoder.posterior == "sample"
    made_of = {
        "version": VERSION,
        "clips": clips,
        "sizes": sizes(stage.data),
        "horizontal_flip": stage.data.horizontal_flip,
        "autoencoder": stage.autoencoder.model_dump(mode="json", exclude={"micro_batch"}),
        "text": stage.text.model_dump(mode="json"),
        "channels": stage.model.latent_channels,
        "caption": [stage.model.caption_width, stage.model.caption_tokens],
        "seed": stage.seed if drawn else None,
    }
    return hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()


def _identity(stage: StageConfig, carried: Path | None) -> str:
    """Digest over the encoders: published ones, and the files of carried ones. Others are made from the clips, which have a digest."""
    made_of: dict[str, str] = encoders.digests(stage)
    if carried is not None:
        for name, embedded in ((encoders.AUTOENCODER_FILE, "kl" not in made_of), (encoders.TEXT_FILE, "t5" not in made_of)):
            try:
                content = (carried / name).read_bytes() if embedded else b""
            except OSError as error:
                raise ParentError(f"{carried / name}: {error.strerror}. Take the checkpoint from the store again") from error
            made_of[name] = hashlib.sha256(content).hexdigest()
    return hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()


def _find(cache: Path, inputs: str, taken: str, *, dated: bool = False) -> Path | None:
    """A cache of these inputs, made with the encoders that are taken along (none: with those made from the clips), or one whose own
    encoders these are: a run that resumes brings along what its first attempt made."""
    for index in sorted(cache.glob(f"[!.]*/{INDEX}")):
        try:
            told: Mapping[str, Any] = json.loads(index.read_bytes())
            found, used, made = told["inputs"], told["taken"], told["made"]
        except (OSError, ValueError, KeyError, TypeError):
            continue  # another one is made, and takes its place
        if found == inputs and (used == taken or made == taken) and not (dated and "content" in told):
            return index.parent
    return None


def _build(
    stage: StageConfig, clips: Clips, carried: Path | None, directory: Path, origin: Mapping[str, str], progress: Progress | None
) -> str:
    """Everything, into `directory`; the digest over inputs and encoders."""
    autoencoder, text = encoders.build(stage, clips, carried)
    text.encode(stage.prompts)  # an unknown word is said now, not after the training
    captions = [_write_bucket(stage, clips, autoencoder, bucket, directory, progress) for bucket in range(len(stage.buckets))]
    if not any(captions):
        raise none_usable(clips)
    _write_captions(stage, text, captions, directory, progress)
    try:
        autoencoder.save(directory)
        text.save(directory)
    except (OSError, SafetensorError) as error:  # safetensors reports a full disk as its own error
        raise DiskFull(f"{directory}: the latent cache cannot be written ({error}). Make room, or choose another place") from error
    made = _identity(stage, directory)
    digest = hashlib.sha256(json.dumps([origin["inputs"], made]).encode()).hexdigest()
    files = {str(path.relative_to(directory)): path.stat().st_size for path in sorted(directory.rglob("*")) if path.is_file()}
    told = {
        **origin,
        "made": made,
        "digest": digest,
        "files": files,
        "mirrored": stage.data.horizontal_flip,
        "skipped": dict(clips.skipped),
        "clips": hashlib.sha256(json.dumps([captions, sorted(clips.skipped)]).encode()).hexdigest(),
    }
    with writing(directory):
        (directory / INDEX).write_text(json.dumps(told, sort_keys=True))
    return digest


def _write_bucket(
    stage: StageConfig, clips: Clips, autoencoder: encoders.Autoencoder, bucket: int, directory: Path, progress: Progress | None
) -> list[str]:
    """One bucket's latents; the captions of its clips."""
    half = stage.autoencoder.kind == "kl" and stage.autoencoder.dtype != "fp32"
    shape, dtype = stage.latent_shape_of(stage.buckets[bucket]), torch.float16 if half else torch.float32
    rows: list[tuple[int, int]] = []
    captions: list[str] = []
    with Writer(directory / latents_file(bucket), "latents", shape, dtype) as writer:
        for frames, indices in read_all(clips, bucket):
            own, said = range(writer.rows, writer.rows + len(indices)), [clips.captions[index] for index in indices]
            writer.append(encoders.encode_clips(autoencoder, frames, _draws(stage.seed, indices)))
            mirror = dict(enumerate(own))
            free = [place for place, caption in enumerate(said) if stage.data.horizontal_flip and not names_a_side(caption)]
            if free:
                mirror |= {place: writer.rows + number for number, place in enumerate(free)}
                draws = _draws(stage.seed, [indices[place] for place in free])
                writer.append(encoders.encode_clips(autoencoder, frames[free].flip(3), draws))
            rows += zip(own, mirror.values(), strict=True)
            captions += said
            if progress is not None:
                progress(len(indices), len(clips))
        writer.finish({"rows": torch.tensor(rows, dtype=torch.int64).view(-1, 2)})
    return captions


def _write_captions(
    stage: StageConfig, text: encoders.TextEncoder, captions: Sequence[Sequence[str]], directory: Path, progress: Progress | None
) -> None:
    """`captions`: of each bucket's clips."""
    different = sorted({caption for each in captions for caption in each})
    number = {caption: index for index, caption in enumerate(different)}
    half = stage.text.kind == "t5" and stage.text.dtype != "fp32"
    offsets = [0]
    with Writer(directory / VECTORS, "vectors", (stage.model.caption_width,), torch.bfloat16 if half else torch.float32) as writer:
        for start in range(0, len(different), CAPTIONS_AT_ONCE):
            if progress is not None:
                progress(0, sum(map(len, captions)))  # no clip, but a sign of life
            for vectors in text.encode(different[start : start + CAPTIONS_AT_ONCE]):
                writer.append(vectors)
                offsets.append(writer.rows)
        writer.append(torch.zeros(1, stage.model.caption_width))
        of_clips = {f"caption_of_{bucket}": torch.tensor([number[caption] for caption in each]) for bucket, each in enumerate(captions)}
        writer.finish({"offsets": torch.tensor(offsets), **{name: each.long() for name, each in of_clips.items()}})
    with writing(directory):
        (directory / CAPTIONS).write_text(json.dumps(different))


def _draws(seed: int, indices: Sequence[int]) -> list[torch.Generator]:
    """What the autoencoder draws clips' latents with: a function of (seed, clip), whatever else is encoded beside it."""
    digests = [hashlib.sha256(f"posterior/{seed}/{index}".encode()).digest() for index in indices]
    return [torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1) for digest in digests]


def _publish(partial: Path, directory: Path, stage: StageConfig) -> Path:
    if directory.exists():
        try:
            Prepared.open(directory, stage)
        except DataError:
            with writing(directory):
                shutil.rmtree(directory)
        else:
            return directory  # another run built the same cache meanwhile; its bits are as good
    with writing(directory):
        try:
            partial.rename(directory)
        except OSError:
            if not directory.exists():
                raise
            Prepared.open(directory, stage)
    return directory
