"""What the engine and the process that drives Ray tell each other. Owns the messages; refuses to import ray.

engine → driver   Setup, then lists of Sent, Leave, then None (end)
driver → engine   Ready, lists of Answer, Heard, Failed, Ended
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from opensora.dataset.prepare_config import Limits


@dataclass(frozen=True)
class ModelActors:
    """The second actors of a stream: each holds models, which it loads once."""

    actors: int
    """At most."""
    num_cpus: float
    num_gpus: float
    """Of each."""
    batch: int
    """Rows that a model works on at once, at most."""

    @property
    def calls(self) -> int:
        """Rows that are in such an actor at a time: a batch that it works on, and one that waits, so that it never waits for Ray Data."""
        return 2 * self.batch

    @property
    def in_flight(self) -> int:
        """Rows that are given to one at most. Ray Data starts another actor where there are 1.75 times as many as calls."""
        return 2 * self.calls


@dataclass(frozen=True)
class Setup:
    """Of one stream."""

    address: str
    """Of a Ray cluster that runs; empty: one is started for this run, on this machine."""
    temporary: str
    """Ray's own folder, short: the names of its sockets must not pass 107 characters."""
    spill: str
    """Where objects go that the object store has no room for."""
    object_store: int
    """Bytes."""
    actors: int
    """At most; each works on one row at a time."""
    num_cpus: float
    num_gpus: float
    """Of each actor."""
    limits: Limits
    """Of a guard."""
    preload: tuple[str, ...]
    models: ModelActors | None
    """None: one function does all that is done with a row."""
    silent_s: float
    """So long may no actor be heard of: they say that they live every five seconds, also while a row takes hours."""


class Sent(NamedTuple):
    """A row on its way to an actor."""

    number: int
    seconds: float
    """Until its deadline."""
    content: bytes
    """Pickled (function, row)."""
    then: bytes
    """Pickled function of the model actors; empty: none."""
    then_s: float
    """Until the deadline of one call of it."""


class Answer(NamedTuple):
    number: int
    content: bytes
    """Pickled (`done`, result or Leaves) or (`stop`, error that is about all rows)."""
    cpu_s: float
    then: bytes = b""
    """The same of the second function; empty: it had nothing to do."""
    then_cpu_s: float = 0.0
    busy_s: float = 0.0
    """Seconds that a model actor worked on this row: its share of the batch's."""


@dataclass(frozen=True)
class Leave:
    """Models begin with no further row: those that wait for them come back as they are."""


@dataclass(frozen=True)
class Ready:
    """Ray has started."""


@dataclass(frozen=True)
class Heard:
    """What functions told since the last time, and how long ago an actor was heard of."""

    told: tuple[Any, ...]
    silent_s: float
    worked_by: bool
    """Whether an actor has been heard of at all."""


@dataclass(frozen=True)
class Failed:
    reason: str


@dataclass(frozen=True)
class Refusal:
    """Another try would end in the same way."""

    reason: str


@dataclass(frozen=True)
class Ended:
    """All rows are answered; bytes that the object stores had to spill."""

    spilled: int
