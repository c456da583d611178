"""Laws of the embedded encoders: closed form, bit for bit, whole files or none, and no silent word."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from opensora.config import StageConfig
from opensora.data.digits import DigitClips
from opensora.data.source import Clips, open_clips
from opensora.encoders import (
    AUTOENCODER_FILE,
    TEXT_FILE,
    PatchAutoencoder,
    WordEncoder,
    build,
    copy_encoders,
    decode_clips,
    encode_clips,
    load,
)
from opensora.errors import ConfigError, ParentError


def stage(**changes: Any) -> StageConfig:
    plain: dict[str, Any] = {
        "model": {"depth": 1, "width": 16, "heads": 2, "latent_channels": 8, "caption_width": 12, "caption_tokens": 6},
        "objective": {"kind": "flow"},
        "data": {"source": {"kind": "digits", "clips": 200}, "frames": 8, "height": 16, "width": 16},
        "autoencoder": {"kind": "patch"},
        "text": {"kind": "words"},
        "steps": 1,
        "batch_size": 1,
        "checkpoint": {"every_steps": 1},
        "sampling": {"method": "euler"},
    }
    return StageConfig.model_validate(plain | changes)


def clips(config: StageConfig) -> Clips:
    return open_clips(config.data, config.seed)


def frames(count: int = 400, seed: int = 0) -> torch.Tensor:
    config = stage(data={"source": {"kind": "digits", "clips": count}, "frames": 1, "height": 16, "width": 16})
    return DigitClips(config.data, seed=seed).read(0, count)[0][:, 0].permute(0, 3, 1, 2)


def psnr(one: torch.Tensor, other: torch.Tensor) -> float:
    return float(10 * torch.log10(255**2 / (one.double() - other.double()).square().mean()))


def test_the_fit_is_the_same_bits_whatever_the_batching_and_the_order() -> None:
    whole = PatchAutoencoder.fit([frames()], 4, 8)
    parts = PatchAutoencoder.fit(list(torch.split(frames(), 37))[::-1], 4, 8)
    for name in ("mean", "components", "deviation"):
        assert torch.equal(getattr(whole, name), getattr(parts, name))


def test_the_sign_of_a_component_is_that_of_its_strongest_pixel() -> None:
    components = PatchAutoencoder.fit([frames()], 4, 12).components
    assert (components.gather(1, components.abs().argmax(1, keepdim=True)) > 0).all()


def test_latents_of_the_fitted_frames_are_uncorrelated_and_of_unit_variance_on_average() -> None:
    autoencoder = PatchAutoencoder.fit([frames()], 4, 8)
    latents = autoencoder.encode(frames()).permute(1, 0, 2, 3).flatten(1)  # (C, positions)
    variances = torch.cov(latents).diagonal()
    assert torch.allclose(torch.cov(latents), variances.diag(), atol=2e-3)
    assert variances.mean().item() == pytest.approx(1, abs=1e-3)
    assert (variances.diff() < 0).all() and variances[0] > 3 * variances[-1]  # the strongest stay the strongest
    assert latents.mean(1).abs().max() < 1e-3


def test_more_channels_lose_less_and_all_of_them_nothing() -> None:
    quality = [
        psnr(frames(seed=1), (ae := PatchAutoencoder.fit([frames()], 4, k)).decode(ae.encode(frames(seed=1)))) for k in (2, 4, 8, 12)
    ]
    assert quality == sorted(quality)
    assert quality[2] > 22  # 23.0 dB was measured for eight channels
    full = PatchAutoencoder.fit([frames()], 4, 48)
    assert (full.decode(full.encode(frames(seed=1))).int() - frames(seed=1).int()).abs().max() <= 1


def test_colours_survive_an_autoencoder_of_coloured_frames() -> None:
    generator = torch.Generator().manual_seed(0)
    coloured = torch.randint(0, 256, (64, 3, 4, 4), generator=generator, dtype=torch.uint8).repeat_interleave(4, 2).repeat_interleave(4, 3)
    autoencoder = PatchAutoencoder.fit([coloured], 4, 3)
    assert (autoencoder.decode(autoencoder.encode(coloured)).int() - coloured.int()).abs().max() <= 1


def test_clips_go_through_frame_by_frame() -> None:
    config = stage()
    autoencoder, _ = build(config, clips(config), None)
    batch, _ = clips(config).read(0, 5)
    latents = encode_clips(autoencoder, batch)
    assert latents.shape == (5, 8, 8, 4, 4)
    alone = autoencoder.encode(batch[2, 3].permute(2, 0, 1)[None])[0]
    assert torch.allclose(latents[2, :, 3], alone, atol=1e-5)
    assert decode_clips(autoencoder, latents).shape == batch.shape
    assert psnr(decode_clips(autoencoder, latents), batch) > 20


def test_more_channels_than_a_patch_has_values_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"49.*48"):
        PatchAutoencoder.fit([frames()], 4, 49)


def test_a_word_has_one_vector_wherever_it_stands_and_however_the_vocabulary_grows() -> None:
    small = WordEncoder(("digit", "left"), 16)
    large = small.extended(["A cat, moving LEFT!"])
    vectors, mask = large.encode(["digit left", "left"], 4)
    assert torch.equal(vectors[0, 1], vectors[1, 0])
    assert torch.equal(small.encode(["left"], 4)[0][0], vectors[1])
    assert mask.tolist() == [[True, True, False, False], [True, False, False, False]]
    assert not vectors[~mask].any()
    assert not torch.equal(vectors[0, 0], vectors[0, 1])


def test_words_of_any_script_are_words() -> None:
    encoder = WordEncoder((), 8).extended(["Ein Fuß läuft", "一个 数字"])
    _, mask = encoder.encode(["fuss läuft", "数字"], 5)
    assert mask.sum(1).tolist() == [2, 1]


def test_an_unknown_word_is_named_with_the_vocabulary() -> None:
    with pytest.raises(ConfigError, match=r"unknown word 'dragon'.*digit, left"):
        WordEncoder(("digit", "left"), 4).encode(["a digit dragon".replace("a ", "")], 4)


def test_a_caption_without_words_is_refused() -> None:
    with pytest.raises(ConfigError, match="no words"):
        WordEncoder(("digit",), 4).encode(["..."], 4)


def test_longer_captions_are_cut() -> None:
    vectors, mask = WordEncoder(("a", "b", "c"), 4).encode(["a b c"], 2)
    assert vectors.shape == (1, 2, 4)
    assert mask.all()


def test_what_is_saved_is_what_is_loaded(tmp_path: Path) -> None:
    config = stage()
    autoencoder, text = build(config, clips(config), None)
    autoencoder.save(tmp_path)
    text.save(tmp_path)
    copy = tmp_path / "copy"
    copy.mkdir()
    copy_encoders(tmp_path, copy)
    again, words = load(copy, config)
    batch, _ = clips(config).read(0, 3)
    assert torch.equal(encode_clips(again, batch), encode_clips(autoencoder, batch))
    assert torch.equal(words.encode(["a digit 3 moving up"], 6)[0], text.encode(["a digit 3 moving up"], 6)[0])


def test_a_stage_keeps_the_encoders_it_is_given_and_adds_its_words(tmp_path: Path) -> None:
    first = stage(data={"source": {"kind": "digits", "clips": 50}, "frames": 1, "height": 16, "width": 16})
    for encoder in build(first, clips(first), None):
        encoder.save(tmp_path)
    WordEncoder(("fox",), 12).save(tmp_path)
    later = stage(data={"source": {"kind": "digits", "clips": 50}, "frames": 8, "height": 32, "width": 32})
    autoencoder, text = build(later, clips(later), tmp_path)
    assert torch.equal(autoencoder.encode(frames(3)), PatchAutoencoder.load(tmp_path / AUTOENCODER_FILE).encode(frames(3)))
    assert text.encode(["fox moving left"], 6)[1].sum() == 3


@pytest.mark.parametrize("name", [AUTOENCODER_FILE, TEXT_FILE])
@pytest.mark.parametrize("damage", ["missing", "truncated", "of the other kind"])
def test_a_checkpoint_without_whole_encoders_is_refused_by_name(tmp_path: Path, name: str, damage: str) -> None:
    config = stage()
    for encoder in build(config, clips(config), None):
        encoder.save(tmp_path)
    file = tmp_path / name
    if damage == "missing":
        file.unlink()
    elif damage == "truncated":
        file.write_bytes(file.read_bytes()[:-8])
    else:
        file.write_bytes((tmp_path / (TEXT_FILE if name == AUTOENCODER_FILE else AUTOENCODER_FILE)).read_bytes())
    with pytest.raises(ParentError, match=name):
        load(tmp_path, config)


def test_encoders_that_do_not_fit_the_stage_are_refused_with_both_values(tmp_path: Path) -> None:
    config = stage()
    for encoder in build(config, clips(config), None):
        encoder.save(tmp_path)
    with pytest.raises(ConfigError, match=r"caption_width is 24.*12"):
        load(tmp_path, stage(model={**config.model.model_dump(), "caption_width": 24}))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"autoencoder": {"kind": "kl", "path": "vae", "factor": 8}}, "autoencoder.kind kl"),
        ({"text": {"kind": "t5", "path": "t5"}}, "text.kind t5"),
    ],
)
def test_encoders_of_a_later_release_are_refused_in_one_line(changes: dict[str, Any], says: str) -> None:
    config = stage(**changes)
    with pytest.raises(ConfigError, match=says):
        build(config, clips(config), None)
