"""How much of a picture is text: titles, subtitles, watermarks. Found by rapidocr (extra `ocr`), whose weights are in its wheel.

Owns what counts as text, and the model, which is loaded once a process. Refuses to read what it says.

A region counts if its text was recognised with a score of at least SCORE: on plain and noisy frames the detector alone finds regions where
nothing stands.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

from opensora.dataset.rows import Quarantine
from opensora.errors import ConfigError

VERSION = 1
"""Raised whenever the same pictures would be measured differently."""
SCORE = 0.7
"""Least recognition score of a region. Of drawn titles and of frames of two films, text had 0.99, false regions at most 0.54 (measured)."""
LEAST = 2
"""Characters of a region's text, at least: one alone is what textures are read as."""


def text_area(jpegs: Sequence[bytes]) -> float:
    """Share of the pictures that is text, 0 … 1, the mean over the pictures. Costs 1.1 to 1.6 s of CPU a picture (measured).

    Raises ConfigError, where rapidocr is not installed; Quarantine, where a picture cannot be read.
    """
    if not jpegs:
        raise Quarantine("no frames", "text area is measured on at least one")
    return sum(map(_share, jpegs)) / len(jpegs)


def _share(jpeg: bytes) -> float:
    import cv2
    import numpy as np

    picture = cv2.imdecode(np.frombuffer(jpeg, np.uint8), cv2.IMREAD_COLOR)
    if picture is None:
        raise Quarantine("frame cannot be read", f"{len(jpeg):,} bytes are no picture")
    found = _reader()(picture)
    if found.boxes is None:
        return 0.0
    covered = np.zeros(picture.shape[:2], np.uint8)
    for box, text, score in zip(found.boxes, found.txts, found.scores, strict=True):
        if score >= SCORE and len(text.strip()) >= LEAST:
            cv2.fillPoly(covered, [np.rint(np.asarray(box)).astype(np.int32)], (1,))
    return float(covered.mean())


@cache
def _reader() -> Any:
    """One thread: guards work beside each other."""
    try:
        from rapidocr import RapidOCR
    except ImportError as error:
        raise ConfigError("filter.text_area: rapidocr is not installed. Install it: pip install 'osctl[ocr]'") from error
    threads = {f"EngineConfig.onnxruntime.{kind}_op_num_threads": 1 for kind in ("intra", "inter")}
    return RapidOCR(params={"Global.log_level": "error", "Global.text_score": 0.0, **threads})
