"""Which clips are kept: rules on measured columns, then near duplicates over the whole set. Pure.

Owns what a column is, how a rule is judged and the words of a reason. Refuses to measure.

Columns are what was measured of a clip (`Shot.measures`, `Clip.measures`), and what is known of it anyway: `BUILT_IN`. A rule on a column
that no clip has is a ConfigError, with the columns that there are; `opensora.dataset.columns` refuses it before anything runs. A value that
could not be measured (NaN, or a column that this one clip lacks) is dropped by each rule on it: nobody can say that the rule holds. A rule
is judged by itself, so the report can say what each one alone would drop; a clip leaves with the first rule, in the order of the file, that
it breaks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

from opensora.dataset.duplicates import duplicates
from opensora.dataset.prepare_config import Filter, Rule
from opensora.dataset.rows import Clip, Drop
from opensora.errors import ConfigError
from opensora.printable import quoted

DUPLICATE = "near duplicate"
"""Reason of clips whose hash is near that of an earlier one, and their name in `Judged.alone`."""

BUILT_IN: Mapping[str, Callable[[Clip], float | str]] = {
    "seconds": lambda clip: clip.shot.end_s - clip.shot.start_s,
    "frames": lambda clip: clip.shot.frames,
    "fps": lambda clip: clip.media.fps or math.nan,
    "width": lambda clip: clip.media.width,
    "height": lambda clip: clip.media.height,
    "codec": lambda clip: clip.media.codec,
    "hdr": lambda clip: clip.media.hdr,
    "source": lambda clip: clip.source.provenance.set_name,
    "licence": lambda clip: clip.source.provenance.licence,
}
"""Columns that each clip has without a measurement; `fps` 0 is an unknown one."""


@dataclass(frozen=True)
class Judged:
    dropped: Mapping[str, Drop]
    """By id of a clip, why. All others stay."""
    alone: Mapping[str, int]
    """By rule (`said`), and under DUPLICATE, how many clips it would drop if there were no other."""


def judged(clips: Sequence[Clip], settings: Filter, *, later: Collection[str] = ()) -> Judged:
    """Judge all clips of a set.

    Args:
        clips: in the order that decides which one of near duplicates stays.
        later: columns that are measured in a later step; rules on them are left for then.

    Raises ConfigError, where a rule names a column that no clip has, or bounds numbers as text or text as numbers.
    """
    rules = [rule for rule in settings.rules if rule.column not in later]
    dropped: dict[str, Drop] = {}
    alone: dict[str, int] = {said(rule): 0 for rule in rules}
    if clips and rules:
        _refuse_unknown(rules, clips)
    hashes: list[int | None] = []
    lost: set[int] = set()
    for place, clip in enumerate(clips if rules or settings.duplicates is not None else ()):
        hashes.append(_hash(clip.shot.phash))
        row = columns(clip) if rules else {}
        for rule in rules:
            if (drop := broken(rule, row)) is not None:
                alone[said(rule)] += 1
                dropped.setdefault(clip.id, drop)
                lost.add(place)
    if settings.duplicates is not None:
        twins = duplicates([None if place in lost else value for place, value in enumerate(hashes)], settings.duplicates)
        alone[DUPLICATE] = len(duplicates(hashes, settings.duplicates)) if lost else len(twins)
        for place, first in twins.items():
            near = clips[first]
            dropped[clips[place].id] = Drop(DUPLICATE, f"of {near.source.name} at {near.shot.start_s:.2f} s")
    return Judged(dropped, alone)


def columns(clip: Clip) -> dict[str, float | str]:
    """All that rules may bound of a clip."""
    return {**{name: of(clip) for name, of in BUILT_IN.items()}, **clip.shot.measures, **clip.measures}


def said(rule: Rule) -> str:
    """A rule in words, as a reason and in reports: `motion below 0.5`, `language not en or de`."""
    bounds = [f"below {rule.min:g}"] if rule.min is not None else []
    bounds += [f"above {rule.max:g}"] if rule.max is not None else []
    bounds += [f"not {' or '.join(rule.any_of)}"] if rule.any_of else []
    return f"{rule.column} {' or '.join(bounds)}"


def broken(rule: Rule, row: Mapping[str, float | str]) -> Drop | None:
    """Why a clip with these columns is dropped by this rule; None: it is not. Raises ConfigError, where the column is of another kind."""
    value = row.get(rule.column)
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return Drop(f"{rule.column} not measured", f"so nobody knows whether {said(rule)}")
    if rule.any_of:
        if not isinstance(value, str):
            raise ConfigError(f"filter.rules: any_of names texts, {rule.column} is a number ({value:g}). Give min or max")
        if value not in rule.any_of:
            return Drop(_one(rule, any_of=rule.any_of), quoted(value, 80))
    if rule.min is None and rule.max is None:
        return None
    if isinstance(value, str):
        raise ConfigError(f"filter.rules: min and max bound numbers, {rule.column} is a text ({quoted(value, 80)}). Give any_of")
    if rule.min is not None and value < rule.min:
        return Drop(_one(rule, min=rule.min), f"{value:g}")
    if rule.max is not None and value > rule.max:
        return Drop(_one(rule, max=rule.max), f"{value:g}")
    return None


def _one(rule: Rule, **bound: object) -> str:
    """The bound of a rule that a clip breaks, in words."""
    return said(Rule(column=rule.column, **bound))


def _refuse_unknown(rules: Sequence[Rule], clips: Sequence[Clip]) -> None:
    known = set(BUILT_IN)
    for clip in clips:
        known.update(clip.shot.measures, clip.measures)
    for rule in rules:
        if rule.column in known:
            continue
        raise ConfigError(f"filter.rules: no column {quoted(rule.column, 80)}. There are: {', '.join(sorted(known))}")


def _hash(text: str) -> int | None:
    try:
        value = int(text, 16)
    except ValueError:
        return None
    return value if 0 <= value < 1 << 64 else None
