"""The guard: a small process between the agent and the trainer, so that no process of an attempt outlives its agent.

    agent ── socket ──> guard (subreaper) ──> trainer's command ──> ranks, in sessions of their own

The agent starts it as a script, `python -I -S guard.py SOCKET_FD LOCK_FD ALIVE_FD OFFSET`, before anything else. It imports only the
standard library. It starts the trainer when the agent says so, and kills all descendants when the trainer has ended or the agent says so.
When the socket closes, as it does when the agent dies in any way, it kills all descendants and exits. It holds the run directory's lock
until then. It touches `alive` every 20 ms while the agent lives and once when it dies; the agent, busy with uploads, could not be so
punctual.

Why a process, and not only a death signal (PR_SET_PDEATHSIG): torchrun starts each rank in its own session, and a killed torchrun leaves
them behind; also a death signal comes when the parent's *thread* ends. A subreaper inherits every orphan below it.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import select
import signal
import socket
import sys
import time
from typing import Any

TICK_S = 0.02
PR_SET_PDEATHSIG, PR_SET_NAME, PR_SET_CHILD_SUBREAPER = 1, 15, 36


def prctl(option: int, argument: int | bytes) -> None:
    """Raises OSError."""
    if ctypes.CDLL(None, use_errno=True).prctl(option, argument, 0, 0, 0):
        raise OSError(ctypes.get_errno(), f"prctl {option}")


def children_of(parent: int) -> list[int]:
    """Direct children, from /proc. The kernel's own list of children is a build option that many kernels do not have."""
    found = []
    for name in os.listdir("/proc"):  # noqa: PTH208 - pathlib would double this process's start-up time
        if name.isdigit():
            try:
                with open(f"/proc/{name}/stat", "rb") as file:  # noqa: PTH123
                    fields = file.read().rpartition(b")")[2].split()
            except (FileNotFoundError, ProcessLookupError):
                continue
            if int(fields[1]) == parent:
                found.append(int(name))
    return found


def kill_children() -> None:
    """Send SIGKILL to every direct child. A subreaper inherits their children, so repeat this until nothing is left to reap."""
    for pid in children_of(os.getpid()):
        os.kill(pid, signal.SIGKILL)  # it is our child until it is reaped, so the pid cannot belong to another process


def reap() -> tuple[dict[int, int], bool]:
    """Wait statuses of the children that have ended, and whether any child is left."""
    ended: dict[int, int] = {}
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return ended, False
        if pid == 0:
            return ended, True
        ended[pid] = status


def end_children() -> None:
    """Kill and reap until no descendant is left. For a subreaper."""
    while True:
        kill_children()
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            return


class Guard:
    def __init__(self, agent: socket.socket, alive: int, offset: float) -> None:
        """`offset` plus CLOCK_BOOTTIME gives Unix seconds as the agent counts them, so that setting the clock changes nothing."""
        self.agent, self.alive, self.offset = agent, alive, offset
        self.hangup = signal.SIG_DFL
        """The trainer's initial handling of SIGHUP; under nohup it is ignored."""
        self.trainer: int | None = None
        self.status: int | None = None
        self.ending = False
        self._complained = False
        self._unread = b""  # the beginning of a message that has not fully arrived

    def now(self) -> float:
        return time.clock_gettime(time.CLOCK_BOOTTIME) + self.offset

    def watch(self) -> None:
        """Serve the agent. Returns when the agent is dead."""
        woken, waker = os.pipe()
        os.set_blocking(waker, False)
        signal.signal(signal.SIGCHLD, lambda *_: None)  # only so that the signal wakes the poll
        signal.set_wakeup_fd(waker, warn_on_full_buffer=False)
        poll = select.poll()
        poll.register(self.agent, select.POLLIN)
        poll.register(woken, select.POLLIN)
        seen = self.now()
        while True:
            ready = {descriptor for descriptor, _ in poll.poll(TICK_S * 1000)}
            last, seen = seen, self.now()
            if woken in ready:
                os.read(woken, 4096)
            if self.agent.fileno() in ready and not self._listen():
                late = max(0.0, seen - last - TICK_S)
                self.touch(seen - late / 2)  # if a busy machine woke this process late, the agent died some time in between
                return
            self.touch(seen)
            if woken in ready or self.ending:
                self._reap()

    def touch(self, moment: float) -> None:
        """Record that the agent was alive at this moment. If the file system refuses, the training must not end."""
        try:
            os.utime(self.alive, (moment, moment))
        except OSError as error:
            if not self._complained:  # only once, since it would come 50 times a second
                say(f"run directory: the time of `alive` cannot be set: {error.strerror}")
            self._complained = True

    def _listen(self) -> bool:
        try:
            data = self.agent.recv(65536)
        except ConnectionResetError:
            return False
        *lines, self._unread = (self._unread + data).split(b"\n")
        for line in lines:
            order = json.loads(line)
            if "argv" in order:
                self.trainer = start(order, self.hangup)
            else:
                self.ending = True
                kill_children()
        return bool(data)

    def _reap(self) -> None:
        ended, left = reap()
        if self.trainer in ended:
            self.status, self.ending = ended[self.trainer], True
        if self.ending and left:
            kill_children()
        elif self.ending:
            self.ending = False
            self._say({"status": self.status, "ended": self.now()})

    def _say(self, word: dict[str, Any]) -> None:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # the agent has died; the next poll notices it
            self.agent.send(json.dumps(word).encode() + b"\n")


def say(text: str) -> None:
    with contextlib.suppress(OSError):  # the disk may be full
        os.write(2, f"guard: {text}\n".encode())


def start(order: dict[str, Any], hangup: signal.Handlers) -> int:
    """Start the trainer in a new session and return its pid. If the command cannot be started, it exits with 127 and its log says why."""
    guard = os.getpid()
    pid = os.fork()  # this process has one thread
    if pid:
        return pid
    try:
        signal.set_wakeup_fd(-1)
        for number in (signal.SIGCHLD, signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGHUP, hangup)
        os.setsid()
        os.setpriority(os.PRIO_PROCESS, 0, order["nice"])
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != guard:
            os._exit(127)
        log = os.open(order["log"], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        for target, source in ((0, os.open(os.devnull, os.O_RDONLY)), (1, log), (2, log)):
            os.dup2(source, target)
        os.chdir(order["cwd"])
        os.execvpe(order["argv"][0], order["argv"], order["env"])
    except OSError as error:
        os.write(2, f"error: {order['argv'][0]}: {error.strerror}\n".encode())
    finally:
        os._exit(127)


def main() -> None:
    agent, lock, alive = map(int, sys.argv[1:4])
    for descriptor in (agent, lock, alive):
        os.set_inheritable(descriptor, False)
    ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    prctl(PR_SET_NAME, b"osctl-guard")
    prctl(PR_SET_CHILD_SUBREAPER, 1)
    with contextlib.suppress(PermissionError):  # only root may; on a busy machine a late wake-up gives a wrong time of death
        os.setpriority(os.PRIO_PROCESS, 0, -10)
    guard = Guard(socket.socket(fileno=agent), alive, float(sys.argv[4]))
    guard.hangup = signal.SIG_IGN if ignored else signal.SIG_DFL
    guard.watch()
    if children_of(os.getpid()):  # the agent was killed; the ranks hold their devices until they have ended
        end_children()
        guard.touch(guard.now())


if __name__ == "__main__":
    main()
