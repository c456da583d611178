"""Commands that show how pipelines stand: status, watch, list."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from orchestrator.cli import options, output
from orchestrator.cli.subject import launched, say, snapshot
from orchestrator.cli.typed import expanded

if TYPE_CHECKING:
    from orchestrator.pipelines.host import Host
    from orchestrator.ports import Store


def status(
    pipeline: options.Named = None,
    file: options.File = None,
    store: options.Store = None,
    cluster: options.Cluster = None,
    output_: options.Output = output.Format.table,
) -> None:
    """Show each stage's state, pods and cost, and why it waits.

    In a cluster it reads with this person's own rights. What those do not show, the driver's last word in the ledger says.

    Examples: osctl status -f demo -o json          osctl status demo --store s3://bucket/runs
    """
    from orchestrator.cli import display
    from orchestrator.pipelines import changes, watching

    workspace = launched(pipeline, file, store=store, cluster=cluster)
    view = watching.view(workspace)
    current, cluster_view = view.snapshot, view.cluster
    say(current.remarks)
    begun_anew = changes.begun_anew(workspace, current)
    if output_ is output.Format.table:
        driver = f", driven by {current.driver}" if current.driver else ""
        output.note(f"{current.name}: {current.state}{driver}, {output.dollars(current.usd)} so far{display.of_earlier(current)}")
        if current.state == "failed" and current.said is not None:
            output.note(current.said.detail)
        for said in begun_anew.values():
            output.note(said)
        output.console().print(display.tree(current, cluster_view))
        return
    output.emit(display.whole(current, cluster_view) | {"anew": begun_anew}, output_)
    if cluster_view is not None and cluster_view.note:
        output.note(cluster_view.note)


def watch(
    pipeline: options.Named = None,
    file: options.File = None,
    store: options.Store = None,
    cluster: options.Cluster = None,
    interval: Annotated[
        float, typer.Option(min=0.1, max=86_400, help="Seconds between two reads of the ledger. What moves in a cluster is shown at once.")
    ] = 1.0,
    output_: options.Output = output.Format.table,
) -> None:
    """Follow a pipeline until it ends. Ctrl-C ends this command only.

    Shows each stage with step, ETA and cost; in a cluster also the pods by node, and why it waits, in the cluster's own words.
    With json, one object a line whenever something changed.

    Example: osctl watch --interval 5
    """
    from orchestrator.cli import display
    from orchestrator.cli.following import Follower

    workspace = launched(pipeline, file, store=store, cluster=cluster)
    current = snapshot(workspace, quiet=True)
    if current.state == "running" or workspace.pipeline.cluster is not None:
        with Follower(workspace, interval, output_) as follower:
            follower.over.wait()
        current = snapshot(workspace, quiet=True)
    say(current.remarks)
    if output_ is output.Format.table:
        output.console().print(display.tree(current))
    else:
        output.line(display.whole(current, None), "", output_)
    output.note(f"{current.name}: {current.state}, {output.dollars(current.usd)}")


def list_(store: options.Store = None, output_: options.Output = output.Format.table) -> None:
    """List the pipelines of a store, with their state and cost.

    What cannot be read is named on stderr and in the column `remark`; the other pipelines are shown.

    Example: osctl list --store s3://bucket/runs
    """
    from orchestrator.ledger.store import pipelines
    from orchestrator.pipelines.host import Host
    from orchestrator.pipelines.workspace import reached, store_at
    from orchestrator.stores import open_store

    host = Host.here()
    url = store_at(store, host)
    host = reached(url, host)
    found = open_store(url, host.env)
    rows = [row for name in pipelines(found) if (row := list_row(found, host, url, name)) is not None]
    if not rows:
        output.note(f"no pipelines in {url}. Start one with: osctl launch")
    columns = {"name": "pipeline", "state": "state", "stages": "committed", "usd": "cost, $", "driver": "driven by"}
    output.emit(rows, output_, columns | ({"remark": "remark"} if any(row["remark"] for row in rows) else {}))


def list_row(opened: Store, host: Host, url: str, name: str) -> dict[str, Any] | None:
    """One pipeline, or what of it cannot be read. None: a folder that holds none, or one that was never launched. Raises Unreachable."""
    from orchestrator.errors import OsctlError, Unreachable
    from orchestrator.ledger.objects import is_key
    from orchestrator.ledger.store import Ledger
    from orchestrator.pipelines.workspace import Workspace
    from orchestrator.recipe import launched as launches

    row: dict[str, Any] = {"name": name, "state": "unreadable", "stages": None, "usd": None, "driver": None, "remark": None}
    if not is_key(name):
        say([f"{name!r} is not osctl's: no key of osctl's has such a name; it is left alone"])
        return None
    try:
        found = launches.last(Ledger(opened, name))
        remarks = tuple(map(str, found.remarks))
        if found.pipeline is not None:
            workspace = Workspace(found.pipeline.model_copy(update={"store": url}), host, remarks=remarks)
            current = snapshot(workspace, quiet=True)
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
    return row | {"remark": expanded(remarks[0]) + more if remarks else None}
