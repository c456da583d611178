"""What the phases of one run share: the configuration, the folders, the kept results, the counts, the guards.

Owns the names in a run directory. Refuses to do work.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from opensora.dataset.prepare_config import PrepareConfig
from opensora.dataset.rows import Captioned, ClipFile, Drop, Fetched, Leaves, Looked, Media, Quarantine
from opensora.prepare.devices import Held
from opensora.prepare.digests import Digests, digests
from opensora.prepare.for_models import describe, show
from opensora.prepare.kept import Columns, Kept, KeptFiles, SingleFiles
from opensora.prepare.pool import Pool
from opensora.prepare.reconcile import Tally, check_share
from opensora.prepare.shards import Shard
from opensora.prepare.status import Status
from opensora.prepare.steps import Steps

Row = TypeVar("Row")
log = logging.getLogger(__name__)


class Drained(Exception):
    """It was asked to leave; all that is done is kept."""


@dataclass(frozen=True)
class Folders:
    """Of a run directory."""

    path: Path

    @property
    def config(self) -> Path:
        return self.path / "prepare.yaml"

    @property
    def kept(self) -> Path:
        return self.path / "kept"

    @property
    def quarantined(self) -> Path:
        """Rows that could not be worked on, as `kept` has results. Not among those, which never change: these are tried again."""
        return self.path / "quarantined"

    @property
    def sources(self) -> Path:
        return self.path / "sources"

    @property
    def temporary(self) -> Path:
        """Files that are not whole. Emptied when a run begins."""
        return self.path / "temporary"

    @property
    def out(self) -> Path:
        return self.path / "out"

    @property
    def partial(self) -> Path:
        return self.path / "out.partial"

    @property
    def drain(self) -> str:
        """Once this file is there, the run leaves. A string: it is looked for once a row, and a Path takes ten times as long to make."""
        return f"{self.path}/drain"

    def stages(self) -> dict[str, Path]:
        return {path.stem: path for path in sorted((self.path / "stages").glob("*.yaml"))}

    def begin(self) -> None:
        """Make the folders, and empty the one of files that are not whole. Raises OSError."""
        for folder in (self.kept, self.quarantined, self.sources, self.temporary):
            folder.mkdir(parents=True, exist_ok=True)
        for left in self.temporary.iterdir():
            shutil.rmtree(left) if left.is_dir() and not left.is_symlink() else left.unlink(missing_ok=True)


class Results(Kept[Row]):
    """Kept results of a step, and beside them its quarantined rows, which are tried again."""

    def __init__(self, state: RunState, step: str, digest: str, kind: type[Row], *, durable: bool = False) -> None:
        super().__init__(state.folders.kept, state.folders.temporary, step, digest, kind, durable)
        self._aside: Kept[Row] = SingleFiles(state.folders.quarantined, state.folders.temporary, step, digest, kind)
        self._any_aside = Path(self._aside.name("")).parent.parent.exists()
        self._retry = state.retry
        self._tried = set[str]()
        """Keys that this run itself put aside: it tries none of them twice."""

    def has(self, key: str) -> bool:
        return super().has(key) or (not self._retry and self._aside.read(key) is not None)

    def read(self, key: str, stamp: str = "") -> Row | Leaves | None:
        found = super().read(key, stamp)
        return self._aside.read(key) if found is None and (not self._retry or key in self._tried) else found

    def write(self, key: str, outcome: Row | Leaves, stamp: str = "") -> None:
        if isinstance(outcome, Quarantine):
            self._any_aside = True
            self._tried.add(key)
            self._aside.write(key, outcome)
            return
        super().write(key, outcome, stamp)
        if self._any_aside:  # it is no longer quarantined
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._aside.name(key))  # noqa: PTH108


class ClipFiles(Results[ClipFile], KeptFiles[ClipFile]):
    """Those of clips' own files."""


@dataclass
class RunState:
    folders: Folders
    config: PrepareConfig
    steps: Steps
    guards: Pool
    """Guard processes of this machine, or of an engine."""
    held: Held
    halt: Callable[[], bool]
    retry: bool = True
    """Whether rows that earlier runs quarantined are tried again."""
    shard: Shard | None = None
    """These sources alone. None: all."""
    tallies: dict[str, Tally] = field(default_factory=dict)
    status: Status | None = None
    refetched: int = 0
    models_step: str | None = None
    """Which step's models a guard puts on a device; None: those of the step that is worked on."""

    def __post_init__(self) -> None:
        self.digests: Digests = digests(self.config, self.steps.versions())
        now = self.digests
        self.fetched = Results(self, "download", now.download, Fetched)
        self.media = Results(self, "probe", now.probe, Media)
        self.looked = Results(self, "frames", now.frames, Looked, durable=True)
        self.files = ClipFiles(self, "clips", now.clips, ClipFile, durable=True)
        self.text_area = Results(self, "text_area", now.text_area, Columns, durable=True)
        self.scores = Results(self, "scores", now.scores, Columns, durable=True)
        self.matches = Results(self, "matches", now.scores, Columns, durable=True)
        """Scores that a clip has with its caption."""
        self.captions = Results(self, "caption", now.caption, Captioned, durable=True)
        self._kept: tuple[Kept[Any], ...] = (
            self.fetched, self.media, self.looked, self.files, self.text_area, self.scores, self.matches, self.captions,
        )  # fmt: skip

    def __enter__(self) -> RunState:
        return self

    def __exit__(self, *_: object) -> None:
        for kept in self._kept:
            kept.close()

    def tally(self, step: str) -> Tally:
        return self.tallies.setdefault(step, Tally())

    def begin(self, step: str) -> Tally:
        if self.status is not None:
            self.status.step = step
        self.held.begin(step)
        return self.tally(step)

    def leave(self, step: str, leaves: Leaves, row: str) -> None:
        """Count a row that leaves, and say so where it could not be worked on. Raises TooMany when these are too many."""
        self.tally(step).leave(leaves)
        if not isinstance(leaves, Drop):
            from opensora.printable import quoted

            log.info("%s: %s is put aside: %s", step, quoted(row, 200), quoted(str(leaves), 400))

    def settle(self, step: str) -> None:
        """At the end of a step. Raises Drained, TooMany."""
        if self.halt():
            raise Drained
        for kept in self._kept:
            kept.finish()
        self.held.end()
        tally = self.tally(step)
        check_share(step, tally, self.config.max_quarantined)
        left = sum(tally.dropped.values()), sum(tally.quarantined.values())
        log.info("%s: %s in, %s kept, %s dropped, %s quarantined", step, *(f"{n:,}" for n in (tally.into, tally.kept, *left)))

    def cpu_s(self) -> Mapping[str, float]:
        """CPU-seconds of guards by step."""
        steps = self.steps
        names = {steps.inspect: "frames", steps.cut_out: "clips", show: "clips", steps.measure: "score", describe: "caption"}
        by_name: dict[str, str] = {getattr(function, "__name__", ""): step for function, step in names.items()}
        used = defaultdict[str, float](float)
        for name, seconds in self.guards.cpu_s.items():
            if name in by_name:
                used[by_name[name]] += seconds
        return used

    def let_go(self) -> None:
        """The guards' models leave the GPU, where they were on one: the next step, or another process, gets its memory."""
        if self.held.release():
            self.guards.empty()

    def counts(self) -> dict[str, Any]:
        return {step: tally.content() for step, tally in self.tallies.items()}
