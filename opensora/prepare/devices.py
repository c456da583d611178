"""Which devices the steps of a preparation hold, and for how long: its cores, and the CUDA device that a model is put on.

Owns the clock of each step. Refuses to know prices: the launcher has them (`orchestrator.prepare.bill`).

A step holds all cores of the run from its beginning to its end, busy or not. download, probe and frames are one pass over the sources:
its cores stand under frames. A CUDA device is held from the moment before a model is put on it until the model is let go; however many
guards share it, it is one device. What CUDA itself keeps for a process that used it (its context) is not counted.
"""

from __future__ import annotations

import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

Kind = Literal["cpu", "cuda"]
ONE_PASS = {"download": "frames", "probe": "frames"}


@dataclass(frozen=True)
class Device:
    kind: Kind
    name: str
    """As torch names it; `cpu`."""
    count: int = 1


CPU = Device("cpu", "cpu")


def here() -> Device:
    """What a model of this process is put on: its first CUDA device, where there is one. Imports torch."""
    import torch

    return Device("cuda", torch.cuda.get_device_name()) if torch.cuda.is_available() else CPU


def in_use() -> bool:
    """Whether this process has something on a CUDA device. Imports nothing: torch may be in the middle of its import."""
    asked: Any = getattr(getattr(sys.modules.get("torch"), "cuda", None), "is_initialized", None)
    return bool(asked()) if asked is not None else False


class Held:
    """Device-seconds by step. `content` may be called by another thread than the rest."""

    def __init__(self, cores: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._cores, self._clock, self._lock = cores, clock, threading.Lock()
        self._seconds: dict[str, dict[Kind, float]] = defaultdict(dict)
        self._devices: dict[str, Device] = {}
        self._step = ""
        self._since = 0.0
        self._cuda: tuple[Device, float, str] | None = None
        """The device that is held now, since when, and by which step."""

    def begin(self, step: str) -> None:
        """From now on the cores are this step's. It may be said again."""
        step = ONE_PASS.get(step, step)
        with self._lock:
            if step == self._step:
                return
            self._settle()
            self._step, self._since = step, self._clock()

    def take(self, device: Device, step: str | None = None) -> None:
        """The step of now, or this one, holds this device as well. It may be said again, and of the CPU it changes nothing."""
        with self._lock:
            if device.kind == "cuda" and self._cuda is None and self._step:
                self._cuda = device, self._clock(), step or self._step
                self._devices[self._cuda[2]] = device

    def release(self) -> bool:
        """Nothing is on a CUDA device any more. Whether something was."""
        with self._lock:
            had = self._cuda is not None
            self._add(self._seconds, self._clock(), cores=False)
            self._cuda = None
            return had

    def end(self) -> None:
        """The step is done, and holds nothing any more."""
        with self._lock:
            self._settle()

    def content(self) -> dict[str, dict[str, Any]]:
        """By step {device, devices, held_s: {kind: device-seconds}}, up to now."""
        with self._lock:
            seconds = defaultdict[str, dict[Kind, float]](dict, {step: dict(one) for step, one in self._seconds.items()})
            self._add(seconds, self._clock())
            return {step: self._told(step, one) for step, one in seconds.items()}

    def _told(self, step: str, seconds: dict[Kind, float]) -> dict[str, Any]:
        device = self._devices.get(step, Device("cpu", "cpu", self._cores))
        return {"device": device.name, "devices": device.count, "held_s": {kind: round(value, 3) for kind, value in seconds.items()}}

    def _settle(self) -> None:
        self._add(self._seconds, self._clock())
        self._step, self._cuda = "", None

    def _add(self, to: dict[str, dict[Kind, float]], now: float, *, cores: bool = True) -> None:
        if not self._step:
            return
        one = to[self._step]
        if cores:
            one["cpu"] = one.get("cpu", 0.0) + self._cores * (now - self._since)
        if self._cuda is not None:
            device, since, step = self._cuda
            one = to[step]
            one["cuda"] = one.get("cuda", 0.0) + device.count * (now - since)
