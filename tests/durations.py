"""How long each test took: `pytest --durations-to FILE` writes it, scripts/durations-table.py makes tables of it.

Seconds of a shared machine say little: CPU-seconds stand beside them. They are the worker's own and those of the processes that it has
waited for; a server that outlives its test counts where it ends.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gang
import pytest

_cpu_before = pytest.StashKey[float]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--durations-to", type=Path, metavar="FILE", help="write seconds and CPU-seconds of each test to this file, as JSON")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_cpu_before] = _cpu_s()
    if config.getoption("--durations-to") and not hasattr(config, "workerinput"):  # an xdist worker does not hear of every test
        config.pluginmanager.register(_Recorder(config.getoption("--durations-to")))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    """Each report (of a set-up, a call, a tear-down) carries the CPU-seconds since the one before it."""
    report: Any = yield
    now = _cpu_s()
    report.cpu_s, item.config.stash[_cpu_before] = now - item.config.stash[_cpu_before], now
    return report


class _Recorder:
    def __init__(self, path: Path) -> None:
        self.path = path
        self.began = time.time()
        self.tests: dict[str, dict[str, float]] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        test = self.tests.setdefault(report.nodeid, {"setup": 0.0, "call": 0.0, "teardown": 0.0, "cpu": 0.0})
        test[str(report.when)] += round(report.duration, 3)
        test["cpu"] = round(test["cpu"] + getattr(report, "cpu_s", 0.0), 3)

    def pytest_sessionfinish(self) -> None:
        machine = {"date": time.strftime("%Y-%m-%d", time.gmtime(self.began)), "cpus": os.cpu_count(), "cpu": _model()}
        content = machine | {"wall_s": round(time.time() - self.began, 1), "tests": self.tests}
        self.path.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n")


def _cpu_s() -> float:
    """Of this process, of its children that have been waited for, and of ranks that were forked elsewhere."""
    return sum(os.times()[:4]) + sum(gang.used)


def _model() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")
