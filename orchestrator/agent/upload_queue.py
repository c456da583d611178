"""Uploads in the background: in order, again and again until they succeed, without ever holding up the training.

Owns the retries against the store. Refuses to know what is sent.
"""

from __future__ import annotations

import errno
import logging
import random
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from orchestrator.errors import NotFound, OsctlError, StoreConflict, Unreachable

log = logging.getLogger(__name__)

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.2, 10.0
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


def is_disk_full(error: BaseException) -> bool:
    """Whether a full disk is what an error comes from: a folder as a store says Unreachable."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__cause__
    return cause is not None and cause.errno in DISK_FULL


@dataclass(frozen=True)
class Upload:
    name: str
    """What is sent, for messages."""
    send: Callable[[], object]
    after: Callable[[], object] = lambda: None
    """Called when it was delivered, refused or dropped."""


@dataclass(frozen=True)
class Refusal:
    """Why an upload will never be delivered."""

    reason: str
    disk_full: bool


def _shielded(call: Callable[[], object], what: str) -> None:
    """Call, and log whatever goes wrong. It must not end the thread: every later upload would wait for ever."""
    try:
        call()
    except Exception:
        log.exception("%s failed", what)


class UploadQueue(threading.Thread):
    """One queue."""

    def __init__(
        self, name: str, wake: Callable[[], None], arrived: Callable[[], int] = lambda: 0, *, waits_for_space: bool = False
    ) -> None:
        """
        Args:
            wake: called, from this thread, whenever an upload is done with.
            arrived: grows while an upload is in flight and parts of it arrive (`Store.arrived`).
            waits_for_space: a full disk refuses nothing for good. Of pieces that belong together one must not be left out.
        """
        self._waits_for_space, self.disk_full = waits_for_space, False
        super().__init__(name=name, daemon=True)
        self._wake, self._arrived = wake, arrived
        self._changed = threading.Condition()
        self._queue: deque[Upload] = deque()
        self._busy = False
        self.refused: dict[str, Refusal] = {}
        """Uploads that the store will never take, by name."""
        self._failure: tuple[float, int] | None = None
        """Of the first failure after the last success or progress: when it was, and how many bytes had arrived by then."""
        self.trouble = ""
        """The store's last error, while it fails; empty: it does not fail."""
        self.delivered: float | None = None
        """time.clock_gettime(CLOCK_BOOTTIME) at the start of the last delivery that succeeded: what the store has is not older."""
        self.start()

    def put(self, upload: Upload, *, keep: int | None = None) -> None:
        """Queue an upload. With `keep`, the oldest that have not begun are dropped, so that no more than `keep` wait."""
        with self._changed:
            self._queue.append(upload)
            dropped = (
                [self._queue.popleft() for _ in range(len(self._queue) - keep)] if keep is not None and len(self._queue) > keep else []
            )
            self._changed.notify()
        for old in dropped:
            log.warning("%s: not published, newer ones wait behind it", old.name)
            _shielded(old.after, f"after {old.name}")

    def drop(self) -> None:
        """Forget the uploads that have not begun."""
        with self._changed:
            dropped = list(self._queue)
            self._queue.clear()
        for upload in dropped:
            _shielded(upload.after, f"after {upload.name}")

    @property
    def failing_since(self) -> float | None:
        """time.monotonic() of the first failure after the last success. Parts of an upload that arrive are a success, too."""
        failure, arrived = self._failure, self._arrived()
        if failure is not None and arrived > failure[1]:
            failure = self._failure = time.monotonic(), arrived
        return None if failure is None else failure[0]

    @property
    def idle(self) -> bool:
        with self._changed:
            return not self._queue and not self._busy

    def run(self) -> None:
        while True:
            with self._changed:
                while not self._queue:
                    self._changed.wait()
                upload, self._busy = self._queue.popleft(), True
            self._deliver(upload)
            _shielded(upload.after, f"after {upload.name}")
            with self._changed:
                self._busy = False
            _shielded(self._wake, "wake")

    def _deliver(self, upload: Upload) -> None:
        pause = FIRST_PAUSE_S
        while True:
            began = time.clock_gettime(time.CLOCK_BOOTTIME)
            try:
                upload.send()
            except Exception as error:  # noqa: BLE001 - one upload's fault must neither hold up the others nor keep the agent from leaving
                full = is_disk_full(error)
                if (full and not self._waits_for_space) or not isinstance(error, Unreachable | OSError):
                    self._refuse(upload, error)
                    return
                self.trouble = f"{upload.name}: {error}"
                log.warning("%s; again in %.1f s", self.trouble, pause)
                if self.failing_since is None:
                    self._failure = time.monotonic(), self._arrived()
                self.disk_full = full
                time.sleep(pause * random.uniform(0.5, 1.0))  # not all agents at once
                pause = min(2 * pause, LONGEST_PAUSE_S)
                continue
            self._failure, self.trouble, self.disk_full, self.delivered = None, "", False, began
            return

    def _refuse(self, upload: Upload, error: Exception) -> None:
        expected = isinstance(error, StoreConflict | OsctlError | NotFound | OSError)
        log.error("%s: %s", upload.name, error, exc_info=not expected)
        reason = str(error) if expected else f"{type(error).__name__}: {error}"
        self.refused[upload.name] = Refusal(reason, is_disk_full(error))
