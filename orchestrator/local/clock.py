"""The clock of one attempt on one node: one reading of the wall clock, and from then on a clock that nobody sets.

A wall clock that is stepped by an hour must not become an hour on a bill. So all times that an attempt books come from one reading of the
wall clock, when its devices were bound, plus what has gone by since on CLOCK_BOOTTIME. That one goes on while a machine sleeps: a device
of a sleeping machine is still held by us. Launcher, agent and guard share one anchor; of a trainer's own words, which are of the wall
clock, `of_wall` makes times of this clock.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

log = logging.getLogger(__name__)

PARTED_S = 1.0
"""So far may the wall clock go off before somebody is told."""


def boottime() -> float:
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class AttemptClock:
    def __init__(
        self, wall: float, boot: float, *, read_wall: Callable[[], float] = time.time, read_boot: Callable[[], float] = boottime
    ) -> None:
        """`wall`, `boot`: both clocks at one moment."""
        self.offset = wall - boot
        """What turns CLOCK_BOOTTIME into Unix seconds."""
        self._read_wall, self._read_boot = read_wall, read_boot
        self._said = 0.0

    @classmethod
    def parse(cls, anchor: str) -> AttemptClock:
        wall, boot = map(float, anchor.split(","))
        return cls(wall, boot)

    @classmethod
    def here(cls) -> AttemptClock:
        """Anchored now."""
        return cls(time.time(), boottime())

    def __call__(self) -> float:
        """Unix seconds."""
        return self._read_boot() + self.offset

    def parted(self) -> float:
        """By how many seconds the wall clock is ahead of this one now."""
        return self._read_wall() - self()

    def of_wall(self, time: float) -> float:
        """What a reading of the wall clock, taken since it was last set, is on this clock."""
        return time - self.parted()

    def news(self) -> str:
        """What to tell people, once for each step of the wall clock; empty: nothing new."""
        parted = self.parted()
        if abs(parted - self._said) < PARTED_S:
            return ""
        self._said = parted
        shown = self()
        return f"the clock of this machine was set: it says {shown + parted:.3f}, this attempt books {shown:.3f} ({parted:+.3f} s)"
