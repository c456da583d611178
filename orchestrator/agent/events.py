"""One place to wait: signals, the launcher's death, words of the guard, and tasks that are done.

Owns the process's signal handlers and the watch over the launcher. Refuses to act on what happened.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Protocol


class Readable(Protocol):
    def fileno(self) -> int: ...


class Events:
    """Make one at the very start of the process: until then a SIGTERM simply ends it."""

    def __init__(self, launcher_pid: int | None) -> None:
        """`launcher_pid`: the process whose death ends the attempt; none in a pod, where the agent is PID 1."""
        self.asked_to_leave = 0
        """How many SIGTERM and SIGINT came."""
        self._poll = select.poll()
        self._woken, self._waker = os.pipe()
        os.set_blocking(self._woken, False)
        os.set_blocking(self._waker, False)
        self._poll.register(self._woken, select.POLLIN)
        signal.set_wakeup_fd(self._waker, warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)
        self._launcher = None if launcher_pid is None else _watch(launcher_pid)
        self.outlives_launcher = launcher_pid is None
        self.launcher_died = launcher_pid is not None and self._launcher is None
        if self._launcher is not None:
            self._poll.register(self._launcher, select.POLLIN)

    def _on_signal(self, _number: int, _frame: FrameType | None) -> None:
        self.asked_to_leave += 1

    def listen_to(self, source: Readable) -> None:
        self._poll.register(source, select.POLLIN)

    def forget(self, source: Readable) -> None:
        self._poll.unregister(source)

    def wake(self) -> None:
        """End a wait, from any thread."""
        with contextlib.suppress(BlockingIOError):  # full of earlier calls: it will wake
            os.write(self._waker, b"w")

    def wait(self, timeout_s: float) -> set[int]:
        """Descriptors that have something to say; empty after `timeout_s`, a signal or a `wake`."""
        ready = {descriptor for descriptor, _ in self._poll.poll(max(0.0, timeout_s) * 1000)}
        if self._woken in ready:
            os.read(self._woken, 4096)
        if self._launcher is not None and self._launcher in ready:
            self.launcher_died = True
            self._poll.unregister(self._launcher)
            os.close(self._launcher)
            self._launcher = None
        return ready


def _watch(launcher_pid: int) -> int | None:
    """A pidfd of the launcher; none where it is dead already.

    Not a death signal: that one comes when the launcher's *thread* that started this process ends.
    """
    try:
        handle = os.pidfd_open(launcher_pid)
    except ProcessLookupError:
        return None
    if os.getppid() != launcher_pid:  # it died before, and its pid may be another's
        os.close(handle)
        return None
    return handle


class Task(threading.Thread):
    """Work beside the main loop that may fail. `wake` is called when it is done."""

    def __init__(self, work: Callable[[], None], wake: Callable[[], None]) -> None:
        super().__init__(daemon=True)
        self._work, self._wake = work, wake
        self._error: Exception | None = None
        self.done = False
        self.start()

    def run(self) -> None:
        try:
            self._work()
        except Exception as error:  # noqa: BLE001 - raised by `check`, where somebody can judge it
            self._error = error
        self.done = True
        self._wake()

    def check(self) -> None:
        """Raises what the work raised."""
        if self._error is not None:
            raise self._error
