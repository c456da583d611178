"""Ends that the trainer gives a name to, seen by whoever launched it: what is tried again, what is not, and what a person is told."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from live_attempts import STAND_IN, until
from tiny_recipe import Osctl, warm_trainer, write

from orchestrator.ledger.records import Outcome
from orchestrator.ledger.store import Ledger
from orchestrator.stores.folder import FolderStore

PATIENCE_S = 120.0


def pipeline(folder: Path, **changes: Any) -> Osctl:
    """One stage of one rank."""
    small = {"steps": 60, "checkpoint": {"every_steps": 7, "keep_last": 2}, "prompts": []}
    return Osctl(write(folder, devices=1, stages=1, changes=small | changes, trainer=warm_trainer()))


def outcomes(osctl: Osctl) -> list[Outcome]:
    ledger = Ledger(FolderStore(osctl.folder / ".osctl/store"), "tiny")
    (inputs_digest,) = ledger.inputs_of("stage1")
    found = [ledger.outcome("stage1", inputs_digest, attempt) for attempt in ledger.attempts("stage1", inputs_digest)]
    return [outcome for outcome in found if outcome is not None]


def stand_in(folder: Path, *options: str, steps: int = 400, every_steps: int = 20) -> Osctl:
    """One stage of the stand-in trainer, with a CLI around it."""
    changes = {"steps": steps, "checkpoint": {"every_steps": every_steps, "keep_last": 2}, "prompts": []}
    trainer = [sys.executable, STAND_IN, "{run_dir}", "{devices}", "--step-ms", "20", *options]
    return Osctl(write(folder, devices=2, stages=1, changes=changes, trainer=trainer))


def tree(pid: int) -> list[int]:
    """A process and all that it has started, guards and ranks in sessions of their own included."""
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with suppress(FileNotFoundError, ProcessLookupError):
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
    found = [pid]
    for one in found:
        found += [child for child, parent in parents.items() if parent == one]
    return found


def reaches(osctl: Osctl, step: int, attempt: int = 1) -> None:
    """Wait until the attempt has published a checkpoint of this step or later."""
    until(
        lambda: any(
            int(path.parent.name[5:13]) >= step
            for path in osctl.folder.glob(f".osctl/store/tiny/stages/*/checkpoints/*-a{attempt}/MANIFEST.json")
        ),
        f"step {step} is published",
    )


def last_step(folder: Path) -> int:
    """The last step that the only attempt has written down whole."""
    (metrics,) = folder.glob(".osctl/runs/*/metrics.jsonl")
    return max(json.loads(line).get("step", 0) for line in metrics.read_text().splitlines(keepends=True) if line.endswith("\n"))


def terminal(osctl: Osctl) -> str:
    return (osctl.folder / "launch.log").read_text()


def all_at_once(osctl: Osctl, launcher: subprocess.Popen[bytes]) -> None:
    """What a machine that shuts down does to every process."""
    for pid in tree(launcher.pid):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)
    assert launcher.wait(PATIENCE_S) == 130, terminal(osctl)
    (only,) = outcomes(osctl)
    (bill,) = osctl.json("cost", "--by-attempt")
    ledger = Ledger(FolderStore(osctl.folder / ".osctl/store"), "tiny")
    (inputs_digest,) = ledger.inputs_of("stage1")
    reached = max(piece.last_step or 0 for piece in ledger.journal("stage1", inputs_digest, 1))
    assert (only.class_, only.step) == ("drained", reached), (only, terminal(osctl))
    assert f"goes on with stage1 from step {reached}" in terminal(osctl) and "lost" not in terminal(osctl)
    assert bill["device_seconds"]["lost"] == 0


def test_a_machine_that_shuts_down_loses_no_step(tmp_path: Path) -> None:
    osctl = stand_in(tmp_path)
    launcher = osctl.start("launch", "-q")
    reaches(osctl, 40)
    all_at_once(osctl, launcher)


@pytest.mark.long
def test_a_machine_that_shuts_down_loses_no_step_of_torchrun(tmp_path: Path) -> None:
    changes = {"steps": 3000, "checkpoint": {"every_steps": 40, "keep_last": 2}, "prompts": []}
    osctl = Osctl(write(tmp_path, devices=2, stages=1, changes=changes))
    launcher = osctl.start("launch", "-q")
    reaches(osctl, 40)
    all_at_once(osctl, launcher)


def test_a_person_who_asks_twice_is_told_what_is_lost(tmp_path: Path) -> None:
    osctl = stand_in(tmp_path, "--fail", "drainless@9999", every_steps=100)
    launcher = osctl.start("launch", "-q")
    reaches(osctl, 100)
    launcher.send_signal(signal.SIGINT)
    time.sleep(1.2)
    until(lambda: 10 <= last_step(tmp_path) % 100 < 40, "steps that no checkpoint has, and the next one is far")
    launcher.send_signal(signal.SIGINT)
    assert launcher.wait(PATIENCE_S) == 130
    said = terminal(osctl)
    (only,) = outcomes(osctl)
    assert only.class_ == "lost" and f"goes on with stage1 from step {only.step}" in said
    count = int(said.partition("at least ")[2].partition(" ")[0])
    done = last_step(tmp_path)
    assert only.step is not None and 0 < count <= done - only.step, "at least: nobody has seen the last of them"
    assert f"{count} steps after step {only.step} lost" in said


@pytest.mark.long
@pytest.mark.parametrize("size", [1000, 24_000_000], ids=["the driver finds it", "an agent finds it"])
def test_a_stage_whose_newest_checkpoint_is_damaged_goes_on_from_the_one_before_and_says_so(tmp_path: Path, size: int) -> None:
    once = ("--fail", "hang@45", "--once", str(tmp_path / "hung"))  # or it ends before the launcher does
    osctl = stand_in(tmp_path, "--bytes", str(size), *once, steps=60)
    launcher = osctl.start("launch", "-q")
    reaches(osctl, 40)
    until((tmp_path / "hung").exists, "it hangs")
    launcher.kill()
    launcher.wait()
    (newest,) = osctl.folder.glob(".osctl/store/tiny/stages/*/checkpoints/step-00000040-a1/ema.safetensors")
    newest.chmod(0o644)
    data = bytearray(newest.read_bytes())
    data[-1] ^= 1
    newest.write_bytes(data)
    said = osctl("launch", "-q").stderr
    assert "ema.safetensors" in said and "from step 20" in said and ("step 40 is not used" in said or "step 40, from which" in said), said
    ends = [outcome.class_ for outcome in outcomes(osctl)]
    assert ends == ["lost", "completed"] if size == 1000 else ["lost", "store", "completed"]
    status = " ".join(osctl("status").stdout.split())
    assert size == 1000 or "is damaged" in status


@pytest.fixture
def small_disk(tmp_path: Path, require: Callable[[str, str], None]) -> Iterator[Path]:
    """A file system of 4 MB below the folder of a pipeline, where its store lies."""
    store = tmp_path / ".osctl" / "store"
    store.mkdir(parents=True)
    if os.getuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", store]).returncode:
        require("namespaces", "needs root, to mount a small file system")
    yield store
    subprocess.run(["umount", "--lazy", store], check=True)


def test_a_store_that_is_full_is_said_at_once_and_the_steps_at_risk_too(tmp_path: Path, small_disk: Path) -> None:
    osctl = stand_in(tmp_path, "--bytes", "150000", steps=2000, every_steps=10)
    launcher = osctl.start("launch")
    log = until(lambda: next(osctl.folder.glob(".osctl/runs/*/trouble.json"), None), "the agent is refused")
    until(lambda: "No space left on device" in terminal(osctl), "the terminal says it", patience_s=10)
    until(lambda: "steps are at risk" in " ".join(osctl("status").stdout.split()), "status says it", patience_s=20)
    (stage,) = osctl.json("status")["stages"]
    assert "No space left" in stage["why"] and "steps are at risk" in stage["why"]
    until(lambda: "No space left" in osctl("events").stdout, "an event says it", patience_s=20)  # the driver looks every few seconds
    for folder in small_disk.glob("tiny/stages/*/checkpoints/*"):
        assert (folder / "MANIFEST.json").exists() or time.time() - folder.stat().st_mtime < 2, f"{folder.name} is half a checkpoint"
    launcher.send_signal(signal.SIGINT)
    code = launcher.wait(PATIENCE_S)
    said = terminal(osctl)
    saved = max(int(path.parent.name[5:13]) for path in small_disk.glob("tiny/stages/*/checkpoints/*/MANIFEST.json"))
    if code == 5:  # not even a word fits
        assert log and f"how it ended could not be written: store {small_disk}" in said and f"no checkpoint after step {saved}" in said, (
            said
        )
        return
    assert code == 130 and f"from step {saved}" in said and "lost" in said.rpartition("ended with disk")[2], said
    assert not list(osctl.folder.glob(".osctl/runs/*/outgoing/*"))
    osctl("cost")


@pytest.mark.long
def test_a_cache_that_somebody_cuts_is_built_anew_by_the_next_attempt(tmp_path: Path) -> None:
    whole, cut = pipeline(tmp_path / "whole"), pipeline(tmp_path / "cut")
    launcher = cut.start("launch", "-q")
    try:
        deadline, step = time.monotonic() + PATIENCE_S, 0
        while step < 20:
            assert launcher.poll() is None and time.monotonic() < deadline, (cut.folder / "launch.log").read_text()
            for beat in cut.folder.glob(".osctl/runs/*_a1/heartbeat-0.json"):
                with suppress(FileNotFoundError, json.JSONDecodeError):
                    step = json.loads(beat.read_text())["step"]
            time.sleep(0.002)
        (shard,) = cut.folder.glob(".osctl/latents/*/bucket-0.safetensors")
        os.truncate(shard, shard.stat().st_size // 2)
        assert launcher.wait(PATIENCE_S) == 0, (cut.folder / "launch.log").read_text()
    finally:
        launcher.kill()
        launcher.wait()
    first, second = outcomes(cut)
    # Where the cut comes in the microseconds between the look at its size and the look at its pages, the kernel ends the reader.
    assert (first.class_ == "data" and "bucket-0.safetensors" in first.reason) or "SIGBUS" in first.reason, first
    assert second.class_ == "completed" and first.step is not None and first.step >= 14
    whole("launch", "-q")
    assert cut.digests() == whole.digests()


def test_a_loss_that_leaves_its_range_stops_the_stage_and_says_what_to_do(tmp_path: Path) -> None:
    osctl = pipeline(tmp_path, loss_spike=1.001, batch_size=1)
    failed = osctl("launch", "-q", expect=3)
    assert "attempt 1 ended with spike: step " in failed.stderr and "1.001 times the median" in failed.stderr
    assert "--set stage1.loss_spike=2.002` lets it pass and goes on from step" in failed.stderr
    (only,) = outcomes(osctl)
    assert (only.class_, only.exit_code) == ("spike", 73)
    for command in ("status", "watch"):
        assert "1.001 times the median" in " ".join(osctl(command).stdout.split()), command
