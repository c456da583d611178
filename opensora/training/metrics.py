"""`metrics.jsonl` and the progress lines of the log: one line for each step, and one for each interval that is not a step.

Owns the time: every moment between the start of the process and its end belongs to exactly one line (docs/contracts.md, section 1).
Times are Unix seconds of the wall clock. `opensora.training.run_directory` writes the lines.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence

from opensora.training.run_directory import Phase, RunDirectory

log = logging.getLogger(__name__)

PROGRESS_LINES = 40
"""Progress lines in the log of a stage."""


class Metrics:
    """The lines of one rank. Each call books the time since the call before it."""

    def __init__(self, run: RunDirectory, *, first_step: int, steps: int, in_log: bool) -> None:
        """
        Args:
            first_step: steps that the stage has taken before this run.
            steps: steps of the whole stage.
            in_log: whether this rank writes progress lines (the first one of the job does).
        """
        self._run, self._first_step, self._steps, self._in_log = run, first_step, steps, in_log
        self._booked = self._began = time.time()  # end of the last booked interval; start of the loop

    def begin(self, born: float) -> None:
        """Book the time since `born` (Unix seconds, start of the process) as `init`; the loop starts now."""
        self._booked = born
        self.book("init")
        self._began = self._booked

    def book(self, phase: Phase) -> None:
        """Book the time since the last call as something that is not a step. Raises OSError if the disk is full."""
        now = time.time()
        self._run.record({"phase": phase, "start": self._booked, "end": now})
        self._booked = now

    def report(self, lines: Sequence[dict[str, float]], checkpoint_s: float) -> None:
        """Write the lines of finished steps.

        Args:
            lines: as `Trainer.settle` returns them. This adds `checkpoint_s` and `step_s`, and mends `time` and `data_wait_s`.
            checkpoint_s: seconds that training stood still for a save after the last of these steps; they belong to its line.
        """
        for line in lines:
            last = line is lines[-1]
            now = line["time"] = time.time() if last else line["time"]
            line["checkpoint_s"] = checkpoint_s if last else 0.0
            left = now - self._booked - line["checkpoint_s"]
            line["data_wait_s"] = min(line["data_wait_s"], left)  # a step may have been launched before this interval began
            line["step_s"] = left - line["data_wait_s"]
            self._booked = now
            self._run.record(line)
        every = max(1, self._steps // PROGRESS_LINES)
        for line in lines if self._in_log else ():
            if line["step"] % every == 0 or line["step"] == self._steps:
                self._log_progress(line)

    def _log_progress(self, line: dict[str, float]) -> None:
        done, elapsed = line["step"] - self._first_step, self._booked - self._began
        log.info(
            "step %6d/%d  loss %.4f  lr %.2e  grad %.2f  %6.1f clips/s  ETA %s",
            line["step"],
            self._steps,
            line["loss"],
            line["lr"],
            line["grad_norm"],
            line["clips"] * done / elapsed,
            _clock(elapsed / done * (self._steps - line["step"])),
        )


def _clock(seconds: float) -> str:
    """`2:07:15`."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"
