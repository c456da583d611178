"""`torchrun --nproc-per-node 2 -m opensora.train RUN_DIR` with each way of sharing the work, chosen by one line of the stage's file."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from opensora import checkpoint
from opensora.config import StageConfig
from opensora.run_directory import RunDirectory

pytestmark = pytest.mark.long

LINES: dict[str, dict[str, Any]] = {
    "ddp": {"strategy": "ddp"},
    "fsdp": {"strategy": "fsdp"},
    "sequence": {"sequence": 2},
    "colossalai": {"strategy": "colossalai", "plugin": "torch_ddp"},
}


def torchrun(path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "0"]
    done = subprocess.run(
        [*command, "-m", "opensora.train", str(path)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout[-3000:]


@pytest.mark.timeout(600)
def test_each_strategy_is_a_line_of_the_stage_and_comes_to_the_same_losses(
    tiny_stage: Callable[..., StageConfig], make_run: Callable[..., RunDirectory]
) -> None:
    losses = {}
    for name, line in LINES.items():
        stage = tiny_stage(data={"frames": 4}, parallel=line)
        run = make_run(stage)
        torchrun(run.path)
        ended = json.loads((run.path / "result.json").read_text())
        assert (ended["status"], ended["step"]) == ("completed", stage.steps), (name, ended)
        record = checkpoint.open_(checkpoint.directory(run.checkpoints, stage.steps)).record
        data_ranks = 1 if name == "sequence" else 2
        assert (record.complete, record.world_size, record.clips_seen) == (True, 2, stage.steps * stage.batch_size * data_ranks), name
        losses[name] = [line["loss"] for line in map(json.loads, (run.path / "metrics.jsonl").read_text().splitlines()) if "step" in line]
    assert losses["fsdp"] == pytest.approx(losses["ddp"], rel=1e-5)
    assert losses["colossalai"] == pytest.approx(losses["ddp"], rel=1e-5)
    alone = make_run(tiny_stage(data={"frames": 4}))
    subprocess.run([sys.executable, "-m", "opensora.train", str(alone.path)], check=True, capture_output=True, timeout=240)
    of_one = [line["loss"] for line in map(json.loads, (alone.path / "metrics.jsonl").read_text().splitlines()) if "step" in line]
    assert losses["sequence"] == pytest.approx(of_one, rel=1e-5), "two ranks that share each clip are one rank"
