"""The trainer's command and environment, and the agent's end of the guard that runs it.

Owns `RUN_DIR/alive` and the processes below the agent. Refuses to judge how they ended (`ending` does).
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from orchestrator.agent import guard
from orchestrator.claim import ALIVE
from orchestrator.records import Intent

TRAINER = (
    "-m",
    "torch.distributed.run",
    "--standalone",
    "--nproc-per-node",
    "{devices}",
    "--max-restarts",
    "0",
    "-m",
    "opensora.train",
    "{run_dir}",
)
"""--standalone: the ranks meet on a free port of this host, so that attempts side by side do not clash. No restarts inside an
attempt: an attempt is one life, and whether there is another is the driver's to decide."""


def command(intent: Intent, run_dir: Path) -> list[str]:
    """What is started for an intent."""
    words = intent.trainer or (sys.executable, *TRAINER)
    return [word.replace("{run_dir}", str(run_dir)).replace("{devices}", str(intent.devices_per_node)) for word in words]


def environment(intent: Intent, base: Mapping[str, str]) -> dict[str, str]:
    """The trainer's environment: the agent's, and for CPU devices one thread a rank and no CUDA device in sight."""
    variables = dict(base)
    if intent.device.startswith("cpu"):
        variables["CUDA_VISIBLE_DEVICES"] = ""
        variables["OMP_NUM_THREADS"] = "1"
    variables["PYTHONUNBUFFERED"] = "1"  # a killed trainer's last words are in its log
    return variables


KILLED = int(signal.SIGKILL)
"""Wait status of a process that nobody could wait for."""


@dataclass(frozen=True)
class Ended:
    """The trainer and all that it started are gone."""

    status: int
    """Wait status of the command."""
    time: float
    """Unix seconds."""


class TrainerProcess:
    """A guard, and once `start` was called the trainer below it."""

    def __init__(self, run_dir: Path, lock: int) -> None:
        """Start the guard. `lock`: descriptor of the run directory's lock, which the guard shares."""
        # Should somebody kill the guard, what it leaves comes to this process and is ended here.
        guard.prctl(guard.PR_SET_CHILD_SUBREAPER, 1)
        self.run_dir = run_dir
        self._socket, theirs = socket.socketpair()
        alive = os.open(run_dir / ALIVE, os.O_WRONLY | os.O_CREAT, 0o644)
        shared = (theirs.fileno(), lock, alive)
        argv = [sys.executable, "-I", "-S", guard.__file__, *map(str, shared)]
        self._guard = subprocess.Popen(argv, pass_fds=shared, start_new_session=True, stdin=subprocess.DEVNULL)
        theirs.close()
        self._alive = alive
        self._unread = b""
        self.ended: Ended | None = None

    def fileno(self) -> int:
        """Readable when the guard has something to say."""
        return self._socket.fileno()

    def start(self, argv: Sequence[str], variables: Mapping[str, str], *, log: Path) -> None:
        self._order({"argv": list(argv), "env": dict(variables), "cwd": str(self.run_dir), "log": str(log), "nice": os.nice(0)})

    def kill(self, clock: float, patience_s: float = 30.0) -> Ended:
        """End the trainer and everything below it; returns when it is gone, or after `patience_s` with what cannot be killed."""
        if self.ended is None:
            self._order({"kill": True})
        while self.ended is None:
            ready, _, _ = select.select([self._socket], [], [], patience_s)
            if not ready:
                self.ended = Ended(KILLED, clock)
                break
            self.listen(clock)
        return self.ended

    def listen(self, now: float) -> None:
        """Hear what the guard says; sets `ended`. `now`: for the case that the guard itself was killed, and its children with it."""
        try:
            data = self._socket.recv(4096)
        except ConnectionResetError:
            data = b""
        if not data:
            self._guard.wait()
            guard.end_children()
            self.ended = self.ended or Ended(KILLED, now)
            return
        *lines, self._unread = (self._unread + data).split(b"\n")
        for line in lines:
            word = json.loads(line)
            status = word["status"]
            self.ended = Ended(KILLED if status is None else status, word["ended"])

    def touch(self) -> None:
        """Say that the agent lives, as the guard does, for the case that somebody killed the guard."""
        os.utime(self._alive)

    def close(self) -> None:
        """Let the guard go, which ends whatever still runs. An agent need not: its death says the same."""
        self._socket.close()
        self._guard.wait()
        os.close(self._alive)

    def _order(self, order: Mapping[str, object]) -> None:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # a dead guard is heard by `listen`
            self._socket.sendall(json.dumps(order).encode() + b"\n")
