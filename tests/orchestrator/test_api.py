"""Laws of the Python API, on real agents with a stand-in for the trainer: what a notebook gets, from threads and from an event loop."""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import shutil
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from live_attempts import STAND_IN
from tiny_recipe import Osctl, write

from orchestrator.api import Launch, Pipeline, Result
from orchestrator.errors import CorruptCheckpoint, Refused, UsageError

PLAIN = (str, int, float, bool, type(None))


def recipe(folder: Path, name: str, *, stages: int = 2, steps: int = 20, step_ms: int = 1) -> Path:
    trainer = [sys.executable, STAND_IN, "{run_dir}", "{devices}", "--step-ms", str(step_ms)]
    changes = {"steps": steps, "checkpoint": {"every_steps": 10, "keep_last": 2}}
    return write(folder / name, stages=stages, devices=1, changes=changes, trainer=trainer, name=name)


def load(folder: Path, name: str = "tiny", **more: Any) -> Pipeline:
    return Pipeline.load(folder / name, store=folder / "store", home=folder / "home", **more)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Pipeline, Result]:
    """A launch that has succeeded."""
    folder = tmp_path_factory.mktemp("api")
    recipe(folder, "tiny")
    pipeline = load(folder)
    return folder, pipeline, pipeline.launch(wait=True)


def process_state() -> tuple[Any, ...]:
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    return dict(os.environ), Path.cwd(), handlers, sys.stdout, sys.stderr, logging.getLogger().handlers[:], logging.getLogger().level


@pytest.mark.long
def test_a_launch_that_is_waited_for_returns_how_it_ended(done: tuple[Path, Pipeline, Result]) -> None:
    _, pipeline, result = done
    assert result.status == "succeeded" and [stage.state for stage in result.snapshot.stages] == ["committed", "committed"]
    assert pipeline.launch(wait=True).status == "succeeded", "repeating it does nothing twice"
    assert [len(stage.attempts) for stage in pipeline.status().stages] == [1, 1]


@pytest.mark.long
def test_every_call_leaves_the_process_as_it_was(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe(tmp_path, "tiny")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    before = process_state()
    pipeline = load(tmp_path, prices=None).override("stage1.steps=10", "stage2.steps=10")
    pipeline.plan()
    launch = pipeline.launch()
    list(pipeline.watch(0.1))
    launch.wait(60)
    pipeline.status(), pipeline.cost(verify=True), pipeline.compare(), pipeline.losses(), pipeline.lineage(verify=True), pipeline.cancel()
    pipeline.resume(wait=True)
    assert process_state() == before
    assert capfd.readouterr() == ("", "")
    assert not list(elsewhere.iterdir())


def test_the_api_imports_neither_what_draws_nor_what_parses_command_lines() -> None:
    code = "import sys, orchestrator.api; print([name for name in ('typer', 'rich', 'torch', 'mlflow', 'boto3') if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


@pytest.mark.long
def test_rows_are_plain_and_say_the_same_as_osctl(done: tuple[Path, Pipeline, Result]) -> None:
    folder, pipeline, result = done
    osctl = Osctl(folder / "tiny", env={"OSCTL_STORE": str(folder / "store"), "OSCTL_HOME": str(folder / "home")})
    for ours, theirs in ((pipeline.compare(), osctl.json("compare")), (pipeline.cost(by_attempt=True), osctl.json("cost", "--by-attempt"))):
        assert all(isinstance(value, PLAIN) for row in ours for value in row.values())
        assert [row["usd"] for row in ours] == [float(row["usd"]) for row in theirs]
        assert [row["device_seconds_step"] for row in ours] == [row["device_seconds"]["step"] for row in theirs]
    total = sum(row["usd"] for row in pipeline.cost())
    assert total == pytest.approx(float(result.snapshot.usd)) and total > 0
    assert [row["verdict"] for row in pipeline.lineage(verify=True)] == ["verified", "verified"]
    assert osctl.json("status")["state"] == pipeline.status().state == "succeeded"


def test_losses_have_every_step_and_grow_with_the_bill(done: tuple[Path, Pipeline, Result]) -> None:
    _, pipeline, result = done
    rows = pipeline.losses()
    assert [row["step"] for row in rows] == [*range(1, 21), *range(1, 21)]
    dollars = [row["usd"] for row in rows]
    assert dollars == sorted(dollars) and dollars[0] > 0 and Decimal(dollars[-1]) <= result.snapshot.usd


def test_an_override_is_another_pipeline(tmp_path: Path) -> None:
    recipe(tmp_path, "tiny")
    pipeline = load(tmp_path)
    other = pipeline.override("stage2.steps=1000").override("name=other")
    assert (pipeline.name, other.name, pipeline.stages) == ("tiny", "other", ("stage1", "stage2"))
    assert [row.steps for row in pipeline.plan().rows] == [20, 20] and [row.steps for row in other.plan().rows] == [20, 1000]
    with pytest.raises(UsageError, match="no stage or field 'stage9'"):
        pipeline.override("stage9.steps=1")


def test_what_is_read_at_the_load_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe(tmp_path, "tiny")
    monkeypatch.chdir(tmp_path)
    pipeline = Pipeline.load("tiny", env={"OSCTL_STORE": "runs", "OSCTL_HOME": "local"})
    monkeypatch.chdir(tmp_path.parent)
    assert pipeline.store == str(tmp_path / "runs")
    monkeypatch.setenv("OSCTL_STORE", "elsewhere")
    assert pipeline.override("stage1.steps=3").store == str(tmp_path / "runs")


@pytest.mark.long
@pytest.mark.timeout(200)
def test_two_pipelines_are_launched_from_two_threads_at_once(tmp_path: Path) -> None:
    """Each with another environment and another home: nothing of one reaches the other."""
    names = ("left", "right")
    for name in names:
        recipe(tmp_path, name, stages=1)
    together = threading.Barrier(2)

    def train(name: str) -> Result:
        pipeline = Pipeline.load(
            tmp_path / name, env={**os.environ, "OSCTL_STORE": str(tmp_path / f"{name} store")}, home=tmp_path / f"{name} home"
        )
        together.wait(30)
        return pipeline.launch(wait=True)

    with ThreadPoolExecutor(2) as threads:
        results = list(threads.map(train, names))
    assert [(result.snapshot.name, result.status) for result in results] == [("left", "succeeded"), ("right", "succeeded")]
    for name in names:
        assert [path.name for path in (tmp_path / f"{name} store").iterdir() if not path.name.startswith(".")] == [name]
        assert [path.name.partition("_")[0] for path in (tmp_path / f"{name} home" / "runs").iterdir()] == [name]


@pytest.mark.timeout(200)
def test_an_event_loop_goes_on_while_its_executor_launches_and_looks(tmp_path: Path) -> None:
    recipe(tmp_path, "tiny", stages=1)
    pipeline = load(tmp_path)

    async def train() -> tuple[str, int]:
        launched = asyncio.create_task(asyncio.to_thread(pipeline.launch, wait=True))
        turns = 0
        while not launched.done():
            await asyncio.gather(asyncio.sleep(0.02), asyncio.to_thread(pipeline.compare))
            turns += 1
        return (await launched).status, turns

    status, turns = asyncio.run(train())
    assert status == "succeeded" and turns > 2


@pytest.mark.long
@pytest.mark.timeout(200)
def test_a_launch_is_watched_cancelled_and_resumed(tmp_path: Path) -> None:
    recipe(tmp_path, "tiny", stages=1, steps=1500, step_ms=5)
    pipeline = load(tmp_path)
    launch = pipeline.launch()
    assert isinstance(launch, Launch) and str(launch.driver).startswith("process ")
    assert pipeline.status().state == "running", "it has begun when the call returns"
    with pytest.raises(Refused, match="is driven by"):
        pipeline.launch()
    with pytest.raises(TimeoutError, match="has not ended after 0 s"):
        launch.wait(0)
    seen, asked = [], ""
    for snapshot in pipeline.watch(0.05):
        seen.append(snapshot)
        if snapshot.stages[0].step > 0 and not asked:
            asked = pipeline.cancel()
    assert "to save and stop" in asked
    assert seen[0].state == "running" and seen[-1].state == "cancelled"
    assert all(one != other for one, other in itertools.pairwise(seen))
    assert launch.wait(60).status == "cancelled"
    assert "nobody drives it" in pipeline.cancel()
    assert 0 < pipeline.status().stages[0].step < 1500
    result = pipeline.resume(wait=True)
    assert result.status == "succeeded" and len(result.snapshot.stages[0].attempts) == 2


@pytest.mark.long
@pytest.mark.timeout(200)
def test_a_driver_goes_on_when_the_process_that_started_it_ends(tmp_path: Path) -> None:
    recipe(tmp_path, "tiny", stages=1, steps=200, step_ms=5)
    code = (
        "import sys; from pathlib import Path; from orchestrator.api import Pipeline; folder = Path(sys.argv[1])\n"
        "Pipeline.load(folder / 'tiny', store=folder / 'store', home=folder / 'home').launch()"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, timeout=120)
    snapshots = list(load(tmp_path).watch(0.1))
    assert snapshots[0].state == "running" and snapshots[-1].state == "succeeded"


def test_a_launch_that_is_refused_raises_and_leaves_nothing(tmp_path: Path) -> None:
    recipe(tmp_path, "tiny")
    pipeline = load(tmp_path)
    with pytest.raises(Refused, match="budget"):
        pipeline.override("budget_usd=1e-12").launch()
    with pytest.raises(UsageError, match="no such stage"):
        pipeline.launch("stage9")
    with pytest.raises(Refused, match="never launched"):
        pipeline.resume()
    assert pipeline.status().state == "pending" and not list((tmp_path / "store").glob("tiny/*"))
    with pytest.raises(UsageError, match="no such file"):
        Pipeline.load(tmp_path / "nothing here")


def test_a_pipeline_is_found_by_its_name_and_not_launched_without_its_recipe(done: tuple[Path, Pipeline, Result]) -> None:
    folder, _, result = done
    by_name = Pipeline.load("tiny", store=folder / "store", home=folder / "home", env={})
    assert by_name.status().usd == result.snapshot.usd
    with pytest.raises(UsageError, match="no recipe of that name"):
        by_name.launch()


def test_one_wrong_byte_raises_unless_the_rows_are_asked_for(done: tuple[Path, Pipeline, Result], tmp_path: Path) -> None:
    folder, _, _ = done
    shutil.copytree(folder / "store", tmp_path / "store", symlinks=True)
    shutil.copytree(folder / "tiny", tmp_path / "tiny")
    pipeline = load(tmp_path)
    for file in (tmp_path / "store").glob("tiny/stages/stage2@*/**/*.safetensors"):
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.unlink()
        file.write_bytes(content)
    with pytest.raises(CorruptCheckpoint, match="Do not train on it"):
        pipeline.lineage(verify=True)
    verdicts = [row["verdict"] for row in pipeline.lineage(verify=True, check=False)]
    assert "verified" in verdicts and len(set(verdicts)) == 2
