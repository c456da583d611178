"""`osctl sample`: videos from prompts, out of a committed and verified checkpoint, or of a folder with a model."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from orchestrator import modules
from orchestrator.cli import options, output
from orchestrator.cli.subject import launched, snapshot
from orchestrator.errors import UsageError
from orchestrator.pipelines.checkpoints_here import fetched

if TYPE_CHECKING:
    from orchestrator.ledger.checkpoints import Published
    from orchestrator.ledger.records import Committed
    from orchestrator.pipelines.workspace import Workspace


def sample(
    prompt: Annotated[str | None, typer.Argument(help='What to draw, e.g. "a digit 3 moving left".')] = None,
    prompts: Annotated[
        Path | None, typer.Option("--prompts", metavar="FILE", help="Text file with a prompt on each line; prompt i has seed + i.")
    ] = None,
    out: Annotated[
        str,
        typer.Option(
            "--out", metavar="FILE|DIR", help="Where it goes: .mp4 or .gif, .png for a sheet of frames, or a folder for an .mp4 a prompt."
        ),
    ] = "sample.mp4",
    stage: Annotated[
        str | None,
        typer.Option("--stage", help="Stage whose weights draw; default: the last committed.", autocompletion=options.stage_names),
    ] = None,
    model: Annotated[
        Path | None,
        typer.Option("--model", metavar="DIR", help="A checkpoint folder, or one that osctl export wrote, in place of a stage."),
    ] = None,
    checkpoint: Annotated[
        str | None,
        typer.Option(
            "--checkpoint",
            metavar="STEP",
            help="An earlier checkpoint of the stage, by its step (4000) or as the store names it (step-00004000-a1). "
            "Without --stage: of the last stage that has one.",
            autocompletion=options.checkpoint_names,
        ),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Seed of the noise: the same seed draws the same clip.")] = 0,
    frames: Annotated[int | None, typer.Option(min=1, help="Frames of a clip; default: the stage's.")] = None,
    height: Annotated[int | None, typer.Option(min=1, help="Pixels, together with --width; default: the stage's.")] = None,
    width: Annotated[int | None, typer.Option(min=1, help="Pixels, together with --height; default: the stage's.")] = None,
    fps: Annotated[
        float | None, typer.Option(min=0, help="Frames a second when it is played; default: the rate of the training's clips.")
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, max=1_000_000, help="Sampling steps; default: the stage's.")] = None,
    sampler: Annotated[
        str | None,
        typer.Option(
            "--sampler",
            metavar="METHOD",
            help="iddpm: ancestral, ddim, dpm-solver++, unipc; flow: euler, heun. Default: the stage's.",
            autocompletion=lambda: ["ancestral", "ddim", "dpm-solver++", "unipc", "euler", "heun"],
        ),
    ] = None,
    guidance: Annotated[float | None, typer.Option(min=0, help="Guidance scale, 1: off; default: the stage's.")] = None,
    guidance_interval: Annotated[
        str | None, typer.Option("--guidance-interval", metavar="LOW,HIGH", help="Guide between these times only, 0 clean to 1 noise.")
    ] = None,
    guidance_rescale: Annotated[
        float | None, typer.Option("--guidance-rescale", min=0, max=1, help="Share of the unguided contrast that is given back.")
    ] = None,
    negative: Annotated[str | None, typer.Option("--negative", metavar="TEXT", help="What no clip should show.")] = None,
    first_frame: Annotated[
        Path | None, typer.Option("--first-frame", metavar="IMAGE", help="A picture that each clip begins with.")
    ] = None,
    last_frame: Annotated[Path | None, typer.Option("--last-frame", metavar="IMAGE", help="A picture that each clip ends with.")] = None,
    extend: Annotated[
        Path | None,
        typer.Option("--extend", metavar="VIDEO", help="A video that goes on with what is drawn; its end is the clip's first quarter."),
    ] = None,
    loop: Annotated[
        bool, typer.Option("--loop", help="Lead each clip back to its beginning: up to twice the frames, twice the time.")
    ] = False,
    devices: Annotated[
        int, typer.Option("--devices", min=1, metavar="N", help="GPUs of this machine that share each clip; on a CPU, processes.")
    ] = 1,
    file: options.File = None,
    store: options.Store = None,
) -> None:
    """Draw videos from prompts with a committed stage, or with a model in a folder.

    Each file says what it was drawn from, and so does a .json beside it.

    Example: osctl sample "a digit 3 moving left" --out three.mp4
    """
    if prompt is None and prompts is None:
        raise UsageError('sample: no prompt is given. Say what to draw: osctl sample "a digit 3 moving left", or --prompts FILE')
    for option, named in (("stage", stage), ("checkpoint", checkpoint)):
        if model is not None and named is not None:
            raise UsageError(f"sample: --{option} {named} and --model {model} both name weights. Give one of them")
    wanted = None if checkpoint is None else _step(checkpoint)
    given = {
        "prompt": prompt, "prompts": prompts, "out": out, "seed": seed, "frames": frames, "height": height, "width": width, "fps": fps,
        "steps": steps, "sampler": sampler, "guidance": guidance, "guidance-interval": guidance_interval,
        "guidance-rescale": guidance_rescale, "negative": negative, "first-frame": first_frame, "last-frame": last_frame, "extend": extend,
        "devices": devices,
    }  # fmt: skip
    words = [f"--{name}={value}" for name, value in given.items() if value is not None] + ["--loop"] * loop
    if model is not None:
        _run(model, words, None)
        return
    workspace = launched(None, file, store=store)
    found = newest(workspace, stage, to="sample") if wanted is None else _published(workspace, stage, wanted)
    folder, host = fetched(workspace, found)
    _run(folder, [*words, f"--about={json.dumps(about(found))}"], host.for_children())
    output.note(f"drew {out} with {found.run_key}, step {found.step}")


def _run(folder: Path, words: list[str], env: Any) -> None:
    code = subprocess.run(modules.command("opensora.sample", str(folder), *words), check=False, env=env).returncode
    if code:
        raise SystemExit(code)


def newest(workspace: Workspace, stage: str | None, *, to: str) -> Committed:
    """What the stage committed, or the last stage that did. Raises Refused and UsageError, for a command of the name `to`."""
    from orchestrator.errors import Refused
    from orchestrator.pipelines.find import check_stage

    found = [status.committed for status in snapshot(workspace).stages if status.committed and stage in (None, status.name)]
    if not found:
        check_stage(workspace, stage, to)
        fact = f"{to} {stage or workspace.pipeline.name}: nothing is committed to {to}"
        raise Refused(f"{fact}. Make it with: osctl launch{f' {stage}' if stage else ''}")
    return found[-1]


def _step(named: str) -> tuple[int, int | None]:
    """Step, and attempt if it is named, of `4000`, `step-00004000` or `step-00004000-a1`. Raises UsageError."""
    match = re.fullmatch(r"(?:step-)?(\d{1,18})(?:-a(\d{1,9}))?", named)
    if match is None:
        raise UsageError(f"sample: --checkpoint {named} is no step. Write it as 4000, or as step-00004000-a1")
    return int(match[1]), int(match[2]) if match[2] else None


def _published(workspace: Workspace, stage: str | None, wanted: tuple[int, int | None]) -> Published:
    """The checkpoint of this step, of the newest attempt that published one. Raises Refused and UsageError."""
    from orchestrator.errors import Refused
    from orchestrator.ledger.checkpoints import Published
    from orchestrator.pipelines.find import check_stage

    check_stage(workspace, stage, "sample")
    (step, attempt), name = wanted, stage or workspace.pipeline.name
    for status in reversed(snapshot(workspace).stages):
        if status.inputs_digest is None or stage not in (None, status.name):
            continue
        there = workspace.ledger.checkpoints(status.name, status.inputs_digest)
        if not there:
            continue
        for key, manifest in reversed(there):
            if manifest.step == step and attempt in (None, manifest.attempt):
                return Published.of(key, manifest)
        said = ", ".join(sorted({str(manifest.step) for _, manifest in there}, key=int))
        of = f"step {step}" if attempt is None else f"step {step} of attempt {attempt}"
        raise Refused(f"sample {status.name}: the store has no checkpoint of {of}; it has those of the steps {said}. Name one of them")
    raise Refused(f"sample {name}: no checkpoint is there yet. Train it with: osctl launch{f' {stage}' if stage else ''}")


def about(checkpoint: Committed | Published) -> dict[str, Any]:
    """What a file that it draws says of it."""
    return {
        "model": checkpoint.run_key,
        "step": checkpoint.step,
        "manifest": checkpoint.manifest_digest,
        "weights": checkpoint.weights_digest,
    }
