from __future__ import annotations

import itertools
import time
from collections.abc import Callable

import pytest
from training_runs import in_process, metrics

from opensora.config import StageConfig
from opensora.training.run_directory import RunDirectory

Stages = Callable[..., StageConfig]
Runs = Callable[..., RunDirectory]


def test_intervals_of_metrics_tile_the_run(tiny_stage: Stages, make_run: Runs) -> None:
    run = make_run(tiny_stage(prompts=["a digit 3"]))
    began = time.time()
    in_process(run)
    lines, ended = metrics(run), time.time()
    spans = [
        (line["start"], line["end"])
        if "phase" in line
        else (line["time"] - line["data_wait_s"] - line["step_s"] - line["checkpoint_s"], line["time"])
        for line in lines
    ]
    assert [line.get("phase", line.get("step")) for line in lines] == ["init", 1, 2, 3, 4, "checkpoint", "evaluate"]
    assert spans[0][0] < began  # the interpreter's start and the imports are init
    assert all(before[1] == pytest.approx(after[0], abs=1e-5) for before, after in itertools.pairwise(spans))
    assert spans[-1][1] == pytest.approx(ended, abs=0.5)
