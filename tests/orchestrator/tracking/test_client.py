"""MLflow's client: what it refuses and what it says."""

from __future__ import annotations

from pathlib import Path

import pytest
from shown_runs import PriceList, again, runs_of
from written_ledger import Writer

from orchestrator.errors import Unreachable, UsageError
from orchestrator.tracking.client import MlflowTracker, open_tracker, tracking_url
from orchestrator.tracking.sync import Sync


def test_a_file_that_is_no_database_is_said_with_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "mlflow.db").write_text("hello\n")
    tracker = open_tracker("sqlite", tmp_path)
    assert tracker is not None
    with pytest.raises(Unreachable, match=r"mlflow\.db: .*file is not a database\. Move it away; `osctl sync` makes it anew"):
        tracker.runs("demo", {})


def test_what_would_become_mlruns_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="neither sqlite, none nor a URI"):
        tracking_url("./mlruns", tmp_path)
    assert open_tracker("none", tmp_path) is None


@pytest.mark.long
def test_a_deleted_experiment_comes_back(story: Writer, tracker: MlflowTracker, prices: PriceList) -> None:
    story.three_stages()
    Sync(story.ledger, tracker, prices).update()
    tracker._client.delete_experiment(tracker.experiment("demo"))
    Sync(again(story.ledger), tracker, prices).update()
    assert len(runs_of(tracker)) == 8
