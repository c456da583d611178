"""Whether decoders keep models busy on Ray: rows stream from actors that "decode" to one actor that "captions", both sleeping a set time.

Since they sleep, two cores carry many of them. What is counted is the share of the time that the model worked, over whole batches, from
when it has answered a fifth of the rows until shortly before the last: latency x rows / seconds, and, with what guard and sleep take on
top, what its actor says. `supply` is how many times as many rows decoders make as the model takes: decoders x latency / time to decode; 1
where the two are level.

    OMP_NUM_THREADS=1 .venv/bin/python bench/ray_streaming.py

Ray, its driver and the engine need CPU themselves (raw: cpu_s_a_row). On a machine with much else to do they get less, and the model waits
for that.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import harness
from harness import Measured, Row

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
import chain_rows
import psutil

from opensora.dataset.prepare_config import PrepareConfig
from opensora.prepare.ray import opened
from opensora.prepare.ray.pool import RayPool
from opensora.prepare.steps import Steps

BATCH, DECODERS = 8, 6
CONFIG = {"name": "bench", "sources": [{"path": "none"}], "caption": {"kind": "llava", "path": "none", "batch": BATCH}}
FLOOR, ENOUGH = 90.0, 2.0


def cpu_s() -> float:
    """Of this process and of all below it, with those that have ended."""
    total, here = 0.0, psutil.Process()
    for process in (here, *here.children(recursive=True)):
        try:
            times = process.cpu_times()
        except psutil.NoSuchProcess:
            continue
        total += times.user + times.system + times.children_user + times.children_system
    return total


def busy(chain: RayPool, decode_s: float, latency_s: float, rows: int) -> dict[str, Any]:
    """Shares of the time that the model worked."""
    films = [chain_rows.Film(number, decode_s=decode_s, caption_s=latency_s) for number in range(rows)]
    ends = rows // 5, rows - 2 * BATCH
    marks: list[tuple[float, float, float]] = []
    sizes: list[int] = []
    for _, (_, seen) in chain.chained(chain_rows.decoded, chain_rows.captioned, films, lambda _: 600.0, 600.0):
        marks.append((time.monotonic(), chain.busy_s["captioned"], cpu_s() if len(marks) in ends else 0.0))
        sizes.append(seen.together)
    warm, end = (_batch_end(marks, place) for place in ends)
    cpu = (marks[ends[1]][2] - marks[ends[0]][2]) / (ends[1] - ends[0])
    done, seconds = end - warm, marks[end][0] - marks[warm][0]
    found = {
        "decoders": DECODERS, "decode_s": decode_s, "latency_s": latency_s, "rows": done, "seconds": seconds,
        "supply": DECODERS * latency_s / decode_s, "busy": done * latency_s / seconds,
        "busy_of_actor": (marks[end][1] - marks[warm][1]) / seconds, "cpu_s_a_row": cpu,
        "rows_a_batch": sum(sizes) / len(sizes), "load": os.getloadavg()[0],
    }  # fmt: skip
    print(found, file=sys.stderr)
    return found


def _batch_end(marks: list[tuple[float, float, float]], place: int) -> int:
    """The last row of a batch, so that whole batches are counted: the one before the longest pause among the next rows."""
    return max(range(place, place + BATCH), key=lambda later: marks[later + 1][0] - marks[later][0])


def measure(quick: bool) -> Measured:
    cases = [(0.1, 0.05, 100)] if quick else [(1.0, 0.5, 120), (2.0, 0.5, 120), (6.0, 0.5, 60), (0.1, 0.05, 400)]
    config = PrepareConfig.model_validate(CONFIG)
    steps = Steps(preload=("chain_rows",))
    with tempfile.TemporaryDirectory() as folder, opened.pool(config, Path(folder), steps, DECODERS, lambda: False) as pool:
        raw = [busy(pool, *case) for case in cases]
    found = [
        Row(
            f"a model of {1e3 * one['latency_s']:g} ms a row, supply {one['supply']:.2g}: busy", 100 * one["busy"], "%",
            floor=FLOOR if one["supply"] >= ENOUGH and not quick else None,
        )
        for one in raw
    ]  # fmt: skip
    return found, {"cases": raw, "batch": BATCH, "libraries": harness.libraries("ray", "pyarrow")}


if __name__ == "__main__":
    harness.run("ray_streaming", measure)
