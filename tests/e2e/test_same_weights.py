"""Three real stages, unbroken on a real S3 server while MLflow is away, and in a folder with one trouble after the other: the same weights.

Hundreds of moments are tried with the stand-in trainer in test_crashes.py; here it is the real one's turn at a handful, and
test_rank_kills.py goes on with four ranks.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from proofs import Proof
from tiny_recipe import FORKED, STAGES, Osctl, warm_trainer, write

from orchestrator.tracking import ui as mlflow_ui

pytestmark = [pytest.mark.long, pytest.mark.timeout(900)]

LONG: dict[str, Any] = {"steps": 80, "checkpoint": {"every_steps": 20, "keep_last": 2}}
LATE = 25
"""A step from which a kill loses more than two steps."""
PATIENCE_S = 120.0

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Weight digests of a launch that nothing befell."""
    osctl = Osctl(write(tmp_path_factory.mktemp("unbroken"), changes=LONG, trainer=warm_trainer()))
    osctl("launch", "-q")
    return osctl.digests()


def until(fact: Callable[[], Any], what: str) -> Any:
    deadline = time.monotonic() + PATIENCE_S
    while not (answer := fact()):
        assert time.monotonic() < deadline, f"{what}: not within {PATIENCE_S} s"
        time.sleep(0.01)
    return answer


# --- Another store, and no MLflow --------------------------------------------------------------------------------------------------


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


@pytest.mark.s3
def test_on_s3_with_mlflow_away_the_result_is_the_same_and_sync_catches_up(s3: Any, unbroken: dict[str, str], tmp_path: Path) -> None:
    port = free_port()
    tracking = f"http://127.0.0.1:{port}"
    folder = write(tmp_path / "run", changes=LONG, store=s3.url("three-stages"), tracking=tracking, trainer=warm_trainer())
    osctl = Osctl(folder, env=s3.env)

    said = osctl("launch").stderr
    assert "osctl sync" in said, "MLflow was away, and the launch says how to mend that"
    assert osctl.digests() == unbroken, "the same weights, wherever the checkpoints lie"
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


# --- kill -9 -----------------------------------------------------------------------------------------------------------------------


def commands(osctl: Osctl) -> Iterator[tuple[int, list[str]]]:
    """Pid and command line of every process that works in a run directory of this pipeline."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with suppress(FileNotFoundError, ProcessLookupError):
                words = (entry / "cmdline").read_text().split("\0")
                if any(word.startswith(f"{osctl.folder}/.osctl/runs") for word in words):
                    yield int(entry.name), words


def step_of(osctl: Osctl, stage: str, attempt: int, rank: int = 0) -> tuple[int, int]:
    """(step, pid) of a rank in an attempt of a stage; (0, 0) before it has spoken."""
    for path in osctl.folder.glob(f".osctl/runs/*{stage}*_a{attempt}/heartbeat-{rank}.json"):
        with suppress(FileNotFoundError, json.JSONDecodeError):
            beat = json.loads(path.read_text())
            return beat["step"], beat["pid"]
    return 0, 0


def trains(osctl: Osctl, stage: str, attempt: int) -> None:
    until(lambda: step_of(osctl, stage, attempt)[0] > LATE, f"attempt {attempt} of {stage} trains")


def told_who_drives_and_cancelled(osctl: Osctl, launcher: subprocess.Popen[bytes]) -> None:
    """By somebody who types `launch` beside a launch, and then `cancel`, which saves."""
    _, rank = step_of(osctl, "stage1", 2)
    os.kill(rank, signal.SIGSTOP)  # else the stage may be over before a busy machine has started the next command
    refused = osctl("launch", "stage1", expect=4)
    assert str(launcher.pid) in refused.stderr
    osctl("cancel")
    until(lambda: list(osctl.folder.glob(".osctl/runs/*stage1*_a2/drain")), "the agent passes it on")
    os.kill(rank, signal.SIGCONT)
    assert launcher.wait(PATIENCE_S) == 130
    (stage1, *_) = osctl.json("status")["stages"]
    assert stage1["attempts"][-1]["state"] == "drained" and LATE < stage1["attempts"][-1]["step"] < LONG["steps"]


def one_trouble_after_the_other(osctl: Osctl, unbroken: dict[str, str]) -> None:
    """Stage 1 loses a rank and is cancelled, stage 2 loses its agent, stage 3 its launcher; between them nothing but the printed way on."""
    launcher = osctl.start("launch", "-q")
    trains(osctl, "stage1", 1)
    os.kill(step_of(osctl, "stage1", 1, rank=1)[1], signal.SIGKILL)
    trains(osctl, "stage1", 2)
    told_who_drives_and_cancelled(osctl, launcher)
    launcher = osctl.start("resume", "-q")
    trains(osctl, "stage2", 1)
    (agent,) = (pid for pid, words in commands(osctl) if "orchestrator.agent" in words)
    os.kill(agent, signal.SIGKILL)
    trains(osctl, "stage3", 1)
    launcher.kill()
    launcher.wait(PATIENCE_S)
    until(lambda: not list(commands(osctl)), "nothing is left behind by a dead launcher")
    osctl("launch", "-q")

    assert osctl.digests() == unbroken
    assert {line["verdict"] for line in osctl.json("lineage", "--verify")} == {"verified"}
    assert not list(commands(osctl))
    bills = osctl.json("cost", "--by-attempt")  # refuses to print a bill that does not balance
    stages = {stage: [bill for bill in bills if bill["name"] == stage] for stage in STAGES}
    assert {stage: len(found) for stage, found in stages.items()} == {"stage1": 3, "stage2": 2, "stage3": 2}
    assert [bill["device_seconds"]["lost"] for bill in stages["stage1"]][1:] == [0, 0], "a drained attempt loses nothing"
    for stage, found in stages.items():
        paid_twice(stage, found)


def paid_twice(stage: str, bills: Sequence[dict[str, Any]]) -> None:
    """What was killed after step LATE and went on from the checkpoint before it is in the bill as paid twice."""
    first, *_, last = (bill["device_seconds"] for bill in bills)
    # An agent that lives books the redone steps as lost; one that was killed took its last piece of the journal along.
    twice = first["lost"] + (first["unaccounted"] if stage != "stage1" else 0)
    rest = LONG["steps"] - LONG["checkpoint"]["every_steps"]
    a_step = sum(bill["device_seconds"]["step"] for bill in bills[1:]) / rest
    assert twice > 2 * a_step, (stage, bills)
    assert last["lost"] == 0


def test_one_trouble_after_the_other_and_it_ends_with_the_same_weights(unbroken: dict[str, str], tmp_path: Path) -> None:
    one_trouble_after_the_other(Osctl(write(tmp_path / "run", changes=LONG, trainer=FORKED)), unbroken)


@pytest.mark.prove("kills-of-torchrun")
def test_one_trouble_after_the_other_under_plain_torchrun(unbroken: dict[str, str], tmp_path: Path, proof: Proof) -> None:
    one_trouble_after_the_other(Osctl(write(tmp_path / "run", changes=LONG)), unbroken)
    proof.count(4)
