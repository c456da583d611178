"""Laws of `python -m opensora.evaluate`: a checkpoint alone gives the readings that its stage gave, and nothing else is written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from opensora import evaluate
from opensora.config import StageConfig, write_stage
from opensora.training.run_directory import RunDirectory

Stages = Callable[..., StageConfig]
JUDGED = {"evaluate": {"kind": "digits", "clips": 12, "frames": 4, "held_out_clips": 10}, "prompts": ["a digit 3"]}


def test_a_checkpoint_alone_gives_the_readings_of_its_stage(
    tiny_stage: Stages, complete: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = complete(tiny_stage(**JUDGED))
    run = RunDirectory(checkpoint.parents[1], rank=0)
    at_the_end = json.loads((run.path / "result.json").read_text())["evaluation"]
    capsys.readouterr()
    assert evaluate.main([str(checkpoint), "--out", str(tmp_path / "out")]) == 0
    result = json.loads(capsys.readouterr().out)
    assert json.loads((tmp_path / "out" / evaluate.RESULT).read_text()) == result
    assert at_the_end.items() <= result["readings"].items() and "digit_accuracy" in at_the_end
    assert {"held_out_loss", "held_out_loss_t9", "image_held_out_loss"} <= result["readings"].keys()
    assert "held_out_loss_parent" not in result["readings"] and result["warnings"] == []
    mine, of_stage = tmp_path / "out" / "samples", run.samples
    assert {path.name: path.read_bytes() for path in mine.iterdir()} == {path.name: path.read_bytes() for path in of_stage.iterdir()}


def test_other_settings_and_the_parent_are_read_from_files(tiny_stage: Stages, complete: Callable[..., Path], tmp_path: Path) -> None:
    parent = complete(tiny_stage(steps=1))
    child = complete(tiny_stage(data={"frames": 4}, steps=20, optimizer={"warmup_steps": 0, "decay": "constant"}), parent=parent)
    asked = tiny_stage(data={"frames": 4}, steps=20, **JUDGED)
    write_stage(asked, tmp_path / "stage.yaml")
    found = evaluate.evaluate(child, tmp_path / "a", stage=evaluate.stage_of(tmp_path / "stage.yaml"), parent=parent)["readings"]
    assert isinstance(found, dict)
    assert found["clips"] == 12 and found["held_out_gain"] == pytest.approx(found["held_out_loss_parent"] - found["held_out_loss"])
    assert found["held_out_gain_low"] > 0, "twenty steps lower the loss on clips that were never trained on"
    same = evaluate.evaluate(child, tmp_path / "b", stage=asked, parent=child)["readings"]
    assert isinstance(same, dict) and same["held_out_gain"] == same["held_out_gain_low"] == 0
    assert same["held_out_loss"] == found["held_out_loss"]


@pytest.mark.parametrize(
    ("stage", "fact"),
    [
        (None, "neither prompts nor `evaluate`"),
        ("missing.yaml", "no such file"),
        ({"model": {"depth": 3}, **JUDGED}, "weights to sample from"),
    ],
)
def test_what_cannot_be_judged_is_one_line(
    stage: object, fact: str, tiny_stage: Stages, complete: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [str(complete(tiny_stage(steps=1))), "--out", str(tmp_path / "out")]
    if isinstance(stage, dict):
        write_stage(tiny_stage(**stage), tmp_path / "other.yaml")
        stage = "other.yaml"
    if stage is not None:
        words.append(f"--stage={tmp_path / str(stage)}")
    capsys.readouterr()
    assert evaluate.main(words) in (1, 2)
    *_, line = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and fact in line
    assert not (tmp_path / "out" / evaluate.RESULT).exists()
