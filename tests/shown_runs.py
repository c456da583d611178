"""What MLflow shows of a ledger that tests/written_ledger.py has written: runs by our key, and rows of its database."""

from __future__ import annotations

import sqlite3
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from written_ledger import Writer

from orchestrator.labels import Tag
from orchestrator.ledger.store import Ledger
from orchestrator.ports import TrackedRun
from orchestrator.recipe.prices import Prices
from orchestrator.stores import open_store
from orchestrator.tracking.client import MlflowTracker

PriceList = Callable[[], Prices]

TABLES = (
    "experiments", "runs", "metrics", "latest_metrics", "params", "tags", "datasets", "inputs", "input_tags", "registered_models",
    "model_versions", "model_version_tags", "registered_model_aliases",
)  # fmt: skip


def ledger_in(folder: Path, name: str = "demo") -> Ledger:
    return Ledger(open_store(str(folder / "store")), name)


def again(ledger: Ledger) -> Ledger:
    """The same ledger to a process that has just started."""
    return Ledger(ledger.store, ledger.pipeline)


def runs_of(tracker: MlflowTracker, experiment: str = "demo") -> dict[str, TrackedRun]:
    return {run.tags[Tag.RUN_KEY]: run for run in tracker.runs(experiment, {Tag.PIPELINE: "demo"})}


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
        keys[run] = tags[Tag.RUN_KEY]
        metrics = connection.execute("select key, step, timestamp, value from metrics where run_uuid = ? and step > 0", (run,)).fetchall()
        readings = connection.execute("select key, value from latest_metrics where run_uuid = ? and step = 0", (run,)).fetchall()
        params = connection.execute("select key, value from params where run_uuid = ?", (run,)).fetchall()
        datasets = connection.execute(
            "select d.name, d.digest from inputs i join datasets d on i.source_id = d.dataset_uuid where i.destination_id = ?", (run,)
        ).fetchall()
        assert tags[Tag.RUN_KEY] not in found, "a run stands there twice"
        found[tags[Tag.RUN_KEY]] = {
            "name": name, "status": status, "start": start, "end": end, "tags": tags,
            "curve": sorted(metrics), "readings": sorted(readings),
            "params": sorted(params), "datasets": sorted(datasets),
        }  # fmt: skip
    for run in found.values():
        if Tag.LOGGED_MODEL in run["tags"]:
            run["tags"][Tag.LOGGED_MODEL] = "an id"
        run["tags"][Tag.PARENT_RUN] = keys.get(run["tags"].get(Tag.PARENT_RUN, ""))
    connection.close()
    return found


def statuses(tracker: MlflowTracker) -> dict[str, tuple[str, float | None]]:
    return {short(key): (run.status, run.ended) for key, run in runs_of(tracker).items()}


def killed_while_training(story: Writer) -> float:
    """A launcher and its agent are killed. Returns when the agent was last heard."""
    story.launch()
    story.train(story.begin("stage1"), 20)
    return story.now
