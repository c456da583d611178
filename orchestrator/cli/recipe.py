"""Commands about recipes: init, plan, explain. They read files and compute; nothing runs."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Annotated

import typer

from orchestrator.cli import options, output
from orchestrator.cli.plans import show_plan, show_size
from orchestrator.cli.subject import opened, say


def init(
    folder: Annotated[Path, typer.Argument(help="Where to put osctl.yaml and its stage files.")] = Path(),
    recipe: Annotated[str, typer.Option("--from", metavar="NAME", help="Shipped recipe to start from: demo or open-sora-1.0.")] = "demo",
) -> None:
    """Write a recipe to start from. Overwrites nothing. The pipeline is called as the folder, so that two of them in a store stay apart.

    Example: osctl init my-model --from open-sora-1.0
    """
    from orchestrator.errors import UsageError
    from orchestrator.recipe import files

    source = files.find(recipe)
    targets = {folder / ("osctl.yaml" if path == source else path.name): path for path in sorted(source.parent.glob("*.yaml"))}
    taken = [str(target) for target in targets if target.exists()]
    if taken:
        raise UsageError(f"init {folder}: {taken[0]} is there already. Choose another folder, or move it away")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for target, path in targets.items():
            text = path.read_text()
            name = files.name_for(folder.name)
            target.write_text(re.sub(r"(?m)^name: .*$", f"name: {name}", text, count=1) if path == source and name else text)
            output.note(f"wrote {target}")
    except OSError as error:
        from orchestrator.cli.process import told

        raise UsageError(f"init: {told(error)}. Name a folder that can be written") from None
    output.note(f"next: osctl plan -f {shlex.quote(str(folder))}")


def plan(
    file: options.File = None,
    mfu: options.Mfu = None,
    settings: options.Set = None,
    store: options.Store = None,
    cluster: options.Cluster = None,
    calibration: options.Calibration = None,
    prices: options.Prices = None,
    shape: Annotated[
        str | None,
        typer.Option("--shape", metavar="TxHxW", help="Plan one step on clips of this size instead, with the last stage's model."),
    ] = None,
    devices: Annotated[int, typer.Option("--devices", min=1, max=1_000_000, help="With --shape: how many devices.")] = 8,
    device: Annotated[str, typer.Option("--device", metavar="NAME", help="With --shape: a device of the price list.")] = "h800",
    batch: Annotated[int, typer.Option("--batch", min=1, help="With --shape: clips of each group of devices that share one.")] = 1,
    output_: options.Output = output.Format.table,
) -> None:
    """Hours, dollars and memory of every stage, beside the published run. With --cluster on that cluster's devices, at its price.

    With --shape: what fits the devices for clips of that size, and what a step takes (pipeline: open-sora-1.0 where none is named).

    Examples: osctl plan -f open-sora-1.0 --mfu 0.45          osctl plan --shape 1440x1088x1920 --devices 8
    """
    from orchestrator.pipelines.plans import local_snapshot, plan_of, size_plan_of

    if shape is not None:
        workspace = opened(file or "open-sora-1.0", settings=settings, store=store, cluster=cluster, prices=prices)
        show_size(size_plan_of(workspace, shape, device, devices=devices, batch=batch, mfu=mfu, calibration=calibration), output_)
        return
    workspace = opened(file, settings=settings, store=store, cluster=cluster, prices=prices)
    if workspace.pipeline.prepare is not None:
        from orchestrator.cli.prepare_run import foretell
        from orchestrator.pipelines import preparing

        local = "://" not in workspace.store_url  # a plan asks no network
        foretell(workspace.pipeline.prepare, preparing.known(workspace) if local else None)
        workspace = preparing.on_known(workspace) if local else workspace
    workspace = workspace.with_contents(needed=False, far=False, ask_store=False, say=output.note)
    known = local_snapshot(workspace)
    show_plan(plan_of(workspace, mfu=mfu, calibration=calibration, committed=known), output_)
    if known is not None:
        say(known.remarks)


def explain(
    path: Annotated[
        str | None,
        typer.Argument(
            metavar="[FIELD]", help="Dotted field, e.g. stages.resources, stage.optimizer.lr, cluster.shm. Default: all of a pipeline."
        ),
    ] = None,
    schema: Annotated[
        str | None, typer.Option("--schema", metavar="pipeline|stage|cluster|prepare", help="Print the JSON Schema for editors instead.")
    ] = None,
    output_: options.Output = output.Format.table,
) -> None:
    """Explain a field of pipeline, stage, cluster and prepare files.

    Examples: osctl explain stage.optimizer          osctl explain --schema stage > stage.schema.json
    """
    import json

    from orchestrator.recipe import explain as schema_

    if schema is not None:
        if schema not in ("pipeline", "stage", "cluster", "prepare"):
            raise typer.BadParameter(f"{schema} is none of pipeline, stage, cluster, prepare", param_hint="--schema")
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
