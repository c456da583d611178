"""Commands that account for what was done: compare, cost, lineage, sync, mlflow."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from opensora.printable import several
from orchestrator.cli import options, output
from orchestrator.cli.subject import launched, launched_or_stage, snapshot
from orchestrator.cli.typed import expanded

SOURCES = 5
"""Videos of a lineage that are named to people. Arbitrary; json has them all."""

if TYPE_CHECKING:
    from collections.abc import Mapping

    from orchestrator.accounting.cost import Bill


def compare(
    pipeline: options.Named = None, file: options.File = None, store: options.Store = None, output_: options.Output = output.Format.table
) -> None:
    """Stages side by side: loss, quality, GPU-hours, cost, ratio.

    Readings come with their 95% interval; chance and ceiling stand in the heading.

    Example: osctl compare -f demo -o yaml
    """
    from orchestrator.cli import display
    from orchestrator.pipelines import accounts

    current = snapshot(launched(pipeline, file, store=store))
    lines = accounts.comparison(current)
    if output_ is output.Format.table:
        output.table(*display.comparison_cells(lines))
        if current.earlier:
            output.note(f"total {output.dollars(current.usd)}{display.of_earlier(current)}")
    else:
        output.emit(lines, output_)


def cost(
    pipeline: options.Named = None,
    file: options.File = None,
    store: options.Store = None,
    by_attempt: Annotated[bool, typer.Option("--by-attempt", help="One line an attempt instead of one a stage.")] = False,
    verify: Annotated[
        bool, typer.Option("--verify", help="Add up every journal piece anew, and compare (exit 4 where the sums differ).")
    ] = False,
    output_: options.Output = output.Format.table,
) -> None:
    """The bill: what each held device-second was spent on, at the price of the day on which the attempt was made.

    Held categories sum to devices x wall time; queueing holds nothing and costs nothing. What was spent under earlier inputs has lines of
    its own, and so have clips that were made of raw videos first. Where booked and held time differ, a remark says so.

    Example: osctl cost --by-attempt -o json
    """
    from orchestrator.accounting.cost import Bill
    from orchestrator.cli import display
    from orchestrator.ledger.records import HELD
    from orchestrator.pipelines import accounts

    workspace = launched(pipeline, file, store=store)
    current = snapshot(workspace)
    if verify:
        current = accounts.added_up_anew(workspace, current)
        output.note("every journal piece was added up anew, and the bill is the same")
    rows = accounts.cost(current, by_attempt=by_attempt)
    if output_ is not output.Format.table:
        output.emit(rows, output_)
        return
    spent = [category for category in HELD if any(row["device_seconds"].get(category) for row in rows)]
    cells = [{**row, **{key: output.duration(row["device_seconds"].get(key)) for key in spent}, **_cells(row)} for row in rows]
    columns = {"name": "stage"} | ({"attempt": "attempt"} if by_attempt else {})
    columns |= {"pool": "pool"} if any(row.get("pool") for row in rows) else {}
    columns |= {key: key.replace("_", " ") for key in spent}
    output.table(cells, columns | {"held": "= held", "goodput": "goodput", "device_hours": "device-h", "gpu_hours": "GPU-h", "usd": "cost"})
    if by_attempt and current.bill.evaluations:
        output.note(f"evaluations beside the attempts: {output.dollars(Bill((), current.bill.evaluations).usd)} of the total")
    output.note(f"device-seconds by what they were spent on; total {output.dollars(current.usd)}{display.of_earlier(current)}")
    for line in _prices(current.bill):
        output.note(line)
    if (made := current.preparation) is not None and made.attempts:
        less = f", without {', '.join(made.not_priced)}, which have no price" if made.not_priced else ""
        output.note(f"{made.name}: all that was spent on these clips{less}; by step: osctl prepare status {made.name}")


def _prices(bill: Bill) -> list[str]:
    """Each price that was paid, and its source."""
    paid = {
        (f"{one.device} in pool {one.pool}" if one.pool else one.device, one.price.usd_per_hour, one.price.source, one.price.date)
        for one in bill.attempts
        if one.price and one.held_s
    } | {(one.device, one.price.usd_per_hour, one.price.source, one.price.date) for one in bill.evaluations if one.price}
    return [f"{device}: ${usd} a device-hour ({source}, {date})" for device, usd, source, date in sorted(paid)]


def _cells(row: dict[str, Any]) -> dict[str, Any]:
    also = [*(["evaluated"] if row.get("evaluations") else []), *(["earlier inputs"] if row["earlier"] else [])]
    return {
        "name": ", ".join([row["name"], *also]),
        "held": output.duration(row["held_s"]),
        "goodput": output.percent(row["goodput"]),
        "device_hours": output.hours(row["device_hours"]),
        "gpu_hours": output.hours(row["gpu_hours"]),
        "usd": output.dollars(row["usd"]),
    }


def lineage(
    pipeline: options.NamedOrStage = None,
    stage: Annotated[
        str | None, typer.Argument(help="Stage to start from; default: the last committed.", autocompletion=options.stage_names)
    ] = None,
    verify: Annotated[bool, typer.Option("--verify", help="Read and hash every file of every checkpoint.")] = False,
    file: options.File = None,
    store: options.Store = None,
    output_: options.Output = output.Format.table,
) -> None:
    """Walk a checkpoint back to its root, and to the videos that its clips were cut from; verify it.

    With --verify a flipped byte, a missing or exchanged file, an edited manifest are found and named (exit 4).

    Example: osctl lineage stage3 --verify
    """
    from orchestrator.errors import CorruptCheckpoint
    from orchestrator.pipelines import accounts

    workspace, stage = launched_or_stage(pipeline, stage, file, store=store)
    found = accounts.lineage(workspace, stage, verify=verify)
    rows = [{**row, "remarks": list(map(expanded, row["remarks"]))} for row in found.rows]
    shown = rows if output_ is not output.Format.table else [{**row, "remarks": "; ".join(row["remarks"])} for row in rows]
    columns = {key: key for key in ("inputs", "attempt", "step", "weights", "manifest", "data", "verdict")}
    output.emit(shown, output_, {"name": "stage", **columns, **({"remarks": "remarks"} if any(row["remarks"] for row in rows) else {})})
    if output_ is output.Format.table:
        for row in rows:
            for one in row["imports"]:
                output.note(f"{row['name']} imports {_imported(one)}")
            for one in row["sources"][:SOURCES]:
                licence = one.get("licence") or "not recorded"
                made = f"{several(one['clips'], 'clip')} of {one['uri']} (licence: {licence}, sha256 {one['sha256'][:12]})"
                output.note(f"{row['name']} has {expanded(made)}")
            if (more := len(row["sources"]) - SOURCES) > 0:
                output.note(f"{row['name']} has clips of {more:,} more: osctl data show {row['name']} --about")
    if found.fault:
        raise CorruptCheckpoint(found.fault)


def _imported(one: Mapping[str, str | None]) -> str:
    digest = one["digest"][:12] if one["digest"] else "not recorded"
    return f"{one['role']} {digest} from {one['source']} (licence: {one['licence']})"


def sync(pipeline: options.Named = None, file: options.File = None, store: options.Store = None, tracking: options.Tracking = None) -> None:
    """Bring MLflow up to date with the ledger, whatever it missed. Repeating it doubles nothing.

    Example: osctl sync --tracking http://mlflow.internal:5000
    """
    import subprocess

    from orchestrator import modules
    from orchestrator.errors import UsageError
    from orchestrator.tracking.client import tracking_url

    workspace = launched(pipeline, file, store=store)
    uri = tracking or workspace.pipeline.tracking
    if uri == "none":
        raise UsageError(
            f"sync {workspace.pipeline.name}: tracking is none. Name an MLflow with --tracking sqlite or --tracking http://host:port"
        )
    tracking_url(uri, workspace.host.home)  # a fault of it is reported before a process is started with it
    started = time.monotonic()
    words = ["--store", workspace.store_url, "--pipeline", workspace.pipeline.name, "--tracking", uri]
    done = subprocess.run(modules.command("orchestrator.tracking", *words), check=False, env=workspace.host.for_children())
    if done.returncode:
        raise SystemExit(done.returncode)
    output.note(f"MLflow ({uri}) shows {workspace.pipeline.name} as the ledger has it, after {time.monotonic() - started:.1f} s")


def mlflow(
    pipeline: options.Named = None,
    file: options.File = None,
    store: options.Store = None,
    tracking: options.Tracking = None,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port on 127.0.0.1; 0: any free one.")] = 5000,
    open_: Annotated[bool, typer.Option("--open/--no-open", help="Open a browser where there is one.")] = True,
) -> None:
    """Open MLflow's pages on the pipeline, its stages side by side. Ctrl-C ends the server.

    Example: osctl mlflow --no-open --port 5001
    """
    from orchestrator.cli.subject import opened
    from orchestrator.errors import Unreachable
    from orchestrator.tracking.ui import serve

    try:
        workspace = launched(pipeline, file, store=store)
    except Unreachable as error:  # its pages need no store
        if pipeline is not None:
            raise
        output.note(f"{error}; opened is what the recipe names")
        workspace = opened(file, store=store)
    host, about = workspace.host, workspace.pipeline
    named = tracking or host.env.get("OSCTL_TRACKING") or about.tracking
    serve(named, host.home, about.experiment, port=port, open_browser=open_, say=output.note)
