"""Nothing lies about afterwards: not among the temporary files, not beside what was made, and not after kills either."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from tiny_recipe import Osctl, write


@pytest.fixture(scope="module")
def osctl(tmp_path_factory: pytest.TempPathFactory) -> Osctl:
    """One recipe under plain torchrun, for the tests of this file one after the other."""
    home = tmp_path_factory.mktemp("home")
    temporary = home / "temporary"
    temporary.mkdir()
    folder = write(home / "recipe", devices=1, stages=1)
    return Osctl(folder, {"TMPDIR": str(temporary), "HOME": str(home)})


def lying_about(osctl: Osctl) -> list[str]:
    """Temporary files, and hidden ones beside what a person asked for."""
    assert osctl.env is not None
    hidden = [path.name for path in osctl.folder.iterdir() if path.name.startswith(".") and path.name != ".osctl"]
    return [path.name for path in Path(osctl.env["TMPDIR"]).iterdir()] + hidden


def killed(osctl: Osctl, command: tuple[str, ...], when: Callable[[], bool]) -> None:
    """The command and all below it, by SIGKILL, once `when` is true or it has ended."""
    process = osctl.start(*command)
    deadline = time.monotonic() + 120
    while process.poll() is None and not when() and time.monotonic() < deadline:
        time.sleep(0.01)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def partial_exports(osctl: Osctl) -> list[Path]:
    return [path for path in osctl.folder.iterdir() if path.name.endswith(".partial")]


@pytest.mark.long
def test_commands_leave_nothing_and_what_a_killed_one_left_goes_with_the_next(osctl: Osctl) -> None:
    """Encode, launch, export and sample, each of them killed and then typed again."""
    hidden = osctl.folder / ".osctl"
    killed(osctl, ("encode",), lambda: any(hidden.glob("latents/.*.partial")))
    osctl("encode")
    killed(osctl, ("launch", "-q", "--set", "stage1.steps=100000"), lambda: any((hidden / "runs").rglob("metrics.jsonl")))
    osctl("launch", "-q")
    for name in ("first", "a name of " + 60 * "x"):
        killed(osctl, ("export", name), lambda: bool(partial_exports(osctl)))
    left = len(partial_exports(osctl))
    osctl("export", "out")
    assert left > 0 and partial_exports(osctl) == []
    began = time.monotonic()
    killed(osctl, ("sample", "a digit 3 moving left", "--out", "three.mp4"), lambda: time.monotonic() > began + 1.5)
    osctl("sample", "a digit 3 moving left", "--out", "three.mp4")
    assert lying_about(osctl) == []
    asked_for = [".osctl", "launch.log", "osctl.yaml", "out", "stage1.yaml", "three.mp4", "three.mp4.json"]
    assert sorted(path.name for path in osctl.folder.iterdir()) == asked_for


@pytest.mark.long
def test_an_export_that_lives_is_left_alone(osctl: Osctl) -> None:
    osctl("launch", "-q")
    with osctl.start("export", "slow") as slow:
        while not partial_exports(osctl):
            assert slow.poll() is None
            time.sleep(0.005)
        os.killpg(slow.pid, signal.SIGSTOP)
        osctl("export", "quick")
        assert len(partial_exports(osctl)) == 1
        os.killpg(slow.pid, signal.SIGCONT)
        assert slow.wait(120) == 0
    same = subprocess.run(["diff", "-r", "slow", "quick"], cwd=osctl.folder, capture_output=True, text=True, check=False)
    assert same.returncode == 0, same.stdout
