"""Laws of the latent cache: made once, whole or absent, one for everything it depends on, and never read once it is no longer whole."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import shutil
import socket
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open

from opensora.config import StageConfig
from opensora.data.source import open_clips
from opensora.dataset.manifest import DataManifest, Row
from opensora.encoders import protocol as encoders
from opensora.encoders.protocol import AUTOENCODER_FILE, TEXT_FILE, encode_clips
from opensora.errors import ConfigError, DataError, DiskFull, ParentError
from opensora.latents.cache import _inputs, prepare
from opensora.latents.loader import Loader
from opensora.latents.prepared import CAPTIONS, INDEX, VECTORS, Prepared

BUCKET = "bucket-0.safetensors"


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


def opened(config: StageConfig, cache: Path, carried: Path | None = None) -> Prepared:
    return Prepared.open(prepare(config, cache, carried), config)


def vectors_of(prepared: Prepared, bucket: int = 0) -> list[torch.Tensor]:
    """Token vectors of each clip's caption."""
    return [prepared.vectors[prepared.offsets[row] : prepared.offsets[row + 1]] for row in prepared.parts[bucket].caption_of]


def said(prepared: Prepared, bucket: int = 0) -> list[str]:
    return [prepared.captions[row] for row in prepared.parts[bucket].caption_of]


def pictures(folder: Path, count: int = 3) -> Path:
    """One-coloured ones, brighter and brighter, called dark, grey, bright."""
    folder.mkdir()
    for index in range(count):
        Image.fromarray(np.full((40, 40, 3), 60 * index + 40, np.uint8)).save(folder / f"{index}.png")
    rows = [f"{index}.png,{text}" for index, text in zip(range(count), ("dark", "grey", "bright"), strict=False)]
    (folder / "captions.csv").write_text("\n".join(["path,text", *rows]) + "\n")
    return folder


def files(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_the_cache_holds_what_the_encoders_say_of_every_clip(tmp_path: Path) -> None:
    prepared = opened(stage(), tmp_path)
    clips = open_clips(stage().data, stage().seed)
    frames, _ = clips.read(0, 300)
    latents = prepared.parts[0].latents
    assert latents.shape == (300, 8, 4, 4, 4)
    assert torch.allclose(latents, encode_clips(prepared.autoencoder, frames), atol=1e-5)
    assert said(prepared) == clips.captions
    assert [len(vectors) for vectors in vectors_of(prepared)] == [len(text.split()) for text in clips.captions]
    assert len(prepared.vectors) == sum(len(text.split()) for text in set(clips.captions)) + 1
    assert not prepared.vectors[-1].any()
    assert 0.8 < latents.std() < 1.2


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
    names = {prepare(variant, tmp_path).name for variant in variants}
    assert len(names) == len(variants)
    assert prepare(stage(steps=5, batch_size=3, optimizer={"lr": 1e-3}), tmp_path) == first  # what it does not depend on


def test_a_resume_uses_the_cache_that_is_there_and_other_encoders_do_not(tmp_path: Path) -> None:
    first = prepare(stage(), tmp_path)
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    encoders.copy_encoders(first, checkpoint)
    made = (first / INDEX).stat().st_mtime_ns
    assert prepare(stage(), tmp_path, carried=checkpoint) == first
    assert (first / INDEX).stat().st_mtime_ns == made
    other = prepare(stage(seed=7), tmp_path / "other")
    encoders.copy_encoders(other, checkpoint)
    assert prepare(stage(), tmp_path, carried=checkpoint) != first


# ------------------------------------------------------------------------------------------------------------------
# What is not whole
# ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [BUCKET, VECTORS, CAPTIONS, INDEX, AUTOENCODER_FILE, TEXT_FILE])
@pytest.mark.parametrize("damage", ["truncated", "empty", "missing", "longer"])
def test_a_cache_that_is_not_whole_is_refused_by_ranks_and_built_again(
    tmp_path: Path, name: str, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    directory = prepare(stage(), tmp_path)
    before = files(directory)
    file = directory / name
    if damage == "missing":
        file.unlink()
    else:
        file.write_bytes({"truncated": before[name][:-4], "empty": b"", "longer": before[name] + b"more"}[damage])
    with pytest.raises(DataError, match=f"{name}.*Start again") as error:
        Prepared.open(directory, stage())
    if name != INDEX:
        assert str(len(before[name])) in str(error.value)
        if damage != "missing":
            assert f"{len(file.read_bytes())} bytes" in str(error.value)
    with caplog.at_level(logging.WARNING):
        assert files(prepare(stage(), tmp_path)) == before
    assert name == INDEX or (f"{name}: " in caplog.text and "built again now" in caplog.text)
    Prepared.open(directory, stage())


@pytest.mark.parametrize("name", [BUCKET, VECTORS])
def test_a_shard_cut_while_it_is_mapped_ends_as_a_data_error_with_both_sizes(tmp_path: Path, name: str) -> None:
    """Without the check the process would die of SIGBUS."""
    prepared = opened(stage(), tmp_path)
    loader = Loader(prepared, seed=0)
    loader.batch((0,))
    size = (prepared.directory / name).stat().st_size
    os.truncate(prepared.directory / name, 20000)
    with pytest.raises(DataError, match=f"{name}: 20000 bytes, the latent cache has {size} there"):
        loader.batch((1,))


def test_a_shard_that_grew_while_it_is_mapped_is_not_read_on(tmp_path: Path) -> None:
    prepared = opened(stage(), tmp_path)
    with (prepared.directory / BUCKET).open("ab") as file:
        file.write(b"more")
    with pytest.raises(DataError, match="somebody changed it"):
        Loader(prepared, seed=0).batch((0,))


def test_a_cache_that_cannot_be_built_again_says_so_with_its_cause(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = pictures(tmp_path / "pictures")
    config = stage(data={"source": {"kind": "folder", "path": str(folder)}, "frames": 1, "height": 16, "width": 16})
    directory = prepare(config, tmp_path / "cache")
    for picture in folder.glob("*.png"):  # the same sizes and dates, so the same cache; but they cannot be read any more
        kept = picture.stat()
        picture.write_bytes(bytes(kept.st_size))
        os.utime(picture, ns=(kept.st_atime_ns, kept.st_mtime_ns))
    assert prepare(config, tmp_path / "cache") == directory
    os.truncate(directory / BUCKET, 1500)
    with pytest.raises(DataError, match=r"bucket-0.safetensors: 1500 bytes.*cannot be built again: .*none of 3 clips"):
        prepare(config, tmp_path / "cache")
    assert directory.exists()


def test_a_full_disk_is_told_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DiskFull, match="latent cache cannot be written"):
        prepare(stage(), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_leftovers_of_a_killed_builder_do_not_count_and_do_not_stay(tmp_path: Path) -> None:
    directory = prepare(stage(), tmp_path / "good")
    killed = subprocess.Popen(["true"])
    killed.wait()
    names = [f".{socket.gethostname()}.{process}.partial" for process in (killed.pid, os.getpid(), os.getppid())]
    for name in names:
        partial = tmp_path / "new" / name
        shutil.copytree(directory, partial)
        (partial / BUCKET).write_bytes(b"half")
    assert files(prepare(stage(), tmp_path / "new")) == files(directory)
    assert {path.name for path in (tmp_path / "new").iterdir()} == {directory.name, names[2]}  # whose process lives, and may be building


# ------------------------------------------------------------------------------------------------------------------
# What goes in
# ------------------------------------------------------------------------------------------------------------------


def test_a_later_stage_encodes_with_the_encoders_of_its_checkpoint(tmp_path: Path) -> None:
    first = prepare(stage(), tmp_path)
    later = stage(data={"source": {"kind": "digits", "clips": 40, "quality": "high"}, "frames": 2, "height": 32, "width": 32})
    prepared = opened(later, tmp_path, carried=first)
    assert (prepared.directory / AUTOENCODER_FILE).read_bytes() == (first / AUTOENCODER_FILE).read_bytes()
    assert prepared.parts[0].latents.shape == (40, 8, 2, 8, 8)


def test_a_resume_in_another_place_trains_on_the_same_bits(tmp_path: Path) -> None:
    first = prepare(stage(), tmp_path / "first")
    resumed = prepare(stage(), tmp_path / "resumed", carried=first)
    assert first.name == resumed.name
    for name in (BUCKET, VECTORS, CAPTIONS, AUTOENCODER_FILE, TEXT_FILE):
        assert (first / name).read_bytes() == (resumed / name).read_bytes()


def test_what_cannot_be_judged_is_refused_before_anything_is_trained(tmp_path: Path) -> None:
    data = {"source": {"kind": "folder", "path": str(tmp_path)}, "frames": 4, "height": 16, "width": 16}
    with pytest.raises(ConfigError, match="folder: only digits"):
        prepare(stage(data=data, evaluate={"kind": "digits", "frames": 4}), tmp_path)


def test_a_checkpoint_without_encoders_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "parent").mkdir()
    with pytest.raises(ParentError, match=AUTOENCODER_FILE):
        prepare(stage(), tmp_path / "cache", carried=tmp_path / "parent")


def test_an_unknown_word_of_a_prompt_is_said_before_anything_is_trained(tmp_path: Path) -> None:
    assert prepare(stage(prompts=("a digit 3 moving left",)), tmp_path) == prepare(stage(), tmp_path)  # the cache is not the prompts'
    for cache in (tmp_path, tmp_path / "new"):
        with pytest.raises(ConfigError, match="'dragon'"):
            prepare(stage(prompts=("a dragon 3",)), cache)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_clips_that_cannot_be_read_are_left_out_and_kept_count_of(tmp_path: Path) -> None:
    folder = pictures(tmp_path / "pictures")
    (folder / "1.png").write_bytes(b"broken")
    config = stage(data={"source": {"kind": "folder", "path": str(folder)}, "frames": 1, "height": 16, "width": 16})
    prepared = opened(config, tmp_path / "cache")
    assert (len(prepared), list(prepared.skipped)) == (2, ["1.png"])
    assert said(prepared) == ["dark", "bright"]
    assert prepared.captions == ("bright", "dark")
    (folder / "0.png").write_bytes(b"broken")
    (folder / "2.png").unlink()
    with pytest.raises(ConfigError, match="none of 3 clips"):
        prepare(config, tmp_path / "cache")


def test_a_cache_says_the_same_of_its_data_whenever_it_is_opened(tmp_path: Path) -> None:
    folder = pictures(tmp_path / "clips")
    with (folder / "captions.csv").open("a") as rows:
        rows.write("gone.png,one two three four five six seven\n3.png,one two three four five six seven\n")
    shutil.copy(folder / "0.png", folder / "3.png")
    config = stage(data={"source": {"kind": "folder", "path": str(folder)}, "frames": 1, "height": 16, "width": 16})
    usage = opened(config, tmp_path / "cache").usage
    assert (usage.clips, usage.used, usage.left_out, usage.cut, usage.tokens) == (5, 4, 1, 1, 6)
    assert "1 of 5 clips are left out: 1 (gone.png): No such file" in usage.sentences()[0]
    assert "cut at 6 words: 1 of 4" in usage.sentences()[1]
    again = opened(config, tmp_path / "cache")
    assert again.usage == usage
    index = again.directory / INDEX
    told = json.loads(index.read_bytes())
    told["remarks"] = ["2 clips have 60 frames a second, 1 has 24"]
    index.write_text(json.dumps(told))
    assert opened(config, tmp_path / "cache").usage.sentences() == [*usage.sentences(), *told["remarks"]]


def test_a_cache_of_an_older_release_is_used_and_says_what_it_knows(tmp_path: Path) -> None:
    folder = pictures(tmp_path / "clips")
    (folder / "2.png").unlink()
    config = stage(data={"source": {"kind": "folder", "path": str(folder)}, "frames": 1, "height": 16, "width": 16})
    prepared = opened(config, tmp_path / "cache")
    index = prepared.directory / INDEX
    told = json.loads(index.read_bytes())
    for name in ("clips_named", "captions_cut", "remarks"):
        del told[name]
    index.write_text(json.dumps(told))
    made = index.stat().st_mtime_ns
    old = opened(config, tmp_path / "cache")
    assert (old.directory, index.stat().st_mtime_ns) == (prepared.directory, made)
    assert (old.usage.clips, old.usage.used, old.usage.cut) == (3, 2, None)
    assert "1 of 3 clips are left out: 1 (2.png)" in old.usage.sentences()[0]


def test_every_bucket_has_its_clips_in_its_own_size(tmp_path: Path) -> None:
    sizes = [(4, 16, 16, 2), (1, 16, 24, 4), (2, 32, 16, 1)]
    buckets = [dict(zip(("frames", "height", "width", "batch_size"), size, strict=True)) for size in sizes]
    config = stage(data={"source": {"kind": "digits", "clips": 100}, "frames": 4, "height": 16, "width": 16, "buckets": buckets})
    prepared, clips = opened(config, tmp_path), open_clips(config.data, config.seed)
    assert [part.latents.shape for part in prepared.parts] == [(34, 8, 4, 4, 4), (33, 8, 1, 4, 6), (33, 8, 2, 8, 4)]
    for number, part in enumerate(prepared.parts):
        frames, indices = clips.read(0, 100, number)
        assert indices == list(range(number, 100, 3))
        assert torch.allclose(part.latents, encode_clips(prepared.autoencoder, frames), atol=1e-5)
        assert said(prepared, number) == [clips.captions[index] for index in indices]
    loader = Loader(prepared, seed=0)
    seen, shapes = loader.start, set()
    for _ in range(6):
        shapes.add(tuple(loader.batch(seen).latents.shape))
        seen = loader.after(seen)
    assert shapes == {(2, 8, 4, 4, 4), (4, 8, 1, 4, 6), (1, 8, 2, 8, 4)}


def test_other_batch_sizes_take_the_same_cache(tmp_path: Path) -> None:
    def config(batch: int) -> StageConfig:
        buckets = [{"frames": frames, "height": 16, "width": 16, "batch_size": batch} for frames in (1, 4)]
        return stage(data={"source": {"kind": "digits", "clips": 40}, "frames": 4, "height": 16, "width": 16, "buckets": buckets})

    assert prepare(config(1), tmp_path) == prepare(config(5), tmp_path)
    assert [bucket.batch_size for bucket in opened(config(5), tmp_path).buckets] == [5, 5]


def test_a_mirrored_clip_is_encoded_from_mirrored_pixels_but_where_its_caption_names_a_side(tmp_path: Path) -> None:
    source = {"kind": "digits", "clips": 300}
    config = stage(data={"source": source, "frames": 4, "height": 16, "width": 16, "horizontal_flip": True})
    prepared, clips = opened(config, tmp_path), open_clips(config.data, config.seed)
    frames, _ = clips.read(0, 300)
    mirrored = encode_clips(prepared.autoencoder, frames.flip(3))
    own, other = prepared.parts[0].rows.T
    latents, sided = prepared.parts[0].latents, torch.tensor([text.split()[-1] in ("left", "right") for text in clips.captions])
    assert torch.allclose(latents[own], encode_clips(prepared.autoencoder, frames), atol=1e-5)
    assert torch.equal(own == other, sided)
    assert torch.allclose(latents[other[~sided]], mirrored[~sided], atol=1e-5)
    assert len(latents) == 300 + int((~sided).sum()) < 600
    drawn = [Loader(prepared, seed=0).batch((position,)) for position in range(600)]
    own_of = latents[own]
    for batch in drawn:
        index = int(batch.index)
        assert torch.equal(batch.latents[0], own_of[index]) or (not sided[index] and torch.equal(batch.latents[0], latents[other[index]]))
    assert 100 < sum(not torch.equal(batch.latents[0], own_of[int(batch.index)]) for batch in drawn) < 200  # half of the half that may be


def test_the_cache_is_a_safetensors_file_that_others_can_read(tmp_path: Path) -> None:
    prepared = opened(stage(), tmp_path)
    with safe_open(prepared.directory / BUCKET, framework="pt") as file:
        assert torch.equal(file.get_tensor("latents"), prepared.parts[0].latents)
        assert torch.equal(file.get_tensor("rows"), prepared.parts[0].rows)
    assert json.loads((prepared.directory / INDEX).read_text())["files"][BUCKET] == (prepared.directory / BUCKET).stat().st_size


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a stage says of a real AutoencoderKL and a real T5, small ones, in half types."""
    from tiny_encoders import WIDTH, make_autoencoder, make_text  # diffusers and transformers: seconds that other tests need not wait

    vae, t5 = tmp_path_factory.mktemp("vae"), tmp_path_factory.mktemp("t5")
    make_autoencoder(vae)
    make_text(t5)
    base = stage().model_dump()
    return {
        "model": {**base["model"], "latent_channels": 4, "caption_width": WIDTH, "caption_tokens": 40},
        "autoencoder": {"kind": "kl", "path": str(vae), "factor": 2, "dtype": "bf16"},
        "text": {"kind": "t5", "path": str(t5), "dtype": "bf16"},
    }


def of_pictures(folder: Path) -> dict[str, Any]:
    buckets = [{"frames": 1, "height": height, "width": width, "batch_size": 2} for height, width in ((16, 16), (16, 32))]
    return {
        "source": {"kind": "folder", "path": str(folder)},
        "frames": 1,
        "height": 16,
        "width": 16,
        "buckets": buckets,
        "horizontal_flip": True,
    }


def test_published_encoders_fill_a_cache_in_half_types_at_true_lengths(tmp_path: Path, published: dict[str, Any]) -> None:
    folder = pictures(tmp_path / "pictures")
    config = stage(data=of_pictures(folder), **published)
    prepared = opened(config, tmp_path / "cache")
    latents = prepared.parts[0].latents
    assert (latents.dtype, prepared.vectors.dtype) == (torch.float16, torch.bfloat16)
    assert [len(part) for part in prepared.parts] == [3, 0]
    assert [len(vectors) for vectors in vectors_of(prepared)] == [len(text) + 1 for text in ("dark", "grey", "bright")]  # bytes, end
    assert torch.equal(torch.cat(prepared.text.encode(prepared.captions)), prepared.vectors[:-1].float())
    batch = Loader(prepared, seed=0).batch((0, 0))
    assert (batch.latents.dtype, batch.vectors.dtype) == (torch.float32, torch.float32)


def test_what_a_posterior_draws_is_a_function_of_seed_and_clip(tmp_path: Path, published: dict[str, Any]) -> None:
    folder = pictures(tmp_path / "pictures", count=2)
    few = opened(stage(data=of_pictures(folder), **published), tmp_path / "few").parts[0]
    assert torch.equal(few.latents[few.rows[0, 0]], few.latents[few.rows[0, 1]])  # one colour, one draw: its own mirror image
    assert not torch.equal(few.latents[0], few.latents[1])
    shutil.copy(folder / "0.png", folder / "again.png")
    with (folder / "captions.csv").open("a") as file:
        file.write("again.png,dark\n")
    many = opened(stage(data=of_pictures(folder), **published), tmp_path / "many").parts[0]
    assert torch.allclose(many.latents[many.rows[:2]].float(), few.latents[few.rows].float(), atol=1e-2)
    again, first = many.latents[many.rows[2, 0]], many.latents[many.rows[0, 0]]
    assert (again - first).abs().max() > 0.1  # the same picture, another draw
    other = opened(stage(data=of_pictures(folder), seed=7, **published), tmp_path / "other").parts[0]
    assert (other.latents[0] - many.latents[0]).abs().max() > 0.1


# ------------------------------------------------------------------------------------------------------------------
# Data by content
# ------------------------------------------------------------------------------------------------------------------


def recorded(folder: Path) -> DataManifest:
    """As a launch reads it."""
    rows = [line.split(",") for line in (folder / "captions.csv").read_text().splitlines()[1:]]
    contents = [(folder / path).read_bytes() for path, _ in rows]
    found = zip(rows, contents, strict=True)
    return DataManifest(tuple(Row(path, text, len(data), hashlib.sha256(data).hexdigest()) for (path, text), data in found))


def of_folder(folder: Path) -> StageConfig:
    return stage(data={"source": {"kind": "folder", "path": str(folder)}, "frames": 1, "height": 16, "width": 16})


def test_the_same_clips_elsewhere_are_encoded_once(tmp_path: Path) -> None:
    folder = pictures(tmp_path / "clips")
    first = prepare(of_folder(folder), tmp_path / "cache", recorded=recorded(folder))
    moved = shutil.copytree(folder, tmp_path / "moved", copy_function=shutil.copyfile)
    os.utime(moved / "0.png", (1, 1))
    assert prepare(of_folder(moved), tmp_path / "cache", recorded=recorded(moved)) == first
    assert prepare(of_folder(moved), tmp_path / "cache") != first, "without a manifest dates count, as they did"


def test_a_cache_of_before_contents_were_recorded_serves_while_nothing_was_touched(tmp_path: Path) -> None:
    folder = pictures(tmp_path / "clips")
    first = prepare(of_folder(folder), tmp_path / "cache")
    assert "content" not in json.loads((first / INDEX).read_text())
    assert prepare(of_folder(folder), tmp_path / "cache", recorded=recorded(folder)) == first
    os.utime(folder / "0.png", (1, 1))
    assert prepare(of_folder(folder), tmp_path / "cache", recorded=recorded(folder)) != first


def test_a_cache_of_other_contents_never_serves_whatever_the_dates(tmp_path: Path) -> None:
    folder = pictures(tmp_path / "clips")
    first, date = prepare(of_folder(folder), tmp_path / "cache", recorded=recorded(folder)), (folder / "0.png").stat().st_mtime_ns
    data = bytearray((folder / "0.png").read_bytes())
    data[-1] ^= 1  # of the last chunk's checksum, which no reader needs
    (folder / "0.png").write_bytes(data)
    os.utime(folder / "0.png", ns=(date, date))
    assert prepare(of_folder(folder), tmp_path / "cache", recorded=recorded(folder)) != first


def test_clips_that_changed_since_the_launch_are_refused_row_by_row(tmp_path: Path) -> None:
    folder = pictures(tmp_path / "clips")
    then = recorded(folder)
    (folder / "1.png").write_bytes(b"longer or shorter")
    (folder / "2.png").unlink()
    with pytest.raises(DataError, match=r"other clips than at the launch, 2 rows changed \(1.png: .*, is 17 bytes; 2.png: .*unread"):
        prepare(of_folder(folder), tmp_path / "cache", recorded=then)


def test_a_cache_of_an_earlier_release_serves_where_the_words_are_the_same(tmp_path: Path) -> None:
    """Its words were cut at their marks: that is another vocabulary for Hindi, and the same one for Latin text."""

    def inputs(*captions: str) -> str:
        folder = pictures(tmp_path / captions[0], 1)
        (folder / "captions.csv").write_text(f"path,text\n0.png,{captions[0]}\n", encoding="utf-8")
        config = stage(data={"source": {"kind": "folder", "path": str(folder)}, "frames": 1, "height": 16, "width": 16})
        clips = open_clips(config.data, 0)
        return _inputs(config, clips, "the same")

    assert inputs("dark") == inputs("größer") != inputs("लड़की")


def test_a_renamed_clip_trains_on_under_the_manifest_of_before(tmp_path: Path) -> None:
    folder = pictures(tmp_path / "clips")
    then = recorded(folder)
    first = prepare(of_folder(folder), tmp_path / "cache", recorded=then)
    (folder / "1.png").rename(folder / "eins.png")
    (folder / "captions.csv").write_text((folder / "captions.csv").read_text().replace("1.png", "eins.png"))
    assert recorded(folder).digest == then.digest
    assert prepare(of_folder(folder), tmp_path / "cache", recorded=then) == first
    again = prepare(of_folder(folder), tmp_path / "another", recorded=then)
    assert len(Prepared.open(again, of_folder(folder))) == len(then.rows), "each file is checked against its own row"


def test_a_clip_of_the_same_size_that_was_replaced_after_the_look_is_never_cached_as_the_old_one(tmp_path: Path) -> None:
    folder = pictures(tmp_path / "clips")
    then, date = recorded(folder), (folder / "1.png").stat().st_mtime_ns
    data = bytearray((folder / "1.png").read_bytes())
    data[-1] ^= 1
    (folder / "1.png").write_bytes(data)
    os.utime(folder / "1.png", ns=(date, date))
    with pytest.raises(DataError, match=r"1\.png: was changed after the launch recorded it \(sha256 was [0-9a-f]{12}, is [0-9a-f]{12}\)"):
        prepare(of_folder(folder), tmp_path / "cache", recorded=then)
    assert not list((tmp_path / "cache").iterdir())
