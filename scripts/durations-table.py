"""Tables of what the tests take, from what `scripts/test --durations-to FILE` has written: seconds by file, and the 40 slowest tests.

    .venv/bin/python scripts/durations-table.py FILE... > TABLE.md

`BEFORE=AFTER` in the place of a FILE shows both.
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

SLOWEST = 40
Row = tuple[float, float, int]
"""Seconds, CPU-seconds, number of tests."""


def read(paths: list[str]) -> tuple[dict[str, dict[str, float]], list[str]]:
    """Tests by name, and a line on each file: when and where it was written."""
    tests: dict[str, dict[str, float]] = {}
    about = []
    for path in filter(None, paths):
        content: dict[str, Any] = json.loads(Path(path).read_text())
        tests |= content["tests"]
        about.append(
            f"{content['date']}, {content['cpus']} vCPU {content['cpu']}: {len(content['tests'])} tests in {content['wall_s']:,.0f} s"
        )
    return tests, about


def seconds(test: dict[str, float]) -> float:
    return test["setup"] + test["call"] + test["teardown"]


def by_file(tests: dict[str, dict[str, float]]) -> dict[str, Row]:
    found: dict[str, Row] = defaultdict(lambda: (0.0, 0.0, 0))
    for name, test in tests.items():
        file = name.partition("::")[0]
        held, cpu, count = found[file]
        found[file] = held + seconds(test), cpu + test["cpu"], count + 1
    return found


def cells(row: Row | None) -> str:
    return f"{row[2]} | {row[0]:,.1f} | {row[1]:,.1f}" if row else "· | · | ·"


def main(arguments: list[str]) -> None:
    before, said_before = read([one.partition("=")[0] for one in arguments if "=" in one])
    after, said_after = read([one.rpartition("=")[2] for one in arguments])
    old, new = by_file(before), by_file(after)
    print(*(f"Before: {line}  " for line in said_before), *(f"After: {line}  " if before else f"{line}  " for line in said_after), sep="\n")
    columns = "tests | s | CPU-s"
    print(f"\n| file | {columns} |" + (f" {columns}, before |" if before else ""))
    print("|---|" + "--:|" * (6 if before else 3))
    for file in sorted(new, key=lambda name: -new[name][0]):
        print(f"| {file} | {cells(new[file])} |" + (f" {cells(old.get(file))} |" if before else ""))
    print("\n| s | CPU-s | test |\n|--:|--:|---|")
    for name in sorted(after, key=lambda name: -seconds(after[name]))[:SLOWEST]:
        print(f"| {seconds(after[name]):,.1f} | {after[name]['cpu']:,.1f} | `{name}` |")


if __name__ == "__main__":
    main(sys.argv[1:])
