"""Laws of the last step: what a preparation encodes is what the stages train on, in all of them, and nothing is encoded twice."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from opensora.config import StageConfig
from opensora.dataset.manifest import DataManifest, Row
from opensora.encoders import protocol as encoders
from opensora.errors import ConfigError, DataError
from opensora.latents.cache import prepare
from opensora.latents.prepared import INDEX, Prepared
from opensora.prepare.encode import PARENTS, encode

CLIPS = 12


def stage(height: int = 16, **changes: Any) -> StageConfig:
    plain: dict[str, Any] = {
        "model": {"depth": 1, "width": 16, "heads": 2, "latent_channels": 8, "caption_width": 12, "caption_tokens": 6},
        "objective": {"kind": "flow"},
        "data": {"source": {"kind": "digits", "clips": 300}, "frames": 1, "height": height, "width": 16},
        "autoencoder": {"kind": "patch"},
        "text": {"kind": "words"},
        "steps": 1,
        "batch_size": 2,
        "prompts": ("a word that no caption has",),
        "evaluate": {"kind": "digits", "frames": 1},
        "checkpoint": {"every_steps": 1},
        "sampling": {"method": "euler"},
    }
    return StageConfig.model_validate(plain | changes)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """A data set as the other steps leave it."""
    folder = tmp_path / "out"
    (folder / "clips").mkdir(parents=True)
    draw, lines = np.random.default_rng(0), ["path,text"]
    for number in range(CLIPS):
        Image.fromarray(draw.integers(0, 255, (32, 32, 3), np.uint8)).save(folder / "clips" / f"{number}.png")
        lines.append(f"clips/{number}.png,a thing {number % 3}")
    (folder / "captions.csv").write_text("\n".join(lines) + "\n")
    return folder


def recorded(folder: Path) -> DataManifest:
    rows = [line.split(",") for line in (folder / "captions.csv").read_text().splitlines()[1:]]
    found = [(path, text, (folder / path).read_bytes()) for path, text in rows]
    return DataManifest(tuple(Row(path, text, len(data), hashlib.sha256(data).hexdigest()) for path, text, data in found))


def written(folder: Path, **stages: StageConfig) -> dict[str, Path]:
    folder.mkdir(exist_ok=True)
    for name, config in stages.items():
        (folder / f"{name}.yaml").write_text(json.dumps(config.model_dump(mode="json")))
    return {name: folder / f"{name}.yaml" for name in stages}


def on(folder: Path, config: StageConfig) -> StageConfig:
    """As `osctl launch --data` makes it."""
    source = {"kind": "folder", "path": str(folder)}
    return StageConfig.model_validate(
        config.model_dump() | {"data": config.data.model_dump() | {"source": source}, "prompts": (), "evaluate": None}
    )


def train(folder: Path, cache: Path, checkpoints: Path, *stages: StageConfig) -> list[Path]:
    """The caches that trainings use one after the other, each from its parent's checkpoint."""
    used, parent = [], None
    for number, config in enumerate(stages):
        used.append(prepare(on(folder, config), cache, parent, recorded=recorded(folder)))
        parent = checkpoints / str(number)
        parent.mkdir(parents=True)
        encoders.copy_encoders(used[-1], parent)
    return used


def test_each_stage_of_a_chain_trains_on_what_was_encoded_and_encodes_nothing(out: Path, tmp_path: Path) -> None:
    sizes = (stage(16), stage(32), stage(32, seed=5))
    encode(out, written(tmp_path / "stages", one=sizes[0], two=sizes[1], three=sizes[2]))
    moved = shutil.copytree(out, tmp_path / "moved")
    used = train(moved, tmp_path / "cache", tmp_path / "checkpoints", *sizes)
    assert {path.parent for path in used} == {moved / "latents"}
    assert used[1] == used[2], "the same clips by the same encoders"
    assert len(list((moved / "latents").iterdir())) == 2
    assert not (tmp_path / "cache").exists()


def test_what_is_encoded_already_stays_and_counts_as_done(out: Path, tmp_path: Path) -> None:
    stages, told = written(tmp_path / "stages", one=stage(16), two=stage(32)), []
    encode(out, stages, lambda done, total: told.append((done, total)))
    assert (told[-1], told == sorted(told)) == ((2 * CLIPS, 2 * CLIPS), True)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    told.clear()
    encode(out, stages, lambda done, total: told.append((done, total)))
    assert told == [(CLIPS, 2 * CLIPS), (2 * CLIPS, 2 * CLIPS)]
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before


def test_a_child_takes_the_encoders_of_its_parent_whatever_the_order_of_the_names(out: Path, tmp_path: Path) -> None:
    stages = written(tmp_path / "stages", a=stage(32), b=stage(16), c=stage(16))
    (tmp_path / "stages" / PARENTS).write_text(json.dumps({"b": None, "a": "b", "c": None}))
    encode(out, stages)
    used = train(out, tmp_path / "cache", tmp_path / "checkpoints", stage(16), stage(32))
    assert {path.parent for path in used} == {out / "latents"}
    assert len(list((out / "latents").iterdir())) == 2, "b and c are the same"
    (tmp_path / "stages" / PARENTS).write_text(json.dumps({"b": "a", "a": "b", "c": None}))
    with pytest.raises(ConfigError, match="a, b are each other's parents"):
        encode(out, stages)
    (tmp_path / "stages" / PARENTS).write_text("{")
    with pytest.raises(ConfigError, match=PARENTS):
        encode(out, stages)


def test_a_stage_that_these_clips_do_not_suit_is_said_with_its_name(out: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^encode for films: data\.source: none of 12 clips can be used"):
        encode(out, written(tmp_path / "stages", films=stage(data=stage().data.model_dump() | {"frames": 4})))
    (out / "clips" / "3.png").write_bytes(b"broken")
    with pytest.raises(DataError, match=r"^encode for strict: .*1 of 12 clips"):
        encode(out, written(tmp_path / "stages", strict=stage(data=stage().data.model_dump() | {"max_left_out": 0.01})))


def test_without_stages_nothing_is_encoded(out: Path) -> None:
    encode(out, {})
    assert not (out / "latents").exists()


def test_a_cache_that_was_cut_is_encoded_again(out: Path, tmp_path: Path) -> None:
    stages = written(tmp_path / "stages", one=stage())
    encode(out, stages)
    (index,) = out.glob(f"latents/*/{INDEX}")
    (index.parent / "bucket-0.safetensors").write_bytes(b"half")
    encode(out, stages)
    assert (index.parent / "bucket-0.safetensors").stat().st_size > len(b"half")
    assert len(Prepared.open(index.parent, on(out, stage()))) > 0
