"""An agent brings in what its attempt is made of, verified, or says which file is not what was recorded."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
from live_attempts import Attempts, stage_config

from opensora.config import StageConfig
from opensora.data.manifest import DataManifest, Row
from opensora.identity import Contents
from orchestrator import datasets, imports
from orchestrator.records import FileRef, Intent, Terms


@pytest.fixture
def attempts(tmp_path: Path) -> Attempts:
    return Attempts(tmp_path)


DATA = DataManifest((Row("a.mp4", "one", 1, hashlib.sha256(b"a").hexdigest()),))


def recorded(attempts: Attempts, contents: Contents, config: StageConfig | None = None) -> Intent:
    intent = attempts.intend(config=config)
    attempts.ledger.write_terms(intent.stage, intent.inputs, intent.attempt, Terms(identity=2, contents=contents, price=None))
    return intent


def brought_in(attempts: Attempts, path: Path) -> str:
    """The digest of an import of one file."""
    data = path.read_bytes()
    one = imports.Import(files={path.name: FileRef(size=len(data), sha256=hashlib.sha256(data).hexdigest())})
    return imports.put(attempts.store, one, {path.name: path})


def test_a_trainer_finds_the_manifest_of_its_data(attempts: Attempts) -> None:
    datasets.put_manifest(attempts.store, DATA)
    intent = recorded(attempts, Contents(data=DATA.digest))
    _, report = attempts.live(intent)
    assert report.class_ == "completed"
    assert DataManifest.decode((attempts.run_dir(intent) / "data.jsonl.gz").read_bytes()) == DATA


def test_a_driver_of_before_recorded_nothing_and_nothing_is_brought_in(attempts: Attempts) -> None:
    intent = attempts.intend()
    _, report = attempts.live(intent)
    assert report.class_ == "completed" and not (attempts.run_dir(intent) / "data.jsonl.gz").exists()


def test_imports_are_staged_in_and_named_to_the_trainer(attempts: Attempts, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    digest = brought_in(attempts, tmp_path / "model.safetensors")
    config = stage_config().model_copy(update={"weights": "pixart"})
    intent = recorded(attempts, Contents(weights=digest), config)
    _, report = attempts.live(intent)
    run = attempts.run_dir(intent)
    place = Path(json.loads((run / "imports.json").read_text())["places"]["pixart"])
    assert report.class_ == "completed" and place == run / "imports" / digest
    assert (place / "model.safetensors").read_bytes() == b"weights"
    assert "pixart" in (run / "stage.yaml").read_text(), "the stage is as it was launched, wherever its imports lie"


def test_a_damaged_import_is_refused_before_the_trainer_starts(attempts: Attempts, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    digest = brought_in(attempts, tmp_path / "model.safetensors")
    (attempts.store.root / f"weights/{digest}/files/model.safetensors").write_bytes(b"Weights")
    config = stage_config().model_copy(update={"weights": "pixart"})
    intent = recorded(attempts, Contents(weights=digest), config)
    _, report = attempts.live(intent)
    assert report.class_ == "parent" and "model.safetensors" in report.reason and "sha256" in report.reason
    assert not (attempts.run_dir(intent) / "metrics.jsonl").exists()
