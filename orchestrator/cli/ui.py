"""`osctl ui`: a page on which a prompt is drawn by each committed stage, beside what the stage cost."""

from __future__ import annotations

import json
import subprocess
import tempfile
import webbrowser
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from orchestrator import modules
from orchestrator.cli import options, output
from orchestrator.cli.sample import about, newest
from orchestrator.cli.subject import launched, snapshot
from orchestrator.pipelines.checkpoints_here import fetched

if TYPE_CHECKING:
    from orchestrator.accounting.status import StageStatus
    from orchestrator.ledger.records import Committed


def ui(
    pipeline: options.Named = None,
    file: options.File = None,
    store: options.Store = None,
    host: Annotated[str, typer.Option("--host", help="Address to listen on; by default this machine alone sees the page.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.")] = 7860,
    open_: Annotated[bool, typer.Option("--open/--no-open", help="Open a browser where there is one.")] = True,
) -> None:
    """Open a page: a prompt in, a video of each committed stage out, with one seed and each stage's cost. Ctrl-C ends it.

    Needs the extra `ui`: pip install 'osctl[ui]', or scripts/setup --with ui in a checkout.

    Example: osctl ui --no-open --port 7861
    """
    workspace = launched(pipeline, file, store=store)
    current = snapshot(workspace)
    newest(workspace, None, to="ui")  # refuses where nothing is committed
    models, env = [], workspace.host.for_children()
    for stage in current.stages:
        if stage.committed is not None:
            folder, here = fetched(workspace, stage.committed)
            models.append(_model(stage, stage.committed, folder))
            env = here.for_children()
    with tempfile.TemporaryDirectory(prefix="osctl-ui-") as place:
        path = Path(place, "models.json")
        path.write_text(json.dumps(models, ensure_ascii=False), encoding="utf-8")
        words = [str(path), f"--title={workspace.pipeline.name}", f"--host={host}", f"--port={port}"]
        _serve(words, env, open_)


def _model(stage: StageStatus, committed: Committed, folder: Path) -> dict[str, Any]:
    """What `opensora.page` shows of a stage."""
    bill = stage.bill
    hours = f"{bill.gpu_hours:,.2f} GPU-hours" if bill.gpu_hours else f"{bill.device_hours:,.3f} device-hours"
    return {
        "name": stage.name,
        "folder": str(folder),
        "about": f"step {committed.step} · {hours} · {output.dollars(bill.usd)}",
        "facts": about(committed),
    }


def _serve(words: list[str], env: dict[str, str], open_browser: bool) -> None:
    """Run the page until it ends, or Ctrl-C ends both. Raises SystemExit with its exit code."""
    with subprocess.Popen(modules.command("opensora.page", *words), env=env, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            address = process.stdout.readline().strip()
            if address:
                output.note(f"the page is at {address}; Ctrl-C ends it")
                if open_browser:
                    webbrowser.open(address)
            process.wait()
        finally:
            if process.poll() is None:
                process.terminate()
    if process.returncode > 0:
        raise SystemExit(process.returncode)
