from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from opensora.checkpoint import foreign as weights
from opensora.config import ModelConfig
from opensora.model import linear
from opensora.model import stdit as model_module
from opensora.model.stdit import STDiT, TimeEmbedder, sincos, spatial_table, temporal_table

ORACLE = Path(__file__).parents[1] / "oracle"
BOUND = 3e-6  # of the maximum: see oracle/README.md
ROUNDING = 1e-6  # of the maximum: what fp32 may add to double on any CPU
OPEN_SORA_1 = next(layout for layout in weights.LAYOUTS if layout.format == "open-sora-1.0")

Arrays = dict[str, Tensor]


@pytest.fixture(scope="module")
def oracle() -> Arrays:
    with np.load(ORACLE / "stdit_io.npz") as arrays:
        return {name: torch.from_numpy(arrays[name]) for name in arrays.files}


def reference_model(input_size: tuple[int, int, int] = (4, 8, 8), space_scale: float = 0.5, time_scale: float = 1.0) -> STDiT:
    config = ModelConfig(depth=3, width=96, heads=4, caption_width=32, caption_tokens=12, space_scale=space_scale, time_scale=time_scale)
    model = STDiT(config, input_size, out_channels=8)
    weights.load(ORACLE / "stdit.safetensors", model)
    return model


def run_a(model: STDiT, oracle: Arrays) -> Tensor:
    return model(oracle["a_x"], oracle["a_timestep"], oracle["a_y"][:, 0], oracle["a_mask"])


def error(ours: Tensor, theirs: Tensor) -> float:
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def tiny(input_size: tuple[int, int, int] = (4, 4, 4), *, seed: int = 0, **config: object) -> STDiT:
    settings = {"depth": 2, "width": 32, "heads": 4, "caption_width": 8, "caption_tokens": 6} | config
    generator = torch.Generator().manual_seed(seed)
    return STDiT(ModelConfig.model_validate(settings), input_size, 8, generator=generator)


def randomised(model: STDiT, std: float = 0.1) -> STDiT:
    """Every layer takes part, those that start at zero too."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=std, generator=generator)
    return model


def inputs(model: STDiT, clips: int = 2, tokens: int = 6) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(clips, model.config.latent_channels, *model.input_size, generator=generator)
    captions = torch.randn(clips, tokens, model.config.caption_width, generator=generator)
    mask = torch.arange(tokens) < torch.arange(tokens, tokens - clips, -1)[:, None]
    return x, torch.linspace(10, 900, clips), captions, mask


# --- equal to Open-Sora 1.0 ---


def test_output_with_mask_is_upstreams(oracle: Arrays) -> None:
    assert error(run_a(reference_model(), oracle), oracle["a_out"]) < BOUND


def test_output_without_mask_is_upstreams(oracle: Arrays) -> None:
    assert error(reference_model()(oracle["a_x"], oracle["a_timestep"], oracle["a_y"][:, 0]), oracle["b_out"]) < BOUND


def test_output_at_another_size_with_computed_tables_is_upstreams(oracle: Arrays) -> None:
    model = reference_model((8, 16, 12), space_scale=1.0, time_scale=2 / 3)
    spatial, temporal = model.position_tables((8, 8, 6), torch.device("cpu"), torch.float32)
    assert torch.equal(spatial[None], oracle["c_pos_embed"])
    assert torch.equal(temporal[None, :, 0], oracle["c_pos_embed_temporal"])
    given = [oracle["c_x"], oracle["c_timestep"], oracle["c_y"][:, 0]]
    rounded = model(*given, oracle["c_mask"])
    # In double: upstream's own fp32 rounded 2.93e-6 away; in fp32 a CPU's rounding of ours comes on top (3.11e-6 on an Intel Xeon).
    exact = model.double()(*(each.double() for each in given), oracle["c_mask"])
    assert error(exact, oracle["c_out"]) < BOUND
    assert error(rounded, exact) < ROUNDING


def test_loss_and_gradients_are_upstreams(oracle: Arrays) -> None:
    model = reference_model()
    loss = run_a(model, oracle).square().mean()
    loss.backward()
    assert error(loss, oracle["d_loss"]) < BOUND
    gradients = {OPEN_SORA_1.keys(name)[0]: parameter.grad for name, parameter in model.named_parameters()}
    compared = [name.removeprefix("d_grad.") for name in oracle if name.startswith("d_grad.")]
    assert len(compared) == 5
    for name in compared:
        gradient = gradients[name]
        assert gradient is not None
        theirs = oracle[f"d_grad.{name}"]
        assert error(gradient.reshape(theirs.shape), theirs) < BOUND, name


def _epsilon(monkeypatch: pytest.MonkeyPatch, model: STDiT) -> None:
    for block in model.blocks:
        block.norm1.eps = block.norm2.eps = 1e-5


def _exact_gelu(monkeypatch: pytest.MonkeyPatch, model: STDiT) -> None:
    exact = F.gelu
    monkeypatch.setattr(model_module.F, "gelu", lambda x, approximate: exact(x))


def _fp64_angles(monkeypatch: pytest.MonkeyPatch, model: STDiT) -> None:
    def forward(self: TimeEmbedder, time: Tensor) -> Tensor:
        angles = time.double()[:, None] * (-math.log(10_000) * torch.arange(128, dtype=torch.float64) / 128).exp()
        return self.fc2(F.silu(self.fc1(torch.cat([angles.cos(), angles.sin()], dim=1).float())))  # type: ignore[no-any-return]

    monkeypatch.setattr(TimeEmbedder, "forward", forward)


def _shift_and_scale_swapped(monkeypatch: pytest.MonkeyPatch, model: STDiT) -> None:
    honest = model_module.modulate
    monkeypatch.setattr(model_module, "modulate", lambda x, shift, scale: honest(x, scale, shift))


def _mask_ignored(monkeypatch: pytest.MonkeyPatch, model: STDiT) -> None:
    honest = F.scaled_dot_product_attention
    monkeypatch.setattr(model_module.F, "scaled_dot_product_attention", lambda q, k, v, attn_mask=None: honest(q, k, v))


@pytest.mark.parametrize("plant", [_epsilon, _exact_gelu, _fp64_angles, _shift_and_scale_swapped, _mask_ignored])
def test_bound_separates_planted_errors_from_rounding(
    oracle: Arrays, monkeypatch: pytest.MonkeyPatch, plant: Callable[[pytest.MonkeyPatch, STDiT], None]
) -> None:
    model = reference_model()
    plant(monkeypatch, model)
    assert error(run_a(model, oracle), oracle["a_out"]) > BOUND


# --- position tables ---


def test_tables_divide_positions_by_their_scale() -> None:
    assert torch.equal(temporal_table(3, 8, 2 / 3), sincos(torch.tensor([0, 1.5, 3], dtype=torch.float64), 8))
    assert torch.allclose(spatial_table(4, 4, 16, 0.5)[::5], spatial_table(7, 7, 16, 1.0)[::16], rtol=0, atol=1e-15)


def test_spatial_table_tells_the_column_first_and_runs_along_rows() -> None:
    table = spatial_table(2, 3, 8, 1.0).unflatten(0, (2, 3))
    assert torch.equal(table[0, :, :4], table[1, :, :4])  # the column's half is blind to the row
    assert torch.equal(table[:, 0, 4:], table[:, 2, 4:])
    assert torch.equal(table[1, 0, 4:], table[0, 1, :4])  # row 1 and column 1 are encoded alike


def test_tables_are_never_saved() -> None:
    assert not [key for key in tiny().state_dict() if "position" in key or "frequencies" in key]


# --- laws of the architecture ---


def test_xl_2_has_the_published_number_of_parameters() -> None:
    with torch.device("meta"):
        model = STDiT(ModelConfig(), (16, 32, 32), out_channels=8)
    assert round(sum(parameter.numel() for parameter in model.parameters()) / 2**20) == 724  # upstream counts in units of 2^20


def test_initial_prediction_is_zero_and_initial_weights_are_the_generators() -> None:
    model, again, other = tiny(seed=1), tiny(seed=1), tiny(seed=2)
    x, time, captions, mask = inputs(model)
    assert not model(x, time, captions, mask).any()
    pairs = zip(model.state_dict().items(), again.state_dict().values(), other.state_dict().values(), strict=True)
    for (name, ours), same, different in pairs:
        assert torch.equal(ours, same), name
        starts_random = (
            not name.endswith("bias")
            and "final_layer.linear" not in name
            and not name.endswith(("cross_attention.proj.weight", "temporal_attention.proj.weight"))
        )
        if starts_random or name == "patch_embedder.proj.bias":
            assert not torch.equal(ours, different), name
        else:
            assert not ours.any(), name


def test_video_model_at_step_0_equals_the_image_model_on_each_frame() -> None:
    image, video = randomised(tiny((1, 4, 4))), tiny((4, 4, 4))
    for block in image.blocks:
        torch.nn.init.zeros_(block.temporal_attention.proj.weight)
        torch.nn.init.zeros_(block.temporal_attention.proj.bias)
    weights.load(image.state_dict(), video)
    x, time, captions, mask = inputs(video)
    expected = torch.cat([image(x[:, :, [frame]], time, captions, mask) for frame in range(4)], dim=2)
    assert error(video(x, time, captions, mask), expected) < BOUND


def test_residual_temporal_position_tells_frames_apart_without_any_temporal_attention() -> None:
    told, untold = randomised(tiny(temporal_position="residual")), randomised(tiny())
    x, time, captions, mask = inputs(told)
    still = x[:, :, :1].expand_as(x)  # every frame alike
    for model, differs in ((told, True), (untold, False)):
        for block in model.blocks:
            torch.nn.init.zeros_(block.temporal_attention.proj.weight)
        out = model(still, time, captions, mask)
        assert (error(out[:, :, 1], out[:, :, 0]) > 1e-3) is differs


def test_temporal_position_reaches_the_temporal_attention_of_block_0_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model = randomised(tiny())
    x, time, captions, mask = inputs(model)
    before = model(x, time, captions, mask)
    torch.nn.init.zeros_(model.blocks[0].temporal_attention.proj.weight)
    silent = model(x, time, captions, mask)
    spatial, temporal = model.position_tables((4, 2, 2), x.device, x.dtype)
    monkeypatch.setattr(model, "position_tables", lambda *_: (spatial, temporal + 1))
    assert torch.equal(model(x, time, captions, mask), silent)
    assert not torch.equal(before, silent)


def test_ragged_captions_in_a_batch_equal_each_clip_alone() -> None:
    """Upstream's packed captions broke where they were shorter than the longest (issue 439)."""
    model = randomised(tiny())
    x, time, captions, mask = inputs(model, clips=3)
    together = model(x, time, captions, mask)
    for clip, length in enumerate((6, 5, 4)):
        alone = model(x[[clip]], time[[clip]], captions[[clip], :length])
        assert error(together[[clip]], alone) < BOUND


def test_padding_does_not_matter_wherever_it_is() -> None:
    model = randomised(tiny())
    x, time, captions, mask = inputs(model)
    moved, kept = captions.flip(1), mask.flip(1)
    assert error(model(x, time, moved, kept), model(x, time, captions.masked_fill(~mask[..., None], 9.0), mask)) < BOUND


def test_captions_without_any_kept_token_stay_finite() -> None:
    model = randomised(tiny())
    x, time, captions, mask = inputs(model)
    out = model(x, time, captions, torch.zeros_like(mask))
    out.square().sum().backward()
    assert out.isfinite().all()
    assert all(parameter.grad is None or parameter.grad.isfinite().all() for parameter in model.parameters())


def test_dropped_captions_are_the_null_caption_under_their_own_mask() -> None:
    model = randomised(tiny())
    x, time, captions, mask = inputs(model)
    swapped = captions.clone()
    swapped[1] = model.null_caption
    drop = torch.tensor([False, True])
    assert torch.equal(model(x, time, captions, mask, drop), model(x, time, swapped, mask))
    assert not torch.equal(model(x, time, captions, mask, drop)[1], model(x, time, captions, mask)[1])


def test_forward_draws_no_random_number_even_while_training() -> None:
    model = randomised(tiny(caption_dropout=0.9)).train()
    x, time, captions, mask = inputs(model)
    state = torch.get_rng_state()
    out = model(x, time, captions, mask)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(out, model.eval()(x, time, captions, mask))


def test_forward_never_looks_at_values_on_the_host() -> None:
    """On a GPU each look is a wait for it; upstream's packing of captions cost one a step."""
    model = tiny().to("meta")
    x, time, captions, mask = (tensor.to("meta") for tensor in inputs(model))
    assert model(x, time, captions, mask, torch.ones(2, dtype=torch.bool, device="meta")).shape == (2, 8, 4, 4, 4)


@pytest.mark.parametrize("patch", [(1, 2, 2), (2, 2, 2), (1, 1, 4)])
def test_any_patch_and_rectangle_keeps_its_shape(patch: tuple[int, int, int]) -> None:
    model = randomised(tiny((4, 6, 8), patch=patch))
    x, time, captions, mask = inputs(model)
    assert model(x, time, captions, mask).shape == (2, 8, 4, 6, 8)


def test_unpatchify_puts_each_patch_where_the_embedder_took_it() -> None:
    model = tiny((2, 4, 6))
    model.out_channels = model.config.latent_channels
    x = torch.randn(2, 4, 2, 4, 6)
    patches = x.unflatten(3, (2, 2)).unflatten(5, (3, 2)).permute(0, 2, 3, 5, 4, 6, 1).reshape(2, 2, 6, 16)  # channel fastest
    assert torch.equal(model.unpatchify(patches, 2, 3), x)


def test_output_is_fp32_under_autocast() -> None:
    model = randomised(tiny())
    x, time, captions, mask = inputs(model)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(x, time, captions, mask)
    assert out.dtype == torch.float32
    assert error(out, model(x, time, captions, mask)) < 0.1


# --- freezing ---


def test_frozen_temporal_layers_change_no_number_and_get_no_gradient() -> None:
    free, frozen = randomised(tiny((1, 4, 4))), randomised(tiny((1, 4, 4)))
    for model in (free, frozen):
        for block in model.blocks:
            torch.nn.init.zeros_(block.temporal_attention.proj.weight)
            torch.nn.init.zeros_(block.temporal_attention.proj.bias)
    frozen.freeze_temporal()
    x, time, captions, mask = inputs(free)
    outputs = [model(x, time, captions, mask) for model in (free, frozen)]
    assert torch.equal(*outputs)
    outputs[1].square().sum().backward()
    for name, parameter in frozen.named_parameters():
        assert (parameter.grad is None) == ("temporal_attention" in name), name
        assert parameter.requires_grad != ("temporal_attention" in name), name  # neither do optimizer and DDP wait for one


def test_weights_loaded_into_a_frozen_model_keep_their_temporal_effect() -> None:
    taught, frozen = randomised(tiny()), tiny()
    frozen.freeze_temporal()
    frozen.load_state_dict(taught.state_dict())
    x, time, captions, mask = inputs(taught)
    assert torch.equal(frozen(x, time, captions, mask), taught(x, time, captions, mask))


# --- what does not fit is said with both numbers ---


@pytest.mark.long
def test_a_block_compiles_into_one_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on CUDA, where linear layers are torch's; `fullgraph` fails where Python would have to step in."""
    monkeypatch.setattr(linear, "AVAILABLE", False)
    plain, compiled = randomised(tiny()), randomised(tiny())
    for block in compiled.blocks:
        block.compile(backend="aot_eager", fullgraph=True)
    x, time, captions, mask = inputs(plain)
    for model in (plain, compiled):
        model(x, time, captions, mask).square().mean().backward()
    for ours, theirs in zip(compiled.parameters(), plain.parameters(), strict=True):
        assert ours.grad is not None and theirs.grad is not None
        assert error(ours.grad, theirs.grad) < 1e-5 or float(theirs.grad.abs().max()) < 1e-9


def test_odd_latents_are_refused() -> None:
    with pytest.raises(ValueError, match="latent columns 15 do not divide into patches of 2"):
        tiny((4, 16, 15))


def test_odd_clips_are_refused() -> None:
    model = tiny()
    x, time, captions, mask = inputs(model)
    with pytest.raises(ValueError, match="latent rows 3 do not divide into patches of 2"):
        model(x[..., :3, :], time, captions, mask)
    with pytest.raises(ValueError, match=r"\(2, 3, 4, 4, 4\) do not fit a model of 4 channels"):
        model(x[:, :3], time, captions, mask)


@pytest.mark.parametrize("size", [(1, 4, 4), (8, 2, 6), (4, 8, 8)])
def test_one_model_serves_every_size(size: tuple[int, int, int]) -> None:
    """As one that was made for that size; positions of a larger area are spread over the range that the weights know."""
    model, made = randomised(tiny()), randomised(tiny(size))
    x, time, captions, mask = inputs(made)
    scale = (size[1] * size[2] / 16) ** 0.5
    made.config = made.config.model_copy(update={"space_scale": scale})
    assert torch.equal(model(x, time, captions, mask), made(x, time, captions, mask))
    other = randomised(tiny(size))
    same = torch.equal(other(x, time, captions, mask), made(x, time, captions, mask))
    assert same == (scale == 1)


@pytest.mark.parametrize(
    "cut", [lambda c, m: (c[..., :4], m), lambda c, m: (c.repeat(1, 2, 1), m), lambda c, m: (c, m[:1]), lambda c, m: (c[:1], m[:1])]
)
def test_captions_of_another_size_are_refused(cut: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> None:
    model = tiny()
    x, time, captions, mask = inputs(model)
    with pytest.raises(ValueError, match=r"fit"):
        model(x, time, *cut(captions, mask))


def test_width_without_whole_sines_and_cosines_is_refused() -> None:
    with pytest.raises(ValueError, match="width 34"):
        tiny(width=34, heads=2)
