"""The same three stages with the store on a real S3 server and MLflow behind a real server, which is down while they train."""

from __future__ import annotations

import contextlib
import os
import socket
import sqlite3
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from bad_servers import Trouble, troubled
from tiny_recipe import STAGES, Osctl, write

from orchestrator.adapters import mlflow_ui, open_store
from orchestrator.adapters.tracking import FIRST_ANSWER_S
from orchestrator.ledger import Ledger

pytestmark = pytest.mark.long

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")


@pytest.fixture(scope="module")
def on_a_folder(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    osctl = Osctl(write(tmp_path_factory.mktemp("folder")))
    osctl("launch")
    return osctl.digests()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def runs(url: str) -> list[dict[str, Any]]:
    from mlflow import MlflowClient

    client = MlflowClient(url)
    experiment = client.get_experiment_by_name("tiny")
    assert experiment is not None
    found = client.search_runs([experiment.experiment_id])
    return [{"name": run.info.run_name, "status": run.info.status, "tags": run.data.tags, "metrics": run.data.metrics} for run in found]


def test_on_s3_with_mlflow_away_the_result_is_the_same_and_sync_catches_up(s3: Any, on_a_folder: dict[str, str], tmp_path: Path) -> None:
    port = free_port()
    tracking = f"http://127.0.0.1:{port}"
    osctl = Osctl(write(tmp_path / "run", store=s3.url("three-stages"), tracking=tracking), env=s3.env)

    said = osctl("launch").stderr
    assert "osctl sync" in said, "MLflow was away, and the launch says how to mend that"
    assert osctl.digests() == on_a_folder, "the same weights, wherever the checkpoints lie"
    assert {line["verdict"] for line in osctl.json("lineage", "--verify")} == {"verified"}
    away = osctl("sync", expect=5).stderr
    assert tracking in away

    with (tmp_path / "server.log").open("ab") as log:
        url = f"sqlite:///{tmp_path}/mlflow.db"
        with mlflow_ui.running(mlflow_ui.start(url, tmp_path / "artifacts", port, log)) as server:
            server.wait_until_up()
            osctl("sync")
            first = runs(server.url)
            osctl("sync")
            assert len(runs(server.url)) == len(first) == 1 + 3 + 3, "pipeline, stages, attempts: nothing is doubled"
    stages = {run["name"]: run for run in first if run["tags"].get("osctl/kind") == "stage"}
    assert set(stages) == set(STAGES)
    for run in stages.values():
        assert run["status"] == "FINISHED" and run["metrics"]["usd"] > 0 and run["metrics"]["gpu_hours"] == 0
        assert run["metrics"]["loss"] > 0


@pytest.mark.parametrize("trouble", ["hangs", "fails"])
def test_a_launch_ends_as_soon_without_its_mlflow_and_says_once_what_to_do(tmp_path: Path, trouble: Trouble) -> None:
    """Between the last word in the ledger and the end of the command lies what the follower takes to give up."""
    with troubled(trouble) as tracking:
        osctl = Osctl(write(tmp_path / "run", tracking=tracking, devices=1, stages=1))
        said = osctl("launch").stderr
        left = time.time()
        assert said.count("osctl sync") == 1 and tracking in said
        ledger = Ledger(open_store(str(tmp_path / "run" / ".osctl" / "store")), "tiny")
        assert left - max(event.time for event in ledger.events()) < 8.0
        began = time.monotonic()
        assert tracking in osctl("sync", expect=5).stderr
        assert time.monotonic() - began < FIRST_ANSWER_S + 20
    assert set(osctl.digests()) == {"stage1"}


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


def test_runs_of_a_killed_launch_end_by_themselves_and_go_on_with_the_next(tmp_path: Path) -> None:
    """SIGKILL for the launcher: its follower stays until silence has told the end, and `sync` is not needed."""
    steps = {"steps": 400, "checkpoint": {"every_steps": 100}}
    osctl = Osctl(write(tmp_path / "run", tracking="sqlite", devices=1, stages=1, changes=steps))
    database = tmp_path / "run" / ".osctl" / "mlflow.db"
    launcher = osctl.start("launch")
    until(lambda: statuses(database).get("stage1 a1") == "RUNNING", "MLflow shows the attempt")
    (follower,) = [child for child in psutil.Process(launcher.pid).children() if "orchestrator.projection" in child.cmdline()]
    launcher.kill()
    launcher.wait()
    until(lambda: not follower.is_running(), "the follower leaves")
    assert statuses(database) == dict.fromkeys(("tiny", "stage1", "stage1 a1"), "KILLED")
    osctl("launch")
    assert statuses(database) == {"tiny": "FINISHED", "stage1": "FINISHED", "stage1 a1": "KILLED", "stage1 a2": "FINISHED"}
