"""Commands that only look: status, watch, list, logs."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from orchestrator.cli import options, output
from orchestrator.cli.workspace import Workspace, lend_endpoint, store_url

if TYPE_CHECKING:
    from orchestrator.ports import Store
    from orchestrator.snapshot import Snapshot

REMARKS = 10
"""Remarks that are said to people. Arbitrary: half a screen."""


def launched(workspace: Workspace) -> Workspace:
    """The same pipeline as it was last launched, where it was: what ran is what one wants to see, not what the file says today.

    Where that launch cannot be read, the newest that can be, else the file; `remarks` says so.
    """
    from orchestrator import launched as launches

    found = launches.last(workspace.ledger)
    remarks = tuple(map(str, found.remarks))
    if found.pipeline is None:
        shown = ("no launch can be read; shown is what the file says",) if not found.is_last else ()
        return Workspace(workspace.pipeline, remarks + shown) if remarks else workspace
    shown = () if found.is_last else ("the last launch cannot be read; shown is the one before it that can be",)
    return Workspace(found.pipeline.model_copy(update={"store": workspace.pipeline.store}), remarks + shown)


def take(workspace: Workspace, *, quiet: bool = False) -> Snapshot:
    """What the ledger says now. What cannot be read is left out, and said on stderr unless `quiet`."""
    from orchestrator import snapshot

    current = snapshot.take(workspace.pipeline, workspace.history, time.time())
    current = replace(current, remarks=(*workspace.remarks, *current.remarks))
    if not quiet:
        say(current.remarks)
    return current


def say(remarks: Sequence[str]) -> None:
    for remark in remarks[:REMARKS]:
        output.note(f"remark: {remark}")
    if len(remarks) > REMARKS:
        output.note(f"remark: and {len(remarks) - REMARKS} more; see: osctl status -o json")


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
        output.note(f"{current.name}: {current.state}{driver}, {output.dollars(current.usd)} so far{display.of_earlier(current)}")
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
    current = take(workspace, quiet=True)
    if current.state == "running" or workspace.pipeline.cluster is not None:
        with display.Follower(workspace, interval, output_) as follower:
            follower.over.wait()
        current = take(workspace, quiet=True)
    say(current.remarks)
    if output_ is output.Format.table:
        output.console().print(display.tree(current))
    else:
        output.line(display.whole(current, None), "", output_)
    output.note(f"{current.name}: {current.state}, {output.dollars(current.usd)}")


def list_(store: options.Store = None, output_: options.Output = output.Format.table) -> None:
    """List the pipelines of a store, with their state and cost.

    What cannot be read is told on stderr and in the column `remark`; the other pipelines are shown.

    Example: osctl list --store s3://bucket/runs
    """
    import os

    from orchestrator import config
    from orchestrator.adapters import open_store
    from orchestrator.ledger import pipelines

    url = store_url(store or os.environ.get("OSCTL_STORE", ".osctl/store"))
    if url.startswith("s3://") and (cluster := os.environ.get("OSCTL_CLUSTER")):
        lend_endpoint(config.cluster_profile(cluster))
    opened = open_store(url)
    rows = [row for name in pipelines(opened) if (row := list_row(opened, url, name)) is not None]
    if not rows:
        output.note(f"no pipelines in {url}. Start one with: osctl launch")
    columns = {"name": "pipeline", "state": "state", "stages": "committed", "usd": "cost, $", "driver": "driven by"}
    output.emit(rows, output_, columns | ({"remark": "remark"} if any(row["remark"] for row in rows) else {}))


def list_row(opened: Store, url: str, name: str) -> dict[str, Any] | None:
    """One pipeline, or what of it cannot be read. None: a folder that holds none, or one that was never launched. Raises Unreachable."""
    from orchestrator import launched as launches
    from orchestrator.errors import OsctlError, Unreachable
    from orchestrator.ledger import Ledger, is_key

    row: dict[str, Any] = {"name": name, "state": "unreadable", "stages": None, "usd": None, "driver": None, "remark": None}
    if not is_key(name):
        say([f"{name!r} is not osctl's: no key of osctl's has such a name; it is left alone"])
        return None
    try:
        found = launches.last(Ledger(opened, name))
        remarks = tuple(map(str, found.remarks))
        if found.pipeline is not None:
            current = take(Workspace(found.pipeline.model_copy(update={"store": url}), remarks), quiet=True)
            committed = sum(stage.state == "committed" for stage in current.stages)
            row |= {"state": current.state, "stages": f"{committed}/{len(current.stages)}", "usd": current.usd, "driver": current.driver}
            remarks = current.remarks
        elif not remarks:
            if not opened.children(f"{name}/") and next(opened.list(f"{name}/"), "").endswith("/lease.json"):
                return None  # a launch that is just beginning
            say([f"{name}/ is not osctl's: it holds no launch of a pipeline; it is left alone"])
            return None
    except Unreachable:
        raise
    except OsctlError as error:
        remarks = (str(error),)
    say([f"{name}: {remark}" for remark in remarks])
    more = f" (and {len(remarks) - 1} more)" if len(remarks) > 1 else ""
    return row | {"remark": remarks[0] + more if remarks else None}


def stage_names() -> list[str]:
    """For the shell's completion: the stages of the pipeline here. Reads one file, asks no store."""
    from orchestrator.errors import OsctlError

    try:
        return [stage.name for stage in Workspace.open(None).pipeline.stages]
    except OsctlError:  # completion has nobody to tell
        return []
