"""What an attempt holds before its agent reports is on what people see, as it will be on the bill."""

from __future__ import annotations

from pathlib import Path

import pytest
from written_ledger import Writer, pipeline

from orchestrator.accounting.bound_time import with_bound
from orchestrator.accounting.history import History
from orchestrator.accounting.status import Snapshot, take_snapshot
from orchestrator.ledger.store import Ledger
from orchestrator.stores import open_store


@pytest.fixture
def story(tmp_path: Path) -> Writer:
    return Writer(Ledger(open_store(str(tmp_path / "store")), "demo"), pipeline())


def seen(story: Writer) -> Snapshot:
    return take_snapshot(story.pipeline, History(Ledger(story.ledger.store, "demo")), story.now)


def test_before_the_first_report_it_is_the_time_since_the_binding(story: Writer) -> None:
    story.launch()
    intent = story.begin("stage1")
    before = seen(story)
    after = with_bound(before, {intent.run_key: story.now - 60}, story.now)
    devices = intent.nodes * intent.devices_per_node
    assert before.bill.held_s == 0 == before.usd
    assert after.bill.held_s == after.bill.seconds["pull"] == 60 * devices and after.usd > 0
    assert (after.stages[0].wall_s, after.stages[0].attempts[0].bound) == (60, story.now - 60)
    assert after.stages[0].attempts[0].usd == after.usd and not list(after.bill.remarks())
    assert with_bound(before, {}, story.now) is before


def test_after_it_the_time_before_the_first_piece_is_added_and_what_is_over_stays(story: Writer) -> None:
    story.launch()
    intent = story.begin("stage1")
    story.train(intent, 10)
    before = seen(story)
    first = before.stages[0].attempts[0].bound
    assert first is not None
    after = with_bound(before, {intent.run_key: first - 5}, story.now)
    devices = intent.nodes * intent.devices_per_node
    assert after.bill.held_s == pytest.approx(before.bill.held_s + 5 * devices)
    assert after.stages[0].attempts[0].bound == first - 5
    assert with_bound(before, {intent.run_key: first + 5}, story.now) == before, "a later binding, by another clock, takes nothing away"
    story.close(intent, "lost")
    ended = seen(story)
    assert with_bound(ended, {intent.run_key: first - 5}, story.now) == ended
