"""Laws of a comparison of two models: equal ones never differ, the interval is that of the pairs, and two that differ are told apart."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from opensora.evaluation import paired
from opensora.evaluation.paired import difference
from opensora.training.run_directory import RunDirectory


def test_the_interval_of_pairs_holds_the_truth_19_times_of_20() -> None:
    """Both right together in most pairs: independent intervals would be twice as wide."""
    rng, n, held = np.random.default_rng(0), 400, 0
    for _ in range(300):
        both, only_first, only_second = 0.6, 0.05, 0.15
        drawn = rng.random(n)
        first = drawn < both + only_first
        second = (drawn < both) | ((drawn >= both + only_first) & (drawn < both + only_first + only_second))
        found = difference(first, second)
        held += abs((found.second - found.first) - (only_second - only_first)) <= found.half
    assert 0.92 <= held / 300 <= 0.98
    assert found.half < 0.045
    assert not found.is_none


def test_a_model_differs_in_nothing_from_itself() -> None:
    right = np.random.default_rng(0).random(50) < 0.5
    assert (difference(right, right).half, difference(right, right).is_none) == (0.0, True)


@pytest.mark.long
def test_two_checkpoints_are_asked_for_the_same_clips(
    make_run: Callable[..., RunDirectory], tiny_stage: Callable[..., object], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from opensora import train

    run = make_run(tiny_stage(data={"frames": 4}, steps=1))
    assert train.main([str(run.path)]) == 0
    (made,) = run.checkpoints.glob("step-*")
    other = shutil.copytree(made, tmp_path / "other")
    assert paired.main([str(made), str(other), "--clips", "6"]) == 0
    said = capsys.readouterr()
    assert json.loads(said.out)["digit"]["half"] == 0
    assert said.err.count("no difference") == 2
    assert paired.main([str(made), str(tmp_path / "nowhere")]) == 2
    assert paired.main([str(made), str(other), "--clips", "0"]) == 2
