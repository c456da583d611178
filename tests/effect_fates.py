"""A witness of the port for effects within a test's own process: death without dying, and answers that are lost."""

from __future__ import annotations

from typing import Literal

from orchestrator.effects import Effect
from orchestrator.errors import Unreachable


class Crash(BaseException):
    """Stands for SIGKILL: nothing catches it."""


When = Literal["before", "after", "lost"]


class Fate:
    """What befalls a process at its n-th effect: it dies before or after it, or the answer is lost. The dead have no more effects."""

    def __init__(self, at: int, when: When) -> None:
        self._at, self._when = at, when
        self.reached = self._dead = False

    def before(self, effect: Effect) -> None:
        if self._dead:
            raise Crash
        self.reached |= effect.number == self._at
        if effect.number == self._at and self._when == "before":
            self._die()

    def after(self, effect: Effect, answer: object) -> None:
        if effect.number == self._at and self._when == "after":
            self._die()
        if effect.number == self._at and self._when == "lost":
            raise Unreachable("the answer to an effect was lost")

    def _die(self) -> None:
        self._dead = True
        raise Crash
