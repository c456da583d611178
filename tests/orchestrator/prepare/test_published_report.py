"""The page of a preparation lies with its data set: whoever has the store reads it, and a changed one is not shown."""

from __future__ import annotations

from pathlib import Path

import pytest
from prepare_bench import Bench

from orchestrator.errors import CorruptCheckpoint
from orchestrator.prepare import published_report
from orchestrator.prepare.publish import described


def test_the_page_is_published_with_the_data_set_and_found_by_its_name(bench: Bench) -> None:
    made = bench.run().published
    assert made is not None
    data = published_report.find(bench.store, "mine")
    assert data is not None and b"half 0 of a" in data and str(made.description.digest)[:16].encode() in data
    assert published_report.find(bench.store, "other") is None


def test_another_page_makes_no_other_data_set(bench: Bench) -> None:
    """It has the time at which it was made."""
    one = bench.run().published
    bench.clock.ahead_s = 100_000.0
    other = bench.run(run_dir="elsewhere").published
    assert one is not None and other is not None
    assert (one.place, one.description.digest) == (other.place, other.description.digest) and not other.new


def test_a_page_that_somebody_changed_is_said(bench: Bench, tmp_path: Path) -> None:
    made = bench.run().published
    assert made is not None
    version = made.place.rpartition("/")[2]
    assert "report.html" in described(bench.store, "mine", version).files
    page = tmp_path / "store/datasets/mine/prepared" / version / "report.html"
    page.chmod(0o644)
    page.write_bytes(page.read_bytes().replace(b"half", b"part"))
    with pytest.raises(CorruptCheckpoint, match=r"report\.html: is not the page"):
        published_report.find(bench.store, "mine")


def test_a_large_set_is_published_without_a_page_and_told_how_to_make_it(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(published_report, "MOST", -1)
    bench.run()
    assert published_report.find(bench.store, "mine") is None
    assert any("osctl prepare report mine" in said for said in bench.said)
