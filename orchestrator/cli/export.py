"""`osctl export`: a committed and verified checkpoint as a folder for other tools."""

from __future__ import annotations

import enum
import subprocess
from pathlib import Path
from typing import Annotated

import typer

from orchestrator import modules
from orchestrator.cli import options, output
from orchestrator.cli.sample import newest
from orchestrator.cli.subject import launched
from orchestrator.pipelines.checkpoints_here import fetched


class Format(enum.StrEnum):
    diffusers = "diffusers"


class Weights(enum.StrEnum):
    ema = "ema"
    model = "model"


class Dtype(enum.StrEnum):
    fp32 = "fp32"
    bf16 = "bf16"


def export(
    out: Annotated[Path, typer.Argument(metavar="DIR", help="The folder to make. One that exists is never written to.")],
    format_: Annotated[
        Format, typer.Option("--format", help="diffusers: opens with DiffusionPipeline.from_pretrained(DIR, trust_remote_code=True).")
    ] = Format.diffusers,
    stage: Annotated[
        str | None, typer.Option("--stage", help="Stage that is exported; default: the last committed.", autocompletion=options.stage_names)
    ] = None,
    weights: Annotated[Weights, typer.Option("--weights", help="The moving average, or the weights of the last step.")] = Weights.ema,
    dtype: Annotated[Dtype, typer.Option("--dtype", help="Type of the transformer's weights in the folder.")] = Dtype.fp32,
    file: options.File = None,
    store: options.Store = None,
) -> None:
    """Write a committed stage as a folder that a stock diffusers opens, without osctl.

    Example: osctl export --format diffusers my-model
    """
    workspace = launched(None, file, store=store)
    committed = newest(workspace, stage, to="export")
    folder, host = fetched(workspace, committed)
    command = modules.command("opensora.export", str(folder), str(out), "--weights", weights, "--dtype", dtype)
    code = subprocess.run(command, check=False, env=host.for_children()).returncode
    if code:
        raise SystemExit(code)
    output.note(f"wrote {out} for {format_} from {committed.run_key}, step {committed.step}")
