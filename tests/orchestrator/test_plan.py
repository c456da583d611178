"""A plan at the published utilisation is the published run; what is committed costs nothing more."""

from __future__ import annotations

from decimal import Decimal

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from opensora.calibration import Calibration
from opensora.config import Activations, EvaluateConfig, ModelConfig
from opensora.flops import stage_flops, train_flops_per_clip
from orchestrator.config import Pipeline, find, load
from orchestrator.errors import Refused, UsageError
from orchestrator.plan import NOTHING, check_budget, extra_flops, plan, size_plan
from orchestrator.prices import load_prices

LAW = settings(max_examples=30, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
"""Deterministic, and indifferent to a busy machine."""


OPEN_SORA = load(find("open-sora-1.0"))
PRICES = load_prices()
H800 = PRICES.device("h800")
PUBLISHED_MFU = {"stage2": 0.070, "stage3a": 0.055, "stage3b": 0.063}
PUBLISHED_HOURS = {"stage2": 2808, "stage3a": 1080, "stage3b": 840}


def with_devices(pipeline: Pipeline, nodes: int) -> Pipeline:
    stages = []
    for stage in pipeline.stages:
        resources = stage.spec.resources.model_copy(update={"nodes": nodes})
        stages.append(stage.model_copy(update={"spec": stage.spec.model_copy(update={"resources": resources})}))
    return pipeline.model_copy(update={"stages": tuple(stages)})


def test_at_the_published_utilisation_the_plan_is_the_published_run() -> None:
    rows = {row.stage: row for row in plan(OPEN_SORA, PRICES, mfu=PUBLISHED_MFU).rows}
    for stage, hours in PUBLISHED_HOURS.items():
        assert rows[stage].expected.gpu_hours == pytest.approx(hours, rel=0.02)
        assert rows[stage].expected.wall_h == pytest.approx(hours / 64, rel=0.02)
        assert rows[stage].ratio == pytest.approx(1, rel=0.02)
    assert rows["stage1"].expected == NOTHING
    assert rows["stage1"].basis == "import"


def test_at_45_percent_open_sora_takes_685_hours_and_about_a_seventh_of_the_bill() -> None:
    result = plan(OPEN_SORA, PRICES, mfu=0.45)
    assert result.expected.gpu_hours == pytest.approx(685, abs=5)
    assert result.published_gpu_hours == 4728
    assert result.published_usd == 11500
    assert result.ratio == pytest.approx(685 / 4728, rel=0.01)
    assert result.expected.usd == pytest.approx(Decimal("685.5") * Decimal("2.43"), rel=Decimal("0.001"))


def test_the_blended_price_pays_the_published_bill() -> None:
    assert float(H800.usd_per_hour) * 4728 == pytest.approx(11500, rel=0.002)


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


def test_parts_of_a_step_take_the_devices_as_much_longer() -> None:
    """Half the nodes and twice the parts are the same work: equal device-hours and dollars, twice the hours."""
    whole = with_devices(OPEN_SORA, 8)
    half = with_devices(OPEN_SORA, 4)
    parts = [one.model_copy(update={"config": one.config.model_copy(update={"accumulate": 2})}) for one in half.stages]
    ours, theirs = (plan(each, PRICES, mfu=0.45) for each in (half.model_copy(update={"stages": tuple(parts)}), whole))
    for one, other in zip(ours.rows, theirs.rows, strict=True):
        if other.basis != "import" and other.steps:
            assert one.expected.device_hours == pytest.approx(other.expected.device_hours, rel=1e-6)
            assert one.expected.wall_h == pytest.approx(2 * other.expected.wall_h, rel=1e-6)


def test_what_is_committed_costs_nothing_more() -> None:
    whole = plan(OPEN_SORA, PRICES)
    rest = plan(OPEN_SORA, PRICES, committed={"stage1", "stage2"})
    assert rest.rows[1].basis == "committed"
    assert rest.rows[1].expected == NOTHING
    assert rest.rows[1].flops == whole.rows[1].flops
    assert rest.expected.usd == whole.expected.usd - whole.rows[1].expected.usd
    assert rest.rows[1].ratio is None
    assert rest.ratio is None, "the rest of a run is not compared with the whole published run"


@LAW
@given(st.sets(st.sampled_from([stage.name for stage in OPEN_SORA.stages])), st.floats(0.01, 1))
def test_totals_are_the_sums_of_the_rows(committed: set[str], mfu: float) -> None:
    result = plan(OPEN_SORA, PRICES, mfu=mfu, committed=committed)
    assert result.expected.usd == sum(row.expected.usd for row in result.rows)
    assert result.expected.wall_h == pytest.approx(sum(row.expected.wall_h for row in result.rows))
    assert result.expected.gpu_hours == pytest.approx(sum(row.expected.gpu_hours for row in result.rows))


@LAW
@given(st.integers(1, 64))
def test_more_devices_of_the_same_stage_do_more_work_in_the_same_time(nodes: int) -> None:
    """The batch is per device: twice the devices see twice the clips, at the same wall time and twice the price."""
    one, many = plan(with_devices(OPEN_SORA, 1), PRICES), plan(with_devices(OPEN_SORA, nodes), PRICES)
    assert many.expected.wall_h == pytest.approx(one.expected.wall_h)
    assert float(many.expected.usd) == pytest.approx(float(one.expected.usd) * nodes)


def test_a_cpu_has_device_hours_and_no_gpu_hours() -> None:
    stages = tuple(
        stage.model_copy(
            update={"spec": stage.spec.model_copy(update={"resources": stage.spec.resources.model_copy(update={"device": "cpu-core"})})}
        )
        for stage in OPEN_SORA.stages
    )
    result = plan(OPEN_SORA.model_copy(update={"stages": stages}), PRICES)
    assert result.expected.gpu_hours == 0
    assert result.expected.device_hours > 0
    assert result.rows[1].ratio is None


def test_judging_and_drawing_are_planned_too() -> None:
    stage = OPEN_SORA.stage("stage2")
    config = stage.config.model_copy(update={"prompts": ("a", "b"), "evaluate": EvaluateConfig(kind="digits", clips=10, frames=32)})
    forward = train_flops_per_clip(config) / 3
    # 2 prompts and 10 clips of twice the length, 100 sampling steps, twice each under guidance.
    assert extra_flops(config) == pytest.approx((2 + 20) * 100 * 2 * forward)
    without = config.model_copy(update={"sampling": config.sampling.model_copy(update={"guidance": 1.0})})
    assert extra_flops(without) == pytest.approx(extra_flops(config) / 2)
    assert extra_flops(stage.config) == 0


def test_the_flops_of_a_row_are_the_stages() -> None:
    for stage, row in zip(OPEN_SORA.stages, plan(OPEN_SORA, PRICES).rows, strict=True):
        assert row.flops == stage_flops(stage.config, stage.devices)


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


def test_every_stage_says_what_it_needs_of_a_device() -> None:
    rows = plan(OPEN_SORA, PRICES).rows
    assert rows[0].fit is None, "an import computes nothing"
    for row in rows[1:]:
        assert row.fit is not None
        assert row.fit.device_bytes == 80 * 2**30
        assert row.fit.activations == Activations(), "16 frames fit without recomputation"
        assert row.fit.fits


def test_auto_takes_what_fits_and_a_named_policy_is_not_changed() -> None:
    long = {"stage3b.data.frames": "64"}
    auto = plan(load(find("open-sora-1.0"), overrides=long), PRICES).rows[3].fit
    assert auto is not None
    assert auto.fits
    assert auto.activations.recompute == "full"
    named = plan(load(find("open-sora-1.0"), overrides=long | {"stage3b.activations.recompute": "none"}), PRICES).rows[3].fit
    assert named is not None
    assert named.activations == Activations()
    assert named.fits is False


def test_a_device_of_unknown_memory_fits_neither_well_nor_badly() -> None:
    pipeline = load(find("open-sora-1.0"), overrides={"stage2.resources.device": "local-gpu"})
    needs = plan(pipeline, PRICES).rows[1].fit
    assert needs is not None
    assert needs.fits is None
    assert needs.memory.total > 10**10


def test_devices_that_share_clips_must_divide() -> None:
    pipeline = load(find("open-sora-1.0"), overrides={"stage2.parallel.sequence": "3"})
    with pytest.raises(UsageError, match=r"parallel\.sequence 3 does not divide 64 devices"):
        plan(pipeline, PRICES)


def test_a_minute_of_1080p_is_planned_as_computed_by_hand() -> None:
    """11.75M tokens; 91.4 PFLOP useful; two all-to-alls a block in three passes, 200 GB/s; boundaries of 94.8 GB a device on the host."""
    found = size_plan(OPEN_SORA.stage("stage3b").config, PRICES, "h800", frames=1440, height=1088, width=1920, devices=8)
    assert (found.frames, found.tokens, found.clip_tokens) == (1440, 8160, 11_750_400)
    assert found.flops == pytest.approx(91.4e15, rel=1e-3)
    assert found.stage.parallel.sequence == 8
    assert found.chosen is not None
    assert found.chosen.activations == Activations(recompute="full", offload=True, mlp_chunks=16)
    stream = 11_750_400 / 8 * 1152 * 2
    assert found.chosen.memory.host > 28 * stream
    assert found.exchanged == pytest.approx(2 * 28 * 3 * stream * 7 / 8)
    forward = found.flops / 3
    computing = (found.flops + forward) / (8 * 989.5e12 * 0.40)
    assert found.options[1].step_s == pytest.approx(computing + found.exchanged / 200e9)
    assert found.step_s == pytest.approx(43, abs=1)
    assert [option.fits for option in found.options].count(True) == 1


def test_a_short_clip_needs_nobody_to_share_it() -> None:
    found = size_plan(OPEN_SORA.stage("stage3b").config, PRICES, "h800", frames=16, height=256, width=448, devices=8)
    assert found.stage.parallel.sequence == 1
    assert found.exchanged == 0
    assert found.chosen == found.options[0]


def test_a_size_that_does_not_divide_is_refused_with_the_next_one() -> None:
    with pytest.raises(UsageError, match=r"^--shape: height 1080 is not a multiple of 16\. Use 1088$"):
        size_plan(OPEN_SORA.stage("stage3b").config, PRICES, "h800", frames=1440, height=1080, width=1920, devices=8)


@pytest.mark.parametrize("mfu", [0.0, -0.1, 1.01, float("nan")])
def test_an_impossible_mfu_is_refused(mfu: float) -> None:
    with pytest.raises(UsageError, match=r"^mfu: .* is not in \(0, 1\]\. Give a fraction"):
        plan(OPEN_SORA, PRICES, mfu=mfu)


def test_an_unknown_device_is_refused_with_the_closest_one() -> None:
    pipeline = load(find("open-sora-1.0"), overrides={"stage2.resources.device": "h80"})
    with pytest.raises(UsageError) as caught:
        plan(pipeline, PRICES)
    assert str(caught.value) == "device 'h80': is not in the price list. Did you mean 'h800'?"


def test_a_plan_above_the_budget_is_refused_with_both_numbers() -> None:
    result = plan(OPEN_SORA, PRICES, mfu=0.45)
    with pytest.raises(Refused) as caught:
        check_budget(result, 1000)
    assert caught.value.exit_code == 4
    assert str(caught.value) == ("budget_usd: the plan costs $1,665.77, the budget is $1,000.00. Raise budget_usd, or launch fewer stages")
    check_budget(result, 1666)
    check_budget(result, float(result.expected.usd) + 1e-9)
    check_budget(result, None)
