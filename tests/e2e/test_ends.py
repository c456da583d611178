"""Ends that the trainer gives a name to, seen by whoever launched it: what is tried again, what is not, and what a person is told."""

from __future__ import annotations

import json
import os
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from tiny_recipe import Osctl, write

from orchestrator.adapters.folder import FolderStore
from orchestrator.ledger import Ledger
from orchestrator.records import Outcome

FORKED = [sys.executable, str(Path(__file__).parent.parent / "forked_torchrun.py"), "{run_dir}", "{devices}"]
PATIENCE_S = 120.0


def pipeline(folder: Path, **changes: Any) -> Osctl:
    """One stage of one rank."""
    small = {"steps": 60, "checkpoint": {"every_steps": 7, "keep_last": 2}, "prompts": []}
    return Osctl(write(folder, devices=1, stages=1, changes=small | changes, trainer=FORKED))


def outcomes(osctl: Osctl) -> list[Outcome]:
    ledger = Ledger(FolderStore(osctl.folder / ".osctl/store"), "tiny")
    (inputs,) = ledger.inputs_of("stage1")
    found = [ledger.outcome("stage1", inputs, attempt) for attempt in ledger.attempts("stage1", inputs)]
    return [outcome for outcome in found if outcome is not None]


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
    assert "Raise loss_spike to let it pass" in failed.stderr
    (only,) = outcomes(osctl)
    assert (only.class_, only.exit_code) == ("spike", 73)
    for command in ("status", "watch"):
        assert "1.001 times the median" in " ".join(osctl(command).stdout.split()), command
