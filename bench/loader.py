"""Clips a second and core from cached latents: our loader, WebDataset on the same latents, and decoding the videos in the training loop.

Real mp4 files (16 frames, 480x272, h264) with captions of 12 to 40 words go through `opensora.latents.cache.prepare` with the embedded
encoders: latents 4 x 16 x 32 x 32 and token vectors of 4096 channels at their true length, the sizes of 16x256x256 with T5 (in fp32, which
the embedded encoders compute in). WebDataset reads the same arrays from tar shards, as `.npy` and in its own tensor format, shuffles and
batches them; the faster of the two is the peer. Decoding online is PyAV, frames scaled to 256x256, captions looked up. All give the same
batches: latents (or uint8 frames), padded vectors, mask. Files are in the page cache.
Floors 2x WebDataset and 20x decoding, goal 5x WebDataset.

    OMP_NUM_THREADS=1 .venv/bin/python bench/loader.py
"""

from __future__ import annotations

import random
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import av
import harness
import numpy as np
import torch
import yaml
from harness import Measured, Row
from torch import Tensor

from opensora.config import StageConfig
from opensora.evaluation.video_files import write_mp4
from opensora.latents.cache import prepare
from opensora.latents.loader import Loader
from opensora.latents.prepared import Prepared

BATCH = 8
WORDS = (
    "red",
    "blue",
    "small",
    "wide",
    "cloud",
    "river",
    "runs",
    "under",
    "slow",
    "light",
    "over",
    "quiet",
    "hill",
    "walks",
    "tree",
    "rain",
)


def write_clips(folder: Path, count: int, frames: int, rows: int, columns: int, words: tuple[int, int]) -> None:
    """Smooth moving colours, `words` a caption; captions.csv beside them."""
    draw, generator = random.Random(0), torch.Generator().manual_seed(0)
    lines = ["path,text"]
    for number in range(count):
        coarse = torch.rand(1, 3, frames // 2, rows // 16, columns // 16, generator=generator)
        clip = torch.nn.functional.interpolate(coarse, (frames, rows, columns), mode="trilinear")[0].permute(1, 2, 3, 0)
        write_mp4(folder / f"{number}.mp4", (clip * 255).byte().contiguous())
        lines.append(f"{number}.mp4,{' '.join(draw.choices(WORDS, k=draw.randint(*words)))}")
    (folder / "captions.csv").write_text("\n".join(lines) + "\n")


def stage(folder: Path, frames: int, pixels: int, width: int) -> StageConfig:
    content = f"""
    model: {{depth: 1, width: 64, heads: 1, latent_channels: 4, caption_width: {width}, caption_tokens: 120}}
    objective: {{kind: flow}}
    data: {{source: {{kind: folder, path: {folder}}}, frames: {frames}, height: {pixels}, width: {pixels}}}
    autoencoder: {{kind: patch, factor: 8}}
    text: {{kind: words}}
    sampling: {{method: euler}}
    steps: 1
    batch_size: {BATCH}
    checkpoint: {{every_steps: 1}}
    """
    return StageConfig.model_validate(yaml.safe_load(content))


def padded(vectors: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Captions of different lengths as (B, L, D) with zeros, and which are tokens."""
    whole = torch.nn.utils.rnn.pad_sequence(vectors, batch_first=True)
    return whole, torch.arange(whole.shape[1]) < torch.tensor([len(each) for each in vectors])[:, None]


def write_shards(folder: Path, prepared: Prepared, kind: str) -> list[str]:
    """Tar files of 16 clips each, of `npy` or of WebDataset's `ten`."""
    import webdataset as wds

    part, shards = prepared.parts[0], []
    for first in range(0, len(part), 16):
        shards.append(str(folder / f"{kind}-{first:05d}.tar"))
        with wds.TarWriter(shards[-1]) as sink:
            for clip in range(first, min(first + 16, len(part))):
                caption = int(part.caption_of[clip])
                latents = part.latents[int(part.rows[clip, 0])].numpy()
                vectors = prepared.vectors[int(prepared.offsets[caption]) : int(prepared.offsets[caption + 1])].numpy()
                arrays = {"latents": latents, "text": vectors}
                sink.write(
                    {"__key__": f"{clip:06d}"} | {f"{name}.{kind}": array if kind == "npy" else [array] for name, array in arrays.items()}
                )
    return shards


def webdataset(shards: list[str], kind: str) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Endless batches."""
    import webdataset as wds

    def collate(samples: list[tuple[Any, Any]]) -> tuple[Tensor, Tensor, Tensor]:
        latents, vectors = ([part if kind == "npy" else part[0] for part in parts] for parts in zip(*samples, strict=True))
        longest = max(map(len, vectors))
        text = np.zeros((len(vectors), longest, vectors[0].shape[1]), np.float32)
        for row, each in zip(text, vectors, strict=True):
            row[: len(each)] = each
        mask = torch.arange(longest) < torch.tensor([len(each) for each in vectors])[:, None]
        return torch.from_numpy(np.stack(latents)), torch.from_numpy(text), mask

    reader = wds.WebDataset(shards, shardshuffle=len(shards), seed=0).shuffle(64, initial=32).decode()
    return iter(reader.to_tuple(f"latents.{kind}", f"text.{kind}").batched(BATCH, collation_fn=collate).repeat())


def decoding(folder: Path, prepared: Prepared, frames: int, pixels: int) -> Callable[[], object]:
    """The next batch, its videos decoded and scaled now."""
    number = 0
    count = len(prepared)

    def batch() -> tuple[Tensor, Tensor, Tensor]:
        nonlocal number
        clips, vectors = [], []
        for clip in range(number, number + BATCH):
            with av.open(str(folder / f"{clip % count}.mp4")) as container:
                decoded = [frame.reformat(pixels, pixels, "rgb24").to_ndarray() for frame in container.decode(video=0)]
            clips.append(torch.from_numpy(np.stack(decoded[:frames])))
            caption = int(prepared.parts[0].caption_of[clip % count])
            vectors.append(prepared.vectors[int(prepared.offsets[caption]) : int(prepared.offsets[caption + 1])])
        number += BATCH
        return torch.stack(clips), *padded(vectors)

    return batch


def cached(prepared: Prepared) -> Callable[[], object]:
    loader = Loader(prepared, seed=0)
    seen = loader.start

    def batch() -> object:
        nonlocal seen
        given, seen = loader.batch(seen), loader.after(seen)
        return given

    return batch


def measure(quick: bool) -> Measured:
    torch.set_num_threads(1)
    count, frames, pixels, width, words = (16, 4, 64, 64, (2, 5)) if quick else (32, 16, 256, 4096, (12, 40))
    batches, rounds = (1, 1) if quick else (16, 8)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        videos = folder / "videos"
        videos.mkdir()
        write_clips(videos, count, frames, *((64, 96) if quick else (272, 480)), words)
        made_for = stage(videos, frames, pixels, width)
        prepared = Prepared.open(prepare(made_for, folder / "cache"), made_for)
        kinds = {kind: webdataset(write_shards(folder, prepared, kind), kind) for kind in ("npy", "ten")}
        ours, online = cached(prepared), decoding(videos, prepared, frames, pixels)

        def several(one: Callable[[], object], number: int) -> Callable[[], None]:
            def work() -> None:
                for _ in range(number):
                    one()

            return work

        ways = {f"webdataset {kind}": several(lambda reader=reader: next(reader), batches) for kind, reader in kinds.items()}
        seconds = harness.interleaved({"ours": several(ours, batches), **ways, "decoding": several(online, 1)}, rounds)
        bytes_a_clip = {
            "latents": int(prepared.parts[0].latents[0].nbytes),
            "text": int(prepared.vectors.nbytes / len(prepared.captions)),
        }
    clips = {name: BATCH * (1 if name == "decoding" else batches) / took for name, took in seconds.items()}
    peer = max(clips[f"webdataset {kind}"] for kind in kinds)
    rows = [
        Row("loader, cached latents: against WebDataset", clips["ours"] / peer, "x", 2, 5),
        Row("loader, cached latents: against decoding online", clips["ours"] / clips["decoding"], "x", 20),
        Row("loader, cached latents: clips a second and core", clips["ours"], "/s"),
    ]
    raw = {
        "clips_a_second": clips,
        "bytes_a_clip": bytes_a_clip,
        "batch": BATCH,
        "libraries": harness.libraries("torch", "webdataset", "av"),
    }
    return rows, raw


def main() -> None:
    harness.run("loader", measure)


if __name__ == "__main__":
    main()
