"""The engine's end of a process that drives Ray (`driver`): its start, its wire, and that nothing of it is left.

Owns the process, and how it is noticed that it or all of Ray's actors are gone. Refuses to know rows.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
from multiprocessing import Pipe
from pathlib import Path
from typing import Any

import psutil

from opensora.errors import ConfigError
from opensora.prepare.ray.setup import Answer, Ended, Failed, Heard, Leave, Ready, Refusal, Sent, Setup

START_S = 300.0
"""For Ray to start here, or to be reached."""
END_S = 30.0
LATELY_S = 15.0
"""Actors say every five seconds that they live."""
QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0", "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0", "RAY_memory_monitor_refresh_ms": "0",
    "RAY_worker_register_timeout_seconds": "240", "RAY_ENABLE_AUTO_CONNECT": "0",
}  # fmt: skip
"""No telemetry; no environment of uv's; no killing of actors for memory that guards use, which have their own limit; no second Ray for a
thread that asks something after the end (it was seen: its folder stayed in /tmp/ray)."""


class StreamLost(Exception):
    """Rows that were on their way are not answered."""


class Stream:
    def __init__(self, setup: Setup, log: Path) -> None:
        """Start the process; `log` has what it and Ray print."""
        ours, theirs = Pipe()
        env = os.environ | QUIET | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        if not setup.address:
            Path(setup.temporary).mkdir(mode=0o700, parents=True, exist_ok=True)
            env = {name: value for name, value in env.items() if name != "RAY_ADDRESS"}
            env |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
        command = [sys.executable, "-m", "opensora.prepare.ray.driver", str(theirs.fileno())]
        with log.open("ab") as to:
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=to, stderr=to, env=env, pass_fds=[theirs.fileno()], start_new_session=True
            )
        theirs.close()
        self._wire, self._setup, self._log = ours, setup, log
        self._told: list[Any] = []
        self._began = time.monotonic()
        self._silent_s, self._spilled, self._worked_by = 0.0, 0, False
        self._ended, self._failed = False, ""
        self.ready = False
        """Whether Ray has started."""
        self._send(setup)

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def works(self) -> bool:
        """Whether there are actors: one has been heard of lately."""
        return self._worked_by and self._silent_s < LATELY_S

    def send(self, rows: list[Sent]) -> None:
        """Raises StreamLost."""
        self._send(rows)

    def leave(self) -> None:
        """Models are to begin with no further row. Raises StreamLost."""
        self._send(Leave())

    def answers(self, patience_s: float) -> list[Answer]:
        """What has been answered, waiting so long for the first. Raises StreamLost, and ConfigError where no other try helps."""
        found: list[Answer] = []
        try:
            while not self._failed and self._wire.poll(0 if found else patience_s):
                self._take(self._wire.recv(), found)
                self._worked_by = self._worked_by or bool(found)
        except (EOFError, OSError):
            if not found:
                raise StreamLost(f"its process ended ({self._how()}); {self._log} has its last words") from None
        if not found and self._failed:
            raise StreamLost(self._failed)
        if not found and not self.ready and time.monotonic() - self._began > START_S:
            raise StreamLost(f"it has not started within {START_S:g} s; {self._log} has its words")
        if not found and self._silent_s > self._setup.silent_s:
            raise StreamLost(f"no worker has been heard of for {self._silent_s:.0f} s")
        return found

    def told(self) -> list[Any]:
        """What functions have told since the last time."""
        told, self._told = self._told, []
        return told

    def end(self) -> int:
        """Let it end, and end it; bytes that its object store spilled."""
        with contextlib.suppress(StreamLost, EOFError, OSError):
            self._send(None)
            until = time.monotonic() + END_S
            while not (self._ended or self._failed) and self._wire.poll(max(0.0, until - time.monotonic())):
                self._take(self._wire.recv(), [])
            if self._ended:
                self._process.wait(END_S)
        self.kill()
        return self._spilled

    def kill(self) -> None:
        """End it and all that it started, whatever they do."""
        started: list[psutil.Process] = []
        with contextlib.suppress(psutil.Error):
            started = psutil.Process(self._process.pid).children(recursive=True)
        self._wire.close()
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        for process in started:
            with contextlib.suppress(psutil.Error):
                process.kill()
        psutil.wait_procs(started, END_S)
        if not self._setup.address:
            shutil.rmtree(self._setup.temporary, ignore_errors=True)

    def _take(self, message: Any, found: list[Answer]) -> None:
        if isinstance(message, list):
            found.extend(message)
        elif isinstance(message, Heard):
            self._told += message.told
            self._silent_s, self._worked_by = message.silent_s, message.worked_by
        elif isinstance(message, Ready):
            self.ready = True
        elif isinstance(message, Ended):
            self._spilled, self._ended = message.spilled, True
        elif isinstance(message, Failed):
            self._failed = message.reason
        elif isinstance(message, Refusal):
            raise ConfigError(message.reason)

    def _send(self, message: object) -> None:
        try:
            self._wire.send(message)
        except OSError:
            raise StreamLost(f"its process ended ({self._how()}); {self._log} has its last words") from None

    def _how(self) -> str:
        with contextlib.suppress(subprocess.TimeoutExpired):
            code = self._process.wait(5)
            return signal.Signals(-code).name if code < 0 else f"exit code {code}"
        return "its wire is closed"
