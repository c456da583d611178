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
from orchestrator.agent.run_directory import FLIGHT_RECORDER
from orchestrator.claim import ALIVE
from orchestrator.clock import AttemptClock
from orchestrator.records import Intent

RENDEZVOUS = "PET_RDZV_ENDPOINT"
"""Where the nodes of a job meet; whoever starts several agents sets it, and PET_NNODES and PET_RDZV_BACKEND beside it: torchrun's own
variables, as the training operator of Kubernetes sets them."""
JOIN_S = 900
"""How long a node waits for the others before its first step: image pulls and the parent's download differ by minutes between nodes."""


def command(intent: Intent, run_dir: Path, node: int = 0) -> list[str]:
    """What is started for an intent on one of its nodes."""
    words = intent.trainer or (sys.executable, "-m", "torch.distributed.run", *_torchrun(intent), "-m", "opensora.train", "{run_dir}")
    values = {"{run_dir}": str(run_dir), "{devices}": str(intent.devices_per_node), "{node}": str(node), "{nodes}": str(intent.nodes)}
    for name, value in values.items():
        words = tuple(word.replace(name, value) for word in words)
    return list(words)


def _torchrun(intent: Intent) -> tuple[str, ...]:
    """No restarts inside an attempt: an attempt is one life, and whether there is another is the driver's to decide.

    On one node the ranks meet on a free port of the host, so that attempts side by side do not clash. Output of several ranks is told
    apart line by line; it costs nothing that could be measured. torchrun's own files lie in the run directory: without a folder for them
    it makes one among the temporary files, and leaves it there.
    """
    options = ["--nproc-per-node", "{devices}", "--max-restarts", "0", "--log-dir", "{run_dir}/ranks"]
    if intent.nodes == 1:
        options += ["--standalone"]
    else:
        options += ["--rdzv-id", intent.run_key.replace("/", ".")]  # a folder of logs has this id in its name
    if intent.nodes * intent.devices_per_node > 1:
        options += ["--tee", "3"]
    return tuple(options)


def environment(intent: Intent, base: Mapping[str, str], run_dir: Path) -> dict[str, str]:
    """The trainer's environment: the agent's, and for CPU devices one thread a rank and no CUDA device in sight.

    For others the communication library keeps its last collectives, and writes them down when one of them does not end. Several nodes
    wait for each other for so long as is said here alone, whichever trainer is started by torchrun.
    """
    variables = dict(base)
    if intent.nodes > 1:
        variables["PET_RDZV_CONF"] = f"join_timeout={JOIN_S},read_timeout={JOIN_S}"
    if intent.device.startswith("cpu"):
        variables["CUDA_VISIBLE_DEVICES"] = ""
        variables["OMP_NUM_THREADS"] = "1"
    else:
        variables["TORCH_NCCL_DEBUG_INFO_TEMP_FILE"] = f"{run_dir}/{FLIGHT_RECORDER}/rank-"
        variables.setdefault("TORCH_NCCL_TRACE_BUFFER_SIZE", "2000")
        variables.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")
        variables.setdefault("NCCL_DEBUG", "WARN")
    variables["TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE"] = "[rank${rank}] "
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

    def __init__(self, run_dir: Path, lock: int, clock: AttemptClock) -> None:
        """Start the guard. `lock`: descriptor of the run directory's lock, which the guard shares; `clock`: the attempt's."""
        # Should somebody kill the guard, what it leaves comes to this process and is ended here.
        guard.prctl(guard.PR_SET_CHILD_SUBREAPER, 1)
        self.run_dir = run_dir
        self._socket, theirs = socket.socketpair()
        alive = os.open(run_dir / ALIVE, os.O_WRONLY | os.O_CREAT, 0o644)
        shared = (theirs.fileno(), lock, alive)
        argv = [sys.executable, "-I", "-S", guard.__file__, *map(str, shared), repr(clock.offset)]
        self._clock = clock
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

    def reap_strangers(self) -> None:
        """As PID 1 of a pod: bury what others left behind, such as the commands of `kubectl exec`. The guard is buried by `listen`."""
        while os.getpid() == 1:
            try:
                ended = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            except ChildProcessError:
                return
            if ended is None or ended.si_pid == self._guard.pid:
                return
            os.waitpid(ended.si_pid, 0)

    def touch(self) -> None:
        """Say that the agent lives, as the guard does, for the case that somebody killed the guard."""
        os.utime(self._alive, (self._clock(), self._clock()))

    def close(self) -> None:
        """Let the guard go, which ends whatever still runs. An agent need not: its death says the same."""
        self._socket.close()
        self._guard.wait()
        os.close(self._alive)

    def _order(self, order: Mapping[str, object]) -> None:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # a dead guard is heard by `listen`
            self._socket.sendall(json.dumps(order).encode() + b"\n")
