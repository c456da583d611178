"""Laws of `osctl eval`: a committed stage is judged from its checkpoint, once for each question, and never trained again."""

from __future__ import annotations

import json
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from tiny_recipe import Osctl, warm_trainer, write

JUDGED = {"evaluate": {"kind": "digits", "clips": 8, "frames": 4, "held_out_clips": 8}}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Osctl:
    folder = tmp_path_factory.mktemp("eval") / "recipe"
    osctl = Osctl(write(folder, devices=1, stages=2, changes=JUDGED, trainer=warm_trainer()))
    osctl("launch")
    return osctl


def written(osctl: Osctl, stage: str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in osctl.folder.glob(f".osctl/store/tiny/stages/{stage}@*/evaluations/*.json")}


def test_a_stage_is_judged_once_for_each_question_and_never_trained_again(trained: Osctl) -> None:
    attempts = sorted(trained.folder.glob(".osctl/store/tiny/stages/*/attempts/*"))
    (committed,) = trained.folder.glob(".osctl/store/tiny/stages/stage2@*/COMMITTED.json")
    by_attempt = json.loads(committed.read_text())["evaluation"]
    before = trained.json("cost")
    first: list[dict[str, Any]] = trained.json("eval", "stage2")
    assert by_attempt and by_attempt.items() <= first[0]["readings"].items(), "the same numbers as on the gang"
    assert first[0]["readings"]["held_out_gain"] == pytest.approx(
        first[0]["readings"]["held_out_loss_parent"] - first[0]["readings"]["held_out_loss"]
    )
    kept = written(trained, "stage2")
    assert len(kept) == 1 and trained.json("eval", "stage2") == first and written(trained, "stage2") == kept
    (other,) = trained.json("eval", "stage2", "--set", "stage2.evaluate.clips=6")
    assert other["readings"]["clips"] == 6 and len(written(trained, "stage2")) == 2
    assert sorted(trained.folder.glob(".osctl/store/tiny/stages/*/attempts/*")) == attempts

    shown = trained.json("compare")[1]
    assert shown["evaluation"] == other["readings"]
    rows = trained.json("cost")
    (line,) = [row for row in rows if row.get("evaluations")]
    assert [row for row in rows if row is not line] == before and line["name"] == "stage2"
    assert line["device_hours"] == pytest.approx((first[0]["device_s"] + other["device_s"]) / 3600)
    assert Decimal(shown["usd"]) == Decimal(before[1]["usd"]) + Decimal(line["usd"])
    assert not any(line["device_seconds"].values())
    samples = trained.folder.glob(".osctl/store/tiny/stages/stage2@*/samples/*/*.mp4")
    assert len(list(samples)) == 2
    assert "held-out loss" in trained("compare").stdout and "stage2, evaluated" in trained("cost").stdout


def test_a_folder_is_judged_without_a_pipeline(trained: Osctl, tmp_path: Path) -> None:
    (folder,) = trained.folder.glob(".osctl/store/tiny/stages/stage1@*/checkpoints/step-00000008-a1")
    (row,) = Osctl(tmp_path).json("eval", str(folder), "--out", "judged")
    assert row["readings"]["clips"] == 8 and (tmp_path / "judged/result.json").is_file() and (tmp_path / "judged/samples").is_dir()
    assert not (tmp_path / ".osctl").exists()


def test_what_cannot_be_judged_is_one_line(trained: Osctl, tmp_path: Path) -> None:
    assert "no such stage; it has stage1, stage2" in trained("eval", "stage9", expect=2).stderr
    assert "goes with a checkpoint's folder" in trained("eval", "stage1", "--out", "x", expect=2).stderr
    nothing = trained("eval", "stage1", "--set", "stage1.evaluate=null", "--set", "stage1.prompts=[]", expect=2).stderr
    assert "neither prompts nor `evaluate`" in nothing and "stage1 --set 'stage1.evaluate={kind: digits, frames: 8}'" in nothing
    never = Osctl(write(tmp_path / "recipe", stages=1))
    assert "nothing is committed to judge. Make it with: osctl launch" in never("eval", expect=4).stderr
