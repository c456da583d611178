from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "bench"))  # scripts, not a package

import levers

ON, OFF = "iddpm, min_snr 5", "iddpm"


def run(*losses: float, cpu_s: float = 1.0) -> dict[str, Any]:
    points = [{"step": 10 * number, "cpu_s": cpu_s * number, "loss": loss} for number, loss in enumerate(losses, 1)]
    return {"points": points, "tflop": 1.0}


def test_runs_that_are_done_are_not_made_again() -> None:
    done = {levers.name_of(OFF, 0): run(1.0), levers.name_of(ON, 1): run(1.0)}
    assert list(levers.missing(done, 2, [OFF, ON])) == [(ON, 0), (OFF, 1)]


def test_a_lever_is_compared_on_the_same_seeds() -> None:
    runs = {
        "iddpm / seed 0": run(1.0, 0.8, 0.6),
        "iddpm / seed 1": run(1.0, 0.8, 0.7),
        "iddpm / seed 2": run(1.0, 0.8, 0.5),
        "iddpm, min_snr 5 / seed 0": run(0.9, 0.5, 0.4, cpu_s=2.0),
        "iddpm, min_snr 5 / seed 1": run(1.0, 0.9, 0.8),
    }
    found = levers.compared(runs, ON)
    assert found is not None
    assert found["difference"] == pytest.approx([-0.2, 0.1])
    assert found["step_ratio"] == pytest.approx([2.0, 1.0])
    assert found["cpu_ratio"] == pytest.approx([(2 + 2 * 0.75) / 3])  # 0.6 lies at three quarters from 0.9 to 0.5; seed 1 never came to 0.7
    assert levers.compared(runs, "flow, routing 0.5") is None


def test_an_interval_of_the_mean_is_students() -> None:
    mean, low, high = levers.interval([1.0, 2.0, 3.0])
    assert (mean, low, high) == pytest.approx((2.0, 2 - 4.30 / 3**0.5, 2 + 4.30 / 3**0.5))
    assert levers.interval([1.0])[1] == -float("inf")


@pytest.mark.parametrize("way", levers.WAYS)
def test_a_lever_differs_from_what_it_is_compared_with_in_the_lever_alone(way: str) -> None:
    against, _ = levers.WAYS[way]
    settings = levers.Settings(steps=4, batch_size=2, clips=4)
    if against is not None:
        mine, theirs = (settings.stage(name, 0).model_dump(mode="json") for name in (way, against))
        (field,) = {name for name in mine | theirs if mine.get(name) != theirs.get(name)}
        assert field in ("routing", "objective", "optimizer")


def test_the_table_has_what_was_read_and_the_next_call_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "levers.json"
    short = ["--seeds", "1", "--steps", "4", "--batch-size", "2", "--clips", "4", "--out", str(out)]
    levers.main([*short, "--ways", "flow, routing 0.5"])
    content = json.loads(out.read_text())
    (name,) = content["runs"]
    points = content["runs"][name]["points"]
    assert [point["step"] for point in points] == [1, 2, 3, 4]
    assert [point["cpu_s"] for point in points] == sorted({point["cpu_s"] for point in points})
    assert f"{points[-1]['loss']:.4f}" in out.with_suffix(".md").read_text()
    capsys.readouterr()
    levers.main([*short, "--ways", "flow, routing 0.5"])
    assert capsys.readouterr().out == ""
    assert json.loads(out.read_text()) == content
    with pytest.raises(SystemExit, match="'steps': 4"):
        levers.main(["--steps", "5", "--out", str(out)])
