"""A stage's encoded clips, opened for reading: mapped where they lie on a disk, streamed where they lie in a store.

Owns the names of a cache's files and the look whether all of them are there and whole. Refuses to make a cache (`cache`), to fetch
(`streamed`) and to order clips (`loader`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from opensora.config import Bucket, StageConfig
from opensora.dataset.usage import Usage, bounded, grouped
from opensora.encoders import protocol as encoders
from opensora.errors import DataError
from opensora.latents.shard import AGAIN, Shard
from opensora.latents.streamed import STREAM, Stream

INDEX = "cache.json"
CAPTIONS = "captions.json"
VECTORS = "captions.safetensors"


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
        """(rows, C, T, h, w), mapped: read, never written. Of a cache on a disk alone."""
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
    usage: Usage
    """The same counted, and what else is to be said of the data. Equal whenever this cache is opened."""
    clips: str
    """Digest over the clips that can be used, by bucket and caption in their order, and the names of the others: equal where a position in
    the stream means the same clips. `digest` is of the bits, which two machines may round differently."""
    stream: Stream | None = field(default=None, compare=False)
    """Fetches what batches need; None: all of it lies on a disk of this machine."""

    def __len__(self) -> int:
        """Clips of all buckets."""
        return sum(map(len, self.parts))

    @property
    def vectors(self) -> Tensor:
        """(tokens + 1, Dc) of all captions, mapped; the last one is zero, for padding. Of a cache on a disk alone."""
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
        stream = Stream.open(directory) if (directory / STREAM).exists() else None
        for name, size in files.items():
            if stream is not None and name in stream.shards:
                continue
            try:
                found = (directory / name).stat().st_size
            except OSError as error:
                raise DataError(f"{directory / name}: {error.strerror}; the latent cache has {size} bytes there. {AGAIN}") from error
            if found != size:
                raise DataError(f"{directory / name}: {found} bytes, the latent cache has {size} there. {AGAIN}")

        def shard(name: str, tensor: str) -> Shard:
            return Shard(directory / name, tensor) if stream is None else stream.shard(name, tensor)

        text = shard(VECTORS, "vectors")
        parts = tuple(
            Part(shard(latents_file(bucket), "latents"), text.small[f"caption_of_{bucket}"]) for bucket in range(len(stage.buckets))
        )
        for part, bucket in zip(parts, stage.buckets, strict=True):
            if part.shard.shape[1:] != stage.latent_shape_of(bucket):
                raise DataError(f"{directory}: latents of {part.shard.shape[1:]}, the stage's are {stage.latent_shape_of(bucket)}. {AGAIN}")
        usage = _usage(told, sum(map(len, parts)), stage)
        return cls(directory, digest, stage.buckets, parts, text, mirrored, skipped, usage, clips, stream)

    def refuse_if_too_few(self, stage: StageConfig) -> None:
        """Raises DataError, where more clips are left out than the stage allows. What is encoded stays, for a stage that allows more."""
        refusal = self.usage.refusal(stage.data.max_left_out)
        if refusal is not None:
            raise DataError(f"{refusal}; {self.directory / INDEX} names all of them")

    def check(self, bucket: int) -> None:
        """Raises DataError, where a file of this bucket's batches was cut since it was mapped."""
        self.parts[bucket].shard.check()
        self.text_shard.check()


def _usage(told: Mapping[str, Any], used: int, stage: StageConfig) -> Usage:
    """`told`: an index; those of older releases do not count captions, and have nothing to remark."""
    skipped: Mapping[str, str] = told["skipped"]
    clips = max(int(told.get("clips_named", used + len(skipped))), used)
    remarks = bounded([str(each) for each in told.get("remarks", ())])
    unit = "words" if stage.text.kind == "words" else "tokens"
    reasons = grouped(skipped, clips - used)
    return Usage(clips, used, reasons, told.get("captions_cut"), stage.model.caption_tokens, unit, remarks)


def serves(told: Any, inputs: str, taken: str, *, dated: bool = False) -> bool:
    """Whether a cache was made of these inputs, with the encoders that are taken along (none: with those made from the clips), or is one
    whose own encoders these are: a run that resumes brings along what its first attempt made.

    Args:
        told: what lies in its index, whatever that is.
        dated: `inputs` count dates; then a cache of recorded contents is none of theirs.
    """
    try:
        found, used, made = told["inputs"], told["taken"], told["made"]
        return bool(found == inputs and (used == taken or made == taken) and not (dated and "content" in told))
    except (KeyError, TypeError):
        return False
