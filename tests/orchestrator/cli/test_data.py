"""`osctl data`, and what a launch writes down of a person's own clips."""

from __future__ import annotations

import json
import shlex
import shutil
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import film_clips
import numpy as np
import phone_clips
import pytest
from live_attempts import STAND_IN
from PIL import Image
from tiny_recipe import Osctl, warm_trainer, write

from opensora.dataset.manifest import DataManifest
from orchestrator.stores import open_store


@pytest.fixture
def clips(tmp_path: Path) -> Path:
    return film_clips.make(tmp_path / "clips")


@pytest.fixture
def osctl(tmp_path: Path) -> Osctl:
    trainer = [sys.executable, STAND_IN, "{run_dir}", "{devices}"]
    return Osctl(write(tmp_path / "recipe", devices=1, stages=2, trainer=trainer))


@pytest.mark.long
def test_a_folder_that_moved_is_not_trained_anew(osctl: Osctl, clips: Path, tmp_path: Path) -> None:
    osctl("launch", "--data", str(clips), "--quiet")
    before = osctl.digests()
    shutil.copytree(clips, tmp_path / "moved", copy_function=shutil.copyfile)
    osctl("launch", "--data", str(tmp_path / "moved"), "--quiet")
    assert len(list((osctl.folder / ".osctl/store/tiny/stages").glob("stage*@*/attempts/*"))) == 2 and osctl.digests() == before


@pytest.mark.long
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


@pytest.mark.long
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


@pytest.mark.long
def test_changed_data_is_refused_with_the_rows_and_the_two_commands(changed: Osctl, clips: Path) -> None:
    refused = changed("launch", "--data", str(clips), "--quiet", expect=4).stderr
    assert "2 rows differ: one.mp4: caption was 'a grey square', is 'another'; four.mp4: added" in refused
    assert "--keep stage1" in refused and "--anew stage1" in refused
    assert "one.mp4: caption was" in changed("launch", "--data", str(clips), "--dry-run").stderr
    fields = {row["field"] for row in changed.json("diff", "stage1", "--data", str(clips))}
    assert {"data", "data row one.mp4", "data row four.mp4"} <= fields


@pytest.mark.long
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
def test_all_stages_of_changed_data_are_asked_about_at_once_and_kept_together(changed: Osctl, clips: Path) -> None:
    before, data = changed.digests(), ("--data", str(clips), "--quiet")
    refused = changed("launch", *data, expect=4).stderr
    assert "--keep stage1 --keep stage2" in refused
    changed("launch", *data, "--keep", "stage1", "--keep", "stage2")
    said = changed("launch", *data, "--keep", "stage1", "--keep", "stage2").stderr  # pasted once more
    assert changed.digests() == before and "begins anew" not in said
    assert len(list((changed.folder / ".osctl/store/tiny/stages").glob("*@*"))) == 2
    assert "one of the two" in changed("launch", *data, "--keep", "stage1", "--anew", "stage1", expect=2).stderr


@pytest.mark.long
def test_a_stage_that_keeps_its_parent_is_asked_about_itself(changed: Osctl, clips: Path) -> None:
    refused = changed("launch", "--data", str(clips), "--quiet", "--keep", "stage1", expect=4).stderr
    assert "stage2: its data changed" in refused and "--keep stage2" in refused


def test_a_launch_that_forgets_its_data_drops_no_work(tmp_path: Path, clips: Path) -> None:
    trainer = [sys.executable, STAND_IN, "{run_dir}", "{devices}", "--fail", "oom@5"]
    osctl = Osctl(write(tmp_path / "recipe", devices=1, stages=1, trainer=trainer, changes={"steps": 6, "checkpoint": {"every_steps": 2}}))
    osctl("launch", "--data", str(clips), "--quiet", expect=3)
    refused = osctl("launch", "--quiet", expect=4).stderr
    assert "stage1: stopped at step 4 on other clips" in refused and "osctl resume" in refused and "--anew stage1" in refused
    assert len(list((osctl.folder / ".osctl/store/tiny/stages").glob("*@*"))) == 1


def test_missing_clips_are_asked_about_for_all_stages_before_the_first(osctl: Osctl, clips: Path) -> None:
    for name in ("one.mp4", "two.mp4"):
        (clips / name).unlink()
    refused = osctl("launch", "--data", str(clips), "--quiet", expect=4).stderr
    assert "--set stage1.data.max_left_out=1 --set stage2.data.max_left_out=1" in refused


def test_digits_have_no_rate(osctl: Osctl) -> None:
    said = osctl("launch", "--set", "stage2.data.fps=8", "--dry-run", expect=2).stderr
    assert "stage2.data.fps 8: digits are drawn frame by frame" in said


@pytest.mark.long
def test_clips_that_change_between_two_attempts_are_said_and_not_tried_again(tmp_path: Path, clips: Path) -> None:
    """By the real trainer: what a launch recorded is what every attempt of it trains on."""
    source = {"source": {"kind": "folder", "path": str(clips)}, "frames": 1, "height": 16, "width": 16}
    changes = {"steps": 4, "batch_size": 1, "data": source, "prompts": ["a grey square"], "checkpoint": {"every_steps": 2}}
    osctl = Osctl(write(tmp_path / "real", devices=1, stages=1, changes=changes, trainer=warm_trainer()))
    osctl("launch", "--quiet")
    film_clips.film(clips / "one.mp4", 60, frames=30)
    film_clips.captions(clips, film_clips.CAPTIONS | {"two.mp4": "another"})
    inputs_digest = osctl.json("lineage")[0]["inputs"]
    stage = osctl.folder / f".osctl/store/tiny/stages/stage1@{inputs_digest}"
    (stage / "COMMITTED.json").unlink()
    for place in (*stage.glob("checkpoints/*"), *stage.glob("attempts/*")):
        shutil.rmtree(place)
    shutil.rmtree(osctl.folder / ".osctl/runs")
    refused = osctl("resume", "--quiet", expect=3).stderr
    assert "other clips than at the launch" in refused and "two.mp4: caption was 'a dark square', is 'another'" in refused
    assert len(list(stage.glob("attempts/*"))) == 1, "another attempt would find the same clips"


# What a folder is taken for


@pytest.mark.long
def test_what_the_folder_was_taken_for_and_what_does_not_fit_is_said_in_a_line_each(osctl: Osctl, clips: Path) -> None:
    (clips / "captions.csv").unlink()
    for name, caption in film_clips.CAPTIONS.items():
        (clips / name).with_suffix(".txt").write_text(caption)
    film_clips.film(clips / "four.mp4", 200)
    said = osctl("launch", "--data", str(clips), "--quiet").stderr.splitlines()
    assert sum("a.mp4 with a.txt beside it; 3 rows" in line for line in said) == 1
    assert sum("1 clip has no caption and is not used: four.mp4" in line for line in said) == 1
    said = osctl("data", "register", "squares", str(clips)).stderr.splitlines()
    assert said[0].startswith("squares: a.mp4 with a.txt beside it; 3 rows, ")
    assert said[1] == "squares: 1 clip has no caption and is not used: four.mp4"


@pytest.mark.long
def test_a_table_of_clips_trains_as_a_folder_does(osctl: Osctl, clips: Path) -> None:
    rows = [json.dumps({"video_path": name, "caption": caption}) for name, caption in film_clips.CAPTIONS.items()]
    (clips / "mine.jsonl").write_text("\n".join(rows))
    said = osctl("launch", "--data", str(clips / "mine.jsonl"), "--quiet").stderr
    assert "mine.jsonl, video_path and caption of each object; 3 rows" in said
    before = osctl.digests()
    osctl("launch", "--data", str(clips), "--quiet")
    assert osctl.digests() == before, "the same clips and captions: nothing is trained again"


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "captions.csv: no such file (3 clips and no captions)"),
        (b"", "captions.csv: no clips"),
        (b"path,text\none.mp4,caf\xe9\n", "captions.csv:2: not UTF-8 at byte 21"),
        (b"path,text\none.mp4,\n", "captions.csv:2: one.mp4 has no text"),
        (b'path,text\none.mp4,"a\n', "captions.csv:2: the quote that opens here is never closed"),
        (b"path,text\n../one.mp4,a\n", "captions.csv:2: path '../one.mp4' does not lie inside"),
        (b"path,text\none.mp4,a box\ntwo.mp4,???\n", "captions.csv:3: caption '???' has no words, and stage1 learns from words"),
    ],
    ids=["none", "empty", "Latin-1", "no caption", "open quote", "outside", "no words"],
)
def test_captions_that_cannot_be_used_are_refused_before_anything_is_launched(
    osctl: Osctl, clips: Path, content: bytes | None, says: str
) -> None:
    (clips / "captions.csv").unlink()
    if content is not None:
        (clips / "captions.csv").write_bytes(content)
    said = osctl("launch", "--data", str(clips), expect=2).stderr
    assert says in said and said.startswith("error: ") and said.count("\n") == 1
    assert not (osctl.folder / ".osctl/runs").exists()


@pytest.mark.parametrize("name", ["absent", "absent.csv"])
def test_clips_that_are_not_there_are_a_wrong_command(osctl: Osctl, name: str) -> None:
    assert osctl("launch", "--data", name, expect=2).stderr.startswith(
        f"error: --data {name}: no such {'file' if '.' in name else 'folder'}"
    )


@pytest.mark.long
def test_a_launch_says_how_many_captions_are_cut(osctl: Osctl, clips: Path) -> None:
    long = "in the early morning light of a small harbour town a dog runs"
    film_clips.captions(clips, film_clips.CAPTIONS | {"one.mp4": long, "two.mp4": f"{long} home"})
    (said,) = [line for line in osctl("launch", "--data", str(clips), "--quiet").stderr.splitlines() if "more than 8 words" in line]
    assert said.startswith("stage1, stage2: 2 of 3 captions and 2 of 3 prompts have more than 8 words")


# --- Clips that are sent into a bucket --------------------------------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.s3
def test_clips_are_sent_once_and_a_later_version_sends_what_is_new(
    tmp_path: Path, osctl: Osctl, clips: Path, s3: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = s3.url(f"sent/{tmp_path.name}")
    for name, value in s3.env.items():
        monkeypatch.setenv(name, value)
    add = ("data", "add", "squares", str(clips), "--store", url)
    said = osctl(*add, "--dry-run").stderr
    assert "3 clips, " in said and "3 clips of" in said and "at 100 Mbit/s" in said and "a month (assumed" in said
    bucket = open_store(url)
    assert list(bucket.list("")) == [], "nothing is sent before it is asked for"

    first = osctl.json(*add)
    keys = list(bucket.list("datasets/squares/clips/"))
    assert len(keys) == 3 and first["rows"] == 3 and first["source"] == f"{url}/datasets/squares/{first['digest']}.csv"
    assert bucket.digest(keys[0])[1] == keys[0].rpartition("/")[2].removesuffix(".mp4")
    assert osctl.json("data", "register", "local", str(clips))["digest"] == first["digest"], "a copy elsewhere is the same data set"

    bucket.discard(keys[0])  # as an interrupted run leaves it
    film_clips.film(clips / "four.mp4", 200)
    (clips / "five.mp4").write_bytes((clips / "one.mp4").read_bytes())
    film_clips.captions(clips, film_clips.CAPTIONS | {"four.mp4": "a white square", "five.mp4": "the same as one", "none.mp4": "lost"})
    again = osctl(*add)
    assert "2 clips of" in again.stderr and "1 file is not there" in again.stderr
    assert len(list(bucket.list("datasets/squares/clips/"))) == 4
    assert f"osctl launch --data {url}/datasets/squares/" in again.stderr
    assert "0 clips of" in osctl(*add).stderr
    assert osctl.json("data", "list", "--store", url)[0]["rows"] == 5


@pytest.mark.s3
@pytest.mark.long
def test_clips_that_were_sent_are_trained_on_where_they_lie(tmp_path: Path, clips: Path, s3: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    url = s3.url(f"trained/{tmp_path.name}")
    for name, value in s3.env.items():
        monkeypatch.setenv(name, value)
    changes = {"steps": 2, "batch_size": 2, "checkpoint": {"every_steps": 2}}
    osctl = Osctl(write(tmp_path / "recipe", devices=1, stages=1, changes=changes, trainer=warm_trainer()))
    place = osctl.json("data", "add", "squares", str(clips), "--store", url)["source"]
    shutil.rmtree(clips)
    osctl("launch", "-q", "--data", place, "--store", url)
    assert osctl.json("lineage", "--store", url)[0]["data_digest"]


def test_a_folder_as_a_store_takes_no_clips(osctl: Osctl, clips: Path) -> None:
    said = osctl("data", "add", "squares", str(clips), expect=4).stderr
    assert "is a folder of this machine" in said and "--store s3://bucket/prefix" in said
    assert "is not there" in osctl("data", "add", "squares", "nowhere", "--store", "s3://nobodys/x", expect=4).stderr
    assert "--data ADDRESS" in osctl("data", "add", "squares", "s3://b/clips", expect=2).stderr


# --- Shown ------------------------------------------------------------------------------------------------------------------------------


def test_a_folder_is_shown_by_its_place(osctl: Osctl, clips: Path) -> None:
    rows = osctl.json("data", "show", str(clips))
    assert [row["name"] for row in rows] == list(film_clips.CAPTIONS) and all(len(row["sha256"]) == 64 for row in rows)
    osctl("data", "register", "squares", str(clips))
    assert osctl.json("data", "show", "squares") == rows
    film_clips.captions(clips, film_clips.CAPTIONS | {"one.mp4": "another"})
    assert [one["change"] for one in osctl.json("data", "show", "squares", str(clips))] == ["caption"]
    assert "Correct the path" in osctl("data", "show", str(clips / "none"), expect=4).stderr


@pytest.mark.long
def test_a_sheet_shows_a_phones_folder_as_the_model_sees_it(osctl: Osctl, tmp_path: Path) -> None:
    folder, sheet = phone_clips.make(tmp_path / "from my phone"), tmp_path / "sheet.png"
    said = osctl.json("data", "show", str(folder), "--sheet", str(sheet))
    assert (said["shown"], said["left_out"], said["clips"]) == (7, 2, 9)
    assert set(said["reasons"]) == set(phone_clips.BROKEN) and said["remarks"] == []
    with Image.open(sheet) as page:
        pixels = np.asarray(page).astype(int)
    yellow = (pixels[..., 0] > 200) & (pixels[..., 1] > 180) & (pixels[..., 2] < 150)
    rows = [row for row in range(pixels.shape[0]) if yellow[row].any()]
    suns = sum(now - before > 1 for before, now in pairwise([-2, *rows]))
    assert suns == 7  # each clip stands upright: its sun is above, in one band of rows
    osctl("data", "register", "holiday", str(folder))
    by_name = osctl.json("data", "show", "holiday", "--sheet", str(tmp_path / "two.png"), "--size", "4x32x32", "--clips", "3", "--fps", "4")
    assert (by_name["shown"], by_name["clips"]) == (3, 9)


@pytest.mark.long
@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (("--size", "8x16x16"), 2, "Name its file: --sheet FILE.png"),
        (("--sheet", "a.png", "--size", "16x16"), 2, "--size 16x16: is frames x height x width"),
        (("--sheet", "a.png", "--stage", "stage1", "--fps", "8"), 2, "Leave out --size and --fps"),
        (("--sheet", "a.png", "--stage", "stage9"), 2, "stage9"),
        (("other", "--sheet", "a.png"), 2, "Name one"),
    ],
)
def test_a_sheet_that_cannot_be_drawn_says_why(osctl: Osctl, clips: Path, words: tuple[str, ...], code: int, says: str) -> None:
    said = osctl("data", "show", str(clips), *words, expect=code).stderr
    assert says in said and "Traceback" not in said


@pytest.mark.long
def test_a_sheet_replaces_nothing_but_a_sheet(osctl: Osctl, clips: Path) -> None:
    """The drawing process refuses: tests/opensora/test_sheet.py has every kind of file. Here: its words arrive, and can be pasted."""
    Image.new("RGB", (4, 4)).save(clips / "picture.png")
    before = (clips / "picture.png").read_bytes()
    said = osctl("data", "show", str(clips), "--sheet", str(clips / "picture.png"), expect=2).stderr
    assert (clips / "picture.png").read_bytes() == before and "picture.png" in said
    words = shlex.split(said.strip().rpartition("Name another file: ")[2])
    assert words[0] == "--sheet"
    assert osctl.json("data", "show", str(clips), *words)["shown"] == 3


@pytest.mark.long
@pytest.mark.s3
def test_clips_of_a_bucket_are_drawn_and_encoded_at_the_endpoint_of_osctl(
    tmp_path: Path, osctl: Osctl, clips: Path, s3: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(clips, s3.root / s3.bucket / "drawn" / tmp_path.name)
    for name, value in s3.env.items():
        monkeypatch.setenv(name, value)
    place = s3.url(f"drawn/{tmp_path.name}")
    assert osctl.json("data", "show", place, "--sheet", "s.png")["shown"] == 3
    assert osctl.json("encode", "stage1", "--data", place)[0]["clips"] == 3
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    said = osctl("data", "show", place, "--sheet", "s.png", expect=2).stderr
    assert "the secret key is not the one of this access key" in said and "Give this user the right" not in said


@pytest.mark.long
def test_names_of_files_are_no_commands(osctl: Osctl, clips: Path) -> None:
    (clips / "one.mp4").rename(clips / "osctl cancel.mp4")
    (clips / "osctl cancel.mp4").write_bytes(b"broken")
    (clips / "osctl resume.mp4").write_bytes(b"no caption")
    film_clips.captions(clips, {"osctl cancel.mp4": "one", "two.mp4": "two", "osctl launch s1.mp4": "three"})
    said = osctl("data", "show", str(clips), "--sheet", "s.png", "--store", "s").stderr
    assert "left out" in said and "cancel.mp4" in said and "--store" not in said


@pytest.mark.long
def test_a_stages_own_sizes_are_shown(osctl: Osctl, clips: Path, tmp_path: Path) -> None:
    said = osctl.json("data", "show", str(clips), "--sheet", str(tmp_path / "s.png"), "--stage", "stage2", "--set", "stage2.data.frames=12")
    assert (said["shown"], said["left_out"]) == (0, 3)
    assert said["reasons"]["one.mp4"] == "8 frames, 12 are needed for 12 frames at interval 1"
