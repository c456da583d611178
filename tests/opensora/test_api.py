"""What a notebook may count on: an example that runs, results that save themselves, and nothing of the process changed."""

from __future__ import annotations

import asyncio
import doctest
import json
import logging
import os
import random
import signal
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch

from opensora import api, export
from opensora.checkpoint import reader as checkpoint
from opensora.config import StageConfig
from opensora.errors import ConfigError, ParentError
from opensora.training.run_directory import RunDirectory

Stages = Callable[..., StageConfig]
Runs = Callable[..., RunDirectory]
VIDEO = {"frames": 4}
PROMPT = "a digit 3 moving left"


@pytest.fixture
def trained(tiny_stage: Stages, complete: Callable[..., Path]) -> Path:
    return complete(tiny_stage(data=VIDEO, optimizer={"warmup_steps": 0, "lr": 0.1}))


def test_the_example_of_the_docstring_runs(tiny_stage: Stages, make_run: Runs) -> None:
    (example,) = doctest.DocTestFinder().find(api, "api", globs={"run_dir": make_run(tiny_stage(data=VIDEO)).path})[:1]
    assert len(example.examples) == 7
    assert doctest.DocTestRunner().run(example) == (0, 7)


def state_of_the_process() -> dict[str, Any]:
    """All that a library may change behind the back of whoever calls it."""
    return {
        "torch's numbers": torch.get_rng_state().tolist(),
        "numpy's numbers": repr(np.random.get_state()),
        "Python's numbers": random.getstate(),
        "type": torch.get_default_dtype(),
        "device": torch.get_default_device(),
        "threads": torch.get_num_threads(),
        "gradients": torch.is_grad_enabled(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "folder": Path.cwd(),
        "environment": dict(os.environ),
        "signals": [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)],
        "handlers": list(logging.getLogger().handlers),
    }


def test_nothing_of_the_process_is_changed(tiny_stage: Stages, make_run: Runs, tmp_path: Path) -> None:
    torch.set_num_threads(2)  # not what the command takes
    try:
        before = state_of_the_process()
        result = api.train(make_run(tiny_stage(data=VIDEO, prompts=[PROMPT], steps=2)).path)
        api.generate(PROMPT, api.load(result.checkpoint)).save(tmp_path / "clip.mp4")
        after = state_of_the_process()
    finally:
        torch.set_num_threads(1)
    assert [name for name in before if before[name] != after[name]] == []


def test_a_stage_drains_and_goes_on_to_the_same_weights_as_the_command(tiny_stage: Stages, make_run: Runs, trained: Path) -> None:
    run = make_run(tiny_stage(data=VIDEO, optimizer={"warmup_steps": 0, "lr": 0.1}))
    (run.path / "drain").touch()
    first = api.train(run.path)
    assert (first.status, first.step, first.checkpoint.name) == ("drained", 1, "step-00000001")
    second = api.train(run.path)
    assert (second.status, second.step) == ("completed", 4)
    assert json.loads((run.path / "result.json").read_bytes())["status"] == "completed"
    for name in ("model", "ema", "optimizer"):
        assert (second.checkpoint / f"{name}.safetensors").read_bytes() == (trained / f"{name}.safetensors").read_bytes()


def test_a_stage_that_fails_raises_its_class_and_reports_it(tiny_stage: Stages, make_run: Runs, trained: Path) -> None:
    run = make_run(tiny_stage(data=VIDEO, optimizer={"lr": 0.5}), resume=trained)
    with pytest.raises(ParentError, match=r"optimizer\.lr was 0\.1, is 0\.5"):
        api.train(run.path)
    assert json.loads((run.path / "result.json").read_bytes())["class"] == "parent"


def test_a_clip_says_what_it_was_drawn_from_and_saves_itself(trained: Path, tmp_path: Path) -> None:
    model = api.load(str(trained))
    clip = api.generate(PROMPT, model, seed=5, frames=6, steps=3, guidance=1.5)
    assert clip.frames.shape == (6, 16, 16, 3) and clip.frames.dtype == np.uint8
    assert (clip.prompt, clip.seed, clip.steps, clip.guidance, clip.fps, clip.note) == (PROMPT, 5, 3, 1.5, 8.0, None)
    again = api.generate(clip.prompt, model, seed=clip.seed, frames=len(clip.frames), steps=clip.steps, guidance=clip.guidance)
    assert np.array_equal(clip.frames, again.frames)
    with av.open(str(clip.save(tmp_path / "clip.mp4"))) as video:
        assert sum(1 for _ in video.decode(video=0)) == 6 and video.streams.video[0].average_rate == 8
    assert clip.save(str(tmp_path / "clip.png")).read_bytes().startswith(b"\x89PNG")
    long = api.generate(" ".join([PROMPT] * 3), model)
    assert long.note is not None and "15 words" in long.note


def test_a_clip_plays_at_the_rate_that_its_training_clips_were_taken_at(trained: Path, tiny_stage: Stages) -> None:
    model = api.load(trained)
    at_24 = api.Model(model.path, tiny_stage(data={**VIDEO, "fps": 24.0}), model.device, model.sampler)
    assert api.generate(PROMPT, at_24).fps == 24.0


def test_an_export_draws_the_frames_of_its_checkpoint(trained: Path, tmp_path: Path) -> None:
    export.export(trained, tmp_path / "exported")
    ours, theirs = (api.generate(PROMPT, api.load(path), seed=3) for path in (trained, tmp_path / "exported"))
    assert ours.frames.std() > 10 and np.array_equal(ours.frames, theirs.frames)
    (tmp_path / "exported" / "tokenizer" / "words.json").write_text("{")
    with pytest.raises(ParentError, match="export the checkpoint again"):
        api.load(tmp_path / "exported")


@pytest.mark.parametrize(
    ("asked", "fact"),
    [
        ({"seed": -1}, "seed -1"),
        ({"seed": 2**63}, "seed 9223372036854775808"),
        ({"frames": 0}, "frames 0"),
        ({"steps": 0}, "steps 0"),
        ({"guidance": -1.0}, "guidance -1.0"),
        ({"guidance": float("nan")}, "guidance nan"),
        ({"prompt": "a digit 3 moving sideways"}, "sideways"),
    ],
)
def test_a_wrong_value_is_refused_with_its_name(asked: dict[str, Any], fact: str, trained: Path) -> None:
    with pytest.raises(ConfigError, match=fact):
        api.generate(**{"prompt": PROMPT, "model": api.load(trained), **asked})


def test_what_is_no_model_is_refused(tmp_path: Path, trained: Path) -> None:
    with pytest.raises(ConfigError, match="no such folder"):
        api.load(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=f"holds neither {checkpoint.RECORD}"):
        api.load(tmp_path / "empty")
    clip = api.generate(PROMPT, api.load(trained))
    for name in ("clip.avi", "nowhere/clip.mp4"):
        with pytest.raises(ConfigError, match=name):
            clip.save(tmp_path / name)


def test_threads_that_draw_from_one_model_get_what_each_would_get_alone(trained: Path) -> None:
    seeds = range(6)
    alone = [api.generate(PROMPT, api.load(trained), seed=seed).frames for seed in seeds]
    model, together = api.load(trained), threading.Barrier(len(seeds))

    def draw(seed: int) -> np.ndarray[Any, Any]:
        together.wait()
        return api.generate(PROMPT, model, seed=seed).frames

    with ThreadPoolExecutor(len(seeds)) as pool:
        assert all(np.array_equal(one, other) for one, other in zip(alone, pool.map(draw, seeds), strict=True))


def test_stages_train_at_once_in_threads_that_share_a_cache(
    tiny_stage: Stages, make_run: Runs, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of them finds no cache, and builds it: none sweeps away what another is building."""
    monkeypatch.setenv("OSCTL_LATENTS", str(tmp_path / "latents"))
    stage = tiny_stage(data=VIDEO, optimizer={"warmup_steps": 0, "lr": 0.1})
    runs, together = [make_run(stage) for _ in range(3)], threading.Barrier(3)

    def train(run: RunDirectory) -> api.Trained:
        together.wait()
        return api.train(run.path)

    with ThreadPoolExecutor(3) as pool:
        results = list(pool.map(train, runs))
    for result in results:
        assert (result.status, result.step) == ("completed", 4)
        assert (result.checkpoint / "ema.safetensors").read_bytes() == (trained / "ema.safetensors").read_bytes()


def test_an_event_loop_trains_and_draws_in_its_executor(tiny_stage: Stages, make_run: Runs) -> None:
    async def both() -> tuple[api.Trained, list[api.Clip]]:
        loop = asyncio.get_running_loop()
        result = await loop.run_in_executor(None, api.train, make_run(tiny_stage(data=VIDEO)).path)
        model = await asyncio.to_thread(api.load, result.checkpoint)
        clips = await asyncio.gather(*(asyncio.to_thread(api.generate, PROMPT, model, seed=seed) for seed in range(3)))
        return result, clips

    result, clips = asyncio.run(both())
    assert result.status == "completed" and [clip.seed for clip in clips] == [0, 1, 2]
