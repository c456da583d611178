"""An agent's right to start: an intent that can be read, a lease that is not newer, a run directory that nobody has claimed.

Owns the checks, and the entry of this agent in ledger and run directory. Refuses to live the attempt (`attempt` does),
and to touch anything where it has no right.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TypeVar

from orchestrator.agent.attempt import Attempt, Patience
from orchestrator.agent.events import Events
from orchestrator.agent.run_directory import RunDirectory
from orchestrator.agent.trainer_process import TrainerProcess
from orchestrator.errors import NotFound, OsctlError, Refused, Unreachable
from orchestrator.ledger.records import AgentProcess, Intent
from orchestrator.ledger.store import Ledger, read_intent
from orchestrator.local.attempt_lock import AgentRecord
from orchestrator.local.clock import AttemptClock
from orchestrator.local.processes import Process
from orchestrator.redact import masker
from orchestrator.stores import open_store

log = logging.getLogger(__name__)

T = TypeVar("T")


def begin(
    store_url: str,
    intent_key: str,
    run_dir: Path,
    *,
    node: int,
    lock: int,
    bound: float,
    events: Events,
    patience: Patience,
    clock: AttemptClock,
) -> tuple[Attempt, TrainerProcess] | None:
    """Enter this agent in the ledger and the run directory, whose lock is held. None, said in the log: there is no right to start."""
    try:
        store = open_store(store_url)
        intent = _ask(lambda: read_intent(store, intent_key), events, patience.store_s)
        if not 0 <= node < intent.nodes:
            raise Refused(f"{intent.run_key}: has {intent.nodes} nodes, so there is no node {node}; nothing was started")
        ledger = Ledger(store, intent.pipeline)
        _ask(lambda: check_right(ledger, intent, outlives_driver=events.outlives_launcher), events, patience.store_s)
        me = Process.of(os.getpid())
        agent = AgentProcess(node=node, **asdict(me), bound=bound, silent_s=patience.silent_s)
        said = _ask(lambda: ledger.enter_agent(intent, agent), events, patience.store_s)
        if said != agent:
            raise Refused(f"{intent.run_key}: agent {said.pid} on {said.host} lives this attempt, or has; nothing was started")
        # Again, now that every driver can see this agent: one that has taken over before has not seen it.
        _ask(lambda: check_right(ledger, intent, outlives_driver=events.outlives_launcher), events, patience.store_s)
        if not AgentRecord(me, bound).write(run_dir):
            raise Refused(f"run directory {run_dir}: this attempt has been lived before; nothing was started")
    except (OsctlError, NotFound) as error:
        log.error("error: %s", error)
        return None
    trainer = TrainerProcess(run_dir, lock, clock)
    run = RunDirectory(run_dir, masker(os.environ))
    return Attempt(ledger, intent, run, trainer, events, node=node, bound=bound, patience=patience, clock=clock), trainer


def check_right(ledger: Ledger, intent: Intent, *, outlives_driver: bool) -> None:
    """Raises Refused where a newer driver has given this attempt up, or may have.

    A job in a cluster waits for its devices longer than a driver lives, and the next driver adopts it: there only an outcome, which a
    driver writes before it starts another attempt, takes the right away. A process of a dead launcher is adopted by nobody.
    """
    lease = ledger.lease()
    if lease is None or lease.epoch <= intent.epoch:
        return
    if not outlives_driver:
        raise Refused(
            f"{intent.run_key}: its intent is of epoch {intent.epoch}, the lease of epoch {lease.epoch} ({lease.holder}); "
            "nothing was started, the newer driver decides"
        )
    if ledger.outcome(intent.stage, intent.inputs_digest, intent.attempt) is not None:
        raise Refused(f"{intent.run_key}: {lease.holder} (epoch {lease.epoch}) has closed it; nothing was started")


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
