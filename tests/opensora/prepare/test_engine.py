"""Laws of a whole run: nothing is lost, nothing is worked on twice, and whoever is killed comes to the same data set."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import prepare_steps
import pytest
import yaml
from processes import open_files

from opensora.dataset.layouts import read_folder
from opensora.dataset.places import Folder
from opensora.prepare import devices, engine
from opensora.prepare.devices import Device, Held
from opensora.prepare.engine import Ended
from opensora.prepare.guard import Guards
from opensora.prepare.run_state import Folders, RunState
from opensora.prepare.steps import Measure


class Place:
    """A run directory and its sources."""

    def __init__(self, path: Path) -> None:
        self.path, self.videos, self.run = path, path / "videos", path / "run"
        self.run.mkdir()
        self.calls = path / "calls.txt"
        self.calls.touch()
        self.config: dict[str, Any] = {
            "name": "tiny", "workers": 2, "sources": [{"path": str(self.videos)}], "limits": {"deadline_s": 3, "memory_gb": 0.5},
            "filter": {"rules": [{"column": "motion", "min": 0.5}], "duplicates": None}, "caption": {"kind": "digits"},
        }  # fmt: skip

    def video(self, name: str, *shots: tuple[int, int, float, str], first: str = "") -> Path:
        return prepare_steps.write_video(self.videos, name, *shots, first=first)

    def three(self) -> None:
        self.video("a", (0, 10, 1.0, "a red ball"), (10, 30, 0.2, "nothing moves"), (30, 40, 2.0, "a blue ball"))
        self.video("b", (0, 10, 1.5, "a green ball falls"))
        self.video("c", (5, 25, 3.0, "a yellow ball"), (25, 40, 1.0, '=a ball, "quoted"'))

    def write(self, **changed: Any) -> None:
        self.config |= changed
        path = self.run / "prepare.yaml"
        path.write_text(yaml.safe_dump(self.config))

    def prepare(self, *, retry: bool = True, **changed: Any) -> Ended:
        self.write(**changed)
        ended = engine.run(self.run, prepare_steps.STEPS, retry=retry)
        assert json.loads((self.run / "result.json").read_text())["class"] == ended.kind
        return ended

    def done(self) -> Counter[str]:
        """Calls of each step since the last look."""
        lines = self.calls.read_text().splitlines()
        self.calls.write_text("")
        return Counter(line.split()[0] for line in lines)

    def dataset(self) -> dict[str, Any]:
        content: dict[str, Any] = json.loads((self.run / "out" / "DATASET.json").read_text())
        return content

    def captions(self) -> list[str]:
        with (self.run / "out" / "captions.csv").open(newline="") as file:
            return [row["text"] for row in csv.DictReader(file)]

    def slow(self, seconds: float) -> None:
        (self.path / "slow.txt").write_text(str(seconds))

    def process(self) -> subprocess.Popen[str]:
        command = [sys.executable, prepare_steps.__file__, str(self.run)]
        env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env)


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


def settled(steps: Mapping[str, Any]) -> bool:
    return all(one["in"] == one["kept"] + sum(one["dropped"].values()) + sum(one["quarantined"].values()) for one in steps.values())


def test_a_run_makes_a_data_set_that_the_trainer_reads(place: Place) -> None:
    place.three()
    ended = place.prepare()
    assert (ended.kind, ended.code) == ("completed", 0)
    about = place.dataset()
    assert (about["clips"], about["digest"]) == (5, ended.digest)
    assert settled(about["steps"])
    assert about["steps"]["filter"] == {"in": 6, "kept": 5, "dropped": {"motion out of bounds": 1}, "quarantined": {}}
    assert about["alone"] == json.loads((place.run / "status.json").read_text())["alone"] == {"motion": 1}
    assert [(one["name"], one["clips"], one["licence"]) for one in about["sources"]] == [("a", 2, "cc0"), ("b", 1, "cc0"), ("c", 2, "cc0")]
    out = place.run / "out"
    for path, said in about["files"].items():
        assert (out / path).stat().st_size == said["size"]
    import fsspec

    read = read_folder(Folder(fsspec.filesystem("file"), str(out)), str(out))
    assert [row.text for row in read.rows] == ["a red ball", "a blue ball", "a green ball falls", "a yellow ball", '=a ball, "quoted"']
    assert all((out / row.path).is_file() for row in read.rows)
    assert not read.notes


def test_a_rule_on_a_column_that_no_clip_will_have_is_refused_before_anything_is_decoded(place: Place) -> None:
    place.three()
    ended = place.prepare(filter={"rules": [{"column": "moton", "min": 0.5}]})
    assert (ended.kind, ended.code) == ("failed", engine.CONFIG) and "no column moton. Is motion meant?" in ended.reason
    assert not place.done()


def test_runs_leave_as_many_files_open_as_one_run(place: Place) -> None:
    place.three()
    place.prepare()  # the fork server of the guards lives as long as this process
    before = open_files()
    ends = [place.prepare(filter={"rules": [{"column": "motion", "min": least}], "duplicates": None}).kind for least in (0.1, 1.2, 9.0)]
    ends.append(place.prepare(sources=[{"path": str(place.path / "nowhere")}]).kind)
    (place.run / "drain").touch()
    ends.append(place.prepare(sources=[{"path": str(place.videos)}]).kind)
    assert ends == ["completed", "completed", "failed", "failed", "drained"]
    assert open_files() == before


def test_a_run_on_finished_work_changes_nothing_and_says_so(place: Place) -> None:
    place.three()
    first = place.prepare()
    place.done()
    before = {path: path.stat().st_mtime_ns for path in (place.run / "out").rglob("*")}
    again = place.prepare()
    assert again.reason.startswith("nothing to do: 5 clips")
    assert again.digest == first.digest
    assert {path: path.stat().st_mtime_ns for path in (place.run / "out").rglob("*")} == before
    assert not place.done()


def test_another_threshold_decodes_and_captions_nothing_again(place: Place) -> None:
    place.three()
    place.prepare()
    assert place.done() == {"download": 3, "probe": 3, "frames": 3, "clips": 5, "caption": 5}
    place.prepare(filter={"rules": [{"column": "motion", "min": 1.2}], "duplicates": None})
    assert not place.done()
    assert place.dataset()["clips"] == 3
    place.prepare(filter={"rules": [], "duplicates": None})
    assert place.done() == {"clips": 1, "caption": 1}, "of the one clip that had been dropped"
    assert place.dataset()["clips"] == 6


def test_another_source_costs_its_own_work_alone(place: Place) -> None:
    place.three()
    place.prepare()
    place.done()
    place.video("d", (0, 10, 1.0, "a new ball"))
    place.prepare()
    assert place.done() == {"download": 1, "probe": 1, "frames": 1, "clips": 1, "caption": 1}


def test_a_source_that_changed_is_worked_on_anew(place: Place) -> None:
    place.three()
    first = place.prepare()
    place.done()
    place.video("b", (0, 10, 1.5, "a green ball rises"))
    assert place.prepare().digest != first.digest
    assert place.done()["frames"] == 1
    assert "a green ball rises" in place.captions()


def test_the_digest_is_the_same_elsewhere_and_in_another_order_of_work(place: Place, tmp_path: Path) -> None:
    place.three()
    first = place.prepare()
    other = tmp_path / "other"
    other.mkdir()
    again = Place(other)
    again.videos = place.videos
    again.config["sources"] = place.config["sources"]
    assert again.prepare(workers=1).digest == first.digest


@pytest.mark.long
def test_rows_that_crash_hang_and_eat_memory_are_put_aside_and_counted(place: Place) -> None:
    for number in range(17):
        place.video(f"v{number:02}", (0, 10, 1.0, f"ball number {number}"))
    for what in ("crash", "hang", "memory"):
        place.video(f"x-{what}", (0, 10, 1.0, "never"), first=what)
    ended = place.prepare()
    assert ended.code == 0
    frames = place.dataset()["steps"]["probe"]
    assert frames["quarantined"] == {"crash (SIGSEGV)": 1, "takes too long": 1, "needs too much memory": 1}
    assert (frames["in"], frames["kept"], place.dataset()["clips"]) == (20, 17, 17)


def test_quarantined_rows_are_tried_again_and_others_are_not(place: Place) -> None:
    place.three()
    place.video("x", (0, 10, 1.0, "mended"), first="crash")
    place.video("y", first="bad")
    place.prepare()
    assert place.done()["frames"] == 4
    place.prepare(retry=False)
    assert not place.done()
    assert sum(place.dataset()["steps"]["probe"]["quarantined"].values()) == 2
    place.prepare()
    assert place.done() == {"probe": 2, "frames": 1}
    place.video("x", (0, 10, 1.0, "mended"))
    place.video("y", (0, 10, 1.0, "mended too"))
    place.prepare()
    assert place.dataset()["clips"] == 7
    assert not list((place.run / "quarantined").rglob("*.json")) or not place.dataset()["steps"]["probe"]["quarantined"]


def test_too_many_quarantined_rows_stop_the_run_and_nothing_is_lost(place: Place) -> None:
    place.three()
    for number in range(6):
        place.video(f"x{number}", (number, 10, 1.0, "never"), first="bad")
        (place.videos / f"x{number}.txt").write_text(f"bad\n{number}")
    ended = place.prepare()
    assert (ended.kind, ended.code) == ("failed", 65)
    assert "probe: 6 of 9 rows could not be worked on, max_quarantined 0.01 allows 5" in ended.reason
    assert "no video stream: 6" in ended.reason
    assert not (place.run / "out").exists()
    place.done()
    ended = place.prepare(max_quarantined=0.7)
    assert ended.code == 0
    assert place.done() == {"probe": 6, "clips": 5, "caption": 5}, "what was good is not done again"


def test_no_quarantined_row_is_allowed_where_the_share_is_none(place: Place) -> None:
    place.three()
    place.video("x", first="bad")
    assert place.prepare(max_quarantined=0).code == 65


def test_copies_of_a_file_are_one_source_the_first_of_the_list(place: Place) -> None:
    place.three()
    place.video("0-copy", (0, 10, 1.5, "a green ball falls"))
    place.prepare()
    about = place.dataset()
    assert about["steps"]["download"]["dropped"] == {"same file as another source": 1}
    assert [one["name"] for one in about["sources"]] == ["0-copy", "a", "c"]
    assert settled(about["steps"])


def test_excluded_sources_are_dropped(place: Place) -> None:
    place.three()
    place.prepare()
    gone = place.dataset()["sources"][0]["sha256"]
    place.prepare(exclude=[gone])
    assert [one["name"] for one in place.dataset()["sources"]] == ["b", "c"]
    assert place.dataset()["steps"]["download"]["dropped"] == {"taken out on request": 1}


def test_a_caption_that_is_refused_costs_its_clip(place: Place) -> None:
    place.three()
    place.video("d", (0, 10, 1.0, "refused by the server"), (10, 20, 1.0, "short"))
    place.prepare(caption_words=[2, 50])
    assert place.dataset()["steps"]["caption"] == {
        "in": 7, "kept": 5, "dropped": {"caption too short": 1}, "quarantined": {"server refused it": 1},
    }  # fmt: skip
    place.done()
    place.prepare()
    assert place.done() == {"caption": 1}, "that one is asked again"


def test_rules_on_text_and_words_are_judged_where_their_columns_are_there(place: Place) -> None:
    place.three()
    rules = [{"column": "text_area", "max": 0.99}, {"column": "words", "min": 4}]
    place.prepare(filter={"rules": rules, "duplicates": None, "text_area": True})
    steps = place.dataset()["steps"]
    assert settled(steps)
    assert steps["score"]["in"] == 6
    assert steps["caption"]["dropped"]["words out of bounds"] == 5
    place.done()
    place.prepare(filter={"rules": [{"column": "text_area", "max": 0.5}], "duplicates": None, "text_area": True})
    assert not place.done()


def test_the_score_of_clip_and_caption_is_measured_once_there_is_a_caption(place: Place) -> None:
    place.three()
    rules = [{"column": "clip", "min": 0.11}, {"column": "aesthetic", "min": 4}]
    place.prepare(filter={"rules": rules, "duplicates": None, "scores": "/models/clip"})
    steps = place.dataset()["steps"]
    assert settled(steps)
    assert steps["score"]["kept"] == 6
    assert steps["caption"]["dropped"] == {"clip out of bounds": 1}
    assert "a red ball" not in place.captions()
    assert place.done()["score"] == 12
    place.prepare(filter={"rules": rules[:1], "duplicates": None, "scores": "/models/clip"})
    assert not place.done()


def test_stages_are_encoded_once(place: Place) -> None:
    place.three()
    (place.run / "stages").mkdir()
    (place.run / "stages" / "first.yaml").write_text("steps: 1\n")
    place.prepare()
    assert "latents/first.bin" in place.dataset()["files"]
    assert place.dataset()["steps"]["encode"]["kept"] == 5
    assert place.done()["encode"] == 1
    assert place.prepare().reason.startswith("nothing to do")
    (place.run / "stages" / "second.yaml").write_text("steps: 2\n")
    place.prepare()
    assert place.done() == {"encode": 1}, "the first one's latents are those of the same clips"
    assert {"latents/first.bin", "latents/second.bin"} <= set(place.dataset()["files"])


def held(place: Place) -> dict[str, tuple[str, bool]]:
    """Of each step that held anything, its device, and whether it held a GPU for some time."""
    steps = json.loads((place.run / "status.json").read_text())["steps"]
    told = {step: one for step, one in steps.items() if "held_s" in one}
    assert all("cpu" in one["held_s"] for one in told.values()) and told["clips"]["held_s"]["cpu"] > 0
    return {step: (one["device"], one["held_s"].get("cuda", 0) > 0) for step, one in told.items()}


def test_cores_are_held_by_the_steps_that_ran_and_no_gpu_where_none_is_used(place: Place) -> None:
    place.three()
    place.prepare()
    cores = ("cpu", False)
    assert held(place) == {"frames": cores, "filter": cores, "clips": cores, "caption": cores}


def test_a_gpu_is_held_by_the_steps_that_put_a_model_on_it_and_by_no_other(place: Place) -> None:
    place.three()
    (place.run / "stages").mkdir()
    (place.run / "stages" / "first.yaml").write_text("steps: 1\n")
    place.write(filter={"rules": [], "duplicates": None, "scores": "/models/clip"})
    on_gpu = {"measure": prepare_steps.measure_on_gpu, "caption": prepare_steps.caption_on_gpu, "encode": prepare_steps.encode_on_gpu}
    ended = engine.run(place.run, replace(prepare_steps.STEPS, **on_gpu))
    assert ended.kind == "completed", ended.reason
    cores, gpu = ("cpu", False), ("a GPU", True)
    assert held(place) == {"frames": cores, "filter": cores, "clips": cores, "score": gpu, "caption": gpu, "encode": gpu}


def test_guards_that_have_a_model_on_a_gpu_leave_it_when_their_step_is_done_and_others_stay(place: Place) -> None:
    place.write()
    folders = Folders(place.run)
    folders.begin()
    config = engine.read_config(folders.config)
    with Guards(1, config.limits, preload=("prepare_steps",)) as guards:
        state = RunState(folders, config, prepare_steps.STEPS, guards, Held(1), lambda: False)
        state.begin("score")
        for device, stays in ((devices.CPU, True), (Device("cuda", "a GPU"), False), (devices.CPU, True)):
            list(guards.map(prepare_steps.measure, [Measure("0", str(place.path), True, "")], 20.0))
            state.held.take(device)
            state.let_go()
            assert bool(guards.pids()) == stays


def test_a_disk_that_is_full_under_the_encoder_is_told_as_that(place: Place) -> None:
    place.three()
    (place.run / "stages").mkdir()
    (place.run / "stages" / "first.yaml").write_text("then: full disk\n")
    ended = place.prepare()
    assert (ended.kind, ended.code) == ("failed", engine.DISK)
    assert "No space left on device. Make room, and run again: what is done stays" in ended.reason


def test_a_crash_of_the_encoder_is_told(place: Place) -> None:
    place.three()
    (place.run / "stages").mkdir()
    (place.run / "stages" / "first.yaml").write_text("then: crash\n")
    ended = place.prepare()
    assert ended.kind == "failed"
    assert "encode: its process ended with exit code -11" in ended.reason


def test_a_kept_result_that_cannot_be_read_is_made_again(place: Place) -> None:
    """As a power cut leaves them: zeros, or half of a line; and a clip's own file that is not there."""
    place.three()
    first = place.prepare()
    place.done()
    for step in ("download", "probe", "frames", "caption", "clips"):
        (pack,) = (place.run / "kept" / step).rglob("*.jsonl")
        lines = pack.read_bytes().splitlines(keepends=True)
        pack.write_bytes(b"".join((bytes(len(lines[0])), b"\n", *lines[2:], lines[1][:-9])))
        whole = str(json.loads(lines[2])["key"]) if step == "clips" else ""
    next((place.run / "kept" / "clips").rglob(f"{whole}.mp4")).unlink()
    assert place.prepare().digest == first.digest
    assert place.done() == {"download": 2, "probe": 2, "frames": 2, "clips": 3, "caption": 2}


def test_out_is_replaced_as_a_whole(place: Place) -> None:
    place.three()
    place.prepare()
    (place.run / "out" / "of-the-user.txt").write_text("lies here")
    (place.run / "out.partial").mkdir()
    (place.run / "out.partial" / "left").write_text("by a killed run")
    place.prepare(filter={"rules": [], "duplicates": None})
    assert {path.name for path in (place.run / "out").iterdir()} == {"DATASET.json", "captions.csv", "clips", "manifest.parquet"}
    assert not (place.run / "out.partial").exists()


@pytest.mark.long
def test_a_drain_keeps_what_is_done_and_the_next_run_goes_on(place: Place) -> None:
    place.three()
    place.write()
    (place.run / "drain").touch()
    ended = engine.run(place.run, prepare_steps.STEPS)
    assert (ended.kind, ended.code) == ("drained", 143)
    (place.run / "drain").unlink()
    stop = threading.Event()
    place.slow(0.2)
    threading.Timer(0.8, stop.set).start()
    assert engine.run(place.run, prepare_steps.STEPS, stop=stop).kind == "drained"
    place.slow(0)
    assert place.prepare().code == 0
    assert max(Counter(place.calls.read_text().splitlines()).values()) == 1, "nothing was done twice"


@pytest.mark.long
def test_two_runs_on_one_directory_one_is_told(place: Place) -> None:
    place.three()
    place.write()
    place.slow(0.5)
    with place.process() as first:
        while not (place.run / "status.json").exists():
            assert first.poll() is None
        told = engine.run(place.run, prepare_steps.STEPS)
        assert (told.kind, told.code) == ("failed", 64)
        assert "another process prepares here" in told.reason
        first.terminate()
        out, _ = first.communicate(timeout=60)
    assert first.returncode == 143, out


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "no such file"),
        ("name: [", "not YAML"),
        ("name: x\nsources: []\n", "sources"),
        ("name: x\nsources: [{path: /nowhere/at/all}]\n", "/nowhere/at/all: no such file or folder"),
        ("name: x\nsources: [{path: .}]\ncuts: 3\n", "cuts"),
        ("\x00", "not YAML"),
    ],
)
def test_an_error_of_the_user_is_one_line_and_exit_64(place: Place, content: str | None, said: str) -> None:
    if content is not None:
        (place.run / "prepare.yaml").write_text(content)
    with place.process() as process:
        out, _ = process.communicate(timeout=60)
    assert process.returncode == 64
    assert out.count("\n") == 1, out
    assert said in out
    assert "Traceback" not in out


def test_a_run_directory_that_is_not_there_is_told(tmp_path: Path) -> None:
    assert engine.run(tmp_path / "nowhere", prepare_steps.STEPS).code == 64


def test_what_a_killed_run_left_of_the_older_data_set_goes_though_nothing_is_to_do(place: Place) -> None:
    """As it is after `out` and `out.partial` were exchanged."""
    place.three()
    place.prepare()
    digest = place.dataset()["digest"]
    (place.run / "out.partial/clips").mkdir(parents=True)
    (place.run / "out.partial/clips/old.mp4").write_text("of the older one")
    assert place.prepare().reason.startswith("nothing to do")
    assert not (place.run / "out.partial").exists() and place.dataset()["digest"] == digest


def test_a_set_without_a_clip_says_where_they_went(place: Place) -> None:
    place.three()
    ended = place.prepare(filter={"rules": [{"column": "motion", "min": 99}], "duplicates": None})
    assert ended.code == 65
    assert "no clip is left" in ended.reason
    assert "6 motion out of bounds" in ended.reason
    assert ended.reason.endswith("See what each rule takes: osctl prepare report tiny")
