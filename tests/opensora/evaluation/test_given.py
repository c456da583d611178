"""Frames that a person gives come back in the clip: `--first-frame`, `--last-frame`, `--extend`, `--loop`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from opensora import api, sample
from opensora.config import StageConfig
from opensora.encoders.protocol import decode_clips, encode_clips
from opensora.errors import ConfigError
from opensora.evaluation import given
from opensora.evaluation.given import Asked
from opensora.evaluation.video_files import write_mp4

PROMPT = "a digit 3 moving left"
MASKS = {"first_frame": 0.3, "both_quarters": 0.3}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for name in ("first.png", "last.png"):
        coarse = rng.integers(0, 256, (4, 4, 3), np.uint8)
        Image.fromarray(coarse.repeat(4, 0).repeat(4, 1)).save(folder / name)
    Image.fromarray(rng.integers(0, 256, (30, 60, 3), np.uint8)).save(folder / "wide.jpg")
    clip = torch.arange(0, 240, 30, dtype=torch.uint8)[:, None, None, None].expand(8, 16, 16, 3)
    write_mp4(folder / "grey.mp4", clip.contiguous(), fps=8)
    (folder / "text.txt").write_text("no picture")
    return {path.name: path for path in folder.iterdir()}


@pytest.fixture(params=[None, MASKS], ids=["untrained", "trained"])
def model(request: pytest.FixtureRequest, tiny_stage: Callable[..., StageConfig], complete: Callable[..., Path]) -> api.Model:
    return api.load(complete(tiny_stage(data={"frames": 4}, optimizer={"warmup_steps": 0, "lr": 0.1}, masks=request.param)))


def as_the_autoencoder_has_it(model: api.Model, path: Path) -> Tensor:
    pixels = torch.from_numpy(np.array(Image.open(path)))
    autoencoder = model.sampler.autoencoder
    return decode_clips(autoencoder, encode_clips(autoencoder, pixels[None, None]))[0, 0]


def test_given_frames_come_back_and_lead_the_others(model: api.Model, pictures: dict[str, Path]) -> None:
    first, last = pictures["first.png"], pictures["last.png"]
    free, begun, between = (
        api.generate(PROMPT, model, frames=6, **how)
        for how in ({}, {"first_frame": first}, {"first_frame": first, "last_frame": str(last)})
    )
    for clip, ends in ((begun, ((0, first),)), (between, ((0, first), (-1, last)))):
        for place, path in ends:
            wanted = as_the_autoencoder_has_it(model, path).int()
            assert (torch.from_numpy(clip.frames[place]).int() - wanted).abs().max() <= 1
        assert not np.array_equal(clip.frames[1:-1], free.frames[1:-1])
    assert between.facts()["last_frame"] == {"file": "last.png", "sha256": between.given["last_frame"]["sha256"]}
    again = api.generate_many([PROMPT] * 3, model, seeds=[0, 1, 2], frames=6, first_frame=first)
    assert np.abs(again[0].frames.astype(int) - begun.frames).max() <= 1, "a clip does not depend on its batch"


def test_a_video_goes_on_behind_its_own_frames(model: api.Model, pictures: dict[str, Path]) -> None:
    path = pictures["grey.mp4"]
    read = given.read(Asked(extend=path), 8, (16, 16), 8.0, 1)
    assert len(read.before) == 8 and read.taken == 2 and read.which.tolist() == [True, True, *[False] * 6]
    assert torch.equal(read.pixels[:2], read.before[-2:])
    longer = api.generate(PROMPT, model, frames=8, extend=path)
    assert longer.frames.shape == (8 + 6, 16, 16, 3) and np.array_equal(longer.frames[:8], read.before.numpy())
    half = given.read(Asked(extend=path), 8, (16, 16), 4.0, 1)
    assert torch.equal(half.before, read.before[::2]), "a video is taken at the rate of the clip"
    assert len(given.read(Asked(extend=pictures["wide.jpg"]), 8, (16, 16), 8.0, 1).before) == 1, "a picture is a video of one frame"


def test_a_loop_leads_back_to_its_beginning(model: api.Model) -> None:
    sampler = model.sampler
    seen: list[Any] = []
    once = sampler._ends_of

    def watched(drawn: Tensor, share: int) -> Any:
        seen.append((drawn, once(drawn, share)))
        return seen[-1][1]

    sampler._ends_of = watched  # type: ignore[method-assign]
    steps: list[tuple[int, int]] = []
    (clip,) = api.generate_many([PROMPT], model, seeds=[0], frames=8, loop=True, on_step=lambda *of: steps.append(of))
    ((drawn, held),) = seen
    assert torch.equal(held.clean[:, :, :2], drawn[:, :, -2:]) and torch.equal(held.clean[:, :, -2:], drawn[:, :, :2])
    assert held.given.tolist() == [[True, True, *[False] * 4, True, True]] and held.learned == (model.stage.masks is not None)
    assert len(clip.frames) == 12 == sampler.loop_frames(8) and clip.facts()["loop"] is True
    assert np.array_equal(clip.frames[:8], api.generate(PROMPT, model, frames=8).frames)
    assert steps[-1] == (4, 4) and [done for done, _ in steps] == [0, 1, 2, 3, 4], "the bar counts both clips"


@pytest.mark.parametrize(
    ("arguments", "fact"),
    [
        (["--first-frame", "nowhere.png"], "--first-frame nowhere.png: No such file or directory"),
        (["--first-frame", "text.txt"], "--first-frame text.txt: cannot be decoded"),
        (["--extend", "text.txt"], "give a video that can be read"),
        (["--extend", "grey.mp4", "--loop"], "--extend grey.mp4: does not go with a loop"),
        (["--extend", "grey.mp4", "--first-frame", "first.png"], "--first-frame first.png: the clip begins with the end of grey.mp4"),
        (["--first-frame", "first.png", "--frames", "1"], "the clip has 1 frames and all are given; ask for more frames"),
        (["--loop", "--frames", "2"], "--loop of 2 frames: too short"),
    ],
)
def test_what_cannot_be_given_is_one_line_and_exit_2(
    arguments: list[str],
    fact: str,
    pictures: dict[str, Path],
    tiny_stage: Callable[..., StageConfig],
    complete: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    trained = complete(tiny_stage(data={"frames": 4}, masks=MASKS, steps=1))
    monkeypatch.chdir(pictures["text.txt"].parent)
    out = tmp_path / "x.mp4"
    assert sample.main([str(trained), "--prompt", PROMPT, "--out", str(out), *arguments]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1 and fact in said and not out.exists()


def test_the_command_says_what_was_given_and_that_a_model_never_saw_such(
    model: api.Model, pictures: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "x.gif"
    assert sample.main([str(model.path), "--prompt", PROMPT, "--out", str(out), "--first-frame", str(pictures["wide.jpg"])]) == 0
    assert ("was not trained with given frames" in capsys.readouterr().err) == (model.stage.masks is None)
    assert json.loads(out.with_name("x.gif.json").read_text())["first_frame"]["file"] == "wide.jpg"
    with pytest.raises(ConfigError, match="no such folder"):
        api.load(tmp_path / "nowhere")
