"""A preparation from its lease to its data set, with a process that obeys the contract and decodes nothing."""

from __future__ import annotations

import dataclasses
import json
import shutil
import threading
import time
from collections.abc import Mapping
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from prepare_bench import Bench
from processes import crowded

from orchestrator.errors import Refused, RunFailed, UsageError
from orchestrator.inputs import datasets
from orchestrator.ledger.records import Price
from orchestrator.ledger.store import Ledger
from orchestrator.prepare import attempts
from orchestrator.prepare.publish import described
from orchestrator.prepare.records import Keys
from orchestrator.stores.folder import FolderStore

BOTH = pytest.mark.parametrize("any_bench", ["folder", pytest.param("s3", marks=pytest.mark.s3)], indirect=True)
KEYS = Keys("mine")


def kinds(bench: Bench) -> list[str]:
    return [event.kind for event in Ledger(bench.store, KEYS.folder).events()]


@BOTH
def test_what_was_prepared_lies_whole_in_its_store_under_its_name(any_bench: Bench) -> None:
    bench = any_bench
    prepared = bench.run()
    assert prepared.published is not None and prepared.published.new and prepared.attempt == 1
    one = datasets.of_name(bench.store, "mine")[-1]
    assert one.source == prepared.published.place and (one.rows, one.seconds, one.licences) == (6, 6.0, ("cc0",))
    manifest = datasets.get_manifest(bench.store, one.manifest)
    assert [row.text for row in manifest.rows][:2] == ["half 0 of a", "half 1 of a"]
    folder = prepared.published.place.removeprefix(f"{bench.store.url}/")
    for row in manifest.rows:
        assert bench.store.digest(f"{folder}/{row.path}") == (row.size, row.sha256)
    assert described(bench.store, "mine", folder.rpartition("/")[2]).clips == 6
    assert kinds(bench) == ["launched", "attempt", "outcome", "committed", "ended"]


def test_a_process_that_has_a_thousand_files_open_prepares_all_the_same(bench: Bench) -> None:
    with crowded():
        assert bench.run().published is not None


def test_the_books_say_what_an_attempt_held_and_what_its_captions_cost(bench: Bench) -> None:
    price = Price(usd_per_hour=Decimal("3.6"), is_gpu=False, basis="assumption", source="a test", date="2026-11-30")
    preparation = bench.preparation("--slow", "0.05")
    preparation.asked = type(preparation.asked)(**{**vars(preparation.asked), "price": price})
    prepared = preparation.run()
    (one,) = attempts.all_of(bench.store, KEYS)
    assert one.intent is not None and one.outcome is not None
    held = one.outcome.ended - one.outcome.bound
    assert held >= 0.3 and one.outcome.device_seconds == pytest.approx(2 * held)
    assert (one.outcome.tokens_in, one.outcome.tokens_out, one.outcome.caption_usd) == (7, 2, 0.25)
    assert float(prepared.usd) == pytest.approx(2 * held * 0.001 + 0.25)


def test_repeating_it_does_nothing_and_a_new_video_is_seen(bench: Bench) -> None:
    bench.run()
    before = sorted(bench.store.list(""))
    again = bench.run()
    assert again.nothing_to_do and again.published is not None and sorted(bench.store.list("")) == before
    (bench.videos / "d.mp4").write_bytes(b"one more")
    more = bench.run()
    assert not more.nothing_to_do and more.published is not None and more.published.description.clips == 8
    assert len(bench.made()) == 36, "what is kept is not made again"


def test_a_person_may_have_everything_looked_at_again(bench: Bench) -> None:
    bench.run()
    preparation = bench.preparation()
    preparation.asked = dataclasses.replace(preparation.asked, retry=True)
    again = preparation.run()
    assert not again.nothing_to_do and again.attempt == 2 and again.published is not None and not again.published.new
    assert len(datasets.of_name(bench.store, "mine")) == 1 and kinds(bench).count("committed") == 1


def test_a_store_and_a_run_directory_among_the_videos_are_no_sources(videos: Path) -> None:
    bench = Bench(videos / "state", FolderStore(videos / "store"), videos)
    assert bench.run().published is not None
    assert json.loads((videos / "state/run/left_out.json").read_bytes())["folders"] == [str(videos / "state/run"), str(videos / "store")]
    bench.said.clear()
    assert bench.run().nothing_to_do
    assert [text for text in bench.said if "passed over 2 folders" in text] == bench.said


def test_execution_alone_makes_nothing_new(bench: Bench) -> None:
    bench.run()
    assert bench.run(max_quarantined=0.5).nothing_to_do
    assert not bench.run(caption_words=(1, 9)).nothing_to_do


@BOTH
def test_another_machine_goes_on_with_what_was_kept(any_bench: Bench) -> None:
    bench = any_bench
    preparation = bench.preparation("--slow", "0.15")
    preparation.on_progress = lambda status: preparation.drain() if len(bench.made()) >= 6 else None
    stopped = preparation.run()
    assert stopped.published is None and 6 <= len(bench.made()) < 27
    (bench.directory().path / "kept").rename(bench.folder / "lost")
    prepared = bench.run(run_dir="elsewhere")
    assert prepared.published is not None and prepared.published.description.clips == 6
    assert not set(bench.made()) & set(bench.made("elsewhere")) and len(bench.made()) + len(bench.made("elsewhere")) == 27
    assert any("brought back" in line for line in bench.said)
    assert [one.outcome.class_ for one in attempts.all_of(bench.store, KEYS) if one.outcome] == ["drained", "completed"]


def test_a_second_run_is_told_who_prepares_it(bench: Bench) -> None:
    told: list[str] = []

    def second(status: Mapping[str, Any]) -> None:
        if not told:
            with pytest.raises(Refused) as caught:
                bench.run(run_dir="other")
            told.append(str(caught.value))

    preparation = bench.preparation("--slow", "0.05")
    preparation.on_progress = second
    assert preparation.run().published is not None
    assert "data set mine: is being prepared by" in told[0] and "osctl prepare status mine" in told[0]


def test_one_run_directory_is_used_by_one_process_whatever_the_store(bench: Bench, tmp_path: Any) -> None:
    from orchestrator.stores.folder import FolderStore

    told: list[str] = []

    def second(status: Mapping[str, Any]) -> None:
        if not told:
            with pytest.raises(Refused, match="in use") as caught:
                Bench(bench.folder, FolderStore(tmp_path / "another"), bench.videos).run()
            told.append(str(caught.value))

    preparation = bench.preparation("--slow", "0.05")
    preparation.on_progress = second
    assert preparation.run().published is not None and told


@pytest.mark.parametrize(("kind", "error"), [("config", UsageError), ("data", RunFailed), ("disk", RunFailed), ("code", RunFailed)])
def test_a_failure_is_told_in_the_words_of_the_process_and_stands_in_the_books(bench: Bench, kind: str, error: type[Exception]) -> None:
    with pytest.raises(error, match="as the test asked"):
        bench.run("--fail", kind)
    (one,) = attempts.all_of(bench.store, KEYS)
    assert one.outcome is not None and one.outcome.class_ == kind
    assert datasets.of_name(bench.store, "mine") == [] and kinds(bench)[-1] == "ended"
    assert bench.run().published is not None


def test_a_second_request_to_stop_ends_the_process_at_once(bench: Bench) -> None:
    preparation = bench.preparation("--slow", "600")
    preparation.on_progress = lambda status: preparation.kill() if bench.made() else None
    began = time.monotonic()
    assert preparation.run().published is None and time.monotonic() - began < 60
    (one,) = attempts.all_of(bench.store, KEYS)
    assert one.outcome is not None and one.outcome.class_ == "signal" and one.outcome.reason == "the process was ended by SIGKILL"


def test_a_launcher_that_lost_its_lease_ends_its_process_and_publishes_nothing(bench: Bench) -> None:
    preparation = bench.preparation("--slow", "0.2")
    threads = threading.active_count()

    def taken(status: Mapping[str, Any]) -> None:
        if bench.clock.ahead_s == 0 and bench.made():
            bench.clock.ahead_s = 60
            Ledger(bench.store, KEYS.folder).acquire(bench.clock.now())

    preparation.on_progress = taken
    with pytest.raises(Refused, match="taken over the lease"):
        preparation.run()
    assert datasets.of_name(bench.store, "mine") == [] and threading.active_count() <= threads


def test_a_launcher_whose_store_was_removed_says_so_and_what_is_kept_here_is_used_again(bench: Bench) -> None:
    preparation = bench.preparation("--slow", "0.2")

    def removed(status: Mapping[str, Any]) -> None:
        if bench.clock.ahead_s == 0 and bench.made():
            shutil.rmtree(bench.folder / "store")
            bench.clock.ahead_s = 6  # a third of the lease's life is over

    preparation.on_progress = removed
    with pytest.raises(Refused, match=r"gone.*; nobody else has taken over.*osctl prepare run .*prepare\.yaml"):
        preparation.run()
    before = set(bench.made())
    assert bench.run().published is not None and before < set(bench.made()) and len(bench.made()) == 27


def test_what_is_published_is_never_changed_and_other_files_get_a_place_beside(bench: Bench) -> None:
    first = bench.run()
    assert first.published is not None
    clip = next((bench.directory().kept / "clips").rglob("*.mp4"))
    clip.write_bytes(b"the same clip, scaled otherwise")
    (bench.directory().path / "finished.json").unlink()
    second = bench.run()
    assert second.published is not None and second.published.new
    assert second.published.description.digest == first.published.description.digest
    assert second.published.place.startswith(f"{first.published.place}-")
    assert datasets.of_name(bench.store, "mine")[-1].source == second.published.place


def test_a_file_that_is_not_as_its_description_says_is_not_published(bench: Bench) -> None:
    bench.run()
    directory = bench.directory()
    about = json.loads((directory.out / "DATASET.json").read_text())
    about["digest"] = "f" * 64
    about["files"]["../run/prepare.yaml"] = {"size": 1, "sha256": "0" * 64}
    (directory.out / "DATASET.json").write_text(json.dumps(about))
    from orchestrator.prepare.publish import publish

    with pytest.raises(Refused, match=r"`\.\.`"):
        publish(bench.store, "mine", directory.out)
    del about["files"]["../run/prepare.yaml"]
    about["files"]["captions.csv"]["sha256"] = "0" * 64
    (directory.out / "DATASET.json").write_text(json.dumps(about))
    with pytest.raises(RunFailed, match=r"captions\.csv"):
        publish(bench.store, "mine", directory.out)
