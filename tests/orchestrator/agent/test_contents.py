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
from live_attempts import Attempts, stage_config, until

from opensora.config import FolderSource, StageConfig
from opensora.dataset.manifest import DataManifest, Row
from opensora.identity import Contents
from orchestrator.agent.contents import with_places
from orchestrator.inputs import datasets, imports
from orchestrator.ledger.records import FileRef, Intent


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


@pytest.mark.long
@pytest.mark.s3
def test_a_trainer_reads_clips_of_the_bucket_that_the_agent_knows(s3: Any, tmp_path: Path) -> None:
    """At an endpoint of its own; only the ledger's client knew that name for it."""
    from orchestrator.stores.s3 import S3Store

    store = S3Store(s3.url("trained-on"), env=s3.env)
    store.create("captions.csv", b"path,text\na.mp4,one\n")
    store.create("a.mp4", b"a")
    (tmp_path / "data.jsonl.gz").write_bytes(DATA.encode())
    code = (
        "import sys; from pathlib import Path; from opensora.config import DataConfig; from opensora.data.folder import FileClips; "
        "from opensora.training.run_directory import recorded_data; "
        "source = {'kind': 'folder', 'path': sys.argv[1]}; "
        "data = DataConfig.model_validate({'source': source, 'frames': 1, 'height': 8, 'width': 8}); "
        "print(FileClips(data, recorded_data(Path(sys.argv[2]))).captions)"
    )
    own = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
    env = with_places({**own, **s3.env}, tmp_path)
    words = [sys.executable, "-c", code, s3.url("trained-on"), str(tmp_path / "data.jsonl.gz")]
    done = subprocess.run(words, env=env, capture_output=True, text=True)
    assert done.stdout.strip() == "['one']", done.stderr


GONE = hashlib.sha256(b"a film").hexdigest()


def on_a_version(attempts: Attempts, *sources: str) -> StageConfig:
    """A stage on a prepared data set `mine`, whose version has these sources; without any its version is deleted."""
    folder = "datasets/mine/prepared/0123"
    if sources:
        about = {"sources": [{"name": "a.mp4", "sha256": one} for one in sources]}
        attempts.store.create(f"{folder}/DATASET.json", json.dumps(about).encode())
    data = stage_config().data.model_copy(update={"source": FolderSource(kind="folder", path=f"{attempts.store.url}/{folder}")})
    return stage_config().model_copy(update={"data": data})


ANEW = "osctl resume demo --stage stage1 --anew stage1 --set stage1.data.source.path="


def take_out(attempts: Attempts, *, done: bool = True) -> None:
    """`done`: the name means the version without it already."""
    place = f"{attempts.store.url}/datasets/mine/prepared/{'4567' if done else '0123'}"
    datasets.register(attempts.store, "mine", place, DATA, now=1.0, holder="me@here", prepared="4567")
    attempts.store.create(f"datasets/mine/removed/{GONE}.json", b"{}")


@pytest.mark.parametrize("sources", [(), (GONE, "1" * 64)], ids=["deleted", "about to be deleted"])
def test_a_version_from_which_a_source_was_taken_out_is_not_trained_on(attempts: Attempts, sources: tuple[str, ...]) -> None:
    take_out(attempts)
    _, report = attempts.live(attempts.intend(config=on_a_version(attempts, *sources)))
    assert report.class_ == "config" and report.step is None
    assert GONE[:12] in report.reason and report.reason.endswith(f"{ANEW}{attempts.store.url}/datasets/mine/prepared/4567")


def test_where_a_removal_was_not_finished_that_comes_first(attempts: Attempts) -> None:
    take_out(attempts, done=False)
    _, report = attempts.live(attempts.intend(config=on_a_version(attempts, GONE, "1" * 64)))
    assert report.class_ == "config" and report.reason.endswith(f"osctl data remove {GONE[:12]} --from mine")


def test_a_version_that_never_had_what_was_taken_out_is_trained_on(attempts: Attempts) -> None:
    take_out(attempts)
    _, report = attempts.live(attempts.intend(config=on_a_version(attempts, "1" * 64)))
    assert report.class_ == "completed" and report.warnings == ()


def test_a_training_from_whose_data_a_source_is_taken_out_is_told_so_with_its_result(attempts: Attempts) -> None:
    config = on_a_version(attempts, GONE, "1" * 64).model_copy(update={"steps": 1_000_000})
    intent = attempts.intend(config=config)
    attempts.submit(intent)
    until(lambda: attempts.published(intent), "a checkpoint is published")
    take_out(attempts)
    attempts.backend.drain(intent.run_key)
    attempts.end(intent)
    report = attempts.report(intent)
    assert report is not None and report.class_ == "drained"
    assert any(ANEW in text for text in report.warnings)


FAILS = """
import json, pathlib, sys, time
run, go = map(pathlib.Path, sys.argv[1:])
(run / "waits").touch()
while not go.exists():
    time.sleep(0.01)
result = {"schema": 1, "status": "failed", "class": "data", "reason": "a clip is not there", "step": None, "time": time.time()}
(run / "result.json").write_text(json.dumps(result))
"""


def test_a_training_that_misses_the_clips_of_a_source_that_was_taken_out_says_why(attempts: Attempts, tmp_path: Path) -> None:
    trainer = (sys.executable, "-c", FAILS, "{run_dir}", str(tmp_path / "go"))
    intent = attempts.intend(config=on_a_version(attempts, GONE, "1" * 64), trainer=trainer)
    attempts.submit(intent)
    until((attempts.run_dir(intent) / "waits").exists, "the trainer waits")
    take_out(attempts)
    (tmp_path / "go").touch()
    attempts.end(intent)
    report = attempts.report(intent)
    assert report is not None and report.class_ == "config"
    assert ANEW in report.reason and "a clip is not there" in report.reason
