"""One stage of training: `torchrun -m opensora.train RUN_DIR` (or plain `python -m` for one process).

Owns what is of the process: its launcher, signals, log and exit code. `opensora.training` trains. Knows a run directory
(docs/contracts.md, section 1) and nothing of clusters, stores or trackers.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from opensora.distributed.ranks import PEER_LOST, die_with_launcher, join
from opensora.printable import log_to
from opensora.training.run_directory import RunDirectory
from opensora.training.stage import is_another_ranks, report_failure, run_stage
from opensora.training.trainer import DrainRequest

if TYPE_CHECKING:
    from types import FrameType

log = logging.getLogger(__name__)


def run_reported(run: RunDirectory, drain: DrainRequest) -> int:
    """Run the stage of a run directory on this rank, and write how it ended to `result.json`.

    Returns:
        The exit code: 0 completed or drained · 1 failed · 75 another rank ended, and reports why.
    """
    try:
        run.reserve_result()
    except OSError as error:
        log.info("error: run directory %s: %s; nothing was started", run.path, error.strerror)
        return 1
    try:
        with join() as ranks:
            run_stage(run, ranks, drain, _born())
    except Exception as error:  # the boundary: whatever happened is reported, with its class
        if is_another_ranks(error):
            log.info("rank %d: another rank ended (%s)", run.rank, str(error).splitlines()[0])
            return PEER_LOST
        kind = report_failure(run, error)
        log.info("error: rank %d: %s", run.rank, error, exc_info=kind == "code")
        return 1
    return 0


def _drain_on_signals() -> DrainRequest:
    """Let SIGTERM, SIGINT and SIGHUP request a drain: save at the next step boundary that all ranks agree on, and leave.

    If SIGHUP is ignored when this process starts, it stays ignored: nohup wants that.
    """
    drain = DrainRequest()

    def request(_number: int, _frame: FrameType | None) -> None:
        drain.made = True

    signal.signal(signal.SIGTERM, request)
    signal.signal(signal.SIGINT, request)
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        signal.signal(signal.SIGHUP, request)
    return drain


def _born() -> float:
    """When this process started, in Unix seconds: the imports before `main` belong to its init."""
    started = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19]) / os.sysconf("SC_CLK_TCK")
    return time.time() - (time.clock_gettime(time.CLOCK_BOOTTIME) - started)


def main(argv: Sequence[str] | None = None) -> int:
    """Exit codes: see `run_reported`. Around a launcher the exit code says less than `result.json`."""
    die_with_launcher()
    parser = argparse.ArgumentParser(prog="torchrun -m opensora.train", description="Run one stage of training in a run directory.")
    parser.add_argument("run_dir", type=Path, help="holds stage.yaml, and parent/ or checkpoints/ to start from")
    path = parser.parse_args(argv).run_dir
    log_to(sys.stdout, logging.INFO, "%(message)s")
    rank = int(os.environ.get("RANK", "0"))
    return run_reported(RunDirectory(path, rank, lowest=rank - int(os.environ.get("LOCAL_RANK", "0"))), _drain_on_signals())


if __name__ == "__main__":
    code = main()
    with suppress(OSError, ValueError):  # a full disk, or a reader that is gone
        logging.shutdown()
        sys.stdout.flush()
    os._exit(code)  # at once: taking the libraries down costs a second of every device, and aborts the process when a peer is gone
