"""`osctl`. A command parses, calls one library function, prints its result.

Importing this package costs typer alone: everything else is imported by the command that needs it, so that `--help` answers at once
(tests/orchestrator/cli/test_startup.py holds the list of what may not be imported, bench/cli.py the time).
"""

from __future__ import annotations

import atexit
import gc
import sys
from typing import Annotated

import typer

from orchestrator.cli import account, data, doctor, drive, encode, export, logs, look, output, recipe, render, run, sample, weights

app = typer.Typer(
    name="osctl",
    no_args_is_help=True,
    rich_markup_mode=None,  # typer's rich help costs 0.06 CPU-s more at each start
    pretty_exceptions_enable=False,
    help="From raw videos to a text-to-video model: stages, their verified chain, and the bill.\n\n"
    "Start with: osctl launch. Exit codes: 0 done, 1 expected failure, 2 usage, 3 the run failed, 4 refused, "
    "5 store or cluster unreachable, 130 interrupted.",
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
    (look.watch, "watch"),
    (look.status, "status"),
    (logs.logs, "logs"),
    (logs.events, "events"),
    (run.cancel, "cancel"),
    (run.resume, "resume"),
    (doctor.doctor, "doctor"),
    (look.list_, "list"),
    (account.compare, "compare"),
    (account.cost, "cost"),
    (account.lineage, "lineage"),
    (account.sync, "sync"),
    (sample.sample, "sample"),
    (export.export, "export"),
    (encode.encode, "encode"),
    (account.mlflow, "mlflow"),
    (recipe.explain, "explain"),
):
    app.command(name)(command)
app.add_typer(data.app, name="data")
app.add_typer(weights.app, name="weights")
app.command("drive", hidden=True)(drive.drive)


def main() -> None:
    """Run a command; print an expected error as one line and end with its stable code."""
    from orchestrator.errors import OsctlError

    # Imports make half a million objects that stay. Looking for garbage among them, again and again and once more at the end, costs
    # 0.15 CPU-s of the 0.6 of a launch (measured).
    gc.set_threshold(50_000)
    atexit.register(gc.freeze)
    try:
        app()
    except OsctlError as error:
        output.error(str(error))
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # `osctl logs | head`: the reader has seen enough
        sys.stderr.close()
        sys.exit(0)
