"""One place to wait: signals, the launcher's death, words of the guard, and tasks that are done.

Owns the process's signal handlers and the watch over the launcher. Refuses to act on what happened.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Protocol

from orchestrator.processes import Process

TOGETHER_S = 1.0
"""Requests to leave that come within so long are one: a node that shuts down asks every process, and so does the launcher that it asks."""


class Readable(Protocol):
    def fileno(self) -> int: ...


class Events:
    """Make one at the very start of the process: until then a SIGTERM simply ends it."""

    def __init__(self, launcher_pid: int | None) -> None:
        """`launcher_pid`: the process whose death ends the attempt; none in a pod, where the agent is PID 1."""
        self.asked_to_leave = 0
        """How often it was asked to leave by SIGTERM, SIGINT or SIGHUP. Requests of one moment are one, and the launcher's is the same as
        the first that came from elsewhere."""
        self._others = 0
        self._last_asked = -TOGETHER_S
        self._launchers: Callable[[], bool] = lambda: False
        self._poll = select.poll()
        self._woken, self._waker = os.pipe()
        os.set_blocking(self._woken, False)
        os.set_blocking(self._waker, False)
        self._poll.register(self._woken, select.POLLIN)
        signal.set_wakeup_fd(self._waker, warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:  # as nohup leaves it
                signal.signal(number, self._on_signal)
        self._launcher = None if launcher_pid is None else _watch(launcher_pid)
        self.outlives_launcher = launcher_pid is None
        self.launcher_died = launcher_pid is not None and self._launcher is None
        if self._launcher is not None:
            self._poll.register(self._launcher, select.POLLIN)

    def _on_signal(self, _number: int, _frame: FrameType | None) -> None:
        now = time.monotonic()
        together = now - self._last_asked < TOGETHER_S
        self._last_asked = now
        if self._launchers():  # it asks once to save; to end at once it kills
            self.asked_to_leave = max(self.asked_to_leave, 1)
        elif not together or not self._others:
            self._others += 1
            self.asked_to_leave = max(self.asked_to_leave, self._others)

    def tell_launchers_requests(self, is_launchers: Callable[[], bool]) -> None:
        """`is_launchers` says, once for each, whether the launcher has made a request: one of the signals that come is that one."""
        self._launchers = is_launchers

    def follow(self, launcher: Process) -> bool:
        """Live and die with another launcher from now on. False: it does not live, or not where it could be seen from here."""
        if not launcher.is_here:
            return False
        try:
            handle = os.pidfd_open(launcher.pid)
        except ProcessLookupError:
            return False
        if not launcher.alive():  # asked while the handle is held, so the pid cannot change hands in between
            os.close(handle)
            return False
        self._launcher, self.launcher_died = handle, False
        self._poll.register(handle, select.POLLIN)
        return True

    def outlive_launcher(self) -> None:
        """Go on without one."""
        self.launcher_died = False

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
