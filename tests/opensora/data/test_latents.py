"""Laws of the latent cache: made once, whole or absent, one for everything it depends on."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from opensora.config import StageConfig
from opensora.data.latents import FILE, Prepared, prepare
from opensora.data.source import open_clips
from opensora.encoders import AUTOENCODER_FILE, TEXT_FILE, encode_clips
from opensora.errors import ConfigError, DiskFull, ParentError


def stage(**changes: Any) -> StageConfig:
    plain: dict[str, Any] = {
        "model": {"depth": 1, "width": 16, "heads": 2, "latent_channels": 8, "caption_width": 12, "caption_tokens": 6},
        "objective": {"kind": "flow"},
        "data": {"source": {"kind": "digits", "clips": 300}, "frames": 4, "height": 16, "width": 16},
        "autoencoder": {"kind": "patch"},
        "text": {"kind": "words"},
        "steps": 1,
        "batch_size": 1,
        "checkpoint": {"every_steps": 1},
        "sampling": {"method": "euler"},
    }
    return StageConfig.model_validate(plain | changes)


def files(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_the_cache_holds_what_the_encoders_say_of_every_clip(tmp_path: Path) -> None:
    prepared = Prepared.open(prepare(stage(), tmp_path))
    clips = open_clips(stage().data, stage().seed)
    frames, _ = clips.read(0, 300)
    assert prepared.latents.shape == (300, 8, 4, 4, 4)
    assert torch.allclose(prepared.latents, encode_clips(prepared.autoencoder, frames), atol=1e-5)
    assert [prepared.captions[row] for row in prepared.caption_of] == clips.captions
    vectors, mask = prepared.text.encode(clips.captions, 6)
    assert torch.equal(prepared.vectors[prepared.caption_of], vectors)
    assert torch.equal(prepared.mask[prepared.caption_of], mask)
    assert 0.8 < prepared.latents.std() < 1.2


def test_the_cache_is_made_once_and_the_same_bits_each_time(tmp_path: Path) -> None:
    directory = prepare(stage(), tmp_path / "one")
    made = directory.stat().st_mtime_ns
    assert prepare(stage(), tmp_path / "one") == directory
    assert directory.stat().st_mtime_ns == made
    again = prepare(stage(), tmp_path / "two")
    assert (again.name, files(again)) == (directory.name, files(directory))
    assert [path.name for path in (tmp_path / "one").iterdir()] == [directory.name]


def test_what_the_cache_depends_on_has_a_cache_of_its_own(tmp_path: Path) -> None:
    base = stage().model_dump()
    variants = [
        stage(),
        stage(seed=7),
        stage(data={**base["data"], "frames": 2}),
        stage(data={**base["data"], "source": {"kind": "digits", "clips": 299}}),
        stage(data={**base["data"], "source": {"kind": "digits", "clips": 300, "quality": "high"}}),
        stage(model={**base["model"], "latent_channels": 6}),
        stage(model={**base["model"], "caption_tokens": 5}),
        stage(model={**base["model"], "caption_width": 8}),
    ]
    first = prepare(stage(), tmp_path)
    names = {prepare(variant, tmp_path).name for variant in variants} | {prepare(stage(), tmp_path, carried=first).name}
    assert len(names) == len(variants) + 1
    assert prepare(stage(steps=5, optimizer={"lr": 1e-3}), tmp_path) == first  # what it does not depend on


@pytest.mark.parametrize("name", [FILE, AUTOENCODER_FILE, TEXT_FILE])
@pytest.mark.parametrize("damage", ["truncated", "empty", "missing"])
def test_a_cache_that_is_not_whole_is_refused_by_ranks_and_built_again(tmp_path: Path, name: str, damage: str) -> None:
    directory = prepare(stage(), tmp_path)
    before = files(directory)
    file = directory / name
    if damage == "missing":
        file.unlink()
    else:
        file.write_bytes(before[name][:-4] if damage == "truncated" else b"")
    with pytest.raises(DiskFull, match="not whole"):
        Prepared.open(directory)
    assert files(prepare(stage(), tmp_path)) == before


def test_leftovers_of_a_killed_builder_do_not_count(tmp_path: Path) -> None:
    directory = prepare(stage(), tmp_path / "good")
    partial = tmp_path / "new" / f".{directory.name}.99999.partial"
    shutil.copytree(directory, partial)
    (partial / FILE).write_bytes(b"half")
    assert files(prepare(stage(), tmp_path / "new")) == files(directory)


def test_a_later_stage_encodes_with_the_encoders_of_its_checkpoint(tmp_path: Path) -> None:
    first = prepare(stage(), tmp_path)
    later = stage(data={"source": {"kind": "digits", "clips": 40, "quality": "high"}, "frames": 2, "height": 32, "width": 32})
    prepared = Prepared.open(prepare(later, tmp_path, carried=first))
    assert (prepared.directory / AUTOENCODER_FILE).read_bytes() == (first / AUTOENCODER_FILE).read_bytes()
    assert prepared.latents.shape == (40, 8, 2, 8, 8)


def test_a_resume_trains_on_the_same_bits(tmp_path: Path) -> None:
    first = Prepared.open(prepare(stage(), tmp_path / "first"))
    resumed = Prepared.open(prepare(stage(), tmp_path / "resumed", carried=first.directory))
    for name in ("latents", "caption_of", "vectors", "mask"):
        assert torch.equal(getattr(first, name), getattr(resumed, name))


def test_what_cannot_be_judged_is_refused_before_anything_is_trained(tmp_path: Path) -> None:
    data = {"source": {"kind": "folder", "path": str(tmp_path)}, "frames": 4, "height": 16, "width": 16}
    with pytest.raises(ConfigError, match="folder: only digits"):
        prepare(stage(data=data, evaluate={"kind": "digits", "frames": 4}), tmp_path)


def test_a_checkpoint_without_encoders_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "parent").mkdir()
    with pytest.raises(ParentError, match=AUTOENCODER_FILE):
        prepare(stage(), tmp_path / "cache", carried=tmp_path / "parent")


def test_an_unknown_word_of_a_prompt_is_said_before_anything_is_trained(tmp_path: Path) -> None:
    prepare(stage(prompts=("a digit 3 moving left",)), tmp_path)
    with pytest.raises(ConfigError, match="'dragon'"):
        prepare(stage(prompts=("a dragon 3",)), tmp_path)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_a_manifest_is_refused_at_run_time(tmp_path: Path) -> None:
    source = {"kind": "manifest", "path": "clips.csv", "clips": 366_000}
    with pytest.raises(ConfigError, match="can be planned but not trained on"):
        prepare(stage(data={"source": source, "frames": 4, "height": 16, "width": 16}), tmp_path)


def test_clips_that_cannot_be_read_are_left_out_and_kept_count_of(tmp_path: Path) -> None:
    from PIL import Image

    folder = tmp_path / "pictures"
    folder.mkdir()
    for index in range(3):
        Image.fromarray(np.full((40, 40, 3), 60 * index + 40, np.uint8)).save(folder / f"{index}.png")
    (folder / "1.png").write_bytes(b"broken")
    (folder / "captions.csv").write_text("path,text\n0.png,dark\n1.png,grey\n2.png,bright\n")
    pictures = stage(data={"source": {"kind": "folder", "path": str(folder)}, "frames": 1, "height": 16, "width": 16})
    prepared = Prepared.open(prepare(pictures, tmp_path / "cache"))
    assert (len(prepared), list(prepared.skipped)) == (2, ["1.png"])
    assert [prepared.captions[row] for row in prepared.caption_of] == ["dark", "bright"]
    (folder / "0.png").write_bytes(b"broken")
    (folder / "2.png").unlink()
    with pytest.raises(ConfigError, match="none of 3 clips"):
        prepare(pictures, tmp_path / "cache")
