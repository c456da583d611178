"""Several ranks of one job for a test: real processes that meet over gloo on the loopback. They are forked from one that has imported the
trainer (warm_python.py), and end with the test run.
"""

from __future__ import annotations

import atexit
import ctypes
import functools
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from processes import has_spoken

used: list[float] = []
"""CPU-seconds of each rank that has ended: durations.py adds them to those of the processes that this one has waited for."""
WARM = Path(__file__).with_name("warm_python.py")


class _Warm:
    """The process that others are forked from."""

    def __init__(self) -> None:
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            [sys.executable, WARM], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, preexec_fn=die_with_parent
        )
        atexit.register(self.close)

    def ask(self, **request: Any) -> Any:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()


@functools.cache
def _warm() -> _Warm:
    return _Warm()


def die_with_parent() -> None:
    """A test run that is killed leaves nobody behind (PR_SET_PDEATHSIG)."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)


class Rank:
    """A process that was forked elsewhere: what tests need of `subprocess.Popen`."""

    def __init__(self, command: tuple[str, ...], env: Mapping[str, str]) -> None:
        handle, out = tempfile.mkstemp(prefix="rank-")
        os.close(handle)
        self._out = Path(out)
        self.pid: int = _warm().ask(argv=command, env=dict(env), folder=str(Path.cwd()), out=out)["pid"]
        self._end = os.pidfd_open(self.pid)
        self.returncode: int | None = None

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            if not has_spoken(self._end, timeout):
                raise subprocess.TimeoutExpired("a rank", timeout or 0.0)
            ended = _warm().ask(wait=self.pid)
            self.returncode = int(ended["code"])
            used.append(ended["cpu_s"])
            os.close(self._end)
        return self.returncode

    def communicate(self, timeout: float | None = None) -> str:
        """Its words, once it has ended."""
        self.wait(timeout)
        said = self._out.read_text() if self._out.exists() else ""
        self._out.unlink(missing_ok=True)
        return said

    def kill(self) -> None:
        if self.returncode is None:
            signal.pidfd_send_signal(self._end, signal.SIGKILL)


def start(world: int, *command: str, env: Mapping[str, str] | None = None) -> list[Rank]:
    """One process a rank: `python *command`, with torchrun's variables."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = os.environ | {"OMP_NUM_THREADS": "1", "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    shared |= {"LOCAL_WORLD_SIZE": str(world)} | dict(env or {})
    return [Rank(command, shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank in range(world)]


def run(world: int, *command: str, env: Mapping[str, str] | None = None, timeout: float = 120) -> None:
    """All ranks to their end. Fails with the output of the first that did not end well."""
    ranks = start(world, *command, env=env)
    try:
        for rank in ranks:
            rank.wait(timeout)
    finally:
        for rank in ranks:
            rank.kill()
        outputs = [rank.communicate() for rank in ranks]
    for number, (rank, output) in enumerate(zip(ranks, outputs, strict=True)):
        assert rank.returncode == 0, f"rank {number} of {world} ended with {rank.returncode}:\n{output}"
