"""Text covers as much of a picture as it was drawn over; pictures without text have none."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from typing import Any

import cv2
import numpy as np
import pytest

from opensora.dataset.rows import Quarantine
from opensora.prepare.text_area import text_area

SIZE = (180, 320)


def jpeg(picture: np.ndarray) -> bytes:
    return bytes(cv2.imencode(".jpg", picture)[1])


def plain(level: int = 128) -> np.ndarray:
    return np.full((*SIZE, 3), level, np.uint8)


def title(*lines: str) -> tuple[np.ndarray, float]:
    """A picture with text, and the share that a tight box around each line has."""
    picture, covered = plain(), 0.0
    for number, line in enumerate(lines):
        (width, height), base = cv2.getTextSize(line, cv2.FONT_HERSHEY_SIMPLEX, 0.9, 2)
        cv2.putText(picture, line, (8, 45 + 55 * number), cv2.FONT_HERSHEY_SIMPLEX, 0.9, (255, 255, 255), 2)
        covered += width * (height + base) / (SIZE[0] * SIZE[1])
    return picture, covered


@pytest.fixture(scope="module")
def ocr() -> Any:
    if importlib.util.find_spec("rapidocr") is None:
        pytest.skip("rapidocr (extra `ocr`) is not installed")


@pytest.mark.long
def test_titles_cover_what_they_were_drawn_over(ocr: Any) -> None:
    one, small = title("Breaking News Today")
    three, large = title("Breaking News", "at a quarter past", "the hour of noon")
    found = [text_area([jpeg(one)]), text_area([jpeg(three)])]
    assert 0.6 * small < found[0] < 1.6 * small and 0.6 * large < found[1] < 1.6 * large
    assert text_area([jpeg(one), jpeg(plain())]) == pytest.approx(found[0] / 2)


@pytest.mark.long
def test_plain_noisy_and_striped_pictures_have_no_text(ocr: Any) -> None:
    stripes = plain(0)
    stripes[::8] = 255
    figure = plain(0)
    cv2.rectangle(figure, (60, 40), (260, 140), (255, 255, 255), 2)
    noise = np.random.default_rng(0).integers(0, 256, (*SIZE, 3), dtype=np.uint8)
    for picture in (plain(), plain(0), plain(255), stripes, figure, noise):
        assert text_area([jpeg(picture)]) == 0


def test_what_is_no_picture_is_put_aside() -> None:
    with pytest.raises(Quarantine, match="frame cannot be read: 10 bytes are no picture"):
        text_area([b"no picture"])
    with pytest.raises(Quarantine, match="no frames"):
        text_area([])


def test_without_rapidocr_the_extra_is_named() -> None:
    code = (
        "import sys; sys.modules['rapidocr'] = None\n"
        "import cv2, numpy\nfrom opensora.errors import ConfigError\nfrom opensora.prepare.text_area import text_area\n"
        "try: text_area([bytes(cv2.imencode('.jpg', numpy.zeros((32, 32, 3), numpy.uint8))[1])])\n"
        "except ConfigError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert "rapidocr is not installed. Install it: pip install 'osctl[ocr]'" in done.stdout, done.stderr
