"""When a loss has left its range and stays there (`StageConfig.loss_spike`).

A resumed run begins with an empty window, so it may notice a spike later than the unbroken run: the weights do not depend on it.
"""

from __future__ import annotations

import statistics
from collections import deque

WINDOW, FEWEST = 100, 20
"""Losses of the last steps whose median is the range, and how many there must be before anything counts as a spike."""
SPIKES = 3
"""High losses in a row that end a stage. One batch of a diffusion model may be far off: its loss depends on the times drawn."""


class LossWindow:
    """The losses of the last WINDOW steps that were in range."""

    def __init__(self, factor: float | None) -> None:
        """`factor`: a loss above this many times the median is high. None: no loss ever is."""
        self._factor = factor
        self._recent: deque[float] = deque(maxlen=WINDOW)
        self._high = 0

    @property
    def median(self) -> float:
        """Of the losses in range. There must be at least one."""
        return statistics.median(self._recent)

    def spiked(self, loss: float) -> bool:
        """Add the loss of the next step. Returns True if it is the third high one in a row (SPIKES)."""
        if self._factor is not None and len(self._recent) >= FEWEST and loss > self._factor * self.median:
            self._high += 1  # and it stays out of the median
        else:
            self._high = 0
            self._recent.append(loss)
        return self._high >= SPIKES
