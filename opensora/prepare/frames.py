"""Single frames of a clip's file as JPEG: what captioners and readers of text look at.

Owns which frame a share of a clip is. Refuses to read anything but the files of `clip_files`: those are upright and SDR already.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from opensora.dataset.rows import Quarantine
from opensora.prepare.films import opened
from opensora.prepare.looks import sdr_picture
from opensora.prepare.scores import Picture

QUALITY = 90
"""Of the JPEGs: what vision-language models were trained on is no better."""


def frames_of(clip_file: Path, shares: Sequence[float], side: int) -> list[bytes]:
    """JPEGs in the order of `shares`.

    Args:
        shares: places in the clip, 0 … 1, by frames: 0 is the first, 1 the last.
        side: pixels of the longer side; smaller clips keep their size.

    Raises:
        ValueError: a share is not between 0 and 1.
        Quarantine: the file does not hold what its index says.
    """
    if any(not 0 <= share <= 1 for share in shares):
        raise ValueError(f"shares {list(shares)} are not all between 0 and 1")
    with opened(clip_file) as film:
        count = film.stream.frames
        wanted = [round(share * (count - 1)) for share in shares]
        found: dict[int, bytes] = {}
        for number, timed in enumerate(film.frames()):
            if number in wanted and film.screen is not None:
                found[number] = _jpeg(sdr_picture(timed.frame, film.screen, side))
            if number >= max(wanted, default=-1):
                break
    missing = set(wanted) - set(found)
    if missing:
        raise Quarantine("breaks off", f"frame {min(missing)} of {count} cannot be decoded")
    return [found[number] for number in wanted]


def _jpeg(picture: Picture) -> bytes:
    content = io.BytesIO()
    Image.fromarray(picture).save(content, "JPEG", quality=QUALITY)
    return content.getvalue()
