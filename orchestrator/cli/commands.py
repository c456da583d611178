"""Every command of `osctl`, under its name.

Importing this costs typer alone: everything else is imported by the command that needs it, so that `--help` answers at once
(tests/orchestrator/cli/test_startup.py holds the list of what may not be imported, bench/cli.py the time).
"""

from __future__ import annotations

from typing import Annotated

import typer

from orchestrator.cli import (
    account,
    approve,
    data,
    doctor,
    drive,
    encode,
    evaluate,
    export,
    logs,
    output,
    prepare,
    recipe,
    render,
    run,
    sample,
    status,
    ui,
    weights,
)
from orchestrator.cli.typed import Command

app = typer.Typer(
    name="osctl",
    no_args_is_help=True,
    rich_markup_mode=None,  # typer's rich help costs 0.06 CPU-s more at each start
    pretty_exceptions_enable=False,
    help="From raw videos to a text-to-video model: stages, their verified chain, and the bill.\n\n"
    "Start with: osctl launch. Exit codes: 0 done, 1 expected failure, 2 usage, 3 the run failed, 4 refused, "
    "5 store or cluster unreachable, 6 a fault of osctl itself, 130 interrupted, 128 + n ended by signal n.",
)


@app.callback(invoke_without_command=True)
def root(version: Annotated[bool, typer.Option("--version", help="Print the version and stop.", is_eager=True)] = False) -> None:
    if version:
        from importlib.metadata import version as installed

        output.raw(f"osctl {installed('osctl')}\n")
        raise typer.Exit


for command, name in (
    (recipe.init, "init"),
    (recipe.plan, "plan"),
    (render.render, "render"),
    (render.diff, "diff"),
    (run.launch, "launch"),
    (status.watch, "watch"),
    (status.status, "status"),
    (logs.logs, "logs"),
    (logs.events, "events"),
    (run.cancel, "cancel"),
    (run.resume, "resume"),
    (approve.approve, "approve"),
    (doctor.doctor, "doctor"),
    (status.list_, "list"),
    (account.compare, "compare"),
    (account.cost, "cost"),
    (account.lineage, "lineage"),
    (account.sync, "sync"),
    (sample.sample, "sample"),
    (evaluate.evaluate, "eval"),
    (ui.ui, "ui"),
    (export.export, "export"),
    (encode.encode, "encode"),
    (account.mlflow, "mlflow"),
    (recipe.explain, "explain"),
):
    app.command(name, cls=Command)(command)
app.add_typer(prepare.app, name="prepare")
app.add_typer(data.app, name="data")
app.add_typer(weights.app, name="weights")
app.command("drive", hidden=True, cls=Command)(drive.drive)
