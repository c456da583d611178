from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from opensora import weights
from opensora.config import ModelConfig
from opensora.errors import WeightsRefused
from opensora.model import STDiT

UPSTREAM = Path(__file__).parent / "oracle" / "stdit.safetensors"


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
    assert set(report.mapped.values()) | set(report.recomputed) == upstream.keys()
    assert report.mapped.keys() == ours.state_dict().keys()
    assert report.mapped["blocks.1.temporal_attention.qkv.weight"] == "blocks.1.attn_temp.qkv.weight"
    for own, theirs in report.mapped.items():
        assert torch.equal(ours.state_dict()[own].flatten(), upstream[theirs].flatten()), own


def test_no_two_keys_are_taken_from_one(upstream: dict[str, Tensor]) -> None:
    mapped = weights.load(upstream, model()).mapped
    assert len(set(mapped.values())) == len(mapped) == 73


def test_position_tables_of_a_file_are_never_used(upstream: dict[str, Tensor]) -> None:
    ours = model((8, 16, 12))
    before = ours.spatial_position.clone(), ours.temporal_position.clone()
    weights.load(upstream | {"pos_embed": torch.full((1, 16, 96), 9.0)}, ours)
    assert torch.equal(ours.spatial_position, before[0])
    assert torch.equal(ours.temporal_position, before[1])


def test_position_tables_may_be_absent(upstream: dict[str, Tensor]) -> None:
    del upstream["pos_embed"]
    assert weights.load(upstream, model()).recomputed == ("pos_embed_temporal",)


def test_our_own_state_dict_survives_a_round_trip_into_another_size(tmp_path: Path) -> None:
    small, large = model((1, 4, 4)), model((8, 16, 12))
    save_file(small.state_dict(), tmp_path / "model.safetensors")
    report = weights.load_file(tmp_path, large)
    assert report.format == "opensora"
    assert report.recomputed == ()
    assert all(ours == theirs for ours, theirs in report.mapped.items())
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


def test_pickle_is_never_opened(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    path.write_bytes(pickle.dumps(Bomb(tmp_path / "gone off")))
    with pytest.raises(WeightsRefused, match=r"\.pt where \.safetensors is read\. Convert pickled weights first"):
        weights.read(path)
    with pytest.raises(WeightsRefused, match=r"a directory without \.safetensors files"):
        weights.read(tmp_path)
    disguised = path.rename(tmp_path / "model.safetensors")
    with pytest.raises(WeightsRefused, match="not readable as safetensors"):
        weights.read(disguised)
    assert not (tmp_path / "gone off").exists()


class Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[Path]]:
        return Path.touch, (self.path,)


def test_absent_and_truncated_files_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(WeightsRefused, match=r"absent\.safetensors"):
        weights.read(tmp_path / "absent.safetensors")
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(UPSTREAM.read_bytes()[:100_000])
    with pytest.raises(WeightsRefused, match=r"cut\.safetensors"):
        weights.read(cut)
