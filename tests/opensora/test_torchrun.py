"""`torchrun --nproc-per-node 2 -m opensora.train RUN_DIR` with each way of sharing the work, chosen by one line of the stage's file."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gang
import pytest

from opensora.checkpoint import reader as checkpoint
from opensora.config import StageConfig
from opensora.training.run_directory import RunDirectory

pytestmark = pytest.mark.long

LINES: dict[str, dict[str, Any]] = {"ddp": {"strategy": "ddp"}, "fsdp": {"strategy": "fsdp"}, "sequence": {"sequence": 2}}
COLOSSALAI = {"strategy": "colossalai", "plugin": "torch_ddp"}


def torchrun(path: Path) -> None:
    """As a person types it."""
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
@pytest.mark.parametrize(
    "lines", [LINES, pytest.param(LINES | {"colossalai": COLOSSALAI}, marks=pytest.mark.prove("colossalai"))], ids=["torch's", "all"]
)
def test_each_strategy_is_a_line_of_the_stage_and_comes_to_the_same_losses(
    lines: dict[str, dict[str, Any]], tiny_stage: Callable[..., StageConfig], make_run: Callable[..., RunDirectory]
) -> None:
    """tests/opensora/distributed/test_colossal.py has ColossalAI's steps in the suite; its import takes 15 s."""
    losses = {}
    for name, line in lines.items():
        stage = tiny_stage(data={"frames": 4}, parallel=line)
        run = make_run(stage)
        if name == "ddp":  # the others differ after the start
            torchrun(run.path)
        else:
            gang.run(2, "-m", "opensora.train", str(run.path))
        ended = json.loads((run.path / "result.json").read_text())
        assert (ended["status"], ended["step"]) == ("completed", stage.steps), (name, ended)
        record = checkpoint.Reader(checkpoint.directory(run.checkpoints, stage.steps)).record
        data_ranks = 1 if name == "sequence" else 2
        assert (record.complete, record.world_size, record.clips_seen) == (True, 2, stage.steps * stage.batch_size * data_ranks), name
        losses[name] = [line["loss"] for line in map(json.loads, (run.path / "metrics.jsonl").read_text().splitlines()) if "step" in line]
    for name in losses.keys() - {"ddp", "sequence"}:
        assert losses[name] == pytest.approx(losses["ddp"], rel=1e-5), name
    alone = make_run(tiny_stage(data={"frames": 4}))
    gang.run(1, "-m", "opensora.train", str(alone.path))
    of_one = [line["loss"] for line in map(json.loads, (alone.path / "metrics.jsonl").read_text().splitlines()) if "step" in line]
    assert losses["sequence"] == pytest.approx(of_one, rel=1e-5), "two ranks that share each clip are one rank"
