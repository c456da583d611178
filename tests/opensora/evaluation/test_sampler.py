from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import gang
import numpy as np
import pytest
import sampling_ranks
import torch
from PIL import Image
from safetensors.torch import load_file

from opensora.checkpoint import reader as checkpoint
from opensora.config import StageConfig
from opensora.distributed.ranks import Ranks
from opensora.errors import ParentError
from opensora.evaluation.sampler import Sampler
from opensora.evaluation.saved_model import open_model

PROMPTS = ("a digit 3 moving left", "a digit 7 moving up", "a digit 0 moving down")


@pytest.fixture
def trained(tiny_stage: Callable[..., StageConfig], complete: Callable[..., Path]) -> Path:
    return complete(tiny_stage(data={"frames": 4}, optimizer={"warmup_steps": 0, "lr": 0.1}))


@pytest.fixture
def sampler(trained: Path) -> Sampler:
    return open_model(trained, torch.device("cpu"))


def test_a_clip_does_not_depend_on_the_clips_beside_it(sampler: Sampler) -> None:
    together = sampler.generate(PROMPTS, 4, [10, 11, 12])
    alone = torch.cat([sampler.generate([prompt], 4, [seed]) for prompt, seed in zip(PROMPTS, (10, 11, 12), strict=True)])
    assert together.shape == (3, 4, 16, 16, 3) and together.dtype == torch.uint8
    # the last bit of a matrix product may differ with its height, and then a rounding to a byte
    assert (together.int() - alone.int()).abs().max() <= 1
    assert torch.equal(together, sampler.generate(PROMPTS, 4, [10, 11, 12]))
    assert torch.equal(together, sampler.generate_in_batches(PROMPTS, 4, [10, 11, 12], batch=2))


def test_seed_prompt_and_guidance_each_matter(sampler: Sampler) -> None:
    base = sampler.generate(PROMPTS[:1], 4, [1])
    assert not torch.equal(base, sampler.generate(PROMPTS[:1], 4, [2]))
    assert not torch.equal(base, sampler.generate(PROMPTS[1:2], 4, [1]))
    unguided = sampler.stage.sampling.model_copy(update={"guidance": 1.0})
    assert not torch.equal(base, sampler.generate(PROMPTS[:1], 4, [1], unguided))


def test_the_average_is_what_is_sampled(trained: Path, sampler: Sampler) -> None:
    before = sampler.generate(PROMPTS[:1], 4, [1])
    shutil.copyfile(trained / "ema.safetensors", trained / "model.safetensors")
    again = open_model(trained, torch.device("cpu"))
    assert torch.equal(before, again.generate(PROMPTS[:1], 4, [1]))


def test_weights_serve_other_numbers_of_frames(sampler: Sampler) -> None:
    assert sampler.generate(PROMPTS[:1], 6, [1]).shape == (1, 6, 16, 16, 3)


@pytest.mark.parametrize("masks", [None, {"first_frame": 0.5}], ids=["untrained", "trained with given frames"])
def test_ranks_that_share_each_clip_draw_what_one_draws(
    masks: dict[str, float] | None, tiny_stage: Callable[..., StageConfig], complete: Callable[..., Path], tmp_path: Path
) -> None:
    model = complete(tiny_stage(data={"frames": 4}, optimizer={"warmup_steps": 0, "lr": 0.1}, masks=masks))
    picture = tmp_path / "picture.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 40, 3), np.uint8)).save(picture)
    alone = sampling_ranks.draw(model, picture, Ranks(0, 1, torch.device("cpu")))
    for world in (2, 3):
        gang.run(world, sampling_ranks.__file__, str(model), str(picture), str(tmp_path / f"{world}"))
        ours = load_file(tmp_path / f"{world}")
        assert (ours.pop("frames").int() - alone["frames"].int()).abs().max() <= 1
        for name, latents in ours.items():
            assert latents.shape == alone[name].shape
            assert (latents - alone[name]).abs().max() < 1e-5 * alone[name].abs().max(), (world, name)


def test_weights_that_do_not_fit_are_refused(trained: Path, tiny_stage: Callable[..., StageConfig], sampler: Sampler) -> None:
    weights = checkpoint.Reader(trained).part("ema")
    del weights["null_caption"]
    other = Sampler(sampler.stage, weights, sampler.autoencoder, sampler.text, device=torch.device("cpu"))
    with pytest.raises(ParentError, match="null_caption"):
        other.generate(PROMPTS[:1], 4, [1])
