"""The plan of a preparation: arithmetic with rates that say where they come from."""

from __future__ import annotations

from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from opensora.config import StageConfig
from opensora.dataset.prepare_config import Filter, Given, PrepareConfig
from orchestrator.errors import UsageError
from orchestrator.prepare import rates
from orchestrator.prepare.balance import Balance, balance
from orchestrator.prepare.plan import Own, Row, amount, not_priced, plan, total
from orchestrator.recipe import resolve
from orchestrator.recipe.files import find
from orchestrator.recipe.prices import load_prices

PRICES = load_prices()
LLAVA: dict[str, Any] = {"kind": "llava", "path": "/models/llava"}


def config(**more: Any) -> PrepareConfig:
    return PrepareConfig.model_validate({"name": "mine", "sources": [{"path": "/videos"}], **more})


def rows(one: PrepareConfig, clips: int = 400_000, stages: dict[str, StageConfig] | None = None, **more: Any) -> dict[str, Row]:
    what = amount(one, clips=clips, hours=None)
    return {row.step: row for row in plan(one, what, PRICES, workers=2, gpus=8, stages=stages or {}, own=more.pop("own", Own()), **more)}


def test_captions_of_400_000_clips_take_what_was_published_and_yours_stands_beside() -> None:
    caption = rows(config(caption=LLAVA), caption_gpu_s=1.5)["caption"]
    assert caption.device_hours == pytest.approx(400_000 * 6 / 3600) and caption.device == "h800"
    assert caption.usd == pytest.approx(Decimal("2.43") * Decimal(400_000 * 6) / 3600)
    assert caption.own_hours == pytest.approx(400_000 * 1.5 / 3600) and caption.wall_h == pytest.approx(caption.device_hours / 8)


def test_captions_that_are_there_cost_nothing_and_llava_is_to_compare_with() -> None:
    found = rows(config())
    assert found["caption"].usd == 0 and found["(by LLaVA)"].device_hours == pytest.approx(2_400_000 / 3600)
    assert total(list(found.values()))[1] == 0


def test_twice_as_many_pixels_take_twice_as_long_and_a_rate_of_yours_stands_beside() -> None:
    one = config()
    small, large = (amount(one, clips=None, hours=10, size=size) for size in ((1280, 720, 25.0), (1280, 720, 50.0)))
    frames = [plan(one, what, PRICES, workers=1, gpus=1, stages={}, own=Own(look=0.05))[2] for what in (small, large)]
    assert frames[0].device_hours == pytest.approx(10 * rates.LOOK.value) and frames[1].device_hours == pytest.approx(20 * rates.LOOK.value)
    assert frames[0].own_hours == pytest.approx(0.5)


def test_hours_and_clips_follow_from_each_other_and_what_was_assumed_is_named() -> None:
    of_clips, of_hours = amount(config(), clips=3600, hours=None), amount(config(), clips=None, hours=10)
    assert of_clips.raw_s == of_hours.raw_s == 36_000 and of_hours.clips == 3600
    assert [rate.basis for rate in of_clips.assumed] == ["assumption", "published"]
    assert amount(config(cut={"max_s": 2}), clips=100, hours=None).clip_s == 2


def test_what_is_fetched_takes_the_line_and_local_files_do_not() -> None:
    assert rows(config())["download"].wall_h == 0
    far = config(sources=[{"path": "https://host/list.csv", "index": "auto"}])
    fetched = rows(far, network_mbit_s=100.0)["download"]
    assert fetched.wall_h == pytest.approx(8 * fetched.bytes / 100e6 / 3600) and fetched.bytes > 0


def test_encoding_counts_pixels_and_tokens_of_imported_encoders_alone() -> None:
    pipeline = resolve.load(find("open-sora-1.0"))
    found = plan(
        config(), amount(config(), clips=1000, hours=None), PRICES, workers=1, gpus=1, own=Own(),
        stages={stage.name: stage.config for stage in pipeline.stages},
    )  # fmt: skip
    stage = pipeline.stage("stage2").config
    flops = 16 * 256 * 256 * rates.KL_FLOPS.value + stage.model.caption_tokens * rates.T5_FLOPS.value
    encode = next(row for row in found if row.work.endswith("for stage2"))
    assert encode.device_hours == pytest.approx(1000 * flops / (989.5e12 * 0.40) / 3600)
    demo = resolve.load(find("demo")).stages[0].config
    embedded = plan(config(), amount(config(), clips=1000, hours=None), PRICES, workers=1, gpus=1, own=Own(), stages={"one": demo})[-1]
    assert embedded.step == "encode" and embedded.device_hours == 0


def test_a_device_without_a_price_has_hours_and_no_dollars_and_is_in_no_sum() -> None:
    whole = rows(config(caption=LLAVA), gpu="my-gpu")
    assert whole["caption"].device == "my-gpu" and whole["caption"].usd is None and whole["caption"].device_hours > 0
    assert not_priced(list(whole.values())) == ("my-gpu",) and not_priced(list(rows(config()).values())) == ()
    core_h, gpu_h, usd, _ = total(list(whole.values()))
    assert gpu_h == whole["caption"].device_hours and usd == total([row for row in whole.values() if not row.on_gpu])[2] > 0
    assert core_h == sum(row.device_hours for row in whole.values() if row.device == "cpu-core")


def test_nobody_knows_how_fast_encoders_are_on_a_device_of_no_list() -> None:
    stages = {stage.name: stage.config for stage in resolve.load(find("open-sora-1.0")).stages}
    with pytest.raises(UsageError, match=r"my-gpu.*not in the price list"):
        rows(config(), stages=stages, gpu="my-gpu")


def test_text_area_is_planned_where_it_is_asked_for() -> None:
    one = PrepareConfig(name="mine", sources=(Given(path="/videos"),), filter=Filter(text_area=True))
    assert rows(one, 1000)["score"].device_hours == pytest.approx(3000 * rates.TEXT_AREA.value / 3600) and "score" not in rows(config())


def test_every_rate_has_a_unit_a_source_and_a_date() -> None:
    found = [value for value in vars(rates).values() if isinstance(value, rates.Rate)]
    assert len(found) > 10 and all(rate.unit and rate.source and len(rate.date) == 10 and rate.value > 0 for rate in found)


def test_files_that_are_there_are_counted(tmp_path: Path) -> None:
    from orchestrator.cli.prepare_plan import counted

    (tmp_path / "deep").mkdir()
    (tmp_path / "deep/a.MP4").write_bytes(b"x" * 1000)
    (tmp_path / "notes.txt").write_bytes(b"x")
    assert counted(PrepareConfig(name="mine", sources=(Given(path=str(tmp_path)),))) == ((1, 1000), True)


def test_the_ratio_of_cpu_pods_to_gpu_pods_is_that_of_their_work_and_yours_counts_before_the_table() -> None:
    def pods(gpus: int, cores: int, **more: Any) -> Balance:
        found = balance(list(rows(config(caption=LLAVA), **more).values()), clips=400_000, gpus=gpus, pod_cores=cores)
        assert found is not None
        return found

    one = pods(8, 4)
    assert one.core_s == pytest.approx(rates.CUT_OUT.value * 5) and one.gpu_s == rates.CAPTION.value
    assert one.cores_a_gpu == pytest.approx(rates.SUPPLY.value * one.core_s / one.gpu_s)
    assert one.cpu_pods == -(-8 * one.cores_a_gpu // 4) and one.gpu_pods == 8
    assert one.cpu_pods * 4 >= 8 * one.cores_a_gpu > (one.cpu_pods - 1) * 4, "no pod more than it takes"
    faster = pods(8, 4, caption_gpu_s=1.5)
    assert faster.cores_a_gpu == pytest.approx(4 * one.cores_a_gpu)
    assert pods(8, 4, own=Own(cut_out=2 * rates.CUT_OUT.value)).cores_a_gpu == pytest.approx(2 * one.cores_a_gpu)
    assert pods(1, 64).cpu_pods == 1


def test_there_is_no_ratio_where_no_gpu_captions() -> None:
    assert balance(list(rows(config()).values()), clips=400_000, gpus=8, pod_cores=16) is None
