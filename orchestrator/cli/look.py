"""Commands that only look: status, watch, list, logs."""

from __future__ import annotations

import time
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


def status(file: options.File = None, store: options.Store = None, output_: options.Output = output.Format.table) -> None:
    """Show each stage: state, step, loss, cost, why it waits.

    Example: osctl status -f demo -o json
    """
    workspace = launched(Workspace.open(file, store=store))
    current = take(workspace)
    if output_ is output.Format.table:
        from orchestrator.cli import display

        driver = f", driven by {current.driver}" if current.driver else ""
        output.note(f"{current.name}: {current.state}{driver}, {output.dollars(current.usd)} so far")
        output.console().print(display.tree(current))
    else:
        from orchestrator.cli import display

        output.emit(
            {"name": current.name, "state": current.state, "driver": current.driver, "usd": current.usd, "stages": display.rows(current)},
            output_,
        )


def watch(
    file: options.File = None,
    store: options.Store = None,
    interval: Annotated[float, typer.Option(min=0.1, help="Seconds between two looks.")] = 1.0,
) -> None:
    """Follow a pipeline until it ends. Ctrl-C stops the looking only.

    Example: osctl watch --interval 5
    """
    from orchestrator.cli import display

    workspace = launched(Workspace.open(file, store=store))
    if (current := take(workspace)).state == "running":
        with display.Follower(workspace, workspace.prices, interval):
            while (current := take(workspace)).state == "running":
                time.sleep(interval)
    output.console().print(display.tree(current))
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


def logs(
    stage: Annotated[
        str | None, typer.Argument(help="Stage; default: the one that ran last.", autocompletion=lambda: stage_names())
    ] = None,
    attempt: Annotated[int | None, typer.Option(min=1, help="Attempt number; default: the last.")] = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the attempt ends.")] = False,
    file: Annotated[
        str | None, typer.Option("--file", metavar="PATH|NAME", envvar="OSCTL_FILE", help="Pipeline, as in osctl launch -f.")
    ] = None,
    store: options.Store = None,
) -> None:
    """Print what the trainer of an attempt wrote. Logs lie in the store: they outlive the process that wrote them.

    Example: osctl logs stage2 -f
    """
    from orchestrator.errors import UsageError

    workspace = launched(Workspace.open(file, store=store))
    current = take(workspace)
    tried = [status for status in current.stages if status.attempts]
    chosen = [status for status in tried if stage in (None, status.name)]
    if not chosen:
        known = ", ".join(status.name for status in tried) or "none"
        raise UsageError(f"logs {stage or ''}: no attempt in the ledger; stages that ran: {known}. Run: osctl launch")
    selected = chosen[-1]
    numbers = [one.number for one in selected.attempts]
    number = attempt or numbers[-1]
    if number not in numbers:
        raise UsageError(
            f"logs {selected.name}: attempt {number} is not in the ledger; it has {numbers[0]} to {numbers[-1]}. Name one of those"
        )
    assert selected.inputs is not None
    last = ""
    while True:
        ended = workspace.ledger.outcome(selected.name, selected.inputs, number) is not None
        for piece in workspace.ledger.log(selected.name, selected.inputs, number, after=last):
            output.raw(piece.text().decode(errors="replace"))
            last = piece.key
        if ended or not follow:
            return
        time.sleep(0.5)


def stage_names() -> list[str]:
    """For the shell's completion: the stages of the pipeline here. Reads one file, asks no store."""
    from orchestrator.errors import OsctlError

    try:
        return [stage.name for stage in Workspace.open(None).pipeline.stages]
    except OsctlError:  # completion has nobody to tell
        return []
