"""kill -9 of real processes while the real trainer runs under torchrun: a rank, the agent, the launcher. Then the same weights as unbroken.

Hundreds of moments are tried with the stand-in trainer in test_crashes.py; here it is the real one's turn at a handful.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from tiny_recipe import Osctl, write

pytestmark = pytest.mark.long

LONG: dict[str, Any] = {"steps": 150, "checkpoint": {"every_steps": 30, "keep_last": 2}}
PATIENCE_S = 120.0


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    osctl = Osctl(write(tmp_path_factory.mktemp("unbroken"), changes=LONG))
    osctl("launch", "-q")
    return osctl.digests()


def until(fact: Callable[[], Any], what: str) -> Any:
    deadline = time.monotonic() + PATIENCE_S
    while not (answer := fact()):
        assert time.monotonic() < deadline, f"{what}: not within {PATIENCE_S} s"
        time.sleep(0.01)
    return answer


def commands(osctl: Osctl) -> Iterator[tuple[int, list[str]]]:
    """Pid and command line of every process that works in a run directory of this pipeline."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with suppress(FileNotFoundError, ProcessLookupError):
                words = (entry / "cmdline").read_text().split("\0")
                if any(word.startswith(f"{osctl.folder}/.osctl/runs") for word in words):
                    yield int(entry.name), words


def step_of(osctl: Osctl, stage: str, rank: int = 0) -> tuple[int, int]:
    """(step, pid) of a rank in the newest attempt of a stage; (0, 0) before it has spoken."""
    found = (0, 0)
    for path in sorted(osctl.folder.glob(f".osctl/runs/*{stage}*/heartbeat-{rank}.json"), key=lambda path: path.parent.name):
        with suppress(FileNotFoundError, json.JSONDecodeError):
            beat = json.loads(path.read_text())
            found = beat["step"], beat["pid"]
    return found


def kill_rank(osctl: Osctl, launcher: subprocess.Popen[bytes]) -> None:
    os.kill(step_of(osctl, "stage1", rank=1)[1], signal.SIGKILL)


def kill_agent(osctl: Osctl, launcher: subprocess.Popen[bytes]) -> None:
    (agent,) = (pid for pid, words in commands(osctl) if "orchestrator.agent" in words)
    os.kill(agent, signal.SIGKILL)


def kill_launcher(osctl: Osctl, launcher: subprocess.Popen[bytes]) -> None:
    launcher.kill()


def test_killed_at_each_stage_it_ends_with_the_same_weights(unbroken: dict[str, str], tmp_path: Path) -> None:
    osctl = Osctl(write(tmp_path / "run", changes=LONG))
    launcher = osctl.start("launch", "-q")
    for stage, kill in (("stage1", kill_rank), ("stage2", kill_agent), ("stage3", kill_launcher)):
        until(lambda stage=stage: step_of(osctl, stage)[0] > 35, f"{stage} trains")
        kill(osctl, launcher)
    launcher.wait(PATIENCE_S)
    until(lambda: not list(commands(osctl)), "nothing is left behind by a dead launcher")
    osctl("launch", "-q")

    assert osctl.digests() == unbroken
    assert {line["verdict"] for line in osctl.json("lineage", "--verify")} == {"verified"}
    bills = osctl.json("cost", "--by-attempt")  # refuses to print a bill that does not balance
    attempts = {stage: [bill for bill in bills if bill["name"] == stage] for stage in unbroken}
    assert {stage: len(found) for stage, found in attempts.items()} == {"stage1": 2, "stage2": 2, "stage3": 2}
    for stage, found in attempts.items():
        first, second = (bill["device_seconds"] for bill in found)
        # An agent that lives books the redone steps as lost; one that was killed took its last piece of the journal along.
        paid_twice = first["lost"] + (first["unaccounted"] if stage != "stage1" else 0)
        a_step = second["step"] / (LONG["steps"] - LONG["checkpoint"]["every_steps"])
        assert paid_twice > 2 * a_step, "killed after step 35, resumed from 30: the bill says what was paid twice"
        assert second["lost"] == 0
    assert not list(commands(osctl))


def test_interrupted_once_it_saves_and_resume_ends_with_the_same_weights(unbroken: dict[str, str], tmp_path: Path) -> None:
    osctl = Osctl(write(tmp_path / "run", changes=LONG))
    launcher = osctl.start("launch", "stage1", "-q")
    until(lambda: step_of(osctl, "stage1")[0] > 35, "stage1 trains")
    launcher.send_signal(signal.SIGINT)
    assert launcher.wait(PATIENCE_S) == 130
    (stage1, *_) = osctl.json("status")["stages"]
    (attempt,) = stage1["attempts"]
    assert attempt["state"] == "drained" and 35 < attempt["step"] < 150
    osctl("launch", "stage1", "-q")
    assert osctl.digests() == {"stage1": unbroken["stage1"]}
    assert osctl.json("cost", "--by-attempt")[0]["device_seconds"]["lost"] == 0, "a drained attempt loses nothing"


def test_a_second_launcher_is_told_who_drives(unbroken: dict[str, str], tmp_path: Path) -> None:
    osctl = Osctl(write(tmp_path / "run", changes=LONG))
    first = osctl.start("launch", "stage1", "-q")
    _, rank = until(lambda: (seen := step_of(osctl, "stage1"))[0] > 0 and seen, "stage1 trains")
    os.kill(rank, signal.SIGSTOP)  # else the stage may be over before a busy machine has started the next command
    refused = osctl("launch", "stage1", expect=4)
    assert str(first.pid) in refused.stderr
    osctl("cancel")
    until(lambda: list(osctl.folder.glob(".osctl/runs/*stage1*/drain")), "the agent passes it on")
    os.kill(rank, signal.SIGCONT)
    assert first.wait(PATIENCE_S) == 130
    osctl("resume", "-q")
    assert osctl.digests() == unbroken, "resume goes on with what was launched: the whole pipeline"
