"""What a driver does before the first stage may begin, while it holds the lease already: the clips are made of raw videos, elsewhere.

Owns the interface alone. Whoever implements it keeps nothing that it could not read again: a driver may be killed between any two looks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

from orchestrator.driver.decide import Finish
from orchestrator.recipe.pipeline import Pipeline

LOOK_S = 2.0
"""Seconds between two looks."""


@dataclass(frozen=True)
class NotYet:
    """It goes on."""

    doing: str
    """For people: what is done, or waited for."""


class First(Protocol):
    def look(self, stop: Literal["drain", "kill"] | None, *, cancelled: bool) -> Pipeline | Finish | NotYet:
        """Do what is next, and say how it stands: the pipeline whose stages may begin, the end of it all, or that it goes on.

        Args:
            stop: what a person wants of this launch.
            cancelled: whether that was asked for in the ledger.

        Raises:
            Refused: it cannot be done.
            Unreachable: a store or a cluster did not answer; it is asked again.
        """
