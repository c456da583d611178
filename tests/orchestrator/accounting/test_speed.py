"""How fast a stage is taken to train, and who says so."""

from __future__ import annotations

import pytest

from opensora.config import ModelConfig
from opensora.planning.calibration import Calibration
from opensora.planning.flops import train_flops_per_clip
from orchestrator.accounting.plan import plan
from orchestrator.errors import UsageError
from orchestrator.recipe.files import find
from orchestrator.recipe.prices import load_prices
from orchestrator.recipe.resolve import load

OPEN_SORA = load(find("open-sora-1.0"))
PRICES = load_prices()
H800 = PRICES.device("h800")


def calibrated(device: str = "h800", tflops: float = 300.0, recompute: str = "none") -> Calibration:
    """Stage 2's own size, timed at so many TFLOP/s."""
    config = OPEN_SORA.stage("stage2").config
    frames, tokens = config.tokens
    work = train_flops_per_clip(config) * config.batch_size
    point = {
        "model": config.model,
        "out_channels": config.out_channels,
        "frames": frames,
        "tokens": tokens,
        "captions": config.model.caption_tokens,
        "batch": config.batch_size,
        "dtype": "bf16",
        "recompute": recompute,
        "step_s": work / tflops / 1e12,
        "tflops": tflops,
        "mfu": tflops / 989.5,
    }
    return Calibration(device=device, machine="a node", date="2026-11-23", command="bench/gpu.py", points=(point,))


def test_a_calibrated_step_wins_over_the_assumption_and_loses_to_the_stages_own() -> None:
    row = plan(OPEN_SORA, PRICES, calibrations=[calibrated()]).rows[1]
    assert row.basis == "calibrated"
    assert row.mfu == pytest.approx(300 / 989.5)
    assert "on a node, 2026-11-23" in row.source
    assert row.low.wall_h == pytest.approx(0.9 * row.expected.wall_h)
    own = plan(OPEN_SORA, PRICES, calibrations=[calibrated()], measured={"stage2": 1.974}).rows
    assert [one.basis for one in own[1:3]] == ["measured", "calibrated"]


def test_a_calibration_of_another_device_or_of_quite_another_size_says_nothing() -> None:
    assert plan(OPEN_SORA, PRICES, calibrations=[calibrated("h100")]).rows[1].basis == "assumed"
    small = OPEN_SORA.stage("stage2").config.model_copy(update={"model": ModelConfig(depth=2, width=64, heads=4)})
    stage = OPEN_SORA.stage("stage2").model_copy(update={"config": small})
    pipeline = OPEN_SORA.model_copy(update={"stages": (stage,)})
    assert plan(pipeline, PRICES, calibrations=[calibrated()]).rows[0].basis == "assumed"


def test_a_speed_of_another_policy_is_corrected_by_what_is_computed_again() -> None:
    """A third more FLOPs under full recomputation, of the measured step or of the planned one."""
    assert plan(OPEN_SORA, PRICES, calibrations=[calibrated(recompute="full")]).rows[1].mfu == pytest.approx(300 / 989.5 * 4 / 3)
    full = load(find("open-sora-1.0"), overrides={"stage2.activations.recompute": "full"})
    assert plan(full, PRICES, calibrations=[calibrated()]).rows[1].mfu == pytest.approx(300 / 989.5 * 3 / 4)


@pytest.mark.parametrize("mfu", [0.0, -0.1, 1.01, float("nan")])
def test_an_impossible_mfu_is_refused(mfu: float) -> None:
    with pytest.raises(UsageError, match=r"^mfu: .* is not in \(0, 1\]\. Give a fraction"):
        plan(OPEN_SORA, PRICES, mfu=mfu)


def test_without_an_mfu_the_price_list_assumes_one_with_a_range() -> None:
    result = plan(OPEN_SORA, PRICES)
    row = result.rows[1]
    assert (row.basis, row.mfu) == ("assumed", H800.mfu.expected)
    for end, mfu in ((row.low, H800.mfu.high), (row.expected, H800.mfu.expected), (row.high, H800.mfu.low)):
        assert end.gpu_hours * 3600 * 989.5e12 * mfu == pytest.approx(row.flops)
    assert result.low.usd < result.expected.usd < result.high.usd


def test_a_given_mfu_is_taken_at_its_word() -> None:
    row = plan(OPEN_SORA, PRICES, mfu=0.45, measured={"stage2": 1.0}).rows[1]
    assert (row.basis, row.mfu) == ("given", 0.45)
    assert row.low == row.expected == row.high


def test_measured_steps_win_over_the_assumption_and_say_their_mfu() -> None:
    # Open-Sora 1.0's own stage 2: 1.974 s a step on 64 H800.
    row = plan(OPEN_SORA, PRICES, measured={"stage2": 1.974}).rows[1]
    assert row.basis == "measured"
    assert row.expected.wall_h == pytest.approx(80_000 * 1.974 / 3600)
    assert row.mfu == pytest.approx(0.070, abs=0.001)
    assert row.low.wall_h == pytest.approx(0.9 * row.expected.wall_h)
    assert row.high.wall_h == pytest.approx(1.1 * row.expected.wall_h)
