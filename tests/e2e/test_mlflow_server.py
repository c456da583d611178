"""MLflow as a server that goes away while a launch goes on: nothing waits for it, and `sync` brings it up to the ledger afterwards."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from bad_servers import TROUBLES, Trouble, troubled
from written_ledger import Writer, pipeline

from orchestrator.adapters import mlflow_ui, open_store
from orchestrator.adapters.tracking import FIRST_ANSWER_S, MlflowTracker
from orchestrator.errors import Refused
from orchestrator.ledger import Ledger
from orchestrator.projection import Follower, project

pytestmark = [pytest.mark.long, pytest.mark.timeout(900)]

UP_S = 300.0


@pytest.fixture
def servers(tmp_path: Path) -> Iterator[Callable[[int], mlflow_ui.Server]]:
    """Starts servers, one after the other on one database; whatever is still up at the end is stopped."""
    started: list[mlflow_ui.Server] = []
    (tmp_path / "server").mkdir()
    with (tmp_path / "server.log").open("ab") as log:

        def start(port: int) -> mlflow_ui.Server:
            started.append(mlflow_ui.start(f"sqlite:///{tmp_path}/server/mlflow.db", tmp_path / "server" / "artifacts", port, log))
            return started[-1]

        yield start
        for server in started:
            server.stop()


def projection(home: Path, url: str, *more: str) -> tuple[int, list[str]]:
    command = [sys.executable, "-m", "orchestrator.projection", "--store", str(home / "store"), "--pipeline", "demo", "--tracking", url]
    done = subprocess.run([*command, *more], capture_output=True, text=True, timeout=UP_S, cwd=home, check=False)
    assert done.stdout == ""
    return done.returncode, done.stderr.splitlines()


def curves(home: Path) -> Counter[tuple[Any, ...]]:
    """Every point the server holds of a living run, by our own key."""
    connection = sqlite3.connect(home / "server" / "mlflow.db")
    query = (
        "select t.value, m.key, m.step, m.timestamp, m.value from metrics m join runs r using (run_uuid) join tags t using (run_uuid) "
        "where t.key = 'osctl/run_key' and r.lifecycle_stage = 'active' and m.step > 0"
    )
    found = Counter(connection.execute(query).fetchall())
    connection.close()
    return found


def test_a_server_that_was_down_is_brought_up_to_date_once(tmp_path: Path, servers: Callable[[int], mlflow_ui.Server]) -> None:
    story = Writer(Ledger(open_store(str(tmp_path / "store")), "demo"), pipeline())
    server = servers(0)
    port = int(server.url.rpartition(":")[2])
    story.launch()
    intent = story.begin("stage1")
    story.train(intent, 15)
    story.draw(intent, "sheet.png", b"a sheet", tmp_path)
    server.wait_until_up(UP_S)
    project(story.ledger, MlflowTracker(server.url))
    half = curves(tmp_path)
    assert max(step for _, _, step, _, _ in half) == 15

    with pytest.raises(Refused, match=f"port {port}"):
        mlflow_ui.start("sqlite://", tmp_path / "nowhere", port)
    server.stop()
    assert not [process for process in psutil.process_iter() if _group(process.pid) == server.process.pid]

    launcher = subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE)
    assert launcher.stdin is not None
    story.finish(intent)
    for name in ("stage2", "stage3"):
        story.finish(story.begin(name))
    story.end()
    launcher.stdin.close()
    launcher.wait()
    before = time.monotonic()
    code, said = projection(tmp_path, server.url, "--follow-pid", str(launcher.pid))
    print(f"the follower gave up after {time.monotonic() - before:.1f} s")
    assert code == 5 and len(said) == 1 and "Connection refused" in said[0], said
    assert curves(tmp_path) == half

    servers(port).wait_until_up(UP_S)
    assert projection(tmp_path, server.url) == (0, [])
    for _ in range(2):
        after = curves(tmp_path)
        assert set(after.values()) == {1} and half.keys() <= after.keys()
        losses = {(key, step) for key, name, step, _, _ in after if name == "loss"}
        assert len(losses) == 2 * 3 * 30
        project(story.ledger, MlflowTracker(server.url))
    number = mlflow_ui.experiment_id(server.url, "demo")
    assert number is not None
    assert len(mlflow_ui.stage_runs(server.url, number)) == 3
    assert [path.read_bytes() for path in (tmp_path / "server" / "artifacts").rglob("sheet.png")] == [b"a sheet"]


def follower(home: Path, url: str) -> subprocess.Popen[str]:
    """Of this very process, which does not end."""
    command = [sys.executable, "-m", "orchestrator.projection", "--store", str(home / "store"), "--pipeline", "demo", "--tracking", url]
    command += ["--follow-pid", str(os.getpid()), "--interval", "0.2"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=home)


def leaves(process: subprocess.Popen[str]) -> tuple[int, str, float]:
    """Ask it to leave: exit code, what it said, and how long that took."""
    asked = time.monotonic()
    process.terminate()
    out, err = process.communicate(timeout=60)
    assert out == ""
    return process.returncode, err, time.monotonic() - asked


@pytest.mark.parametrize("trouble", TROUBLES)
def test_a_server_in_trouble_keeps_nobody_and_is_named_in_one_line(tmp_path: Path, trouble: Trouble) -> None:
    """Asked to leave, the follower does within seconds; `sync` gives up within its bound."""
    story = Writer(Ledger(open_store(str(tmp_path / "store")), "demo"), pipeline())
    story.launch()
    story.train(story.begin("stage1"), 15)
    with troubled(trouble) as url:
        process = follower(tmp_path, url)
        time.sleep(8)  # it is at its first look, or has begun to wait for the next
        assert process.poll() is None
        code, err, took_s = leaves(process)
        assert code == 5 and url in err and "osctl sync" in err and "Traceback" not in err, err
        assert took_s < Follower.LAST_ANSWER_S + 1.5
        began = time.monotonic()
        code, said = projection(tmp_path, url)
        assert code == 5 and len(said) == 1 and url in said[0], said
        assert time.monotonic() - began < FIRST_ANSWER_S + 20


def test_a_server_that_freezes_in_the_middle_keeps_nobody(tmp_path: Path, servers: Callable[[int], mlflow_ui.Server]) -> None:
    story = Writer(Ledger(open_store(str(tmp_path / "store")), "demo"), pipeline())
    server = servers(0)
    story.launch()
    intent = story.begin("stage1")
    story.train(intent, 10)
    server.wait_until_up(UP_S)
    process = follower(tmp_path, server.url)
    end = time.monotonic() + UP_S
    while not curves(tmp_path) and time.monotonic() < end:
        time.sleep(0.2)
    half = curves(tmp_path)
    assert half
    os.killpg(server.process.pid, signal.SIGSTOP)
    try:
        story.train(intent, 30)
        time.sleep(3)
        code, err, took_s = leaves(process)
    finally:
        os.killpg(server.process.pid, signal.SIGCONT)
    assert code == 5 and "osctl sync" in err and took_s < Follower.LAST_ANSWER_S + 1.5, (err, took_s)
    story.finish(intent)
    story.end()
    assert projection(tmp_path, server.url) == (0, [])
    after = curves(tmp_path)
    assert set(after.values()) == {1} and half.keys() <= after.keys() and max(step for _, _, step, _, _ in after) == 30


def test_ctrl_c_ends_the_pages_and_every_process_of_theirs(tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from orchestrator.adapters.mlflow_ui import serve; "
        "serve('sqlite', Path(sys.argv[1]), 'demo', port=0, open_browser=False, say=lambda line: print(line, flush=True))"
    )
    process = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE, text=True, cwd=tmp_path)
    assert process.stdout is not None
    said = [process.stdout.readline()]
    children = psutil.Process(process.pid).children(recursive=True)
    while "Ctrl-C" not in said[-1]:
        said.append(process.stdout.readline())
        assert said[-1], said
    children += psutil.Process(process.pid).children(recursive=True)
    assert "http://127.0.0.1:" in said[0] and "osctl sync" in said[1]
    os.kill(process.pid, signal.SIGINT)
    assert process.wait(60) == 0
    assert process.stdout.read() == ""
    process.stdout.close()
    assert children and not [child for child in children if child.is_running() and child.status() != psutil.STATUS_ZOMBIE]


def _group(pid: int) -> int | None:
    try:
        return os.getpgid(pid)
    except ProcessLookupError:
        return None
