"""The one place where the agent waits: for signals, the launcher's death, messages of the guard, and finished tasks.

Owns the process's signal handlers and watches the launcher. Refuses to act on what happened.
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

from orchestrator.local.processes import Process

TOGETHER_S = 1.0
"""Requests to leave that come within this time count as one: a node that shuts down signals every process, and so does the launcher, which
was signalled too."""


class Readable(Protocol):
    def fileno(self) -> int: ...


class Events:
    """Make one at the very start of the process: until then a SIGTERM simply ends it."""

    def __init__(self, launcher_pid: int | None) -> None:
        """`launcher_pid` is the process whose death ends the attempt. None means a pod, where the agent is PID 1."""
        self.asked_to_leave = 0
        """How often the agent was asked to leave by SIGTERM, SIGINT or SIGHUP. Requests at the same moment count as one, and the launcher's
        request counts as the same as the first from elsewhere."""
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
            if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:  # nohup ignores SIGHUP, and so it stays
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
        if self._launchers():  # the launcher asks only once to save; to end the agent at once it kills it
            self.asked_to_leave = max(self.asked_to_leave, 1)
        elif not together or not self._others:
            self._others += 1
            self.asked_to_leave = max(self.asked_to_leave, self._others)

    def tell_launchers_requests(self, is_launchers: Callable[[], bool]) -> None:
        """Count a signal as the launcher's when `is_launchers` is true. It says so once for each request that the launcher has made."""
        self._launchers = is_launchers

    def follow(self, launcher: Process) -> bool:
        """Watch another launcher from now on instead. False means that it is dead, or that it is not a process that this host can watch."""
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
        """Go on without a launcher."""
        self.launcher_died = False

    def listen_to(self, source: Readable) -> None:
        self._poll.register(source, select.POLLIN)

    def forget(self, source: Readable) -> None:
        self._poll.unregister(source)

    def wake(self) -> None:
        """End a wait. May be called from any thread."""
        with contextlib.suppress(BlockingIOError):  # the pipe is full of earlier calls, so the wait will end
            os.write(self._waker, b"w")

    def wait(self, timeout_s: float) -> set[int]:
        """Wait for the descriptors, and return those that are readable: none after `timeout_s`, a signal or a `wake`."""
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
    """A pidfd of the launcher. None means that it is dead already.

    A death signal (PR_SET_PDEATHSIG) is not used: it comes when the launcher's *thread* that started this process ends.
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
    """A thread for work beside the main loop that may fail. It calls `wake` when it is done."""

    def __init__(self, work: Callable[[], None], wake: Callable[[], None]) -> None:
        super().__init__(daemon=True)
        self._work, self._wake = work, wake
        self._error: Exception | None = None
        self.done = False
        self.start()

    def run(self) -> None:
        try:
            self._work()
        except Exception as error:  # noqa: BLE001 - `check` raises it in the main loop
            self._error = error
        self.done = True
        self._wake()

    def check(self) -> None:
        """Raise the error of the work, if it failed."""
        if self._error is not None:
            raise self._error
