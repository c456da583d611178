"""Laws of the embedded encoders: closed form, bit for bit, and no silent word."""

from __future__ import annotations

import pytest
import torch

from opensora.config import DataConfig, DigitsSource
from opensora.data.digits import DigitClips
from opensora.embedded_encoders import PatchAutoencoder, WordEncoder
from opensora.errors import ConfigError


def frames(count: int = 400, seed: int = 0) -> torch.Tensor:
    data = DataConfig(source=DigitsSource(kind="digits", clips=count), frames=1, height=16, width=16)
    return DigitClips(data, seed=seed).read(0, count)[0][:, 0].permute(0, 3, 1, 2)


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


def test_more_channels_than_a_patch_has_values_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"49.*48"):
        PatchAutoencoder.fit([frames()], 4, 49)


def test_a_word_has_one_vector_wherever_it_stands_and_however_the_vocabulary_grows() -> None:
    small = WordEncoder(("digit", "left"), 16, 4)
    large = small.extended(["A cat, moving LEFT!"])
    two, one = large.encode(["digit left", "left"])
    assert two.shape == (2, 16) and one.shape == (1, 16)
    assert torch.equal(two[1], one[0])
    assert torch.equal(small.encode(["left"])[0], one)
    assert not torch.equal(two[0], two[1])


def test_words_of_any_script_are_words() -> None:
    encoder = WordEncoder((), 8, 5).extended(["Ein Fuß läuft", "一个 数字"])
    assert [len(vectors) for vectors in encoder.encode(["fuss läuft", "数字"])] == [2, 1]


def test_an_unknown_word_is_named_with_the_vocabulary() -> None:
    with pytest.raises(ConfigError, match=r"unknown word 'dragon'.*digit, left"):
        WordEncoder(("digit", "left"), 4, 4).encode(["digit dragon"])


def test_a_caption_without_words_is_refused() -> None:
    with pytest.raises(ConfigError, match="no words"):
        WordEncoder(("digit",), 4, 4).encode(["..."])


def test_longer_captions_are_cut() -> None:
    (vectors,) = WordEncoder(("a", "b", "c"), 4, 2).encode(["a b c"])
    assert torch.equal(vectors, WordEncoder(("a", "b"), 4, 2).encode(["a b"])[0])
