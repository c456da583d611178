"""Functions for guards: of a module of their own, so that a guard can import them."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
from pathlib import Path

from opensora.dataset.rows import Drop
from opensora.errors import ConfigError
from opensora.prepare import guarded
from opensora.prepare.guard import resident


def poisoned(row: int) -> int:
    """Rows 7, 11, 13 and 16 of the twenty do what videos have been seen to do."""
    if row == 7:
        ctypes.string_at(0)
    if row == 11:
        os._exit(3)
    if row == 13:
        while True:
            time.sleep(60)
    if row == 16:
        kept = []
        while True:
            kept.append(bytearray(os.urandom(1 << 20) * 20))
    return row * row


def hangs_in_c(_row: int) -> None:
    """Ignores what can be ignored, as decord's loop does."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    ctypes.PyDLL(None).sleep(3600)  # with the interpreter's lock held


def pid_of(_row: object) -> int:
    return os.getpid()


def killed_once(folder: str) -> str:
    """Its guard is killed from outside over its first try."""
    mark = Path(folder) / "tried"
    if not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return "done"


def killed_always(_row: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def takes_its_time(seconds: float) -> str:
    guarded.tell("begun")
    guarded.allow(seconds + 20)
    time.sleep(seconds)
    return "done"


def tells_and_crashes(_row: object) -> None:
    guarded.tell("half of it")
    os.abort()


def dropped(row: int) -> int:
    raise Drop("not wanted", f"row {row}")


def broken(_row: object) -> object:
    return {}["missing"]


def misconfigured(_row: object) -> None:
    raise ConfigError("cut.detector transnetv2: not installed")


def unsendable(_row: object) -> object:
    return sys.stdin.read if sys.stdin else (lambda: 0)


def leaks(size: int) -> int:
    """Keeps `size` bytes for ever; bytes resident now."""
    _kept.append(bytearray(os.urandom(1024) * (size // 1024)))
    return resident(os.getpid())


def noted(row: tuple[str, int]) -> int:
    """Writes down that it began; row 50 crashes."""
    with open(row[0], "a") as file:  # noqa: PTH123
        file.write(f"{os.getpid()} {row[1]}\n")
    if row[1] == 50:
        os.abort()
    return row[1]


def same(row: object) -> object:
    return row


_kept: list[bytearray] = []
