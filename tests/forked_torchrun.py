"""torchrun for tests: the real elastic agent and the real trainer, whose ranks are forked from a process that has imported everything.

    trainer: [python, tests/forked_torchrun.py, "{run_dir}", "{devices}"]

What differs from `torchrun -m opensora.train RUN_DIR` is the start alone: 4 ranks on 2 cores begin after 4 s and not after 12, which is
what a test pays for every attempt.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from opensora import train


def rank(run_dir: str) -> None:
    code = train.main([run_dir])
    if code:
        sys.stdout.flush()
        os._exit(code)


if __name__ == "__main__":
    folder, devices = sys.argv[1], int(sys.argv[2])
    logs = Path(folder, "ranks")
    logs.mkdir(exist_ok=True)
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=devices,
        run_id=Path(folder).name,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        start_method="fork",
        logs_specs=DefaultLogsSpecs(log_dir=str(logs), tee=Std.ALL),
        log_line_prefix_template=os.environ.get("TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE"),
    )
    elastic_launch(config, rank)(folder)
