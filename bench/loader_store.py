"""The loader's batches from latents in an object store (a versitygw of its own) against the same from a disk, in CPU-seconds.

The latents of bench/loader.py (4 x 16 x 32 x 32, captions of 12 to 40 tokens of 4096 channels, fp32) lie beside their clips in S3, as
`osctl prepare` leaves them. A round is an epoch in batches of 8, read ahead as a training reads, once from each of:

    disk       mapped files, in the page cache
    fits       the store; the local space holds all of it, and an epoch has gone by
    first      the store; nothing is here yet
    half       the store; the local space holds half of it, and several epochs have gone by

Fetching runs in threads of the same process and is counted: requests, checksums, writing. So `first` and `half` say what each fetched
clip costs, and `fits` what remains of the disk's speed once a clip is here. The peer of all is `disk`. Floor 80% and goal 95% for `fits`;
`first` and `half` are told beside it, with the bytes that were fetched for each byte that the batches had.

What a training feels of it is another measure: it asks for a batch, computes a step, asks for the next. So an epoch is walked with a pause
for each step, from the disk and from a store that answers 30 ms late (bench/far_store.py), and wall times are compared. A step is what
`osctl plan -f open-sora-1.0` says of its second stage, batches of 8 on a GPU at 40% MFU: 80,000 steps in 7 h 41 min are 346 ms each.
The first batch of all, which nobody could ask for before, counts with its epoch and is told by itself, too. Floor 80% and goal 95%.

    OMP_NUM_THREADS=1 .venv/bin/python bench/loader_store.py
"""

from __future__ import annotations

import hashlib
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import fsspec
import harness
import torch
from conftest import _start as start_s3
from harness import Measured, Row
from loader import BATCH, stage, write_clips

from opensora.config import FolderSource, StageConfig
from opensora.dataset.manifest import DataManifest
from opensora.dataset.manifest import Row as Clip
from opensora.latents import beside
from opensora.latents.cache import prepare
from opensora.latents.loader import Ahead, Loader
from opensora.latents.prepared import Prepared
from opensora.latents.streamed import StreamedShard

ROOT = Path(__file__).resolve().parent.parent
STEP_S = 0.346
FAR_MS = 30


def recorded(folder: Path) -> DataManifest:
    rows = [line.split(",") for line in (folder / "captions.csv").read_text().splitlines()[1:]]
    found = [(path, text, (folder / path).read_bytes()) for path, text in rows]
    return DataManifest(tuple(Clip(path, text, len(data), hashlib.sha256(data).hexdigest()) for path, text, data in found))


def epochs(prepared: Prepared, epoch_clips: int, step_s: float = 0.0) -> Callable[[], None]:
    """Reads the next epoch, with a pause of so long after each batch."""
    loader = Ahead(Loader(prepared, seed=0))
    seen = loader.start

    def work() -> None:
        nonlocal seen
        for _ in range(epoch_clips // BATCH):
            loader.batch(seen)
            seen = loader.after(seen)
            if step_s:
                time.sleep(step_s)

    return work


def measure(quick: bool) -> Measured:
    torch.set_num_threads(1)
    count, frames, pixels, width, words = (16, 4, 64, 64, (2, 5)) if quick else (96, 16, 256, 4096, (12, 40))
    rounds = 1 if quick else 6
    found = subprocess.run([ROOT / "scripts" / "build-versitygw"], capture_output=True, text=True, check=False)
    if found.returncode:
        return [], {"skipped": "no object store: scripts/build-versitygw failed"}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        process, server = start_s3(Path(found.stdout.strip()), folder, [])
        try:
            os.environ.update(server.env, AWS_ENDPOINT_URL_S3=server.endpoint)
            videos = server.root / server.bucket / "set"
            videos.mkdir()
            write_clips(videos, count, frames, *((64, 96) if quick else (272, 480)), words)
            on_disk, manifest = stage(videos, frames, pixels, width), recorded(videos)
            in_store = _at(on_disk, server.url("set"))
            made = prepare(on_disk, videos / "latents", recorded=manifest)
            size = sum(path.stat().st_size for path in made.glob("*.safetensors")) + (1 << 20) * quick  # few bytes fill no block
            cold, fetched = iter(range(1000)), counting()

            def opened(of: StageConfig, cache: str, room: float = 1e9) -> Prepared:
                os.environ[beside.ROOM] = f"{room / 1e9:.9f}"
                return Prepared.open(prepare(of, folder / cache, recorded=manifest), of)

            half, disk = opened(in_store, "half", size if quick else size / 2), opened(on_disk, "none")
            ways = {
                "disk": epochs(disk, count),
                "fits": epochs(opened(in_store, "fits"), count),
                "half": epochs(half, count),
                "first": lambda: epochs(opened(in_store, f"first-{next(cold)}"), count)(),
            }
            for _ in range(1 if quick else 3):
                ways["half"]()
            fetched.clear()
            began = time.monotonic()
            seconds = harness.interleaved(ways, rounds)
            wall, bytes_of = time.monotonic() - began, {name: fetched[name] // (rounds + 1) for name in ("first", "half")}
            with far(server.endpoint) as endpoint:
                os.environ["AWS_ENDPOINT_URL_S3"] = endpoint
                in_far = _at(on_disk, server.url("set/"))
                fsspec.get_filesystem_class("s3").clear_instance_cache()
                half = opened(in_far, "far-half", size if quick else size / 2)
                step_s = 0.01 if quick else STEP_S
                felt = paced(step_s, disk, half, lambda: opened(in_far, f"far-{next(cold)}"), count, 1 if quick else 3)
        finally:
            process.terminate()
            process.wait()
    share = {way: 100 * seconds["disk"] / took for way, took in seconds.items()}
    rows = [Row("loader, cached latents from S3 that fit the local space: of the disk's speed", share["fits"], "%", 80, 95)]
    for way, name in (("first", "first epoch from S3"), ("half", "twice as much in S3 as fits")):
        said = f"loader, {name}, {FAR_MS} ms away, a batch each {1000 * step_s:.0f} ms: of the disk's speed"
        rows.append(Row(said, 100 * felt["disk"] / felt[way], "%", 80, 95))
    cpu_ms = 1000 * (seconds["first"] - seconds["disk"]) / (size / 1e6)
    rows += [
        Row(f"loader, first batch of all from S3, {FAR_MS} ms away", 1000 * felt["first batch"], "ms", None, None, "less"),
        Row("loader, first epoch from S3, nothing but loading: of the disk's speed in CPU-seconds", share["first"], "%"),
        Row("loader, twice as much in S3 as fits, nothing but loading: of the disk's speed in CPU-seconds", share["half"], "%"),
        Row("loader, first epoch from S3: fetched a byte of the batches", bytes_of["first"] / size, "bytes", None, None, "less"),
        Row("loader, twice as much in S3 as fits: fetched a byte of the batches", bytes_of["half"] / size, "bytes", None, None, "less"),
        Row("loader, first epoch from S3: CPU of each fetched MB", cpu_ms, "ms", None, None, "less"),
    ]  # fmt: skip
    raw = {
        "cpu_seconds": seconds,
        "bytes": size,
        "fetched": bytes_of,
        "clips": count,
        "rounds": rounds,
        "wall_s_of_all": wall,
        "step_s": step_s,
        "wall_s_of_epochs": felt,
        "libraries": harness.libraries("torch", "s3fs"),
    }
    return rows, raw


def paced(step_s: float, disk: Prepared, half: Prepared, cold: Callable[[], Prepared], clips: int, rounds: int) -> dict[str, float]:
    """Wall seconds of an epoch with a pause for each step, and of the first batch, median of the rounds. Opening is not part of it."""
    ways = {"disk": epochs(disk, clips, step_s), "half": epochs(half, clips, step_s)}
    ways["half"]()
    took: dict[str, list[float]] = {name: [] for name in ("disk", "half", "first", "first batch")}
    for _ in range(rounds):
        works = {**ways, "first": epochs(cold(), clips, step_s), "first batch": epochs(cold(), BATCH)}
        for name, work in works.items():
            began = time.monotonic()
            work()
            took[name].append(time.monotonic() - began)
    return {name: statistics.median(each) for name, each in took.items()}


@contextmanager
def far(endpoint: str) -> Iterator[str]:
    """The endpoint of the same store, FAR_MS away."""
    words = [sys.executable, str(ROOT / "bench" / "far_store.py"), endpoint.rpartition(":")[2], str(FAR_MS)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield f"http://127.0.0.1:{int(process.stdout.readline())}"
        finally:
            process.terminate()


def _at(of: StageConfig, address: str) -> StageConfig:
    return of.model_copy(update={"data": of.data.model_copy(update={"source": FolderSource(kind="folder", path=address)})})


def counting() -> Counter[str]:
    """From now on bytes that are fetched are counted, by the name of the local space up to its first hyphen."""
    fetched: Counter[str] = Counter()
    ranges, folder_of = StreamedShard._fetched, StreamedShard.__init__

    def opened(self: StreamedShard, directory: Path, *words: object, **more: object) -> None:
        folder_of(self, directory, *words, **more)  # type: ignore[arg-type]
        self.counted_as = directory.parent.name.partition("-")[0]  # type: ignore[attr-defined]

    def counted(self: StreamedShard, blocks: list[int], remote: object) -> dict[int, memoryview]:
        found: dict[int, memoryview] = ranges(self, blocks, remote)  # type: ignore[arg-type]
        fetched[self.counted_as] += sum(map(len, found.values()))  # type: ignore[attr-defined]
        return found

    StreamedShard.__init__ = opened  # type: ignore[assignment,method-assign]
    StreamedShard._fetched = counted  # type: ignore[assignment,method-assign]
    return fetched


def main() -> None:
    harness.run("loader_store", measure)


if __name__ == "__main__":
    main()
