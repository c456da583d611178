"""How a stage ends that cannot go on: each cause with its own class, step and rank, and a last checkpoint from which it goes on.

Real runs. What befalls them comes from outside: another content of the cache, less memory, a smaller disk, a shorter file.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gang
import pytest
import torch

from opensora import train
from opensora.checkpoint import reader as checkpoint
from opensora.config import StageConfig
from opensora.latents.cache import prepare
from opensora.latents.loader import Loader
from opensora.latents.prepared import Prepared
from opensora.training.run_directory import RunDirectory
from opensora.training.trainer import DrainRequest

Stages = Callable[..., StageConfig]
Runs = Callable[..., RunDirectory]

FORKED = str(Path(__file__).parent.parent / "forked_torchrun.py")
PATIENCE_S = 120.0
SHARD = "bucket-0.safetensors"


def in_process(run: RunDirectory, drain: DrainRequest | None = None) -> dict[str, Any]:
    """Run the stage as one rank in this process; its result."""
    train.run_reported(run, drain or DrainRequest())
    return result(run)


def result(run: RunDirectory) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((run.path / "result.json").read_text())
    return content


@contextmanager
def two_ranks(run: RunDirectory, **variables: str) -> Iterator[subprocess.Popen[bytes]]:
    """The stage in two processes. They must have come to an end by themselves when this is left."""
    with (run.path / "trainer.log").open("wb") as log:
        command = [sys.executable, FORKED, str(run.path), "2"]
        process = subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"} | variables, stdout=log, stderr=log)
    try:
        yield process
        process.wait(PATIENCE_S)
    finally:
        process.kill()
        process.wait()


def assert_goes_on(run: RunDirectory, stage: StageConfig, make_run: Runs, *, world: int = 1) -> RunDirectory:
    """The last checkpoint is whole, everything in it is finite, and another run of the stage takes the next step from it."""
    last = checkpoint.latest(run.checkpoints)
    assert last is not None
    reader = checkpoint.Reader(last)
    assert reader.record.world_size == world
    assert all(tensor.isfinite().all() for part in checkpoint.TENSORS for tensor in reader.part(part).values())
    again = make_run(stage.model_copy(update={"accumulate": world}), resume=last)  # one rank, the same global batch
    (again.path / "drain").touch()
    ended = in_process(again)
    assert (ended["status"], ended["step"]) == ("drained" if reader.record.step + 1 < stage.steps else "completed", reader.record.step + 1)
    return again


# ------------------------------------------------------------------------------------------------------------------
# Numbers
# ------------------------------------------------------------------------------------------------------------------


def spoil(run: RunDirectory, stage: StageConfig, steps: range, factor: float, *, rank: int = 0, world: int = 1) -> None:
    """Build the run's cache, and multiply the latents of the clips that this rank meets in these steps."""
    directory = prepare(stage, run.latents)
    prepared = Prepared.open(directory, stage)
    loader = Loader(prepared, seed=stage.seed, rank=rank, world=world)
    seen = loader.start
    part = prepared.parts[0]
    latents, begin = part.latents, _begin_of_latents(directory / SHARD)
    with (directory / SHARD).open("r+b") as file:
        for step in range(1, steps.stop):
            for row in part.rows[loader.batch(seen).index, 0].tolist() if step in steps else ():
                latent = latents[row] * factor
                file.seek(begin + row * latent.numel() * latent.element_size())
                file.write(latent.to(latents.dtype).numpy().tobytes())
            seen = loader.after(seen)


def _begin_of_latents(path: Path) -> int:
    """Of the tensor's bytes in a safetensors file."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        return 8 + length + int(json.loads(file.read(length))["latents"]["data_offsets"][0])


@pytest.mark.long
@pytest.mark.parametrize(("factor", "loss", "world"), [(float("nan"), "nan", 2), (1e19, "inf", 1)])
def test_a_loss_that_is_not_finite_ends_with_the_step_and_the_rank_that_saw_it(
    factor: float, loss: str, world: int, tiny_stage: Stages, make_run: Runs
) -> None:
    stage = tiny_stage(data={"source": {"kind": "digits", "clips": 64}}, steps=8, batch_size=2)
    run = make_run(stage)
    spoil(run, stage, range(6, 7), factor, rank=world - 1, world=world)
    if world == 1:
        in_process(run)
    else:
        for rank in gang.start(world, "-m", "opensora.train", str(run.path)):
            rank.communicate(PATIENCE_S)
    ended = result(run)
    assert (ended["status"], ended["class"], ended["rank"], ended["step"]) == ("failed", "nan", world - 1, 5)
    assert ended["reason"].startswith(f"step 6: loss {loss} ")
    assert [path.name for path in checkpoint.finished(run.checkpoints)] == [f"step-0000000{step}" for step in range(1, 6)]
    assert_goes_on(run, stage, make_run, world=world)


def test_a_loss_that_leaves_its_range_ends_as_a_spike_though_it_is_finite(tiny_stage: Stages, make_run: Runs) -> None:
    stage = tiny_stage(
        data={"source": {"kind": "digits", "clips": 64}}, steps=40, batch_size=1, loss_spike=50.0, checkpoint={"every_steps": 5}
    )
    run = make_run(stage)
    spoil(run, stage, range(31, 41), 100.0)
    ended = in_process(run)
    assert (ended["status"], ended["class"], ended["rank"], ended["step"]) == ("failed", "spike", 0, 32)
    assert ended["reason"].startswith("step 33: loss") and "50 times the median" in ended["reason"]
    assert checkpoint.step_of(checkpoint.finished(run.checkpoints)[-1]) == 30
    whole = make_run(stage)
    assert in_process(whole)["status"] == "completed", "as it is without the spoilt clips"
    again = make_run(stage, resume=checkpoint.directory(run.checkpoints, 30))
    assert in_process(again)["status"] == "completed"
    for name in ("model.safetensors", "ema.safetensors", "optimizer.safetensors"):
        ours, theirs = (checkpoint.directory(one.checkpoints, 40) / name for one in (again, whole))
        assert ours.read_bytes() == theirs.read_bytes(), f"{name}: what was saved before the spike is as if there had been none"


def test_a_spike_that_passes_ends_nothing(tiny_stage: Stages, make_run: Runs) -> None:
    stage = tiny_stage(
        data={"source": {"kind": "digits", "clips": 64}}, steps=36, batch_size=1, loss_spike=50.0, checkpoint={"every_steps": 36}
    )
    run = make_run(stage)
    spoil(run, stage, range(31, 33), 100.0)
    assert in_process(run)["status"] == "completed"
    losses = {
        line["step"]: line["loss"] for line in map(json.loads, (run.path / "metrics.jsonl").read_text().splitlines()) if "step" in line
    }
    assert min(losses[31], losses[32]) > 50 * sorted(losses.values())[18]


# ------------------------------------------------------------------------------------------------------------------
# The machine
# ------------------------------------------------------------------------------------------------------------------


def beat(run: RunDirectory, rank: int) -> dict[str, Any]:
    path = run.path / f"heartbeat-{rank}.json"
    return json.loads(path.read_text()) if path.exists() else {"phase": None, "step": 0}


def data_bytes(pid: int) -> int:
    """What RLIMIT_DATA counts."""
    (line,) = (line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmData"))
    return int(line.split()[1]) * 1024


@pytest.mark.long
def test_a_rank_without_memory_says_so(tiny_stage: Stages, make_run: Runs) -> None:
    """While it trains, one of two ranks is forbidden to grow beyond half of what a step takes and gives back."""
    stage = tiny_stage(
        data={"height": 32, "width": 32},
        steps=1_000_000,
        batch_size=32,
        checkpoint={"every_steps": 2, "keep_last": 2, "background": False},
    )
    run = make_run(stage)
    with two_ranks(run, MALLOC_MMAP_THRESHOLD_="65536") as process:  # so that what a step frees is given back, and asked for again
        while beat(run, 1)["step"] < 4:
            assert process.poll() is None, (run.path / "trainer.log").read_text()
            time.sleep(0.01)
        pid = beat(run, 1)["pid"]
        low = high = data_bytes(pid)
        began = time.monotonic()
        while high - low < 2 << 20 or time.monotonic() < began + 0.5:  # whole steps, with their highs and lows
            assert process.poll() is None and time.monotonic() < began + PATIENCE_S
            low, high = min(low, data_bytes(pid)), max(high, data_bytes(pid))
        limit = (low + high) // 2
        resource.prlimit(pid, resource.RLIMIT_DATA, (limit, limit))
    ended = result(run)
    assert (ended["status"], ended["class"], ended["rank"]) == ("failed", "oom", 1)
    assert ended["step"] >= 4 and "memory" in ended["reason"]
    assert_goes_on(run, stage, make_run, world=2)


ON_A_SMALL_DISK = """
set -e
mkdir "$2"
mount -t tmpfs -o size=$3 tmpfs "$2"
cp -a "$1"/. "$2"
"$4" -m opensora.train "$2" > "$1/trainer.log" 2>&1 || true
cp -a "$2"/. "$1"
"""


@pytest.mark.long
def test_a_full_disk_says_so_and_keeps_what_was_saved(
    tiny_stage: Stages, make_run: Runs, tmp_path: Path, require: Callable[[str, str], None]
) -> None:
    """A file system of its own, with room for a few checkpoints; not even result.json could grow on it."""
    stage = tiny_stage(steps=1_000_000, checkpoint={"every_steps": 1, "keep_last": 1_000_000})
    run, disk = make_run(stage), tmp_path / "disk"
    spaces = ["unshare", "--mount"] if os.geteuid() == 0 else ["unshare", "--user", "--map-root-user", "--mount"]
    if (probe := subprocess.run([*spaces, "true"], capture_output=True, text=True)).returncode or not shutil.which("mount"):
        require("namespaces", probe.stderr.strip())
    arguments = [*spaces, "sh", "-c", ON_A_SMALL_DISK, "sh", str(run.path), str(disk), "6m", sys.executable]
    subprocess.run(arguments, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=True, timeout=PATIENCE_S)
    ended = result(run)
    assert (ended["status"], ended["class"], ended["rank"]) == ("failed", "disk", 0), ended
    saved = [checkpoint.step_of(path) for path in checkpoint.finished(run.checkpoints)]
    assert saved == list(range(1, len(saved) + 1)) and len(saved) > 1
    assert saved[-1] <= ended["step"] <= saved[-1] + 2, "said at the next step"
    assert str(disk) in ended["reason"] and "No space left" in ended["reason"]
    for path in checkpoint.finished(run.checkpoints):
        checkpoint.Reader(path)
    assert_goes_on(run, stage, make_run)


class Between(DrainRequest):
    """Does something to the run after a step: a drain is asked for once in each."""

    def __init__(self, run: RunDirectory, step: int, deed: Callable[[], None]) -> None:
        self._run, self._step, self._deed = run, step, deed

    @property
    def made(self) -> bool:  # type: ignore[override]
        if self._run.step == self._step:
            self._deed()
        return False


@pytest.mark.long
@pytest.mark.parametrize("file", [SHARD, "captions.safetensors"])
def test_a_cache_that_somebody_cuts_ends_as_broken_data(file: str, tiny_stage: Stages, make_run: Runs) -> None:
    stage = tiny_stage(steps=9)
    run, whole = make_run(stage), make_run(stage)

    def cut() -> None:
        (path,) = run.latents.glob(f"*/{file}")
        os.truncate(path, path.stat().st_size // 2)

    ended = in_process(run, Between(run, 4, cut))
    assert (ended["status"], ended["class"], ended["rank"]) == ("failed", "data", 0), ended
    assert 5 <= ended["step"] <= 7, "batches are read ahead of their steps"
    size = (prepare(stage, whole.latents) / file).stat().st_size
    assert file in ended["reason"] and f"{size // 2} bytes" in ended["reason"] and str(size) in ended["reason"]
    assert checkpoint.step_of(checkpoint.finished(run.checkpoints)[-1]) == ended["step"]
    again = make_run(stage, resume=checkpoint.finished(run.checkpoints)[-1])
    assert in_process(again)["status"] == in_process(whole)["status"] == "completed"
    last, same = (checkpoint.directory(one.checkpoints, 9) / "model.safetensors" for one in (again, whole))
    assert last.read_bytes() == same.read_bytes(), "the cache is built anew"


def test_a_cache_that_was_cut_before_the_run_is_built_anew(tiny_stage: Stages, make_run: Runs) -> None:
    stage = tiny_stage(steps=2)
    run, whole = make_run(stage), make_run(stage)
    path = prepare(stage, run.latents) / SHARD
    os.truncate(path, path.stat().st_size // 2)
    assert in_process(run)["status"] == in_process(whole)["status"] == "completed"
    ours, theirs = (checkpoint.directory(one.checkpoints, 2) / "model.safetensors" for one in (run, whole))
    assert ours.read_bytes() == theirs.read_bytes()


def test_numbers_of_the_shard_are_what_the_trainer_reads(tiny_stage: Stages, make_run: Runs) -> None:
    """Else nothing above would be spoilt."""
    stage = tiny_stage()
    run = make_run(stage)
    before = Loader(Prepared.open(prepare(stage, run.latents), stage), seed=stage.seed)
    clean = before.batch(before.start).latents.clone()
    spoil(run, stage, range(1, 2), 3.0)
    after = Loader(Prepared.open(prepare(stage, run.latents), stage), seed=stage.seed)
    torch.testing.assert_close(after.batch(after.start).latents, 3 * clean)
