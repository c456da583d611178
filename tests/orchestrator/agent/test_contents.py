"""An agent brings in what its attempt is made of, verified, or says which file is not what was recorded."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from live_attempts import Attempts, stage_config

from opensora.config import StageConfig
from opensora.data.manifest import DataManifest, Row
from opensora.identity import Contents
from orchestrator import datasets, imports
from orchestrator.agent.contents import with_places
from orchestrator.records import FileRef, Intent


@pytest.fixture
def attempts(tmp_path: Path) -> Attempts:
    return Attempts(tmp_path)


DATA = DataManifest((Row("a.mp4", "one", 1, hashlib.sha256(b"a").hexdigest()),))


def recorded(attempts: Attempts, contents: Contents, config: StageConfig | None = None) -> Intent:
    return attempts.intend(config=config, contents=contents)


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


@pytest.mark.s3
def test_a_trainer_reads_clips_of_the_bucket_that_the_agent_knows(s3: Any, tmp_path: Path) -> None:
    """At an endpoint of its own; only the ledger's client knew that name for it."""
    from orchestrator.adapters.s3 import S3Store

    store = S3Store(s3.url("trained-on"), env=s3.env)
    store.create("captions.csv", b"path,text\na.mp4,one\n")
    store.create("a.mp4", b"a")
    (tmp_path / "data.jsonl.gz").write_bytes(DATA.encode())
    code = (
        "import sys; from pathlib import Path; from opensora.config import DataConfig; from opensora.data.folder import FileClips; "
        "from opensora.run_directory import recorded_data; "
        "source = {'kind': 'folder', 'path': sys.argv[1]}; "
        "data = DataConfig.model_validate({'source': source, 'frames': 1, 'height': 8, 'width': 8}); "
        "print(FileClips(data, recorded_data(Path(sys.argv[2]))).captions)"
    )
    own = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
    env = with_places({**own, **s3.env}, tmp_path)
    words = [sys.executable, "-c", code, s3.url("trained-on"), str(tmp_path / "data.jsonl.gz")]
    done = subprocess.run(words, env=env, capture_output=True, text=True)
    assert done.stdout.strip() == "['one']", done.stderr
