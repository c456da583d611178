"""What a look at a long run costs: 8 nodes for 48 hours, a journal piece of each node every 5 s: 276,480 pieces in a folder store.

The journal is written as the product writes it (`Ledger.append_journal`, with the agents' sums beside it), without waiting for the disk.
Then in processes of their own, CPU-seconds of the whole process:

- `osctl status -o json` of somebody who has never looked before, and the same where there are no sums (a ledger of release 0.1.0: with an
  hour of it, and reckoned up to 48);
- `osctl watch` once a second, while the nodes go on writing: share of a core without its start, and the most memory it ever had.

The same against S3 (a versitygw of its own), where there is one.

    .venv/bin/python bench/look.py
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import harness
import psutil
from conftest import _start as start_s3
from harness import Measured, Row
from written_ledger import Writer, pipeline

from orchestrator.accounting.node_fold import TOTALS_EVERY, NodeFold
from orchestrator.ledger.records import Intent, JournalPiece
from orchestrator.ledger.store import Ledger
from orchestrator.recipe.pipeline import Pipeline, Resources
from orchestrator.stores import open_store

ROOT = Path(__file__).resolve().parent.parent
NODES, HOURS, FLUSH_S, STEP_S = 8, 48.0, 5.0, 2.5
CHECKPOINT_STEPS = 720
"""Half an hour."""
WATCH_S = 60.0


def recipe() -> Pipeline:
    """One stage on 64 devices, never done."""
    base = pipeline(steps=10 * CHECKPOINT_STEPS)
    stage = base.stages[0]
    config = stage.config.model_copy(
        update={"steps": 10**6, "checkpoint": stage.config.checkpoint.model_copy(update={"every_steps": CHECKPOINT_STEPS})}
    )
    spec = stage.spec.model_copy(update={"resources": Resources(nodes=NODES, devices_per_node=8, device="h800")})
    return base.model_copy(update={"stages": (stage.model_copy(update={"config": config, "spec": spec}),)})


@dataclass
class Gang:
    """The agents of an attempt, as far as the ledger knows them."""

    ledger: Ledger
    intent: Intent
    start: float
    sums: bool
    journal_from: int = 0
    """Number of the first piece that is written; those before are in the sums alone."""

    def __post_init__(self) -> None:
        self.folds = [NodeFold(node, 0, CHECKPOINT_STEPS) for node in range(NODES)]

    def write(self, seq: int) -> None:
        """The next piece of every node: two steps in 5 s."""
        began = self.start + seq * FLUSH_S
        first, last = 2 * seq + 1, 2 * seq + 2
        line = {
            "loss": 0.25,
            "lr": 1e-4,
            "grad_norm": 0.5,
            "clips": 256,
            "tokens": 1 << 20,
            "step_s": 2.4,
            "data_wait_s": 0.1,
            "checkpoint_s": 0.0,
        }
        lines = tuple({"step": step, "time": began + STEP_S * place, **line} for place, step in ((1, first), (2, last)))
        for fold in self.folds:
            piece = JournalPiece(
                node=fold.node, seq=seq, start=began, end=began + FLUSH_S, devices=8, spent={"step": 4.8, "data_wait": 0.2},
                first_step=first, last_step=last, metrics=lines if fold.node == 0 else (),
            )  # fmt: skip
            if seq >= self.journal_from:
                self.ledger.append_journal(self.intent, piece)
            fold.add(piece)
            if self.sums and seq % TOTALS_EVERY == TOTALS_EVERY - 1:
                self.ledger.append_totals(self.intent, fold.totals())


def written(store: str, hours: float, *, sums: bool, newest: int | None = None) -> Gang:
    """A pipeline that has run for so long, and has a driver: this process. `newest`: so many pieces of each node are written; none: all."""
    ledger = Ledger(open_store(store), "demo")
    pieces = round(hours * 3600 / FLUSH_S)
    story = Writer(ledger, recipe().model_copy(update={"store": store}), now=time.time() - hours * 3600)
    ledger.add_revision(story.pipeline.model_dump(mode="json"), story.now)
    intent = story.begin("stage1").model_copy()
    gang = Gang(ledger, intent, story.now, sums, pieces - newest if newest is not None else 0)
    for seq in range(pieces):
        gang.write(seq)
    for step in range(CHECKPOINT_STEPS, 2 * pieces, CHECKPOINT_STEPS):
        story.publish(intent, step)
        prefix = ledger.keys.checkpoint("stage1", intent.inputs_digest, step, 1)
        for part in range(3 * NODES):  # as many files as a checkpoint of 8 nodes has
            ledger.store.create(f"{prefix}/part-{part:05d}.safetensors", b"")
    ledger.acquire(time.time(), ttl_s=3600.0)
    return gang


def osctl(store: str, *arguments: str) -> list[str]:
    return [str(Path(sys.executable).parent / "osctl"), *arguments, "-f", "demo", "--store", store]


def status_cpu_s(store: str) -> tuple[float, float]:
    """(CPU-seconds, MiB at most) of a first look."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(osctl(store, "status", "-o", "json"), stdout=subprocess.PIPE, check=True)
    stage = json.loads(done.stdout)["stages"][0]
    assert stage["step"] > 1 and math.isclose(stage["device_hours"], 8 * NODES * stage["step"] * STEP_S / 3600, rel_tol=1e-6), stage
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, after.ru_maxrss / 1024


def watch(gang: Gang, store: str, seconds: float) -> tuple[float, float]:
    """(share of a core, MiB at most) of `osctl watch`, once it has begun, while the nodes go on."""
    over = threading.Event()

    def go_on() -> None:
        while not over.wait(FLUSH_S / 5):
            while gang.start + (gang.folds[0].seq + 2) * FLUSH_S < time.time():
                gang.write(gang.folds[0].seq + 1)

    writer = threading.Thread(target=go_on)
    writer.start()
    process = subprocess.Popen(osctl(store, "watch", "-o", "json"), stdout=subprocess.PIPE, text=True)
    reader: threading.Thread | None = None
    try:
        assert process.stdout is not None
        first = process.stdout.readline()
        assert '"running"' in first, first
        reader = threading.Thread(target=process.stdout.read, daemon=True)
        reader.start()
        seen = psutil.Process(process.pid)
        time.sleep(min(3.0, seconds))
        cpu, began = sum(seen.cpu_times()[:2]), time.monotonic()
        most = 0
        while time.monotonic() < began + seconds:
            time.sleep(1.0)
            most = max(most, seen.memory_info().rss)
        return (sum(seen.cpu_times()[:2]) - cpu) / (time.monotonic() - began), most / 2**20
    finally:
        over.set()
        process.terminate()
        process.wait()
        writer.join()
        if reader is not None:
            reader.join()  # the pipe has come to its end
        if process.stdout is not None:
            process.stdout.close()


@contextlib.contextmanager
def bucket(folder: Path) -> Iterator[str | None]:
    """URL of a prefix in a versitygw of its own; none where it is not built."""
    found = subprocess.run([ROOT / "scripts" / "build-versitygw"], capture_output=True, text=True, check=False)
    if found.returncode:
        yield None
        return
    process, server = start_s3(Path(found.stdout.strip()), folder, [])
    os.environ |= server.env
    try:
        yield server.url("look")
    finally:
        process.terminate()
        process.wait()


def on_folder(folder: Path, hours: float, quick: bool) -> tuple[list[tuple[float, float]], tuple[float, float]]:
    store = str(folder / "store")
    gang = written(store, hours, sums=True)
    looks = [status_cpu_s(store) for _ in range(1 if quick else 3)]
    seen = watch(gang, store, 2.0 if quick else WATCH_S)
    shutil.rmtree(store)
    return looks, seen


def on_s3(folder: Path, hours: float, quick: bool) -> tuple[list[tuple[float, float]], tuple[float, float]] | None:
    """The journal is written up to its newest hundred pieces a node: a look asks for none of the others, and lists none."""
    with bucket(folder) as store:
        if store is None:
            return None
        gang = written(store, hours, sums=True, newest=100)
        looks = [status_cpu_s(store) for _ in range(1 if quick else 3)]
        return looks, watch(gang, store, 2.0 if quick else WATCH_S)


def measure(quick: bool) -> Measured:
    os.fsync = lambda _: None  # nothing here has to outlive a power cut
    hours, old_hours = (0.25, 0.05) if quick else (HOURS, 1.0)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ |= {"OSCTL_HOME": str(folder / "home"), "COLUMNS": "200"}
        found = {"folder store": on_folder(folder, hours, quick)}
        written(str(folder / "old"), old_hours, sums=False)
        old_cpu_s, _ = status_cpu_s(str(folder / "old"))
        if (s3 := on_s3(folder, hours, quick)) is not None:
            found["S3"] = s3
    rows = []
    for store, (looks, (share, watch_mib)) in found.items():
        rows += [
            Row(f"first `osctl status` of 48 h on 8 nodes, {store}", min(cpu for cpu, _ in looks), "CPU-s", 1.0, None, "less"),
            Row(f"`osctl watch` of it each second, {store}", 100 * share, "% of a core", 2.0, None, "less"),
            Row(f"memory of both at most, {store}", max(watch_mib, *(mib for _, mib in looks)), "MiB", 128, None, "less"),
        ]
    rows.append(Row("`osctl status` of one hour without sums (release 0.1.0)", old_cpu_s, "CPU-s", None, None, "less"))
    raw = {
        "pieces": NODES * round(hours * 3600 / FLUSH_S),
        "hours": hours,
        "found": {store: {"status": looks, "watch": seen} for store, (looks, seen) in found.items()},
        "without_sums": {"hours": old_hours, "status_cpu_s": old_cpu_s, "pieces": NODES * round(old_hours * 3600 / FLUSH_S)},
    }
    return rows, raw


def main() -> None:
    harness.run("look", measure)


if __name__ == "__main__":
    main()
