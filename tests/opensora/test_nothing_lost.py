"""What a stage leaves out of its data is said before its first step, in the run directory and in its report; beyond a limit it refuses."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gang
import pytest
from hard_prompts import HARD
from PIL import Image

from opensora import train
from opensora.checkpoint import reader as checkpoint
from opensora.config import StageConfig, read_stage, write_stage
from opensora.dataset.usage import LEFT_OUT
from opensora.encode import main as encode
from opensora.training.run_directory import RunDirectory
from opensora.training.trainer import DrainRequest

Stages = Callable[..., StageConfig]
Runs = Callable[..., RunDirectory]


def folder_of(path: Path, good: int, gone: int, caption: str = "a plain box") -> Path:
    path.mkdir()
    rows = [("path", "text")]
    for number in range(good):
        Image.new("RGB", (16, 16), (20 * number, 0, 0)).save(path / f"{number}.png")
        rows.append((f"{number}.png", caption))
    rows += [(f"gone{number}.png", "nothing") for number in range(gone)]
    with (path / "captions.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    return path


def in_process(run: RunDirectory) -> dict[str, Any]:
    train.run_reported(run, DrainRequest())
    content: dict[str, Any] = json.loads((run.path / "result.json").read_text())
    return content


def told(run: RunDirectory) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((run.path / "clips.json").read_text())
    return content


def test_what_is_left_out_or_cut_stands_in_the_run_directory_and_in_the_report(tiny_stage: Stages, make_run: Runs, tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "clips", 4, 3, "one two three four five six seven")
    stage = tiny_stage(data={"source": {"kind": "folder", "path": str(folder)}}, steps=2)
    run = make_run(stage)
    ended = in_process(run)
    assert ended["status"] == "completed"
    left_out, cut, *of_the_source = ended["remarks"]
    assert left_out.startswith("3 of 7 clips are left out: 3 (gone0.png, gone1.png, gone2.png): No such file")
    assert "cut at 5 words: 4 of 4" in cut
    assert told(run)["sentences"] == ended["remarks"] and told(run)["remarks"] == of_the_source
    assert (told(run)["clips"], told(run)["used"], told(run)["captions_cut"]) == (7, 4, 4)
    with (run.path / "left-out.csv").open(newline="") as file:
        assert [row[0] for row in csv.reader(file)] == ["path", "gone0.png", "gone1.png", "gone2.png"]
    again = make_run(tiny_stage(data={"source": {"kind": "folder", "path": str(folder)}}, steps=3, checkpoint={"every_steps": 1}))
    os.environ["OSCTL_LATENTS"] = str(run.path / "latents")
    try:
        assert in_process(again)["remarks"] == ended["remarks"], "a stage that finds its cache says the same"
    finally:
        del os.environ["OSCTL_LATENTS"]


def test_a_stage_that_uses_everything_says_nothing(tiny_stage: Stages, make_run: Runs) -> None:
    run = make_run(tiny_stage(steps=1))
    assert "remarks" not in in_process(run)
    assert told(run)["sentences"] == [] and not (run.path / "left-out.csv").exists()


def test_a_stage_refuses_when_too_much_is_left_out_and_names_all_of_it(tiny_stage: Stages, make_run: Runs, tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "clips", 4, 5)
    data = {"source": {"kind": "folder", "path": str(folder)}}
    run = make_run(tiny_stage(data=data, steps=2))
    ended = in_process(run)
    assert (ended["status"], ended["class"], ended["step"]) == ("failed", "data", 0)
    assert "5 of 9 clips are left out" in ended["reason"] and LEFT_OUT in ended["reason"] and "gone0.png" in ended["reason"]
    assert len((run.path / "left-out.csv").read_text().splitlines()) == 6
    assert not (run.path / "metrics.jsonl").exists(), "not a step, and no init, was paid for"
    allowed = make_run(tiny_stage(data=data | {"max_left_out": 0.6}, steps=2))
    assert in_process(allowed)["status"] == "completed"


def test_a_stage_that_has_begun_goes_on_whatever_the_limit_says(tiny_stage: Stages, make_run: Runs, tmp_path: Path) -> None:
    """A release without the limit may have begun it."""
    data = {"source": {"kind": "folder", "path": str(folder_of(tmp_path / "clips", 4, 5))}}
    first = make_run(tiny_stage(data=data | {"max_left_out": 1.0}, steps=2))
    assert in_process(first)["status"] == "completed"
    resumed = make_run(tiny_stage(data=data, steps=2), resume=checkpoint.directory(first.checkpoints, 1))
    ended = in_process(resumed)
    assert ended["status"] == "completed" and "5 of 9 clips are left out" in ended["remarks"][0]


def test_encoding_ahead_refuses_in_the_same_words(tiny_stage: Stages, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = {"source": {"kind": "folder", "path": str(folder_of(tmp_path / "clips", 4, 5))}}
    write_stage(tiny_stage(data=data), tmp_path / "stage.yaml")
    assert encode([str(tmp_path / "stage.yaml"), str(tmp_path / "cache")]) == 1
    assert "5 of 9 clips are left out" in (said := capsys.readouterr().err) and "raise data.max_left_out" in said
    write_stage(tiny_stage(data=data | {"max_left_out": 1.0}), tmp_path / "stage.yaml")
    assert encode([str(tmp_path / "stage.yaml"), str(tmp_path / "cache")]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["clips"], result["skipped"]) == (4, 5) and "5 of 9" in result["remarks"][0]


def test_a_prompt_that_cannot_be_drawn_costs_its_own_clip_alone(tiny_stage: Stages, make_run: Runs) -> None:
    first = make_run(tiny_stage(steps=1))
    assert in_process(first)["status"] == "completed"
    hard = [f"{prompt} unknown{number}" for number, prompt in enumerate(HARD[:6]) if "\ud800" not in prompt]
    prompts = ["a digit 3 moving left", *hard, "a digit 4"]
    run = make_run(tiny_stage(steps=1, prompts=prompts), resume=checkpoint.directory(first.checkpoints, 1))
    ended = in_process(run)
    assert ended["status"] == "completed"
    drawn = json.loads((run.samples / "samples.json").read_text())["clips"]
    assert [clip["prompt"] for clip in drawn] == [prompts[0], prompts[-1]]
    assert {path.name for path in run.samples.iterdir()} == {*(clip["file"] for clip in drawn), "sheet.png", "samples.json"}
    assert len(ended["warnings"]) == 4 and "the sample of prompt 1 (" in ended["warnings"][0] and "unknown word" in ended["warnings"][0]
    assert f"samples of {len(hard) - 3} more prompts were not delivered" in ended["warnings"][-1]


def test_a_stage_file_keeps_every_prompt(tiny_stage: Stages, tmp_path: Path) -> None:
    prompts = [*(prompt for prompt in HARD if "\ud800" not in prompt), "\x1b[2J", "\x07\x85\u2028\u202e\ufeff", "[b]x[/b] :smile:"]
    write_stage(tiny_stage(prompts=prompts), tmp_path / "stage.yaml")
    assert list(read_stage(tmp_path / "stage.yaml").prompts) == prompts


SLOW_TO_WRITE = """
import os, sys, time
from opensora import train
from opensora.checkpoint.writer import Saver
wait = Saver.wait
def slow(self, *arguments):
    if os.environ["RANK"] == "1":
        time.sleep(3)
    wait(self, *arguments)
Saver.wait = slow
code = train.main([sys.argv[1]])
assert code == 0, code
os._exit(0)
"""


@pytest.mark.long
@pytest.mark.parametrize("prompts", [[], ["a digit 3"]], ids=["nothing is shown", "a sample is drawn"])
def test_who_waits_for_another_to_save_stands_still_for_a_save(prompts: list[str], tiny_stage: Stages, make_run: Runs) -> None:
    """With nothing to draw and nothing to judge, 13 device-seconds of a gang stood under `evaluate`: the wait of each rank for the last
    one's files."""
    run = make_run(tiny_stage(steps=1, prompts=prompts, evaluate=None))
    gang.run(2, "-c", SLOW_TO_WRITE, str(run.path), timeout=90)
    lines = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    spent = {
        phase: sum(line["end"] - line["start"] for line in lines if line.get("phase") == phase) for phase in ("checkpoint", "evaluate")
    }
    assert spent["checkpoint"] > 2
    assert sum(line.get("phase") == "checkpoint" for line in lines) > 2, "it is booked as it goes on, so that its agent is heard"
    assert ("evaluate" in [line.get("phase") for line in lines]) == bool(prompts)
    beats = [json.loads(path.read_text()) for path in run.path.glob("heartbeat-*.json")]
    assert prompts or {beat["phase"] for beat in beats} == {"checkpoint"}
