"""The driver's clock. Tests have one of their own, in which an hour passes at once."""

from __future__ import annotations

import time
from typing import Protocol

from orchestrator.local.clock import boottime


class Clock(Protocol):
    def now(self) -> float:
        """Unix time in seconds."""

    def elapsed(self) -> float:
        """Seconds of a clock that nobody sets, and that goes on while the machine sleeps."""

    def sleep(self, seconds: float) -> None: ...


class SystemClock:
    def now(self) -> float:
        return time.time()

    def elapsed(self) -> float:
        return boottime()

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)
