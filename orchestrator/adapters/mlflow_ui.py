"""MLflow's pages: a server on the loopback interface that ends when its caller ends it, and the addresses of what is worth looking at.

Owns the process and the addresses. Refuses to import mlflow (5 s): the server is asked over HTTP.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
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

from orchestrator.adapters.tracking import ENVIRONMENT, tracking_url
from orchestrator.errors import Refused, Unreachable, UsageError
from orchestrator.redact import redacted

STAGES = "tags.`osctl/kind` = 'stage' and tags.`osctl/current` = 'true'"
"""The stage runs that the pipeline as launched last stands on."""

WORKFLOW = "workflowType=machine_learning"
"""Else MLflow's pages open on the menu for language-model traces."""


def serve(tracking: str, home: Path, experiment: str, *, port: int = 5000, open_browser: bool = True, say: Callable[[str], None]) -> None:
    """Show where a pipeline's stages stand side by side, and for a local database serve it until Ctrl-C.

    Args:
        tracking: `sqlite`, or the URI of a running MLflow server, which is only pointed at.
        experiment: its name.
        say: prints a line for the user.

    Raises:
        UsageError: tracking is none.
        Refused: the port is taken.
        Unreachable: the server does not come up, or does not answer.
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
    """Print, and open where there is a browser, the page with the stages side by side. Raises Unreachable."""
    number = experiment_id(base, experiment)
    if number is None:
        say(f"{base} has no experiment {experiment} yet. Bring it up to the ledger with: osctl sync")
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
    """Address of the page that sets N runs side by side. `experiment` and `runs` are MLflow's ids."""
    quote = urllib.parse.quote
    return (
        f"{base.rstrip('/')}/#/compare-runs?runs={quote(json.dumps(list(runs)))}&experiments={quote(json.dumps([experiment]))}&{WORKFLOW}"
    )


def experiment_id(base: str, name: str) -> str | None:
    """MLflow's id of an experiment, None where there is none. Raises Unreachable."""
    try:
        answer = _ask(f"{base}/api/2.0/mlflow/experiments/get-by-name?experiment_name={urllib.parse.quote(name)}")
    except urllib.error.HTTPError as error:
        if error.code == 404:
            return None
        raise Unreachable(f"MLflow {base}: answers {error.code}. Is this an MLflow server that lets you in?") from error
    return str(answer["experiment"]["experiment_id"])


def stage_runs(base: str, experiment: str) -> list[str]:
    """Ids of the runs of the pipeline's current stages, in the order in which they were started. Raises Unreachable."""
    query = {"experiment_ids": [experiment], "filter": STAGES, "order_by": ["attributes.start_time ASC"], "max_results": 100}
    try:
        answer = _ask(f"{base}/api/2.0/mlflow/runs/search", json.dumps(query).encode())
    except urllib.error.HTTPError as error:
        raise Unreachable(f"MLflow {base}: answers {error.code} to a search for runs") from error
    return [run["info"]["run_id"] for run in answer.get("runs", [])]


@dataclass(frozen=True)
class Server:
    """An MLflow server of ours, alone in its process group."""

    url: str
    process: subprocess.Popen[bytes]

    def wait_until_up(self, timeout_s: float = 120.0) -> None:
        """Raises Unreachable when it has died, or is silent for so long."""
        end = time.monotonic() + timeout_s
        while time.monotonic() < end:
            if self.process.poll() is not None:
                raise Unreachable(f"MLflow server {self.url}: ended with exit code {self.process.returncode}. See its log")
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{self.url}/health", timeout=2):
                return
            time.sleep(0.1)
        raise Unreachable(f"MLflow server {self.url}: did not answer within {timeout_s:.0f} s. See its log")

    def stop(self, grace_s: float = 5.0) -> None:
        """End it and all the workers it started. Idempotent."""
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
        """Processes of the group that live. It has a session of its own, so nobody else's can be among them."""
        self.process.poll()
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, ProcessLookupError):
                if os.getpgid(process.pid) == self.process.pid and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process.pid)
        return found


def start(database: str, artifacts: Path, port: int = 0, log: IO[bytes] | int = subprocess.DEVNULL) -> Server:
    """Start MLflow's pages and API on 127.0.0.1, for this host alone. Returns at once.

    It gets a session of its own: a Ctrl-C in the terminal reaches only the caller, who then ends all of it, workers included.

    Args:
        database: sqlite:///... of the runs.
        artifacts: folder for artifacts that clients send to the server.
        port: 0 takes a free one.

    Raises:
        Refused: the port is taken.
    """
    artifacts.mkdir(parents=True, exist_ok=True)
    port = _free(port)
    command = [
        sys.executable, "-m", "mlflow", "server", "--backend-store-uri", database, "--artifacts-destination", str(artifacts.absolute()),
        "--host", "127.0.0.1", "--port", str(port), "--workers", "1",
    ]  # fmt: skip
    environment = {**ENVIRONMENT, **os.environ}
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment, start_new_session=True)
    return Server(f"http://127.0.0.1:{port}", process)


@contextlib.contextmanager
def running(server: Server) -> Iterator[Server]:
    """Stops the server at the end, and takes Ctrl-C and SIGTERM as that end."""

    def leave(*_: object) -> None:
        raise KeyboardInterrupt

    # SIGINT too: a shell that starts us in the background leaves it ignored, and Python then raises no KeyboardInterrupt
    previous = {number: signal.signal(number, leave) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with contextlib.suppress(KeyboardInterrupt):  # how it is meant to end
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
    """Raises HTTPError for an answer that is none, Unreachable for no answer."""
    request = urllib.request.Request(url, data=body, headers={"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return json.load(answer)
    except urllib.error.HTTPError:
        raise
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise Unreachable(redacted(f"MLflow {url}: {error}. Is the server up?")) from error
