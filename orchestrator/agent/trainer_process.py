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

from orchestrator import modules
from orchestrator.agent import guard
from orchestrator.agent.run_directory import FLIGHT_RECORDER
from orchestrator.effects import perform
from orchestrator.ledger.records import Intent
from orchestrator.local.attempt_lock import ALIVE
from orchestrator.local.clock import AttemptClock

RENDEZVOUS = "PET_RDZV_ENDPOINT"
"""Address where the nodes of a job meet: one of node 0. Whoever starts several agents sets it, and also PET_NNODES and PET_RDZV_BACKEND.
These are torchrun's own variables. The training operator of Kubernetes sets them for a PyTorchJob; the pods of a TrainJob have them."""
JOIN_S = 900
"""How long a node waits for the others before its first step: image pulls and the parent's download may differ by minutes between nodes."""


def command(intent: Intent, run_dir: Path, node: int = 0) -> list[str]:
    """The command of the trainer for an intent, on one of its nodes."""
    ours = modules.command("torch.distributed.run", *_torchrun(intent), "-m", "opensora.train", "{run_dir}")
    words = intent.trainer or tuple(ours)
    values = {"{run_dir}": str(run_dir), "{devices}": str(intent.devices_per_node), "{node}": str(node), "{nodes}": str(intent.nodes)}
    for name, value in values.items():
        words = tuple(word.replace(name, value) for word in words)
    return list(words)


def _torchrun(intent: Intent) -> tuple[str, ...]:
    """torchrun's options. It must not restart ranks inside an attempt: the driver decides whether there is another attempt.

    On one node the ranks meet on a free port of the host, so that attempts side by side do not clash. Each line of output names its rank,
    if there are several; this costs nothing measurable. torchrun's own files lie in the run directory: without a folder for them it would
    make one among the temporary files and leave it there.
    """
    options = ["--nproc-per-node", "{devices}", "--max-restarts", "0", "--log-dir", "{run_dir}/ranks"]
    if intent.nodes == 1:
        options += ["--standalone"]
    else:
        options += ["--rdzv-id", intent.run_key.replace("/", ".")]  # a folder of logs has this id in its name
    if intent.nodes * intent.devices_per_node > 1:
        options += ["--tee", "3"]
    return tuple(options)


def environment(intent: Intent, base: Mapping[str, str], run_dir: Path, node: int = 0) -> dict[str, str]:
    """The trainer's environment: the agent's, and for CPU devices one thread for each rank and no visible CUDA device.

    For other devices the communication library records its last collectives, and writes them to files when one of them hangs. Only here is
    it set how long several nodes wait for each other, and that they meet at node 0, for every trainer that torchrun starts. For Python's
    variables see `orchestrator.modules`.
    """
    variables = modules.without_working_folder(base) if intent.trainer else modules.environment(base)
    if intent.nodes > 1:
        # torchrun would compare the address with its host's: while the name of the first pod is not in the DNS yet, nobody would serve.
        serves = "true" if node == 0 else "false"
        variables["PET_RDZV_CONF"] = f"join_timeout={JOIN_S},read_timeout={JOIN_S},is_host={serves}"
    if intent.device.startswith("cpu"):
        variables["CUDA_VISIBLE_DEVICES"] = ""
        variables["OMP_NUM_THREADS"] = "1"
    else:
        variables["TORCH_NCCL_DEBUG_INFO_TEMP_FILE"] = f"{run_dir}/{FLIGHT_RECORDER}/rank-"
        variables.setdefault("TORCH_NCCL_TRACE_BUFFER_SIZE", "2000")
        variables.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")
        variables.setdefault("NCCL_DEBUG", "WARN")
    variables["TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE"] = "[rank${rank}] "
    variables["PYTHONUNBUFFERED"] = "1"  # so that the last output of a killed trainer is in its log
    return variables


STATUS_OF_KILLED = int(signal.SIGKILL)
"""Wait status that is used for a process that could not be waited for."""


@dataclass(frozen=True)
class Ended:
    """The trainer and all that it started have ended."""

    status: int
    """Wait status of the command."""
    time: float
    """Unix seconds."""


class TrainerProcess:
    """A guard, and below it the trainer once `start` was called."""

    def __init__(self, run_dir: Path, lock: int, clock: AttemptClock) -> None:
        """Start the guard. `lock` is the descriptor of the run directory's lock, which the guard shares; `clock` is the attempt's clock."""
        # If the guard is killed, this process inherits its children and ends them.
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
        """A descriptor that is readable when the guard has sent a message."""
        return self._socket.fileno()

    def has_spoken(self, timeout_s: float) -> bool:
        """Wait for a message of the guard, or for its end; `listen` reads it."""
        poll = select.poll()
        poll.register(self._socket, select.POLLIN)
        return bool(poll.poll(timeout_s * 1000))

    def start(self, argv: Sequence[str], variables: Mapping[str, str], *, log: Path) -> None:
        order = {"argv": list(argv), "env": dict(variables), "cwd": str(self.run_dir), "log": str(log), "nice": os.nice(0)}
        perform("process.start", self.run_dir.name, lambda: self._order(order))

    def kill(self, clock: float, patience_s: float = 30.0) -> Ended:
        """End the trainer and everything below it. Returns when all have ended, or after `patience_s` if one cannot be killed."""
        if self.ended is None:
            perform("process.kill", self.run_dir.name, lambda: self._order({"kill": True}))
        while self.ended is None:
            if not self.has_spoken(patience_s):
                self.ended = Ended(STATUS_OF_KILLED, clock)
                break
            self.listen(clock)
        return self.ended

    def listen(self, now: float) -> None:
        """Read the guard's messages and set `ended`. `now` is the time of the end if the guard itself was killed, and its children too."""
        try:
            data = self._socket.recv(4096)
        except ConnectionResetError:
            data = b""
        if not data:
            self._guard.wait()
            guard.end_children()
            self.ended = self.ended or Ended(STATUS_OF_KILLED, now)
            return
        *lines, self._unread = (self._unread + data).split(b"\n")
        for line in lines:
            word = json.loads(line)
            status = word["status"]
            self.ended = Ended(STATUS_OF_KILLED if status is None else status, word["ended"])

    def reap_strangers(self) -> None:
        """As PID 1 of a pod, reap orphans such as the commands of `kubectl exec`. `listen` reaps the guard."""
        while os.getpid() == 1:
            try:
                ended = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            except ChildProcessError:
                return
            if ended is None or ended.si_pid == self._guard.pid:
                return
            os.waitpid(ended.si_pid, 0)

    def touch(self) -> None:
        """Record that the agent is alive. The guard does this too, but it may have been killed."""
        with contextlib.suppress(OSError):
            os.utime(self._alive, (self._clock(), self._clock()))

    def close(self) -> None:
        """Release the guard, which ends whatever still runs. An agent need not call this: when it dies, the guard does the same."""
        self._socket.close()
        self._guard.wait()
        os.close(self._alive)

    def _order(self, order: Mapping[str, object]) -> None:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # `listen` notices a dead guard
            self._socket.sendall(json.dumps(order).encode() + b"\n")
