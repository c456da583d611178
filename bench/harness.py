"""What every bench of the trainer shares: rows with a floor and a goal, ways timed side by side, one JSON object on stdout.

The rule of comparison (equal work, interleaved, CPU-seconds): every way runs once in each round, A B A B, and its time is the smallest
`process_time` of its rounds. On a machine with other work wall time says little; of the CPU-seconds the smallest are those that nobody
disturbed. One thread: set OMP_NUM_THREADS=1 before Python starts, as `scripts/bench` does.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    name: str
    measured: float
    unit: str
    floor: float | None = None
    """Worse than this fails `scripts/bench --check`; none: reported only."""
    goal: float | None = None
    better: Literal["more", "less"] = "more"


Measured = tuple[list[Row], dict[str, Any]]
"""Rows, and the raw numbers that they were made from."""


def interleaved(ways: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """CPU-seconds of each way, smallest of the rounds. A first round, in which kernels and buffers are made, is not counted."""
    best = dict.fromkeys(ways, float("inf"))
    for number in range(rounds + 1):
        for name, work in ways.items():
            began = time.process_time()
            work()
            if number:
                best[name] = min(best[name], time.process_time() - began)
    return best


def machine() -> str:
    """Processor, cores and memory, as the operating system names them."""
    lines = (line.partition(":") for line in Path("/proc/cpuinfo").read_text().splitlines())
    told = {key.strip(): value.strip() for key, _, value in lines if value}
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    family = f" (family {told['cpu family']} model {told['model']})" if "cpu family" in told else ""
    return (
        f"{os.cpu_count()} vCPU {told.get('model name', platform.machine())}{family}, {memory:.0f} GiB, Python {platform.python_version()}"
    )


def libraries(*names: str) -> dict[str, str]:
    """Versions of installed packages."""
    from importlib.metadata import version

    return {name: version(name) for name in names}


def run(bench: str, measure: Callable[[bool], Measured], argv: Sequence[str] | None = None) -> None:
    """A bench's `main`: measure, and print what scripts/bench reads."""
    parser = argparse.ArgumentParser(prog=f"bench/{bench}.py")
    parser.add_argument("--quick", action="store_true", help="smallest sizes: whether it runs, not how fast")
    quick = parser.parse_args(argv).quick
    load, began = os.getloadavg()[0], time.time()
    rows, raw = measure(quick)
    about = {
        "machine": machine(),
        "date": datetime.date.today().isoformat(),
        "load": [round(load, 2), round(os.getloadavg()[0], 2)],
        "seconds": round(time.time() - began, 1),
    }
    print(json.dumps({"bench": bench, "quick": quick, "rows": [asdict(row) for row in rows], "raw": raw, "about": about}))
