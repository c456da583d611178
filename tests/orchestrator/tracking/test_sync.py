"""Laws of sync: MLflow shows what the ledger says, once, however often and wherever in between it was interrupted.

The ledger is written by hand (tests/written_ledger.py) into a folder store; MLflow is real, on sqlite. Rows are counted in its tables.
"""

from __future__ import annotations

import shutil
import sqlite3
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from shown_runs import PriceList, again, ledger_in, rows, runs_of, short, shown
from written_ledger import Writer, pipeline

from orchestrator.effects import Effect, watched_by
from orchestrator.labels import Tag
from orchestrator.recipe.prices import Prices
from orchestrator.tracking.client import MlflowTracker, open_tracker
from orchestrator.tracking.sync import Sync


def test_samples_are_artifacts_of_their_stage(story: Writer, tracker: MlflowTracker, prices: PriceList, tmp_path: Path) -> None:
    story.launch()
    intent = story.begin("stage1")
    for name, content in (("sheet.png", b"a sheet"), ("left.mp4", b"a clip"), ("prompts.json", b"{}")):
        story.draw(intent, name, content, tmp_path)
    for _ in range(2):
        Sync(again(story.ledger), tracker, prices).update()
    story.draw(intent, "later.mp4", b"another", tmp_path)
    Sync(story.ledger, tracker, prices).update()
    run = next(run for key, run in runs_of(tracker).items() if short(key) == "stage1")
    assert tracker.artifacts(run.id, "samples") == {"sheet.png": 7, "left.mp4": 6, "later.mp4": 7}
    assert [path.read_bytes() for path in (tmp_path / "mlartifacts").rglob("left.mp4")] == [b"a clip"]


def test_an_alias_follows_the_current_result(story: Writer, tracker: MlflowTracker, prices: PriceList) -> None:
    """Another configuration commits another result; back at the first one, the first result is the current one again."""
    first = story.pipeline
    story.launch()
    story.finish(story.begin("stage1"))
    story.end()
    seen = []
    for chosen in (first, pipeline(steps=40), first):
        story.pipeline = chosen
        story.now += 100
        story.launch()
        if story.ledger.committed("stage1", story.inputs_digest("stage1")) is None:
            story.finish(story.begin("stage1"))
        story.end()
        Sync(story.ledger, tracker, prices).update()
        current = [run for run in runs_of(tracker).values() if run.tags.get(Tag.CURRENT) == "true"]
        seen.append((tracker.models("demo")[1], [run.params["steps"] for run in current]))
    assert seen == [({"stage1": 1}, ["30"]), ({"stage1": 2}, ["40"]), ({"stage1": 1}, ["30"])]


def test_a_third_update_changes_no_row(story: Writer, tracker: MlflowTracker, prices: PriceList, home: Path) -> None:
    story.three_stages()
    Sync(story.ledger, tracker, prices).update()
    once = rows(home / "mlflow.db")
    for _ in range(2):
        Sync(again(story.ledger), open_tracker("sqlite", home) or tracker, prices).update()
    assert rows(home / "mlflow.db") == once
    with watched_by(CrashAfterOne()):  # nor is anything sent
        Sync(again(story.ledger), tracker, prices).update()
    assert len(once["runs"]) == 8 and sum(once["metrics"].values()) > 1000


@pytest.mark.long
def test_growing_with_the_ledger_ends_like_one_update(tmp_path: Path, tracker: MlflowTracker, prices: PriceList, home: Path) -> None:
    grown = Writer(ledger_in(tmp_path), pipeline())
    sync = Sync(grown.ledger, tracker, prices)
    original = grown.ledger.store.create
    looks = 0

    def create(key: str, data: bytes) -> str:
        nonlocal looks
        etag = original(key, data)
        if len(key) % 2 == 0 or "outcome" in key:  # every other record, to spare time
            sync.update(lag=0.02)
            looks += 1
        return etag

    grown.ledger.store.create = create  # type: ignore[method-assign]
    grown.three_stages()
    sync.update()
    assert looks > 25
    other = tmp_path / "once"
    other.mkdir()
    shutil.copytree(tmp_path / "store", other / "store")
    at_once = open_tracker("sqlite", other)
    assert at_once is not None
    Sync(ledger_in(other), at_once, prices).update()
    assert comparable(home / "mlflow.db") == comparable(other / "mlflow.db")


def comparable(database: Path) -> dict[str, Any]:
    """What is shown, less the store's own place and the bookkeeping of when readings were sent."""
    runs = shown(database)
    for run in runs.values():
        for tag in (Tag.AS_OF, Tag.STORE, Tag.CHECKPOINT, Tag.CURSOR):
            run["tags"].pop(tag, None)
        run["readings"] = [(name, round(value, 9)) for name, value in run["readings"] if value]
    return runs


@pytest.mark.long
def test_a_lost_database_is_made_anew(story: Writer, tracker: MlflowTracker, prices: PriceList, home: Path, empty_database: Path) -> None:
    story.three_stages()
    Sync(story.ledger, tracker, prices).update()
    before, ids = shown(home / "mlflow.db"), {run.id for run in runs_of(tracker).values()}
    (home / "mlflow.db").rename(home / "lost.db")
    shutil.copy(empty_database, home / "mlflow.db")
    fresh = MlflowTracker(f"sqlite:///{home}/./mlflow.db", home / "mlartifacts")  # another address: MLflow keeps engines by address
    Sync(again(story.ledger), fresh, prices).update()
    assert shown(home / "mlflow.db") == before
    assert ids.isdisjoint(run.id for run in runs_of(fresh).values())


class Crash(Exception):
    pass


class CrashAfterOne:
    """A witness of the port for effects. Its process dies right after the first effect on MLflow, which happened."""

    def before(self, effect: Effect) -> None:
        pass

    def after(self, effect: Effect, answer: object) -> None:
        if effect.kind.startswith("mlflow."):
            raise Crash(effect.kind)


@pytest.mark.long
def test_a_crash_after_every_single_effect_doubles_nothing(
    story: Writer, tracker: MlflowTracker, prices: PriceList, home: Path, tmp_path: Path, empty_database: Path
) -> None:
    story.three_stages()
    crashes: Counter[str] = Counter()
    while True:
        try:
            with watched_by(CrashAfterOne()):
                Sync(again(story.ledger), tracker, prices).update()
        except Crash as crash:
            crashes[str(crash)] += 1
            assert sum(crashes.values()) < 200
        else:
            break
    assert crashes["mlflow.create_run"] == 8 and crashes["mlflow.create_version"] == 3 and crashes["mlflow.log_batch"] >= 15
    (tmp_path / "calm").mkdir()
    calm = open_tracker("sqlite", tmp_path / "calm")
    assert calm is not None
    shutil.copy(empty_database, tmp_path / "calm" / "mlflow.db")
    Sync(again(story.ledger), calm, prices).update()
    assert shown(home / "mlflow.db") == shown(tmp_path / "calm" / "mlflow.db")
    assert len(tracker.models("demo")[0]) == 3
    models = tracker._client.search_logged_models([tracker.experiment("demo")])
    assert len(models) == 3 and {str(model.status) for model in models} == {"READY"}
    assert crashes["mlflow.create_logged_model"] == crashes["mlflow.log_outputs"] == crashes["mlflow.finalize_logged_model"] == 3


@pytest.mark.long
def test_a_cursor_that_was_not_written_repeats_points_without_doubling_them(
    story: Writer, tracker: MlflowTracker, prices: PriceList, home: Path
) -> None:
    story.three_stages()
    Sync(story.ledger, tracker, prices).update()
    before = rows(home / "mlflow.db")["metrics"]
    for run in runs_of(tracker).values():
        tracker.log(run.id, tags={Tag.CURSOR: "-1"})
    Sync(again(story.ledger), tracker, prices).update()
    assert rows(home / "mlflow.db")["metrics"] == before


def test_of_twins_one_is_left(story: Writer, tracker: MlflowTracker, prices: PriceList, home: Path) -> None:
    """A create whose answer was lost and that was sent again, or two processes at once."""
    story.three_stages()
    Sync(story.ledger, tracker, prices).update()
    before = shown(home / "mlflow.db")
    for run in runs_of(tracker).values():
        made_with = {name: value for name, value in run.tags.items() if name not in (Tag.CURSOR, Tag.AS_OF)}
        tracker.create("demo", run.tags["mlflow.runName"], made_with, 1.0)
    versions, _ = tracker.models("demo")
    tracker.register("demo", "s3://bucket/twin", next(iter(runs_of(tracker).values())).id, versions[0].tags)
    for _ in range(2):
        Sync(again(story.ledger), tracker, prices).update()
    after = shown(home / "mlflow.db")
    for run in (*before.values(), *after.values()):  # the twin may be the one that stays
        run.update(start=None)
    assert after == before
    assert [version.number for version in tracker.models("demo")[0]] == [1, 2, 3]


@pytest.mark.long
def test_two_ledgers_of_one_name_do_not_mix(tmp_path: Path, tracker: MlflowTracker, prices: PriceList, home: Path) -> None:
    writers = []
    for place in ("mine", "yours"):
        writer = Writer(ledger_in(tmp_path / place), pipeline(), now=1.79e9 + len(writers))
        writer.three_stages()
        writers.append(writer)
        Sync(writer.ledger, tracker, prices).update()
    runs = tracker.runs("demo", {Tag.PIPELINE: "demo"})
    assert Counter(run.tags[Tag.LEDGER] for run in runs) == dict.fromkeys({run.tags[Tag.LEDGER] for run in runs}, 8)
    assert len(runs) == 16 and len(tracker.models("demo")[0]) == 6
    newest = tracker.models("demo")[1]
    Sync(again(writers[0].ledger), tracker, prices).update()
    assert tracker.models("demo")[1] == newest == {"stage1": 4, "stage2": 5, "stage3": 6}


def test_a_corrected_price_is_shown_even_when_it_is_lower(story: Writer, tracker: MlflowTracker, prices: PriceList) -> None:
    story.three_stages()
    Sync(story.ledger, tracker, prices).update()
    dear = runs_of(tracker)["demo"].metrics["usd"]
    devices = prices().devices
    device = devices["h800"].model_copy(update={"usd_per_hour": devices["h800"].usd_per_hour / 2})
    Sync(again(story.ledger), tracker, lambda: Prices(devices=devices | {"h800": device})).update()
    assert runs_of(tracker)["demo"].metrics["usd"] == pytest.approx(dear / 2)


@pytest.mark.long
def test_a_live_bill_does_not_add_a_row_at_every_look(story: Writer, tracker: MlflowTracker, prices: PriceList, home: Path) -> None:
    sync = Sync(story.ledger, tracker, prices, story.clock)
    story.pipeline = pipeline(steps=300)
    story.launch()
    intent = story.begin("stage1")
    for step in range(10, 301, 10):
        story.train(intent, step)
        sync.update(lag=0.5)
    with sqlite3.connect(home / "mlflow.db") as connection:
        (count,) = connection.execute("select count(*) from metrics where key = 'usd'").fetchone()
        (steps,) = connection.execute("select count(distinct step) from metrics where key = 'loss'").fetchone()
    connection.close()
    assert steps == 300
    assert count < 3 * 30 / 2


def test_following_a_launch_reads_each_piece_once(
    story: Writer, tracker: MlflowTracker, prices: PriceList, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger = again(story.ledger)
    sync = Sync(ledger, tracker, prices)
    read, asked = ledger.store.read, Counter[str]()

    def note(key: str) -> Any:
        asked.update([key] if "/journal/" in key else [])
        return read(key)

    story.launch()
    intent = story.begin("stage1")
    sync.update()
    monkeypatch.setattr(ledger.store, "read", note)
    for step in (10, 20, 30):
        story.train(intent, step)
        story.publish(intent, step)
        asked.clear()  # the writer reads as well
        sync.update()
        pieces = [key for key in asked if key.endswith(f"000-{step // 10:06d}.json")]
        assert pieces and set(asked.values()) == {1} and len(asked) <= 3, asked
    assert len(sync.reader.history._kept) == 4 and not any("/journal/" in key for key in ledger._objects.known)
