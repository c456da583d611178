"""The outside worlds as the core sees them. Adapters implement these protocols; tests run the same contract on each adapter."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from orchestrator.errors import Refused, TooLarge

NUMBERED = re.compile(r"(\d{6,})\.json")
READ_AT_MOST = 64 << 20
"""Bytes of an object that `Store.read` takes into memory. A manifest of 512 ranks has 0.4 MB; files are fetched with `download`."""


@dataclass(frozen=True)
class Object:
    """Content and version of one object. `etag` is opaque; hand it to `replace`."""

    data: bytes
    etag: str


def check_key(key: str) -> str:
    """The key itself, if it means the same object in every kind of store. Raises Refused.

    A key is never trusted: manifests name files, and a manifest may have been written by someone else.
    """
    parts = key.split("/")
    if not key or any(part in ("", ".", "..") for part in parts):
        raise Refused(f"key {key!r}: has an empty, `.` or `..` part; keys are relative paths below the store")
    if not key.isprintable() or "\\" in key:
        raise Refused(f"key {key!r}: holds a backslash or a character that cannot be printed")
    if len(key.encode()) > 900 or any(len(part.encode()) > 200 for part in parts):
        raise Refused(f"key {key!r}: {len(key.encode())} bytes long; 900 at most, and 200 a part")
    return key


def check_size(key: str, size: int) -> None:
    """Raises TooLarge where an object is no record: whatever lies under its key, it must not fill the memory."""
    if size > READ_AT_MOST:
        raise TooLarge(f"{key}: has {size} bytes; a record has at most {READ_AT_MOST}, so somebody else wrote it")


class Store(Protocol):
    """Objects under keys with `/`. Reads see every finished write. Nothing is ever overwritten but through `replace`."""

    url: str
    arrived: int
    """Bytes of files that `upload` has handed over, each counted once. It grows while an upload makes progress that nothing undoes."""

    def read(self, key: str) -> Object:
        """A small object, whole. Raises NotFound, Unreachable, Refused where it may not be read, TooLarge."""

    def create(self, key: str, data: bytes) -> str:
        """Put if absent; the etag. The same bytes again succeed. Raises StoreConflict where other content is there."""

    def replace(self, key: str, data: bytes, etag: str) -> str:
        """Put if the object still has this etag; the new etag. Raises StoreConflict, NotFound."""

    def list(self, prefix: str, after: str = "") -> Iterator[str]:
        """Keys that start with `prefix` (a plain string prefix) and sort behind `after`, in lexical order.

        This and `children` pass over what other tools leave in a store (`orchestrator.litter`).
        """

    def children(self, prefix: str) -> Sequence[str]:
        """Names of the folders right below `prefix`, which is empty or ends in `/`; in lexical order, in one request."""

    def upload(self, key: str, path: Path) -> None:
        """`create` from a file of any size. Raises StoreConflict where other content is there."""

    def download(self, key: str, path: Path, *, patience_s: float | None = None) -> None:
        """Write the object to `path`, whole or not at all. Raises NotFound, Unreachable.

        Args:
            patience_s: how long nothing may come before a store that does not answer is given up; none: the store's own time.
        """

    def digest(self, key: str) -> tuple[int, str]:
        """Size and sha256 of the object. It is read as a stream and written nowhere. Raises NotFound, Unreachable."""

    def size(self, key: str) -> int:
        """Bytes. Raises NotFound."""

    def age(self, key: str) -> float:
        """Seconds since the object was written, by the store's own clock alone: no other clock is in it. Raises NotFound, Unreachable."""

    def discard(self, key: str) -> None:
        """Remove an object that its own writer has never finished with: nothing names it. Absent is well. Raises Unreachable, Refused."""

    def probe(self) -> None:
        """Try that the store is there and holds its conditional writes. Raises Unreachable, Refused."""


def numbered(store: Store, folder: str) -> dict[int, str]:
    """Keys `<folder>/<6 digits>.json` of records that follow each other, by number, whether they can be read or not."""
    names = ((key, NUMBERED.fullmatch(key.removeprefix(f"{folder}/"))) for key in store.list(f"{folder}/"))
    return {int(name[1]): key for key, name in names if name}


WaitCause = Literal[
    "webhook", "operator", "refused", "queue", "queue_stopped", "deactivated", "checks", "priority", "quota",
    "secret", "image", "container", "gang", "volume", "no_fit", "taint", "selector", "scheduler", "starting",
]  # fmt: skip
"""Why an attempt waits, in one word: a row of docs/waiting.md, which says what each means and what a person can do about it."""


@dataclass(frozen=True)
class Life:
    """What is known of a submitted attempt's process or job.

    `unknown` is said when the backend cannot be asked. It is never guessed into another state.
    """

    state: Literal["absent", "running", "ended", "unknown"]
    bound: float | None = None
    """Unix time at which devices were first held."""
    ended: float | None = None
    """Unix time of death, as seen from outside."""
    exit_code: int | None = None
    """None: nobody saw it die."""
    cause: Literal["preempted", "oom_killed", "deleted"] | None = None
    """Of an end, as the cluster tells it. preempted: evicted, or its node was lost; deleted: by somebody who is not its driver."""
    waits: str = ""
    """Why it does not run yet, in the cluster's own words."""
    waits_for: Literal["capacity", "fault"] | None = None
    """capacity: others hold the devices, and waiting is the right thing; fault: nothing will happen until somebody mends something."""
    since: float | None = None
    """Unix time since which it waits for that."""
    waits_on: WaitCause | None = None
    """The same reason in one word."""
    where: str = ""
    """Where it lives or lived, for people, if not below this driver: no signal of ours reaches it, and the ledger alone tells of it."""
    trouble: str = ""
    """Why its checkpoints do not reach the store, as far as that can be seen from here."""
    taken: str = ""
    """Of an end that is `preempted`: who took its devices away and why, where that is known."""
    last_words: str = ""
    """Of an end: the end of what the agent itself printed. Where it left without a report, nothing else says why."""


class Backend(Protocol):
    """Where attempts live: local processes, or a cluster."""

    def check(self, run_key: str, nodes: int) -> None:
        """Raise Refused if an attempt on so many nodes could never be submitted. It is asked before anything is written of the attempt."""

    def submit(self, intent_key: str, run_key: str) -> None:
        """Start the attempt. Idempotent: an attempt that lives or has lived is not started again. Raises Unreachable, Refused."""

    def observe(self, run_key: str) -> Life: ...

    def drain(self, run_key: str) -> None:
        """Ask it to save and leave. Returns at once."""

    def kill(self, run_key: str) -> None:
        """End it now. Returns when it is gone."""

    def forget(self, run_key: str) -> None:
        """Its outcome is written: what still lies around of it may go. Idempotent."""


class Evaluator(Protocol):
    """Judges committed stages beside the training. What it finds out it writes into the ledger itself; nothing rests on it."""

    def start(self, stage: str, inputs_digest: str, *, yields: bool) -> None:
        """Begin; where it has begun, nothing. A failure to begin is found by `state`.

        Args:
            yields: whether a training beside it goes first.
        """

    def state(self, stage: str, inputs_digest: str) -> tuple[Literal["absent", "running", "ended"], str]:
        """Whether it has begun here and goes on; with `ended`, why it failed, empty where it did not."""

    def close(self) -> None:
        """End what goes on. It is begun anew by the next driver."""


class NodeCounter(Protocol):
    """How many nodes a cluster has, whoever holds them now."""

    def count(self, pool: str | None, devices_per_node: int) -> int:
        """Nodes of a pool that could each hold so many devices of an attempt. `pool` None: of a cluster without pools.

        Raises Refused where this account may not see nodes; Unreachable.
        """


RunStatus = Literal["RUNNING", "FINISHED", "FAILED", "KILLED"]


@dataclass(frozen=True)
class Point:
    """One value of a metric. The same point twice is one point."""

    key: str
    value: float
    time: float
    """Unix seconds."""
    step: int = 0


@dataclass(frozen=True)
class TrackedRun:
    """A run as the tracker shows it now. `id` is the tracker's own: it may be lost and made anew."""

    id: str
    status: RunStatus
    tags: Mapping[str, str]
    params: Mapping[str, str]
    metrics: Mapping[str, float]
    """The latest value of each."""
    datasets: tuple[tuple[str, str], ...] = ()
    """(name, digest)."""
    ended: float | None = None
    """Unix seconds."""


@dataclass(frozen=True)
class ModelVersion:
    number: int
    tags: Mapping[str, str]


@dataclass(frozen=True)
class LoggedCheckpoint:
    """A checkpoint as a model of the run that made it."""

    name: str
    tags: Mapping[str, str]
    step: int
    points: Sequence[Point]
    """What was read of it."""
    dataset: tuple[str, str] | None
    """(name, digest) of what it was trained on; the run names it too."""


class Tracker(Protocol):
    """Where people look at runs (MLflow). Every method raises Unreachable; none is waited for by training."""

    url: str
    waits: bool
    """Whether a server owes an answer now. Read by another thread, as is the next."""
    answers: int
    """How many it has given."""

    def runs(self, experiment: str, tags: Mapping[str, str]) -> list[TrackedRun]:
        """Living runs that carry all these tags, oldest first. Makes the experiment where it is missing."""

    def create(self, experiment: str, name: str, tags: Mapping[str, str], start: float) -> str:
        """A new running run; its id. Not idempotent: look with `runs` before."""

    def log(
        self, run: str, *, points: Sequence[Point] = (), params: Mapping[str, str] | None = None, tags: Mapping[str, str] | None = None
    ) -> None:
        """Points first, tags last: a tag that says what was logged is there only if it is true."""

    def status(self, run: str, status: RunStatus, ended: float | None) -> None: ...

    def delete(self, run: str) -> None: ...

    def dataset(self, run: str, name: str, digest: str, source: str) -> None:
        """What a run trained on. Idempotent."""

    def artifacts(self, run: str, folder: str) -> dict[str, int]:
        """Bytes of each file under a run's artifact folder."""

    def attach(self, run: str, folder: str, path: Path) -> None:
        """Put a file into a run's artifact folder, in place of one of the same name."""

    def models(self, model: str) -> tuple[list[ModelVersion], dict[str, int]]:
        """Versions of a registered model, oldest first, and its aliases. Both empty where there is no such model."""

    def register(self, model: str, source: str, run: str, tags: Mapping[str, str]) -> int:
        """A new version, the model with it where it is missing; its number. Not idempotent: look with `models` before."""

    def alias(self, model: str, alias: str, version: int) -> None: ...

    def unregister(self, model: str, version: int) -> None: ...

    def log_checkpoint(self, experiment: str, run: str, checkpoint: LoggedCheckpoint, unique: Mapping[str, str]) -> str | None:
        """The id of the run's model with the tags `unique`, made where it is missing and completed where it is not whole. Idempotent; of
        two that were made at once the older stays. None: the tracker has no such models."""
