"""`osctl drive`: what the driver's Job runs. Hidden, since people type `osctl launch`.

Reads the launched revision out of the ledger and drives it, with MLflow's projection beside it. SIGTERM (its node is drained) makes it
leave at once with its attempts running; the Job then starts another one. Its exit code is the run's: the Job is over with 0, 2, 3, 4 and
130, and tries again after anything else.
"""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import typer

from orchestrator.cli import output

if TYPE_CHECKING:
    from orchestrator.ledger import Ledger
    from orchestrator.records import Event
    from orchestrator.runner import Runner

LEFT = 128 + signal.SIGTERM
"""Exit code of a driver that was asked to leave: none of those with which its Job is over."""
LEASE_LOOK_S = 1.0


def drive(
    store: Annotated[str, typer.Option(help="Object store.")],
    pipeline: Annotated[str, typer.Option(help="Name in the ledger.")],
    revision: Annotated[int, typer.Option(min=1, help="Number of the launched revision.")],
    target: Annotated[list[str] | None, typer.Option(help="Stage to run; repeatable. Default: all.")] = None,
) -> None:
    """Drive a launched revision from inside the cluster. People type osctl launch.

    Example: osctl drive --store s3://bucket/runs --pipeline demo --revision 1
    """
    import logging

    from orchestrator import launched
    from orchestrator.adapters import open_store
    from orchestrator.cli.run import backend_of, projecting
    from orchestrator.errors import Refused
    from orchestrator.ledger import Ledger
    from orchestrator.prices import named_prices
    from orchestrator.runner import Detached, Runner

    logging.basicConfig(format="%(asctime)s %(message)s", level=logging.WARNING)
    opened = open_store(store)
    ledger = Ledger(opened, pipeline)
    found = ledger.revision(revision)
    if found is None:
        raise Refused(f"drive {pipeline}: revision {revision} is not in {store}. Make one with: osctl launch")
    resolved = launched.resolve(ledger, revision, found)
    # The profile's context is one of a person's kubeconfig; here the pod's own account is the way in.
    cluster = resolved.cluster.model_copy(update={"context": None}) if resolved.cluster is not None else None
    backend = backend_of(resolved.model_copy(update={"cluster": cluster}), opened, store)
    runner = Runner(resolved, ledger, backend, on_event=_say, prices=named_prices().at(resolved.cluster))
    try:
        # A database on a disk that goes away with this pod would show nobody anything.
        beside = contextlib.nullcontext() if resolved.tracking.startswith("sqlite") else projecting(resolved, store)
        with leaving(runner), beside:
            wait_for_lease(ledger, store, runner)
            result = runner.run(target)
    except Detached:
        output.note(f"{pipeline}: leaves its attempts running; the next driver goes on")
        raise SystemExit(LEFT) from None
    output.note(f"{pipeline}: {result.status}: {result.reason}")
    if result.exit_code:
        raise SystemExit(result.exit_code)


def wait_for_lease(ledger: Ledger, store_url: str, runner: Runner) -> None:
    """A driver of this pipeline that has just died in another pod still holds the lease for some seconds.

    Any other holder is for the runner to refuse. Raises Detached where this driver is asked to leave meanwhile.
    """
    from orchestrator.cli.remote import drives_in_cluster
    from orchestrator.runner import Detached

    said = False
    while (holder := ledger.holder(time.time())) is not None and drives_in_cluster(holder, ledger.pipeline, store_url):
        if runner.detached:
            raise Detached(f"{ledger.pipeline}: asked to leave before it drove")
        if not said:
            output.note(f"{ledger.pipeline}: waits for the lease of {holder.holder}, which is gone or about to be")
        said = True
        time.sleep(LEASE_LOOK_S)


@contextlib.contextmanager
def leaving(runner: Runner) -> Iterator[None]:
    """SIGTERM: leave the attempts running. SIGINT, from a person at a terminal: save and stop, as everywhere."""
    handlers = {signal.SIGTERM: lambda *_: runner.detach(), signal.SIGINT: lambda *_: runner.drain()}
    previous = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _say(event: Event) -> None:
    from orchestrator.cli.logs import event_line

    output.note(event_line(event))
