"""A trainer that trains nothing: it obeys docs/contracts.md section 1 in milliseconds, so that tests can run real processes.

    intent.trainer = (sys.executable, "tests/stand_in_trainer.py", "{run_dir}", "{devices}", "--step-ms", "5")

Like torchrun it is one parent that starts each rank in a session of its own, passes a SIGTERM on to them, ends them 30 s later, and
flattens every end to exit code 1; its ranks save and leave at a SIGTERM, as those of `opensora.train` do. Unlike
`opensora.train` its ranks ignore the death of their parent, so that whoever starts it must clean up after it. Imports the standard library
and yaml alone.

The weights are a hash chain over (seed, parent's EMA weights, every step in order): a step that is skipped, repeated or resumed
from the wrong checkpoint gives other digests. Failures are asked for with `--fail KIND@STEP` (or OSCTL_STAND_IN_FAIL), at most
once if `--once FILE` is given: the file is made on the way out.

With `--node {node} --nodes {nodes}` it is one node of several, each in a run directory of its own, and writes its share of each checkpoint.
The nodes do not meet: since nothing is random, each comes to the same weights by itself.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import mmap
import os
import shutil
import signal
import struct
import sys
import time
from pathlib import Path
from typing import Any

import yaml

RESULT_BYTES = 16_384
SAID = ("config", "parent", "data", "nan", "spike", "oom", "disk", "code")
"""Failures that result.json reports.

The others: exit (silently), segv, kill, hang, half (killed while it saves), drainless (ignores drain), odd (a loss of NaN),
linger (says its last word and stays)."""


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("devices", type=int)
    parser.add_argument("--step-ms", type=float, default=2.0)
    parser.add_argument("--init-ms", type=float, default=0.0)
    parser.add_argument("--evaluate-ms", type=float, default=0.0)
    parser.add_argument("--bytes", type=int, default=1024, help="size of each weight file")
    parser.add_argument("--fail", default=os.environ.get("OSCTL_STAND_IN_FAIL", ""), help="KIND@STEP")
    parser.add_argument("--fail-rank", type=int, default=0)
    parser.add_argument("--node", type=int, default=0)
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument("--says", type=Path, help="folder whose files the first rank copies into the run directory, before its first step")
    parser.add_argument("--once", type=Path, help="fail only while this file is not there")
    return parser.parse_args()


class StandIn:
    def __init__(self, options: argparse.Namespace, local: int, arrived: mmap.mmap) -> None:
        self.options, self.local, self.run, self.arrived = options, local, options.run_dir, memoryview(arrived).cast("Q")
        self.rank = rank = options.node * options.devices + local
        self.stage: dict[str, Any] = yaml.load((self.run / "stage.yaml").read_text(), getattr(yaml, "CSafeLoader", yaml.SafeLoader))
        self.steps, self.every = self.stage["steps"], self.stage["checkpoint"]["every_steps"]
        kind, _, step = options.fail.partition("@")
        armed = kind and rank == options.fail_rank and not (options.once and options.once.exists())
        self.failure: str = kind if armed else ""
        self.fail_step = int(step or 1) if armed else -1
        self.step, self.state = self.start()
        self.booked = time.time()
        self.told = False
        self.deaf = kind == "drainless"
        if not self.deaf:
            signal.signal(signal.SIGTERM, self.tell)

    def tell(self, _number: int, _frame: object) -> None:
        self.told = True

    # where it starts

    def start(self) -> tuple[int, bytes]:
        own = sorted(path for path in (self.run / "checkpoints").glob("step-*") if (path / "CHECKPOINT.json").exists())
        if own:
            return json.loads((own[-1] / "CHECKPOINT.json").read_text())["step"], read_state(own[-1] / "model.safetensors")
        seed = str(self.stage["seed"]).encode()
        parent = self.run / "parent" / "ema.safetensors"
        return 0, digest(seed, read_state(parent) if parent.exists() else b"")

    # what it says

    def write(self, name: str, content: dict[str, Any]) -> None:
        draft = self.run / f".{name}.partial"
        draft.write_text(json.dumps(content))
        draft.replace(self.run / name)

    def beat(self, phase: str) -> None:
        beat = {"schema": 1, "rank": self.rank, "pid": os.getpid(), "step": self.step, "phase": phase, "time": time.time()}
        self.write(f"heartbeat-{self.rank}.json", beat)

    def record(self, line: dict[str, Any]) -> None:
        if self.local == 0:
            with (self.run / "metrics.jsonl").open("a") as file:
                file.write(json.dumps(line) + "\n")

    def book(self, phase: str) -> None:
        now = time.time()
        self.record({"phase": phase, "start": self.booked, "end": now})
        self.booked = now

    def finish(self, status: str, reason: str = "", kind: str | None = None, evaluation: dict[str, float] | None = None) -> None:
        result = {"schema": 1, "status": status, "step": self.step, "reason": reason, "class": kind, "rank": self.rank if kind else None}
        result["time"] = time.time()
        with (self.run / "result.json").open("r+b") as file:
            file.write(json.dumps({**result, "evaluation": evaluation or {}}).encode().ljust(RESULT_BYTES))

    def finished(self) -> bool:
        return bool((self.run / "result.json").read_bytes().strip())

    # what it does

    def train(self) -> int:
        self.beat("init")
        if self.options.says and self.local == 0:
            shutil.copytree(self.options.says, self.run, dirs_exist_ok=True)
        time.sleep(self.options.init_ms / 1000)
        self.book("init")
        drained = False
        while self.step < self.steps and not drained:
            if self.step + 1 == self.fail_step and self.failure != "half":
                return self.fail()
            if (self.told or (self.run / "drain").exists()) and not self.deaf and not self.arrived[self.options.devices]:
                self.arrived[self.options.devices] = self.step + 1
            began = time.time()
            time.sleep(self.options.step_ms / 1000)
            self.step += 1
            self.state = digest(self.state, str(self.step).encode())
            self.meet()
            drained = 0 < self.arrived[self.options.devices] <= self.step
            saving = time.time()
            if self.local == 0 and (drained or self.step % self.every == 0 or self.step == self.steps):
                self.save()
            self.report(began, saving)
        if self.local == 0:
            if self.step == 0:
                self.save()
            code = self.leave(drained and self.step < self.steps)
            while self.failure == "linger":
                time.sleep(60)
            return code
        while not self.finished():
            time.sleep(0.01)
        return 0

    def meet(self) -> None:
        """What an all-reduce does to ranks: nobody leaves a step before all have come to it, and all know who was asked to drain."""
        self.arrived[self.local] = self.step
        while min(self.arrived[: self.options.devices]) < self.step and not self.finished():
            time.sleep(0.0005)
        if self.finished() and json.loads((self.run / "result.json").read_bytes())["status"] == "failed":
            time.sleep(60)  # its end ends this rank too; a step more would say "completed" over its word
            os._exit(75)

    def report(self, began: float, saving: float) -> None:
        self.beat("train")
        now = time.time()
        noise = self.state[0] / 255
        times = {"data_wait_s": began - self.booked, "step_s": saving - began, "checkpoint_s": now - saving}
        loss = float("nan") if self.step == 3 and self.failure == "odd" else 1 / self.step + noise / 100
        line = {"step": self.step, "time": now, "loss": loss, "lr": 1e-3, "grad_norm": noise}
        self.record({**line, "clips": self.stage["batch_size"] * self.options.devices, "tokens": 64, **times})
        self.booked = now

    def leave(self, drained: bool) -> int:
        if drained:
            self.finish("drained")
            return 0
        evaluation = {}
        if self.stage["evaluate"] and self.rank == 0:
            until = time.time() + self.options.evaluate_ms / 1000
            while time.time() < until:
                self.beat("evaluate")
                time.sleep(0.02)
            evaluation = {"digit_accuracy": self.state[1] / 255, "direction_accuracy": self.state[2] / 255}
        if self.stage["prompts"] and self.rank == 0:
            (self.run / "samples").mkdir(exist_ok=True)
            (self.run / "samples" / "samples.json").write_text(json.dumps({"schema": 1, "prompts": self.stage["prompts"]}))
        self.book("evaluate")
        self.finish("completed", evaluation=evaluation)
        return 0

    def save(self) -> None:
        target = self.run / "checkpoints" / f"step-{self.step:08d}"
        partial = target.with_name(f".{target.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        for number, name in enumerate(("model", "ema", "optimizer", "autoencoder", "text")):
            if (number if number < 3 else 0) % self.options.nodes != self.options.node:
                continue
            state = self.state if name == "model" else digest(self.state, name.encode())
            write_state(partial / f"{name}.safetensors", state, self.options.bytes)
            if name == "ema" and self.failure == "half" and self.step >= self.fail_step:
                self.fail()
        if self.options.node == 0:
            shutil.copy(self.run / "stage.yaml", partial / "stage.yaml")
        files = {path.name: path.stat().st_size for path in sorted(partial.iterdir())}
        record = {"schema": 1, "step": self.step, "steps": self.steps, "complete": self.step == self.steps, "seed": self.stage["seed"]}
        clips = self.step * self.stage["batch_size"] * self.options.nodes * self.options.devices
        record |= {"world_size": self.options.nodes * self.options.devices, "clips_seen": clips, "seen": [clips], "clips": ""}
        record |= {"files": files}
        record |= {name: self.stage[name] for name in ("model", "objective", "data", "autoencoder", "text")}
        (partial / "CHECKPOINT.json").write_text(json.dumps({**record, "carried": [], "reset": []}))
        shutil.rmtree(target, ignore_errors=True)
        partial.rename(target)
        for old in sorted((self.run / "checkpoints").glob("step-*"))[: -self.stage["checkpoint"]["keep_last"]]:
            shutil.rmtree(old)

    def fail(self) -> int:
        if self.options.once:
            self.options.once.touch()
        kind = self.failure
        print(f"stand-in: rank {self.rank} fails by {kind} before step {self.step + 1}", flush=True)
        if kind in SAID:
            what = f"checkpoint {self.run / 'checkpoints' / f'step-{self.step:08d}'}: " if kind == "parent" else ""
            self.finish("failed", f"{what}{kind} as asked, before step {self.step + 1}", kind)
            return 1
        if kind in ("segv", "kill", "half"):
            os.kill(os.getpid(), signal.SIGSEGV if kind == "segv" else signal.SIGKILL)
        if kind == "hang":
            while True:
                time.sleep(60)
        assert kind == "exit", kind
        return 3


def digest(*parts: bytes) -> bytes:
    return hashlib.sha256(b"|".join(parts)).digest()


def write_state(path: Path, state: bytes, size: int) -> None:
    """A real safetensors file: one tensor of bytes, whose first 32 are the state."""
    content = (state * (size // len(state) + 1))[: max(size, len(state))]
    header = json.dumps({"state": {"dtype": "U8", "shape": [len(content)], "data_offsets": [0, len(content)]}}).encode()
    header += b" " * (-len(header) % 8)
    path.write_bytes(struct.pack("<Q", len(header)) + header + content)


def read_state(path: Path) -> bytes:
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    return data[8 + length : 8 + length + 32]


def start_rank(options: argparse.Namespace, rank: int, arrived: mmap.mmap) -> int:
    pid = os.fork()
    if pid:
        return pid
    os.setsid()
    code = 1
    try:
        code = StandIn(options, rank, arrived).train()
    finally:
        os._exit(code)


def main() -> int:
    """Start the ranks; if one ends badly, end the others and say so as torchrun does."""
    chosen = options()
    with (chosen.run_dir / "result.json").open("ab") as file:
        file.write(b" " * RESULT_BYTES)
    arrived = mmap.mmap(-1, 8 * (chosen.devices + 1))  # each rank's step, and the step at which all leave
    ranks = {start_rank(chosen, rank, arrived): rank for rank in range(chosen.devices)}

    def pass_on(_number: int, _frame: object) -> None:
        for rank in ranks:
            os.kill(rank, signal.SIGTERM)
        signal.signal(signal.SIGALRM, lambda *_: [os.kill(rank, signal.SIGKILL) for rank in ranks])
        signal.alarm(30)

    signal.signal(signal.SIGTERM, pass_on)
    while ranks:
        pid, status = os.wait()
        rank = ranks.pop(pid)
        if status == 0:
            continue
        code = os.waitstatus_to_exitcode(status)
        for other in ranks:
            os.kill(other, signal.SIGKILL)
        print(
            f"Root Cause (first observed failure):\n[0]:\n  rank      : {rank} (local_rank: {rank})\n  exitcode  : {code} (pid: {pid})",
            flush=True,
        )
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
