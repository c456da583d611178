"""`python -m orchestrator.tracking`: bring MLflow up to date with a ledger, once or beside a launch until that ends."""

from __future__ import annotations

import argparse
import logging
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from opensora import last_resort
from opensora.printable import Printable
from orchestrator.environment import unset_empty
from orchestrator.errors import OsctlError, Unreachable, UsageError
from orchestrator.ledger.store import Ledger
from orchestrator.recipe.prices import named_prices
from orchestrator.stores import open_store
from orchestrator.tracking.client import open_tracker
from orchestrator.tracking.follow import follow
from orchestrator.tracking.statuses import SILENT_S, is_undecided
from orchestrator.tracking.sync import Sync

log = logging.getLogger(__name__)


class Lines(Printable):
    """Formats this process's log. It replaces `osctl sync` by the command with its options, which works when it is pasted."""

    def __init__(self, pipeline: str, store: str):
        super().__init__("%(asctime)s %(message)s")
        self.command = f"osctl sync {shlex.quote(pipeline)} --store {shlex.quote(store)}"

    def format(self, record: logging.LogRecord) -> str:
        return super().format(record).replace("`osctl sync`", f"`{self.command}`")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m orchestrator.tracking", description="Bring MLflow up to date with a ledger.")
    parser.add_argument("--store", required=True, metavar="URL", help="object store: a folder, or s3://bucket/prefix")
    parser.add_argument("--pipeline", required=True, metavar="NAME")
    parser.add_argument("--tracking", required=True, metavar="URI", help="sqlite, or MLflow's URI")
    parser.add_argument("--artifacts", type=Path, metavar="DIR", help="artifacts of a local database; default: mlartifacts beside it")
    parser.add_argument("--follow-pid", type=int, metavar="PID", help="go on until this process is gone or its launch has ended")
    parser.add_argument("--interval", type=float, default=5.0, metavar="S", help="seconds between two updates while following")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    unset_empty(os.environ)
    lines = logging.StreamHandler(sys.stderr)
    lines.setFormatter(Lines(options.pipeline, options.store))
    logging.basicConfig(level=logging.WARNING, handlers=[lines])
    try:
        return run(options)
    except OsctlError as error:
        log.error("%s", error)
        return error.exit_code


def run(options: argparse.Namespace) -> int:
    """Sync once or follow a launch. Returns the exit code. Raises OsctlError."""
    tracker = open_tracker(options.tracking, Path(os.environ.get("OSCTL_HOME") or ".osctl"), options.artifacts)
    if tracker is None:
        raise UsageError("sync: tracking is none, so there is nothing to bring up to date. Give --tracking sqlite or a URI")
    sync = Sync(Ledger(open_store(options.store), options.pipeline), tracker, named_prices)
    if options.follow_pid is not None:
        return 0 if follow(sync, options.follow_pid, options.interval) else Unreachable.exit_code
    facts = sync.update()
    if facts is not None and is_undecided(facts):
        fact = "nobody drives it, and an attempt was heard a moment ago, so MLflow shows it as RUNNING"
        log.warning("%s: %s; run `osctl sync` again in %.0f s", facts.pipeline.name, fact, SILENT_S)
    return 0


if __name__ == "__main__":
    raise SystemExit(last_resort.run("sync", main))
