"""Processes that a test starts and that end with it."""

from __future__ import annotations

import contextlib
import os
import resource
import select
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

SAYS_WHERE = signal.SIGUSR2
"""A forked rank prints what each of its threads does when it gets this signal (forked_torchrun.py)."""


def has_spoken(source: int | socket.socket, timeout_s: float | None = None) -> bool:
    """Wait until a descriptor can be read. A pidfd is readable once its process has ended."""
    poll = select.poll()
    poll.register(source, select.POLLIN)
    return bool(poll.poll(None if timeout_s is None else timeout_s * 1000))


def open_files() -> list[str]:
    """What each descriptor of this process is."""
    found = []
    for one in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):  # that of the folder itself
            found.append(str(one.readlink()))
    return sorted(found)


@contextmanager
def crowded(beyond: int = 1024) -> Iterator[None]:
    """Every descriptor that is opened meanwhile has a number above that: `select` takes none of them."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(4 * beyond, hard)), hard))
    opened = [os.open(os.devnull, os.O_RDONLY)]
    try:
        while opened[-1] < beyond:
            opened.append(os.dup(opened[0]))
        yield
    finally:
        for one in opened:
            os.close(one)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@contextmanager
def running(*command: str | Path, **options: Any) -> Iterator[subprocess.Popen[Any]]:
    """A process that is killed when the `with` is left. `with subprocess.Popen(...)` waits for it, for ever where the test has failed."""
    with subprocess.Popen(command, **options) as process:
        try:
            yield process
        finally:
            process.kill()


def what_stands(pid: int, folder: Path) -> str:
    """Of a command that does not end: its processes, what they wait for, and the last lines of each log below its folder. Whoever reads
    the failure has nothing else of it.
    """
    below = [one for one in psutil.Process(pid).children(recursive=True) if one.status() != psutil.STATUS_ZOMBIE]
    lines = [f"{one.pid} {one.status()} {_waits_for(one.pid)} {' '.join(one.cmdline())[:160]}" for one in below]
    ranks = [one for one in below if _catches(one.pid, SAYS_WHERE)]
    for one in ranks:
        one.send_signal(SAYS_WHERE)
    time.sleep(1 if ranks else 0)  # they print into their logs
    for log in sorted(folder.rglob("*.log")):
        lines += [f"--- {log.relative_to(folder)}", *log.read_text(errors="replace").splitlines()[-150:]]
    return "\n".join(lines)


def _waits_for(pid: int) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/wchan").read_text() or "-"
    return "-"


def _catches(pid: int, number: signal.Signals) -> bool:
    with contextlib.suppress(OSError):
        status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":" in line)
        return bool(int(status["SigCgt"], 16) >> (number - 1) & 1)
    return False
