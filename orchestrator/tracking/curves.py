"""Curves in MLflow: from journal pieces to points. Pure.

An attempt's curve has every step and every reading. A stage's curve has each step once, from the attempt whose checkpoint first had it, so
a step that was lost and repeated appears as it was last computed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from orchestrator.ledger.records import JournalPiece
from orchestrator.ports import Point
from orchestrator.tracking.facts import AttemptFacts
from orchestrator.tracking.mlflow_text import metric_name

BOOKKEEPING = frozenset({"clips", "tokens", "data_wait_s", "checkpoint_s"})
"""Readings of a step that only the curves of attempts have: on a stage's page their sums (`seconds/...`) are more useful."""


def attempt_curve(pieces: Iterable[JournalPiece]) -> Iterator[tuple[int, list[Point]]]:
    """(number, points) of each piece. If a piece between two others is missing, it will never come, since a node writes them in order."""
    for piece in pieces:
        yield piece.seq, [point for line in piece.metrics for point in points(line)]


def stage_curve(attempts: Sequence[AttemptFacts], cursor: int) -> Iterator[tuple[int, list[Point]]]:
    """(step, points) of each step after step `cursor`, from the first attempt that published a checkpoint with it."""
    reached = cursor
    for attempt in attempts:
        if attempt.time.last_published <= max(reached, attempt.time.resumed_from):
            continue  # it has no step that an earlier attempt does not have
        for line in _lines(attempt.pieces(attempt.first_piece_with(reached + 1) - 1)):
            step = line.get("step")
            if isinstance(step, int) and step > attempt.time.last_published:
                break
            if isinstance(step, int) and reached < step:
                yield step, [point for point in points(line) if point.key not in BOOKKEEPING]
                reached = step


def _lines(pieces: Iterable[JournalPiece]) -> Iterator[dict[str, Any]]:
    for piece in pieces:
        yield from piece.metrics


def points(line: Mapping[str, Any]) -> Iterator[Point]:
    """The numbers in a line of metrics.jsonl. There are none if the line is not about a step."""
    if "step" not in line or "time" not in line:
        return
    for name, value in line.items():
        if name not in ("step", "time") and isinstance(value, int | float) and not isinstance(value, bool):
            yield Point(metric_name(name), float(value), line["time"], line["step"])
