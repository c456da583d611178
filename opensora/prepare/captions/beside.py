"""Captions that came along with a video: of a list, a table, or a text file beside it. Pure.

A clip takes the caption of the segment that it overlaps most, where a published list names segments; the video's own otherwise. Times of
lists are those of a player: 0 is the first frame, whatever PTS it has.
"""

from __future__ import annotations

from opensora.dataset.rows import NO_CAPTION, Captioned, Clip, Drop
from opensora.prepare.captions.clean import tidy
from opensora.prepare.captions.language import language_of

BY = "beside"


def caption(clip: Clip) -> Captioned:
    """
    Raises:
        Drop: there is none.
    """
    text = tidy(_segment(clip)) or tidy(clip.source.provenance.caption)
    if not text:
        raise Drop(NO_CAPTION, f"{clip.source.name} has none beside it; write one, or set caption.kind to server or llava")
    return Captioned(text, BY, language=language_of(text))


def _segment(clip: Clip) -> str:
    """Caption of the segment with the largest part of the clip in it; the first of equals. Empty: there is no such segment."""
    zero = clip.media.start_pts * clip.media.time_base[0] / clip.media.time_base[1]
    start, end = clip.shot.start_s - zero, clip.shot.end_s - zero
    common = [(min(end, until) - max(start, since), text) for since, until, text in clip.source.provenance.segments]
    longest = max((seconds for seconds, _ in common), default=0.0)
    return next((text for seconds, text in common if seconds == longest), "") if longest > 0 else ""
