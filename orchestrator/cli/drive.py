"""`osctl drive`: what the driver's Job runs. Hidden, since people type `osctl launch`.

Reads the launched revision out of the ledger and drives it, and keeps MLflow up to date beside it. SIGTERM (its node is drained) makes it
leave at once with its attempts running; the Job then starts another one. Its exit code is the run's: the Job is over with 0, 2, 3, 4 and
130, and tries again after anything else.
"""

from __future__ import annotations

import contextlib
import signal
import sys
import time
from typing import TYPE_CHECKING, Annotated

import typer

from orchestrator.cli import output
from orchestrator.cli.typed import typed

if TYPE_CHECKING:
    from orchestrator.driver.runner import Runner
    from orchestrator.ledger.records import Event
    from orchestrator.ledger.store import Ledger

LEFT = 128 + signal.SIGTERM
"""Exit code of a driver that was asked to leave: none of those with which its Job is over."""
LEASE_POLL_S = 1.0


def drive(
    store: Annotated[str, typer.Option(help="Object store.")],
    pipeline: Annotated[str, typer.Option(help="Name in the ledger.")],
    revision: Annotated[int, typer.Option(min=1, help="Number of the launched revision.")],
    target: Annotated[list[str] | None, typer.Option(help="Stage to run; repeatable. Default: all.")] = None,
    prepare: Annotated[
        str | None, typer.Option(metavar="DIGEST", help="Order in the store of a preparation that comes first. Default: none does.")
    ] = None,
) -> None:
    """Drive a launched revision from inside the cluster. People type osctl launch.

    Example: osctl drive --store s3://bucket/runs --pipeline demo --revision 1
    """
    import logging

    from opensora.printable import log_to
    from orchestrator.driver.runner import Detached, Runner
    from orchestrator.errors import Refused
    from orchestrator.ledger.store import Ledger
    from orchestrator.pipelines import cluster_driver, prepare_first
    from orchestrator.pipelines.host import Host
    from orchestrator.pipelines.launch import backend_of, mlflow_beside, nodes_of
    from orchestrator.pipelines.signals import leave_on_signals
    from orchestrator.pipelines.workspace import Workspace
    from orchestrator.recipe import launched
    from orchestrator.recipe.prices import named_prices
    from orchestrator.stores import open_store

    log_to(sys.stderr, logging.WARNING, "%(asctime)s %(message)s")
    host, opened = Host.here(), open_store(store)
    ledger = Ledger(opened, pipeline)
    typed().name = pipeline
    found = ledger.revision(revision)
    if found is None:
        raise Refused(f"drive {pipeline}: revision {revision} is not in {store}. Make one with: osctl launch")
    resolved = launched.resolve(ledger, revision, found)
    typed().launched = tuple(stage.name for stage in resolved.stages)
    # The profile's context is one of a person's kubeconfig; here the pod's own account is the way in.
    cluster = resolved.cluster.model_copy(update={"context": None}) if resolved.cluster is not None else None
    here = resolved.model_copy(update={"cluster": cluster})
    first = None
    if prepare is not None:
        workspace, api = Workspace(resolved, host), cluster_driver.connect(Workspace(here, host))
        resolved, first = prepare_first.begin(workspace, revision, prepare, target or (), api, output.note)
    backend, nodes = backend_of(here, opened, store, host), nodes_of(here, host)
    prices = named_prices().at(resolved.cluster)
    runner = Runner(resolved, ledger, backend, on_event=_say, prices=prices, nodes=nodes, first=first)
    try:
        # A database on a disk that goes away with this pod would show nobody anything.
        beside = contextlib.nullcontext() if resolved.tracking.startswith("sqlite") else mlflow_beside(resolved, store, host, output.note)
        with leave_on_signals(runner), beside:
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
    from orchestrator.driver.runner import Detached
    from orchestrator.pipelines.cluster_driver import drives_in_cluster

    said = False
    while (holder := ledger.holder(time.time())) is not None and drives_in_cluster(holder, ledger.pipeline, store_url):
        if runner.detached:
            raise Detached(f"{ledger.pipeline}: asked to leave before it drove")
        if not said:
            output.note(f"{ledger.pipeline}: waits for the lease of {holder.holder}, which is gone or about to be")
        said = True
        time.sleep(LEASE_POLL_S)


def _say(event: Event) -> None:
    from orchestrator.cli.logs import event_line

    output.note(event_line(event))
