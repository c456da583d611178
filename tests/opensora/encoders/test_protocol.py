"""Laws of a stage's encoders: whole files or none, the right ones or none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from opensora.config import StageConfig
from opensora.data.digits import DigitClips
from opensora.data.source import Clips, open_clips
from opensora.encoders.protocol import (
    AUTOENCODER_FILE,
    TEXT_FILE,
    PatchAutoencoder,
    WordEncoder,
    build,
    copy_encoders,
    decode_clips,
    encode_clips,
    load,
    null_caption,
    padded,
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
    assert torch.equal(words.encode(["a digit 3 moving up"])[0], text.encode(["a digit 3 moving up"])[0])


def test_a_stage_keeps_the_encoders_it_is_given_and_adds_its_words(tmp_path: Path) -> None:
    first = stage(data={"source": {"kind": "digits", "clips": 50}, "frames": 1, "height": 16, "width": 16})
    for encoder in build(first, clips(first), None):
        encoder.save(tmp_path)
    WordEncoder(("fox",), 12, 6).save(tmp_path)
    later = stage(data={"source": {"kind": "digits", "clips": 50}, "frames": 8, "height": 32, "width": 32})
    autoencoder, text = build(later, clips(later), tmp_path)
    assert torch.equal(autoencoder.encode(frames(3)), PatchAutoencoder.load(tmp_path / AUTOENCODER_FILE).encode(frames(3)))
    assert len(text.encode(["fox moving left"])[0]) == 3


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


def test_padding_is_zero_and_masked_and_no_longer_than_the_longest() -> None:
    vectors, mask = padded([torch.ones(1, 3), torch.ones(4, 3), torch.ones(2, 3)])
    assert vectors.shape == (3, 4, 3)
    assert mask.tolist() == [[True, False, False, False], [True] * 4, [True, True, False, False]]
    assert torch.equal(vectors[..., 0].bool(), mask)


def test_embedded_words_have_no_null_caption_of_their_own() -> None:
    assert null_caption(WordEncoder(("one",), 8, 4), 4, 8) is None
    with pytest.raises(ConfigError, match=r"caption_width is 9.*8"):
        null_caption(WordEncoder(("one",), 8, 4), 4, 9)
