"""Laws of published encoders: what their libraries compute, whatever the batching; found in both layouts; refused early."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from einops import rearrange
from safetensors.torch import load_file, save_file
from tiny_encoders import WIDTH, make_autoencoder, make_text

from opensora import config
from opensora.encoders.files import AUTOENCODER_FILE, TEXT_FILE
from opensora.encoders.pretrained import KLAutoencoder, T5Encoder
from opensora.encoders.protocol import digests, encode_clips, load, null_caption, padded, read
from opensora.errors import ConfigError, ParentError

TOKENS = 12
CAPTIONS = ["a cat", "", "a dog that runs for a very long time", "一只猫", "a cat"]
CPU = torch.device("cpu")


@pytest.fixture(scope="session")
def vae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vae")
    make_autoencoder(folder)
    return folder


@pytest.fixture(scope="session")
def t5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("t5")
    make_text(folder)
    return folder


def kl(path: Path | str, channels: int = 4, **changes: Any) -> KLAutoencoder:
    return KLAutoencoder(config.KLAutoencoder(kind="kl", path=str(path), **{"factor": 2} | changes), channels, CPU)


def text(path: Path | str, width: int = WIDTH, tokens: int = TOKENS, **changes: Any) -> T5Encoder:
    return T5Encoder(config.T5Encoder(kind="t5", path=str(path), **{"dtype": "fp32"} | changes), width, tokens, CPU)


def frames(count: int = 5) -> torch.Tensor:
    return torch.randint(0, 256, (count, 3, 8, 12), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)


def seeded(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def stage(vae: Path, t5: Path) -> config.StageConfig:
    return config.StageConfig.model_validate(
        {
            "model": {"depth": 1, "width": 16, "heads": 2, "latent_channels": 4, "caption_width": WIDTH, "caption_tokens": TOKENS},
            "objective": {"kind": "flow"},
            "data": {"source": {"kind": "digits", "clips": 2}, "frames": 1, "height": 8, "width": 8},
            "autoencoder": {"kind": "kl", "path": str(vae), "factor": 2},
            "text": {"kind": "t5", "path": str(t5), "dtype": "fp32"},
            "steps": 1,
            "batch_size": 1,
            "checkpoint": {"every_steps": 1},
            "sampling": {"method": "euler"},
        }
    )


# ------------------------------------------------------------------------------------------------------------------
# The autoencoder
# ------------------------------------------------------------------------------------------------------------------


def test_latents_are_those_of_diffusers(vae: Path) -> None:
    from diffusers import AutoencoderKL

    theirs, pixels = AutoencoderKL.from_pretrained(vae).eval(), frames().float() / 127.5 - 1
    with torch.no_grad():
        posterior = theirs.encode(pixels).latent_dist
        drawn = posterior.sample(torch.Generator().manual_seed(3))
    assert torch.equal(kl(vae).encode(frames(), torch.Generator().manual_seed(3)), drawn * 0.18215)
    assert torch.equal(kl(vae, posterior="mode").encode(frames(), torch.Generator().manual_seed(3)), posterior.mode() * 0.18215)
    assert torch.equal(kl(vae).encode(frames()), posterior.mode() * 0.18215), "without a generator nothing is drawn"
    assert not torch.allclose(drawn, posterior.mode(), atol=1e-3)


def test_pixels_are_those_of_diffusers(vae: Path) -> None:
    from diffusers import AutoencoderKL

    theirs, latents = AutoencoderKL.from_pretrained(vae).eval(), torch.randn(3, 4, 4, 6, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        pixels = theirs.decode(latents / 0.18215).sample
    assert torch.equal(kl(vae).decode(latents), ((pixels + 1) * 127.5).round().clamp(0, 255).to(torch.uint8))


@pytest.mark.parametrize("micro_batch", [1, 2, 3, 64])
def test_the_micro_batch_changes_nothing(vae: Path, micro_batch: int) -> None:
    whole, parts = kl(vae), kl(vae, micro_batch=micro_batch)
    latents = whole.encode(frames(), torch.Generator().manual_seed(0))
    assert torch.allclose(parts.encode(frames(), torch.Generator().manual_seed(0)), latents, atol=1e-6)
    assert (parts.decode(latents).int() - whole.decode(latents).int()).abs().max() <= 1


def test_the_micro_batch_is_what_the_module_sees_at_once(vae: Path) -> None:
    autoencoder, seen = kl(vae, micro_batch=2), []
    autoencoder._model.encoder.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    autoencoder.encode(frames(5))
    assert seen == [2, 2, 1]


def test_a_clips_latent_is_its_own_whatever_batch_it_comes_in(vae: Path) -> None:
    autoencoder, clips = kl(vae), rearrange(frames(6), "(b t) c h w -> b t h w c", t=2)
    together = encode_clips(autoencoder, clips, seeded(7, 8, 9))
    alone = encode_clips(autoencoder, clips[1:2], seeded(8))
    other = encode_clips(autoencoder, clips[1:2], seeded(9))
    assert together.shape == (3, 4, 2, 4, 6)
    assert torch.allclose(together[1:2], alone, atol=1e-6)
    assert not torch.allclose(alone, other, atol=1e-3)


def test_the_scale_is_the_models_own_unless_the_stage_says_another(tmp_path: Path, vae: Path) -> None:
    make_autoencoder(tmp_path, scaling_factor=0.5)
    unscaled = kl(vae).encode(frames()) / 0.18215
    assert torch.allclose(kl(tmp_path).encode(frames()), unscaled * 0.5, atol=1e-6)
    assert torch.allclose(kl(tmp_path, scale=3.0).encode(frames()), unscaled * 3, atol=1e-5)
    latents = kl(tmp_path).encode(frames())
    assert torch.equal(kl(tmp_path, scale=3.0).decode(latents * 6), kl(tmp_path).decode(latents))


def test_a_config_of_the_time_before_scales_means_stable_diffusions(tmp_path: Path, vae: Path) -> None:
    from diffusers import AutoencoderKL

    shutil.copytree(vae, tmp_path / "old")
    content = json.loads((tmp_path / "old" / "config.json").read_text())
    for name in ("scaling_factor", "shift_factor", "latents_mean", "latents_std", "force_upcast"):
        del content[name]
    (tmp_path / "old" / "config.json").write_text(json.dumps(content))
    assert kl(tmp_path / "old").scale == AutoencoderKL.from_pretrained(tmp_path / "old").config.scaling_factor == 0.18215


def test_a_shifted_autoencoders_latents_are_centred(tmp_path: Path, vae: Path) -> None:
    make_autoencoder(tmp_path, shift_factor=0.25)
    shifted = kl(tmp_path)
    assert torch.allclose(shifted.encode(frames()), kl(vae).encode(frames()) - 0.25 * 0.18215, atol=1e-6)
    assert torch.equal(shifted.decode(shifted.encode(frames())), kl(vae).decode(kl(vae).encode(frames())))


@pytest.mark.parametrize(("dtype", "apart"), [("bf16", 0.03), ("fp16", 0.004)])
def test_half_precision_is_near(vae: Path, dtype: str, apart: float) -> None:
    half, latents = kl(vae, dtype=dtype), kl(vae).encode(frames())
    assert half._model.dtype == {"bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    found = half.encode(frames())
    assert found.dtype == torch.float32
    assert 0 < (found - latents).abs().max() / latents.abs().max() < apart
    assert half.decode(latents).dtype == torch.uint8


def test_numbers_that_overflow_are_no_latents(tmp_path: Path) -> None:
    made = make_autoencoder(tmp_path)
    with torch.no_grad():
        made.encoder.conv_out.weight *= 1e6
    made.save_pretrained(tmp_path)
    assert kl(tmp_path).encode(frames()).isfinite().all()
    with pytest.raises(ConfigError, match=r"autoencoder.dtype fp16.*not finite.*bf16"):
        kl(tmp_path, dtype="fp16").encode(frames())


# ------------------------------------------------------------------------------------------------------------------
# The text encoder
# ------------------------------------------------------------------------------------------------------------------


def test_vectors_are_those_of_transformers_at_their_true_lengths(t5: Path) -> None:
    from transformers import AutoTokenizer, T5EncoderModel

    theirs, tokenizer = T5EncoderModel.from_pretrained(t5).eval(), AutoTokenizer.from_pretrained(t5)
    found = text(t5).encode(CAPTIONS)
    assert [len(vectors) for vectors in found] == [6, 1, TOKENS, 10, 6]
    for caption, vectors in zip(CAPTIONS, found, strict=True):
        ids = tokenizer(caption, truncation=True, max_length=TOKENS, return_tensors="pt").input_ids
        with torch.no_grad():
            assert torch.allclose(vectors, theirs(input_ids=ids).last_hidden_state[0], atol=1e-5)
    assert vectors.dtype == torch.float32


def test_the_length_of_a_caption_counts_what_is_cut(t5: Path) -> None:
    encoder = text(t5)
    for caption, vectors, cut in zip(CAPTIONS, encoder.encode(CAPTIONS), encoder.cut(CAPTIONS), strict=True):
        assert (encoder.length(caption) > encoder.tokens) == cut
        assert min(encoder.length(caption), encoder.tokens) == len(vectors)


def test_a_cut_caption_keeps_its_end_of_sequence(t5: Path) -> None:
    assert [ids[-1] for ids in text(t5)._tokenize(CAPTIONS)] == [1] * len(CAPTIONS)


def test_a_caption_is_cut_where_it_fills_more_than_its_tokens(t5: Path) -> None:
    """The end of the sequence is one of them: eleven letters fit in twelve."""
    assert text(t5).cut(["a" * (TOKENS - 2), "a" * (TOKENS - 1), "a" * TOKENS, "", "<b>" + "A" * (TOKENS - 1) + "</b>"]) == [
        False,
        False,
        True,
        False,
        False,
    ]
    assert text(t5).cut([]) == []


def test_a_captions_vectors_do_not_depend_on_its_neighbours(t5: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    together = text(t5).encode(CAPTIONS)
    monkeypatch.setattr("opensora.encoders.pretrained.TOKENS_AT_ONCE", 14)  # the longest alone, then two captions
    apart = text(t5).encode(CAPTIONS)
    assert all(torch.allclose(one, other, atol=1e-6) for one, other in zip(together, apart, strict=True))
    assert padded(together)[1].sum(1).tolist() == [6, 1, TOKENS, 10, 6]


def test_batches_hold_captions_of_like_lengths(t5: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("opensora.encoders.pretrained.TOKENS_AT_ONCE", 20)
    encoder, seen = text(t5), []
    encoder._model.register_forward_pre_hook(lambda _, __, given: seen.append(tuple(given["input_ids"].shape)), with_kwargs=True)
    encoder.encode(CAPTIONS)
    assert seen == [(1, 12), (2, 10), (2, 6)]


def test_captions_are_cleaned_for_t5(t5: Path) -> None:
    plain, marked = text(t5).encode(["cats & dogs", "<b>Cats</b> &amp;amp; https://a.b/c dogs"])
    assert torch.allclose(plain, marked, atol=1e-6)


def test_no_captions_are_no_vectors(t5: Path) -> None:
    encoder = text(t5)
    assert encoder.encode([]) == []
    assert "_model" not in vars(encoder)


def test_bf16_is_near(t5: Path) -> None:
    half, whole = text(t5, dtype="bf16"), text(t5)
    (found,), (vectors,) = half.encode(["a cat"]), whole.encode(["a cat"])
    assert half._model.dtype == torch.bfloat16 and found.dtype == torch.float32
    assert 0 < (found - vectors).abs().max() / vectors.abs().max() < 0.05


def test_the_null_caption_is_what_transformers_says_of_an_empty_padded_prompt(t5: Path) -> None:
    from transformers import AutoTokenizer, T5EncoderModel

    tokens = AutoTokenizer.from_pretrained(t5)("", padding="max_length", max_length=TOKENS, return_tensors="pt")
    with torch.no_grad():
        theirs = T5EncoderModel.from_pretrained(t5).eval()(**tokens).last_hidden_state[0]
    encoder = text(t5)
    found = null_caption(encoder, TOKENS, WIDTH)
    assert found is not None and torch.allclose(found, theirs, atol=1e-6)
    assert "_model" not in vars(encoder), "9.5 GB do not stay for a vector"
    assert torch.allclose(found[:1], encoder.encode([""])[0], atol=1e-6)


def test_a_vocabulary_in_sentencepieces_own_form_is_read(tmp_path: Path) -> None:
    """What the T5 folders of PixArt-α's time hold: spiece.model, no tokenizer.json."""
    import sentencepiece

    make_text(tmp_path, tmp_path / "bytes")
    (tmp_path / "words.txt").write_text("\n".join(["a cat runs left", "a dog runs right", "一只 猫", "the cat and the dog"] * 5))
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "words.txt"), model_prefix=str(tmp_path / "spiece"), vocab_size=40, hard_vocab_limit=False,
        pad_id=0, eos_id=1, unk_id=2, bos_id=-1, minloglevel=2,
    )  # fmt: skip
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "T5Tokenizer", "extra_ids": 0, "additional_special_tokens": []}')
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "spiece.model"))
    assert text(tmp_path)._tokenize(["a cat runs", "一只 猫"]) == [[*pieces.encode(caption), 1] for caption in ("a cat runs", "一只 猫")]


# ------------------------------------------------------------------------------------------------------------------
# Where they are found
# ------------------------------------------------------------------------------------------------------------------


def test_a_pipelines_folder_serves_both(tmp_path: Path, vae: Path, t5: Path) -> None:
    shutil.copytree(vae, tmp_path / "vae")
    make_text(tmp_path / "text_encoder", tmp_path / "tokenizer")
    (tmp_path / "model_index.json").write_text("{}")
    assert torch.equal(kl(tmp_path).encode(frames()), kl(vae).encode(frames()))
    assert torch.equal(text(tmp_path).encode(["a cat"])[0], text(t5).encode(["a cat"])[0])
    assert kl(tmp_path).source.digest() == kl(vae).source.digest()


def test_a_model_of_the_hub_that_this_machine_has_needs_no_network(
    tmp_path: Path, vae: Path, t5: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, folder in (("vae", vae), ("t5", t5)):
        cached = tmp_path / f"models--somebody--{name}"
        shutil.copytree(folder, cached / "snapshots" / ("0" * 40))
        (cached / "refs").mkdir()
        (cached / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    assert torch.equal(kl("somebody/vae").encode(frames()), kl(vae).encode(frames()))
    assert torch.equal(text("somebody/t5").encode(["a cat"])[0], text(t5).encode(["a cat"])[0])


@pytest.mark.long
@pytest.mark.parametrize("offline", ["0", "1"])
def test_a_hub_that_cannot_be_reached_is_one_line_and_soon(tmp_path: Path, offline: str) -> None:
    code = (
        "from opensora import config; from opensora.encoders.pretrained import KLAutoencoder\n"
        "from opensora.errors import ConfigError\n"
        "try: KLAutoencoder(config.KLAutoencoder(kind='kl', path='somebody/vae'), 4)\n"
        "except ConfigError as error: print(error)"
    )
    variables = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": offline, "NO_PROXY": "*"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=variables, capture_output=True, text=True, check=True, cwd=Path.cwd(), timeout=240
    )
    assert len(done.stdout.splitlines()) == 1
    assert "autoencoder.path somebody/vae" in done.stdout and "hf download somebody/vae" in done.stdout
    assert ("HF_HUB_OFFLINE" if offline == "1" else "http://127.0.0.1:9") in done.stdout


@pytest.mark.long
def test_weights_are_read_at_the_first_use(vae: Path, t5: Path) -> None:
    code = (
        "import sys; from opensora import config; from opensora.encoders.pretrained import KLAutoencoder, T5Encoder\n"
        f"KLAutoencoder(config.KLAutoencoder(kind='kl', path={str(vae)!r}, factor=2), 4).source.digest()\n"
        f"T5Encoder(config.T5Encoder(kind='t5', path={str(t5)!r}), {WIDTH}, 4).source.digest()\n"
        "print([name for name in ('diffusers', 'transformers', 'huggingface_hub') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


# ------------------------------------------------------------------------------------------------------------------
# What is refused
# ------------------------------------------------------------------------------------------------------------------


def edited(folder: Path, target: Path, **fields: Any) -> Path:
    """A copy with other fields in config.json."""
    shutil.copytree(folder, target)
    content = json.loads((target / "config.json").read_text()) | fields
    (target / "config.json").write_text(json.dumps(content))
    return target


def without_weights(folder: Path, target: Path) -> Path:
    shutil.copytree(folder, target)
    (target / "diffusion_pytorch_model.safetensors").rename(target / "diffusion_pytorch_model.bin")
    return target


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda vae, _, at: kl(at / "nowhere"), r"autoencoder.path .*nowhere: no such folder"),
        (lambda vae, _, at: kl(at), r"autoencoder.path .*neither vae/config.json nor config.json"),
        (lambda vae, t5, _: kl(t5), r"config.json is of t5, but kind kl is diffusers' AutoencoderKL"),
        (lambda vae, t5, _: text(vae), r"it has no tokenizer"),
        (lambda vae, t5, at: text(edited(t5, at / "m", model_type="umt5")), r"config.json is of umt5, but kind t5"),
        (lambda vae, _, __: kl(vae, factor=8), r"autoencoder.factor is 8, but .* has 2 pixels"),
        (lambda vae, _, __: kl(vae, channels=8), r"model.latent_channels is 8, but .* has 4"),
        (lambda vae, t5, _: text(t5, width=4096), r"model.caption_width is 4096, but .* has 16"),
        (lambda vae, _, at: kl(edited(vae, at / "m", latents_mean=[0.0])), r"latents_mean"),
        (lambda vae, _, at: kl(without_weights(vae, at / "m")).encode(frames()), r"no .safetensors file in .*Pickled"),
        (
            lambda vae, t5, at: text(edited(t5, at / "m", vocab_size=300)).encode(["a"]),
            r"tokenizer has 384 tokens, but the model knows 300",
        ),
    ],
)
def test_what_does_not_fit_is_refused_with_both_values(
    make: Callable[[Path, Path, Path], object], says: str, vae: Path, t5: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=says):
        make(vae, t5, tmp_path)


@pytest.mark.parametrize("damage", ["a weight is missing", "a weight has another shape", "the file is cut"])
def test_nothing_is_left_at_random(damage: str, vae: Path, t5: Path, tmp_path: Path) -> None:
    for folder, name in ((vae, "diffusion_pytorch_model.safetensors"), (t5, "model.safetensors")):
        copy = tmp_path / name
        shutil.copytree(folder, copy)
        tensors = load_file(copy / name)
        key = max(tensors, key=lambda key: tensors[key].numel())
        if damage == "a weight is missing":
            save_file({k: v for k, v in tensors.items() if k != key}, copy / name, {"format": "pt"})
        elif damage == "a weight has another shape":
            save_file(tensors | {key: tensors[key][:-1].contiguous()}, copy / name, {"format": "pt"})
        else:
            (copy / name).write_bytes((copy / name).read_bytes()[:-100])
        with pytest.raises(ConfigError, match=r"autoencoder.path|text.path"):
            kl(copy).encode(frames()) if folder == vae else text(copy).encode(["a"])


# ------------------------------------------------------------------------------------------------------------------
# A checkpoint names them
# ------------------------------------------------------------------------------------------------------------------


def saved(folder: Path, vae: Path, t5: Path) -> Path:
    folder.mkdir()
    for encoder in (kl(vae), text(t5)):
        encoder.save(folder)
    return folder


def test_a_checkpoint_holds_no_tensors_and_gives_the_same_encoders(vae: Path, t5: Path, tmp_path: Path) -> None:
    folder = saved(tmp_path / "checkpoint", vae, t5)
    assert load_file(folder / AUTOENCODER_FILE) == {} and load_file(folder / TEXT_FILE) == {}
    for autoencoder, words in (read(folder, CPU), load(folder, stage(vae, t5), CPU)):
        assert torch.equal(autoencoder.encode(frames()), kl(vae).encode(frames()))
        assert torch.equal(words.encode(["a cat"])[0], text(t5).encode(["a cat"])[0])


def test_a_stage_computes_its_parents_encoders_as_itself_says(vae: Path, t5: Path, tmp_path: Path) -> None:
    """Type, batch and point of the distribution are how, not what: a child may choose its own."""
    folder, parents = saved(tmp_path / "checkpoint", vae, t5), stage(vae, t5)
    assert isinstance(parents.autoencoder, config.KLAutoencoder) and isinstance(parents.text, config.T5Encoder)
    own = parents.autoencoder.model_copy(update={"posterior": "mode", "micro_batch": 1, "dtype": "bf16"})
    child = parents.model_copy(update={"autoencoder": own, "text": parents.text.model_copy(update={"dtype": "bf16"})})
    autoencoder, words = load(folder, child, CPU)
    assert isinstance(autoencoder, KLAutoencoder) and isinstance(words, T5Encoder)
    assert (autoencoder.stage, words.stage) == (child.autoencoder, child.text)
    assert torch.equal(autoencoder.encode(frames(), seeded(1)[0]), autoencoder.encode(frames()))  # the mode draws nothing


def test_equal_references_are_equal_bytes(vae: Path, t5: Path, tmp_path: Path) -> None:
    first = saved(tmp_path / "one", vae, t5)
    (tmp_path / "two").mkdir()
    for encoder in read(first, CPU):
        encoder.save(tmp_path / "two")
    for name in (AUTOENCODER_FILE, TEXT_FILE):
        assert (first / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_another_model_under_the_same_name_is_refused(vae: Path, t5: Path, tmp_path: Path) -> None:
    """The same architecture trained anew: names, sizes and headers are equal."""
    mine = shutil.copytree(vae, tmp_path / "vae"), shutil.copytree(t5, tmp_path / "t5")
    folder = saved(tmp_path / "checkpoint", *mine)
    before = digests(stage(*mine))
    make_autoencoder(mine[0], seed=1)
    with pytest.raises(ParentError, match=rf"{AUTOENCODER_FILE}.*{before['kl'][:12]}.*another model lies there now"):
        load(folder, stage(*mine))
    shutil.copytree(vae, mine[0], dirs_exist_ok=True)
    make_text(mine[1], seed=1)
    with pytest.raises(ParentError, match=rf"{TEXT_FILE}.*{before['t5'][:12]}.*another model lies there now"):
        load(folder, stage(*mine))
    assert digests(stage(*mine))["kl"] == before["kl"] and digests(stage(*mine))["t5"] != before["t5"]


def test_the_digest_knows_scale_and_tokenizer_and_not_who_saved(vae: Path, t5: Path, tmp_path: Path) -> None:
    digest = kl(vae).source.digest()
    assert kl(edited(vae, tmp_path / "again", _diffusers_version="9.9", _name_or_path="x")).source.digest() == digest
    assert kl(edited(vae, tmp_path / "scaled", scaling_factor=0.5)).source.digest() != digest
    other = edited(t5, tmp_path / "t5")
    assert text(other).source.digest() == text(t5).source.digest()
    (other / "tokenizer_config.json").write_text('{"tokenizer_class": "ByT5Tokenizer", "extra_ids": 3}')
    assert text(other).source.digest() != text(t5).source.digest()
