"""A plan at the published utilisation is the published run; what is committed costs nothing more."""

from __future__ import annotations

from decimal import Decimal

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from opensora.config import Activations, EvaluateConfig
from opensora.planning.flops import stage_flops, train_flops_per_clip
from orchestrator.accounting.plan import NOTHING, check_budget, extra_flops, plan
from orchestrator.errors import Refused, UsageError
from orchestrator.recipe.files import find
from orchestrator.recipe.pipeline import Pipeline
from orchestrator.recipe.prices import load_prices
from orchestrator.recipe.resolve import load

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


@pytest.mark.long
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


def test_every_stage_says_what_it_needs_of_a_device() -> None:
    rows = plan(OPEN_SORA, PRICES).rows
    assert rows[0].fit is None, "an import computes nothing"
    for row in rows[1:]:
        assert row.fit is not None
        assert row.fit.device_bytes == 80 * 2**30
        assert row.fit.activations == Activations(), "16 frames fit without recomputation"
        assert row.fit.fits


@pytest.mark.long
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
