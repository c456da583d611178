"""Commands that make something happen: launch, resume, cancel."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Annotated, Any

import typer

from orchestrator.cli import options, output
from orchestrator.cli.look import launched, stage_names, take
from orchestrator.cli.workspace import Workspace, home

PROJECTION_WAIT_S = 60.0
"""How long a finished launch waits for MLflow to show its last words. MLflow's first start on a small machine takes 20 s."""


def launch(
    stage: Annotated[
        str | None, typer.Argument(help="One stage; its parent comes out of the ledger. Default: all.", autocompletion=stage_names)
    ] = None,
    file: options.File = None,
    data: options.Data = None,
    settings: options.Set = None,
    store: options.Store = None,
    tracking: options.Tracking = None,
    backend: Annotated[str | None, typer.Option(metavar="local|kubernetes", help="Where attempts run.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would run and cost, and stop.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
    output_: options.Output = output.Format.table,
) -> None:
    """Train the stages, each from the verified checkpoint before it.

    Repeating it does nothing twice.
    Ctrl-C once saves and stops (exit 130); twice ends at once. Launching again goes on.

    Examples: osctl launch          osctl launch stage2 --set stage2.steps=500          osctl launch --data ~/clips
    """
    settings = [*(settings or []), *([f"backend={backend}"] if backend else [])]
    workspace = Workspace.open(file, settings=settings, store=store, tracking=tracking, data=data)
    drive(workspace, stage, dry_run=dry_run, quiet=quiet, output_=output_)


def resume(
    file: options.File = None,
    store: options.Store = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q")] = False,
    output_: options.Output = output.Format.table,
) -> None:
    """Go on with what was launched last, exactly as it was then.

    Example: osctl resume
    """
    from orchestrator.errors import Refused

    workspace = Workspace.open(file, store=store)
    if workspace.ledger.latest_revision() is None:
        raise Refused(f"resume {workspace.pipeline.name}: was never launched in {workspace.store_url}. Run: osctl launch")
    drive(launched(workspace), None, dry_run=False, quiet=quiet, output_=output_)


def cancel(file: options.File = None, store: options.Store = None) -> None:
    """Ask the running launch to save and stop. It can be taken up again with osctl resume.

    Example: osctl cancel -f demo
    """
    workspace = Workspace.open(file, store=store)
    now = time.time()
    holder = workspace.ledger.holder(now)
    if holder is None or not workspace.ledger.ask_cancel(now, detail=f"by {os.environ.get('USER', 'somebody')}"):
        output.note(f"{workspace.pipeline.name}: nobody drives it, nothing to cancel")
        return
    output.note(f"{workspace.pipeline.name}: asked {holder.holder} to save and stop. Follow it with: osctl watch")


def drive(workspace: Workspace, target: str | None, *, dry_run: bool, quiet: bool, output_: output.Format) -> None:
    """Plan, refuse or run; then say what came out. Ends the process with the run's exit code."""
    from orchestrator.cli import display
    from orchestrator.cli.recipe import ledger_of, plan_of, show_plan
    from orchestrator.errors import Refused, UsageError
    from orchestrator.plan import check_budget

    pipeline = workspace.pipeline
    if target is not None and target not in {stage.name for stage in pipeline.stages}:
        raise UsageError(f"launch {target}: {pipeline.name} has no such stage; it has {', '.join(stage.name for stage in pipeline.stages)}")
    if pipeline.backend != "local" and not dry_run:
        fact = f"launch {pipeline.name}: backend {pipeline.backend} is not in this version, local is"
        raise Refused(f"{fact}. See what it would cost with: osctl plan -f {pipeline.name}")
    estimate = plan_of(workspace, committed=ledger_of(workspace), target=target)
    if dry_run:
        show_plan(estimate, output_)
        return
    check_budget(estimate, pipeline.budget_usd)
    from orchestrator.adapters.local import LocalBackend
    from orchestrator.runner import Runner

    workspace.store.probe()
    runner = Runner(pipeline, workspace.ledger, LocalBackend(workspace.store_url, home()))
    following = contextlib.nullcontext() if quiet else display.Follower(workspace, workspace.prices)
    # With nothing left to train there is nothing new to show, and MLflow's start of several seconds is saved.
    tracking = any(row.basis != "committed" for row in estimate.rows)
    with on_interrupt(runner), projecting(workspace) if tracking else contextlib.nullcontext(), following:
        result = runner.run([target] if target else None)
    current = take(workspace)
    lines = display.comparison(current)
    if output_ is output.Format.table:
        output.table(*display.comparison_cells(lines))
    else:
        output.emit(lines, output_)
    farewell(workspace, current, result)
    if result.exit_code:
        raise SystemExit(result.exit_code)


@contextlib.contextmanager
def on_interrupt(runner: Any) -> Iterator[None]:
    """SIGINT or SIGTERM once: save and stop. Twice: end now."""
    asked = 0

    def handle(signum: int, _frame: object) -> None:
        nonlocal asked
        asked += 1
        if asked == 1:
            output.note("\nsaving, then stopping; once more to end at once without saving")
            runner.drain()
        else:
            runner.kill()

    previous = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def projecting(workspace: Workspace) -> Iterator[None]:
    """Keep MLflow up to the ledger in a process beside the launch. Nothing waits for it but the end, and that not for long."""
    tracking = workspace.pipeline.tracking
    if tracking == "none":
        yield
        return
    (home() / "log").mkdir(parents=True, exist_ok=True)
    with open(home() / "log" / "projection.log", "ab") as log:  # noqa: PTH123 - a plain descriptor for the child
        follower = subprocess.Popen(
            [sys.executable, "-m", "orchestrator.projection", "--store", workspace.store_url, "--pipeline", workspace.pipeline.name,
             "--tracking", tracking, "--follow-pid", str(os.getpid())],
            stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip
    try:
        yield
    finally:
        follower.terminate()  # it looks once more, shows what is new, and leaves
        try:
            code: int | None = follower.wait(PROJECTION_WAIT_S)
        except subprocess.TimeoutExpired:
            follower.kill()
            code = follower.wait()
        if code != 0:
            output.note(f"MLflow ({tracking}) is behind the ledger. Bring it up to date with: osctl sync")


def farewell(workspace: Workspace, current: Any, result: Any) -> None:
    """What came out, where it lies, and what one would type next."""
    name = workspace.pipeline.name
    if result.exit_code:
        output.note(f"{name}: {result.status}: {result.reason}")
        output.note("next: osctl logs, osctl status, then osctl launch to go on")
        return
    for path in pictures(workspace, current):
        output.note(f"drew {path}")
    output.note(f"{name}: {result.status}, {output.dollars(current.usd)} (prices: osctl cost)")
    output.note(
        'next: osctl compare | osctl cost | osctl lineage --verify | osctl mlflow | osctl sample "a digit 3 moving left" --out three.mp4'
    )


def pictures(workspace: Workspace, current: Any) -> list[str]:
    """Bring the clips and sheets of the last committed stage out of the store, for people to open."""
    done = [stage for stage in current.stages if stage.committed]
    if not done:
        return []
    last = done[-1]
    folder = home() / "samples" / workspace.pipeline.name / last.name
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for key in workspace.ledger.samples(last.name, last.committed.inputs, last.committed.attempt):
        path = folder / key.rsplit("/", 1)[-1]
        path.unlink(missing_ok=True)
        workspace.store.download(key, path)
        paths.append(os.path.relpath(path))
    sheets = [path for path in paths if path.endswith(".png")]
    clips = [path for path in paths if path.endswith(".mp4")]
    return sheets + clips[:1] if len(clips) <= 1 else [*sheets, f"{clips[0]} and {len(clips) - 1} more clips beside it"]
