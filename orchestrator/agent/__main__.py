"""`python -m orchestrator.agent`: the right to start, then one attempt's life, then an exit code that says how it ended.

An agent starts only if the launcher that started it lives, no other agent holds or ever held the run directory, and the intent is
not older than the pipeline's lease. Otherwise it touches nothing but the time of its death, and leaves with 69.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from orchestrator.adapters import open_store
from orchestrator.agent.attempt import Attempt
from orchestrator.agent.events import Events
from orchestrator.agent.run_directory import RunDirectory
from orchestrator.agent.trainer_process import TrainerProcess
from orchestrator.claim import ALIVE, Claim, take_lock
from orchestrator.errors import NotFound, OsctlError, Refused, Unreachable
from orchestrator.ledger import Ledger, read_intent
from orchestrator.processes import Process
from orchestrator.records import EXIT_CODES, Intent

log = logging.getLogger(__name__)

NOT_STARTED = EXIT_CODES["store"]
T = TypeVar("T")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m orchestrator.agent", description="Live one attempt on this node.")
    parser.add_argument("--store", required=True, help="folder, or s3://bucket/prefix")
    parser.add_argument("--intent", required=True, help="key of the attempt's intent.json")
    parser.add_argument("--run-dir", required=True, type=Path, help="directory of this attempt, on a local disk")
    parser.add_argument("--bound", type=float, help="Unix time since which the devices are held; none: now")
    parser.add_argument("--launcher-pid", type=int, help="process whose death ends the attempt; none: nobody's")
    parser.add_argument("--lock-fd", type=int, help="descriptor that holds the run directory's lock; none: the agent takes it")
    parser.add_argument("--store-patience", type=float, default=300.0, help="seconds to wait for a store that does not answer (300)")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    began = time.time()
    args = parse(argv)
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(message)s")
    events = Events(args.launcher_pid)
    run_dir: Path = args.run_dir.resolve()
    run_dir.mkdir(parents=True, exist_ok=True)
    lock: int | None = args.lock_fd
    if lock is not None:
        os.set_inheritable(lock, False)
    try:
        lock = lock if lock is not None else take_lock(run_dir)
        if lock is None:
            raise Refused(f"run directory {run_dir}: another agent lives this attempt; nothing was started")
        store = open_store(args.store)
        intent = _ask(lambda: read_intent(store, args.intent), events, args.store_patience)
        ledger = Ledger(store, intent.pipeline)
        _ask(lambda: check_epoch(ledger, intent), events, args.store_patience)
        bound = began if args.bound is None else args.bound
        if not Claim(Process.of(os.getpid()), bound).write(run_dir):
            raise Refused(f"run directory {run_dir}: this attempt has been lived before; nothing was started")
    except (OsctlError, NotFound) as error:
        log.error("error: %s", error)
        if lock is not None and Claim.read(run_dir) is None:
            (run_dir / ALIVE).touch()
        return NOT_STARTED
    trainer = TrainerProcess(run_dir, lock)
    attempt = Attempt(ledger, intent, RunDirectory(run_dir), trainer, events, bound=bound, store_patience_s=args.store_patience)
    code = attempt.live().exit_code
    trainer.touch()
    return code


def check_epoch(ledger: Ledger, intent: Intent) -> None:
    """Raises Refused where a newer driver holds, or held, the lease: it may have given this attempt up."""
    lease = ledger.lease()
    if lease is not None and lease.epoch > intent.epoch:
        raise Refused(
            f"{intent.run_key}: its intent is of epoch {intent.epoch}, the lease of epoch {lease.epoch} ({lease.holder}); "
            "nothing was started, the newer driver decides"
        )


def _ask(question: Callable[[], T], events: Events, patience_s: float) -> T:
    """Ask a store that may be away for a while. Raises Unreachable, Refused, NotFound."""
    deadline = time.monotonic() + patience_s
    while True:
        if events.launcher_died or events.asked_to_leave:
            raise Refused(
                "asked to leave before anything was started" if events.asked_to_leave else "the launcher died; nothing was started"
            )
        try:
            return question()
        except Unreachable as error:
            if time.monotonic() > deadline:
                raise
            log.warning("%s; again in 1 s", error)
            events.wait(1.0)


if __name__ == "__main__":
    code = main()
    logging.shutdown()
    os._exit(code)  # at once: threads may still wait for a store that is away
