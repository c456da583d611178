"""What each run and each model version shows: names, tags, parameters, readings."""

from __future__ import annotations

import getpass
import sqlite3
from dataclasses import replace
from decimal import Decimal
from pathlib import Path

import pytest
from shown_runs import PriceList, again, ledger_in, runs_of, short, shown
from written_ledger import Writer, pipeline

from opensora.identity import Contents
from orchestrator.accounting.cost import account
from orchestrator.labels import Tag
from orchestrator.ledger.records import ClipsUsed, Evaluation, LeftOut, Price
from orchestrator.tracking import descriptions
from orchestrator.tracking.client import MlflowTracker
from orchestrator.tracking.sync import Sync


@pytest.mark.long
def test_pipeline_stages_and_attempts_form_a_tree(story: Writer, tracker: MlflowTracker, prices: PriceList, home: Path) -> None:
    story.three_stages()
    Sync(story.ledger, tracker, prices).update()
    runs = {short(key): run for key, run in shown(home / "mlflow.db").items()}
    parents = {name: short(run["tags"][Tag.PARENT_RUN] or "-") for name, run in runs.items()}
    assert parents == {
        "demo": "-", "stage1": "demo", "stage2": "demo", "stage3": "demo",
        "stage1/a1": "stage1", "stage2/a1": "stage2", "stage2/a2": "stage2", "stage3/a1": "stage3",
    }  # fmt: skip
    assert {name: run["status"] for name, run in runs.items() if run["status"] != "FINISHED"} == {"stage2/a1": "KILLED"}
    assert {name: run["name"] for name, run in runs.items()}["stage2/a1"] == "stage2 a1"


def test_a_stage_carries_its_configuration_lineage_and_bill(story: Writer, tracker: MlflowTracker, prices: PriceList) -> None:
    story.three_stages()
    facts = Sync(story.ledger, tracker, prices).update()
    assert facts is not None
    stage2 = story.results["stage2"]
    run = next(run for key, run in runs_of(tracker).items() if short(key) == "stage2")
    assert run.params["data.frames"] == "8" and run.params["objective.kind"] == "flow" and run.params["devices"] == "8"
    assert run.tags[Tag.WEIGHTS_DIGEST] == stage2.weights_digest and run.tags[Tag.MANIFEST_DIGEST] == stage2.manifest_digest
    assert run.tags[Tag.PARENT_MANIFEST] == story.results["stage1"].manifest_digest
    assert run.metrics["evaluation/digit_accuracy"] == stage2.evaluation["digit_accuracy"]
    bill = account([attempt.time for attempt in facts.stages[1].attempts])
    assert Decimal(repr(run.metrics["usd"])) == bill.usd > 0
    assert run.metrics["gpu_hours"] == pytest.approx(bill.gpu_hours)
    assert run.metrics["ratio_vs_reference"] == pytest.approx(bill.gpu_hours / 0.5)
    assert run.metrics["usd_reference"] == 1.5
    # Ten steps on eight devices stand before the kill without a checkpoint after step 10 of 15: five were lost.
    assert run.metrics["seconds/lost"] == pytest.approx(5 * 8 * 0.9 * story.pace(story.pipeline.stage("stage2").config))
    whole = runs_of(tracker)["demo"].metrics
    stages = [run.metrics for run in runs_of(tracker).values() if run.tags[Tag.KIND] == "stage"]
    for reading in ("usd", "gpu_hours", "seconds/step", "usd_reference"):
        assert whole[reading] == pytest.approx(sum(metrics[reading] for metrics in stages)), reading


def test_an_evaluation_beside_the_training_reaches_the_run_the_model_and_the_bill(
    story: Writer, tracker: MlflowTracker, prices: PriceList, home: Path, tmp_path: Path
) -> None:
    story.three_stages()
    sync = Sync(story.ledger, tracker, prices)
    sync.update()
    before = next(run for key, run in runs_of(tracker).items() if short(key) == "stage2")
    result = story.results["stage2"]
    (tmp_path / "late.png").write_bytes(b"a sheet")
    record = Evaluation(
        stage="stage2", inputs_digest=result.inputs_digest, question="0123456789ab", asked={}, step=result.step,
        manifest_digest=result.manifest_digest, weights_digest=result.weights_digest,
        readings={"held_out_loss": 0.5, "digit_accuracy": 0.75}, samples=("late.png",), device="h800", device_s=3600.0,
        price=Price(usd_per_hour=Decimal(2), is_gpu=True, basis="assumption", source="here", date="2026-01-01"),
        started=result.time + 10, ended=result.time + 20, code="x",
    )  # fmt: skip
    story.ledger.write_evaluation(record, tmp_path)
    assert sync.update() is not None
    run = next(run for key, run in runs_of(tracker).items() if short(key) == "stage2")
    assert run.metrics["evaluation/held_out_loss"] == 0.5 and run.metrics["evaluation/digit_accuracy"] == 0.75
    assert run.metrics["usd"] == pytest.approx(before.metrics["usd"] + 2)
    assert run.metrics["gpu_hours"] == pytest.approx(before.metrics["gpu_hours"] + 1)
    assert "late.png" in tracker.artifacts(run.id, "samples")
    with sqlite3.connect(home / "mlflow.db") as database:
        query = "select metric_value from logged_model_metrics where metric_name = 'evaluation/held_out_loss'"
        assert database.execute(query).fetchall() == [(0.5,)]
    sync.update()
    with sqlite3.connect(home / "mlflow.db") as database:
        assert database.execute(query).fetchall() == [(0.5,)], "said once"


def test_a_cpu_has_no_gpu_hours_and_no_ratio(tmp_path: Path, tracker: MlflowTracker, prices: PriceList) -> None:
    story = Writer(ledger_in(tmp_path), pipeline(device="cpu-core", devices=2))
    story.three_stages()
    Sync(story.ledger, tracker, prices).update()
    for run in runs_of(tracker).values():
        assert run.metrics["gpu_hours"] == 0 < run.metrics["device_hours"]
        assert "ratio_vs_reference" not in run.metrics


def test_each_committed_stage_is_a_model_version_under_its_name(story: Writer, tracker: MlflowTracker, prices: PriceList) -> None:
    story.three_stages()
    for _ in range(2):
        Sync(again(story.ledger), tracker, prices).update()
    versions, aliases = tracker.models("demo")
    assert aliases == {"stage1": 1, "stage2": 2, "stage3": 3}
    assert [version.tags[Tag.WEIGHTS_DIGEST] for version in versions] == [
        story.results[name].weights_digest for name in ("stage1", "stage2", "stage3")
    ]
    source = tracker._client.get_model_version("demo", "3").source
    place = story.results["stage3"].manifest.removesuffix("/MANIFEST.json")
    assert source == f"osctl://folder/{place}?store={story.ledger.store.url}"


def test_what_of_its_data_a_stage_does_not_use_is_a_tag_and_readings(story: Writer, tracker: MlflowTracker, prices: PriceList) -> None:
    story.launch()
    intent = story.begin("stage1")
    story.train(intent, 10)
    reasons = (LeftOut(reason="No such file\x1b[31m" + "x" * 600, clips=3, first=("a.mp4",)),)
    story.ledger.write_clips(intent, ClipsUsed(clips=20, used=17, left_out=reasons, captions_cut=12, caption_tokens=6), b"path,reason\n")
    Sync(story.ledger, tracker, prices).update()
    run = next(run for key, run in runs_of(tracker).items() if short(key) == "stage1")
    assert run.tags[Tag.NOT_USED].startswith("3 of 20 clips are left out: 3 (a.mp4, …): No such file")
    assert len(run.tags[Tag.NOT_USED]) == 500 and run.tags[Tag.NOT_USED].isprintable()
    assert {name: run.metrics[name] for name in run.metrics if name.startswith("data/")} == {
        "data/clips": 20,
        "data/clips_left_out": 3,
        "data/captions_cut": 12,
    }


def test_a_stage_is_shown_with_the_data_set_that_it_was_trained_on(story: Writer, tracker: MlflowTracker, home: Path) -> None:
    digest = "5" * 64
    first, *others = story.pipeline.stages
    first = first.model_copy(update={"contents": Contents(data=digest)})
    story.pipeline = story.pipeline.model_copy(update={"stages": (first, *others)})
    story.launch()
    story.finish(story.begin("stage1"))
    story.finish(story.begin("stage2"))
    Sync(story.ledger, tracker).update()
    shown = {short(key): run.datasets for key, run in runs_of(tracker).items()}
    assert shown["stage1"] == ((first.config.data.source.kind, digest[:32]),)
    assert shown["stage2"] != shown["stage1"], "a stage whose data was not recorded is told by its configuration"


def test_a_run_says_who_made_it_from_what_and_what_it_is(story: Writer, tracker: MlflowTracker, prices: PriceList) -> None:
    story.three_stages()
    Sync(story.ledger, tracker, prices).update()
    runs = {short(key): run for key, run in runs_of(tracker).items()}
    assert {run.tags[Tag.USER] for run in runs.values()} == {getpass.getuser()}
    assert {run.tags[Tag.SOURCE_NAME] for run in runs.values()} == {"osctl launch -f demo"}
    rows = [line.split(" | ") for line in runs["demo"].tags[Tag.NOTE].splitlines() if line.startswith("| stage")]
    assert [row[0] for row in rows] == ["| stage", "| stage1", "| stage2", "| stage3"]
    for row in rows[1:]:
        stage = runs[row[0].removeprefix("| ")]
        assert row[1] == "committed" and float(row[5]) == pytest.approx(stage.metrics["usd"], abs=0.005), "the dollars of its own run"
    told = runs["stage2"].tags[Tag.NOTE]
    assert "trained from **stage1**" in told and story.results["stage2"].manifest.rpartition("/")[0] in told
    assert "2 attempts; those that did not come to the end:\n- attempt 1: " in told


def test_a_live_bill_changes_no_description(story: Writer, tracker: MlflowTracker, prices: PriceList) -> None:
    """MLflow keeps each value of a tag; what is told is told when a record says it."""
    story.three_stages()
    facts = Sync(story.ledger, tracker, prices).update()
    assert facts is not None
    stage = facts.stages[0]
    [attempt] = stage.attempts
    assert attempt.time.ended is not None
    later = replace(attempt.time, ended=attempt.time.ended + 1000)
    alive = [replace(stage, committed=None, attempts=(replace(attempt, outcome=None, time=time),)) for time in (attempt.time, later)]
    assert account([attempt.time]).usd < account([later]).usd
    told = {descriptions.of_pipeline(replace(facts, stages=(one,))) + descriptions.of_stage(facts, one) for one in alive}
    assert len(told) == 1 and "not committed" in told.pop()


def test_each_committed_checkpoint_is_a_model_of_its_run_with_its_readings_and_data(
    story: Writer, tracker: MlflowTracker, prices: PriceList
) -> None:
    story.three_stages()
    for _ in range(2):
        facts = Sync(again(story.ledger), tracker, prices).update()
    assert facts is not None
    models = tracker._client.search_logged_models([tracker.experiment(facts.pipeline.experiment)])
    runs = {short(key): run for key, run in runs_of(tracker).items()}
    assert len(models) == 3 and {str(model.status) for model in models} == {"READY"}
    for model in models:
        stage = model.tags[Tag.STAGE]
        result, run = story.results[stage], runs[stage]
        assert (model.source_run_id, model.name, run.tags[Tag.LOGGED_MODEL]) == (run.id, f"{stage}-step-{result.step}", model.model_id)
        assert {metric.key: metric.value for metric in model.metrics} == {
            f"evaluation/{name}": value for name, value in result.evaluation.items()
        }
        assert {(metric.dataset_name, metric.dataset_digest) for metric in model.metrics} == set(run.datasets)
        [output] = tracker._client.get_run(run.id).outputs.model_outputs
        assert (output.model_id, output.step) == (model.model_id, result.step)
