"""Laws of the embedded encoders: closed form, bit for bit, and no silent word."""

from __future__ import annotations

import re
import tarfile
import unicodedata
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from opensora.config import DataConfig, DigitsSource
from opensora.data.digits import DigitClips
from opensora.encoders.embedded import PatchAutoencoder, WordEncoder
from opensora.encoders.files import TEXT_FILE, about
from opensora.errors import ConfigError, ParentError


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
    assert [len(vectors) for vectors in encoder.encode(["fuss läuft", "数字"])] == [2, 2]
    assert encoder.length("ein zwei drei vier fünf sechs") == 6, "of all words, known or not, cut or not"


def test_a_caption_saved_on_macos_and_a_prompt_typed_on_linux_are_the_same_vectors() -> None:
    composed, decomposed = (unicodedata.normalize(form, "un café chaud") for form in ("NFC", "NFD"))
    encoder = WordEncoder((), 8, 5).extended([decomposed])
    assert torch.equal(encoder.encode([composed])[0], encoder.encode([decomposed])[0]) and len(encoder.vocabulary) == 3


# What 0.1.0 wrote: `split_words` of then was re.findall(r"\\w+", caption.casefold())
OLD = ["a digit 3 moving left", "Ein Fuß läuft", "लड़की हिन्दी", unicodedata.normalize("NFD", "un café"), "一只猫"]


def test_a_vocabulary_of_an_earlier_release_keeps_its_words_and_its_vectors(tmp_path: Path) -> None:
    vocabulary = sorted({word for caption in OLD for word in re.findall(r"\w+", caption.casefold())})
    vectors = torch.randn(len(vocabulary), 8, generator=torch.Generator().manual_seed(0))
    save_file({"vectors": vectors}, tmp_path / TEXT_FILE, about(kind="words", vocabulary=vocabulary, tokens=9))
    written = (tmp_path / TEXT_FILE).read_bytes()
    encoder = WordEncoder.load(tmp_path / TEXT_FILE)
    for caption, found in zip(OLD, encoder.encode(OLD), strict=True):
        rows = [vocabulary.index(word) for word in re.findall(r"\w+", caption.casefold())]
        assert torch.equal(found, vectors[rows])
    encoder.save(tmp_path)
    assert (tmp_path / TEXT_FILE).read_bytes() == written
    grown = encoder.extended(["लड़का"])
    assert set(grown.vocabulary) - set(vocabulary) == set(re.findall(r"\w+", "लड़का")) - set(vocabulary), "it goes on with its own split"


def test_a_new_vocabulary_says_how_it_was_split(tmp_path: Path) -> None:
    encoder = WordEncoder((), 8, 9).extended(["लड़की", "लड़का"])
    encoder.save(tmp_path)
    again = WordEncoder.load(tmp_path / TEXT_FILE)
    assert torch.equal(again.encode(["लड़की"])[0], encoder.encode(["लड़की"])[0]) and again.version == encoder.version == 2
    save_file(load_file(tmp_path / TEXT_FILE), tmp_path / TEXT_FILE, about(kind="words", vocabulary=encoder.vocabulary, tokens=9, split=3))
    with pytest.raises(ParentError, match=r"version 3, this release knows 1 and 2"):
        WordEncoder.load(tmp_path / TEXT_FILE)


def test_an_unknown_word_is_named_with_the_vocabulary() -> None:
    with pytest.raises(ConfigError, match=r"unknown word 'dragon'.*digit, left"):
        WordEncoder(("digit", "left"), 4, 4).encode(["digit dragon"])


def test_a_caption_without_words_is_refused() -> None:
    with pytest.raises(ConfigError, match="no words"):
        WordEncoder(("digit",), 4, 4).encode(["..."])


def test_longer_captions_are_cut() -> None:
    assert WordEncoder(("a", "b", "c"), 4, 2).cut(["a", "a b", "a b c", "a, b..."]) == [False, False, True, False]
    (vectors,) = WordEncoder(("a", "b", "c"), 4, 2).encode(["a b c"])
    assert torch.equal(vectors, WordEncoder(("a", "b"), 4, 2).encode(["a b"])[0])


def test_the_vocabulary_in_a_checkpoint_of_0_1_0_gives_the_vectors_that_lie_there(tmp_path: Path) -> None:
    ledger = Path(__file__).parents[2] / "ledgers/0.1.0.tar.xz"
    with tarfile.open(ledger) as archive:
        members = [member for member in archive if member.name.endswith(TEXT_FILE)]
        for member in members:
            found = archive.extractfile(member)
            assert found is not None
            written = found.read()
            (tmp_path / TEXT_FILE).write_bytes(written)
            encoder, vectors = WordEncoder.load(tmp_path / TEXT_FILE), load_file(tmp_path / TEXT_FILE)["vectors"]
            assert encoder.version == 1
            words = encoder.vocabulary[: encoder.tokens]
            assert torch.equal(encoder.encode([" ".join(words).upper()])[0], vectors[: len(words)])
            again = encoder.extended([" ".join(words)])
            again.save(tmp_path)
            assert (tmp_path / TEXT_FILE).read_bytes() == written
    assert members
