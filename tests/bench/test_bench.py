"""The benches: each runs, the table says what was measured, and a missed floor fails `scripts/bench --check`."""

from __future__ import annotations

import importlib
import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

BENCH = Path(__file__).resolve().parents[2] / "bench"
sys.path.insert(0, str(BENCH))  # scripts, not a package: each finds its neighbours beside itself

import attention  # noqa: E402
import harness  # noqa: E402
import step  # noqa: E402
import table  # noqa: E402

from opensora.config import ModelConfig  # noqa: E402
from opensora.model.stdit import STDiT  # noqa: E402
from opensora.planning import calibration  # noqa: E402
from opensora.planning.flops import forward_flops, full_attention_flops  # noqa: E402

SMALL = ModelConfig(depth=2, width=64, heads=2, caption_width=32, caption_tokens=8)


def row(measured: float, *, floor: float | None = 2.0, goal: float | None = 5.0, better: str = "more") -> dict[str, Any]:
    return {"name": "made up", "measured": measured, "unit": "x", "floor": floor, "goal": goal, "better": better}


def reading(*rows: dict[str, Any], quick: bool = False, **raw: Any) -> dict[str, Any]:
    about = {"machine": "a machine", "date": "2026-01-02", "load": [0, 0], "seconds": 1}
    return {"bench": "step", "quick": quick, "rows": list(rows), "raw": raw, "about": about}


# ------------------------------------------------------------------------------------------------------------------
# Floors and the table
# ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "code"),
    [
        (row(2.0), 0),
        (row(1.99), 1),
        (row(0.1, floor=None), 0),
        (row(2.0, better="less"), 0),
        (row(2.01, better="less"), 1),
        (row(math.nan), 1),
    ],
)
def test_check_fails_below_a_floor_and_only_there(
    given: dict[str, Any], code: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(table, "measured", lambda name, quick: reading(given))
    monkeypatch.setattr(table, "FOLDER", tmp_path)
    assert table.main(["step", "--check"]) == code
    assert not list(tmp_path.iterdir()), "a check writes nothing"


def test_quick_sizes_have_no_floors(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(table, "measured", lambda name, quick: reading(row(0.1), quick=quick))
    monkeypatch.setattr(table, "FOLDER", tmp_path)
    assert table.main(["step", "--check", "--quick"]) == 0
    assert not list(tmp_path.iterdir())


def test_a_missed_floor_is_named_with_both_numbers() -> None:
    assert table.below({"step": reading(row(1.5), row(3.0))}) == ["made up: 1.50x, floor 2x"]


def test_the_table_tells_measured_floor_and_goal_and_what_was_skipped() -> None:
    text = table.table({"step": reading(row(3.0)), "gpu": reading(skipped="no device.")})
    assert "| `step` | made up | 3x | ≥ 2x | ≥ 5x (not met) |" in text
    assert text.endswith("`gpu`: no device.\n")


def test_a_bench_run_again_replaces_its_own_reading_of_the_day(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(table, "FOLDER", tmp_path)
    table.write({"step": reading(row(3.0), libraries={"torch": "1"}), "save": reading(row(7.0))}, "2026-01-02")
    table.write({"step": reading(row(4.0), libraries={"torch": "1"})}, "2026-01-02")
    raw = json.loads((tmp_path / "2026-01-02-trainer.json").read_text())
    assert {name: each["rows"][0]["measured"] for name, each in raw.items()} == {"step": 4.0, "save": 7.0}
    text = (tmp_path / "2026-01-02-trainer.md").read_text()
    assert "a machine" in text
    assert "| 4x |" in text
    assert "| 3x |" not in text


def test_a_name_that_is_no_bench_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as refused:
        table.main(["stop"])
    assert refused.value.code == 2
    assert "no bench stop" in capsys.readouterr().err


def test_ways_take_turns_and_the_first_round_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    now, order = [0.0], []
    costs = {"a": iter([9.0, 3.0, 2.0]), "b": iter([0.5, 4.0, 6.0])}
    monkeypatch.setattr(harness.time, "process_time", lambda: now[0])

    def work(name: str) -> None:
        order.append(name)
        now[0] += next(costs[name])

    best = harness.interleaved({"a": lambda: work("a"), "b": lambda: work("b")}, rounds=2)
    assert best == {"a": 2.0, "b": 4.0}
    assert "".join(order) == "ababab"


# ------------------------------------------------------------------------------------------------------------------
# The benches
# ------------------------------------------------------------------------------------------------------------------


@pytest.mark.long
def test_a_bench_is_a_process_of_one_thread_that_prints_its_reading() -> None:
    found = table.measured("attention", quick=True)
    assert (found["bench"], found["quick"]) == ("attention", True)
    assert [each["name"] for each in found["rows"]] == ["STDiT against full attention, T 4, S 16 (FLOPs: 0.84x)"]
    assert found["about"]["machine"] == harness.machine()


@pytest.mark.long
def test_the_smallest_size_of_the_loader_runs() -> None:
    found = table.measured("loader", quick=True)  # in a process: WebDataset leaves its files to the garbage collector
    assert [each["measured"] > 0 for each in found["rows"]] == [True, True, True]


def numbers(raw: Any) -> Iterator[float]:
    """All that a bench has read, however deep."""
    if isinstance(raw, dict):
        raw = list(raw.values())
    if isinstance(raw, list | tuple):
        for each in raw:
            yield from numbers(each)
    elif isinstance(raw, int | float) and not isinstance(raw, bool):
        yield float(raw)


@pytest.mark.long
@pytest.mark.parametrize("name", [name for name in table.BENCHES if name not in ("gpu", "attention", "loader")])
def test_the_smallest_size_of_each_bench_runs(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    module = importlib.import_module(name)
    rows, raw = module.measure(None, True) if name == "save" else module.measure(True)
    assert rows
    assert raw
    read = [number for number in numbers(raw) if number]
    for each in map(asdict, rows):
        assert math.isfinite(each["measured"]), each
        assert each["measured"] >= 0, each
        if each["unit"] == "x":
            assert any(math.isclose(one / other, each["measured"], rel_tol=1e-9) for one in read for other in read), f"of what? {each}"
        if "difference" in each["name"] or "bytes" in each["name"]:  # not a speed: holds at every size
            assert table.reaches(each, each["floor"]), each


@pytest.mark.long
def test_the_gpu_bench_runs_its_own_code_on_a_cpu() -> None:
    command = [sys.executable, str(BENCH / "gpu.py"), "--device", "cpu", "--tiny"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    names = " ".join(each["name"] for each in found["rows"])
    assert found["quick"], "sizes that mean nothing are not compared with floors"
    assert all(part in names for part in ("MFU at 16x256²", "full attention", "1 minute of 1080p"))


@pytest.mark.long
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_its_bench_says_so() -> None:
    found = table.measured("gpu", quick=False)
    assert found["rows"] == []
    assert "not run on a GPU" in found["raw"]["skipped"]


def test_the_full_variant_does_the_work_that_is_counted_for_it() -> None:
    frames, side = 4, 4
    shape = (frames, 2 * side, 2 * side)
    given = torch.randn(1, 4, *shape), torch.tensor([5.0]), torch.randn(1, 8, 32)
    with torch.no_grad():
        divided = step.counted(lambda: STDiT(SMALL, shape, 8)(*given))
        whole = step.counted(lambda: attention.with_full_attention(STDiT(SMALL, shape, 8))(*given))
    assert divided == forward_flops(SMALL, 8, frames, side * side)
    assert whole == full_attention_flops(SMALL, 8, frames, side * side)


def test_the_full_variant_of_one_frame_is_the_model_itself() -> None:
    model = STDiT(SMALL, (1, 8, 8), 8, generator=torch.Generator().manual_seed(0))
    torch.nn.init.normal_(model.final_layer.linear.weight, generator=torch.Generator().manual_seed(1))
    for block in model.blocks:
        block.temporal_attention.requires_grad_(False)
        block.temporal_attention.proj.bias.data.zero_()
    given = torch.randn(2, 4, 1, 8, 8), torch.tensor([5.0, 700.0]), torch.randn(2, 8, 32)
    model.config = model.config.model_copy(update={"temporal_position": "residual"})  # in front of both, so that they see the same
    with torch.no_grad():
        expected = model(*given)
        assert expected.any()
        assert torch.allclose(attention.with_full_attention(model)(*given), expected, atol=1e-6)


def test_the_points_of_a_cpu_are_what_the_plan_reads(tmp_path: Path) -> None:
    step.calibrate(tmp_path / "cpu.json", quick=True)
    found = calibration.read(tmp_path / "cpu.json")
    assert found.device == "cpu-core"
    assert found.points[0].dtype == "fp32"
