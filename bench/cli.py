"""How long `osctl --help` takes, in CPU-seconds of the whole process, beside an empty typer program and a bare interpreter.

Interleaved, minimum of N. Floor 0.25 CPU-s, goal 0.15.

    .venv/bin/python bench/cli.py
"""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

import harness
from harness import Measured, Row

ROUNDS = 15
EMPTY = "import typer\napp = typer.Typer(rich_markup_mode=None)\n@app.command()\ndef main() -> None: ...\napp(['--help'])"
COMMANDS = {
    "python -c pass": [sys.executable, "-c", "pass"],
    "one-command typer": [sys.executable, "-c", EMPTY],
    "osctl --help": [str(Path(sys.executable).parent / "osctl"), "--help"],
    "osctl launch --help": [str(Path(sys.executable).parent / "osctl"), "launch", "--help"],
}


def cpu_seconds(command: list[str]) -> float:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, stdout=subprocess.DEVNULL, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def measure(quick: bool) -> Measured:
    best = dict.fromkeys(COMMANDS, float("inf"))
    for _ in range(1 if quick else ROUNDS):
        for name, command in COMMANDS.items():
            best[name] = min(best[name], cpu_seconds(command))
    rows = [Row("`osctl --help`, the whole process", best["osctl --help"], "CPU-s", 0.25, 0.15, "less")]
    return rows, {"cpu_seconds": best, "of_an_empty_typer_program": {name: took / best["one-command typer"] for name, took in best.items()}}


def main() -> None:
    harness.run("cli", measure)


if __name__ == "__main__":
    main()
