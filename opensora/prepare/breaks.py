"""What every detector of cuts finds, and how it is asked. Owns no detector: `cuts` and `transitions` do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from opensora.prepare.films import Timed
from opensora.prepare.scores import Picture


@dataclass(frozen=True)
class Break:
    """Between two scenes. Frames from `ends` to before `begins` belong to neither: a dissolve."""

    ends: int
    """Number of the first frame that is not of the scene before."""
    begins: int
    """Number of the first frame of the scene after."""


class Detector(Protocol):
    """Finds breaks."""

    marks: bool
    """Whether the latest frame may be the first of a scene."""
    near: bool
    """Whether it can use `near_planes`."""

    def see(self, number: int, timed: Timed, planes: tuple[Picture, ...] | None) -> list[Break]:
        """The next frame; breaks that are certain now, in order."""
        ...

    def end(self) -> list[Break]:
        """No frame follows; the last breaks."""
        ...
