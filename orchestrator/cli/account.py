"""Commands that account for what was done: compare, cost, lineage, sync, mlflow."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from orchestrator.cli import options, output
from orchestrator.cli.look import launched, stage_names, take
from orchestrator.cli.workspace import Workspace, home

if TYPE_CHECKING:
    from collections.abc import Mapping

    from orchestrator.cost import AttemptBill, Bill
    from orchestrator.ledger import Ledger, Link
    from orchestrator.snapshot import Snapshot


NOT_RECORDED = "not recorded"
"""Of contents that a release up to 0.1.0 did not write down."""


def compare(file: options.File = None, store: options.Store = None, output_: options.Output = output.Format.table) -> None:
    """Stages side by side: loss, quality, GPU-hours, cost, ratio.

    Readings come with their 95% interval; chance and ceiling stand in the heading.

    Example: osctl compare -f demo -o yaml
    """
    from orchestrator.cli import display

    current = take(launched(Workspace.at(file, store=store)))
    lines = display.comparison(current)
    if output_ is output.Format.table:
        output.table(*display.comparison_cells(lines))
        if current.earlier:
            output.note(f"total {output.dollars(current.usd)}{display.of_earlier(current)}")
    else:
        output.emit(lines, output_)


def cost(
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
    its own. Where booked and held time differ, a remark says so.

    Example: osctl cost --by-attempt -o json
    """
    from orchestrator.cli import display
    from orchestrator.records import HELD

    workspace = launched(Workspace.at(file, store=store))
    current = take(workspace)
    if verify:
        current = _added_up_anew(workspace, current)
    rows = _rows(current, by_attempt)
    if output_ is output.Format.table:
        spent = [category for category in HELD if any(row["device_seconds"][category] for row in rows)]
        cells = [{**row, **{key: output.duration(row["device_seconds"][key]) for key in spent}, **_cells(row)} for row in rows]
        columns = {"name": "stage"} | ({"attempt": "attempt"} if by_attempt else {}) | {key: key.replace("_", " ") for key in spent}
        output.table(
            cells, columns | {"held": "= held", "goodput": "goodput", "device_hours": "device-h", "gpu_hours": "GPU-h", "usd": "cost"}
        )
        output.note(f"device-seconds by what they were spent on; total {output.dollars(current.usd)}{display.of_earlier(current)}")
        for line in _prices(current.bill):
            output.note(line)
    else:
        output.emit(rows, output_)


def _rows(current: Snapshot, by_attempt: bool) -> list[dict[str, Any]]:
    """A line a stage, and one for all that was spent on it under earlier inputs; or a line for each of their attempts."""
    from orchestrator.cost import AttemptBill, merge

    parts: list[tuple[str, str | None, bool, Bill]] = []
    names = dict.fromkeys([*(stage.name for stage in current.stages), *(one.stage for one in current.former)])
    for name in names:
        parts += [(name, stage.inputs, False, stage.bill) for stage in current.stages if stage.name == name]
        earlier = [one for one in current.earlier if one.stage == name]
        if by_attempt:
            parts += [(name, one.inputs, True, one.bill) for one in earlier]
        elif earlier:
            parts.append((name, None, True, merge(one.bill for one in earlier)))
    return [
        {"name": name, "inputs": inputs, "earlier": old, **({"attempt": one.attempt} if isinstance(one, AttemptBill) else {}), **_bill(one)}
        for name, inputs, old, bill in parts
        for one in (bill.attempts if by_attempt else (bill,))
    ]


def _added_up_anew(workspace: Workspace, current: Snapshot) -> Snapshot:
    """The same from every piece of every journal. Raises CorruptCheckpoint where that is another bill."""
    from orchestrator import snapshot
    from orchestrator.errors import CorruptCheckpoint
    from orchestrator.history import History
    from orchestrator.ledger import Ledger
    from orchestrator.prices import named_prices

    history = History(Ledger(workspace.store, workspace.pipeline.name), named_prices, verify=True)
    anew = snapshot.take(workspace.pipeline, history, time.time())
    found = {(about, one.attempt): one for about, bill in anew.bills() for one in bill.attempts}
    for about, bill in current.bills():
        for one in bill.attempts:
            whole = found[about, one.attempt]
            if one.over and dict(one.seconds) != dict(whole.seconds):
                raise CorruptCheckpoint(
                    f"cost --verify: {about} attempt {one.attempt}: by the sums beside its journal {one.held_s:.3f} device-seconds were "
                    f"held and {one.booked_s:.3f} booked, by its pieces {whole.held_s:.3f} and {whole.booked_s:.3f}. The pieces count: "
                    "delete the folder `totals` beside that journal, then: osctl cost"
                )
    output.note("every journal piece was added up anew, and the bill is the same")
    return anew


def _prices(bill: Bill) -> list[str]:
    """Each price that was paid, with who says so."""
    paid = {(one.device, one.price.usd_per_hour, one.price.source, one.price.date) for one in bill.attempts if one.price and one.held_s}
    return [f"{device}: ${usd} a device-hour ({source}, {date})" for device, usd, source, date in sorted(paid)]


def _bill(bill: Bill | AttemptBill) -> dict[str, Any]:
    return {
        "device_seconds": dict(bill.seconds),
        "waiting_s": bill.waiting_s,
        "held_s": bill.held_s,
        "difference_s": bill.difference_s(),
        "device_hours": bill.device_hours,
        "gpu_hours": bill.gpu_hours,
        "usd": bill.usd,
        "goodput": bill.goodput,
    }


def _cells(row: dict[str, Any]) -> dict[str, Any]:
    return {
        "name": f"{row['name']}, earlier inputs" if row["earlier"] else row["name"],
        "held": output.duration(row["held_s"]),
        "goodput": output.percent(row["goodput"]),
        "device_hours": output.hours(row["device_hours"]),
        "gpu_hours": output.hours(row["gpu_hours"]),
        "usd": output.dollars(row["usd"]),
    }


def lineage(
    stage: Annotated[
        str | None, typer.Argument(help="Stage to start from; default: the last committed.", autocompletion=stage_names)
    ] = None,
    verify: Annotated[bool, typer.Option("--verify", help="Read and hash every file of every checkpoint.")] = False,
    file: options.File = None,
    store: options.Store = None,
    output_: options.Output = output.Format.table,
) -> None:
    """Walk a checkpoint back to its root, and verify it.

    With --verify a flipped byte, a missing or exchanged file, an edited manifest are found and named (exit 4).

    Example: osctl lineage stage3 --verify
    """
    from orchestrator import datasets
    from orchestrator.errors import CorruptCheckpoint, Refused

    workspace = launched(Workspace.at(file, store=store))
    committed = [status for status in take(workspace).stages if status.committed or status.broken]
    chosen = [status for status in committed if stage in (None, status.name)]
    if not chosen:
        raise Refused(
            f"lineage {stage or workspace.pipeline.name}: nothing is committed. Make it with: osctl launch{f' {stage}' if stage else ''}"
        )
    last = chosen[-1]
    assert last.inputs is not None
    links = list(workspace.ledger.lineage(last.name, last.inputs, full=verify))
    named = datasets.names_of(workspace.store)
    rows: list[dict[str, Any]] = [
        {
            "name": link.stage,
            "inputs": link.inputs,
            "attempt": link.committed.attempt if link.committed else None,
            "step": link.committed.step if link.committed else None,
            "weights": link.committed.weights_digest[:12] if link.committed else None,
            "manifest": link.committed.manifest_digest[:12] if link.committed else None,
            **made_of(workspace.ledger, link, named),
            "imports": imported_by(workspace.ledger, link),
            "verdict": "; ".join(f"{fault.key.rsplit('/', 1)[-1]}: {fault.text}" for fault in link.faults)
            or ("verified" if verify else "present"),
            "contents": link.contents.model_dump() if link.contents else None,
            "remarks": list(link.remarks),
        }
        for link in links
    ]
    shown = rows if output_ is not output.Format.table else [{**row, "remarks": "; ".join(row["remarks"])} for row in rows]
    output.emit(
        shown,
        output_,
        {
            "name": "stage",
            "inputs": "inputs",
            "attempt": "attempt",
            "step": "step",
            "weights": "weights",
            "manifest": "manifest",
            "data": "data",
            "verdict": "verdict",
        }
        | ({"remarks": "remarks"} if any(row["remarks"] for row in rows) else {}),
    )
    if output_ is output.Format.table:
        for row in rows:
            for one in row["imports"]:
                output.note(f"{row['name']} imports {_imported(one)}")
    faults = [fault for link in links for fault in link.faults]
    if faults:
        count = f"{len(faults)} fault{'s' * (len(faults) > 1)}"
        raise CorruptCheckpoint(
            f"lineage {last.name}: {count}, first: {faults[0].key}: {faults[0].text}. Do not train on it; make the stage again"
        )


def made_of(ledger: Ledger, link: Link, named: Mapping[str, str]) -> dict[str, str | None]:
    """What a stage was trained on, as its attempt recorded it. `named`: data sets' names by digest."""
    if link.committed is None or link.intent is None:
        return {"data": None, "data_digest": None}
    if link.intent.config.data.source.kind == "digits":
        return {"data": "digits, made by the trainer", "data_digest": None}
    terms = ledger.terms(link.stage, link.inputs, link.committed.attempt)
    digest = terms.contents.data if terms is not None else None
    if digest is None:
        return {"data": NOT_RECORDED, "data_digest": None}
    return {"data": f"{digest[:12]} {named.get(digest, '')}".rstrip(), "data_digest": digest}


def _imported(one: Mapping[str, str | None]) -> str:
    digest = one["digest"][:12] if one["digest"] else NOT_RECORDED
    return f"{one['role']} {digest} from {one['source']} (licence: {one['licence']})"


def imported_by(ledger: Ledger, link: Link) -> list[dict[str, str | None]]:
    """Where a stage's lineage ends: at weights and encoders that were made elsewhere."""
    from orchestrator import imports
    from orchestrator.contents import imports_of

    if link.committed is None or link.intent is None:
        return []
    terms = ledger.terms(link.stage, link.inputs, link.committed.attempt)
    rows: list[dict[str, str | None]] = []
    for role, name in imports_of(link.intent.config):
        digest = getattr(terms.contents, role) if terms is not None else None
        known = next(iter(imports.sources_of(ledger.store, digest)), None) if digest is not None else None
        source, licence = (known.source, known.licence) if known else (name, None)
        rows.append({"role": role, "digest": digest, "source": source, "licence": licence or NOT_RECORDED})
    return rows


def sync(file: options.File = None, store: options.Store = None, tracking: options.Tracking = None) -> None:
    """Bring MLflow up to the ledger, whatever it missed. Repeating it doubles nothing.

    Example: osctl sync --tracking http://mlflow.internal:5000
    """
    import subprocess
    import sys

    from orchestrator.adapters.tracking import tracking_url
    from orchestrator.errors import UsageError

    workspace = launched(Workspace.at(file, store=store))
    uri = tracking or workspace.pipeline.tracking
    if uri == "none":
        raise UsageError(
            f"sync {workspace.pipeline.name}: tracking is none. Name an MLflow with --tracking sqlite or --tracking http://host:port"
        )
    tracking_url(uri, home())  # what is wrong with it is said before a process has it in its name
    started = time.monotonic()
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "orchestrator.projection",
            "--store",
            workspace.store_url,
            "--pipeline",
            workspace.pipeline.name,
            "--tracking",
            uri,
        ],
        check=False,
    )
    if done.returncode:
        raise SystemExit(done.returncode)
    output.note(f"MLflow ({uri}) shows {workspace.pipeline.name} as the ledger has it, after {time.monotonic() - started:.1f} s")


def mlflow(
    file: options.File = None,
    tracking: options.Tracking = None,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port on 127.0.0.1; 0: any free one.")] = 5000,
    open_: Annotated[bool, typer.Option("--open/--no-open", help="Open a browser where there is one.")] = True,
) -> None:
    """Open MLflow's pages on the pipeline, its stages side by side. Ctrl-C ends the server.

    Example: osctl mlflow --no-open --port 5001
    """
    from orchestrator.adapters.mlflow_ui import serve

    workspace = Workspace.open(file, tracking=tracking)
    serve(workspace.pipeline.tracking, home(), workspace.pipeline.experiment, port=port, open_browser=open_, say=output.note)
