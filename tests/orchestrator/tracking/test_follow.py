"""The process beside a launch: how long it stays, and what it says."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from shown_runs import killed_while_training, short, shown, statuses
from written_ledger import Writer

from orchestrator.errors import Unreachable
from orchestrator.ledger.lease import TTL_S
from orchestrator.recipe.prices import Prices
from orchestrator.tracking.client import MlflowTracker
from orchestrator.tracking.follow import Follower, Launch, Silence
from orchestrator.tracking.statuses import SILENT_S
from orchestrator.tracking.sync import Sync


class Script:
    """Plays MLflow's health, look by look, and records the pauses."""

    def __init__(self, health: str, launch_ends_at_look: int):
        self.health, self.ends, self.looks, self.pauses = health, launch_ends_at_look, 0, list[float]()
        self.lags: list[float] = []

    def update(self, lag: float) -> None:
        mark = self.health[min(self.looks, len(self.health) - 1)]
        self.looks += 1
        self.lags.append(lag)
        if mark == "-":
            raise Unreachable("MLflow http://there: no answer")

    def over(self) -> bool:
        return self.looks >= self.ends

    def follow(self) -> bool:
        return Follower(self.update, self.over, self.pauses.append, 5.0).follow()


def test_a_dead_mlflow_is_said_once_and_its_return_once(caplog: pytest.LogCaptureFixture) -> None:
    script = Script("+---+-+", launch_ends_at_look=6)
    assert script.follow()
    assert [record.getMessage() for record in caplog.records] == [
        "MLflow http://there: no answer", "MLflow is back, and up to date with the ledger", "MLflow http://there: no answer",
        "MLflow is back, and up to date with the ledger",
    ]  # fmt: skip
    assert script.pauses == [5.0, 1.0, 2.0, 4.0, 5.0, 1.0]


def test_the_last_look_is_whole_and_comes_after_the_end() -> None:
    script = Script("+", launch_ends_at_look=3)
    assert script.follow() and script.looks == 4
    assert script.lags == [Follower.LAG] * 3 + [0.0]


def test_a_mlflow_that_stays_dead_is_left_to_sync() -> None:
    script = Script("-", launch_ends_at_look=9)
    assert not script.follow()
    assert script.looks == 9 + Follower.LAST_TRIES
    assert max(script.pauses) <= Follower.BACKOFF_S and script.pauses[-2:] == [1.0, 2.0]


@pytest.mark.long
@pytest.mark.parametrize("waited_for", [False, True])
def test_the_follower_of_a_killed_launch_stays_until_silence_has_told_its_end(
    story: Writer, tracker: MlflowTracker, prices: Prices, waited_for: bool
) -> None:
    """A launcher that waits for it is not kept."""
    heard = killed_while_training(story)
    story.now = heard + TTL_S + 1
    sync = Sync(story.ledger, tracker, prices, story.clock)

    def rest(seconds: float) -> None:
        story.now += seconds

    assert Follower(sync.update, lambda: True, rest, 5.0, lambda: waited_for).follow()
    assert {status for status, _ in statuses(tracker).values()} == {"RUNNING" if waited_for else "KILLED"}
    assert story.now < heard + SILENT_S + 6


def test_a_launch_is_over_when_its_process_is_gone(story: Writer) -> None:
    process = subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE)
    launch = Launch(process.pid, list)
    assert not launch.over()
    assert process.stdin is not None
    process.stdin.close()
    while not launch.over():  # a zombie is gone, whether its parent has noticed or not
        time.sleep(0.01)
    process.wait()
    assert launch.over() and Launch(process.pid, list).over()


def test_a_launch_is_over_when_it_says_so_in_the_ledger(story: Writer) -> None:
    story.launch()
    story.end()  # an earlier launch, long before this process was started
    launch = Launch(os.getpid(), lambda: list(story.ledger.events()))
    assert not launch.over()
    story.now = time.time()
    story.launch()
    assert not launch.over()
    story.end()
    assert launch.over()


def tracking_process(home: Path, tracking: str, *more: str) -> subprocess.Popen[str]:
    command = [
        sys.executable,
        "-m",
        "orchestrator.tracking",
        "--store",
        str(home / "store"),
        "--pipeline",
        "demo",
        "--tracking",
        tracking,
    ]
    return subprocess.Popen(
        [*command, *more], env={**os.environ, "OSCTL_HOME": str(home)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=home
    )


@pytest.mark.long
def test_the_process_writes_into_osctl_home_and_is_quiet(story: Writer, home: Path) -> None:
    story.three_stages()
    process = tracking_process(home, "sqlite")
    out, err = process.communicate(timeout=120)
    assert (process.returncode, out, err) == (0, "", "")
    assert len(shown(home / "mlflow.db")) == 8
    assert not (home / "mlruns").exists()


def test_a_dead_server_is_noticed_and_named_in_one_line(story: Writer, home: Path) -> None:
    story.three_stages()
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))  # bound and never listening: connections are refused
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        process = tracking_process(home, address)
        _, err = process.communicate(timeout=120)
    assert process.returncode == 5
    lines = err.strip().splitlines()
    assert len(lines) == 1 and address in lines[0] and "osctl sync" in lines[0], err


@pytest.mark.long
def test_the_follower_outlives_its_launch_just_long_enough(story: Writer, home: Path) -> None:
    """The launcher is killed while stage 1 trains; what it left is shown, and that it is over."""
    story.launch()
    launcher = subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE)
    follower = tracking_process(home, "sqlite", "--follow-pid", str(launcher.pid), "--interval", "0.2")
    intent = story.begin("stage1")
    wait_for(lambda: len(shown(home / "mlflow.db")) == 3, follower)
    story.train(intent, 20)
    launcher.kill()
    launcher.wait()
    assert launcher.stdin is not None
    launcher.stdin.close()
    out, err = follower.communicate(timeout=60)
    assert (follower.returncode, out, err) == (0, "", "")
    runs = {short(key): run for key, run in shown(home / "mlflow.db").items()}
    assert max(step for _, step, _, _ in runs["stage1/a1"]["curve"]) == 20
    assert {run["status"] for run in runs.values()} == {"KILLED"}


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str], timeout_s: float = 120.0) -> None:
    end = time.monotonic() + timeout_s
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.05)


def test_a_server_is_left_once_it_has_owed_an_answer_for_its_time_since_the_launch_ended() -> None:
    tracker, silence = MlflowTracker("http://127.0.0.1:9"), Silence()
    tracker.waits = True
    assert silence.after(100.0, tracker, launch_is_over=False) == 0.0, "during the launch nobody waits for it"
    assert silence.after(3.0, tracker, launch_is_over=True) == 3.0 < Follower.LAST_ANSWER_S
    tracker.answers += 1
    assert silence.after(1.0, tracker, launch_is_over=True) == 0.0, "an answer pays all"
    tracker.waits = False
    assert silence.after(60.0, tracker, launch_is_over=True) == 0.0, "nothing was asked"
    tracker.waits = True
    silence.after(3.0, tracker, launch_is_over=True)
    assert silence.after(1.5, tracker, launch_is_over=True) > Follower.LAST_ANSWER_S
