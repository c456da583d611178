"""Where an attempt's time goes: metrics lines and phases in, contiguous journal pieces out. Pure.

Owns the rule that every microsecond between the attempt's binding and the last piece's end is in exactly one category.
Refuses to look at a clock, and to book what nobody has shown: time is booked up to the last evidence, and not beyond it.

Everything is counted in whole microseconds, so that sums are exact; floats appear in the pieces alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from orchestrator.ledger.records import HELD, JournalPiece

MICRO = 1_000_000
TRAINER_PHASES = ("init", "checkpoint", "evaluate")
"""What a trainer may book that is not a step."""


class Timeline:
    """One node's time from `start` (Unix seconds). `edge` moves forward only, so an interval that is claimed twice counts once."""

    def __init__(self, start: float, *, node: int, devices: int, every_steps: int) -> None:
        """`every_steps`: a piece ends with each such step, so that the steps after a checkpoint are in pieces of their own."""
        self._node, self._devices, self._every_steps = node, devices, every_steps
        self._start = self._edge = round(start * MICRO)
        self._seq = 0
        self._closed: list[JournalPiece] = []
        self._trained = False
        self._open()

    def _open(self) -> None:
        self._spent: dict[str, int] = {}
        self._metrics: list[dict[str, Any]] = []
        self._steps: list[int] = []

    @property
    def edge(self) -> float:
        """Unix seconds up to which time is booked."""
        return self._edge / MICRO

    @property
    def trained(self) -> bool:
        """Whether a step has ended."""
        return self._trained

    def book(self, category: str, until: float) -> None:
        """Everything not yet booked up to `until` (Unix seconds) was spent on `category`."""
        assert category in HELD, category
        end = round(until * MICRO)
        if end > self._edge:
            self._spent[category] = self._spent.get(category, 0) + end - self._edge
            self._edge = end

    def line(self, line: Mapping[str, Any], now: float) -> None:
        """Book one line of metrics.jsonl: a step with its interval, or a phase. What lies between two lines belongs to the steps."""
        between = "step" if self._trained else "init"
        if "phase" in line:
            phase = line["phase"]
            self.book(between, min(_seconds(line, "start"), now))
            self.book(phase if phase in TRAINER_PHASES else between, min(_seconds(line, "end"), now))
            return
        wait, compute, save = (_seconds(line, name) for name in ("data_wait_s", "step_s", "checkpoint_s"))
        end = min(_seconds(line, "time"), now)
        self.book(between, end - save - compute - wait)
        self.book("data_wait", end - save - compute)
        self.book("step", end - save)
        self.book("checkpoint", end)
        self._trained = True
        self._steps.append(line["step"])
        if self._node == 0:  # the others say the same
            self._metrics.append(dict(line))
        if line["step"] % self._every_steps == 0:
            self._close()

    def _close(self) -> None:
        if self._edge == self._start:
            return  # nothing to book these lines on: they go with the next piece
        piece = JournalPiece(
            node=self._node,
            seq=self._seq,
            start=self._start / MICRO,
            end=self._edge / MICRO,
            devices=self._devices,
            spent={category: spent / MICRO for category, spent in self._spent.items()},
            first_step=min(self._steps, default=None),
            last_step=max(self._steps, default=None),
            metrics=tuple(self._metrics),
        )
        self._closed.append(piece)
        self._seq += 1
        self._start = self._edge
        self._open()

    def take(self) -> list[JournalPiece]:
        """The pieces up to the edge that were not taken before, in order."""
        self._close()
        taken, self._closed = self._closed, []
        return taken


def _seconds(line: Mapping[str, Any], name: str) -> float:
    """A number of a line; one that is missing or not a number is 0, since a trainer's slip must not end the bookkeeping."""
    value = line.get(name)
    return max(0.0, value) if isinstance(value, int | float) and math.isfinite(value) else 0.0
