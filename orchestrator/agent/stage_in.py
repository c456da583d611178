"""Stage in: what an attempt starts from, brought from the store into its run directory, every byte verified.

Owns the order and the patience. Refuses to choose: the intent names all of it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from functools import partial

from orchestrator.agent.contents import bring_in
from orchestrator.agent.run_directory import RunDirectory
from orchestrator.agent.upload_queue import is_disk_full
from orchestrator.errors import CorruptCheckpoint, NotFound, Unreachable
from orchestrator.ledger.records import Intent
from orchestrator.ledger.store import Ledger

log = logging.getLogger(__name__)


class DamagedResume(Exception):
    """The checkpoint that the attempt was to go on from is not what was published."""


def fetch(ledger: Ledger, intent: Intent, run: RunDirectory, patience_s: float) -> None:
    """Bring in all that the trainer starts from, verified: stage.yaml, data and imports, parent, checkpoint to go on from.

    Raises DamagedResume, Refused, NotFound, Unreachable, OSError. `patience_s`: for a store that does not answer.
    """
    run.write_stage(intent.config)
    run.checkpoints.mkdir(exist_ok=True)
    bring = partial(ledger.fetch, patience_s=patience_s)
    _patiently(patience_s, partial(_fetch_contents, ledger, intent, run))
    if intent.parent is not None:
        _patiently(patience_s, partial(bring, intent.parent.key, intent.parent.manifest_digest, run.parent))
    if intent.resume is not None:
        target = run.checkpoint(intent.resume.step)
        try:
            _patiently(patience_s, partial(bring, intent.resume.key, intent.resume.manifest_digest, target))
        except (CorruptCheckpoint, NotFound) as error:
            raise DamagedResume(str(error)) from error


def _fetch_contents(ledger: Ledger, intent: Intent, run: RunDirectory) -> None:
    terms = ledger.terms(intent.stage, intent.inputs_digest, intent.attempt)
    if terms is not None:  # a driver of 0.1.0 writes none
        bring_in(ledger.store, intent, terms.contents, run.path)


def _patiently(patience_s: float, fetch: Callable[[], object]) -> None:
    """Patience counts from the first failure: a checkpoint of hundreds of gigabytes is on its way for longer."""
    deadline: float | None = None
    while True:
        try:
            fetch()
            return
        except Unreachable as error:
            now = time.monotonic()
            deadline = now + patience_s if deadline is None else deadline
            if now > deadline or is_disk_full(error):
                raise
            log.warning("%s; again in 1 s", error)
            time.sleep(1.0)
