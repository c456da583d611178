from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gang
import pytest
from training_runs import assert_same_state, in_process, metrics, result

from opensora.checkpoint import reader as checkpoint
from opensora.config import StageConfig
from opensora.training.run_directory import RunDirectory

Stages = Callable[..., StageConfig]
Runs = Callable[..., RunDirectory]
VIDEO = {"frames": 4}


def wait_until(condition: Callable[[], bool], seconds: float = 240) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.02)


def heartbeat(run: RunDirectory, rank: int) -> dict[str, Any]:
    path = run.path / f"heartbeat-{rank}.json"
    return json.loads(path.read_text()) if path.exists() else {"phase": None, "step": 0}


@pytest.mark.long
@pytest.mark.parametrize("parallel", [{}, {"strategy": "fsdp"}, {"sequence": 2}], ids=["ddp", "fsdp", "sequence"])
def test_two_ranks_drain_and_resume_bitwise(parallel: dict[str, Any], tiny_stage: Stages, make_run: Runs) -> None:
    """Ranks as torchrun starts them; test_torchrun.py starts them by torchrun itself."""
    stage = tiny_stage(data=VIDEO, steps=4, evaluate={"kind": "digits", "clips": 10, "frames": 4}, parallel=parallel)
    unbroken = make_run(stage)
    gang.run(2, "-m", "opensora.train", str(unbroken.path))
    assert result(unbroken)["evaluation"]["clips"] == 10
    record = checkpoint.read(checkpoint.directory(unbroken.checkpoints, 4))[0]
    assert (record.world_size, record.seen) == (2, (4 * 4 * (1 if "sequence" in parallel else 2),))

    drained = make_run(stage, resume=checkpoint.directory(unbroken.checkpoints, 2))
    (drained.path / "drain").touch()
    gang.run(2, "-m", "opensora.train", str(drained.path))
    assert (result(drained)["status"], result(drained)["step"]) == ("drained", 3)
    assert_same_state(checkpoint.directory(unbroken.checkpoints, 3), checkpoint.directory(drained.checkpoints, 3))

    alone = make_run(tiny_stage(data=VIDEO, steps=4))
    in_process(alone)
    losses = [[line["loss"] for line in metrics(run) if "step" in line] for run in (unbroken, alone)]
    together = losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert together == ("sequence" in parallel)  # ranks that share clips are one; other ranks have clips and noise of their own


@pytest.mark.long
def test_a_stage_goes_on_under_another_strategy(tiny_stage: Stages, make_run: Runs) -> None:
    unbroken = make_run(tiny_stage(data=VIDEO, parallel={"strategy": "fsdp"}))
    gang.run(2, "-m", "opensora.train", str(unbroken.path))
    other = make_run(tiny_stage(data=VIDEO), resume=checkpoint.directory(unbroken.checkpoints, 2))
    gang.run(2, "-m", "opensora.train", str(other.path))
    ours, theirs = ({line["step"]: line["loss"] for line in metrics(run) if "step" in line} for run in (other, unbroken))
    assert list(ours) == [3, 4]
    assert [ours[3], ours[4]] == pytest.approx([theirs[3], theirs[4]], rel=1e-4)


def began_with(change: str, run: RunDirectory) -> gang.Rank:
    """A trainer of one process, which this line of Python has prepared."""
    code = (
        f"import os, runpy, signal, sys\n{change}\nsys.argv[1:] = [{str(run.path)!r}]\nrunpy.run_module('opensora.train', None, '__main__')"
    )
    (rank,) = gang.start(1, "-c", code)
    return rank


@pytest.mark.long
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_drains(tiny_stage: Stages, make_run: Runs, number: signal.Signals) -> None:
    run = make_run(tiny_stage(steps=1_000_000, checkpoint={"every_steps": 1_000_000}))
    # A test run under nohup ignores SIGHUP, and so would the trainer.
    process = began_with(f"signal.signal(signal.{number.name}, signal.SIG_DFL)", run)
    try:
        wait_until(lambda: heartbeat(run, 0)["phase"] == "train")
        os.kill(process.pid, number)
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.communicate()
    assert result(run)["status"] == "drained"
    step = result(run)["step"]
    assert checkpoint.read(checkpoint.directory(run.checkpoints, step))[0].step == step


@pytest.mark.long
def test_a_hangup_that_was_ignored_at_the_start_stays_so(tiny_stage: Stages, make_run: Runs) -> None:
    run = make_run(tiny_stage(steps=1_000_000, checkpoint={"every_steps": 1_000_000}))
    process = began_with("signal.signal(signal.SIGHUP, signal.SIG_IGN)", run)  # as nohup starts it
    try:
        wait_until(lambda: heartbeat(run, 0)["phase"] == "train")
        os.kill(process.pid, signal.SIGHUP)
        step = heartbeat(run, 0)["step"]
        wait_until(lambda: heartbeat(run, 0)["step"] > step + 5)
        os.kill(process.pid, signal.SIGTERM)
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.communicate()


@pytest.mark.long
def test_an_output_that_takes_no_word_ends_nothing(tiny_stage: Stages, make_run: Runs) -> None:
    """A disk that is full, for the log alone. A process that Python starts: its last words are written as the interpreter leaves."""
    run = make_run(tiny_stage(steps=2))
    with Path("/dev/full").open("w") as full:
        done = subprocess.run([sys.executable, "-m", "opensora.train", str(run.path)], stdout=full, stderr=full, check=False)
    assert (done.returncode, result(run)["status"]) == (0, "completed")
