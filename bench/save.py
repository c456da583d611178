"""How long a step stands still for a save: `opensora.checkpoint.writer` beside `torch.save`, `dcp.async_save` and a bare copy of the same
bytes.

An fp32 dictionary of 0.85 GB, in tensors of the sizes of XL/2's layers. The stall is what a step waits: the call, then half a second of
matrix products in place of a step's forward and backward passes, then (ours) what is left until the tensors may change. What the background
does afterwards is waited for and not counted, nor that it may slow the products down: for nobody. `torch.save` has no background.
`dcp.async_save` (thread) in two states: with its defaults, which allocate in every save, and with a stager of our making that keeps its
memory; that one is reported and has no floor. The bare copy is memmove into memory that is there. Every way once in each round, A B C D E,
smallest of the rounds. Wall seconds decide: our copy is another thread's CPU-seconds. So this bench alone wants a second core that is idle.

    OMP_NUM_THREADS=1 .venv/bin/python bench/save.py [--megabytes 850]
"""

from __future__ import annotations

import argparse
import ctypes
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import harness
import torch
from harness import Measured, Row
from torch import Tensor
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_saver import async_save

from opensora.checkpoint.reader import TENSORS, TensorShard
from opensora.checkpoint.writer import Saver
from opensora.config import StageConfig

OURS = "opensora.checkpoint.writer"
WORK_S = 0.5
MEGABYTES, QUICK_MEGABYTES = 850, 24
ROUNDS = 5
SHAPES = ((4608, 1152), (1152, 4608), (3456, 1152), (1152, 1152), (1152,))
"""Of a block of width 1152: both layers of the MLP, qkv, a projection, a bias."""
WIDEST = 1152
LARGEST_PART = 0.2
OF_TORCH, OF_DCP, OF_COPY = 0.2, 0.5, 1.2

STAGE = {
    "model": {"depth": 1, "width": 32, "heads": 2},
    "objective": {"kind": "flow"},
    "data": {"source": {"kind": "digits", "clips": 4}, "frames": 1, "height": 16, "width": 16},
    "autoencoder": {"kind": "patch"},
    "text": {"kind": "words"},
    "steps": 1_000_000,
    "batch_size": 1,
    "checkpoint": {"every_steps": 1, "keep_last": 1},
    "sampling": {"method": "euler"},
}


def state(megabytes: float) -> dict[str, Tensor]:
    """Tensors of such sizes, as many as it takes; the narrower the less there is to hold."""
    width = WIDEST if megabytes >= MEGABYTES * LARGEST_PART else 128
    found: dict[str, Tensor] = {}
    size = 0.0
    while size < megabytes * 1e6:
        shape = tuple(side * width // WIDEST for side in SHAPES[len(found) % len(SHAPES)])
        found[f"blocks.{len(found)}"] = tensor = torch.randn(shape)
        size += tensor.nbytes
    return found


class Ways:
    """Each way to save: `begin` is the stall, `finish` what comes after."""

    def __init__(self, tensors: dict[str, Tensor], folder: Path) -> None:
        self.tensors, self.folder, self.step = tensors, folder, 0
        encoders = folder / "encoders"
        encoders.mkdir()
        for name in ("autoencoder", "text"):
            (encoders / f"{name}.safetensors").write_bytes(b"-")
        names = list(tensors)
        self.shards = {part: {name: TensorShard(tensors[name]) for name in names[number::3]} for number, part in enumerate(TENSORS)}
        self.saver = Saver(folder / "ours", StageConfig.model_validate(STAGE), writer=0, writers=1, here=(0,), device=torch.device("cpu"))
        began = time.process_time()
        self.saver.reserve(self.shards)
        self.reserved_s = time.process_time() - began
        self.encoders = encoders
        self.stager = DefaultStager(StagingOptions(False, False, False, False))
        self.matrix = torch.ones(512, 512)
        self.copies = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
        self.ways: dict[str, Callable[[], Callable[[], object]]] = {
            OURS: self.ours,
            "torch.save": self.torch_save,
            "dcp.async_save": partial(self.dcp, None),
            "dcp.async_save, memory kept": partial(self.dcp, self.stager),
            "memcpy": self.memcpy,
        }

    def ours(self) -> Callable[[], object]:
        self.step += 1
        self.saver.save(self.shards, self.encoders, step=self.step, world_size=1, seen=(self.step,), clips="", carried=(), reset=())
        return self.saver.wait

    def work(self) -> None:
        """What a step does while nothing changes."""
        until = time.perf_counter() + WORK_S
        while time.perf_counter() < until:
            torch.mm(self.matrix, self.matrix)

    def torch_save(self) -> Callable[[], object]:
        torch.save(self.tensors, self.folder / "torch.pt")
        return lambda: None

    def dcp(self, stager: DefaultStager | None) -> Callable[[], object]:
        future: Any = async_save(self.tensors, checkpoint_id=self.folder / "dcp", async_stager=stager, no_dist=True)
        return lambda: (getattr(future, "upload_completion", future)).result()

    def memcpy(self) -> Callable[[], object]:
        for name, source in self.tensors.items():
            ctypes.memmove(self.copies[name].data_ptr(), source.data_ptr(), source.nbytes)
        return lambda: None


def stalls(ways: Ways, rounds: int) -> dict[str, dict[str, float]]:
    """Seconds of each way's stall, and those of its call alone, smallest of the rounds; the first round is not counted."""
    best = {name: {"wall_s": float("inf"), "call_s": float("inf")} for name in ways.ways}
    for number in range(rounds + 1):
        for name, begin in ways.ways.items():
            wall = time.perf_counter()
            finish = begin()
            called = time.perf_counter() - wall
            ways.work()
            wall = time.perf_counter()
            if name == OURS:
                ways.saver.ready()
            took = {"wall_s": called + time.perf_counter() - wall, "call_s": called}
            finish()
            if number:
                best[name] = {key: min(value, took[key]) for key, value in best[name].items()}
    return best


def measure(megabytes: float | None, quick: bool) -> Measured:
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", module=r"torch\.distributed")  # that there is no process group, once a save
    size = megabytes or (QUICK_MEGABYTES if quick else MEGABYTES)
    tensors = state(size)
    with tempfile.TemporaryDirectory(prefix="osctl-bench-save-") as folder:
        ways = Ways(tensors, Path(folder))
        found = stalls(ways, 2 if quick else ROUNDS)
        ways.stager.close()
    ours = found[OURS]["wall_s"]
    bars = {
        "torch.save": (OF_TORCH, None),
        "dcp.async_save": (OF_DCP, None),
        "dcp.async_save, memory kept": (None, None),
        "memcpy": (None, OF_COPY),
    }
    rows = [Row(f"stall of a save / {name}", ours / found[name]["wall_s"], "x", *bar, "less") for name, bar in bars.items()]
    count = sum(tensor.nbytes for tensor in tensors.values())
    raw = {"bytes": count, "tensors": len(tensors), "stalls": found, "reserve_cpu_s": ways.reserved_s}
    return rows, raw | {"libraries": harness.libraries("torch", "safetensors")}


def main() -> None:
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--megabytes", type=float)
    mine, rest = parser.parse_known_args(sys.argv[1:])
    harness.run("save", partial(measure, mine.megabytes), rest)


if __name__ == "__main__":
    main()
