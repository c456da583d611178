from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import av
import pytest
import torch

from opensora import checkpoint, sample
from opensora.config import StageConfig
from opensora.errors import ParentError

PROMPTS = ("a digit 3 moving left", "a digit 7 moving up", "a digit 0 moving down")


@pytest.fixture
def trained(tiny_stage: Callable[..., StageConfig], complete: Callable[..., Path]) -> Path:
    return complete(tiny_stage(data={"frames": 4}, optimizer={"warmup_steps": 0, "lr": 0.1}))


@pytest.fixture
def sampler(trained: Path) -> sample.Sampler:
    return sample.Sampler.open(trained, device=torch.device("cpu"))


def test_a_clip_does_not_depend_on_the_clips_beside_it(sampler: sample.Sampler) -> None:
    together = sampler.generate(PROMPTS, 4, [10, 11, 12])
    alone = torch.cat([sampler.generate([prompt], 4, [seed]) for prompt, seed in zip(PROMPTS, (10, 11, 12), strict=True)])
    assert together.shape == (3, 4, 16, 16, 3) and together.dtype == torch.uint8
    # the last bit of a matrix product may differ with its height, and then a rounding to a byte
    assert (together.int() - alone.int()).abs().max() <= 1
    assert torch.equal(together, sampler.generate(PROMPTS, 4, [10, 11, 12]))
    assert torch.equal(together, sample.draw(sampler, PROMPTS, 4, [10, 11, 12], batch=3))


def test_seed_prompt_and_guidance_each_matter(sampler: sample.Sampler) -> None:
    base = sampler.generate(PROMPTS[:1], 4, [1])
    assert not torch.equal(base, sampler.generate(PROMPTS[:1], 4, [2]))
    assert not torch.equal(base, sampler.generate(PROMPTS[1:2], 4, [1]))
    sampler.sampling = sampler.sampling.model_copy(update={"guidance": 1.0})
    assert not torch.equal(base, sampler.generate(PROMPTS[:1], 4, [1]))


def test_the_average_is_what_is_sampled(trained: Path, sampler: sample.Sampler) -> None:
    before = sampler.generate(PROMPTS[:1], 4, [1])
    shutil.copyfile(trained / "ema.safetensors", trained / "model.safetensors")
    again = sample.Sampler.open(trained, device=torch.device("cpu"))
    assert torch.equal(before, again.generate(PROMPTS[:1], 4, [1]))


def test_weights_serve_other_numbers_of_frames(sampler: sample.Sampler) -> None:
    assert sampler.generate(PROMPTS[:1], 6, [1]).shape == (1, 6, 16, 16, 3)


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


@pytest.mark.parametrize(
    ("arguments", "fact"),
    [
        (["--prompt", "a digit 3 moving sideways", "--out", "x.mp4"], "sideways"),
        (["--prompt", "a digit 3", "--out", "x.gif"], "x.gif"),
        (["--prompt", "a digit 3", "--prompt", "a digit 4", "--out", "x.mp4"], "2 given"),
        (["--prompt", "a digit 3", "--out", "nowhere/x.mp4"], "nowhere"),
        (["--prompt", "a digit 3", "--out", "x.mp4", "--frames", "0"], "--frames 0"),
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


def test_weights_that_do_not_fit_are_refused(trained: Path, tiny_stage: Callable[..., StageConfig], sampler: sample.Sampler) -> None:
    weights = checkpoint.load(trained, "ema")
    del weights["null_caption"]
    other = sample.Sampler(sampler.stage, weights, sampler.autoencoder, sampler.text, device=torch.device("cpu"))
    with pytest.raises(ParentError, match="null_caption"):
        other.generate(PROMPTS[:1], 4, [1])
