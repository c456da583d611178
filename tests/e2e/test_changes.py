"""A recipe that changes between two launches: what goes on, what begins anew, what needs a decision. Real training."""

from __future__ import annotations

import json
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from live_attempts import STAND_IN
from tiny_recipe import Osctl, warm_trainer, write

pytestmark = pytest.mark.long

STEPS = 300
MODEL = {"depth": 1, "width": 16, "heads": 1, "latent_channels": 8, "caption_width": 8, "caption_tokens": 8}


def recipe(folder: Path, **more: Any) -> Osctl:
    changes = {"steps": STEPS, "batch_size": 2, "checkpoint": {"every_steps": 100}, "prompts": [], "model": MODEL}
    return Osctl(write(folder, devices=2, stages=1, changes=changes, trainer=warm_trainer(), **more))


def stopped_half_way(osctl: Osctl, *arguments: str) -> int:
    """Launch, Ctrl-C after some steps; the step that was saved."""
    launch = osctl.start("launch", *arguments)
    deadline = time.monotonic() + 120
    while stage(osctl)["step"] < 10:
        assert launch.poll() is None and time.monotonic() < deadline, (osctl.folder / "launch.log").read_text()
        time.sleep(0.3)
    launch.send_signal(signal.SIGINT)
    assert launch.wait(60) == 130
    saved = stage(osctl)["step"]
    assert 10 <= saved < STEPS
    return int(saved)


def stage(osctl: Osctl) -> dict[str, Any]:
    try:
        return dict(json.loads(osctl("status", "-o", "json").stdout)["stages"][0])
    except AssertionError:  # nothing is there yet
        return {"step": 0}


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> tuple[Osctl, int]:
    osctl = recipe(tmp_path_factory.mktemp("changes"))
    return osctl, stopped_half_way(osctl)


def test_a_dry_run_says_which_of_the_two_a_change_is(stopped: tuple[Osctl, int]) -> None:
    osctl, saved = stopped
    goes_on = osctl("launch", "--dry-run", "--set", "stage1.activations.recompute=full").stderr
    assert "stage1 goes on where it was: activations.recompute is full (was none)" in goes_on
    anew = osctl("launch", "--dry-run", "--set", "stage1.seed=7").stderr
    assert f"stage1 begins anew, because seed is 7 (was 42); {saved} steps under earlier inputs" in anew
    (row,) = osctl.json("diff", "--set", "stage1.activations.recompute=full")
    assert row["field"] == "stage.activations.recompute" and "goes on from the last checkpoint" in row["meaning"]
    (row,) = osctl.json("diff", "--set", "stage1.seed=7")
    assert row["field"] == "stage.seed" and "another result" in row["meaning"]


def test_what_begins_anew_is_said_and_stays_paid(stopped: tuple[Osctl, int], tmp_path: Path) -> None:
    launched, saved = stopped
    shutil.copytree(launched.folder, tmp_path / "copy", symlinks=True)
    osctl = Osctl(tmp_path / "copy")
    before = sum(row["held_s"] for row in osctl.json("cost"))
    said = osctl("launch", "--set", "stage1.seed=7", "--set", "stage1.steps=4").stderr
    assert f"stage1 begins anew, because steps is 4 (was {STEPS}) and seed is 7 (was 42); {saved} steps under earlier inputs" in said
    assert stage(osctl)["state"] == "committed"
    assert sum(row["held_s"] for row in osctl.json("cost")) > before, "what earlier inputs spent is still in the bill"


def test_another_global_batch_is_refused_and_the_printed_way_goes_on(stopped: tuple[Osctl, int]) -> None:
    osctl, saved = stopped
    one = ("--set", "stage1.resources.devices_per_node=1")
    refused = osctl("launch", "-q", *one, expect=4).stderr
    assert "its global batch would be 2 clips (1 devices)" in refused and f"its {saved} steps were trained with 4" in refused
    assert "--set stage1.accumulate=2" in refused and "osctl launch --set stage1.resources.devices_per_node=1 --anew stage1" in refused
    ways = ("--set", "stage1.accumulate=2", "--set", "stage1.activations.recompute=full", "--set", "stage1.loss_spike=50")
    osctl("launch", "-q", *one, *ways)
    assert stage(osctl)["state"] == "committed" and stage(osctl)["step"] == STEPS
    assert [attempt["attempt"] for attempt in stage(osctl)["attempts"]] == [1, 2]
    events = osctl("events").stdout
    assert f"from step {saved}, resumed on 1 of 2 devices, not bitwise" in events
    (row,) = osctl.json("lineage", "--verify")
    assert row["verdict"] == "verified"
    assert "attempt 2 resumed on 1 of 2 devices, not bitwise" in row["remarks"]


def test_diff_compares_with_the_last_launch_and_not_with_the_newest_attempt(tmp_path: Path) -> None:
    """A launch that finds its result in the ledger makes no attempt: the newest one is of the launch before."""
    trainer = [sys.executable, STAND_IN, "{run_dir}", "{devices}"]
    osctl = Osctl(write(tmp_path, stages=1, devices=1, changes={"steps": 20, "checkpoint": {"every_steps": 10}}, trainer=trainer))
    osctl("launch", "-q")
    osctl("launch", "-q", "--set", "stage1.seed=7")
    osctl("launch", "-q")
    assert osctl.json("diff") == [], "before: the seed of the newest attempt was reported"
    (row,) = osctl.json("diff", "--set", "stage1.seed=7")
    assert (row["field"], row["now"]) == ("stage.seed", 7)
