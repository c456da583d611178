"""`python -m orchestrator.agent`: the right to start, then one attempt's life, then an exit code that says how it ended.

An agent starts only if the launcher that started it lives, no other agent holds or ever held the run directory, and the intent is
not older than the pipeline's lease. Otherwise it touches nothing but the time of its death, and leaves with 69.

Everything heavy is imported once that time is being kept: a second of imports on a busy machine is a second that devices are held.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from opensora import last_resort
from opensora.printable import log_to
from orchestrator.agent.events import Events
from orchestrator.environment import unset_empty
from orchestrator.local.attempt_lock import AgentRecord, pulse, take_lock
from orchestrator.local.clock import AttemptClock

log = logging.getLogger(__name__)

NOT_STARTED = 69
"""records.EXIT_CODES["store"]."""
FAILED, NO_SPACE = 1, 70
"""records.EXIT_CODES["code"] and ["disk"]."""


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m orchestrator.agent", description="Live one attempt on this node.")
    parser.add_argument("--store", required=True, help="folder, or s3://bucket/prefix")
    parser.add_argument("--intent", required=True, help="key of the attempt's intent.json")
    parser.add_argument("--run-dir", required=True, type=Path, help="directory of this attempt, on a local disk")
    parser.add_argument("--node", type=int, default=0, help="which of the intent's nodes this is, from 0 (0)")
    parser.add_argument("--bound", type=float, help="Unix time since which the devices are held; none: now")
    parser.add_argument("--anchor", help="WALL,BOOT: both clocks at the moment of --bound; none: as they are now")
    parser.add_argument("--launcher-pid", type=int, help="process whose death ends the attempt; none: nobody's")
    parser.add_argument("--lock-fd", type=int, help="descriptor that holds the run directory's lock; none: the agent takes it")
    parser.add_argument("--store-patience", type=float, default=300.0, help="seconds to wait for a store that does not answer (300)")
    parser.add_argument("--silence", type=float, default=300.0, help="seconds without a word after which others take it for gone (300)")
    parser.add_argument("--unsaved", type=float, default=1800.0, help="seconds that it trains on while no checkpoint is published (1800)")
    parser.add_argument("--peer-silence", type=float, default=30.0, help="seconds after which a silent node is given up at the end (30)")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    unset_empty(os.environ)
    clock = AttemptClock.parse(args.anchor) if args.anchor else AttemptClock.here()
    log_to(sys.stderr, logging.INFO, "%(asctime)s %(message)s")
    try:
        return _live(args, clock)
    except Exception as error:  # the last line of defence: where there is no report, its driver shows the last line of this log
        log.exception("the agent itself failed")
        log.error("error: %s", last_resort.said(error))
        full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
        return NO_SPACE if full else FAILED


def _live(args: argparse.Namespace, clock: AttemptClock) -> int:
    began = clock()
    events = Events(args.launcher_pid)
    run_dir: Path = args.run_dir.resolve()
    run_dir.mkdir(parents=True, exist_ok=True)
    lock: int | None = args.lock_fd if args.lock_fd is not None else take_lock(run_dir)
    if lock is None:
        log.error("error: run directory %s: another agent lives this attempt; nothing was started", run_dir)
        return NOT_STARTED
    os.set_inheritable(lock, False)
    if AgentRecord.read(run_dir) is not None:
        log.error("error: run directory %s: this attempt has been lived before; nothing was started", run_dir)
        return NOT_STARTED
    bound = began if args.bound is None else args.bound
    with pulse(run_dir, clock):
        from orchestrator.agent.attempt import Patience
        from orchestrator.agent.start import begin

        patience = Patience(store_s=args.store_patience, peer_s=args.peer_silence, silent_s=args.silence, unsaved_s=args.unsaved)
        begun = begin(
            args.store, args.intent, run_dir, node=args.node, lock=lock, bound=bound, events=events, patience=patience, clock=clock
        )
    if begun is None:
        return NOT_STARTED
    attempt, trainer = begun
    code = attempt.live().exit_code
    trainer.touch()
    return code


if __name__ == "__main__":
    code = main()
    with contextlib.suppress(OSError, ValueError):  # a full disk takes no more words
        logging.shutdown()
    os._exit(code)  # at once: threads may still wait for a store that is away
