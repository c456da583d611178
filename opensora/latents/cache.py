"""Each clip encoded once, so that a training step runs neither encoder.

Owns the latent cache: one directory per (data, encoders), complete or absent. One rank builds it, streaming to disk; every rank maps it.
Refuses to order clips (`loader`), to know how they are decoded (sources) and how a file is laid out (`shard`).

    bucket-<i>.safetensors   latents (rows, C, T, h, w) · rows (clips, 2): a clip's own row, and its mirror image's (the same one
                             where it has none)
    captions.safetensors     vectors (tokens + 1, Dc) of all captions, one after the other at their true lengths, then one of zeros ·
                             offsets (captions + 1,) · caption_of_<i> (clips,): a clip's caption, for each bucket
    NAME.digests             of each shard, so that it can be read from a store block by block (`shard`)
    captions.json            the captions, each once
    cache.json               what it was made of, what was left out of it and why, size and sha256 of every file, rows of a shard's block:
                             written last
    the encoders' files      as a checkpoint holds them

Latents are kept in fp32, or in fp16 where the autoencoder computes in a half type: what it rounds away is not there to be kept. Token
vectors likewise, but in bf16, whose range T5 needs.

With `data.horizontal_flip` each clip that may be mirrored (`mirroring`) is encoded twice, its pixels mirrored for the second: the mirror
image of a latent is not the latent of the mirror image.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import socket
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError

from opensora.config import StageConfig
from opensora.data.buckets import sizes
from opensora.data.mirroring import names_a_side
from opensora.data.source import Clips, none_usable, open_clips, read_all
from opensora.dataset.manifest import DataManifest
from opensora.dataset.words import VERSION as WORDS
from opensora.dataset.words import split_words
from opensora.encoders import protocol as encoders
from opensora.errors import ConfigError, DataError, DiskFull, ParentError
from opensora.latents.beside import find_beside
from opensora.latents.prepared import CAPTIONS, INDEX, VECTORS, Prepared, latents_file, serves
from opensora.latents.shard import AGAIN, Writer, writing
from opensora.latents.streamed import STREAM

VERSION = 4
"""Raised whenever the same inputs would be encoded differently."""
CAPTIONS_AT_ONCE = 256

Progress = Callable[[int, int], None]
"""(clips encoded since the last call, clips of all buckets, readable or not)"""

log = logging.getLogger(__name__)


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
    inputs, taken = _inputs(stage, clips, clips.digest), _identity(stage, carried)
    broken = ""
    directory = _made_before(stage, clips, cache, taken, recorded)
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
    partial = cache / f".{socket.gethostname()}.{os.getpid()}-{threading.get_native_id()}.partial"
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


def encoders_of(stage: StageConfig, clips: Clips, cache: Path, recorded: DataManifest | None) -> Path | None:
    """Directory with the encoders that an existing cache of these clips was made with. None: there is no cache, and so none are made.

    Raises as `prepare`.
    """
    return _made_before(stage, clips, cache, _identity(stage, None), recorded)


def _made_before(stage: StageConfig, clips: Clips, cache: Path, taken: str, recorded: DataManifest | None) -> Path | None:
    """Directory of the cache of these clips: under `cache`, or beside the clips. None: it is still to be made."""
    inputs = _inputs(stage, clips, clips.digest)
    directory = _find(cache, inputs, taken)
    if directory is None and recorded is not None:
        directory = find_beside(stage, inputs, taken, cache)
    if directory is None and recorded is not None:
        directory = _find(cache, _inputs(stage, clips, clips.dated), taken, dated=True)
    return directory


def _sweep(cache: Path) -> None:
    """Remove what killed builders left: those of this machine whose thread is gone, or has the number that this thread has now."""
    for left in cache.glob(f".{socket.gethostname()}.*.partial"):
        process, _, thread = left.name.split(".")[-2].partition("-")  # 0.1.0 wrote the process alone
        own = (process, thread or process) == (str(os.getpid()), str(threading.get_native_id()))
        if own or not Path(f"/proc/{process}/task/{thread or process}").exists():
            shutil.rmtree(left, ignore_errors=True)


def _inputs(stage: StageConfig, clips: Clips, digest: str) -> str:
    """Digest over what the cache is made of, but for the encoders' weights; cheap, so that a resume decodes nothing. Prompts are no part:
    whoever asks for another clip at the end of a stage need not encode the others again. `digest`: of the clips."""
    drawn = stage.autoencoder.kind == "kl" and stage.autoencoder.posterior == "sample"
    made_of = {
        "version": VERSION,
        "clips": digest,
        "sizes": sizes(stage.data),
        "horizontal_flip": stage.data.horizontal_flip,
        "autoencoder": stage.autoencoder.model_dump(mode="json", exclude={"micro_batch"}),
        "text": stage.text.model_dump(mode="json"),
        "channels": stage.model.latent_channels,
        "caption": [stage.model.caption_width, stage.model.caption_tokens],
        "seed": stage.seed if drawn else None,
    }
    if stage.text.kind == "words" and _splits_anew([*clips.captions, *clips.words]):
        made_of["words"] = WORDS  # a cache of 0.1.0 has other words; where the words are the same, it serves
    return hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()


def _splits_anew(captions: Sequence[str]) -> bool:
    """Whether these have other words than in the releases up to 0.1.0."""
    return any(not caption.isascii() and split_words(caption) != split_words(caption, 1) for caption in captions)


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
    """A cache of these inputs under `cache`, as `prepared.serves`. What is streamed from a store is found where it lies (`beside`)."""
    for index in sorted(cache.glob(f"[!.]*/{INDEX}")):
        try:
            told = json.loads(index.read_bytes())
        except (OSError, ValueError):
            continue  # another one is made, and takes its place
        if serves(told, inputs, taken, dated=dated) and not (index.parent / STREAM).exists():
            return index.parent
    return None


def _build(
    stage: StageConfig, clips: Clips, carried: Path | None, directory: Path, origin: Mapping[str, str], progress: Progress | None
) -> str:
    """Everything, into `directory`; the digest over inputs and encoders."""
    autoencoder, text = encoders.build(stage, clips, carried)
    text.encode(stage.prompts)  # an unknown word is said now, not after the training
    blocks: dict[str, int] = {}
    captions = [_write_bucket(stage, clips, autoencoder, bucket, directory, blocks, progress) for bucket in range(len(stage.buckets))]
    if not any(captions):
        raise none_usable(clips)
    cut = _write_captions(stage, text, captions, directory, blocks, progress)
    try:
        autoencoder.save(directory)
        text.save(directory)
    except (OSError, SafetensorError) as error:  # safetensors reports a full disk as its own error
        raise DiskFull(f"{directory}: the latent cache cannot be written ({error}). Make room, or choose another place") from error
    made = _identity(stage, directory)
    digest = hashlib.sha256(json.dumps([origin["inputs"], made]).encode()).hexdigest()
    paths = {str(path.relative_to(directory)): path for path in sorted(directory.rglob("*")) if path.is_file()}
    sha256 = {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in paths.items() if name not in blocks}
    told = {
        **origin,
        "made": made,
        "digest": digest,
        "files": {name: path.stat().st_size for name, path in paths.items()},
        "sha256": sha256,
        "blocks": blocks,
        "mirrored": stage.data.horizontal_flip,
        "skipped": dict(clips.skipped),
        "clips_named": len(clips),
        "captions_cut": cut,
        "remarks": list(clips.remarks),
        "clips": hashlib.sha256(json.dumps([captions, sorted(clips.skipped)]).encode()).hexdigest(),
    }
    with writing(directory):
        (directory / INDEX).write_text(json.dumps(told, sort_keys=True))
    return digest


def _write_bucket(
    stage: StageConfig,
    clips: Clips,
    autoencoder: encoders.Autoencoder,
    bucket: int,
    directory: Path,
    blocks: dict[str, int],
    progress: Progress | None,
) -> list[str]:
    """One bucket's latents; the captions of its clips. `blocks`: gets the rows of a block of the file."""
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
        blocks[latents_file(bucket)] = writer.block_rows
    return captions


def _write_captions(
    stage: StageConfig,
    text: encoders.TextEncoder,
    captions: Sequence[Sequence[str]],
    directory: Path,
    blocks: dict[str, int],
    progress: Progress | None,
) -> int:
    """`captions`: of each bucket's clips. Returns how many clips have one that is longer than what is kept of it."""
    clips_of = Counter(caption for each in captions for caption in each)
    different = sorted(clips_of)
    number = {caption: index for index, caption in enumerate(different)}
    cut = 0
    half = stage.text.kind == "t5" and stage.text.dtype != "fp32"
    offsets = [0]
    with Writer(directory / VECTORS, "vectors", (stage.model.caption_width,), torch.bfloat16 if half else torch.float32) as writer:
        for start in range(0, len(different), CAPTIONS_AT_ONCE):
            if progress is not None:
                progress(0, sum(map(len, captions)))  # no clip, but a sign of life
            some = different[start : start + CAPTIONS_AT_ONCE]
            for vectors in text.encode(some):
                writer.append(vectors)
                offsets.append(writer.rows)
            cut += sum(clips_of[caption] for caption, is_cut in zip(some, text.cut(some), strict=True) if is_cut)
        writer.append(torch.zeros(1, stage.model.caption_width))
        of_clips = {f"caption_of_{bucket}": torch.tensor([number[caption] for caption in each]) for bucket, each in enumerate(captions)}
        writer.finish({"offsets": torch.tensor(offsets), **{name: each.long() for name, each in of_clips.items()}})
        blocks[VECTORS] = writer.block_rows
    with writing(directory):
        (directory / CAPTIONS).write_text(json.dumps(different))
    return cut


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
