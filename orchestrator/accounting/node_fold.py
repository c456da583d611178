"""Add up one node's journal. This is the only code that turns journals into time.

Pure: pieces are added one by one, and no piece is kept. An agent adds up what it writes and puts the sums beside its journal
(`records.Totals`); `history` adds up what a ledger has, for status, watch, cost, compare, MLflow, the budget and the driver.

A node writes its pieces in order. So if a piece is there, those before it are there or will never come. The clocks of two nodes are never
compared here.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

from orchestrator.accounting.cost import NodeTime
from orchestrator.ledger.records import WAITING, JournalPiece, Totals

WINDOW = 256
"""For how many steps loss and time are kept. Arbitrary: enough for a mean over the last tenth of 2,500 steps."""
MOST_RUNS = 1024
"""How many intervals between two checkpoints are kept for a node (64 KiB). If there are more, the older ones are merged in pairs."""
TOTALS_EVERY = 16
"""An agent writes its sums after this many pieces, so a process that has just started reads at most this many pieces of each node. On S3 a
read takes 2 ms of a core, so 8 nodes cost 0.1 CPU-s on average."""


class Reading(NamedTuple):
    """Loss and time of one training step."""

    step: int
    loss: float | None
    wall_s: float
    """Seconds, including those of waiting for data and saving."""


class NodeFold:
    """The sums over one node's journal so far. The same pieces in the same order give the same sums, to the last bit."""

    def __init__(self, node: int, resumed_from: int = 0, every_steps: int = 1):
        """
        Args:
            node: number of the node.
            resumed_from: step of the checkpoint that the attempt resumed; 0 means from the start.
            every_steps: steps between two of the attempt's checkpoints. A piece ends with each such step, so the steps between two
                checkpoints are kept as one run.
        """
        self.node, self.resumed_from, self.every_steps = node, resumed_from, every_steps
        self.devices = 1
        self.seq = -1
        """Number of the newest piece that was added."""
        self.pieces = 0
        """How many pieces are in the sums."""
        self.read = 0
        """How many of them were added one by one, and not with `begin_at`."""
        self.start: float | None = None
        self.end: float | None = None
        self.spent: dict[str, float] = {}
        self.last_step: int | None = None
        self.runs: list[tuple[int, int, float, int]] = []
        """Runs of finished steps; see `records.Totals.runs`."""
        self.in_flight = 0.0
        """Seconds of `step` since the last finished step."""
        self.recent: deque[Reading] = deque(maxlen=WINDOW)
        self.asked = self.due = 0.0
        """For `history`: when the next piece was last not found, and until when it need not be read again, by one clock."""

    def add(self, piece: JournalPiece) -> None:
        """Add a piece that comes after the newest one. Any other piece changes nothing."""
        if piece.seq <= self.seq:
            return
        self.seq, self.devices = piece.seq, piece.devices
        self.pieces += 1
        self.read += 1
        for category, seconds in piece.spent.items():
            self.spent[category] = self.spent.get(category, 0.0) + seconds
        if not set(piece.spent) <= set(WAITING):
            self.start = piece.start if self.start is None else min(self.start, piece.start)
            self.end = piece.end if self.end is None else max(self.end, piece.end)
        self._steps(piece)
        for line in piece.metrics:
            if isinstance(step := line.get("step"), int):
                times = (line.get(name) for name in ("step_s", "data_wait_s", "checkpoint_s"))
                loss = line.get("loss")
                wall_s = sum(float(time) for time in times if isinstance(time, int | float))
                self.recent.append(Reading(step, float(loss) if isinstance(loss, int | float) else None, wall_s))

    def _steps(self, piece: JournalPiece) -> None:
        """Add the time of steps. The time of a piece without a finished step belongs to the step in flight, never to earlier steps."""
        seconds = self.in_flight + piece.spent.get("step", 0.0)
        if piece.first_step is None or piece.last_step is None:
            self.in_flight = seconds
            return
        first, last, self.in_flight = piece.first_step, piece.last_step, 0.0
        self.last_step = last
        if self.runs and (self.runs[-1][0] - 1) // self.every_steps == (last - 1) // self.every_steps:
            before = self.runs[-1]
            self.runs[-1] = (min(before[0], first), max(before[1], last), before[2] + seconds, before[3])
            return
        self.runs.append((first, last, seconds, piece.seq))
        if len(self.runs) > MOST_RUNS:
            old, young = self.runs[: MOST_RUNS // 2], self.runs[MOST_RUNS // 2 :]
            pairs = zip(old[::2], old[1::2], strict=True)
            self.runs = [(min(a[0], b[0]), max(a[1], b[1]), a[2] + b[2], a[3]) for a, b in pairs] + young

    def first_piece_with(self, step: int) -> int:
        """Number of a piece at or before the first one that has this step or a later one."""
        return next((seq for _, last, _, seq in self.runs if last >= step), self.seq + 1)

    def all_runs(self) -> list[tuple[int, int, float, int]]:
        """Runs of finished steps, and the step in flight as one more."""
        reached = self.last_step if self.last_step is not None else self.resumed_from
        return self.runs + ([(reached + 1, reached + 1, self.in_flight, self.seq)] if self.in_flight else [])

    def time(self) -> NodeTime:
        """The sums as a bill needs them."""
        runs = tuple((first, last, seconds) for first, last, seconds, _ in self.all_runs())
        return NodeTime(self.node, self.devices, self.start, self.end, dict(self.spent), runs)

    def totals(self) -> Totals:
        """The sums as the store keeps them. Needs at least one piece."""
        return Totals(
            node=self.node, seq=self.seq, pieces=self.pieces, start=self.start, end=self.end, devices=self.devices, spent=self.spent,
            last_step=self.last_step, runs=tuple(self.all_runs()), recent=tuple(self.recent),
        )  # fmt: skip

    def begin_at(self, totals: Totals) -> None:
        """Set the sums to these totals, as if every piece up to them had been added."""
        self.seq, self.pieces, self.devices = totals.seq, totals.pieces, totals.devices
        self.start, self.end, self.spent = totals.start, totals.end, dict(totals.spent)
        self.last_step, self.runs, self.in_flight = totals.last_step, list(totals.runs), 0.0
        reached = self.last_step if self.last_step is not None else self.resumed_from
        if self.runs and self.runs[-1][0] > reached:
            self.in_flight = self.runs.pop()[2]
        self.recent = deque((Reading(*reading) for reading in totals.recent), maxlen=WINDOW)


def fold(pieces: Sequence[JournalPiece], resumed_from: int = 0, every_steps: int = 1) -> tuple[NodeTime, ...]:
    """Add up pieces of several nodes, given in any order."""
    folds: dict[int, NodeFold] = {}
    for piece in sorted(pieces, key=lambda piece: (piece.node, piece.seq)):
        folds.setdefault(piece.node, NodeFold(piece.node, resumed_from, every_steps)).add(piece)
    return tuple(one.time() for one in folds.values())
