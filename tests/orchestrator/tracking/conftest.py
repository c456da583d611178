from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from shown_runs import PriceList, ledger_in
from written_ledger import Writer, pipeline

from orchestrator.recipe.prices import load_prices
from orchestrator.tracking.client import MlflowTracker, open_tracker


@pytest.fixture(scope="session")
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
