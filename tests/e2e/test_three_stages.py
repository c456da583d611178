"""The main path as a user walks it: real agent, real torchrun with two gloo processes a stage, real store, real MLflow in sqlite."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import av
import pytest
from tiny_recipe import STAGES, Osctl, write

EVALUATE = {"evaluate": {"kind": "digits", "clips": 8, "frames": 4}}


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Osctl]:
    osctl = Osctl(write(tmp_path_factory.mktemp("launched"), tracking="sqlite", changes=EVALUATE))
    osctl("launch")
    yield osctl


@pytest.fixture
def copy(launched: Osctl, tmp_path: Path) -> Osctl:
    """The launched pipeline, to be damaged."""
    shutil.copytree(launched.folder, tmp_path / "copy", symlinks=True)
    return Osctl(tmp_path / "copy")


def checkpoint(osctl: Osctl, stage: str) -> Path:
    """The committed checkpoint's folder in the store."""
    store = osctl.folder / ".osctl/store"
    (committed,) = store.glob(f"tiny/stages/{stage}@*/COMMITTED.json")
    return (store / json.loads(committed.read_text())["manifest"]).parent


def test_every_stage_is_committed_from_the_one_before(launched: Osctl) -> None:
    lines = launched.json("lineage")
    assert [line["name"] for line in lines] == ["stage3", "stage2", "stage1"]
    assert all(line["verdict"] == "present" for line in lines)
    assert launched("lineage", "--verify", "-o", "name").stdout.split() == ["stage3", "stage2", "stage1"]


def test_stages_stand_side_by_side_with_hours_and_cost(launched: Osctl) -> None:
    lines = launched.json("compare")
    assert [line["name"] for line in lines] == list(STAGES)
    for line in lines:
        assert line["loss"] > 0 and line["device_hours"] > 0 and float(line["usd"]) > 0
        assert line["gpu_hours"] == 0, "a CPU's hours are no GPU-hours"
        assert line["evaluation"]["digit_chance"] == 0.1 and line["evaluation"]["direction_chance"] == 0.25
    assert "image_digit_accuracy" in lines[0]["evaluation"], "stage 1 is judged on images, and asked for video too"


def test_the_bill_sums_to_held_time(launched: Osctl) -> None:
    for line in launched.json("cost", "--by-attempt"):
        assert sum(line["device_seconds"].values()) == pytest.approx(line["held_s"], rel=1e-3, abs=0.1)
        assert line["device_seconds"]["step"] > 0 and line["device_seconds"]["init"] > 0


def test_launching_again_does_nothing_twice(launched: Osctl) -> None:
    before = sorted(path.relative_to(launched.folder) for path in (launched.folder / ".osctl/store").rglob("attempts/*/intent.json"))
    digests = launched.digests()
    launched("launch")
    assert (
        sorted(path.relative_to(launched.folder) for path in (launched.folder / ".osctl/store").rglob("attempts/*/intent.json")) == before
    )
    assert launched.digests() == digests and len(before) == 3


def test_status_and_list_say_what_is_there(launched: Osctl) -> None:
    status = launched.json("status")
    assert status["state"] == "succeeded" and [stage["state"] for stage in status["stages"]] == ["committed"] * 3
    assert [(row["name"], row["stages"]) for row in launched.json("list")] == [("tiny", "3/3")]


def test_logs_come_out_of_the_store(launched: Osctl) -> None:
    shown = launched("logs", "stage2").stdout
    assert "carried" in shown and "position tables (1x4x4 -> 4x4x4)" in shown and "8/8" in shown
    assert "no such stage" not in launched("logs", "nope", expect=2).stderr


def test_a_committed_stage_draws_a_video(launched: Osctl, tmp_path: Path) -> None:
    target = tmp_path / "three.mp4"
    launched("sample", "a digit 3 moving left", "--out", str(target), "--seed", "3")
    with av.open(str(target)) as video:
        assert sum(1 for _ in video.decode(video=0)) == 6
    refused = launched("sample", "a zebra", "--out", str(tmp_path / "zebra.mp4"), expect=2)
    assert "zebra" in refused.stderr and not (tmp_path / "zebra.mp4").exists()


def test_a_committed_stage_is_exported_once(launched: Osctl, tmp_path: Path) -> None:
    target = tmp_path / "exported"
    done = launched("export", "--format", "diffusers", str(target))
    assert done.stdout == f"{target}\n" and "/stage3@" in done.stderr and "(ema)" in done.stderr
    index = json.loads((target / "model_index.json").read_text())
    assert all((target / part).is_dir() for part in ("transformer", "vae", "text_encoder", "tokenizer", "scheduler") if part in index)
    assert sum(isinstance(value, list) for value in index.values()) == 6
    assert "frames: 6" in (target / "stage.yaml").read_text()
    assert "nothing is written over" in launched("export", str(target), expect=2).stderr
    launched("export", str(tmp_path / "first"), "--stage", "stage1", "--weights", "model", "--dtype", "bf16")
    assert "frames: 1\n" in (tmp_path / "first" / "stage.yaml").read_text()


def test_the_launch_leaves_pictures(launched: Osctl) -> None:
    folder = launched.folder / ".osctl/samples/tiny/stage3"
    assert (folder / "sheet.png").read_bytes()[:4] == b"\x89PNG"
    assert [path.name for path in folder.glob("*.mp4")] == ["00-a-digit-3-moving-left.mp4"]


def test_sync_after_a_launch_doubles_nothing(launched: Osctl) -> None:
    import sqlite3

    def rows() -> dict[str, int]:
        with sqlite3.connect(launched.folder / ".osctl/mlflow.db") as database:
            count = "SELECT COUNT(*) FROM "
            return {table: database.execute(count + table).fetchone()[0] for table in ("runs", "metrics", "params", "model_versions")}

    before = rows()
    launched("sync")
    assert rows() == before
    assert before["runs"] == 1 + 3 + 3 and before["model_versions"] == 3


def test_stage_alone_finds_its_parent_in_the_ledger(copy: Osctl) -> None:
    copy("launch", "stage2", "--set", "stage2.steps=4")
    stages = {stage["name"]: stage for stage in copy.json("status")["stages"]}
    assert stages["stage2"]["state"] == "committed" and stages["stage2"]["steps"] == 4
    assert stages["stage3"]["state"] != "committed", "its parent is another one now"


def test_stage_alone_without_a_parent_is_refused(tmp_path: Path) -> None:
    osctl = Osctl(write(tmp_path / "fresh"))
    refused = osctl("launch", "stage2", expect=4)
    assert "osctl launch stage1" in refused.stderr
    assert not list(tmp_path.rglob("intent.json"))


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def replace_with_older(folder: Path) -> None:
    """An older checkpoint of the same stage, whole, under the committed one's name."""
    (older,) = (path for path in folder.parent.iterdir() if path.name.startswith("step-00000004"))
    shutil.rmtree(folder)
    shutil.copytree(older, folder)


AVERAGE = "ema-00001-of-00002.safetensors"
"""A file of weights: two ranks wrote them."""
DAMAGE = {
    "one flipped byte": lambda folder, osctl: flip(folder / AVERAGE),
    "a missing file": lambda folder, osctl: (folder / AVERAGE).unlink(),
    "a truncated file": lambda folder, osctl: (folder / AVERAGE).write_bytes((folder / AVERAGE).read_bytes()[:-1]),
    "an edited manifest": lambda folder, osctl: (folder / "MANIFEST.json").write_text(
        (folder / "MANIFEST.json").read_text().replace('"complete":true', '"complete":false')
    ),
    "another stage's checkpoint": lambda folder, osctl: (shutil.rmtree(folder), shutil.copytree(checkpoint(osctl, "stage1"), folder)),
    "an older checkpoint": lambda folder, osctl: replace_with_older(folder),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_parent_is_refused_and_named(copy: Osctl, damage: str) -> None:
    folder = checkpoint(copy, "stage2")
    DAMAGE[damage](folder, copy)
    found = copy("lineage", "stage2", "--verify", expect=4)
    refused = copy("launch", "stage3", "--set", "stage3.steps=4", expect=4)
    name = "MANIFEST.json" if damage in ("an edited manifest", "another stage's checkpoint", "an older checkpoint") else AVERAGE
    assert name in refused.stderr and "stage2" in refused.stderr, refused.stderr
    assert name in found.stderr, found.stderr
    assert {stage["name"]: stage["state"] for stage in copy.json("status")["stages"]}["stage3"] != "committed"
