"""`python -m opensora.prepare RUN_DIR` prepares a data set; `… export DIR --format F --to DIR` writes one in another form.

Owns what is of the process: arguments, signals, log and exit code. Exit codes of a run: 0 completed · 64 its configuration is wrong ·
65 too many rows could not be worked on, or none is left · 69 the disk is full · 143 asked to leave (SIGTERM, SIGINT, a file `drain`),
everything kept · 6 a fault of osctl.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from opensora import last_resort
from opensora.printable import log_to

if TYPE_CHECKING:
    from types import FrameType

    from opensora.prepare.steps import Steps

ONE_THREAD = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "OPENCV_FOR_THREADS_NUM")
"""Variables by which libraries use one thread in each guard: there is a guard for each core."""

log = logging.getLogger("opensora.prepare")


def prepare(argv: Sequence[str], steps: Steps | None) -> int:
    parser = argparse.ArgumentParser(prog="python -m opensora.prepare", description="Prepare the data set of a run directory.")
    parser.add_argument("run_dir", type=Path, help="holds prepare.yaml; `export` writes a finished data set in another form")
    parser.add_argument("--retry", choices=("all", "none"), default="all", help="rows that earlier runs could not work on: try again (all)")
    parser.add_argument("--engine", choices=("inline", "ray"), help="what calls the steps; default: what prepare.yaml says, or inline")
    parser.add_argument("--shard", metavar="K/N", help="look at shard K of N of the sources alone, K from 0, and cut their clips")
    chosen = parser.parse_args(argv)
    for name in ONE_THREAD:
        os.environ.setdefault(name, "1")
    from opensora.prepare import engine
    from opensora.prepare.shards import Shard

    try:
        shard = Shard.parse(chosen.shard) if chosen.shard is not None else None
    except ValueError as error:
        parser.error(f"--shard {error}")
    stop = threading.Event()

    def leave(_number: int, _frame: FrameType | None) -> None:
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, leave)
    return engine.run(chosen.run_dir, steps, stop=stop, retry=chosen.retry == "all", engine=chosen.engine, shard=shard).code


def export(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m opensora.prepare export", description="Write a data set in another form.")
    parser.add_argument("directory", type=Path, help="a data set, or the run directory that it was made in")
    parser.add_argument("--format", choices=("webdataset", "open-sora"), required=True)
    parser.add_argument("--to", type=Path, required=True, help="folder that is written to")
    parser.add_argument("--per-shard", type=int, default=1000, help="clips of a shard of WebDataset")
    chosen = parser.parse_args(argv)
    if chosen.per_shard < 1:
        parser.error(f"--per-shard {chosen.per_shard}: give 1 or more")
    from opensora.errors import ConfigError
    from opensora.prepare import manifest

    out = chosen.directory / "out" if (chosen.directory / "out").is_dir() else chosen.directory
    try:
        if chosen.format == "webdataset":
            log.info("%s shards in %s", f"{manifest.write_webdataset(out, chosen.to, chosen.per_shard):,}", chosen.to)
        else:
            log.info("%s clips in %s", f"{manifest.write_open_sora(out, chosen.to):,}", chosen.to / manifest.CAPTIONS)
    except ConfigError as error:
        log.info("error: %s", error)
        return 64
    except OSError as error:
        log.info("error: %s: %s", error.filename or chosen.to, error.strerror)
        return 69
    return 0


def main(argv: Sequence[str] | None = None, steps: Steps | None = None) -> int:
    """The exit code. `steps`: other step functions, for tests."""
    given = list(sys.argv[1:] if argv is None else argv)
    log_to(sys.stdout, logging.INFO, "%(message)s")
    return export(given[1:]) if given[:1] == ["export"] else prepare(given, steps)


if __name__ == "__main__":
    sys.exit(last_resort.run("python -m opensora.prepare", main))
