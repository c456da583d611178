"""An agent that fails itself says so: in a report where it can, else by the last line of its log, which its driver shows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import gang
import pytest
import tiny_recipe
from live_attempts import Attempts

from opensora import last_resort
from orchestrator import modules
from orchestrator.driver.retries import classify

Breaks = Callable[[str], None]


@pytest.fixture
def breaks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Breaks:
    """Runs a line of Python at the start of each agent, and of nothing else: a fault that a real one cannot be made to have."""
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.setenv("PYTHONPATH", f"{folder}:{modules.ROOT}")

    def write(line: str) -> None:
        imports = "import os, sys; import orchestrator.agent.attempt as attempt, orchestrator.agent.start as start"
        lines = [f"    {imports}", "    def fail(*_, **__): raise RuntimeError('a fault of ours')", f"    {line}"]
        (folder / "sitecustomize.py").write_text("import sys\nif 'orchestrator.agent' in sys.orig_argv:\n" + "\n".join(lines) + "\n")

    return write


@pytest.fixture
def attempts(tmp_path: Path) -> Attempts:
    return Attempts(tmp_path)


@pytest.mark.parametrize("where", ["_stage_in", "_train", "_ended", "_deliver"])
def test_an_agent_that_fails_itself_reports_it_and_leaves_nothing_running(attempts: Attempts, breaks: Breaks, where: str) -> None:
    breaks(f"attempt.Attempt.{where} = fail")
    intent = attempts.intend()
    life, report = attempts.live(intent)
    assert (life.exit_code, report.class_) == (1, "code")
    assert report.reason.startswith("the agent itself failed: RuntimeError: a fault of ours (sitecustomize.py, line ")
    assert not attempts.left_behind(intent)


@pytest.mark.parametrize("line", ["start.begin = fail", "attempt.Attempt._report = fail"])
def test_the_last_line_of_an_agent_that_cannot_report_says_why(attempts: Attempts, breaks: Breaks, line: str) -> None:
    breaks(line)
    intent = attempts.intend()
    attempts.submit(intent)
    life = attempts.end(intent)
    assert life.exit_code == 1 and attempts.report(intent) is None
    ending = classify(None, life)
    assert (ending.class_, "RuntimeError: a fault of ours (sitecustomize.py" in ending.reason) == ("code", True)


def test_a_log_on_a_full_disk_ends_nothing(attempts: Attempts) -> None:
    intent = attempts.intend()
    attempts.run_dir(intent).mkdir(parents=True)
    (attempts.run_dir(intent) / "agent.log").symlink_to("/dev/full")
    life, report = attempts.live(intent)
    assert (life.exit_code, report.class_) == (0, "completed")


def test_a_full_disk_is_a_full_disk(attempts: Attempts, breaks: Breaks) -> None:
    breaks("start.begin = lambda *_, **__: (_ for _ in ()).throw(OSError(28, 'No space left on device'))")
    intent = attempts.intend()
    attempts.submit(intent)
    life = attempts.end(intent)
    assert (life.exit_code, classify(None, life).class_) == (70, "disk")


@pytest.mark.long
def test_what_an_agent_printed_that_left_without_a_report_stands_in_the_error_and_in_the_logs(tmp_path: Path, breaks: Breaks) -> None:
    breaks("sys.stderr.write('some library says: libfoo.so.7 is not there\\n'); os._exit(1)")
    osctl = tiny_recipe.Osctl(tiny_recipe.write(tmp_path / "mine", stages=1, devices=1))
    said = osctl("launch", "-q", expect=3).stderr
    assert "no report: some library says: libfoo.so.7 is not there" in said
    shown = osctl("logs", "stage1", "--attempt", "1").stdout
    assert "the agent left without a report" in shown and "libfoo.so.7 is not there" in shown


@pytest.mark.long
@pytest.mark.parametrize("module", ["encode", "sample", "export"])
def test_a_command_of_the_trainer_ends_in_one_line_whatever_happens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str) -> None:
    words = {"encode": ["x.yaml", "cache"], "sample": ["x", "--prompt=a", "--out=x.mp4"], "export": ["x", "y"]}[module]
    (tmp_path / "x").mkdir()
    (tmp_path / "x/CHECKPOINT.json").write_text("{}")  # a model that is looked into
    code = f"import runpy, sys, opensora.checkpoint.reader as one, opensora.training.run_directory as other\nsys.argv = {['x', *words]!r}\n"
    code += "def fail(*_, **__): 1 / 0\none.read = other.stage_of = fail\n"
    code += f"runpy.run_module('opensora.{module}', run_name='__main__')"
    monkeypatch.delenv(last_resort.VARIABLE, raising=False)
    monkeypatch.chdir(tmp_path)
    (process,) = gang.start(1, "-c", code)
    said = process.communicate(60)
    *_, last = said.splitlines()
    assert process.returncode == last_resort.FAULT and "Traceback" not in said, said
    assert last.startswith(f"error: {module}: ZeroDivisionError: division by zero (") and last_resort.VARIABLE in last
    (process,) = gang.start(1, "-c", code, env={last_resort.VARIABLE: "1"})
    assert "Traceback" in process.communicate(60)
