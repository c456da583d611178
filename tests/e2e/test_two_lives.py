"""One pipeline, two launches from two folders, and a launcher that stands still: never two trainers, and books that balance.

Real processes as in test_crashes.py. A machine that sleeps is a SIGSTOP; another host is another host name (a UTS namespace).
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from live_attempts import STAND_IN, stage_config, until
from tiny_recipe import OSCTL

from orchestrator.ledger.records import Outcome
from orchestrator.ledger.store import Ledger
from orchestrator.recipe.pipeline import Pipeline, Resources, Stage, StageSpec
from orchestrator.stores.folder import FolderStore

LAUNCH = str(Path(__file__).parent / "launch.py")
SILENT_S = 6.0


def pipeline(*, step_ms: float, steps: int) -> Pipeline:
    spec = StageSpec(name="stage1", config="x.yaml", resources=Resources(devices_per_node=2, device="cpu-core"), hang_timeout_s=120)
    return Pipeline(
        name="demo", backend="local", store="store", tracking="none", experiment="demo", budget_usd=None, flush_s=0.2,
        trainer=(sys.executable, STAND_IN, "{run_dir}", "{devices}", "--step-ms", str(step_ms)),
        stages=(Stage(spec=spec, config=stage_config(steps=steps, every_steps=5)),),
    )  # fmt: skip


class Two:
    """A store, folders `a` and `b` that launches are made from, and an eye on every trainer that lives."""

    def __init__(self, root: Path, *, step_ms: float = 20, steps: int = 150) -> None:
        self.root = root
        (root / "pipeline.json").write_text(pipeline(step_ms=step_ms, steps=steps).model_dump_json())
        self.ledger = Ledger(FolderStore(root / "store"), "demo")
        self.launchers: list[subprocess.Popen[str]] = []
        self.at_once = 0
        """Most attempts whose trainers lived at one moment."""
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._over.wait(0.01):
            self.at_once = max(self.at_once, len({run for run, _ in self.processes(trainers=True)}))

    def processes(self, *, trainers: bool) -> list[tuple[str, int]]:
        """(run directory, pid) of trainers with their ranks, or of agents."""
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                with suppress(FileNotFoundError, ProcessLookupError):
                    words = (entry / "cmdline").read_text().split("\0")
                    runs = [word for word in words if word.startswith(str(self.root)) and "/runs/" in word]
                    if runs and (STAND_IN in words) == trainers:
                        found.append((runs[0], int(entry.name)))
        return found

    def start(self, home: str, *arguments: str, host: str | None = None, agent: str = "") -> subprocess.Popen[str]:
        argv = [sys.executable, LAUNCH, str(self.root), "--ttl", "1", "--home", str(self.root / home), *arguments]
        argv += ["--agent", agent] if agent else []
        if host is not None:
            argv = ["unshare", "--uts", "sh", "-c", f'hostname {host}; exec "$@"', "sh", *argv]
        launcher = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
        self.launchers.append(launcher)
        return launcher

    def stand_still(self, launcher: subprocess.Popen[str]) -> None:
        """Beyond its lease."""
        until(lambda: list(self.root.glob("store/demo/stages/*/checkpoints/*/MANIFEST.json")), "a checkpoint")
        launcher.send_signal(signal.SIGSTOP)
        time.sleep(1.1)

    def is_waited_for(self, words: str = "lives elsewhere") -> None:
        """The second launch says what it waits for; the trainer stands still meanwhile, however long a busy machine takes to start one."""
        for _, pid in self.processes(trainers=True):
            os.kill(pid, signal.SIGSTOP)
        until(lambda: any(words in said for said in self.observed()), "the second says what it waits for")
        for _, pid in self.processes(trainers=True):
            os.kill(pid, signal.SIGCONT)

    def finish(self, launcher: subprocess.Popen[str], code: int = 0) -> tuple[dict[str, Any], str]:
        output, errors = launcher.communicate(timeout=90)
        assert launcher.returncode == code, (launcher.returncode, output, errors)
        return (json.loads(output) if output else {}), errors

    def outcomes(self) -> list[Outcome]:
        self.ledger = Ledger(FolderStore(self.root / "store"), "demo")
        (inputs_digest,) = self.ledger.inputs_of("stage1")
        found = [self.ledger.outcome("stage1", inputs_digest, number) for number in self.ledger.attempts("stage1", inputs_digest)]
        return [outcome for outcome in found if outcome is not None]

    def observed(self) -> list[str]:
        return [event.detail for event in self.ledger.events() if event.kind == "observed"]

    def check(self) -> None:
        """No two trainers at once, nothing left behind, and a bill that prints."""
        assert self.at_once == 1
        until(lambda: not self.processes(trainers=True) and not self.processes(trainers=False), "nothing is left behind", patience_s=5)
        bill = subprocess.run(
            [OSCTL, "cost", "-f", "demo", "--store", str(self.root / "store")], capture_output=True, text=True, cwd=self.root, timeout=60
        )
        assert bill.returncode == 0, bill.stderr

    def close(self) -> None:
        for launcher in self.launchers:
            launcher.kill()
            launcher.communicate()
        self._over.set()
        self._thread.join()


@pytest.fixture
def two(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Two]:
    """The parameter: steps of its stage."""
    opened = Two(tmp_path, steps=getattr(request, "param", 150))
    yield opened
    opened.close()


@pytest.fixture
def hosts(require: Callable[[str, str], None]) -> None:
    """Another host name can be had."""
    if os.getuid() or not shutil.which("unshare") or subprocess.run(["unshare", "--uts", "true"]).returncode:
        require("namespaces", "needs root and unshare")


def test_a_second_launch_waits_for_an_attempt_that_lives_and_a_launcher_that_wakes_up_ends_nothing(two: Two) -> None:
    first = two.start("a")
    two.stand_still(first)
    second = two.start("b")
    two.is_waited_for()
    first.send_signal(signal.SIGCONT)
    _, errors = two.finish(first, 4)
    assert "taken over" in errors
    result, _ = two.finish(second)
    assert result["status"] == "succeeded"
    (only,) = two.outcomes()
    assert (only.class_, only.epoch) == ("completed", 2), "the attempt went over to the second launch"
    (said,) = [said for said in two.observed() if "lives elsewhere" in said]
    assert os.uname().nodename in said and "since" in said
    two.check()


def test_an_attempt_whose_launcher_never_wakes_up_is_finished_and_committed_by_the_second(two: Two) -> None:
    first = two.start("a")
    two.stand_still(first)
    result, _ = two.finish(two.start("b"))
    assert result["status"] == "succeeded"
    assert [outcome.class_ for outcome in two.outcomes()] == ["completed"]
    two.check()


def test_a_dead_agent_of_this_host_is_seen_at_once(two: Two) -> None:
    first = two.start("a")
    two.stand_still(first)
    ((_, agent),) = two.processes(trainers=False)
    os.kill(agent, signal.SIGKILL)
    result, _ = two.finish(two.start("b"))
    assert result["status"] == "succeeded"
    lost, done = two.outcomes()
    assert (lost.class_, done.class_) == ("lost", "completed") and "which is dead" in lost.reason
    two.check()


def test_asked_to_stop_the_second_launch_has_the_attempt_elsewhere_save_and_leave(two: Two) -> None:
    first = two.start("a")
    two.stand_still(first)
    second = two.start("b")
    two.is_waited_for()
    second.send_signal(signal.SIGINT)
    result, _ = two.finish(second, 130)
    (only,) = two.outcomes()
    assert only.class_ == "drained" and only.step and f"from step {only.step}" in result["reason"]
    two.check()


def test_an_attempt_that_an_older_release_has_closed_ends_itself_and_publishes_nothing_more(two: Two) -> None:
    """Such a driver saw no run directory, and called the attempt lost."""
    first = two.start("a")
    two.stand_still(first)
    handle = two.ledger.acquire(time.time(), 30)
    (inputs_digest,) = two.ledger.inputs_of("stage1")
    intent = two.ledger.intent("stage1", inputs_digest, 1)
    assert intent is not None
    outcome = {"class": "lost", "exit_code": None, "reason": "vanished", "step": 5, "bound": intent.created, "ended": time.time()}
    two.ledger.write_outcome(intent, Outcome.model_validate(outcome | {"devices": 2, "unaccounted_s": 0, "epoch": handle.epoch}))
    until(lambda: not two.processes(trainers=True), "the trainer is ended", patience_s=5)
    published = sorted(two.root.glob("store/demo/stages/*/checkpoints/*/MANIFEST.json"))
    until(lambda: not two.processes(trainers=False), "the agent leaves")
    assert sorted(two.root.glob("store/demo/stages/*/checkpoints/*/MANIFEST.json")) == published
    handle.release()
    report = Ledger(FolderStore(two.root / "store"), "demo").report("stage1", inputs_digest, 1)
    assert report is not None and "has closed this attempt" in report.reason


@pytest.mark.usefixtures("hosts")
def test_an_attempt_of_another_host_is_lost_only_once_it_was_silent_for_long_enough(two: Two) -> None:
    first = two.start("a", host="laptop", agent=f"--silence {SILENT_S}")
    two.stand_still(first)
    second = two.start("b", host="desk")
    two.is_waited_for("laptop")
    time.sleep(1.0)
    ((_, agent),) = two.processes(trainers=False)
    os.kill(agent, signal.SIGKILL)
    died = time.time()
    result, _ = two.finish(second)
    assert result["status"] == "succeeded"
    lost, done = two.outcomes()
    assert (lost.class_, done.class_) == ("lost", "completed") and f"silent for {SILENT_S:g} s" in lost.reason
    (inputs_digest,) = two.ledger.inputs_of("stage1")
    second_attempt = two.ledger.intent("stage1", inputs_digest, 2)
    assert second_attempt is not None and second_attempt.created >= died + SILENT_S - 1.5, "signs of life before it died count"
    two.check()


@pytest.mark.parametrize("two", [500], indirect=True)
def test_an_agent_that_cannot_reach_the_store_is_gone_before_others_take_it_for_lost(two: Two) -> None:
    first = two.start("a", agent=f"--silence {SILENT_S}")
    two.stand_still(first)
    (two.root / "store").rename(two.root / "away")
    (two.root / "store").symlink_to(two.root / "store")  # every call fails, and nobody knows for how long
    began = time.monotonic()
    until(lambda: not two.processes(trainers=True), "the trainer is ended", patience_s=30)
    assert 0.5 * SILENT_S < time.monotonic() - began < SILENT_S
    (two.root / "store").unlink()
    (two.root / "away").rename(two.root / "store")
    first.send_signal(signal.SIGCONT)
    result, _ = two.finish(first)
    assert result["status"] == "succeeded"
    two.check()
