"""What a driver sees of a pipeline: values that `observe` reads and `decide` judges.

Owns what follows from these facts alone: whether an attempt lives, is over or never began, and how far it came.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from orchestrator.ledger.records import DamagedCheckpoint, Outcome, Placement, Report
from orchestrator.ports import Life
from orchestrator.recipe.gates import Gate


@dataclass(frozen=True)
class Checkpoint:
    """A published checkpoint that nobody has found broken yet."""

    key: str
    """Key of its MANIFEST.json."""
    digest: str
    step: int
    attempt: int
    complete: bool


@dataclass(frozen=True)
class Onward:
    """Why a driver wants an attempt to be made anew elsewhere, for which it asks it to leave."""

    why: str
    pool: str | None
    """The next pool; None: the same."""
    done: bool
    """Whether this driver has asked it. An earlier one may have been killed between saying so and asking, and an answer may be lost."""


@dataclass(frozen=True)
class Room:
    """How many nodes a pool has for a stage, whoever holds them now."""

    pool: str | None
    """None: the profile has no pools."""
    nodes: int | None
    """None: they cannot be counted now."""
    said: int | None = None
    """What the newest event says, at most as many as the stage asks for. None: no event says anything."""
    short_since: float | None = None
    """Unix time of the first of the events in a row that say that there are fewer than the stage asks for. None: the newest does not."""
    blind: str = ""
    """Why they cannot be counted at all; empty: they can."""


@dataclass(frozen=True)
class Size:
    """A number of nodes on which a stage has its global batch."""

    nodes: int
    accumulate: int
    unfit: str = ""
    """Why it cannot run there: it does not fit the devices' memory. Empty: it fits, or that is not known."""


@dataclass(frozen=True)
class AttemptView:
    stage: str
    inputs_digest: str
    number: int
    epoch: int
    """Lease epoch of the driver that intended it."""
    resumed_from: int
    """Step of the checkpoint that it goes on from; 0: it begins at the start."""
    life: Life
    """`absent` where there is an outcome: then the backend is not asked any more."""
    published: int = 0
    """Step of the last checkpoint that it published; 0: none."""
    left_traces: bool = False
    """Whether it wrote a journal, a report or a checkpoint. Then it lived, even if the backend has forgotten it."""
    report: Report | None = None
    outcome: Outcome | None = None
    draining: bool = False
    """Whether this driver has asked it to save and leave."""
    adopted: bool = False
    """Whether an earlier driver intended it and this driver found it alive. Its end counts against this driver's retries."""
    given_up: str = ""
    """The fault that kept it from starting until the deadline, after which this driver killed it; empty: this driver did not."""
    told_to_end: bool = False
    """Whether this driver has asked it through the ledger, since no signal reaches it, to leave without saving."""
    damaged: DamagedCheckpoint | None = None
    """The checkpoint that it was to go on from, if that checkpoint is damaged."""
    reached: int | None = None
    """The last step that is known to have ended; None: not known. It is read only for attempts of this launch that are over."""
    made: float = 0.0
    """Unix time of its intent."""
    nodes: int = 1
    """How many it was made for."""
    placement: Placement | None = None
    """Where it is; None: its cluster has no pools, and its stage does not shrink."""
    onward: Onward | None = None
    """Where it is to be made anew; None: nobody wants that."""

    @property
    def alive(self) -> bool:
        """Whether it holds devices, or may hold them."""
        return self.outcome is None and self.life.state in ("running", "unknown")

    @property
    def ended(self) -> bool:
        """Whether it is over, and only its outcome has not been written."""
        return self.outcome is None and (self.life.state == "ended" or (self.life.state == "absent" and self.left_traces))

    @property
    def never_started(self) -> bool:
        """Intended, and never started."""
        return self.outcome is None and self.life.state == "absent" and not self.left_traces

    @property
    def progressed(self) -> bool:
        return self.published > self.resumed_from

    @property
    def saved(self) -> int:
        """Step of its newest published checkpoint, or of the one that it went on from."""
        return max(self.published, self.resumed_from)

    @property
    def lost(self) -> str:
        """A sentence for people about the steps that no checkpoint holds; empty: none is known to be lost."""
        if self.reached is None or self.reached <= self.saved:
            return ""
        count = self.reached - self.saved
        return f"{'' if self.report is not None else 'at least '}{count} step{'s' if count > 1 else ''} after step {self.saved} lost"


@dataclass(frozen=True)
class Judged:
    """The evaluation that a committed stage's configuration asks for, beside the training."""

    state: Literal["asked", "running", "done", "failed"]
    reason: str = ""
    """Why it failed in this launch."""
    told: bool = False
    """Whether an event says so."""


@dataclass(frozen=True)
class StageView:
    name: str
    inputs_digest: str | None
    """None: the parent is not committed, so the inputs are not known yet."""
    committed: bool = False
    attempts: tuple[AttemptView, ...] = ()
    """The attempts of these inputs, by number."""
    checkpoints: tuple[Checkpoint, ...] = ()
    """Ascending by (step, attempt)."""
    orphans: tuple[AttemptView, ...] = ()
    """Attempts of other inputs without an outcome: left by a launch of an earlier configuration."""
    refused: str | None = None
    """Why this driver must not start the stage: its parent is not what was committed, or the backend says no."""
    gate: Gate | None = None
    """Between it and the stages that start from it. None: it has none, or is not committed."""
    judged: Judged | None = None
    """None: it asks for no evaluation, it is not committed, or its own ranks evaluate."""
    room: Room | None = None
    """Of the pool where its attempt is, or comes. None: it is not asked for, as the stage does not shrink."""
    sizes: tuple[Size, ...] = ()
    """On which fewer nodes it can go on, while its pool has fewer than it asks for."""


@dataclass(frozen=True)
class Observed:
    epoch: int
    """Lease epoch of this driver."""
    stages: Mapping[str, StageView]
    targets: frozenset[str]
    """Stages to run; the others are only looked at."""
    stop: Literal["drain", "kill"] | None = None
    """What a person asked for."""
    cancelled: bool = False
    """Whether the drain was asked for by `osctl cancel`."""
