"""How far a preparation is: `status.json` of its run directory, replaced every second.

    {schema, time, running, step, steps: {STEP: {in, kept, dropped, quarantined, rate, eta_s, cpu_s, device, devices, held_s: {KIND: s}}},
     eta_s, engine_cpu_s, tokens_in, tokens_out, usd, workers, digests: {STEP: DIGEST}, alone: {RULE: clips}}

`rate` is rows a second over the last minute, `eta_s` seconds until the rows that are known are done, `cpu_s` CPU-seconds of guards,
`engine_cpu_s` those of the process itself, `held_s` device-seconds of this run by kind of device (`opensora.prepare.devices`). Owns rates
and the file. Refuses to decide anything.
"""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from opensora.prepare.kept import place
from opensora.prepare.reconcile import Tally

EVERY_S = 1.0
RATE_OVER_S = 60


class Status:
    """A context manager: while it is entered, a thread writes the file."""

    def __init__(self, path: Path, temporary: Path, tallies: Mapping[str, Tally], workers: int) -> None:
        self._path, self._temporary, self._tallies, self._workers = path, temporary, tallies, workers
        self._seen: dict[str, deque[tuple[float, int]]] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True, name="status")
        self.step = "download"
        self.cpu_of: Callable[[], Mapping[str, float]] = dict
        """CPU-seconds by step."""
        self.held_of: Callable[[], Mapping[str, Mapping[str, Any]]] = dict
        """By step, what it holds (`opensora.prepare.devices`)."""
        self.digests: Mapping[str, str] = {}
        """By step, under which its results are kept now: for who reads them (`osctl prepare report`)."""
        self.alone: Mapping[str, int] = {}
        """By rule, how many clips it would drop if there were no other."""
        self.tokens_in = self.tokens_out = 0
        self.usd = 0.0

    def __enter__(self) -> Status:
        self.write()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self.write(running=False)

    def content(self, now: float, *, running: bool = True) -> dict[str, Any]:
        steps = {}
        used, held = self.cpu_of(), self.held_of()
        for step, tally in list(self._tallies.items()):
            rate = self._rate(step, tally.done, now)
            left = tally.into - tally.done
            eta = round(left / rate, 1) if rate and left > 0 else None
            cpu = round(used.get(step, 0.0), 2)
            steps[step] = {**tally.content(), "rate": round(rate, 3), "eta_s": eta, "cpu_s": cpu, **held.get(step, {})}
        known = [one["eta_s"] for one in steps.values() if one["eta_s"] is not None]
        return {
            "schema": 1,
            "time": time.time(),
            "running": running,
            "step": self.step,
            "steps": steps,
            "eta_s": max(known) if known else None,
            "engine_cpu_s": round(time.process_time(), 2),
            "tokens_in": self.tokens_in,
            "tokens_out": self.tokens_out,
            "usd": round(self.usd, 6),
            "workers": self._workers,
            "digests": dict(self.digests),
            "alone": dict(self.alone),
        }

    def write(self, *, running: bool = True) -> None:
        """A full disk is noticed by whoever keeps results."""
        with contextlib.suppress(OSError):
            place(json.dumps(self.content(time.monotonic(), running=running)).encode(), self._temporary, self._path)

    def _rate(self, step: str, done: int, now: float) -> float:
        seen = self._seen.setdefault(step, deque())
        seen.append((now, done))
        while len(seen) > 2 and seen[0][0] < now - RATE_OVER_S:
            seen.popleft()
        (then, before), seconds = seen[0], now - seen[0][0]
        return (done - before) / seconds if seconds > 0 and then < now else 0.0

    def _run(self) -> None:
        while not self._stop.wait(EVERY_S):
            self.write()
