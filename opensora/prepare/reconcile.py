"""Counts of each step, and the law that none of its rows is lost: in = kept + dropped + quarantined. Pure.

Owns the counts, the law, and when there are so many quarantined rows that a run stops. Refuses to move rows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from opensora.dataset.rows import Drop, Leaves
from opensora.errors import DataError, TrainerError
from opensora.printable import several

HANDFUL = 5
"""So many quarantined rows of a step never stop a run: of a folder of 40 phone videos one broken file is 2.5%."""
NAMED = 5
"""Reasons that a summary gives."""


class Unreconciled(TrainerError):
    """Rows went in and neither came out nor left with a reason: a fault of this program."""


class TooMany(DataError):
    """More rows than `max_quarantined` could not be worked on."""


@dataclass
class Tally:
    """Of one step."""

    into: int = 0
    """Rows that are known to come in; grows while they are listed."""
    kept: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    quarantined: Counter[str] = field(default_factory=Counter)

    @property
    def done(self) -> int:
        return self.kept + sum(self.dropped.values()) + sum(self.quarantined.values())

    def leave(self, leaves: Leaves, rows: int = 1) -> None:
        (self.dropped if isinstance(leaves, Drop) else self.quarantined)[leaves.reason] += rows

    def content(self) -> dict[str, Any]:
        """As DATASET.json has it."""
        return {
            "in": self.into,
            "kept": self.kept,
            "dropped": dict(sorted(self.dropped.items())),
            "quarantined": dict(sorted(self.quarantined.items())),
        }


def allowed(rows: int, share: float) -> int:
    """Quarantined rows of a step that do not stop a run: the share of its rows, and at least a handful unless the share is 0."""
    return max(HANDFUL, int(share * rows)) if share > 0 else 0


MEND = {"caption": "mend what makes the captions", "score": "mend what scores them", "clips": "make room", "encode": "make room"}
"""By step, what a person may do so that the same rows can be worked on; else their sources are at fault."""


def check_share(step: str, tally: Tally, share: float) -> None:
    """Raises TooMany."""
    quarantined = sum(tally.quarantined.values())
    if quarantined <= allowed(tally.into, share):
        return
    reasons = tally.quarantined.most_common()
    said = ", ".join(f"{reason}: {count:,}" for reason, count in reasons[:NAMED])
    more = f", {len(reasons) - NAMED} more reasons" if len(reasons) > NAMED else ""
    least = f" (at least {HANDFUL} are)" if share > 0 else ""
    mend = MEND.get(step, "take these sources out")
    raise TooMany(
        f"{step}: {quarantined:,} of {tally.into:,} rows could not be worked on, max_quarantined {share:g} allows "
        f"{allowed(tally.into, share):,}{least}: {said}{more}. Nothing is lost: {mend} or set max_quarantined higher, and run again"
    )


def check_settled(tallies: Mapping[str, Tally]) -> None:
    """Raises Unreconciled."""
    for step, tally in tallies.items():
        if tally.into != tally.done:
            left = sum(tally.dropped.values()), sum(tally.quarantined.values())
            raise Unreconciled(
                f"{step}: {several(tally.into, 'row')} came in, {tally.kept:,} were kept, {left[0]:,} dropped, {left[1]:,} quarantined: "
                f"{tally.into - tally.done:,} are lost. This is a fault of osctl; nothing was published"
            )
