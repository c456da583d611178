"""Laws of the counts."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from opensora.dataset.rows import Drop, Quarantine
from opensora.prepare.reconcile import HANDFUL, Tally, TooMany, Unreconciled, allowed, check_settled, check_share

COUNTS = st.integers(0, 50)


@given(COUNTS, COUNTS, COUNTS, st.integers(-3, 3))
def test_a_step_is_settled_only_where_every_row_is_accounted_for(kept: int, dropped: int, quarantined: int, lost: int) -> None:
    tally = Tally(into=kept + dropped + quarantined + lost, kept=kept)
    for _ in range(dropped):
        tally.leave(Drop("static", "0.99"))
    for _ in range(quarantined):
        tally.leave(Quarantine("crash", ""))
    if lost:
        with pytest.raises(Unreconciled, match="lost"):
            check_settled({"frames": tally})
    else:
        check_settled({"frames": tally})


@given(st.integers(0, 1000), st.integers(0, 1000), st.floats(0, 1))
def test_a_run_stops_above_the_share_and_a_handful(rows: int, quarantined: int, share: float) -> None:
    tally = Tally(into=rows)
    tally.quarantined["crash"] = quarantined
    tolerated = quarantined <= share * rows or (share > 0 and quarantined <= HANDFUL)
    if tolerated:
        check_share("frames", tally, share)
    elif quarantined > allowed(rows, share):
        with pytest.raises(TooMany, match=f"{quarantined:,} of {rows:,}"):
            check_share("frames", tally, share)


def test_the_summary_names_the_reasons() -> None:
    tally = Tally(into=1000)
    tally.quarantined.update({"crash (SIGSEGV)": 30, "takes too long": 2})
    with pytest.raises(TooMany) as told:
        check_share("frames", tally, 0.01)
    assert str(told.value) == (
        "frames: 32 of 1,000 rows could not be worked on, max_quarantined 0.01 allows 10 (at least 5 are): crash (SIGSEGV): 30, takes too "
        "long: 2. Nothing is lost: take these sources out or set max_quarantined higher, and run again"
    )
    with pytest.raises(TooMany, match="Nothing is lost: mend what makes the captions or set max_quarantined higher"):
        check_share("caption", tally, 0.01)
