"""How much moves between two frames: DIS optical flow of small grey pictures.

Owns the size, the preset and the unit. Refuses to choose frames (`looks`).
"""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np

from opensora.prepare.scores import Picture

SIDE = 128
"""Pixels of the longer side that flow is computed at."""
LEAST_SIDE = 16
"""Pixels of the shorter side: below, DIS finds no patches and the picture counts as one that stands still."""


class Motion:
    """Flow between grey pictures of one video."""

    def __init__(self) -> None:
        self._flow: Any = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_FAST)

    def between(self, before: Picture, after: Picture, seconds: float) -> float:
        """Mean length of the flow: hundredths of the longer side a second. A picture that moves across itself in 4 seconds has 25.

        Args:
            before, after: grey, (h, w), of the same size.
            seconds: from one to the other.
        """
        height, width = before.shape
        factor = max(1.0, max(height, width) / SIDE)
        size = round(width / factor), round(height / factor)
        if min(size) < LEAST_SIDE or seconds <= 0:
            return 0.0
        small = [each if factor == 1 else cv2.resize(each, size, interpolation=cv2.INTER_AREA) for each in (before, after)]
        flow = self._flow.calc(*small, None)
        length = np.hypot(flow[..., 0], flow[..., 1]).mean()
        return float(length / max(size) / seconds * 100)
