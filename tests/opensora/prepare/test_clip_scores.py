"""Scores are what CLIP and the head say, layer by layer. The models are tiny and random, of their real classes: only plumbing is proved."""

from __future__ import annotations

import io
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from doc_commands import commands_of
from PIL import Image
from safetensors.torch import save_file
from tiny_models import WIDTH, clip, layers

from opensora.dataset.rows import Quarantine
from opensora.errors import ConfigError
from opensora.prepare.clip_scores import HEAD, Scorer


def jpeg(seed: int) -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (40, 60, 3), dtype=np.uint8)).save(out, "jpeg")
    return out.getvalue()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def scorer(folder: Path) -> Scorer:
    return Scorer(folder)


def test_scores_are_the_models_own_numbers(scorer: Scorer, folder: Path) -> None:
    from transformers import CLIPModel, CLIPProcessor

    model, processor = CLIPModel.from_pretrained(folder).eval(), CLIPProcessor.from_pretrained(folder)
    pictures = [Image.open(io.BytesIO(jpeg(seed))) for seed in (1, 2)]
    with torch.no_grad():
        whole = model(**processor(text=["a box moves"], images=pictures, return_tensors="pt", padding=True))
        head = layers()
        vectors = whole.image_embeds
        for name in ("layers.0", "layers.2", "layers.10"):
            vectors = vectors @ head[f"{name}.weight"].T + head[f"{name}.bias"]
    found = scorer.score([jpeg(1), jpeg(2)], "a box moves")
    assert found["clip"] == pytest.approx(float((whole.image_embeds @ whole.text_embeds.T).mean()), abs=1e-5)
    assert found["aesthetic"] == pytest.approx(float(vectors.mean()), abs=1e-5)


def test_a_clip_without_a_caption_has_no_clip_score_and_a_long_one_is_cut(scorer: Scorer) -> None:
    assert scorer.score([jpeg(1)], " ").keys() == {"aesthetic"}
    assert -1 <= scorer.score([jpeg(1)], "word " * 1000)["clip"] <= 1
    with pytest.raises(Quarantine, match="frame cannot be read"):
        scorer.score([b"no picture"], "x")
    with pytest.raises(Quarantine, match="no frames"):
        scorer.score([], "x")


def copied(folder: Path, to: Path, **head: torch.Tensor) -> Path:
    to.mkdir()
    for file in folder.iterdir():
        if file.name != HEAD:
            (to / file.name).write_bytes(file.read_bytes())
    if head:
        save_file(head, to / HEAD)
    return to


def test_a_folder_without_its_parts_is_refused_and_no_pickle_is_opened(folder: Path, tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (tmp_path / "opened",)

    with pytest.raises(ConfigError, match=r"none: no CLIP model with its processor can be loaded"):
        Scorer(tmp_path / "none")
    bare = copied(folder, tmp_path / "bare")
    with pytest.raises(ConfigError, match=r"no aesthetic\.safetensors \(there is none\)"):
        Scorer(bare)
    (bare / "sac+logos+ava1-l14-linearMSE.pth").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(ConfigError, match=r"sac\+logos\+ava1-l14-linearMSE\.pth may be it, but is a pickle, which is never opened"):
        Scorer(bare)
    (bare / "model.safetensors").rename(bare / "pytorch_model.bin")
    (bare / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(ConfigError, match="no CLIP model"):
        Scorer(bare)
    assert not (tmp_path / "opened").exists()


@pytest.mark.parametrize(
    ("head", "says"),
    [
        ({"weight": torch.ones(1, WIDTH + 1)}, rf"a layer of \(1, {WIDTH + 1}\) numbers, {WIDTH} go into it"),
        ({"weight": torch.ones(2, WIDTH)}, "gives 2 numbers, a score is one"),
        ({"bias": torch.ones(1)}, "gives no numbers, a score is one"),
    ],
)
def test_a_head_of_another_model_is_refused(folder: Path, tmp_path: Path, head: dict[str, torch.Tensor], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        Scorer(copied(folder, tmp_path / "other", **head))


def test_the_linear_head_is_one_layer_without_a_number(folder: Path, tmp_path: Path) -> None:
    one = Scorer(copied(folder, tmp_path / "linear", weight=torch.zeros(1, WIDTH), bias=torch.full((1,), 5.5)))
    assert one.score([jpeg(1)], "")["aesthetic"] == 5.5
    (tmp_path / "linear" / HEAD).write_bytes(b"damaged")
    with pytest.raises(ConfigError, match=r"aesthetic\.safetensors: cannot be read"):
        Scorer(tmp_path / "linear")


@pytest.mark.long
def test_the_command_of_docs_datasets_md_writes_a_published_head_anew(folder: Path, tmp_path: Path) -> None:
    place = copied(folder, tmp_path / "published")
    torch.save(layers(), place / "sac+logos+ava1-l14-linearMSE.pth")
    [command] = commands_of("docs/datasets.md", "tests/opensora/prepare/test_clip_scores.py")
    env = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    subprocess.run(["bash", "-ec", command], cwd=place, env=env, check=True, timeout=100)
    assert Scorer(place).score([jpeg(1)], "") == Scorer(folder).score([jpeg(1)], "")
