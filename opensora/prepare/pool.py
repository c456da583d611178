"""The port of an engine: who calls the functions of steps over rows, and where.

Owns what each engine promises to the phases. `guard.Guards` keeps it on this machine (inline), `ray.pool.RayPool` on Ray. Refuses to know
steps, rows and results.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Final, Protocol, TypeVar

from opensora.dataset.rows import Leaves, Quarantine

Row = TypeVar("Row")
Result = TypeVar("Result")


class Later:
    """What an iterator of rows yields when it has none ready yet: the pool looks after its processes and asks again."""


LATER: Final = Later()


class Lost(Quarantine):
    """The process that worked on this row died."""

    told: tuple[Any, ...] = ()
    """What the function had told (`guarded.tell`) before."""


@dataclass(frozen=True)
class Handed:
    """What the first function of a chain gives."""

    kept: Any
    """Comes back with the row."""
    onward: Any
    """A row of the second function; None: there is nothing for it to do."""


class Chain(Protocol):
    """Two functions one after the other, each with processes of its own: rows stream from the one to the other."""

    def chained(
        self, first: Callable[[Any], Handed], then: Callable[[list[Any]], list[Any]], rows: Iterable[Any],
        deadline_s: Callable[[Any], float], then_s: float,
    ) -> Iterator[tuple[Any, tuple[Any, Any]]]:  # fmt: skip
        """Each row with (what `first` kept of it or Leaves, what `then` made of it, Leaves or None).

        Otherwise as `Pool.map` says. Once the run is to leave, rows that wait for `then` come back without it. `then` is called with all
        rows that wait for it, up to a batch. When it crashes or hangs over several rows each of them is tried alone, so that the one at
        fault leaves alone.

        Args:
            deadline_s: of a row in `first`.
            then_s: of one call of `then`, in seconds.
        """


class Pool(Protocol):
    """A context manager; leaving it ends all its processes."""

    @property
    def chain(self) -> Chain | None:
        """None: models run in this process, one step after the other."""

    on_tell: Callable[[Any], None]
    """Hears what functions tell (`guarded.tell`)."""

    @property
    def shares_files(self) -> bool:
        """Whether functions see the files of this process. Where they do not, rows carry what a source is fetched by (`elsewhere`)."""

    @property
    def cpu_s(self) -> Mapping[str, float]:
        """CPU-seconds of the rows, by the function's name."""

    def map(
        self, function: Callable[[Row], Result], rows: Iterable[Row | Later], deadline_s: float | Callable[[Row], float]
    ) -> Iterator[tuple[Row, Result | Leaves]]:
        """Each row with what `function` made of it, in the order in which they are ready. Few rows are held at a time.

        A row leaves as Quarantine when it crashes, hangs beyond `deadline_s` (which the function itself may prolong, see `guarded.allow`),
        or needs more than `limits.memory_gb`; when the function raises Leaves; and when it raises anything unforeseen. A row whose process
        was killed from outside is tried again, a bounded number of times. Once the run is to leave, no further row is begun, and those in
        work are finished.

        Args:
            function: of a module, so that it can be sent by its name.
            rows: taken when there is room for one. May yield LATER.

        Raises:
            ConfigError: the function raised it: it is about all rows.
            DiskFull: the function could not write.
            TrainerError: no row can be worked on.
        """

    def empty(self) -> None:
        """End its processes, with the models that they have loaded; the pool goes on, new ones are started by need."""

    def close(self) -> None:
        """End all its processes, whatever they do."""

    def __enter__(self) -> Pool: ...

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None: ...
