"""Commands that only look: status, watch, list, logs."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

import typer

from orchestrator.cli import options, output
from orchestrator.cli.workspace import Workspace, store_url

if TYPE_CHECKING:
    from orchestrator.snapshot import Snapshot


def launched(workspace: Workspace) -> Workspace:
    """The same pipeline as it was last launched, where it was: what ran is what one wants to see, not what the file says today."""
    from orchestrator.config import Pipeline

    revision = workspace.ledger.latest_revision()
    return (
        workspace
        if revision is None
        else Workspace(Pipeline.model_validate(revision.pipeline).model_copy(update={"store": workspace.pipeline.store}))
    )


def take(workspace: Workspace) -> Snapshot:
    from orchestrator import snapshot

    return snapshot.take(workspace.pipeline, workspace.ledger, workspace.prices, time.time())


def status(
    file: options.File = None, store: options.Store = None, cluster: options.Cluster = None, output_: options.Output = output.Format.table
) -> None:
    """Show each stage's state, pods and cost, and why it waits.

    In a cluster with this person's own rights: what those do not show is said by the driver's last word in the ledger.

    Example: osctl status -f demo -o json
    """
    from orchestrator.cli import changes, display
    from orchestrator.cli.live import Live

    workspace = launched(Workspace.at(file, store=store, cluster=cluster))
    current = take(workspace)
    sight = None
    if workspace.pipeline.cluster is not None:
        with Live(workspace) as live:
            sight = live.look(current)
        if sight.driver is not None:  # between two drivers nobody holds the lease, and nothing is suspended
            current = replace(current, state="running")
    begun_anew = changes.begun_anew(workspace, current)
    if output_ is output.Format.table:
        driver = f", driven by {current.driver}" if current.driver else ""
        output.note(f"{current.name}: {current.state}{driver}, {output.dollars(current.usd)} so far")
        if current.state == "failed" and current.said is not None:
            output.note(current.said.detail)
        for said in begun_anew.values():
            output.note(said)
        output.console().print(display.tree(current, sight))
        return
    output.emit(display.whole(current, sight) | {"anew": begun_anew}, output_)
    if sight is not None and sight.note:
        output.note(sight.note)


def watch(
    file: options.File = None,
    store: options.Store = None,
    cluster: options.Cluster = None,
    interval: Annotated[
        float, typer.Option(min=0.1, help="Seconds between two looks at the ledger. What moves in a cluster is shown at once.")
    ] = 1.0,
    output_: options.Output = output.Format.table,
) -> None:
    """Follow a pipeline until it ends. Ctrl-C stops the looking only.

    Shows each stage with step, ETA and cost; in a cluster also the pods by node, and why it waits, in the cluster's own words.
    With json, one object a line whenever something changed.

    Example: osctl watch --interval 5
    """
    from orchestrator.cli import display

    workspace = launched(Workspace.at(file, store=store, cluster=cluster))
    current = take(workspace)
    if current.state == "running" or workspace.pipeline.cluster is not None:
        with display.Follower(workspace, workspace.prices, interval, output_) as follower:
            follower.over.wait()
        current = take(workspace)
    if output_ is output.Format.table:
        output.console().print(display.tree(current))
    else:
        output.line(display.whole(current, None), "", output_)
    output.note(f"{current.name}: {current.state}, {output.dollars(current.usd)}")


def list_(store: options.Store = None, output_: options.Output = output.Format.table) -> None:
    """List the pipelines of a store, with their state and cost.

    Example: osctl list --store s3://bucket/runs
    """
    import os

    from orchestrator.adapters import open_store
    from orchestrator.config import Pipeline
    from orchestrator.ledger import Ledger, pipelines

    url = store_url(store or os.environ.get("OSCTL_STORE", ".osctl/store"))
    opened = open_store(url)
    rows = []
    for name in pipelines(opened):
        revision = Ledger(opened, name).latest_revision()
        if revision is None:
            continue
        pipeline = Pipeline.model_validate(revision.pipeline).model_copy(update={"store": url})
        current = take(Workspace(pipeline))
        committed = sum(stage.state == "committed" for stage in current.stages)
        rows.append(
            {
                "name": name,
                "state": current.state,
                "stages": f"{committed}/{len(current.stages)}",
                "usd": current.usd,
                "driver": current.driver,
            }
        )
    if not rows:
        output.note(f"no pipelines in {url}. Start one with: osctl launch")
    output.emit(rows, output_, {"name": "pipeline", "state": "state", "stages": "committed", "usd": "cost, $", "driver": "driven by"})


def stage_names() -> list[str]:
    """For the shell's completion: the stages of the pipeline here. Reads one file, asks no store."""
    from orchestrator.errors import OsctlError

    try:
        return [stage.name for stage in Workspace.open(None).pipeline.stages]
    except OsctlError:  # completion has nobody to tell
        return []
