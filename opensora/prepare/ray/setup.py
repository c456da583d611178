"""What the engine and the process that drives Ray tell each other. Owns the messages; refuses to import ray.

engine → driver   Setup, then lists of Sent, then None (end)
driver → engine   Ready, lists of Answer, Heard, Failed, Ended
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from opensora.dataset.prepare_config import Limits


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
    silent_s: float
    """So long may no actor be heard of: they say that they live every five seconds, also while a row takes hours."""


class Sent(NamedTuple):
    """A row on its way to an actor."""

    number: int
    seconds: float
    """Until its deadline."""
    content: bytes
    """Pickled (function, row)."""


class Answer(NamedTuple):
    number: int
    content: bytes
    """Pickled (`done`, result or Leaves) or (`stop`, error that is about all rows)."""
    cpu_s: float


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
