"""Runs the benches that need no cluster, compares what they measured with their floors, and writes the table. Called by `scripts/bench`.

Each bench is a process of one thread. A reading goes into docs/benchmarks/<date>-trainer.json, raw, with machine and date; a bench that is
run again the same day replaces its own part. The table is made from that file.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "docs" / "benchmarks"
BENCHES = (
    "step",
    "attention",
    "recipe",
    "exchange",
    "save",
    "resume",
    "loader",
    "prepare",
    "loader_store",
    "captions",
    "ray_overhead",
    "cuts",
    "gpu",
    "cli",
    "render",
    "look",
)
"""submit, watch, overhead and shared_cluster need the test cluster; their readings are in docs/benchmarks too."""

Reading = dict[str, Any]
"""What a bench prints: bench, quick, rows, raw, about; `skipped` where it cannot run here."""


def measured(name: str, quick: bool) -> Reading:
    """Run one bench.

    Raises:
        SystemExit: it failed.
    """
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "tests"), "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, str(ROOT / "bench" / f"{name}.py"), *(["--quick"] if quick else [])]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"scripts/bench: {name} failed (exit {done.returncode})\n{done.stderr[-4000:]}")
    reading: Reading = json.loads(done.stdout.splitlines()[-1])
    return reading


def below(readings: Mapping[str, Reading]) -> list[str]:
    """A line for each row that is worse than its floor. Quick readings have no floors."""
    return [
        f"{row['name']}: {shown(row['measured'], row['unit'])}, floor {shown(row['floor'], row['unit'])}"
        for reading in readings.values()
        if not reading["quick"]
        for row in reading["rows"]
        if not reaches(row, row["floor"])
    ]


def reaches(row: Mapping[str, Any], bound: float | None) -> bool:
    if bound is None:
        return True
    better: bool = row["measured"] >= bound if row["better"] == "more" else row["measured"] <= bound
    return better


def shown(number: float | None, unit: str) -> str:
    if number is None:
        return ""
    digits = f"{number:,.0f}" if number >= 100 else f"{number:.3g}" if number < 0.095 or unit == "" else f"{number:.2f}".removesuffix(".00")
    return f"{digits}{unit}" if unit in ("x", "%", "") else f"{digits} {unit}".replace(" /s", "/s")


def table(readings: Mapping[str, Reading]) -> str:
    """Markdown: one line a row, then what was skipped."""
    lines = ["| bench | | measured | floor | goal |", "|---|---|---|---|---|"]
    skipped = []
    for name, reading in readings.items():
        if "skipped" in reading["raw"]:
            skipped.append(f"`{name}`: {reading['raw']['skipped']}")
        for row in reading["rows"]:
            sign = ("≥ " if row["better"] == "more" else "≤ ") if row["floor"] is not None or row["goal"] is not None else ""
            floor, goal = (sign + shown(row[bound], row["unit"]) if row[bound] is not None else "–" for bound in ("floor", "goal"))
            verdict = ""
            if row["goal"] is not None and not reading["quick"]:
                verdict = "" if reaches(row, row["goal"]) else " (not met)"
            miss = "" if reading["quick"] or reaches(row, row["floor"]) else " (missed)"
            lines.append(f"| `{name}` | {row['name']} | {shown(row['measured'], row['unit'])} | {floor}{miss} | {goal}{verdict} |")
    return "\n".join(lines + (["", *skipped] if skipped else [])) + "\n"


def write(readings: Mapping[str, Reading], date: str) -> dict[str, Reading]:
    """Put the readings into the day's file and make the table from it; all of the day's readings."""
    raw = FOLDER / f"{date}-trainer.json"
    known: dict[str, Reading] = json.loads(raw.read_text()) if raw.exists() else {}
    known |= readings
    known = {name: known[name] for name in BENCHES if name in known}
    raw.write_text(json.dumps(known, indent=1) + "\n")
    about = next(iter(known.values()))["about"]
    versions = {name: version for reading in known.values() for name, version in reading["raw"].get("libraries", {}).items()}
    installed = ", ".join(f"{name} {version}" for name, version in versions.items())
    head = (
        f"# Benchmarks of the trainer\n\n{date} · {about['machine']}; {installed}\n\n"
        "`scripts/bench`: one thread, ways interleaved, smallest CPU-seconds of the rounds. What exactly is compared is told at the\n"
        f"head of each script of `bench/`; raw numbers, date and load of the machine at each bench: [{raw.name}]({raw.name}).\n\n"
    )
    (FOLDER / f"{date}-trainer.md").write_text(head + table(known))
    return known


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="scripts/bench", description="Measure, and print floor, goal and measured value.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(BENCHES)}; none: all of them")
    parser.add_argument("--check", action="store_true", help="exit 1 where a floor is missed; writes nothing")
    parser.add_argument(
        "--quick", action="store_true", help="smallest sizes: whether they run; floors are not looked at, nothing is written"
    )
    chosen = parser.parse_args(argv)
    unknown = [name for name in chosen.names if name not in BENCHES]
    if unknown:
        parser.error(f"no bench {', '.join(unknown)}; there are {', '.join(BENCHES)}")
    readings: dict[str, Reading] = {}
    for name in chosen.names or BENCHES:
        began = time.time()
        readings[name] = measured(name, chosen.quick)
        print(f"{name}: {time.time() - began:.0f} s", file=sys.stderr)
    print(table(readings), end="")
    missed = below(readings)
    for line in missed:
        print(f"below its floor: {line}", file=sys.stderr)
    if not chosen.check and not chosen.quick:
        write(readings, datetime.date.today().isoformat())
    return 1 if chosen.check and missed else 0


if __name__ == "__main__":
    sys.exit(main())
