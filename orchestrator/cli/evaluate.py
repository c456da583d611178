"""`osctl eval`: how good committed stages are, and what that is compared with."""

from __future__ import annotations

import tempfile
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from orchestrator.cli import options, output
from orchestrator.cli.subject import launched, remembered, snapshot
from orchestrator.errors import Refused, UsageError

if TYPE_CHECKING:
    from orchestrator.pipelines.workspace import Workspace


def evaluate(
    target: Annotated[
        str | None,
        typer.Argument(
            metavar="[STAGE|CHECKPOINT]",
            help="A committed stage, or the folder of a checkpoint or of an export. Default: every committed stage.",
            autocompletion=options.stage_names,
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="With a folder: where result.json and samples go; default: nowhere.")
    ] = None,
    file: options.File = None,
    settings: options.Set = None,
    store: options.Store = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
    output_: options.Output = output.Format.table,
) -> None:
    """Judge committed stages: held-out loss, accuracies with 95% intervals, samples.

    What was asked before is read from the ledger. With other settings or prompts a stage is judged again, and never trained.

    Examples: osctl eval          osctl eval stage2 --set stage2.evaluate.clips=1000          osctl eval my-export --out judged
    """
    if target is not None and Path(target).is_dir():
        _of_folder(Path(target), out, output_)
        return
    if out is not None:
        raise UsageError(f"eval: --out {out} goes with a checkpoint's folder; samples of a stage go to the store, and to osctl mlflow")
    workspace = launched(None, file, store=store)
    if settings:
        from orchestrator.pipelines.find import to_resume

        workspace = remembered(to_resume(workspace, settings))
    rows = [_of_stage(workspace, name, quiet=quiet) for name in _wanted(workspace, target)]
    output.emit(rows if output_ is not output.Format.table else list(map(_cells, rows)), output_, COLUMNS)
    if output_ is output.Format.table:
        output.note("next: osctl compare | osctl cost")


COLUMNS = {
    "name": "stage", "image": "image digit", "digit": "clip digit", "direction": "clip direction", "both": "both", "frozen": "frozen clip",
    "held_out": "held-out loss", "gain": "gain over parent", "device_s": "device-s", "usd": "cost",
}  # fmt: skip


def _wanted(workspace: Workspace, target: str | None) -> list[str]:
    """Names of the committed stages that are meant, which ask something."""
    from orchestrator.ledger import evaluations
    from orchestrator.pipelines.find import check_stage

    check_stage(workspace, target, "eval")
    done = [stage.name for stage in snapshot(workspace).stages if stage.committed is not None and target in (None, stage.name)]
    if not done:
        fact = f"eval {target or workspace.pipeline.name}: nothing is committed to judge"
        raise Refused(f"{fact}. Make it with: osctl launch{f' {target}' if target else ''}")
    asking = [name for name in done if evaluations.digest_of(workspace.pipeline.stage(name).config) is not None]
    return asking or done[-1:]  # the one that asks nothing says how to ask


def _of_stage(workspace: Workspace, name: str, *, quiet: bool) -> dict[str, Any]:
    from orchestrator.pipelines.evaluating import evaluate as evaluate_stage
    from orchestrator.recipe.prices import cost

    stage = workspace.pipeline.stage(name)
    committed = next(one.committed for one in snapshot(workspace, quiet=True).stages if one.name == name)
    assert committed is not None
    found = evaluate_stage(workspace, stage, committed, (lambda text: None) if quiet else output.note)
    for warning in found.warnings:
        output.note(f"warning: {name}: {warning}")
    usd = cost(Decimal(repr(found.device_s)), found.price.usd_per_hour) if found.price is not None else None
    content = found.model_dump(mode="json", by_alias=True, exclude={"schema_"})
    return {"name": name, **content, "usd": usd}


def _of_folder(folder: Path, out: Path | None, output_: output.Format) -> None:
    from orchestrator.pipelines.evaluating import of_folder
    from orchestrator.pipelines.host import Host

    with tempfile.TemporaryDirectory(prefix="osctl-eval-") as here:
        result = of_folder(folder, out or Path(here), Host.here().for_children())
    row = {"name": str(folder), **result, "device_s": result["cpu_s"], "usd": None}
    output.emit([row] if output_ is not output.Format.table else [_cells(row)], output_, COLUMNS)


def _cells(row: dict[str, Any]) -> dict[str, Any]:
    from orchestrator.cli.display import interval, loss_interval

    read: dict[str, float] = row["readings"]
    return {
        **row,
        "image": interval(read, "image_digit"),
        "digit": interval(read, "digit"),
        "direction": interval(read, "direction"),
        "both": interval(read, "both"),
        "frozen": interval(read, "frozen_direction"),
        "held_out": loss_interval(read, "held_out_loss"),
        "gain": loss_interval(read, "held_out_gain"),
        "device_s": f"{row['device_s']:.1f}",
        "usd": output.dollars(row["usd"]) if row["usd"] is not None else None,
    }
