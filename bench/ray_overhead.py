"""What an engine costs a row, and how busy it keeps a model that takes its time.

Overhead: rows of no work through two guards inline, and through two actors of Ray Data on this machine, each with a guard; their results
come back to this process. Counted are CPU-seconds of all processes (this one, the fork servers and guards; of Ray also raylet, gcs, agents,
workers and the process that drives it), from the first answer to the last, since other work on the machine changes them least. 400,000 rows
are extrapolated from these, and the rows say so. Wall time a row is reported without a floor.

Busy: rows that hold an actor for a set time, as a captioner does a GPU; their share of actors x the time from the first answer to the last.

    OMP_NUM_THREADS=1 .venv/bin/python bench/ray_overhead.py
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import harness
import psutil
from harness import Measured, Row

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
import guard_rows

from opensora.dataset.prepare_config import PrepareConfig
from opensora.prepare.guard import Guards
from opensora.prepare.pool import Pool
from opensora.prepare.ray import opened
from opensora.prepare.steps import Steps

CONFIG = PrepareConfig.model_validate({"name": "bench", "sources": [{"path": "none"}], "caption": {"kind": "text"}})
ACTORS, MANY = 2, 400_000


def cpu_s() -> float:
    """Of this process and of all below it, with those that have ended (guards are renewed)."""
    total, here = 0.0, psutil.Process()
    for process in (here, *here.children(recursive=True)):
        try:
            times = process.cpu_times()
        except psutil.NoSuchProcess:
            continue
        total += times.user + times.system + times.children_user + times.children_system
    return total


def timed(pool: Pool, function: Any, rows: list[Any]) -> tuple[float, float]:
    """CPU-seconds and seconds a row, of all rows but those with which everything starts."""
    warm = len([*pool.map(function, rows[: 4 * ACTORS], 600.0)])
    cpu, began = cpu_s(), time.perf_counter()
    done = sum(1 for _ in pool.map(function, rows[warm:], 600.0))
    if done != len(rows) - warm:
        raise SystemExit(f"{done} of {len(rows) - warm} rows came back")
    return (cpu_s() - cpu) / done, (time.perf_counter() - began) / done


def on_ray(folder: Path) -> Iterator[Pool]:
    with opened.pool(CONFIG, folder, Steps(preload=("guard_rows",)), ACTORS, lambda: False) as pool:
        yield pool


def measure(quick: bool) -> Measured:
    rows, latency_s, model_rows = (200, 0.2, 20) if quick else (20_000, 3.0, 60)
    with Guards(ACTORS, CONFIG.limits, preload=("guard_rows",)) as guards:
        inline_cpu, inline_s = timed(guards, guard_rows.same, list(range(rows)))
    with tempfile.TemporaryDirectory() as name:
        for pool in on_ray(Path(name)):
            ray_cpu, ray_s = timed(pool, guard_rows.same, list(range(rows)))
            _, model_s = timed(pool, guard_rows.takes_its_time, [latency_s] * (model_rows + 4 * ACTORS))
    busy = latency_s / (ACTORS * model_s)
    found = [
        Row("inline: CPU a row", 1e3 * inline_cpu, "ms", better="less"),
        Row("inline: wall a row", 1e3 * inline_s, "ms", better="less"),
        Row("Ray Data here: CPU a row", 1e3 * ray_cpu, "ms", better="less"),
        Row("Ray Data here: wall a row", 1e3 * ray_s, "ms", better="less"),
        Row(f"inline: {MANY:,} rows, extrapolated from {rows:,}", MANY * inline_cpu / 3600, "CPU-h", better="less"),
        Row(f"Ray Data here: {MANY:,} rows, extrapolated from {rows:,}", MANY * ray_cpu / 3600, "CPU-h", better="less"),
        Row(f"a model of {latency_s:g} s a row, {ACTORS} actors: busy", 100 * busy, "%", floor=None if quick else 90.0),
    ]
    raw = {"rows": rows, "inline_cpu_s": inline_cpu, "inline_s": inline_s, "ray_cpu_s": ray_cpu, "ray_s": ray_s, "model_s": model_s}
    return found, raw | {"libraries": harness.libraries("ray", "pyarrow")}


if __name__ == "__main__":
    harness.run("ray_overhead", measure)
