"""Laws of the projection: MLflow shows what the ledger says, once, however often and wherever in between it was interrupted.

The ledger is written by hand (tests/written_ledger.py) into a folder store; MLflow is real, on sqlite. Rows are counted in its tables.
"""

from __future__ import annotations

import os
import shutil
import socket
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from written_ledger import Writer, pipeline

from opensora.identity import Contents
from orchestrator.adapters import open_store
from orchestrator.adapters.tracking import MlflowTracker, open_tracker, tracking_url
from orchestrator.cost import account
from orchestrator.errors import Unreachable, UsageError
from orchestrator.lease import TTL_S
from orchestrator.ledger import Ledger
from orchestrator.ports import Point, TrackedRun
from orchestrator.prices import Prices, load_prices
from orchestrator.projection import (
    AS_OF,
    CURSOR,
    LEDGER,
    RUN_KEY,
    SILENT_S,
    Follower,
    Launch,
    Projector,
    Reader,
    alias_of,
    attempt_curve,
    flatten,
    is_undecided,
    metric_name,
    points,
    project,
    source_uri,
    stage_curve,
)

PriceList = Callable[[], Prices]

TABLES = (
    "experiments", "runs", "metrics", "latest_metrics", "params", "tags", "datasets", "inputs", "input_tags", "registered_models",
    "model_versions", "model_version_tags", "registered_model_aliases",
)  # fmt: skip


@pytest.fixture(scope="module")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MLflow's database with nothing in it; making one takes seconds, copying it none."""
    home = tmp_path_factory.mktemp("empty")
    tracker = open_tracker("sqlite", home)
    assert tracker is not None
    tracker.runs("warm", {})
    return home / "mlflow.db"


@pytest.fixture
def home(tmp_path: Path, empty_database: Path) -> Path:
    shutil.copy(empty_database, tmp_path / "mlflow.db")
    return tmp_path


@pytest.fixture
def tracker(home: Path) -> MlflowTracker:
    tracker = open_tracker("sqlite", home)
    assert tracker is not None
    return tracker


@pytest.fixture
def prices() -> PriceList:
    return load_prices


@pytest.fixture
def story(tmp_path: Path) -> Writer:
    return Writer(ledger_in(tmp_path), pipeline())


def ledger_in(folder: Path, name: str = "demo") -> Ledger:
    return Ledger(open_store(str(folder / "store")), name)


def again(ledger: Ledger) -> Ledger:
    """The same ledger to a process that has just started."""
    return Ledger(ledger.store, ledger.pipeline)


def runs_of(tracker: MlflowTracker, experiment: str = "demo") -> dict[str, TrackedRun]:
    return {run.tags[RUN_KEY]: run for run in tracker.runs(experiment, {"osctl/pipeline": "demo"})}


def short(key: str) -> str:
    """`demo/stage1@0123/a1` -> `stage1/a1`."""
    return "/".join(part.partition("@")[0] for part in key.split("/")[1:]) or key


def rows(database: Path) -> dict[str, Counter[tuple[Any, ...]]]:
    with sqlite3.connect(database) as connection:
        found = {table: Counter(connection.execute(f"select * from {table}").fetchall()) for table in TABLES}
    connection.close()
    return found


def shown(database: Path, experiment: str = "demo") -> dict[str, Any]:
    """Everything MLflow shows of an experiment, without its own ids: by key of the living runs."""
    connection = sqlite3.connect(database)
    found: dict[str, Any] = {}
    query = (
        "select r.run_uuid, r.name, r.status, r.start_time, r.end_time from runs r join experiments e using (experiment_id) "
        "where e.name = ? and r.lifecycle_stage = 'active'"
    )
    keys: dict[str, str] = {}
    for run, name, status, start, end in connection.execute(query, (experiment,)).fetchall():
        tags = dict(connection.execute("select key, value from tags where run_uuid = ?", (run,)).fetchall())
        keys[run] = tags[RUN_KEY]
        metrics = connection.execute("select key, step, timestamp, value from metrics where run_uuid = ? and step > 0", (run,)).fetchall()
        readings = connection.execute("select key, value from latest_metrics where run_uuid = ? and step = 0", (run,)).fetchall()
        params = connection.execute("select key, value from params where run_uuid = ?", (run,)).fetchall()
        datasets = connection.execute(
            "select d.name, d.digest from inputs i join datasets d on i.source_id = d.dataset_uuid where i.destination_id = ?", (run,)
        ).fetchall()
        assert tags[RUN_KEY] not in found, "a run stands there twice"
        found[tags[RUN_KEY]] = {
            "name": name, "status": status, "start": start, "end": end, "tags": tags,
            "curve": sorted(metrics), "readings": sorted(readings),
            "params": sorted(params), "datasets": sorted(datasets),
        }  # fmt: skip
    for run in found.values():
        run["tags"]["mlflow.parentRunId"] = keys.get(run["tags"].get("mlflow.parentRunId", ""))
    connection.close()
    return found


# --- What is shown ---------------------------------------------------------------------------------------------------------------------


def test_pipeline_stages_and_attempts_form_a_tree(story: Writer, tracker: MlflowTracker, prices: PriceList, home: Path) -> None:
    story.three_stages()
    project(story.ledger, tracker, prices)
    picture = {short(key): run for key, run in shown(home / "mlflow.db").items()}
    parents = {name: short(run["tags"]["mlflow.parentRunId"] or "-") for name, run in picture.items()}
    assert parents == {
        "demo": "-", "stage1": "demo", "stage2": "demo", "stage3": "demo",
        "stage1/a1": "stage1", "stage2/a1": "stage2", "stage2/a2": "stage2", "stage3/a1": "stage3",
    }  # fmt: skip
    assert {name: run["status"] for name, run in picture.items() if run["status"] != "FINISHED"} == {"stage2/a1": "KILLED"}
    assert {name: run["name"] for name, run in picture.items()}["stage2/a1"] == "stage2 a1"


def test_a_stage_carries_its_configuration_lineage_and_bill(story: Writer, tracker: MlflowTracker, prices: PriceList) -> None:
    story.three_stages()
    facts = project(story.ledger, tracker, prices)
    assert facts is not None
    stage2 = story.results["stage2"]
    run = next(run for key, run in runs_of(tracker).items() if short(key) == "stage2")
    assert run.params["data.frames"] == "8" and run.params["objective.kind"] == "flow" and run.params["devices"] == "8"
    assert run.tags["osctl/weights_digest"] == stage2.weights_digest and run.tags["osctl/manifest_digest"] == stage2.manifest_digest
    assert run.tags["osctl/parent_manifest"] == story.results["stage1"].manifest_digest
    assert run.metrics["evaluation/digit_accuracy"] == stage2.evaluation["digit_accuracy"]
    bill = account([attempt.time for attempt in facts.stages[1].attempts])
    assert Decimal(repr(run.metrics["usd"])) == bill.usd > 0
    assert run.metrics["gpu_hours"] == pytest.approx(bill.gpu_hours)
    assert run.metrics["ratio_vs_reference"] == pytest.approx(bill.gpu_hours / 0.5)
    assert run.metrics["usd_reference"] == 1.5
    # Ten steps on eight devices stand before the kill without a checkpoint after step 10 of 15: five were lost.
    assert run.metrics["seconds/lost"] == pytest.approx(5 * 8 * 0.9 * story.pace(story.pipeline.stage("stage2").config))
    whole = runs_of(tracker)["demo"].metrics
    stages = [run.metrics for run in runs_of(tracker).values() if run.tags["osctl/kind"] == "stage"]
    for reading in ("usd", "gpu_hours", "seconds/step", "usd_reference"):
        assert whole[reading] == pytest.approx(sum(metrics[reading] for metrics in stages)), reading


def test_curves_are_the_ledgers_points(story: Writer, tracker: MlflowTracker, prices: PriceList, home: Path) -> None:
    story.three_stages()
    project(story.ledger, tracker, prices)
    picture = {short(key): run["curve"] for key, run in shown(home / "mlflow.db").items()}
    inputs = story.results["stage2"].inputs
    for attempt, last in ((1, 15), (2, 30)):
        lines = [line for piece in story.ledger.journal("stage2", inputs, attempt) for line in piece.metrics]
        expected = sorted((p.key, p.step, round(p.time * 1000), p.value) for line in lines for p in points(line))
        assert picture[f"stage2/a{attempt}"] == expected
        assert max(point[1] for point in expected) == last
    # On the stage's own curve each step stands once, and the steps that were lost stand with the attempt that was not.
    losses = [point for point in picture["stage2"] if point[0] == "loss"]
    assert [step for _, step, _, _ in losses] == list(range(1, 31))
    second = {point for point in picture["stage2/a2"] if point[0] == "loss"}
    assert {point for point in losses if point[1] > 10} == second


def test_a_cpu_has_no_gpu_hours_and_no_ratio(tmp_path: Path, tracker: MlflowTracker, prices: PriceList) -> None:
    story = Writer(ledger_in(tmp_path), pipeline(device="cpu-core", devices=2))
    story.three_stages()
    project(story.ledger, tracker, prices)
    for run in runs_of(tracker).values():
        assert run.metrics["gpu_hours"] == 0 < run.metrics["device_hours"]
        assert "ratio_vs_reference" not in run.metrics


def test_samples_are_artifacts_of_their_stage(story: Writer, tracker: MlflowTracker, prices: PriceList, tmp_path: Path) -> None:
    story.launch()
    intent = story.begin("stage1")
    for name, content in (("sheet.png", b"a sheet"), ("left.mp4", b"a clip"), ("prompts.json", b"{}")):
        story.draw(intent, name, content, tmp_path)
    for _ in range(2):
        project(again(story.ledger), tracker, prices)
    story.draw(intent, "later.mp4", b"another", tmp_path)
    project(story.ledger, tracker, prices)
    run = next(run for key, run in runs_of(tracker).items() if short(key) == "stage1")
    assert tracker.artifacts(run.id, "samples") == {"sheet.png": 7, "left.mp4": 6, "later.mp4": 7}
    assert [path.read_bytes() for path in (tmp_path / "mlartifacts").rglob("left.mp4")] == [b"a clip"]


def test_each_committed_stage_is_a_model_version_under_its_name(story: Writer, tracker: MlflowTracker, prices: PriceList) -> None:
    story.three_stages()
    for _ in range(2):
        project(again(story.ledger), tracker, prices)
    versions, aliases = tracker.models("demo")
    assert aliases == {"stage1": 1, "stage2": 2, "stage3": 3}
    assert [version.tags["osctl/weights_digest"] for version in versions] == [
        story.results[name].weights_digest for name in ("stage1", "stage2", "stage3")
    ]
    source = tracker._client.get_model_version("demo", "3").source
    place = story.results["stage3"].manifest.removesuffix("/MANIFEST.json")
    assert source == f"osctl://folder/{place}?store={story.ledger.store.url}"


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
        if story.ledger.committed("stage1", story.inputs("stage1")) is None:
            story.finish(story.begin("stage1"))
        story.end()
        project(story.ledger, tracker, prices)
        current = [run for run in runs_of(tracker).values() if run.tags.get("osctl/current") == "true"]
        seen.append((tracker.models("demo")[1], [run.params["steps"] for run in current]))
    assert seen == [({"stage1": 1}, ["30"]), ({"stage1": 2}, ["40"]), ({"stage1": 1}, ["30"])]


def test_names_fit_mlflow() -> None:
    assert [alias_of(name) for name in ("stage1", "stage3.b", "latest", "v1")] == ["stage1", "stage3-b", "stage-latest", "stage-v1"]
    assert metric_name("direction@24%") == "direction_24_"
    assert source_uri("s3://bucket/prefix/", "demo/x") == "s3://bucket/prefix/demo/x"
    assert source_uri("file:///a/b", "demo/x") == source_uri("/a/b", "demo/x") == "osctl://folder/demo/x?store=/a/b"
    long = pipeline().stages[0].config.model_copy(update={"prompts": ("x" * 1000,)})
    assert len(flatten(long)["prompts"]) == 500


# --- Status ----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("end", "attempt", "stage", "whole"),
    [
        (("nan", "failed"), "FAILED", "FAILED", "FAILED"),
        (("drained", "cancelled"), "KILLED", "KILLED", "KILLED"),
        (("lost", None), "KILLED", "RUNNING", "RUNNING"),
        ((None, None), "RUNNING", "RUNNING", "RUNNING"),
    ],
)
def test_terminal_status_is_the_ledgers(
    story: Writer, tracker: MlflowTracker, prices: PriceList, end: tuple[Any, str | None], attempt: str, stage: str, whole: str
) -> None:
    story.launch()
    intent = story.begin("stage1")
    story.train(intent, 10)
    class_, launch = end
    if class_ is not None:
        story.close(intent, class_)
    if launch is not None:
        story.end(launch)
    project(story.ledger, tracker, prices, story.clock)
    found = {short(key): run for key, run in runs_of(tracker).items()}
    assert (found["stage1/a1"].status, found["stage1"].status, found["demo"].status) == (attempt, stage, whole)
    if class_ is not None:
        assert found["stage1/a1"].tags["osctl/class"] == class_


def test_launching_again_reopens_what_had_ended(story: Writer, tracker: MlflowTracker, prices: PriceList) -> None:
    story.launch()
    intent = story.begin("stage1")
    story.train(intent, 10)
    story.publish(intent, 10)
    story.close(intent, "drained")
    story.end("cancelled")
    project(story.ledger, tracker, prices, story.clock)
    story.now += 3600
    story.launch()
    resumed = story.begin("stage1", resume=10)
    story.train(resumed, 20)
    project(story.ledger, tracker, prices, story.clock)
    assert {short(key): run.status for key, run in runs_of(tracker).items()} == {
        "demo": "RUNNING", "stage1": "RUNNING", "stage1/a1": "KILLED", "stage1/a2": "RUNNING",
    }  # fmt: skip
    story.finish(resumed)
    story.end()
    project(story.ledger, tracker, prices, story.clock)
    demo = runs_of(tracker)["demo"]
    assert demo.status == "FINISHED" and demo.ended == pytest.approx(story.now, abs=1e-3)


def killed_while_training(story: Writer) -> float:
    """A launcher and its agent are killed. Returns when the agent was last heard."""
    story.launch()
    story.train(story.begin("stage1"), 20)
    return story.now


def statuses(tracker: MlflowTracker) -> dict[str, tuple[str, float | None]]:
    return {short(key): (run.status, run.ended) for key, run in runs_of(tracker).items()}


def test_runs_of_a_killed_launch_end_when_they_have_been_silent_and_go_on_with_the_next(
    story: Writer, tracker: MlflowTracker, prices: Prices
) -> None:
    """Nobody wrote how it ended: the lease runs out, the journal stands still. The next launch takes the same runs up again."""
    heard = killed_while_training(story)
    names = ("demo", "stage1", "stage1/a1")
    project(story.ledger, tracker, prices, story.clock)
    assert statuses(tracker) == dict.fromkeys(names, ("RUNNING", None)), "driven"
    story.now = heard + TTL_S + 1
    facts = project(again(story.ledger), tracker, prices, story.clock)
    assert statuses(tracker) == dict.fromkeys(names, ("RUNNING", None)), "heard a moment ago"
    assert facts is not None and is_undecided(facts)
    story.now = heard + SILENT_S + 1
    for _ in range(2):
        facts = project(again(story.ledger), tracker, prices, story.clock)
        assert statuses(tracker) == dict.fromkeys(names, ("KILLED", pytest.approx(heard, abs=1e-3)))
        assert facts is not None and not is_undecided(facts)

    story.now = heard + 3600
    story.launch()
    killed = story.ledger.intent("stage1", story.inputs("stage1"), 1)
    assert killed is not None
    project(again(story.ledger), tracker, prices, story.clock)
    assert statuses(tracker) == dict.fromkeys(names, ("RUNNING", None)), "the next driver has not yet said what became of it"
    story.close(killed, "lost")
    resumed = story.begin("stage1")
    story.train(resumed, 10)
    project(again(story.ledger), tracker, prices, story.clock)
    assert {name: status for name, (status, _) in statuses(tracker).items()} == {
        "demo": "RUNNING", "stage1": "RUNNING", "stage1/a1": "KILLED", "stage1/a2": "RUNNING",
    }  # fmt: skip
    story.finish(resumed)
    story.end()
    project(again(story.ledger), tracker, prices, story.clock)
    assert statuses(tracker)["demo"] == ("FINISHED", pytest.approx(story.now, abs=1e-3))
    assert statuses(tracker)["stage1"][0] == statuses(tracker)["stage1/a2"][0] == "FINISHED"


def test_an_agent_that_outlives_its_driver_is_running(story: Writer, tracker: MlflowTracker, prices: Prices) -> None:
    """A driver in a cluster dies, its pods train on."""
    heard = killed_while_training(story)
    story.now = heard + SILENT_S + 60
    project(again(story.ledger), tracker, prices, story.clock)
    assert {status for status, _ in statuses(tracker).values()} == {"KILLED"}
    intent = story.ledger.intent("stage1", story.inputs("stage1"), 1)
    assert intent is not None
    story.train(intent, 30)
    project(again(story.ledger), tracker, prices, story.clock)
    assert set(statuses(tracker).values()) == {("RUNNING", None)}


def test_an_attempt_under_other_inputs_is_not_kept_running_by_a_launch(story: Writer, tracker: MlflowTracker, prices: Prices) -> None:
    heard = killed_while_training(story)
    story.now = heard + 3600
    story.pipeline = pipeline(steps=40)
    story.launch()
    story.train(story.begin("stage1"), 10)
    project(again(story.ledger), tracker, prices, story.clock)
    found = runs_of(tracker)
    assert {run.status for run in found.values() if run.tags.get("osctl/current") == "true"} == {"RUNNING"}
    old = [run for run in found.values() if run.tags.get("osctl/inputs", story.inputs("stage1")) != story.inputs("stage1")]
    assert [(run.status, run.ended) for run in old] == [("KILLED", pytest.approx(heard, abs=1e-3))] * 2


# --- Nothing doubled, nothing lost -----------------------------------------------------------------------------------------------------


def test_projecting_thrice_changes_no_row(story: Writer, tracker: MlflowTracker, prices: PriceList, home: Path) -> None:
    story.three_stages()
    project(story.ledger, tracker, prices)
    once = rows(home / "mlflow.db")
    for _ in range(2):
        project(again(story.ledger), open_tracker("sqlite", home) or tracker, prices)
    assert rows(home / "mlflow.db") == once
    project(again(story.ledger), CrashingTracker(tracker), prices)  # type: ignore[arg-type] # nor is anything sent
    assert len(once["runs"]) == 8 and sum(once["metrics"].values()) > 1000


def test_growing_with_the_ledger_ends_like_projecting_once(tmp_path: Path, tracker: MlflowTracker, prices: PriceList, home: Path) -> None:
    grown = Writer(ledger_in(tmp_path), pipeline())
    projector = Projector(grown.ledger, tracker, prices)
    original = grown.ledger.store.create
    looks = 0

    def create(key: str, data: bytes) -> str:
        nonlocal looks
        etag = original(key, data)
        if len(key) % 2 == 0 or "outcome" in key:  # every other record, to spare time
            projector.bring(lag=0.02)
            looks += 1
        return etag

    grown.ledger.store.create = create  # type: ignore[method-assign]
    grown.three_stages()
    projector.bring()
    assert looks > 25
    other = tmp_path / "once"
    other.mkdir()
    shutil.copytree(tmp_path / "store", other / "store")
    at_once = open_tracker("sqlite", other)
    assert at_once is not None
    project(ledger_in(other), at_once, prices)
    assert comparable(home / "mlflow.db") == comparable(other / "mlflow.db")


def comparable(database: Path) -> dict[str, Any]:
    """What is shown, less the store's own place and the bookkeeping of when readings were sent."""
    picture = shown(database)
    for run in picture.values():
        for tag in ("osctl/as_of", "osctl/store", "osctl/checkpoint", "osctl/cursor"):
            run["tags"].pop(tag, None)
        run["readings"] = [(name, round(value, 9)) for name, value in run["readings"] if value]
    return picture


def test_a_lost_database_is_made_anew(story: Writer, tracker: MlflowTracker, prices: PriceList, home: Path, empty_database: Path) -> None:
    story.three_stages()
    project(story.ledger, tracker, prices)
    before, ids = shown(home / "mlflow.db"), {run.id for run in runs_of(tracker).values()}
    (home / "mlflow.db").rename(home / "lost.db")
    shutil.copy(empty_database, home / "mlflow.db")
    fresh = MlflowTracker(f"sqlite:///{home}/./mlflow.db", home / "mlartifacts")  # another address: MLflow keeps engines by address
    project(again(story.ledger), fresh, prices)
    assert shown(home / "mlflow.db") == before
    assert ids.isdisjoint(run.id for run in runs_of(fresh).values())


class Crash(Exception):
    pass


class CrashingTracker:
    """A tracker whose process dies right after its first effect: it happened, and nobody heard the answer."""

    EFFECTS = ("create", "log", "status", "delete", "dataset", "attach", "register", "alias", "unregister")

    def __init__(self, tracker: MlflowTracker):
        self._tracker, self.url = tracker, tracker.url

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._tracker, name)
        if name not in self.EFFECTS:
            return method

        def crash(*arguments: Any, **keywords: Any) -> None:
            method(*arguments, **keywords)
            raise Crash(name)

        return crash


def test_a_crash_after_every_single_call_doubles_nothing(
    story: Writer, tracker: MlflowTracker, prices: PriceList, home: Path, tmp_path: Path, empty_database: Path
) -> None:
    story.three_stages()
    crashes: Counter[str] = Counter()
    while True:
        try:
            project(again(story.ledger), CrashingTracker(tracker), prices)  # type: ignore[arg-type]
        except Crash as crash:
            crashes[str(crash)] += 1
            assert sum(crashes.values()) < 200
        else:
            break
    assert crashes["create"] == 8 and crashes["register"] == 3 and crashes["log"] == 15
    (tmp_path / "calm").mkdir()
    calm = open_tracker("sqlite", tmp_path / "calm")
    assert calm is not None
    shutil.copy(empty_database, tmp_path / "calm" / "mlflow.db")
    project(again(story.ledger), calm, prices)
    assert shown(home / "mlflow.db") == shown(tmp_path / "calm" / "mlflow.db")
    assert len(tracker.models("demo")[0]) == 3


def test_a_cursor_that_was_not_written_repeats_points_without_doubling_them(
    story: Writer, tracker: MlflowTracker, prices: PriceList, home: Path
) -> None:
    story.three_stages()
    project(story.ledger, tracker, prices)
    before = rows(home / "mlflow.db")["metrics"]
    for run in runs_of(tracker).values():
        tracker.log(run.id, tags={CURSOR: "-1"})
    project(again(story.ledger), tracker, prices)
    assert rows(home / "mlflow.db")["metrics"] == before


def test_of_twins_one_is_left(story: Writer, tracker: MlflowTracker, prices: PriceList, home: Path) -> None:
    """A create whose answer was lost and that was sent again, or two projections at once."""
    story.three_stages()
    project(story.ledger, tracker, prices)
    before = shown(home / "mlflow.db")
    for run in runs_of(tracker).values():
        made_with = {name: value for name, value in run.tags.items() if name not in (CURSOR, AS_OF)}
        tracker.create("demo", run.tags["mlflow.runName"], made_with, 1.0)
    versions, _ = tracker.models("demo")
    tracker.register("demo", "s3://bucket/twin", next(iter(runs_of(tracker).values())).id, versions[0].tags)
    for _ in range(2):
        project(again(story.ledger), tracker, prices)
    after = shown(home / "mlflow.db")
    for run in (*before.values(), *after.values()):  # the twin may be the one that stays
        run.update(start=None)
    assert after == before
    assert [version.number for version in tracker.models("demo")[0]] == [1, 2, 3]


def test_two_ledgers_of_one_name_do_not_mix(tmp_path: Path, tracker: MlflowTracker, prices: PriceList, home: Path) -> None:
    writers = []
    for place in ("mine", "yours"):
        writer = Writer(ledger_in(tmp_path / place), pipeline(), now=1.79e9 + len(writers))
        writer.three_stages()
        writers.append(writer)
        project(writer.ledger, tracker, prices)
    runs = tracker.runs("demo", {"osctl/pipeline": "demo"})
    assert Counter(run.tags[LEDGER] for run in runs) == dict.fromkeys({run.tags[LEDGER] for run in runs}, 8)
    assert len(runs) == 16 and len(tracker.models("demo")[0]) == 6
    newest = tracker.models("demo")[1]
    project(again(writers[0].ledger), tracker, prices)
    assert tracker.models("demo")[1] == newest == {"stage1": 4, "stage2": 5, "stage3": 6}


def test_a_corrected_price_is_shown_even_when_it_is_lower(story: Writer, tracker: MlflowTracker, prices: PriceList) -> None:
    story.three_stages()
    project(story.ledger, tracker, prices)
    dear = runs_of(tracker)["demo"].metrics["usd"]
    devices = prices().devices
    device = devices["h800"].model_copy(update={"usd_per_hour": devices["h800"].usd_per_hour / 2})
    project(again(story.ledger), tracker, lambda: Prices(devices=devices | {"h800": device}))
    assert runs_of(tracker)["demo"].metrics["usd"] == pytest.approx(dear / 2)


def test_a_live_bill_does_not_add_a_row_at_every_look(story: Writer, tracker: MlflowTracker, prices: PriceList, home: Path) -> None:
    projector = Projector(story.ledger, tracker, prices, story.clock)
    story.pipeline = pipeline(steps=300)
    story.launch()
    intent = story.begin("stage1")
    for step in range(10, 301, 10):
        story.train(intent, step)
        projector.bring(lag=0.5)
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
    projector = Projector(ledger, tracker, prices)
    read, asked = ledger.store.read, Counter[str]()

    def note(key: str) -> Any:
        asked.update([key] if "/journal/" in key else [])
        return read(key)

    story.launch()
    intent = story.begin("stage1")
    projector.bring()
    monkeypatch.setattr(ledger.store, "read", note)
    for step in (10, 20, 30):
        story.train(intent, step)
        story.publish(intent, step)
        asked.clear()  # the writer reads as well
        projector.bring()
        pieces = [key for key in asked if key.endswith(f"000-{step // 10:06d}.json")]
        assert pieces and set(asked.values()) == {1} and len(asked) <= 3, asked
    assert len(projector.reader.history._kept) == 4 and not any("/journal/" in key for key in ledger._known)


def test_a_deleted_experiment_comes_back(story: Writer, tracker: MlflowTracker, prices: PriceList) -> None:
    story.three_stages()
    project(story.ledger, tracker, prices)
    tracker._client.delete_experiment(tracker.experiment("demo"))
    project(again(story.ledger), tracker, prices)
    assert len(runs_of(tracker)) == 8


# --- The pure parts --------------------------------------------------------------------------------------------------------------------


def test_a_piece_that_was_refused_is_left_out_of_the_curve(story: Writer) -> None:
    """A node writes its pieces in order: where a later one is there, the missing one will never come."""
    story.launch()
    intent = story.begin("stage1")
    story.train(intent, 30)
    Path(story.ledger.store.url, story.ledger.keys.journal("stage1", intent.inputs, 1, 0, 2)).unlink()
    facts = Reader(again(story.ledger)).read()
    assert facts is not None
    pieces = facts.stages[0].attempts[0].pieces
    assert [seq for seq, _ in attempt_curve(pieces(-1))] == [0, 1, 3]
    assert [seq for seq, _ in attempt_curve(pieces(1))] == [3]


def test_a_steps_curve_waits_for_its_checkpoint(story: Writer, prices: PriceList) -> None:
    story.launch()
    intent = story.begin("stage1")
    story.train(intent, 20)
    read = lambda: Projector(again(story.ledger), MlflowTracker("sqlite:////nowhere"), prices).reader.read()  # noqa: E731
    steps = lambda cursor: [step for step, _ in stage_curve(read().stages[0].attempts, cursor)]  # noqa: E731
    assert steps(-1) == []
    story.publish(intent, 10)
    assert steps(-1) == list(range(1, 11)) and steps(7) == [8, 9, 10]


def test_only_numbers_of_steps_are_points() -> None:
    line = {"step": 3, "time": 9.5, "loss": 0.25, "note": "warm", "flag": True, "empty": None}
    assert list(points(line)) == [Point("loss", 0.25, 9.5, 3)]
    assert list(points({"phase": "init", "start": 1.0, "end": 2.0})) == []


# --- Following a launch ----------------------------------------------------------------------------------------------------------------


class Script:
    """Plays MLflow's health, look by look, and records the pauses."""

    def __init__(self, health: str, launch_ends_at_look: int):
        self.health, self.ends, self.looks, self.pauses = health, launch_ends_at_look, 0, list[float]()
        self.lags: list[float] = []

    def bring(self, lag: float) -> None:
        mark = self.health[min(self.looks, len(self.health) - 1)]
        self.looks += 1
        self.lags.append(lag)
        if mark == "-":
            raise Unreachable("MLflow http://there: no answer")

    def over(self) -> bool:
        return self.looks >= self.ends

    def follow(self) -> bool:
        return Follower(self.bring, self.over, self.pauses.append, 5.0).follow()


def test_a_dead_mlflow_is_said_once_and_its_return_once(caplog: pytest.LogCaptureFixture) -> None:
    script = Script("+---+-+", launch_ends_at_look=6)
    assert script.follow()
    assert [record.getMessage() for record in caplog.records] == [
        "MLflow http://there: no answer", "MLflow is back, and up to the ledger", "MLflow http://there: no answer",
        "MLflow is back, and up to the ledger",
    ]  # fmt: skip
    assert script.pauses == [5.0, 1.0, 2.0, 4.0, 5.0, 1.0]


def test_the_last_look_is_whole_and_comes_after_the_end() -> None:
    script = Script("+", launch_ends_at_look=3)
    assert script.follow() and script.looks == 4
    assert script.lags == [Follower.LAG] * 3 + [0.0]


def test_a_mlflow_that_stays_dead_is_left_to_sync() -> None:
    script = Script("-", launch_ends_at_look=9)
    assert not script.follow()
    assert script.looks == 9 + Follower.LAST_TRIES
    assert max(script.pauses) <= Follower.BACKOFF_S and script.pauses[-2:] == [1.0, 2.0]


@pytest.mark.parametrize("waited_for", [False, True])
def test_the_follower_of_a_killed_launch_stays_until_silence_has_told_its_end(
    story: Writer, tracker: MlflowTracker, prices: Prices, waited_for: bool
) -> None:
    """A launcher that waits for it is not kept."""
    heard = killed_while_training(story)
    story.now = heard + TTL_S + 1
    projector = Projector(story.ledger, tracker, prices, story.clock)

    def rest(seconds: float) -> None:
        story.now += seconds

    assert Follower(projector.bring, lambda: True, rest, 5.0, lambda: waited_for).follow()
    assert {status for status, _ in statuses(tracker).values()} == {"RUNNING" if waited_for else "KILLED"}
    assert story.now < heard + SILENT_S + 6


def test_a_launch_is_over_when_its_process_is_gone(story: Writer) -> None:
    process = subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE)
    launch = Launch(process.pid, list)
    assert not launch.over()
    assert process.stdin is not None
    process.stdin.close()
    while not launch.over():  # a zombie is gone, whether its parent has noticed or not
        time.sleep(0.01)
    process.wait()
    assert launch.over() and Launch(process.pid, list).over()


def test_a_launch_is_over_when_it_says_so_in_the_ledger(story: Writer) -> None:
    story.launch()
    story.end()  # an earlier launch, long before this process was started
    launch = Launch(os.getpid(), lambda: list(story.ledger.events()))
    assert not launch.over()
    story.now = time.time()
    story.launch()
    assert not launch.over()
    story.end()
    assert launch.over()


# --- As a process ----------------------------------------------------------------------------------------------------------------------


def projection(home: Path, tracking: str, *more: str) -> subprocess.Popen[str]:
    command = [
        sys.executable,
        "-m",
        "orchestrator.projection",
        "--store",
        str(home / "store"),
        "--pipeline",
        "demo",
        "--tracking",
        tracking,
    ]
    return subprocess.Popen(
        [*command, *more], env={**os.environ, "OSCTL_HOME": str(home)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=home
    )


def test_the_process_projects_into_osctl_home_and_is_quiet(story: Writer, home: Path) -> None:
    story.three_stages()
    process = projection(home, "sqlite")
    out, err = process.communicate(timeout=120)
    assert (process.returncode, out, err) == (0, "", "")
    assert len(shown(home / "mlflow.db")) == 8
    assert not (home / "mlruns").exists()


def test_a_dead_server_is_noticed_and_named_in_one_line(story: Writer, home: Path) -> None:
    story.three_stages()
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))  # bound and never listening: connections are refused
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        process = projection(home, address)
        _, err = process.communicate(timeout=120)
    assert process.returncode == 5
    lines = err.strip().splitlines()
    assert len(lines) == 1 and address in lines[0] and "osctl sync" in lines[0], err


def test_what_would_become_mlruns_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="neither sqlite, none nor a URI"):
        tracking_url("./mlruns", tmp_path)
    assert open_tracker("none", tmp_path) is None


def test_the_follower_outlives_its_launch_just_long_enough(story: Writer, home: Path) -> None:
    """The launcher is killed while stage 1 trains; what it left is shown, and that it is over."""
    story.launch()
    launcher = subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE)
    follower = projection(home, "sqlite", "--follow-pid", str(launcher.pid), "--interval", "0.2")
    intent = story.begin("stage1")
    wait_for(lambda: len(shown(home / "mlflow.db")) == 3, follower)
    story.train(intent, 20)
    launcher.kill()
    launcher.wait()
    assert launcher.stdin is not None
    launcher.stdin.close()
    out, err = follower.communicate(timeout=60)
    assert (follower.returncode, out, err) == (0, "", "")
    picture = {short(key): run for key, run in shown(home / "mlflow.db").items()}
    assert max(step for _, step, _, _ in picture["stage1/a1"]["curve"]) == 20
    assert {run["status"] for run in picture.values()} == {"KILLED"}


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str], timeout_s: float = 120.0) -> None:
    end = time.monotonic() + timeout_s
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.05)


def test_a_stage_is_shown_with_the_data_set_that_it_was_trained_on(story: Writer, tracker: MlflowTracker, home: Path) -> None:
    digest = "5" * 64
    first, *others = story.pipeline.stages
    first = first.model_copy(update={"contents": Contents(data=digest)})
    story.pipeline = story.pipeline.model_copy(update={"stages": (first, *others)})
    story.launch()
    story.finish(story.begin("stage1"))
    story.finish(story.begin("stage2"))
    project(story.ledger, tracker)
    shown = {short(key): run.datasets for key, run in runs_of(tracker).items()}
    assert shown["stage1"] == ((first.config.data.source.kind, digest[:32]),)
    assert shown["stage2"] != shown["stage1"], "a stage whose data was not recorded is told by its configuration"
