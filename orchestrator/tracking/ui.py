"""MLflow's pages: a server on the loopback interface, and the addresses of the useful pages.

Owns the server's process, which its caller ends, and the addresses. Refuses to import mlflow, which takes 5 s; it uses HTTP instead.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
import webbrowser
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import psutil

from orchestrator import modules
from orchestrator.errors import Refused, Unreachable, UsageError
from orchestrator.labels import Tag
from orchestrator.redact import redacted
from orchestrator.tracking.client import ENVIRONMENT, tracking_url

STAGES = f"tags.`{Tag.KIND}` = 'stage' and tags.`{Tag.CURRENT}` = 'true'"
"""Filter for the runs of the stages that the pipeline uses, as it was launched last."""

WORKFLOW = "workflowType=machine_learning"
"""Without this MLflow's pages open with the menu for language-model traces."""


def serve(tracking: str, home: Path, experiment: str, *, port: int = 5000, open_browser: bool = True, say: Callable[[str], None]) -> None:
    """Print the address at which a pipeline's stages are compared; for a local database also start a server, and serve until Ctrl-C.

    Args:
        tracking: `sqlite`, or the URI of an MLflow server that runs already.
        home: folder of local state.
        experiment: name of the experiment.
        port: port of the server. 0 means any free one.
        say: prints a line for the user.

    Raises:
        UsageError: tracking is none.
        Refused: the port is taken.
        Unreachable: the server does not start, does not answer, or ends.
    """
    if tracking == "none":
        raise UsageError("mlflow: tracking is none, there is nothing to show. Give --tracking sqlite or --tracking http://host:port")
    url = tracking_url(tracking, home)
    if url.startswith("http"):
        show(url, experiment, open_browser, say)
        return
    log = home / "log" / "mlflow.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as file, running(start(url, home / "mlartifacts", port, file)) as server:
        say(f"MLflow starts on {server.url} (10 to 40 s; its log: {log})")
        server.wait_until_up()
        show(server.url, experiment, open_browser, say)
        say("Ctrl-C ends it")
        server.process.wait()
        raise Unreachable(f"MLflow server {server.url}: ended with exit code {server.process.returncode}. See {log}")


def show(base: str, experiment: str, open_browser: bool, say: Callable[[str], None]) -> None:
    """Print the addresses of the runs and of the page that compares the stages; open the latter in a browser. Raises Unreachable."""
    number = experiment_id(base, experiment)
    if number is None:
        say(f"{base} has no experiment {experiment} yet. Bring it up to date with: osctl sync")
        return
    page = experiment_page(base, number)
    say(f"runs:   {page}")
    stages = stage_runs(base, number)
    if len(stages) > 1:
        page = compare_page(base, number, stages)
        say(f"stages: {page}")
    if open_browser:
        with contextlib.suppress(webbrowser.Error):
            webbrowser.open(page)


def experiment_page(base: str, experiment: str) -> str:
    """Address of an experiment's table of runs. `experiment` is MLflow's id."""
    return f"{base.rstrip('/')}/#/experiments/{experiment}/runs?{WORKFLOW}"


def compare_page(base: str, experiment: str, runs: Sequence[str]) -> str:
    """Address of the page that compares runs. `experiment` and `runs` are MLflow's ids."""
    quote = urllib.parse.quote
    return (
        f"{base.rstrip('/')}/#/compare-runs?runs={quote(json.dumps(list(runs)))}&experiments={quote(json.dumps([experiment]))}&{WORKFLOW}"
    )


def experiment_id(base: str, name: str) -> str | None:
    """MLflow's id of the experiment with this name. None means there is none. Raises Unreachable."""
    try:
        answer = _ask(f"{base}/api/2.0/mlflow/experiments/get-by-name?experiment_name={urllib.parse.quote(name)}")
    except urllib.error.HTTPError as error:
        if error.code == 404:
            return None
        raise Unreachable(f"MLflow {base}: answers {error.code}. Is this an MLflow server that lets you in?") from error
    return str(answer["experiment"]["experiment_id"])


def stage_runs(base: str, experiment: str) -> list[str]:
    """MLflow's ids of the runs of the pipeline's current stages, oldest first. Raises Unreachable."""
    query = {"experiment_ids": [experiment], "filter": STAGES, "order_by": ["attributes.start_time ASC"], "max_results": 100}
    try:
        answer = _ask(f"{base}/api/2.0/mlflow/runs/search", json.dumps(query).encode())
    except urllib.error.HTTPError as error:
        raise Unreachable(f"MLflow {base}: answers {error.code} to a search for runs") from error
    return [run["info"]["run_id"] for run in answer.get("runs", [])]


@dataclass(frozen=True)
class Server:
    """An MLflow server that we started. Its process group has only its own processes."""

    url: str
    process: subprocess.Popen[bytes]

    def wait_until_up(self, timeout_s: float = 120.0) -> None:
        """Return once it answers. Raises Unreachable if it ends or does not answer within `timeout_s`."""
        end = time.monotonic() + timeout_s
        while time.monotonic() < end:
            if self.process.poll() is not None:
                raise Unreachable(f"MLflow server {self.url}: ended with exit code {self.process.returncode}. See its log")
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{self.url}/health", timeout=2):
                return
            time.sleep(0.1)
        raise Unreachable(f"MLflow server {self.url}: did not answer within {timeout_s:.0f} s. See its log")

    def stop(self, grace_s: float = 5.0) -> None:
        """End the server and all workers that it started. Idempotent."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            if not self._members():
                break
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, number)
            end = time.monotonic() + grace_s
            while self._members() and time.monotonic() < end:
                time.sleep(0.05)
        self.process.wait()

    def _members(self) -> list[int]:
        """Ids of the living processes of its group. The server has its own session, so no other process is among them."""
        self.process.poll()
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, ProcessLookupError):
                if os.getpgid(process.pid) == self.process.pid and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process.pid)
        return found


def start(database: str, artifacts: Path, port: int = 0, log: IO[bytes] | int = subprocess.DEVNULL) -> Server:
    """Start MLflow's pages and API on 127.0.0.1, only for this host. Returns at once.

    It gets a session of its own: a Ctrl-C in the terminal reaches only the caller, which then ends the server with its workers.

    Args:
        database: URI of the database with the runs, sqlite:///...
        artifacts: folder for artifacts that clients send to the server.
        port: the port. 0 means any free one.
        log: where its output goes.

    Raises:
        Refused: the port is taken.
    """
    artifacts.mkdir(parents=True, exist_ok=True)
    port = _free(port)
    words = ["--backend-store-uri", database, "--artifacts-destination", str(artifacts.absolute())]
    words += ["--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    process = subprocess.Popen(
        modules.command("mlflow", "server", *words),
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=log,
        env=modules.environment({**ENVIRONMENT, **os.environ}),
        start_new_session=True,
    )
    return Server(f"http://127.0.0.1:{port}", process)


@contextlib.contextmanager
def running(server: Server) -> Iterator[Server]:
    """Stop the server at the end of the block. Ctrl-C, SIGTERM and SIGHUP (unless it is ignored, as under nohup) end the block."""

    def leave(*_: object) -> None:
        raise KeyboardInterrupt

    # SIGINT too: a shell that starts this process in the background sets it to ignored, and Python then raises no KeyboardInterrupt
    hangup = () if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else (signal.SIGHUP,)  # sent when the terminal is closed
    previous = {number: signal.signal(number, leave) for number in (signal.SIGINT, signal.SIGTERM, *hangup)}
    try:
        with contextlib.suppress(KeyboardInterrupt):  # the usual end
            yield server
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        server.stop()


def _free(port: int) -> int:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            raise Refused(f"port {port}: is taken by another process. Use --port 0 for any free one") from error
        return int(probe.getsockname()[1])


def _ask(url: str, body: bytes | None = None) -> Any:
    """The JSON of the server's answer. Raises HTTPError if the answer is an error, Unreachable if there is no answer."""
    request = urllib.request.Request(url, data=body, headers={"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return json.load(answer)
    except urllib.error.HTTPError:
        raise
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise Unreachable(redacted(f"MLflow {url}: {error}. Is the server up?")) from error
