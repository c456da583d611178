"""Commands about recipes: init, plan, explain. They read files and compute; nothing runs."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from orchestrator.cli import options, output
from orchestrator.cli.workspace import Workspace

if TYPE_CHECKING:
    from orchestrator.plan import Plan, Row
    from orchestrator.snapshot import Snapshot


def init(
    folder: Annotated[Path, typer.Argument(help="Where to put osctl.yaml and its stage files.")] = Path(),
    recipe: Annotated[str, typer.Option("--from", metavar="NAME", help="Shipped recipe to start from: demo or open-sora-1.0.")] = "demo",
) -> None:
    """Write a recipe to start from. Overwrites nothing.

    Example: osctl init my-model --from open-sora-1.0
    """
    from orchestrator import config
    from orchestrator.errors import UsageError

    source = config.find(recipe)
    files = {folder / ("osctl.yaml" if path == source else path.name): path for path in sorted(source.parent.glob("*.yaml"))}
    taken = [str(target) for target in files if target.exists()]
    if taken:
        raise UsageError(f"init {folder}: {taken[0]} is there already. Choose another folder, or move it away")
    folder.mkdir(parents=True, exist_ok=True)
    for target, path in files.items():
        target.write_bytes(path.read_bytes())
        output.note(f"wrote {target}")
    output.note(f"next: osctl plan -f {folder}")


def plan(
    file: options.File = None,
    mfu: options.Mfu = None,
    settings: options.Set = None,
    store: options.Store = None,
    cluster: options.Cluster = None,
    output_: options.Output = output.Format.table,
) -> None:
    """Hours and dollars of every stage, beside the published run. With --cluster on that cluster's devices, at its price.

    Examples: osctl plan -f open-sora-1.0          osctl plan -f open-sora-1.0 --mfu 0.45
    """
    workspace = Workspace.open(file, settings=settings, store=store, cluster=cluster)
    show_plan(plan_of(workspace, mfu=mfu, committed=ledger_of(workspace)), output_)


def ledger_of(workspace: Workspace) -> Snapshot | None:
    """What the ledger knows already, where there is a local one: committed stages and measured steps. A plan needs no network."""
    if "://" in workspace.store_url or not Path(workspace.store_url).exists():
        return None
    from orchestrator import snapshot

    return snapshot.take(workspace.pipeline, workspace.ledger, workspace.prices, time.time())


def plan_of(workspace: Workspace, *, mfu: float | None = None, committed: Snapshot | None = None, target: str | None = None) -> Plan:
    from orchestrator.plan import plan as compute

    stages = committed.stages if committed else ()
    pipeline = workspace.pipeline
    if target is not None:
        pipeline = pipeline.model_copy(update={"stages": tuple(stage for stage in pipeline.stages if stage.name == target)})
    return compute(
        pipeline,
        workspace.prices,
        mfu=mfu,
        measured={stage.name: stage.step_s for stage in stages if stage.step_s is not None},
        committed={stage.name for stage in stages if stage.state == "committed"},
    )


def show_plan(estimate: Plan, output_: output.Format) -> None:
    """Per stage what is expected, from optimistic to pessimistic, and what the published run took."""
    rows = [
        {
            "name": row.stage,
            "parent": row.parent,
            "steps": row.steps,
            "flops": row.flops,
            "devices": row.devices,
            "device": row.device,
            "mfu": row.mfu,
            "basis": row.basis,
            **_figures(row),
            "published_gpu_hours": row.published.gpu_hours if row.published else None,
            "published_usd": row.published.usd if row.published else None,
            "ratio": row.ratio,
        }
        for row in estimate.rows
    ]
    total = {
        "name": "total",
        **_figures(estimate),
        "published_gpu_hours": estimate.published_gpu_hours or None,
        "published_usd": estimate.published_usd or None,
        "ratio": estimate.ratio,
    }
    if output_ is not output.Format.table:
        output.emit({"stages": rows, "total": total}, output_)
        return
    columns = {"name": "stage", "steps": "steps", "work": "FLOPs", "on": "on", "speed": "MFU", "hours": "device-hours", "gpu": "GPU-hours"}
    columns |= {"wall": "wall", "cost": "cost", "range": "range"}
    if estimate.published_gpu_hours:
        columns |= {"published_gpu_hours": "published GPU-h", "published_cost": "published", "share": "ratio"}
    output.table([_plan_cells(row) for row in [*rows, total]], columns)
    if finish := estimate.expected.wall_h:
        when = time.strftime("%Y-%m-%d %H:%M", time.localtime(time.time() + 3600 * finish))
        output.note(f"started now and never waiting, it would end {when}; encoding, checkpoints and queueing come on top")


def _figures(one: Plan | Row) -> dict[str, Any]:
    return {
        "device_hours": one.expected.device_hours,
        "gpu_hours": one.expected.gpu_hours,
        "wall_h": one.expected.wall_h,
        "usd": one.expected.usd,
        "usd_low": one.low.usd,
        "usd_high": one.high.usd,
    }


def _plan_cells(row: dict[str, Any]) -> dict[str, Any]:
    mfu = row.get("mfu")
    return {
        **row,
        "work": f"{row['flops']:.1e}" if "flops" in row else None,
        "on": f"{row['devices']} x {row['device']}" if "devices" in row else None,
        "speed": f"{100 * mfu:.3g}% {row['basis']}" if mfu else row.get("basis"),
        "hours": output.hours(row["device_hours"]),
        "gpu": output.hours(row["gpu_hours"]),
        "wall": output.duration(3600 * row["wall_h"]),
        "cost": output.dollars(row["usd"]),
        "range": f"{output.dollars(row['usd_low'])}–{output.dollars(row['usd_high'])}",
        "published_cost": output.dollars(row["published_usd"]) if row["published_usd"] is not None else None,
        "share": f"{row['ratio']:.2f}" if row["ratio"] else None,
    }


def explain(
    path: Annotated[
        str | None,
        typer.Argument(
            metavar="[FIELD]", help="Dotted field, e.g. stages.resources, stage.optimizer.lr, cluster.shm. Default: all of a pipeline."
        ),
    ] = None,
    schema: Annotated[
        str | None, typer.Option("--schema", metavar="pipeline|stage|cluster", help="Print the JSON Schema for editors instead.")
    ] = None,
    output_: options.Output = output.Format.table,
) -> None:
    """Explain a field of pipeline, stage and cluster files.

    Examples: osctl explain stage.optimizer          osctl explain --schema stage > stage.schema.json
    """
    import json

    from orchestrator import explain as schema_

    if schema is not None:
        if schema not in ("pipeline", "stage", "cluster"):
            raise typer.BadParameter(f"{schema} is none of pipeline, stage, cluster", param_hint="--schema")
        output.raw(json.dumps(schema_.json_schema(schema), indent=2) + "\n")
        return
    explanation = schema_.explain(path or "pipeline")
    rows = [
        {"name": field.path, "type": field.type, "unit": field.unit, "default": field.default, "meaning": field.doc}
        for field in explanation.fields
    ]
    subject = explanation.subject
    if output_ is output.Format.table:
        unit = f" [{subject.unit}]" if subject.unit else ""
        output.raw(f"{subject.path}: {subject.type}{unit}, default {subject.default}\n{subject.doc}\n\n")
    if rows or output_ is not output.Format.table:
        output.emit(rows or [vars(subject)], output_)
