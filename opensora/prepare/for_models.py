"""A clip's work in two parts: that of a machine that decodes (file, text area, frames), and that of one with models (scores, caption).

Owns the rows of both and the functions, which an engine with machines of both kinds streams clips through (`pool.Chain`). The second part
sees JPEGs alone: it decodes no film. Refuses to keep results and to order clips (`streamed`). Runs in guards.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from opensora.dataset.prepare_config import CaptionLlava, Rule
from opensora.dataset.rows import Captioned, Clip, ClipFile, Leaves
from opensora.errors import ConfigError, OutOfMemory
from opensora.prepare import guarded
from opensora.prepare.pool import Handed
from opensora.prepare.steps import FRAMES_SHARES, FRAMES_SIDE, LOAD_S, CutOut, cut_out, scorer

if TYPE_CHECKING:
    from opensora.prepare.captions.llava import Llava

ASK_S = 900.0
"""For one batch of scores or captions. Inline has no such bound; on a CPU a large model takes minutes for each caption."""

Jpegs = tuple[bytes, ...]


@dataclass(frozen=True)
class Asked:
    """What is wanted of a clip beside its file."""

    clip: Clip
    """With the columns that are known."""
    rules: tuple[Rule, ...] = ()
    """On columns that are known before captions: a clip that breaks one gets no caption."""
    text_area: bool = False
    scores: str = ""
    """Folder of the models; empty: scores are known, or not wanted."""
    match: str = ""
    """Folder of the models that score a new caption; empty: not wanted."""
    llava: CaptionLlava | None = None
    """None: a caption is known, or comes from elsewhere."""
    deadline_s: float = 30.0
    """Of measures and frames, in seconds."""


@dataclass(frozen=True)
class CutForModels(CutOut):
    """A clip that has no file yet."""

    asked: Asked | None = None


@dataclass(frozen=True)
class FileForModels:
    """A clip whose file is there."""

    id: str
    path: str
    asked: Asked


@dataclass(frozen=True)
class Shown:
    """What the first part made: the file, where there was none, and the text area, where it was asked for."""

    file: ClipFile | None
    text_area: Mapping[str, float] | Leaves | None


@dataclass(frozen=True)
class ForModels:
    asked: Asked
    jpegs: Jpegs | Leaves
    """For scores."""
    caption_jpegs: Jpegs | Leaves


@dataclass(frozen=True)
class Described:
    """What the second part made; None: it was not asked for, or a rule dropped the clip before."""

    scores: Mapping[str, float] | Leaves | None = None
    caption: Captioned | Leaves | None = None
    match: Mapping[str, float] | None = None
    """Scores with the caption; None also where they could not be had: then the step after tries again, and says why."""


def show(row: CutForModels | FileForModels) -> Handed:
    """In a guard where films are decoded. Raises Leaves, where the file itself cannot be made."""
    file, path, asked = None, row.path, row.asked
    assert asked is not None
    if isinstance(row, CutForModels):
        file, path = cut_out(row), row.to
        guarded.allow(asked.deadline_s)
    text: Mapping[str, float] | Leaves | None = None
    jpegs: Jpegs | Leaves = ()
    if asked.text_area or asked.scores or asked.match:
        jpegs = _frames(path, FRAMES_SHARES, FRAMES_SIDE)
    if asked.text_area:
        text = jpegs if isinstance(jpegs, Leaves) else _text_area(jpegs)
        if not isinstance(text, Leaves):
            asked = replace(asked, clip=replace(asked.clip, measures={**asked.clip.measures, **text}))
    left = isinstance(text, Leaves)
    if left or not (asked.scores or asked.llava) or (not asked.scores and not _passes(asked.clip, asked.rules)):
        return Handed(Shown(file, text), None)
    shown: Jpegs | Leaves = ()
    if asked.llava is not None:
        from opensora.prepare.captions.llava import SIDE
        from opensora.prepare.captions.shown import shares

        shown = _frames(path, shares(asked.llava.frames), SIDE)
    return Handed(Shown(file, text), ForModels(asked, jpegs, shown))


def describe(rows: Sequence[ForModels]) -> list[Described]:
    """In a guard that keeps its models. Raises ConfigError."""
    found = [Described(scores=_scores(row)) for row in rows]
    asked = [place for place, (row, one) in enumerate(zip(rows, found, strict=True)) if _wants_caption(row, one)]
    for place, caption in zip(asked, _captions([rows[place] for place in asked]), strict=True):
        found[place] = replace(found[place], caption=caption, match=_match(rows[place], caption))
    return found


def _frames(path: str, shares: Sequence[float], side: int) -> Jpegs | Leaves:
    from opensora.prepare import frames

    try:
        return tuple(frames.frames_of(Path(path), shares, side))
    except Leaves as leaves:
        return leaves


def _text_area(jpegs: Jpegs) -> Mapping[str, float] | Leaves:
    from opensora.prepare.text_area import text_area

    try:
        return {"text_area": text_area(jpegs)}
    except Leaves as leaves:
        return leaves


def _passes(clip: Clip, rules: Sequence[Rule]) -> bool:
    from opensora.prepare.filters import broken, columns

    known = columns(clip)
    return all(broken(rule, known) is None for rule in rules)


def _scores(row: ForModels) -> Mapping[str, float] | Leaves | None:
    if not row.asked.scores:
        return None
    if isinstance(row.jpegs, Leaves):
        return row.jpegs
    try:
        return _scored(row.asked.scores, row.jpegs, "")
    except Leaves as leaves:
        return leaves


def _scored(folder: str, jpegs: Jpegs, caption: str) -> Mapping[str, float]:
    guarded.allow(LOAD_S)
    model = scorer(folder)
    guarded.allow(ASK_S)
    found: dict[str, float] = model.score(jpegs, caption)
    return found


def _wants_caption(row: ForModels, found: Described) -> bool:
    if row.asked.llava is None or isinstance(found.scores, Leaves):
        return False
    clip = row.asked.clip
    return _passes(replace(clip, measures={**clip.measures, **(found.scores or {})}), row.asked.rules)


def _captions(rows: Sequence[ForModels]) -> list[Captioned | Leaves]:
    """In the order of the rows. Raises ConfigError."""
    found: list[Captioned | Leaves | None] = [row.caption_jpegs if isinstance(row.caption_jpegs, Leaves) else None for row in rows]
    asked = [place for place, one in enumerate(found) if one is None]
    settings = rows[0].asked.llava if rows else None
    if asked and settings is not None:
        guarded.allow(LOAD_S)
        model = _llava(settings)
        guarded.allow(ASK_S)
        jpegs = [list(one) for row in rows if not isinstance(one := row.caption_jpegs, Leaves)]
        for place, caption in zip(asked, _answers(model, jpegs, settings), strict=True):
            found[place] = caption
    return [one for one in found if one is not None]


def _answers(model: Llava, jpegs: Sequence[list[bytes]], settings: CaptionLlava) -> list[Captioned | Leaves]:
    from opensora.prepare.captions import llava

    try:
        return [caption for caption, _ in llava.answered(model, jpegs, settings)]
    except OutOfMemory as error:  # about all rows: a guard hands only this kind on
        raise ConfigError(str(error)) from error


@cache
def _llava(settings: CaptionLlava) -> Llava:
    """Loaded once in each guard."""
    from opensora.prepare import devices
    from opensora.prepare.captions.llava import Llava

    guarded.tell(devices.here())
    return Llava(settings)


def _match(row: ForModels, caption: Captioned | Leaves) -> Mapping[str, float] | None:
    if not row.asked.match or isinstance(caption, Leaves) or isinstance(row.jpegs, Leaves):
        return None
    try:
        return _scored(row.asked.match, row.jpegs, caption.text)
    except Leaves:
        return None
