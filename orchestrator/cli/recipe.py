"""Commands about recipes: init, plan, explain. They read files and compute; nothing runs."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from orchestrator.cli import options, output
from orchestrator.cli.workspace import Workspace

if TYPE_CHECKING:
    from orchestrator.plan import Plan
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
    output_: options.Output = output.Format.table,
) -> None:
    """Hours and dollars of every stage, beside the published run.

    Examples: osctl plan -f open-sora-1.0          osctl plan -f open-sora-1.0 --mfu 0.45
    """
    workspace = Workspace.open(file, settings=settings, store=store)
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
    raise NotImplementedError


def explain(
    path: Annotated[
        str | None,
        typer.Argument(metavar="[FIELD]", help="Dotted field, e.g. stages.resources or stage.optimizer.lr. Default: all of a pipeline."),
    ] = None,
    schema: Annotated[
        str | None, typer.Option("--schema", metavar="pipeline|stage", help="Print the JSON Schema for editors instead.")
    ] = None,
    output_: options.Output = output.Format.table,
) -> None:
    """Explain a field of pipeline and stage files.

    Examples: osctl explain stage.optimizer          osctl explain --schema stage > stage.schema.json
    """
    raise NotImplementedError

