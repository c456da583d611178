"""MLflow as a server that goes away while a launch goes on: nothing waits for it, and `sync` brings it up to date afterwards."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import sqlite3
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import psutil
import pytest
from bad_servers import TROUBLES, Trouble, troubled
from hard_prompts import HARD
from written_ledger import Writer, pipeline

from opensora.evaluation.file_names import file_names
from orchestrator.errors import Refused
from orchestrator.ledger.records import ClipsUsed, LeftOut
from orchestrator.ledger.store import Ledger
from orchestrator.stores import open_store
from orchestrator.tracking import ui as mlflow_ui
from orchestrator.tracking.client import MlflowTracker
from orchestrator.tracking.mlflow_text import artifact_name
from orchestrator.tracking.sync import Sync

pytestmark = [pytest.mark.long, pytest.mark.timeout(900)]

UP_S = 300.0


@dataclass(frozen=True)
class Shared:
    """A server for several tests, each with a pipeline and an experiment of its own."""

    server: mlflow_ui.Server
    home: Path

    @property
    def url(self) -> str:
        return self.server.url

    def artifacts(self, experiment: str, name: str) -> list[bytes]:
        """Files of this name that runs of the experiment have."""
        number = mlflow_ui.experiment_id(self.url, experiment)
        return [path.read_bytes() for path in (self.home / f"server/artifacts/{number}").rglob(name)]


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shared]:
    home = tmp_path_factory.mktemp("shared")
    (home / "server").mkdir()
    with (home / "server.log").open("ab") as log:
        server = mlflow_ui.start(f"sqlite:///{home}/server/mlflow.db", home / "server" / "artifacts", 0, log)
        try:
            server.wait_until_up(UP_S)
            yield Shared(server, home)
        finally:
            server.stop()


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


def tracking_process(home: Path, url: str, *more: str, pipeline: str = "demo") -> tuple[int, list[str]]:
    command = [sys.executable, "-m", "orchestrator.tracking", "--store", str(home / "store"), "--pipeline", pipeline, "--tracking", url]
    done = subprocess.run([*command, *more], capture_output=True, text=True, timeout=UP_S, cwd=home, check=False)
    assert done.stdout == ""
    return done.returncode, done.stderr.splitlines()


def curves(home: Path, pipeline: str = "demo") -> Counter[tuple[Any, ...]]:
    """Every point the server holds of a living run of a pipeline, by our own key."""
    connection = sqlite3.connect(home / "server" / "mlflow.db")
    query = (
        "select t.value, m.key, m.step, m.timestamp, m.value from metrics m join runs r using (run_uuid) join tags t using (run_uuid) "
        "where t.key = 'osctl/run_key' and r.lifecycle_stage = 'active' and m.step > 0 "
        "and t.value like ?"
    )
    found = Counter(connection.execute(query, (f"{pipeline}/%",)).fetchall())
    connection.close()
    return found


def test_whatever_people_wrote_a_server_shows_it(tmp_path: Path, shared: Shared) -> None:
    """Prompts that are hard, samples of today and of releases that named them otherwise, and an experiment of any name."""
    hard = [prompt for prompt in HARD if "\ud800" not in prompt]
    whole = pipeline(experiment="50% off? #1 'a/b' \"c\" ../日本")
    stages = [stage.model_copy(update={"config": stage.config.model_copy(update={"prompts": tuple(hard)})}) for stage in whole.stages]
    story = Writer(Ledger(open_store(str(tmp_path / "store")), "demo"), whole.model_copy(update={"stages": tuple(stages)}))
    story.launch()
    intent = story.begin("stage1")
    names = file_names(hard, ".mp4")
    odd = ["00-50% off? #1.mp4", "00-a+b & c.mp4", '00-it\'s "quoted".png']
    for name in (*names, *odd):
        story.draw(intent, name, f"clip {name}".encode(), tmp_path)
    reasons = (LeftOut(reason="\x1b[31m" + "字" * 300, clips=1, first=("a\0b.mp4",)),)
    story.ledger.write_clips(intent, ClipsUsed(clips=3, used=2, left_out=reasons, remarks=("🎉" * 300,)), None)
    story.close(intent, "code", reason="caption 'a\0b\x07\u202e': " + "🎉" * 9_000)
    story.end("failed")
    tracker = MlflowTracker(shared.url)
    for _ in range(2):
        Sync(story.ledger, tracker).update()
    runs = tracker.runs(whole.experiment, {})
    (run,) = [run for run in runs if run.tags.get("osctl/kind") == "stage"]
    assert set(tracker.artifacts(run.id, "samples")) == {artifact_name(name) for name in (*names, *odd)}
    assert set(names) <= set(tracker.artifacts(run.id, "samples")), "names of today are taken as they are"
    assert len(run.params["prompts"]) == 500 and len(run.tags["osctl/not_used"]) == 500
    (attempt,) = [run for run in runs if run.tags.get("osctl/kind") == "attempt"]
    assert attempt.tags["osctl/reason"].startswith("caption 'a\\x00b\\x07\\u202e': 🎉") and len(attempt.tags["osctl/reason"]) == 500


def test_a_server_that_was_down_is_brought_up_to_date_once(tmp_path: Path, servers: Callable[[int], mlflow_ui.Server]) -> None:
    story = Writer(Ledger(open_store(str(tmp_path / "store")), "demo"), pipeline())
    server = servers(0)
    port = int(server.url.rpartition(":")[2])
    story.launch()
    intent = story.begin("stage1")
    story.train(intent, 15)
    story.draw(intent, "sheet.png", b"a sheet", tmp_path)
    server.wait_until_up(UP_S)
    Sync(story.ledger, MlflowTracker(server.url)).update()
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
    code, said = tracking_process(tmp_path, server.url, "--follow-pid", str(launcher.pid))
    assert code == 5 and len(said) == 1 and "Connection refused" in said[0], said
    assert curves(tmp_path) == half

    servers(port).wait_until_up(UP_S)
    assert tracking_process(tmp_path, server.url) == (0, [])
    for _ in range(2):
        after = curves(tmp_path)
        assert set(after.values()) == {1} and half.keys() <= after.keys()
        losses = {(key, step) for key, name, step, _, _ in after if name == "loss"}
        assert len(losses) == 2 * 3 * 30
        Sync(story.ledger, MlflowTracker(server.url)).update()
    number = mlflow_ui.experiment_id(server.url, "demo")
    assert number is not None
    assert len(mlflow_ui.stage_runs(server.url, number)) == 3
    assert [path.read_bytes() for path in (tmp_path / "server" / "artifacts").rglob("sheet.png")] == [b"a sheet"]


def follower(home: Path, url: str, pipeline: str = "demo") -> subprocess.Popen[str]:
    """Of this very process, which does not end."""
    command = [sys.executable, "-m", "orchestrator.tracking", "--store", str(home / "store"), "--pipeline", pipeline, "--tracking", url]
    command += ["--follow-pid", str(os.getpid()), "--interval", "0.2"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=home)


def leaves(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Ask it to leave, which it does though nobody answers it: exit code, and what it said."""
    process.terminate()
    out, err = process.communicate(timeout=60)
    assert out == ""
    return process.returncode, err


def until(fact: Callable[[], object], what: str) -> None:
    end = time.monotonic() + UP_S
    while not fact():
        assert time.monotonic() < end, what
        time.sleep(0.05)


def follows(process: subprocess.Popen[str]) -> bool:
    """It has a handler of its own for SIGTERM by now."""
    (caught,) = (line for line in Path(f"/proc/{process.pid}/status").read_text().splitlines() if line.startswith("SigCgt"))
    return bool(int(caught.split()[1], 16) >> (signal.SIGTERM - 1) & 1)


def unread(url: str) -> bool:
    """Somebody has asked this server for something that it has not read."""
    port = f"0100007F:{int(url.rpartition(':')[2]):04X}"
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    established = [row for row in rows if row[1] == port and row[3] == "01"]
    return any(row[4].partition(":")[2] != "00000000" for row in established)


@pytest.mark.parametrize("trouble", TROUBLES)
def test_a_server_in_trouble_keeps_nobody_and_is_named_in_one_line(tmp_path: Path, trouble: Trouble) -> None:
    """Asked to leave, the follower does; `sync` gives up by itself."""
    story = Writer(Ledger(open_store(str(tmp_path / "store")), "demo"), pipeline())
    story.launch()
    story.train(story.begin("stage1"), 15)
    with troubled(trouble) as url:
        process = follower(tmp_path, url)
        until(lambda: follows(process) and (trouble != "hangs" or unread(url)), "its first look")
        assert process.poll() is None
        code, err = leaves(process)
        assert code == 5 and url in err and "osctl sync" in err and "Traceback" not in err, err
        code, said = tracking_process(tmp_path, url)
        assert code == 5 and len(said) == 1 and url in said[0], said


def test_a_server_that_freezes_in_the_middle_keeps_nobody(tmp_path: Path, shared: Shared) -> None:
    story = Writer(Ledger(open_store(str(tmp_path / "store")), "frozen"), pipeline("frozen"))
    story.launch()
    intent = story.begin("stage1")
    story.train(intent, 10)
    process = follower(tmp_path, shared.url, "frozen")
    until(lambda: curves(shared.home, "frozen"), "its first points")
    half = curves(shared.home, "frozen")
    os.killpg(shared.server.process.pid, signal.SIGSTOP)
    try:
        story.train(intent, 30)
        until(lambda: unread(shared.url), "a question that nobody reads")
        code, err = leaves(process)
    finally:
        os.killpg(shared.server.process.pid, signal.SIGCONT)
    assert code == 5 and "osctl sync" in err, err
    story.finish(intent)
    story.end()
    assert tracking_process(tmp_path, shared.url, pipeline="frozen") == (0, [])
    after = curves(shared.home, "frozen")
    assert set(after.values()) == {1} and half.keys() <= after.keys() and max(step for _, _, step, _, _ in after) == 30


def _group(pid: int) -> int | None:
    try:
        return os.getpgid(pid)
    except ProcessLookupError:
        return None


@contextlib.contextmanager
def older(url: str, version: str, lacks: str) -> Iterator[str]:
    """The server behind a proxy that answers as an older one: a page of HTML where it is asked for what it does not have."""

    class Handler(BaseHTTPRequestHandler):
        def any(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if self.path == "/version":
                return self.answer(200, version.encode())
            if re.search(lacks, self.path):
                page = b"<!doctype html>\n<html lang=en>\n<title>404 Not Found</title>\n<h1>Not Found</h1>\n<p>There is no such URL.</p>"
                return self.answer(404, page)
            headers = {name: value for name, value in self.headers.items() if name.lower() not in ("host", "content-length")}
            request = urllib.request.Request(url + self.path, body or None, headers, method=self.command)
            try:
                with urllib.request.urlopen(request) as answer:
                    return self.answer(answer.status, answer.read())
            except urllib.error.HTTPError as error:
                with error:
                    return self.answer(error.code, error.read())

        do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = any

        def answer(self, status: int, body: bytes) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_an_older_server_is_shown_what_it_can_take_or_it_and_the_needed_one_are_named(tmp_path: Path, shared: Shared) -> None:
    story = Writer(Ledger(open_store(str(tmp_path / "store")), "older"), pipeline("older"))
    story.launch()
    intent = story.begin("stage1")
    story.draw(intent, "sheet.png", b"a sheet", tmp_path)
    story.finish(intent)
    story.end()
    with older(shared.url, "2.14.3", "/logged-models|/api/3.0/") as url:  # what MLflow 3 added
        assert tracking_process(tmp_path, url, pipeline="older") == (0, [])
    number = mlflow_ui.experiment_id(shared.url, "older")
    assert number is not None and len(mlflow_ui.stage_runs(shared.url, number)) == 1
    assert shared.artifacts("older", "sheet.png") == [b"a sheet"]

    with older(shared.url, "1.30.0", "/runs/search|/logged-models") as url:
        code, [said] = tracking_process(tmp_path, url, pipeline="older")
    assert code == 5 and "<" not in said and "404 Not Found" in said
    assert said.endswith("The server is MLflow 1.30.0; 2.14 or newer is needed. Upgrade it, then: osctl sync")
