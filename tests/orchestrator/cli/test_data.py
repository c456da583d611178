"""`osctl data`, and what a launch writes down of a person's own clips."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import film_clips
import pytest
from live_attempts import STAND_IN
from tiny_recipe import Osctl, write

from opensora.data.manifest import DataManifest


@pytest.fixture
def clips(tmp_path: Path) -> Path:
    return film_clips.make(tmp_path / "clips")


@pytest.fixture
def osctl(tmp_path: Path) -> Osctl:
    trainer = [sys.executable, STAND_IN, "{run_dir}", "{devices}"]
    return Osctl(write(tmp_path / "recipe", devices=1, stages=2, trainer=trainer))


def test_a_folder_that_moved_is_not_trained_anew(osctl: Osctl, clips: Path, tmp_path: Path) -> None:
    osctl("launch", "--data", str(clips), "--quiet")
    before = osctl.digests()
    shutil.copytree(clips, tmp_path / "moved", copy_function=shutil.copyfile)
    osctl("launch", "--data", str(tmp_path / "moved"), "--quiet")
    assert len(list((osctl.folder / ".osctl/store/tiny/stages").glob("stage*@*/attempts/*"))) == 2 and osctl.digests() == before


def test_a_run_directory_says_what_the_data_is(osctl: Osctl, clips: Path) -> None:
    osctl("launch", "--data", str(clips), "--quiet")
    runs = list((osctl.folder / ".osctl/runs").iterdir())
    manifests = [DataManifest.decode((run / "data.jsonl.gz").read_bytes()) for run in runs]
    assert len(runs) == 2 and [row.text for row in manifests[0].rows] == list(film_clips.CAPTIONS.values())
    link = osctl.json("lineage")[0]
    assert link["data_digest"] == manifests[0].digest and link["data"] == manifests[0].digest[:12]
    osctl("data", "register", "squares", str(clips))
    assert osctl.json("lineage", "--verify")[0]["data"] == f"{manifests[0].digest[:12]} squares"


def test_a_synthetic_data_set_is_named_by_what_makes_it(osctl: Osctl) -> None:
    osctl("launch", "stage1", "--quiet")
    assert osctl.json("lineage")[0]["data"] == "digits, made by the trainer"


def test_data_is_registered_listed_and_shown(osctl: Osctl, clips: Path) -> None:
    first = osctl.json("data", "register", "squares", str(clips))
    assert (first["rows"], first["unreadable"], first["by"]) == (3, 0, "content")
    assert osctl.json("data", "register", "squares", str(clips)) == first
    assert osctl.json("data", "list") == [first]
    assert [row["name"] for row in osctl.json("data", "show", "squares")] == list(film_clips.CAPTIONS)
    film_clips.captions(clips, film_clips.CAPTIONS | {"one.mp4": "another"})
    osctl("data", "register", "squares", str(clips))
    differs = osctl.json("data", "show", first["digest"][:10], "squares")
    assert differs == [{"name": "one.mp4", "change": "caption", "old": "a grey square", "new": "another"}]
    assert osctl("list").stdout.strip() == "" or "datasets" not in osctl("list").stdout


def test_data_that_is_not_here_is_refused_with_what_to_do(osctl: Osctl, tmp_path: Path) -> None:
    assert "Correct the path" in osctl("data", "register", "x", str(tmp_path / "none"), expect=4).stderr
    assert "lower-case" in osctl("data", "register", "X", str(tmp_path), expect=2).stderr
    assert "registered are: none" in osctl("data", "show", "x", expect=4).stderr
    assert "osctl data register" in osctl("data", "list").stderr


@pytest.fixture
def changed(osctl: Osctl, clips: Path) -> Osctl:
    """Trained; then a caption was changed and a clip added."""
    osctl("launch", "--data", str(clips), "--quiet")
    film_clips.film(clips / "four.mp4", 200)
    film_clips.captions(clips, film_clips.CAPTIONS | {"one.mp4": "another", "four.mp4": "a white square"})
    return osctl


def test_changed_data_is_refused_with_the_rows_and_the_two_commands(changed: Osctl, clips: Path) -> None:
    refused = changed("launch", "--data", str(clips), "--quiet", expect=4).stderr
    assert "2 rows differ: one.mp4: caption was 'a grey square', is 'another'; four.mp4: added" in refused
    assert "--keep stage1" in refused and "--anew stage1" in refused
    assert "one.mp4: caption was" in changed("launch", "--data", str(clips), "--dry-run").stderr
    fields = {row["field"] for row in changed.json("diff", "stage1", "--data", str(clips))}
    assert {"data", "data row one.mp4", "data row four.mp4"} <= fields


def test_changed_data_is_kept_or_trained_anew_as_a_person_decides(changed: Osctl, clips: Path) -> None:
    before = changed.digests()
    data = ("--data", str(clips), "--quiet")
    changed("launch", "stage1", *data, "--keep", "stage1")
    assert changed.digests()["stage1"] == before["stage1"]
    changed("launch", *data, "--keep", "stage2")
    stages = changed.folder / ".osctl/store/tiny/stages"
    assert len(list(stages.glob("*@*"))) == 2
    film_clips.captions(clips, film_clips.CAPTIONS)
    changed("launch", "stage1", *data)
    film_clips.captions(clips, film_clips.CAPTIONS | {"one.mp4": "a third one"})
    changed("launch", "stage1", *data, "--anew", "stage1")
    assert len(list(stages.glob("stage1@*"))) == 2


@pytest.mark.long
def test_clips_that_change_between_two_attempts_are_said_and_not_tried_again(tmp_path: Path, clips: Path) -> None:
    """By the real trainer: what a launch recorded is what every attempt of it trains on."""
    source = {"source": {"kind": "folder", "path": str(clips)}, "frames": 1, "height": 16, "width": 16}
    changes = {"steps": 4, "batch_size": 1, "data": source, "prompts": ["a grey square"], "checkpoint": {"every_steps": 2}}
    osctl = Osctl(write(tmp_path / "real", devices=1, stages=1, changes=changes))
    osctl("launch", "--quiet")
    film_clips.film(clips / "one.mp4", 60, frames=30)
    film_clips.captions(clips, film_clips.CAPTIONS | {"two.mp4": "another"})
    inputs = osctl.json("lineage")[0]["inputs"]
    stage = osctl.folder / f".osctl/store/tiny/stages/stage1@{inputs}"
    (stage / "COMMITTED.json").unlink()
    for place in (*stage.glob("checkpoints/*"), *stage.glob("attempts/*")):
        shutil.rmtree(place)
    shutil.rmtree(osctl.folder / ".osctl/runs")
    refused = osctl("resume", "--quiet", expect=3).stderr
    assert "other clips than at the launch" in refused and "two.mp4: caption was 'a dark square', is 'another'" in refused
    assert len(list(stage.glob("attempts/*"))) == 1, "another attempt would find the same clips"
