"""`osctl sample`: a video from a prompt, out of a committed and verified checkpoint."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from orchestrator.cli import options, output
from orchestrator.cli.look import launched, stage_names, take
from orchestrator.cli.workspace import Workspace, home

if TYPE_CHECKING:
    from orchestrator.records import Committed


def sample(
    prompt: Annotated[str, typer.Argument(help='What to draw, e.g. "a digit 3 moving left".')],
    out: Annotated[
        Path, typer.Option("--out", metavar="FILE", help="Where the clip goes: .mp4, or .png for a sheet of its frames.")
    ] = Path("sample.mp4"),
    stage: Annotated[
        str | None, typer.Option("--stage", help="Stage whose weights draw; default: the last committed.", autocompletion=stage_names)
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the noise: the same seed draws the same clip.")] = 0,
    steps: Annotated[int | None, typer.Option(min=1, help="Sampling steps; default: the stage's.")] = None,
    guidance: Annotated[float | None, typer.Option(min=0, help="Guidance scale; default: the stage's.")] = None,
    file: options.File = None,
    store: options.Store = None,
) -> None:
    """Draw a video from a prompt with a committed stage.

    Example: osctl sample "a digit 3 moving left" --out three.mp4
    """
    workspace = launched(Workspace.at(file, store=store))
    committed = newest(workspace, stage, to="sample")
    folder = fetched(workspace, committed)
    command = [sys.executable, "-m", "opensora.sample", str(folder), f"--prompt={prompt}", f"--out={out}", "--seed", str(seed)]
    command += ["--steps", str(steps)] if steps is not None else []
    command += ["--guidance", str(guidance)] if guidance is not None else []
    code = subprocess.run(command, check=False).returncode
    if code:
        raise SystemExit(code)
    output.note(f"drew {out} with {committed.run_key}, step {committed.step}")


def newest(workspace: Workspace, stage: str | None, *, to: str) -> Committed:
    """What the stage committed, or the last stage that did. Raises Refused, for a command of the name `to`."""
    from orchestrator.errors import Refused

    found = [status.committed for status in take(workspace).stages if status.committed and stage in (None, status.name)]
    if not found:
        fact = f"{to} {stage or workspace.pipeline.name}: nothing is committed to {to}"
        raise Refused(f"{fact}. Make it with: osctl launch{f' {stage}' if stage else ''}")
    return found[-1]


def fetched(workspace: Workspace, committed: Committed) -> Path:
    """Folder of a committed checkpoint. Its name is the manifest's digest: what lies there was verified once when it came, file by file."""
    workspace.lend_imports_of(committed)
    folder = home() / "cache" / committed.manifest_digest
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        workspace.ledger.fetch(committed.manifest, committed.manifest_digest, folder)
    return folder
