"""Who a process is, beyond its pid: pids are used again, and hosts and containers share numbers.

Reads /proc, so Linux only. Refuses to judge a process that it cannot see from here.
"""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Process:
    host: str
    pid: int
    started: float
    """Seconds between the boot of the host and the start of the process: no clock that is set can change it."""
    boot: str
    """Boot id of the kernel and the pid namespace: two places that agree on it number their processes alike."""

    @classmethod
    def of(cls, pid: int) -> Process:
        """Raises ProcessLookupError."""
        started = _started(pid)
        if started is None:
            raise ProcessLookupError(pid)
        return cls(socket.gethostname(), pid, started, _boot())

    @property
    def is_here(self) -> bool:
        """Whether this process could be seen from here, if it lived."""
        return (self.host, self.boot) == (socket.gethostname(), _boot())

    def alive(self) -> bool | None:
        """None: it belongs to another host, container or boot, and cannot be judged from here."""
        return _started(self.pid) == self.started if self.is_here else None


def _started(pid: int) -> float | None:
    """None: there is no such process, or it has died and only waits for its parent to notice."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    # The name in parentheses may hold anything; fields are counted from behind it (proc(5): state is field 3, starttime 22).
    fields = text.rpartition(")")[2].split()
    return None if fields[0] in "ZX" else int(fields[19]) / os.sysconf("SC_CLK_TCK")


def _boot() -> str:
    return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {Path('/proc/self/ns/pid').readlink()}"
