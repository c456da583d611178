"""torchrun for tests: the real elastic agent and the real trainer, whose ranks are forked from a process that has imported everything.

    trainer: [python, tests/forked_torchrun.py, "{run_dir}", "{devices}"]

What differs from `torchrun -m opensora.train RUN_DIR` is the start alone: 4 ranks on 2 cores begin after 4 s and not after 12, which is
what a test pays for every attempt. `tests/warm_torchrun.py` saves the imports of the elastic agent, too.
"""

from __future__ import annotations

import faulthandler
import importlib
import os
import signal
import sys
from pathlib import Path

from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from opensora import train

LATE = ("torch.distributed.fsdp", "torch._dynamo", "sklearn.datasets", "safetensors.torch", "PIL.Image")
"""Imported by a rank when it comes to that, 3 CPU-seconds in all: here once for all of them."""


def rank(run_dir: str) -> None:
    code = train.main([run_dir])
    if code:
        sys.stdout.flush()
        os._exit(code)


def launch(run_dir: str, devices: int) -> None:
    """All ranks of one node to their end; with several nodes they meet where torchrun's would. Raises what `elastic_launch` raises where
    one of them fails."""
    logs = Path(run_dir, "ranks")
    logs.mkdir(exist_ok=True)
    meet, nodes = os.environ.get("PET_RDZV_ENDPOINT"), int(os.environ.get("PET_NNODES", "1").partition(":")[0])
    config = LaunchConfig(
        min_nodes=nodes,
        max_nodes=nodes,
        nproc_per_node=devices,
        run_id=meet or Path(run_dir).name,
        rdzv_backend="c10d",
        rdzv_endpoint=meet or "localhost:0",
        local_addr=os.environ.get("PET_LOCAL_ADDR"),
        max_restarts=0,
        start_method="fork",
        logs_specs=DefaultLogsSpecs(log_dir=str(logs), tee=Std.ALL),
        log_line_prefix_template=os.environ.get("TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE"),
    )
    elastic_launch(config, rank)(run_dir)


def import_all() -> None:
    faulthandler.register(signal.SIGUSR2, all_threads=True)  # processes.what_stands asks for it
    for name in LATE:
        importlib.import_module(name)


if __name__ == "__main__":
    import_all()
    launch(sys.argv[1], int(sys.argv[2]))
