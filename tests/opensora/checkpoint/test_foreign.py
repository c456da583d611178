from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from opensora.checkpoint import foreign as weights
from opensora.config import ModelConfig
from opensora.errors import WeightsRefused
from opensora.model.stdit import STDiT

UPSTREAM = Path(__file__).parents[1] / "oracle" / "stdit.safetensors"


def model(input_size: tuple[int, int, int] = (4, 8, 8), out_channels: int = 8, depth: int = 3) -> STDiT:
    return STDiT(ModelConfig(depth=depth, width=96, heads=4, caption_width=32, caption_tokens=12), input_size, out_channels)


@pytest.fixture
def upstream() -> dict[str, Tensor]:
    return load_file(UPSTREAM)


def test_upstream_state_dict_is_recognised_and_every_key_accounted_for(upstream: dict[str, Tensor]) -> None:
    ours = model()
    report = weights.load(upstream, ours)
    assert report.format == "open-sora-1.0"
    assert report.recomputed == ("pos_embed", "pos_embed_temporal")
    assert report.missing == ()
    assert {key for keys in report.mapped.values() for key in keys} | set(report.recomputed) == upstream.keys()
    assert report.mapped.keys() == ours.state_dict().keys()
    assert report.mapped["blocks.1.temporal_attention.qkv.weight"] == ("blocks.1.attn_temp.qkv.weight",)
    for own, (theirs,) in report.mapped.items():
        assert torch.equal(ours.state_dict()[own].flatten(), upstream[theirs].flatten()), own


def test_no_two_keys_are_taken_from_one(upstream: dict[str, Tensor]) -> None:
    mapped = weights.load(upstream, model()).mapped
    assert len(set(mapped.values())) == len(mapped) == 73


def test_position_tables_of_a_file_are_never_used(upstream: dict[str, Tensor]) -> None:
    plain, spoilt = model(), model()
    weights.load(upstream, plain)
    weights.load(upstream | {"pos_embed": torch.full((1, 16, 96), 9.0)}, spoilt)
    latents, captions = torch.randn(1, 4, 4, 8, 8), torch.randn(1, 12, 32)
    assert torch.equal(plain(latents, torch.ones(1), captions), spoilt(latents, torch.ones(1), captions))


def test_position_tables_may_be_absent(upstream: dict[str, Tensor]) -> None:
    del upstream["pos_embed"]
    assert weights.load(upstream, model()).recomputed == ("pos_embed_temporal",)


def test_our_own_state_dict_survives_a_round_trip_into_another_size(tmp_path: Path) -> None:
    small, large = model((1, 4, 4)), model((8, 16, 12))
    save_file(small.state_dict(), tmp_path / "model.safetensors")
    report = weights.load(tmp_path, large)
    assert report.format == "opensora"
    assert report.recomputed == report.missing == ()
    assert all((ours,) == theirs for ours, theirs in report.mapped.items())
    for name, tensor in small.state_dict().items():
        assert torch.equal(large.state_dict()[name], tensor), name


def test_shards_of_a_directory_are_joined(tmp_path: Path, upstream: dict[str, Tensor]) -> None:
    names = sorted(upstream)
    save_file({name: upstream[name] for name in names[:40]}, tmp_path / "a.safetensors")
    save_file({name: upstream[name] for name in names[40:]}, tmp_path / "b.safetensors")
    assert weights.read(tmp_path).keys() == upstream.keys()
    save_file({names[0]: upstream[names[0]]}, tmp_path / "c.safetensors")
    with pytest.raises(WeightsRefused, match=r"1 keys are in an earlier shard .* \(blocks\.0\.attn\.proj\.bias\)"):
        weights.read(tmp_path)


# --- refused, and nothing copied ---


def refused(state_dict: dict[str, Tensor], into: STDiT) -> str:
    before = {name: tensor.clone() for name, tensor in into.state_dict().items()}
    with pytest.raises(WeightsRefused) as caught:
        weights.load(state_dict, into)
    assert all(torch.equal(tensor, before[name]) for name, tensor in into.state_dict().items())
    assert caught.value.kind == "parent"
    return str(caught.value)


def test_missing_key_is_refused_by_name(upstream: dict[str, Tensor]) -> None:
    del upstream["t_block.1.weight"]
    assert "1 of 73 keys are missing (t_block.1.weight) and 0 are unknown" in refused(upstream, model())


def test_unknown_key_is_refused_by_name(upstream: dict[str, Tensor]) -> None:
    upstream["blocks.0.lora.weight"] = torch.zeros(1)
    assert "0 of 73 keys are missing and 1 are unknown (blocks.0.lora.weight)" in refused(upstream, model())


def test_foreign_state_dict_is_refused_with_the_first_ten_names() -> None:
    """Upstream loaded any path with strict=False and trained from random weights (issue 272)."""
    message = refused({f"layer.{number:02}.weight": torch.zeros(1) for number in range(30)}, model())
    assert "73 of 73 keys are missing" in message
    assert "layer.09.weight, ..." in message
    assert "layer.10.weight" not in message


def test_deeper_state_dict_is_refused(upstream: dict[str, Tensor]) -> None:
    assert "are unknown (blocks.2." in refused(upstream, model(depth=2))


def test_other_shape_is_refused_with_both_shapes(upstream: dict[str, Tensor]) -> None:
    """A chain from IDDPM (8 channels) to rectified flow (4) needs a rule, and there is none."""
    message = refused(upstream, model(out_channels=4))
    assert "final_layer.linear.weight (32, 96) for (16, 96)" in message
    assert "final_layer.linear.bias (32,) for (16,)" in message


def test_mixture_of_two_formats_is_refused(upstream: dict[str, Tensor]) -> None:
    ours = model()
    upstream["time_block.weight"] = upstream.pop("t_block.1.weight")
    message = refused(upstream, ours)
    assert "missing (t_block.1.weight)" in message
    assert "unknown (time_block.weight)" in message


@pytest.mark.parametrize("new_format", [True, False])
def test_a_pickle_with_code_in_it_is_refused_and_not_run(tmp_path: Path, new_format: bool) -> None:
    path = tmp_path / "model.pth"
    content = {"state_dict": {"weight": torch.zeros(2)}, "more": Bomb(tmp_path / "gone off")}
    torch.save(content, path, _use_new_zipfile_serialization=new_format)
    with pytest.raises(WeightsRefused, match=r"model\.pth: holds more than tensors: [a-z]+\.mkdir\. It was not loaded"):
        weights.read(path)
    with pytest.raises(WeightsRefused, match=r"holds more than tensors|cannot be read"):
        weights.read(path.rename(tmp_path / "model.safetensors"))
    assert not (tmp_path / "gone off").exists()


class Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.path),)


def test_absent_and_truncated_files_are_refused_by_name(tmp_path: Path, upstream: dict[str, Tensor]) -> None:
    with pytest.raises(WeightsRefused, match=r"absent\.safetensors: cannot be read"):
        weights.read(tmp_path / "absent.safetensors")
    torch.save(upstream, tmp_path / "whole.pth")
    for whole in (UPSTREAM, tmp_path / "whole.pth"):
        content = whole.read_bytes()
        for length in (0, 5, 100, len(content) // 2, len(content) - 1):
            cut = tmp_path / f"cut{whole.suffix}"
            cut.write_bytes(content[:length])
            with pytest.raises(WeightsRefused, match=rf"cut\{whole.suffix}: (cannot be read|is neither safetensors nor)"):
                weights.read(cut)
    with pytest.raises(WeightsRefused, match="the folder has no weights"):
        weights.read(make(tmp_path / "empty"))


def test_what_is_no_state_dict_is_refused(tmp_path: Path) -> None:
    for content, fact in (
        ([torch.zeros(1)], "holds a list, not"),
        ({"epoch": 3, "lr": 0.1}, r"2 entries are not tensors \(epoch int, lr float\)"),
    ):
        torch.save(content, tmp_path / "x.pth")
        with pytest.raises(WeightsRefused, match=fact):
            weights.read(tmp_path / "x.pth")
    with pytest.raises(WeightsRefused, match="1 tensors are not floating-point"):
        whole = model().state_dict()
        weights.load(whole | {"null_caption": torch.zeros(12, 32, dtype=torch.int8)}, model())


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="asks Linux what is mapped")
def test_files_are_mapped_and_not_read(upstream: dict[str, Tensor], tmp_path: Path) -> None:
    """760M parameters are never in memory twice. A file before torch 1.6 cannot be mapped."""
    torch.save({"state_dict": upstream}, tmp_path / "x.pth")
    save_file(upstream, tmp_path / "x.safetensors")
    for path in (tmp_path / "x.pth", tmp_path / "x.safetensors"):
        tensors = weights.read(path)
        assert str(path) in Path("/proc/self/maps").read_text()
        del tensors
        assert str(path) not in Path("/proc/self/maps").read_text()


# --- PixArt-α ---


@pytest.fixture(scope="module")
def pixart() -> Any:
    """diffusers' own implementation at our size, with nothing left at zero; positions count from 0 up to 5 patches each way."""
    from diffusers import PixArtTransformer2DModel
    from diffusers.models.embeddings import PatchEmbed

    peer = PixArtTransformer2DModel(
        num_attention_heads=4, attention_head_dim=24, cross_attention_dim=96, caption_channels=32, num_layers=3, sample_size=10
    ).eval()  # fmt: skip
    # its own tables for sizes that are no squares are stretched; this one is cut out of a square, from its corner
    peer.pos_embed = PatchEmbed(height=10, width=10, patch_size=2, in_channels=4, embed_dim=96, pos_embed_max_size=5)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in peer.parameters():
            parameter.normal_(0, 0.1, generator=generator)
    return peer


def same_picture(ours: STDiT, peer: Any, size: tuple[int, int]) -> float:
    """Largest difference on one frame, as a share of the largest value."""
    generator = torch.Generator().manual_seed(1)
    latents, captions = torch.randn(2, 4, *size, generator=generator), torch.randn(2, 12, 32, generator=generator)
    mask, time = torch.arange(12) < torch.tensor([[12], [7]]), torch.tensor([17, 902])
    with torch.no_grad():
        expected = peer(latents, captions, time, encoder_attention_mask=mask.long()).sample
        found = ours(latents[:, :, None], time, captions, mask)[:, :, 0]
    return ((found - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize("size", [(10, 10), (10, 8), (8, 10)])
def test_pixart_of_diffusers_computes_the_same_picture(pixart: Any, size: tuple[int, int]) -> None:
    ours = model((1, *size))
    report = weights.load(pixart.state_dict(), ours)
    assert report.format == "pixart-diffusers"
    assert same_picture(ours, pixart, size) < 1e-5
    assert report.mapped["blocks.2.cross_attention.key_value.bias"] == tuple(f"transformer_blocks.2.attn2.to_{n}.bias" for n in "kv")


def test_what_an_import_leaves_at_its_initial_value_is_said_and_does_nothing(pixart: Any) -> None:
    ours = model((4, 10, 10))
    initial = {name: tensor.clone() for name, tensor in ours.state_dict().items()}
    report = weights.load(pixart.state_dict(), ours)
    temporal = {f"blocks.{block}.temporal_attention.{layer}" for block in range(3) for layer in LAYERS}
    assert set(report.missing) == temporal | {"null_caption"}
    for name, tensor in ours.state_dict().items():
        assert torch.equal(tensor, initial[name]) == (name in report.missing), name
    clip, captions = torch.randn(1, 4, 4, 10, 10), torch.randn(1, 12, 32)
    with torch.no_grad():
        video, frame = (ours(part, torch.full((1,), 5.0), captions) for part in (clip, clip[:, :, 2:3]))
    torch.testing.assert_close(video[:, :, 2:3], frame, rtol=0, atol=1e-5)


LAYERS = ("qkv.weight", "qkv.bias", "proj.weight", "proj.bias")


def test_a_model_whose_frames_see_each_other_takes_no_image_weights(pixart: Any) -> None:
    ours = model((1, 10, 10))
    with torch.no_grad():
        ours.blocks[1].temporal_attention.proj.bias[3] = 1e-9
    assert "1 output layers of the model's temporal attention are not zero (blocks.1.temporal_attention.proj.bias)" in refused(
        pixart.state_dict(), ours
    )


def test_pixart_is_read_from_its_folder_its_pipeline_and_its_shards(pixart: Any, tmp_path: Path) -> None:
    pixart.save_pretrained(tmp_path / "whole" / "transformer")
    (tmp_path / "whole" / "model_index.json").write_text("{}")
    pixart.save_pretrained(tmp_path / "shards", max_shard_size="200KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    (tmp_path / "shards" / "stray.safetensors").write_bytes(b"not in the index")
    folder = tmp_path / "whole" / "transformer"
    for path in (tmp_path / "whole", folder, folder / "diffusion_pytorch_model.safetensors", tmp_path / "shards"):
        ours = model((1, 10, 8))
        weights.load(path, ours)
        assert same_picture(ours, pixart, (10, 8)) < 1e-5, path
    with pytest.raises(WeightsRefused, match=r"config\.json: 4 attention heads, the model has 2\. Set model\.heads to 4"):
        config = ModelConfig(depth=3, width=96, heads=2, caption_width=32, caption_tokens=12)
        weights.load(tmp_path / "whole", STDiT(config, (1, 10, 8), 8))


def original(upstream: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state dict with PixArt-α's own names: what Open-Sora 1.0 was made from."""
    spatial = {name: tensor for name, tensor in upstream.items() if "attn_temp" not in name and name != "pos_embed_temporal"}
    return spatial | {"x_embedder.proj.weight": spatial["x_embedder.proj.weight"].squeeze(2)}


def test_pixart_original_is_read_bare_and_wrapped(upstream: dict[str, Tensor], tmp_path: Path) -> None:
    pixart, video, image = original(upstream), model((1, 8, 8)), model((1, 8, 8))
    weights.load(upstream | {name: torch.zeros_like(upstream[name]) for name in upstream if "attn_temp.proj" in name}, video)
    latents, captions, time = torch.randn(1, 4, 1, 8, 8), torch.randn(1, 12, 32), torch.ones(1)
    expected = video(latents, time, captions)
    worse = {name: tensor + 1 for name, tensor in pixart.items()}
    save_file(pixart, tmp_path / "a.safetensors")
    torch.save({"state_dict": pixart, "epoch": 3}, tmp_path / "b.pth")
    torch.save({"state_dict": worse, "state_dict_ema": pixart, "optimizer": {"lr": 0.1}}, tmp_path / "c.pth")
    torch.save(pixart, tmp_path / "d.bin", _use_new_zipfile_serialization=False)
    for source in (pixart, {"state_dict": pixart}, *sorted(tmp_path.iterdir())):
        image = model((1, 8, 8))
        report = weights.load(source, image)
        assert (report.format, report.recomputed, len(report.missing)) == ("pixart", ("pos_embed",), 12)
        assert torch.equal(image(latents, time, captions), expected)


def test_weights_that_look_at_the_size_of_pictures_are_refused(pixart: Any, upstream: dict[str, Tensor]) -> None:
    sized = {"csize_embedder.mlp.0.weight": torch.zeros(1), "ar_embedder.mlp.0.weight": torch.zeros(1)}
    message = refused(original(upstream) | sized, model())
    assert (
        "2 keys take the picture's size and shape as input (ar_embedder.mlp.0.weight, csize_embedder.mlp.0.weight): PixArt-α 1024-MS"
        in message
    )
    name = "adaln_single.emb.resolution_embedder.linear_1.weight"
    assert f"1 keys take the picture's size and shape as input ({name})" in refused(
        pixart.state_dict() | {name: torch.zeros(1)}, model((1, 10, 10))
    )


def test_half_a_video_model_is_no_image_model(upstream: dict[str, Tensor]) -> None:
    """A file of Open-Sora 1.0 that lost its temporal layers has the names of PixArt-α: its patches tell."""
    cut = {name: tensor for name, tensor in upstream.items() if "attn_temp" not in name}
    assert "12 of 73 keys are missing (blocks.0.attn_temp" in refused(cut, model())
    extra = original(upstream) | {"blocks.0.attn_temp.qkv.weight": upstream["blocks.0.attn_temp.qkv.weight"]}
    assert "are unknown" in refused(extra, model()) or "are missing" in refused(extra, model())


def test_other_transformers_are_refused(upstream: dict[str, Tensor]) -> None:
    from diffusers import LatteTransformer3DModel, PixArtTransformer2DModel

    latte = LatteTransformer3DModel(
        num_attention_heads=4, attention_head_dim=24, in_channels=4, out_channels=8, num_layers=3, cross_attention_dim=96,
        caption_channels=32, sample_size=8, patch_size=2, norm_type="ada_norm_single", norm_elementwise_affine=False, video_length=4,
    )  # fmt: skip
    message = refused(latte.state_dict(), model())
    assert "are unknown (temporal_transformer_blocks.0" in message and message.count("temporal_transformer_blocks.") == 10
    dit = {
        name: tensor for name, tensor in original(upstream).items() if "cross_attn" not in name and not name.startswith(("t_block", "y_"))
    }
    dit |= {"y_embedder.embedding_table.weight": torch.zeros(1001, 96), "blocks.0.adaLN_modulation.1.weight": torch.zeros(576, 96)}
    message = refused(dit, model())
    assert (
        "are missing (y_embedder.y_embedding, t_block.1.weight" in message
        and "unknown (blocks.0.adaLN_modulation.1.weight, y_embedder.embedding_table" in message
    )
    wide = PixArtTransformer2DModel(
        num_attention_heads=4, attention_head_dim=32, cross_attention_dim=128, caption_channels=32, num_layers=3, sample_size=8
    )  # fmt: skip
    assert "pos_embed.proj.weight (128, 4, 2, 2) for (96, 4, 2, 2)" in refused(wide.state_dict(), model())


def test_patches_of_the_same_count_of_numbers_are_not_taken_for_each_other(upstream: dict[str, Tensor]) -> None:
    """16 channels in patches of 1 pixel are 4 channels in patches of 2x2, by their count."""
    odd = original(upstream)
    odd["x_embedder.proj.weight"] = odd["x_embedder.proj.weight"].reshape(96, 16, 1, 1)
    assert "x_embedder.proj.weight (96, 16, 1, 1) for (96, 4, 2, 2)" in refused(odd, model())
    ours = STDiT(ModelConfig(depth=3, width=96, heads=4, caption_width=32, caption_tokens=12, patch=(2, 2, 2)), (4, 8, 8), 8)
    assert "x_embedder.proj.weight (96, 4, 2, 2) for (96, 4, 2, 2, 2)" in refused(original(upstream), ours)


def test_frozen_zeros_that_are_overwritten_are_computed_again(upstream: dict[str, Tensor]) -> None:
    frozen, plain = model(), model()
    frozen.freeze_temporal()
    for each in (frozen, plain):
        weights.load(upstream, each)
    latents, captions = torch.randn(1, 4, 4, 8, 8), torch.randn(1, 12, 32)
    assert torch.equal(frozen(latents, torch.ones(1), captions), plain(latents, torch.ones(1), captions))


def test_half_precision_weights_become_the_models_own_type(upstream: dict[str, Tensor]) -> None:
    ours = model()
    weights.load({name: tensor.bfloat16() for name, tensor in upstream.items()}, ours)
    assert {tensor.dtype for tensor in ours.state_dict().values()} == {torch.float32}
    assert torch.equal(ours.time_block.bias, upstream["t_block.1.bias"].bfloat16().float())


def make(folder: Path) -> Path:
    folder.mkdir()
    return folder
