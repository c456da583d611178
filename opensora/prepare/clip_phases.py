"""What happens to rows of clips after the one decode: rules, files, more measures, captions and the rules about them.

Owns the order, and what of it is worked on anew. Each phase takes rows and returns those that are left. Refuses to judge, cut and caption.
"""

from __future__ import annotations

import contextlib
import json
import os
from array import array
from collections.abc import Container, Iterator, Sequence
from dataclasses import asdict, dataclass, field, is_dataclass, replace
from pathlib import Path
from typing import Any

from opensora.dataset.prepare_config import CaptionBeside, CaptionServer
from opensora.dataset.rows import Captioned, Clip, ClipFile, Leaves, Source
from opensora.errors import DataError
from opensora.prepare.compact import ClipRows
from opensora.prepare.digests import key_of
from opensora.prepare.fetching import local_path
from opensora.prepare.kept import Columns, move
from opensora.prepare.kept import place as put_file
from opensora.prepare.pool import Later
from opensora.prepare.run_state import Drained, RunState
from opensora.prepare.source_phase import Rows
from opensora.prepare.steps import Captioning, CutOut, Judged, Measure

MEASURED_LATER = ("text_area", "aesthetic")
"""Columns that need a clip's own file."""
CAPTION_COLUMNS = ("words", "language", "clip")
"""Columns that need a caption."""
SPENT = "spent.json"
MOST_SPENT = 1e15
"""Of anything that captions used: a thousand million tokens for each of a million clips. More was no count."""
A_LOOK = 64
"""Rows that are looked up between two looks for a request to leave: some milliseconds."""
_SPENT_FIELDS = ("requests", "tokens_in", "tokens_out", "presumed", "dollars")


class BudgetReached(DataError):
    """Captions would cost more than allowed."""


@dataclass
class Alone:
    """How many clips each rule alone would drop, for the report."""

    rules: dict[str, int] = field(default_factory=dict)

    def add(self, judged: Judged) -> None:
        self.rules.update((rule, count) for rule, count in judged.alone.items() if rule not in self.rules)


def filtered(state: RunState, clips: ClipRows, alone: Alone) -> ClipRows:
    """By the columns of the one decode, and near duplicates over the whole set. Raises ConfigError, Drained."""
    tally = state.begin("filter")
    judged = state.steps.judge(clips, state.config.filter, (*MEASURED_LATER, *CAPTION_COLUMNS))
    alone.add(judged)
    tally.kept += len(clips) - len(judged.dropped)
    for drop in judged.dropped.values():
        tally.leave(drop)
    state.settle("filter")
    return _left(clips, judged.dropped)


def _left(clips: ClipRows, dropped: Container[str]) -> ClipRows:
    return clips.chosen(place for place in range(len(clips)) if clips.id(place) not in dropped)


def with_files(state: RunState, rows: Rows, clips: ClipRows) -> ClipRows:
    """Each clip with its own file. Raises TooMany, Drained, DiskFull."""
    tally = state.begin("clips")
    tally.into = len(clips)
    there = bytearray(len(clips))
    missing = array("I")
    for place in range(len(clips)):
        if place % A_LOOK == 0 and state.halt():
            raise Drained
        name = clips.id(place)
        kept = state.files.read(name)
        # of another machine's clips a shard has what is kept, not the files: these are in the store before it (orchestrator's Mirror)
        if isinstance(kept, ClipFile) and (state.shard is not None or has_size(state.files.name(name, ".mp4"), kept.size)):
            clips.set_file(place, kept)
            there[place] = 1
            tally.kept += 1
        elif isinstance(kept, Leaves):
            state.leave("clips", kept, name)
        else:
            missing.append(place)
    under_way: dict[str, int] = {}

    def to_cut() -> Iterator[CutOut | Later]:
        for ready in with_source(rows, clips, missing):
            if isinstance(ready, Later):
                yield ready
                continue
            place, path = ready
            clip = clips[place]
            if isinstance(path, Leaves):
                state.leave("clips", path, clip.id)
                continue
            under_way[clip.id] = place
            to = f"{state.folders.temporary}/{clip.id}.{os.getpid()}.mp4"
            there = clip.source if not path else None
            yield CutOut(clip.id, path, clip.media, clip.shot, to, state.config.clips, there, clip.source_sha256)

    limits = state.config.limits
    for row, ended in state.guards.map(
        state.steps.cut_out, to_cut(), lambda row: limits.deadline_s + limits.deadline_per_s * (row.shot.end_s - row.shot.start_s)
    ):
        place = under_way.pop(row.id)
        if isinstance(ended, Leaves):
            Path(row.to).unlink(missing_ok=True)
            state.files.write(row.id, ended)
            state.leave("clips", ended, row.id)
            continue
        ended = replace(ended, path=f"clips/{row.id}.mp4")
        move(row.to, state.files.name(row.id, ".mp4"))
        state.files.write(row.id, ended)
        clips.set_file(place, ended)
        there[place] = 1
        tally.kept += 1
    state.settle("clips")
    return clips.chosen(place for place in range(len(clips)) if there[place])


def with_source(rows: Rows, clips: ClipRows, places: Sequence[int]) -> Iterator[tuple[int, str | Leaves] | Later]:
    """Each of these clips with where its source lies (empty: it is fetched elsewhere), or why it cannot be had. Sources that
    are not on this machine are fetched, last.

    Raises ConfigError, DiskFull.
    """
    absent = array("I")  # indices in `places`, of the first clip of each such source
    for index in _firsts(clips, places):
        place = places[index]
        address = not local_path(clips.source(place)[0])
        if address and rows.fetching.elsewhere:
            for one in _of_one_source(clips, places, index):
                yield one, ""
            continue
        if address and not os.path.exists(clips.path_of_source(place)):  # noqa: PTH110 - once a source
            absent.append(index)
            continue
        path = clips.path_of_source(place)
        for one in _of_one_source(clips, places, index):
            yield one, path

    def wanted() -> Iterator[tuple[str, Source]]:
        for index in absent:
            source, sha256 = clips.source(places[index])
            yield sha256, source

    for ready in rows.fetching.bring(wanted()) if absent else ():
        if isinstance(ready, Later):
            yield ready
            continue
        number, found = ready
        for one in _of_one_source(clips, places, absent[number]):
            yield one, found if isinstance(found, Leaves) else found.path


def _firsts(clips: ClipRows, places: Sequence[int]) -> Iterator[int]:
    """Indices in `places` at which another source begins."""
    return (index for index in range(len(places)) if index == 0 or not clips.same_source(places[index - 1], places[index]))


def _of_one_source(clips: ClipRows, places: Sequence[int], first: int) -> Iterator[int]:
    for index in range(first, len(places)):
        if not clips.same_source(places[first], places[index]):
            return
        yield places[index]


def scored(state: RunState, clips: ClipRows, alone: Alone) -> ClipRows:
    """With text area and scores, where they are asked for, and the rules about them. Raises ConfigError, TooMany, Drained."""
    settings = state.config.filter
    if not (settings.text_area or settings.scores):
        return clips
    tally = state.begin("score")
    tally.into = len(clips)
    measured: dict[str, dict[str, float]] = {}

    def to_measure() -> Iterator[Measure]:
        for place in range(len(clips)):
            name = clips.id(place)
            text = state.text_area.read(name) if settings.text_area else Columns({})
            scores = state.scores.read(name) if settings.scores else Columns({})
            if isinstance(left := text if isinstance(text, Leaves) else scores, Leaves):
                state.leave("score", left, name)
                continue
            measured[name] = {key: value for one in (text, scores) if isinstance(one, Columns) for key, value in one.values.items()}
            if text is None or scores is None:
                path = state.files.name(name, ".mp4")
                yield Measure(name, path, text is None, settings.scores or "" if scores is None else "")

    for row, ended in state.guards.map(state.steps.measure, to_measure(), state.config.limits.deadline_s):
        if isinstance(ended, Leaves):
            (state.text_area if row.text_area else state.scores).write(row.id, ended)
            state.leave("score", ended, row.id)
            measured.pop(row.id)
            continue
        if row.text_area:
            state.text_area.write(row.id, Columns({"text_area": ended["text_area"]}))
        if row.scores:
            state.scores.write(row.id, Columns({name: value for name, value in ended.items() if name != "text_area"}))
        measured[row.id] |= ended
    state.let_go()
    if state.halt():
        raise Drained
    left_over = clips.chosen(place for place in range(len(clips)) if clips.id(place) in measured)
    for place in range(len(left_over)):
        left_over.set_measures(place, dict(measured.pop(left_over.id(place))))
    judged = state.steps.judge(left_over, settings.model_copy(update={"duplicates": None}), CAPTION_COLUMNS)
    alone.add(judged)
    for drop in judged.dropped.values():
        tally.leave(drop)
    tally.kept += len(left_over) - len(judged.dropped)
    state.settle("score")
    return _left(left_over, judged.dropped)


def caption_key(state: RunState, clip: Clip) -> str:
    """Under which a clip's caption is kept: of captions that came along, their text counts."""
    if isinstance(state.config.caption, CaptionBeside):
        provenance = clip.source.provenance
        return key_of(clip.id, provenance.caption, provenance.segments)
    return clip.id


def _caption_key(state: RunState, clips: ClipRows, place: int) -> str:
    """Without making the row, where its id is enough."""
    return caption_key(state, clips[place]) if isinstance(state.config.caption, CaptionBeside) else clips.id(place)


def captioned(state: RunState, clips: ClipRows, alone: Alone) -> ClipRows:
    """Those whose caption is wanted; the caption itself stays on disk (`with_caption`). Raises TooMany, Drained, BudgetReached."""
    tally = state.begin("caption")
    tally.into = len(clips)
    missing = array("I")
    tokens = {"tokens_in": 0, "tokens_out": 0}
    wanted = bytearray(len(clips))
    for place in range(len(clips)):
        if place % A_LOOK == 0 and state.halt():
            raise Drained
        known = state.captions.read(_caption_key(state, clips, place))
        if known is None:
            missing.append(place)
            continue
        if isinstance(known, Captioned):
            tokens["tokens_in"] += known.tokens_in
            tokens["tokens_out"] += known.tokens_out
        wanted[place] = _is_wanted(state, clips.id(place), known)
    if missing:
        _ask(state, clips, missing, tokens, wanted)
    if state.halt():
        raise Drained
    rows = matched(state, clips.chosen(place for place in range(len(clips)) if wanted[place]))
    if any(rule.column in CAPTION_COLUMNS for rule in state.config.filter.rules):
        judged = state.steps.judge(_WithColumns(state, rows), state.config.filter.model_copy(update={"duplicates": None}), ())
        alone.add(judged)
        for drop in judged.dropped.values():
            tally.leave(drop)
        tally.kept -= len(judged.dropped)
        rows = _left(rows, judged.dropped)
    state.settle("caption")
    return rows


class _WithColumns(Sequence[Clip]):
    """Rows with the columns that their captions give them."""

    def __init__(self, state: RunState, rows: ClipRows) -> None:
        self._state, self._rows = state, rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, place: Any) -> Any:
        if isinstance(place, slice):
            return [self[one] for one in range(*place.indices(len(self)))]
        return replace(with_caption(self._state, self._rows[place]), caption=None)


class _ToAsk(_WithColumns):
    """Rows whose file is named from the run directory, for whoever looks at its frames."""

    def __getitem__(self, place: Any) -> Any:
        if isinstance(place, slice):
            return super().__getitem__(place)
        clip = self._rows[place]
        assert clip.file is not None
        path = self._state.files.path(clip.id, ".mp4").relative_to(self._state.folders.path)
        return replace(clip, file=replace(clip.file, path=path.as_posix()))


def matched(state: RunState, rows: ClipRows) -> ClipRows:
    """Those that have a score with their caption (`clip`), where scores are asked for. Raises ConfigError, Drained."""
    if not state.config.filter.scores:
        return rows
    texts: dict[str, str] = {}
    lost: set[str] = set()

    def to_measure() -> Iterator[Measure]:
        for clip in rows:
            caption = with_caption(state, clip).caption
            texts[clip.id] = caption.text if caption is not None else ""
            if state.matches.read(key_of(clip.id, texts[clip.id])) is None:
                yield Measure(clip.id, str(state.files.path(clip.id, ".mp4")), False, state.config.filter.scores or "", texts[clip.id])

    for row, ended in state.guards.map(state.steps.measure, to_measure(), state.config.limits.deadline_s):
        key = key_of(row.id, texts.pop(row.id))
        if isinstance(ended, Leaves):
            state.matches.write(key, ended)
            state.leave("caption", ended, row.id)
            state.tally("caption").kept -= 1
            lost.add(row.id)
        else:
            state.matches.write(key, Columns({name: value for name, value in ended.items() if name == "clip"}))
    state.let_go()
    if state.halt():
        raise Drained
    return _left(rows, lost) if lost else rows


def with_caption(state: RunState, clip: Clip) -> Clip:
    """A row with its caption, and the columns that this gives. Raises DataError, where the caption is no longer there."""
    known = state.captions.read(caption_key(state, clip))
    if not isinstance(known, Captioned):
        raise DataError(f"{state.folders.kept}/caption: the caption of clip {clip.id} was there a moment ago. Run again")
    columns: dict[str, float | str] = {"words": float(state.steps.words(known)), "language": known.language}
    if state.config.filter.scores:
        found = state.matches.read(key_of(clip.id, known.text))
        columns |= found.values if isinstance(found, Columns) else {}
    return Clip(
        clip.id, clip.source_sha256, clip.source, clip.media, clip.shot, clip.file, caption=known, measures={**clip.measures, **columns}
    )


def _is_wanted(state: RunState, name: str, known: Captioned | Leaves) -> bool:
    """Count a clip's caption."""
    try:
        if isinstance(known, Leaves):
            raise known
        state.steps.check_caption(known, state.config)
    except Leaves as leaves:
        state.leave("caption", leaves, name)
        return False
    state.tally("caption").kept += 1
    return True


def _ask(state: RunState, clips: ClipRows, missing: Sequence[int], tokens: dict[str, int], wanted: bytearray) -> None:
    """Have the missing captions made."""
    originals = {clips.id(place): place for place in missing}

    def on_done(name: str, result: Captioned | Leaves) -> None:
        place = originals.pop(name)
        state.captions.write(_caption_key(state, clips, place), result)
        wanted[place] = _is_wanted(state, name, result)

    def on_spent(spent: Any) -> None:
        if state.status is not None:
            state.status.tokens_in, state.status.tokens_out, state.status.usd = spent.tokens_in, spent.tokens_out, spent.dollars
        content = {name: value for name, value in _content(spent).items() if name in _SPENT_FIELDS}
        put_file(json.dumps(content).encode(), state.folders.temporary, state.folders.path / SPENT)

    before = _before(state, tokens)
    to_ask = _ToAsk(state, clips.chosen(missing))
    work = Captioning(to_ask, state.folders.path, state.config.caption, on_done, on_spent, state.halt, before, state.held.take)
    spent = state.steps.caption(work)
    state.held.release()
    on_spent(spent)
    if state.halt():
        raise Drained
    if originals:
        reason = spent.stopped or "captions ended before all clips had one"
        raise BudgetReached(f"caption: {len(originals):,} of {len(missing):,} clips were not asked for: {reason}. What is done is kept")


def _before(state: RunState, tokens: dict[str, int]) -> dict[str, float]:
    """What earlier runs used: as they wrote it down, and at least what the kept captions say (this may be another machine)."""
    before: dict[str, float] = dict.fromkeys(_SPENT_FIELDS, 0)
    with contextlib.suppress(OSError, ValueError):
        read = json.loads((state.folders.path / SPENT).read_bytes())
        before |= {name: read[name] for name in _SPENT_FIELDS if isinstance(read.get(name), int | float) and 0 <= read[name] < MOST_SPENT}
    settings = state.config.caption
    if isinstance(settings, CaptionServer):
        dollars = (tokens["tokens_in"] * settings.usd_per_million_in + tokens["tokens_out"] * settings.usd_per_million_out) / 1e6
        before["dollars"] = max(before["dollars"], dollars)
    for name in ("tokens_in", "tokens_out"):
        before[name] = max(before[name], tokens[name])
    return before


def _content(row: Any) -> dict[str, Any]:
    return asdict(row) if is_dataclass(row) and not isinstance(row, type) else dict(vars(row))


def has_size(path: str, size: int) -> bool:
    try:
        return os.stat(path).st_size == size  # noqa: PTH116 - once a clip
    except OSError:
        return False
