"""What of its data a stage uses: clips that are left out, captions that are cut, and what else a person should hear before paying for it.

Owns the counts, their grouping by reason, the sentences about them, and the limit (`data.max_left_out`) beyond which a stage refuses.
Pure. A million reasons are grouped into a few with some names each; all of them stand in a file (`opensora.training.run_directory`).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from opensora.printable import one_line, quoted

MOST_REASONS, MOST_NAMES = 8, 3
"""Reasons that are told apart, and clips of each that are named."""
MOST_REMARKS, LONGEST_REMARK, LONGEST_NAME = 10, 300, 80
LEFT_OUT = "more than data.max_left_out allows"
"""In the reason of a `data` end. Another attempt would leave out the same clips: `orchestrator.driver.retries` knows these words."""


@dataclass(frozen=True)
class Reason:
    """Clips that are left out for the same reason."""

    reason: str
    """Of the first of them: the others may have other numbers in it."""
    clips: int
    first: tuple[str, ...]
    """Names of some."""


@dataclass(frozen=True)
class Usage:
    """Of one stage's data."""

    clips: int
    """That the data names."""
    used: int
    reasons: tuple[Reason, ...] = ()
    """Why the others are not, the most frequent first."""
    cut: int | None = 0
    """Clips whose caption is longer than what the model sees of one; none: a cache of an older release, which did not count them."""
    tokens: int = 0
    """Of a caption that the model sees."""
    unit: str = "words"
    """What captions are cut into."""
    remarks: tuple[str, ...] = ()
    """What the source says besides."""

    @property
    def left_out(self) -> int:
        return self.clips - self.used

    def sentences(self) -> list[str]:
        """For people, one line each. Empty: everything is used as it is."""
        said = []
        if self.left_out:
            said.append(f"{self.left_out:,} of {self.clips:,} clips are left out: {self.why()}")
        if self.cut:
            said.append(f"captions are cut at {self.tokens} {self.unit}: {self.cut:,} of {self.used:,}; the model sees nothing of the rest")
        return [*said, *self.remarks]

    def why(self) -> str:
        """`10 (a.mp4, …): No such file; 8 (b.mp4, …): 3 frames, 4 are needed`."""
        return "; ".join(
            f"{each.clips:,} ({', '.join(each.first)}{', …' if each.clips > len(each.first) else ''}): {each.reason}"
            if each.first
            else f"{each.clips:,}: {each.reason}"
            for each in self.reasons
        )

    def refusal(self, most: float) -> str | None:
        """Why a stage does not train on what is left, `most` being `data.max_left_out`; none: it does."""
        if self.left_out <= most * self.clips:
            return None
        return (
            f"data.source: {self.left_out:,} of {self.clips:,} clips are left out, {LEFT_OUT} (a share of {most:g}, and this is "
            f"{self.left_out / self.clips:.2g}): {self.why()}"
        )

    def encode(self) -> dict[str, Any]:
        """As JSON."""
        reasons = [{"reason": each.reason, "clips": each.clips, "first": list(each.first)} for each in self.reasons]
        return {
            "clips": self.clips,
            "used": self.used,
            "reasons": reasons,
            "captions_cut": self.cut,
            "caption_tokens": self.tokens,
            "caption_unit": self.unit,
            "remarks": list(self.remarks),
        }


def grouped(left_out: Mapping[str, str], clips: int) -> tuple[Reason, ...]:
    """Reasons that differ in numbers alone, or behind a colon, are one.

    Args:
        left_out: each clip → why.
        clips: how many that are; more than names, where a file was named twice.
    """
    counts = Counter(left_out.values())  # of a million clips few reasons differ in their letters
    names: dict[str, list[str]] = {reason: [] for reason in counts}
    for name, reason in left_out.items():
        if len(names[reason]) < MOST_NAMES:
            names[reason].append(quoted(name, LONGEST_NAME))
    found: dict[str, Reason] = {}
    for reason, count in counts.items():
        kind = re.sub(r"\d+", "#", reason.partition(":")[0])
        known = found.get(kind, Reason(one_line(reason, LONGEST_REMARK), 0, ()))
        found[kind] = Reason(known.reason, known.clips + count, (*known.first, *names[reason])[:MOST_NAMES])
    by_count = sorted(found.values(), key=lambda each: -each.clips)
    told, rest = by_count[:MOST_REASONS], sum(each.clips for each in by_count[MOST_REASONS:])
    others = [Reason("other reasons", rest, ()), Reason("the same files, named more than once", clips - len(left_out), ())]
    return (*told, *(each for each in others if each.clips > 0))


def bounded(remarks: Sequence[str]) -> tuple[str, ...]:
    """As many as a person reads, one line each."""
    told = tuple(one_line(each, LONGEST_REMARK) for each in remarks[:MOST_REMARKS])
    return (*told, *([f"and {len(remarks) - MOST_REMARKS:,} more remarks"] if len(remarks) > MOST_REMARKS else []))
