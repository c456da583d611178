"""`osctl encode`: a stage's clips through its encoders, once and ahead of its training, on this machine."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from orchestrator import modules
from orchestrator.cli import options, output
from orchestrator.cli.subject import opened, snapshot
from orchestrator.pipelines.checkpoints_here import fetched

if TYPE_CHECKING:
    from orchestrator.pipelines.host import Host
    from orchestrator.pipelines.workspace import Workspace
    from orchestrator.recipe.pipeline import Stage


def encode(
    stage: Annotated[str | None, typer.Argument(help="Which one; default: all.", autocompletion=options.stage_names)] = None,
    into: Annotated[
        Path | None,
        typer.Option(
            "--into", metavar="FOLDER", help="Where encoded clips go. Default: OSCTL_LATENTS, else .osctl/latents, where launch looks."
        ),
    ] = None,
    file: options.File = None,
    settings: options.Set = None,
    store: options.Store = None,
    data: options.Data = None,
    output_: options.Output = output.Format.table,
) -> None:
    """Encode clips and captions ahead of the training, so that no device waits for it. What is encoded already is left alone.

    Embedded encoders of a later stage are its parent's: it is encoded once the parent is committed.

    Examples: osctl encode          osctl encode stage2 -f open-sora-1.0 --data clips
    """
    from orchestrator.errors import Refused
    from orchestrator.pipelines.find import check_stage
    from orchestrator.pipelines.preparing import on_known

    workspace = opened(file, settings=settings, store=store, data=data)
    check_stage(workspace, stage, "encode")
    workspace = on_known(workspace)
    workspace = workspace.with_contents(needed=False, say=lambda _: None)  # what cannot be had, the encoder itself says
    host = workspace.told_of_imports()
    cache, rows = into or host.latents, []
    for each in workspace.pipeline.stages:
        if stage not in (None, each.name):
            continue
        waits, parent, host = _parent(workspace, host, each)
        if waits and stage is not None:
            raise Refused(f"encode {stage}: its encoders are those of {waits}, which is not committed. Make it with: osctl launch {waits}")
        rows.append({"name": each.name, "state": f"waits for {waits}"} if waits else _encode(workspace, host, each, cache, parent))
    columns = {
        "name": "stage",
        "state": "state",
        "clips": "clips",
        "skipped": "left out",
        "size": "size",
        "took": "took",
        "folder": "folder",
    }
    output.emit(rows if output_ is not output.Format.table else [_cells(row) for row in rows], output_, columns)


def _parent(workspace: Workspace, host: Host, stage: Stage) -> tuple[str | None, Path | None, Host]:
    """(the stage that has to be committed first, the checkpoint whose embedded encoders this one takes over, this machine with them)."""
    embedded = stage.config.autoencoder.kind == "patch" or stage.config.text.kind == "words"
    if stage.spec.parent is None or not embedded:
        return None, None, host
    committed = {status.name: status.committed for status in snapshot(workspace).stages}[stage.spec.parent]
    return (stage.spec.parent, None, host) if committed is None else (None, *fetched(workspace, committed))


def _encode(workspace: Workspace, host: Host, stage: Stage, cache: Path, parent: Path | None) -> dict[str, Any]:
    command = modules.command("opensora.encode", "-", str(cache), "--name", stage.name)
    command += ["--parent", str(parent)] if parent is not None else []
    data = workspace.recorded_data(stage.name)
    command += ["--data", str(data)] if data is not None else []
    content = json.dumps(stage.config.model_dump(mode="json"))  # JSON is YAML; by a pipe, since a file would outlive a killed command
    variables = modules.reading_clips(host.for_children())
    done = subprocess.run(command, check=False, input=content, stdout=subprocess.PIPE, text=True, env=variables)
    if done.returncode:
        raise SystemExit(done.returncode)
    result = json.loads(done.stdout)
    state = "encoded" if result["built"] else "there already"
    for remark in result["remarks"]:
        output.note(f"{stage.name}: {remark.replace('STAGE.data.', f'{stage.name}.data.')}")  # the child knows no name
    kept = ("clips", "skipped", "remarks", "bytes", "seconds", "directory")
    return {"name": stage.name, "state": state, **{key: result[key] for key in kept}}


def _cells(row: dict[str, Any]) -> dict[str, Any]:
    if "bytes" not in row:
        return row
    return row | {"size": f"{row['bytes'] / 2**20:,.1f} MiB", "took": output.duration(row["seconds"]), "folder": row["directory"]}
