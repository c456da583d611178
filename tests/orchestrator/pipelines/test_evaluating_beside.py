"""Laws of the process beside a driver: it says why it failed, and ends with its driver. tests/e2e/test_readme.py has one that succeeds."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil

from orchestrator.pipelines.evaluating_beside import BesideDriver
from orchestrator.pipelines.host import Host

DRIVER = """
import sys, time
from pathlib import Path
from orchestrator.pipelines.evaluating_beside import BesideDriver
from orchestrator.pipelines.host import Host
beside = BesideDriver("none", sys.argv[1], Host.here(home=Path(sys.argv[2])))
beside.start("stage1", "0a", yields=True)
(process,) = beside._processes.values()
print(process.pid, flush=True)
time.sleep(600)
"""


def test_a_failure_is_told_with_its_reason_and_not_tried_twice(tmp_path: Path) -> None:
    beside = BesideDriver("none", str(tmp_path / "store"), Host.here(home=tmp_path))
    assert beside.state("stage1", "0a") == ("absent", "")
    beside.start("stage1", "0a", yields=True)
    end = time.monotonic() + 120
    while (state := beside.state("stage1", "0a"))[0] == "running":
        assert time.monotonic() < end
        time.sleep(0.05)
    assert state[0] == "ended" and "no pipeline of that name" in state[1]
    beside.start("stage1", "0a", yields=True)
    assert beside.state("stage1", "0a") == state


def test_it_ends_when_its_driver_closes_or_is_killed(tmp_path: Path) -> None:
    beside = BesideDriver("none", str(tmp_path / "store"), Host.here(home=tmp_path))
    beside.start("stage1", "0a", yields=True)
    (process,) = beside._processes.values()
    beside.close()
    assert process.returncode == -signal.SIGKILL and not psutil.pid_exists(process.pid)

    words = [sys.executable, "-c", DRIVER, str(tmp_path / "store"), str(tmp_path)]
    driver = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)})
    assert driver.stdout is not None
    with driver.stdout as said:
        evaluation = psutil.Process(int(said.readline()))
    driver.kill()
    driver.wait()
    evaluation.wait(60)
