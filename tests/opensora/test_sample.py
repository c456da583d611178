from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from PIL import Image

from opensora import sample
from opensora.config import StageConfig
from opensora.evaluation.saved_model import open_model

PROMPTS = ("a digit 3 moving left", "a digit 7 moving up", "a digit 0 moving down")


@pytest.fixture
def trained(tiny_stage: Callable[..., StageConfig], complete: Callable[..., Path]) -> Path:
    return complete(tiny_stage(data={"frames": 4}, optimizer={"warmup_steps": 0, "lr": 0.1}))


def test_the_command_needs_the_checkpoint_directory_alone(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    moved = tmp_path / "elsewhere"
    shutil.move(trained, moved)
    shutil.rmtree(trained.parent.parent)
    out = tmp_path / "three.mp4"
    assert sample.main([str(moved), "--prompt", PROMPTS[0], "--out", str(out), "--frames", "6", "--steps", "3", "--guidance", "1"]) == 0
    assert capsys.readouterr().out == f"{out}\n"
    with av.open(str(out)) as video:
        assert sum(1 for _ in video.decode(video=0)) == 6
    sheet = tmp_path / "sheet.png"
    assert sample.main([str(moved), "--prompt", PROMPTS[0], "--prompt", PROMPTS[1], "--out", str(sheet), "--seed", "5"]) == 0
    assert sheet.read_bytes().startswith(b"\x89PNG")


def test_words_that_the_model_never_saw_are_said(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kept = open_model(trained, torch.device("cpu")).text.tokens
    prompt = " ".join(["left"] * kept + ["zebra"] * 3)
    assert sample.main([str(trained), "--prompt", prompt, "--prompt", PROMPTS[0], "--out", str(tmp_path / "x.png")]) == 0
    (said,) = capsys.readouterr().err.splitlines()
    assert f"{kept + 3} words, the model saw at most {kept}" in said and "the last 3" in said


@pytest.mark.parametrize(
    ("arguments", "fact"),
    [
        (["--prompt", "a digit 3 moving sideways", "--out", "x.mp4"], "sideways"),
        (["--prompt", "a digit 3", "--out", "x.avi"], "x.avi: its name ends in none of .mp4, .gif, .png"),
        (["--prompt", "a digit 3", "--out", "x.mp4", "--height", "1000000", "--width", "1000000"], "GB are free"),
        (["--prompt", "a digit 3", "--prompt", "a digit 4", "--out", "x.gif"], "2 given"),
        (["--out", "x.mp4"], "no prompt is given"),
        (["--prompts", "nowhere.txt", "--out", "x.png"], "nowhere.txt"),
        (["--prompt", "a digit 3", "--out", "x.mp4", "--height", "16"], "--height 16: without width"),
        (["--prompt", "a digit 3", "--out", "x.mp4", "--height", "18", "--width", "16"], "--height 18: not a multiple of"),
        (["--prompt", "a digit 3", "--out", "x.mp4", "--sampler", "ddim"], "--sampler ddim: does not fit a model of flow"),
        (["--prompt", "a digit 3", "--out", "x.mp4", "--fps", "0"], "--fps 0"),
        (["--prompt", "a digit 3", "--out", "x.mp4", "--guidance-rescale", "2"], "--guidance-rescale"),
        (["--prompt", "a digit 3", "--out", "x.mp4", "--guidance-interval", "0.8,0.2"], "0.8 to 0.2"),
        (["--prompt", "a digit 3", "--out", "x.mp4", "--guidance-interval", "0.8"], "--guidance-interval 0.8: not two numbers"),
        (["--prompt", "a digit 3", "--prompt", "a digit 4", "--out", "x.mp4"], "2 given"),
        (["--prompt", "a digit 3", "--out", "nowhere/x.mp4"], "nowhere"),
        (["--prompt", "a digit 3", "--out", "x.mp4", "--frames", "0"], "--frames 0"),
        (["--prompt", "", "--out", "x.mp4"], "prompt '': it is empty; say what to draw"),
        (["--prompt", "a digit 3", "--prompt", " ", "--out", "drawn"], "it is empty"),
        (["--prompt", "a digit " * 10_000, "--out", "x.mp4"], "80,000 characters, more than 20,000"),
        (["--prompt", "a\x07digit", "--out", "x.mp4"], "\\x07 is no text"),
        (["--prompt", "赤い四角", "--out", "x.mp4"], "赤い四角"),
        (["--prompt", "a digit 3", "--out", "x.mp4", "--negative", ""], "--negative '': it is empty"),
        (
            ["--prompt", "a digit 3", "--out", "x.mp4", "--guidance", "1", "--negative", "a digit 8"],
            "--negative a digit 8: has no effect at guidance 1",
        ),
        (["--prompt", "a digit 3", "--out", "x.mp4", "--devices", "65"], "--devices 65: not from 1 to 64"),
    ],
)
def test_a_wrong_command_is_one_line_and_exit_2(
    arguments: list[str], fact: str, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert sample.main([str(trained), *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1 and fact in captured.err


def test_a_broken_checkpoint_is_one_line_and_exit_1(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (trained / "ema.safetensors").unlink()
    assert sample.main([str(trained), "--prompt", PROMPTS[0], "--out", str(tmp_path / "x.mp4")]) == 1
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1 and "ema.safetensors" in captured.err
    assert not (tmp_path / "x.mp4").exists()


def test_a_folder_gets_a_video_for_each_prompt_and_each_says_what_it_was_drawn_from(trained: Path, tmp_path: Path) -> None:
    prompts, out = tmp_path / "prompts.txt", tmp_path / "drawn"
    prompts.write_text(f"{PROMPTS[0]}\n\n{PROMPTS[1]}\n")
    size = ["--height=24", "--width=32", "--frames=2", "--fps=12", "--sampler=heun", "--steps=2"]
    size += ["--guidance-interval=0.1,0.8", "--guidance-rescale=0.5"]
    size += ["--negative", PROMPTS[2]]
    assert sample.main([str(trained), "--prompts", str(prompts), "--out", str(out), "--seed", "5", *size, "--about", '{"run": "a1"}']) == 0
    first, second = sorted(out.glob("*.mp4"))
    assert (first.name, second.name) == ("0-a-digit-3-moving-left.mp4", "1-a-digit-7-moving-up.mp4")
    beside = json.loads(second.with_name(f"{second.name}.json").read_text())
    wanted: dict[str, Any] = {"prompt": PROMPTS[1], "negative": PROMPTS[2], "seed": 6, "sampler": "heun", "steps": 2}
    wanted |= {"frames": 2, "height": 24, "width": 32, "guidance_interval": [0.1, 0.8], "guidance_rescale": 0.5}
    assert beside == beside | wanted | {"fps": 12.0, "run": "a1", "schema": 1}
    with av.open(str(second)) as video:
        assert video.metadata["title"] == PROMPTS[1] and json.loads(video.metadata["comment"]) | {"schema": 1} == beside
        assert video.streams.video[0].average_rate == 12


def test_what_cannot_be_written_is_said_before_anything_is_drawn(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sample.api, "generate_many", lambda *_, **__: pytest.fail("it was drawn"))
    for out in ("/proc/x.mp4", "/proc/drawn/"):
        assert sample.main([str(trained), "--prompt", PROMPTS[0], "--out", out]) == 1
        said = capsys.readouterr().err
        assert said.startswith(f"error: --out {out}: ") and said.count("\n") == 1


def test_a_new_folder_in_which_nothing_came_to_lie_is_removed(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert sample.main([str(trained), "--prompt", "a zebra", "--out", str(tmp_path / "drawn")]) == 2
    assert not (tmp_path / "drawn").exists()


def test_an_interrupted_write_leaves_no_half_file(trained: Path, tmp_path: Path) -> None:
    """SIGTERM arrives while the video is written."""
    program = f"""
import os, runpy, signal, sys
from opensora import api
real = api.write_mp4
def write_mp4(path, *of):
    real(path, *of)
    assert path.stat().st_size > 0
    os.kill(os.getpid(), signal.SIGTERM)
api.write_mp4 = write_mp4
sys.argv = ["sample", {str(trained)!r}, "--prompt", {PROMPTS[0]!r}, "--out", {str(tmp_path / "drawn")!r}]
runpy.run_module("opensora.sample", run_name="__main__")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 143 and done.stderr == "" and not (tmp_path / "drawn").exists()


@pytest.mark.long
def test_devices_share_a_clip_and_end_with_the_command(trained: Path, tmp_path: Path) -> None:
    """Real processes: the one that is typed, and those beside it."""

    def drawn(name: str, *words: str) -> tuple[subprocess.CompletedProcess[str], Path]:
        out = tmp_path / name
        command = [sys.executable, "-m", "opensora.sample", str(trained), "--frames=5", "--out", str(out), *words]
        return subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=120), out

    done, out = drawn("two.png", "--prompt", PROMPTS[0], "--devices=2")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{out}\n", "")
    one = tmp_path / "one.png"
    assert sample.main([str(trained), "--frames=5", "--prompt", PROMPTS[0], "--out", str(one)]) == 0
    ours, theirs = (np.asarray(Image.open(path)).astype(int) for path in (out, one))
    assert np.abs(ours - theirs).max() <= 1
    done, out = drawn("zebra.png", "--prompt", "a zebra", "--devices=2")
    assert done.returncode == 2 and "zebra" in done.stderr and done.stderr.count("\n") == 1 and not out.exists()


def test_the_same_values_draw_the_same_file(trained: Path, tmp_path: Path) -> None:
    files = [tmp_path / "a.gif", tmp_path / "b.gif"]
    for path in files:
        assert sample.main([str(trained), "--prompt", PROMPTS[0], "--out", str(path), "--seed", "3"]) == 0
    assert files[0].read_bytes() == files[1].read_bytes() and files[0].read_bytes().startswith(b"GIF89a")


def test_what_is_drawn_is_kept_though_a_later_prompt_cannot_be(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sample.api, "AT_ONCE", 2)
    prompts = [word for prompt in (*PROMPTS, "a zebra") for word in ("--prompt", prompt)]
    assert sample.main([str(trained), *prompts, "--out", str(tmp_path / "drawn")]) == 2
    assert "zebra" in capsys.readouterr().err
    assert [path.name[0] for path in sorted((tmp_path / "drawn").glob("*.mp4"))] == ["0", "1"]
    assert len(list((tmp_path / "drawn").iterdir())) == 4, "a video and its .json each, and nothing half"
