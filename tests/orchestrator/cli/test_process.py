"""Laws of a process of `osctl`: whatever its console, its streams, its folder and its signals are, it ends with one line and a code."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import pytest
from live_attempts import until
from tiny_recipe import OSCTL, write

from orchestrator.cli.process import INTERNAL

FAULTY = """
import sys
from orchestrator import cli
from orchestrator.cli.commands import app
def plan(): raise KeyError("nobody thought of it, password=hunter2hunter2")
app.registered_commands[:] = []
app.command("plan")(plan)
app.command("other")(plan)
sys.argv = ["osctl", "plan"]
cli.main()
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write(tmp_path / "recipe", stages=1)


def shell(command: str, folder: Path, env: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[bytes]:
    done = subprocess.run(["bash", "-c", command], cwd=folder, env={**os.environ, **(env or {})}, capture_output=True, timeout=120)
    assert b"Traceback" not in done.stdout + done.stderr and b"Exception ignored" not in done.stderr, done.stderr.decode()
    return done


CONSOLES = {
    "C": {"LC_ALL": "C"},
    "C, and nothing coerced": {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"},
    "POSIX": {"LC_ALL": "POSIX"},
    "ascii": {"PYTHONIOENCODING": "ascii"},
    "latin-1": {"PYTHONIOENCODING": "latin-1"},
    "cp1252": {"PYTHONIOENCODING": "cp1252:strict"},
    "dumb": {"TERM": "dumb"},
    "no term": {"TERM": ""},
    "no columns": {"COLUMNS": "0"},
    "odd columns": {"COLUMNS": "abc", "LINES": "-1"},
    "many columns": {"COLUMNS": "100000"},
}


@pytest.mark.parametrize("commands", [("status",), pytest.param(("plan --set name=ä", "--help"), marks=pytest.mark.prove("consoles"))])
@pytest.mark.parametrize("console", CONSOLES)
def test_a_console_without_our_letters_shows_others(console: str, commands: tuple[str, ...], folder: Path) -> None:
    (folder / "stage1.yaml").write_text((folder / "stage1.yaml").read_text().replace("a digit 3 moving left", "über 箱"))
    for command in commands:
        done = shell(f"'{OSCTL}' {command}", folder, CONSOLES[console])
        assert done.returncode == (2 if "ä" in command else 0), done.stderr
        assert done.stdout or done.stderr


def test_letters_that_a_console_lacks_are_not_lost(folder: Path) -> None:
    done = shell(f"'{OSCTL}' status --store 'größe'", folder, {"PYTHONIOENCODING": "ascii"})
    assert b"stage1" in done.stdout and done.stdout.isascii()
    done = shell(f"'{OSCTL}' plan -f 'größe'", folder, {"PYTHONIOENCODING": "ascii"})
    assert rb"gr\xf6\xdfe" in done.stderr


STREAMS = [
    "status",
    *(pytest.param(words, marks=pytest.mark.prove("streams")) for words in ("list", "--help", "status -o json", "explain stage")),
]


@pytest.mark.parametrize("command", ["--help", "list", "status -o json", "explain stage"])
def test_a_stdout_that_takes_nothing_is_said(command: str, folder: Path) -> None:
    full = shell(f"'{OSCTL}' {command} >/dev/full", folder)
    assert full.returncode == 1 and b"error: stdout: No space left on device" in full.stderr


@pytest.mark.long
@pytest.mark.parametrize("command", STREAMS)
def test_a_stdout_that_takes_nothing_is_said_and_a_closed_one_is_nobodys(command: str, folder: Path) -> None:
    full = shell(f"'{OSCTL}' {command} >/dev/full", folder)
    assert full.returncode == 1 and b"error: stdout: No space left on device" in full.stderr
    assert shell(f"'{OSCTL}' {command} >&-", folder).returncode == 0
    assert shell(f"'{OSCTL}' {command} 2>&-", folder).returncode == 0
    assert shell(f"'{OSCTL}' {command} 2>/dev/full", folder).returncode == 0
    assert shell(f"'{OSCTL}' {command} <&- >&- 2>&-", folder).returncode == 0
    assert shell(f"set -o pipefail; '{OSCTL}' {command} | head -c 1", folder).returncode == 0


def test_a_folder_that_is_gone_is_said(tmp_path: Path) -> None:
    done = shell(f"mkdir gone; cd gone; rmdir ../gone; '{OSCTL}' status", tmp_path)
    assert done.returncode == 2 and done.stderr.startswith(b"error: the working folder: ") and done.stderr.count(b"\n") == 1


@pytest.mark.parametrize("command", ["init file", "init /proc/x", "plan -f {long}", "launch --dry-run --data {long}", "status {long}"])
def test_a_place_that_cannot_be_is_a_mistake_of_the_command(command: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    done = shell(f"'{OSCTL}' {command.format(long='n' * 5000)}", tmp_path)
    assert done.returncode == 2 and done.stderr.startswith(b"error: ") and len(done.stderr) < 600, done.stderr


@pytest.mark.parametrize("home", ["unset", "/nonexistent", "/proc", ""])
def test_no_home_is_needed(home: str, folder: Path) -> None:
    done = shell(f"{'unset HOME;' if home == 'unset' else f'export HOME={home};'} '{OSCTL}' status", folder)
    assert done.returncode == 0


@pytest.mark.long
def test_a_home_that_nobody_knows_is_no_traceback(folder: Path) -> None:
    for command in ("launch --dry-run --data '~nobody-here/clips'", "status --store '~nobody-here/x'", "data register x '~nobody-here/x'"):
        assert shell(f"'{OSCTL}' {command}", folder).returncode in (0, 2, 4)


def test_links_in_a_circle_are_no_store(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    assert shell(f"'{OSCTL}' status", tmp_path, {"OSCTL_STORE": "loop"}).returncode == 2


@pytest.mark.long
def test_a_file_is_no_store(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for command in ("status --store file", "list --store file", "launch -q --store file", "launch -q --store file/x"):
        done = shell(f"'{OSCTL}' {command}", tmp_path)
        assert done.returncode == 2 and b"/file is a file, and" in done.stderr, done.stderr.decode()
    done = shell(f"'{OSCTL}' launch -q", tmp_path, {"OSCTL_HOME": "file"})
    assert done.returncode == 2 and b"/file is a file, and" in done.stderr, done.stderr.decode()


@pytest.mark.parametrize("place", ["http://127.0.0.1:9/clips", "http://127.0.0.1:9/clips/captions.csv", "s3://bkt/clips"])
def test_a_server_that_does_not_answer_is_no_folder_without_captions(place: str, folder: Path) -> None:
    done = shell(f"'{OSCTL}' launch --dry-run --data {place}", folder, {"AWS_ENDPOINT_URL": "http://127.0.0.1:9", "AWS_MAX_ATTEMPTS": "1"})
    assert done.returncode == 5 and b"does not answer" in done.stderr, done.stderr.decode()


@pytest.mark.parametrize("value", ["soon", "nan", "inf", "-1"])
def test_a_number_in_a_variable_is_one(value: str, folder: Path) -> None:
    done = shell(f"'{OSCTL}' status --store s3://bkt/x", folder, {"OSCTL_S3_PATIENCE_S": value})
    assert done.returncode == 2 and b"OSCTL_S3_PATIENCE_S" in done.stderr


def test_a_fault_of_ours_is_one_line_and_its_traceback_a_file(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", FAULTY], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == INTERNAL and len(done.stderr.splitlines()) == 1, done.stderr
    assert done.stderr.startswith("error: internal: KeyError: ") and "Traceback" not in done.stderr
    (kept,) = tmp_path.glob(".osctl/log/internal-*.txt")
    assert str(kept) in done.stderr and "Traceback" in kept.read_text()
    assert "hunter2" not in done.stderr + kept.read_text()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_command_that_looks_ends_by_every_signal_with_its_number(number: signal.Signals, folder: Path) -> None:
    code = (
        "import time; from orchestrator.cli import process\nprocess.run(lambda standalone_mode: (print('up', flush=True), time.sleep(60)))"
    )
    usual = "default_int_handler" if number is signal.SIGINT else "SIG_DFL"  # who runs the tests in the background ignores some
    code = f"import signal; signal.signal({int(number)}, signal.{usual}); {code}"
    process = subprocess.Popen([sys.executable, "-c", code], cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stderr is not None and process.stdout.readline() == "up\n"
    process.send_signal(number)
    assert process.wait(20) == 128 + number and process.stderr.read() == ""
    process.stdout.close()
    process.stderr.close()


def test_ctrl_c_while_commands_are_still_imported_is_one_line_and_no_traceback(folder: Path) -> None:
    code = (
        "import os, signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "class Interrupts:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name == 'typer': os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.meta_path.insert(0, Interrupts()); sys.argv = ['osctl', 'status']\n"
        "from orchestrator.cli import main; main()"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (130, ""), done.stderr
    assert done.stderr.split("\n") == ["", "interrupted before it began; nothing was done", ""]


def test_what_a_command_waits_for_ends_with_it(folder: Path) -> None:
    code = (
        "import subprocess, sys; from orchestrator.cli import process\n"
        "process.run(lambda standalone_mode: subprocess.run(['sleep', '61.25']))"
    )
    process = subprocess.Popen([sys.executable, "-c", code], cwd=folder)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    until(lambda: bool(children.read_text().split()), "the child is there")
    time.sleep(0.2)
    (child,) = children.read_text().split()
    process.terminate()
    assert process.wait(20) == 143
    assert not Path(f"/proc/{child}").exists() or "Z" in Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[0]
