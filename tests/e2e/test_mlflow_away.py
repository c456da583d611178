"""Launches whose MLflow answers nobody, and launches that are killed while MLflow follows them."""

from __future__ import annotations

import contextlib
import os
import sqlite3
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
from bad_servers import Trouble, troubled
from live_attempts import STAND_IN
from tiny_recipe import Osctl, write

from orchestrator.ledger.store import Ledger
from orchestrator.stores import open_store
from orchestrator.tracking.client import FIRST_ANSWER_S

pytestmark = pytest.mark.long

NO_TORCH = [sys.executable, STAND_IN, "{run_dir}", "{devices}", "--step-ms", "20"]

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")


def statuses(database: Path) -> dict[str, str]:
    """Name and status of every run."""
    if not database.exists():
        return {}
    with contextlib.closing(sqlite3.connect(database)) as connection, contextlib.suppress(sqlite3.OperationalError):
        return dict(connection.execute("select name, status from runs").fetchall())
    return {}


def until(fact: Callable[[], Any], what: str, patience_s: float = 240.0) -> None:
    end = time.monotonic() + patience_s
    while not fact():
        assert time.monotonic() < end, what
        time.sleep(0.2)


@dataclass(frozen=True)
class Killed:
    """A launch that was killed in its first attempt, of which nobody has told MLflow yet."""

    osctl: Osctl
    follower: psutil.Process

    @property
    def database(self) -> Path:
        return self.osctl.folder / ".osctl" / "mlflow.db"


@pytest.fixture(scope="module", autouse=True)
def killed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Killed]:
    """Made before all tests of this file: its follower waits 30 s for a sign of life, and meanwhile the others have their turn."""
    steps = {"steps": 200, "checkpoint": {"every_steps": 50}}
    folder = write(tmp_path_factory.mktemp("killed"), tracking="sqlite", devices=1, stages=1, changes=steps, trainer=NO_TORCH)
    osctl = Osctl(folder)
    launcher = Osctl(folder, {"OSCTL_STAND_IN_FAIL": "hang@150"}).start("launch")  # else it may be over before MLflow shows it
    until(lambda: statuses(folder / ".osctl" / "mlflow.db").get("stage1 a1") == "RUNNING", "MLflow shows the attempt")
    (follower,) = [child for child in psutil.Process(launcher.pid).children() if "orchestrator.tracking" in child.cmdline()]
    launcher.kill()
    launcher.wait()
    yield Killed(osctl, follower)
    with contextlib.suppress(psutil.NoSuchProcess):
        follower.kill()


@pytest.mark.parametrize("trouble", ["hangs", "fails"])
def test_a_launch_ends_as_soon_without_its_mlflow_and_says_once_what_to_do(tmp_path: Path, trouble: Trouble) -> None:
    """Between the last word in the ledger and the end of the command lies what the follower takes to give up."""
    with troubled(trouble) as tracking:
        osctl = Osctl(write(tmp_path / "run", tracking=tracking, devices=1, stages=1, trainer=NO_TORCH))
        said = osctl("launch").stderr
        left = time.time()
        assert said.count("osctl sync") == 1 and tracking in said
        ledger = Ledger(open_store(str(tmp_path / "run" / ".osctl" / "store")), "tiny")
        assert left - max(event.time for event in ledger.events()) < 8.0
        began = time.monotonic()
        assert tracking in osctl("sync", expect=5).stderr
        assert time.monotonic() - began < FIRST_ANSWER_S + 20
    assert set(osctl.digests()) == {"stage1"}


def test_runs_of_a_killed_launch_end_by_themselves_and_go_on_with_the_next(killed: Killed) -> None:
    """SIGKILL for the launcher: its follower stays until silence has told the end, and `sync` is not needed."""
    until(lambda: not killed.follower.is_running(), "the follower leaves")
    assert statuses(killed.database) == dict.fromkeys(("tiny", "stage1", "stage1 a1"), "KILLED")
    killed.osctl("launch")
    assert statuses(killed.database) == {"tiny": "FINISHED", "stage1": "FINISHED", "stage1 a1": "KILLED", "stage1 a2": "FINISHED"}
