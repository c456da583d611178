"""`osctl`. A command parses what was typed, calls `orchestrator.pipelines`, and prints what that returns.

Importing this package costs nothing: the commands (`orchestrator.cli.commands`) are imported once Ctrl-C is one line and an exit code.
"""

from __future__ import annotations

from orchestrator import modules

modules.settle()  # before anything is imported that the working folder could have, too


def main() -> None:
    """Run a command; whatever happens is one line and a stable exit code."""
    from orchestrator.cli import process

    process.end_at_once()

    import atexit
    import gc

    from orchestrator.cli.commands import app

    # Imports make half a million objects that stay. Looking for garbage among them, again and again and once more at the end, costs
    # 0.15 CPU-s of the 0.6 of a launch (measured).
    gc.set_threshold(50_000)
    atexit.register(gc.freeze)
    process.run(app)
