"""What signals mean to a process that is a driver. For `osctl` and for driver processes alone: a library call sets no handler."""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Callable, Iterator
from typing import Protocol

TOGETHER_S = 1.0
"""Requests to stop that come within so many seconds of each other are one."""


class Stoppable(Protocol):
    """Of a `Runner`: each only sets a flag."""

    def drain(self) -> None: ...
    def kill(self) -> None: ...


class Detachable(Protocol):
    """Of a `Runner`: each only sets a flag."""

    def drain(self) -> None: ...
    def detach(self) -> None: ...


@contextlib.contextmanager
def save_on_signals(runner: Stoppable, say: Callable[[str], None]) -> Iterator[None]:
    """SIGINT, SIGTERM or SIGHUP once: save and stop. Again, `TOGETHER_S` seconds later or more: end now.

    A machine that shuts down, or a terminal that closes, sends several at once. A SIGHUP that was ignored at the start stays so (nohup);
    SIGINT does not, since a shell ignores it in what it starts with `&`, and a person may send it all the same.
    """
    last: float | None = None

    def handle(signum: int, _frame: object) -> None:
        nonlocal last
        before, last = last, time.monotonic()
        if before is None:
            runner.drain()
            with contextlib.suppress(OSError):  # the terminal may be gone
                say("\nsaving, then stopping; once more to end at once without saving")
        elif last - before >= TOGETHER_S:
            runner.kill()

    hangup = () if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else (signal.SIGHUP,)
    previous = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM, *hangup)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def leave_on_signals(runner: Detachable) -> Iterator[None]:
    """SIGTERM, SIGHUP: leave the attempts running. SIGINT, from a person at a terminal: save and stop, as everywhere."""
    leave = [signal.SIGTERM] if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else [signal.SIGTERM, signal.SIGHUP]
    handlers = {number: lambda *_: runner.detach() for number in leave} | {signal.SIGINT: lambda *_: runner.drain()}
    previous = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
