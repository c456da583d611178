"""Turns of processes and threads on one machine, by locks of files: they end with whoever holds them, however it ends.

Owns the locks of single files, and the connections to a host. Refuses to work over machines: flock on a network's file system may not.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
from collections.abc import Iterator
from pathlib import Path

from opensora.prepare.parts import Halt, Sleep, refuse_stopped


@contextlib.contextmanager
def turn(lock: Path, halt: Halt, sleep: Sleep) -> Iterator[None]:
    """Of one file, one process or thread at a time. Raises Quarantine, where the run is to stop."""
    while True:
        with lock.open("ab") as file:
            if _locked(file.fileno()) and _is_there(lock, file.fileno()):
                try:
                    yield
                finally:
                    lock.unlink(missing_ok=True)
                return
        refuse_stopped(halt)
        sleep(0.1)


def _is_there(lock: Path, number: int) -> bool:
    """Whether a lock is not one that its owner has just removed."""
    with contextlib.suppress(FileNotFoundError):
        return lock.stat().st_ino == os.fstat(number).st_ino
    return False


@contextlib.contextmanager
def slot(folder: Path, host: str, many: int, halt: Halt, sleep: Sleep) -> Iterator[None]:
    """One of `many` connections to a host, over all processes that fetch into this folder. Waits for one that is free."""
    locks = folder / ".hosts" / re.sub(r"[^a-z0-9.-]", "_", host.lower())[:120]
    locks.mkdir(parents=True, exist_ok=True)
    while True:
        for number in range(many):
            with (locks / f"{number}.lock").open("ab") as file:
                if _locked(file.fileno()):
                    yield
                    return
        refuse_stopped(halt)
        sleep(0.05)


def _locked(number: int) -> bool:
    try:
        fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
