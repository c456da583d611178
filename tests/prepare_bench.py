"""Preparations of a folder of "videos" by the stand-in process, in a test's own process."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from opensora.dataset.prepare_config import Given, PrepareConfig
from orchestrator.driver.clock import SystemClock
from orchestrator.ports import Store
from orchestrator.prepare.run import Asked, Preparation, Prepared
from orchestrator.prepare.run_directory import RunDirectory

STAND_IN = Path(__file__).with_name("stand_in_prepare.py")


class LateClock(SystemClock):
    """The time is ahead by so many seconds: a lease that a dead launcher left has expired."""

    def __init__(self, ahead_s: float = 0.0) -> None:
        self.ahead_s = ahead_s

    def now(self) -> float:
        return super().now() + self.ahead_s


@dataclass
class Bench:
    """Prepares the same videos again and again, each time from a run directory that the test names."""

    folder: Path
    store: Store
    videos: Path
    said: list[str] = field(default_factory=list)
    clock: LateClock = field(default_factory=LateClock)

    def asked(self, *words: str, run_dir: str = "run", **settings: Any) -> Asked:
        captions = {"caption": {"kind": "text"}}
        content = {"name": "mine", "sources": [Given(path=str(self.videos))], "workers": 2, **captions, **settings}
        config = PrepareConfig.model_validate(content)
        command = (sys.executable, str(STAND_IN), "{run_dir}", *words)
        return Asked(config, {}, self.store, self.folder / run_dir, dict(os.environ), command=command, holder="me@here")

    def preparation(self, *words: str, run_dir: str = "run", **settings: Any) -> Preparation:
        return Preparation(self.asked(*words, run_dir=run_dir, **settings), say=self.said.append, clock=self.clock)

    def run(self, *words: str, run_dir: str = "run", **settings: Any) -> Prepared:
        return self.preparation(*words, run_dir=run_dir, **settings).run()

    def made(self, run_dir: str = "run") -> list[str]:
        """Results that were computed there, in order: one that was brought back is not among them."""
        path = self.folder / run_dir / "made.txt"
        return path.read_text().splitlines() if path.exists() else []

    def directory(self, run_dir: str = "run") -> RunDirectory:
        return RunDirectory(self.folder / run_dir)
