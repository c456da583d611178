"""Clips from decoders to models in one stream, where the engine has machines of both kinds (`pool.Chain`).

Owns what of a clip is still to be done, and that each result is kept under its step's own name. Refuses to count, to judge the set and to
say in which order clips come: the phases do, after it. They find what they need kept, so that the data set is the same as without a stream,
and whatever the stream left to do, they do.

A clip goes into the stream once the rules over the whole set (near duplicates) have let it pass: that is the only barrier.
"""

from __future__ import annotations

import os
from array import array
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from opensora.dataset.prepare_config import CaptionLlava
from opensora.dataset.rows import Captioned, Clip, ClipFile, Leaves
from opensora.prepare.clip_phases import CAPTION_COLUMNS, has_size, with_source
from opensora.prepare.compact import ClipRows
from opensora.prepare.digests import key_of
from opensora.prepare.for_models import ASK_S, Asked, CutForModels, Described, FileForModels, Shown, describe, show
from opensora.prepare.kept import Columns, move
from opensora.prepare.pool import Later
from opensora.prepare.reconcile import Tally
from opensora.prepare.run_state import Drained, RunState
from opensora.prepare.source_phase import Rows

ForChain = CutForModels | FileForModels


def through_models(state: RunState, rows: Rows, clips: ClipRows) -> None:
    """Cut, measure, score and caption these clips, as far as it is not done yet. Raises Drained, ConfigError, DiskFull."""
    chain = state.guards.chain
    if chain is None:
        return
    stream = _Stream(state, rows, clips)
    state.begin("clips")
    state.models_step = stream.last
    for row, (shown, described) in chain.chained(show, describe, stream.rows(), stream.deadline, ASK_S):
        stream.keep(row, shown, described)
    state.let_go()
    state.models_step = None
    stream.forget_counts()
    if state.halt():
        raise Drained


class _Stream:
    def __init__(self, state: RunState, rows: Rows, clips: ClipRows) -> None:
        self._state, self._rows, self._clips = state, rows, clips
        self._settings = state.config.filter
        self._llava = state.config.caption if isinstance(state.config.caption, CaptionLlava) else None
        self._rules = tuple(rule for rule in self._settings.rules if rule.column not in CAPTION_COLUMNS)
        self.last = "caption" if self._llava is not None else "score"

    def rows(self) -> Iterator[ForChain | Later]:
        """Those whose file is there first; then those of each source."""
        to_cut = array("I")
        for place in range(len(self._clips)):
            name = self._clips.id(place)
            kept = self._state.files.read(name)
            if isinstance(kept, Leaves):
                continue
            path = self._state.files.name(name, ".mp4")
            if not isinstance(kept, ClipFile) or not has_size(path, kept.size):
                to_cut.append(place)
            elif (asked := self._asked(place)) is not None:
                yield self._counted(FileForModels(name, path, asked))
        for ready in with_source(self._rows, self._clips, to_cut):
            if isinstance(ready, Later):
                yield ready
                continue
            place, source = ready
            if isinstance(source, Leaves) or (asked := self._asked(place)) is None:
                continue  # the phase after says why, or cuts it alone
            yield self._counted(self._to_cut(asked, source))

    def deadline(self, row: ForChain) -> float:
        """Seconds. The rest is allowed by the function itself, part by part."""
        limits = self._state.config.limits
        shot = row.shot if isinstance(row, CutForModels) else None
        return limits.deadline_s + (limits.deadline_per_s * (shot.end_s - shot.start_s) if shot is not None else 0.0)

    def keep(self, row: ForChain, shown: Shown | Leaves, described: Described | Leaves | None) -> None:
        """Raises OSError."""
        tally = self._state.tally("clips")
        if isinstance(shown, Leaves):
            self._lost(row, shown)
            tally.leave(shown)
            return
        tally.kept += 1
        if shown.file is not None and isinstance(row, CutForModels):
            move(row.to, self._state.files.name(row.id, ".mp4"))
            self._state.files.write(row.id, replace(shown.file, path=f"clips/{row.id}.mp4"))
        if shown.text_area is not None:
            self._state.text_area.write(row.id, _columns(shown.text_area))
        if isinstance(described, Leaves):
            (self._state.scores if _of(row).scores else self._state.captions).write(row.id, described)
        elif described is not None:
            self._described(row.id, described)

    def forget_counts(self) -> None:
        """Those of the phases are the ones that count."""
        for step in ("clips", "score", "caption"):
            if step in self._state.tallies:
                self._state.tallies[step] = Tally()

    def _asked(self, place: int) -> Asked | None:
        """What is still to be done beside the clip's file; None: nothing, or it is known that the clip leaves."""
        state, clip = self._state, self._clips[place]
        text = state.text_area.read(clip.id) if self._settings.text_area else Columns({})
        scores = state.scores.read(clip.id) if self._settings.scores else Columns({})
        caption = state.captions.read(clip.id) if self._llava is not None else None
        if isinstance(text, Leaves) or isinstance(scores, Leaves):
            return None
        llava = self._llava if caption is None else None
        known: Clip = replace(clip, measures={**clip.measures, **(text.values if text else {}), **(scores.values if scores else {})})
        if text is not None and scores is not None and (llava is None or self._is_dropped(known)):
            return None
        folder = self._settings.scores or ""
        return Asked(
            known, self._rules, text is None, folder if scores is None else "", folder if llava is not None else "", llava,
            state.config.limits.deadline_s,
        )  # fmt: skip

    def _is_dropped(self, clip: Clip) -> bool:
        settings = self._settings.model_copy(update={"duplicates": None})
        return bool(self._state.steps.judge([clip], settings, CAPTION_COLUMNS).dropped)

    def _to_cut(self, asked: Asked, path: str) -> CutForModels:
        clip, config = asked.clip, self._state.config
        to = f"{self._state.folders.temporary}/{clip.id}.{os.getpid()}.mp4"
        there = clip.source if not path else None
        return CutForModels(clip.id, path, clip.media, clip.shot, to, config.clips, there, clip.source_sha256, asked)

    def _counted(self, row: ForChain) -> ForChain:
        self._state.tally("clips").into += 1
        if _of(row).llava is not None:
            self._state.tally("caption").into += 1
        return row

    def _lost(self, row: ForChain, leaves: Leaves) -> None:
        """Its file could not be made; or, where it is there, what was to be measured first."""
        if isinstance(row, CutForModels):
            Path(row.to).unlink(missing_ok=True)
            self._state.files.write(row.id, leaves)
        elif row.asked.text_area:
            self._state.text_area.write(row.id, leaves)
        elif row.asked.scores:
            self._state.scores.write(row.id, leaves)
        else:
            self._state.captions.write(row.id, leaves)

    def _described(self, name: str, found: Described) -> None:
        state = self._state
        if found.scores is not None:
            state.scores.write(name, _columns(found.scores))
        if found.caption is None:
            return
        state.captions.write(name, found.caption)
        if not isinstance(found.caption, Captioned):
            state.tally("caption").leave(found.caption)
            return
        state.tally("caption").kept += 1
        if state.status is not None:
            state.status.tokens_in += found.caption.tokens_in
            state.status.tokens_out += found.caption.tokens_out
        if found.match is not None:
            state.matches.write(key_of(name, found.caption.text), Columns({"clip": found.match["clip"]}))


def _of(row: ForChain) -> Asked:
    assert row.asked is not None
    return row.asked


def _columns(found: Any) -> Columns | Leaves:
    return found if isinstance(found, Leaves) else Columns(dict(found))
