"""The pool of `engine: ray`: rows go to actors of Ray Data, results come back to the one process that keeps them.

Owns which rows are answered, and what becomes of the others when an actor, a raylet, a node or Ray itself is lost: they are sent again,
a bounded number of times. Few rows are on their way at a time, so that neither this process nor Ray's object store ever holds the set.
Refuses to import ray: `driver` does, in a child process that may die.

After a failure in which no row was answered rows are sent one by one, so that a row is blamed only for what happened while it was alone.
"""

from __future__ import annotations

import logging
import pickle
import time
from collections import defaultdict, deque
from collections.abc import Callable, Container, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Protocol

from opensora.dataset.prepare_config import Download
from opensora.dataset.rows import Leaves
from opensora.errors import TrainerError
from opensora.prepare.elsewhere import Back, Fetch, There, there
from opensora.prepare.pool import Chain, Handed, Later, Lost, Result, Row
from opensora.prepare.ray.setup import Answer, Sent
from opensora.prepare.ray.stream import Stream, StreamLost

POLL_S = 0.05
AHEAD = 3
"""Rows on their way for each actor, at least: one that it works on, one that waits for it, one on its way back."""
MOST = 512
"""Rows on their way at most, where they take milliseconds."""
MOST_BYTES = 256 << 20
"""Of rows on their way, where clips' files come along."""
ALONE = 2
"""Times that Ray may be lost over a row that was alone; then it is put aside."""
STARTS = 4
"""Times in a row that Ray may be lost before any row is answered."""

log = logging.getLogger(__name__)


Kind = Literal["cpu", "gpu", "chain"]
"""Which actors a stream has: those that decode, those that hold a GPU, or the first and behind them those that hold models."""


class Opened(Protocol):
    def __call__(self, kind: Kind) -> Stream: ...


class EngineLost(TrainerError):
    """Ray cannot be started, or does not stay."""


@dataclass(frozen=True)
class Away:
    """For nodes that share no files with this process; see `elsewhere.There`."""

    fetch: Fetch
    download: Download
    max_bytes: int
    scratch: str
    most_bytes: int


@dataclass(frozen=True)
class _Work:
    function: Callable[[Any], Any]
    seconds_of: Callable[[Any], float]
    then: Callable[[list[Any]], list[Any]] | None = None
    then_s: float = 0.0


def _result(answer: bytes) -> Any:
    """Raises what is about all rows."""
    kind, content = pickle.loads(answer)  # noqa: S301 - an actor of ours wrote it
    if kind == "stop":
        raise content
    return content


@dataclass
class _Flying:
    row: Any
    sent: Sent
    alone: int = 0
    """Times that Ray was lost over it while it was alone."""


class RayPool:
    def __init__(
        self, opened: Opened, actors: int, halt: Callable[[], bool], on_gpu: Container[str] = (), away: Away | None = None,
        model_rows: int = 0,
    ) -> None:  # fmt: skip
        """
        Args:
            opened: starts Ray, and gives the stream to it.
            on_gpu: names of functions whose actors hold a GPU. They are other actors than those of the rest.
            away: None: actors see the files of this process.
            model_rows: that actors with models may have at a time, all together; 0: there are none.
        """
        self.chain: Chain | None = self if model_rows else None
        self._model_rows = model_rows
        self._away, self.shares_files = away, away is None
        self._opened, self._actors, self._halt, self._on_gpu = opened, actors, halt, on_gpu
        self._kind: Kind = "cpu"
        self._stream: Stream | None = None
        self._leaving: Stream | None = None
        """The stream whose models know that the run is to leave."""
        self._number = 0
        self._fruitless, self._put_aside = 0, 0
        self._lately = deque[float](maxlen=MOST // 2)
        """When rows were answered."""
        self.cpu_s: dict[str, float] = defaultdict(float)
        self.busy_s: dict[str, float] = defaultdict(float)
        """Seconds that actors with models worked, by the function's name."""
        self.on_tell: Callable[[Any], None] = lambda content: None
        self.spilled = 0
        """Bytes that Ray's object stores had no room for."""

    def __enter__(self) -> RayPool:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        self.empty()

    def empty(self) -> None:
        if self._stream is not None:
            stream, self._stream = self._stream, None
            self.spilled += stream.end()
            if self.spilled:
                log.info("ray: %s bytes did not fit into the object store and lay on disk (ray.object_store_gb)", f"{self.spilled:,}")

    def map(
        self, function: Callable[[Row], Result], rows: Iterable[Row | Later], deadline_s: float | Callable[[Row], float]
    ) -> Iterator[tuple[Row, Result | Leaves]]:
        """As `Pool.map` says. Rows that wait while no actor is there are not begun. Raises EngineLost."""
        seconds_of = deadline_s if callable(deadline_s) else lambda row: deadline_s
        self._begin("gpu" if function.__name__ in self._on_gpu else "cpu")
        yield from self._mapped(_Work(function, seconds_of), rows)

    def chained(
        self, first: Callable[[Any], Handed], then: Callable[[list[Any]], list[Any]], rows: Iterable[Any],
        deadline_s: Callable[[Any], float], then_s: float,
    ) -> Iterator[tuple[Any, tuple[Any, Any]]]:  # fmt: skip
        """As `Chain.chained` says. Raises EngineLost."""
        self._begin("chain")
        began, before = time.monotonic(), self.busy_s[then.__name__]
        for row, ended in self._mapped(_Work(first, deadline_s, then, then_s), rows):
            yield row, ended if isinstance(ended, tuple) else (ended, None)
        if (busy_s := self.busy_s[then.__name__] - before) > 0:
            log.info("ray: models worked for %.0f s, all actors together; the stream took %.0f s", busy_s, time.monotonic() - began)

    def _mapped(self, work: _Work, rows: Iterable[Any]) -> Iterator[tuple[Any, Any]]:
        given, flying, again = iter(rows), dict[int, _Flying](), deque[_Flying]()
        more, waits = True, False
        try:
            while True:
                waits, some = False, []
                while (again or (more and not waits)) and not self._halt() and len(flying) < self._room(flying):
                    one = again.popleft() if again else next(given, None)
                    if one is None or isinstance(one, Later):
                        more, waits = more and one is not None, True
                        continue
                    if not isinstance(one, _Flying):
                        self._number += 1
                        one = _Flying(one, self._sent(work, one))
                    flying[one.sent.number] = one
                    some.append(one.sent)
                if not flying and (self._halt() or not (more or again)):
                    return
                if not flying:
                    time.sleep(POLL_S)
                    continue
                if self._halt() and not (self._stream is not None and self._stream.works):
                    log.info("ray: leaves; no worker is there to take the %d rows that wait", len(flying))
                    return
                try:
                    answers = self._exchanged(some)
                except StreamLost as error:
                    yield from self._lost(error, flying, again)
                    continue
                for answer in answers:
                    yield self._answered(answer, flying, work)
        finally:
            if flying and self._stream is not None:  # whoever asked for the rows went away
                self._stream.kill()
                self._stream = None

    def _begin(self, kind: Kind) -> None:
        if kind != self._kind:
            self.empty()
            self._kind = kind

    def _sent(self, work: _Work, row: Any) -> Sent:
        then = pickle.dumps(work.then) if work.then is not None else b""
        return Sent(self._number, work.seconds_of(row), self._packed(work.function, row), then, work.then_s)

    def _packed(self, function: Callable[[Any], Any], row: Any) -> bytes:
        """Pickled (function, row). Of a clip's file its bytes come along where nodes share no files; of a source its address."""
        if self._away is None:
            return pickle.dumps((function, row))
        data = None if hasattr(row, "source") else Path(row.path).read_bytes()
        return pickle.dumps((there, There(function, row, data, **vars(self._away))))

    def _room(self, flying: dict[int, _Flying]) -> int:
        """Rows that may be on their way: as many as were answered in the last two seconds, of MOST_BYTES in all."""
        if self._fruitless > 1 or sum(len(one.sent.content) for one in flying.values()) > MOST_BYTES:
            return 1
        since = time.monotonic() - 2
        least = AHEAD * self._actors + (self._model_rows if self._kind == "chain" else 0)
        return min(max(MOST, least), max(least, sum(moment > since for moment in self._lately)))

    def _exchanged(self, some: list[Sent]) -> list[Answer]:
        """Send these rows; what has been answered meanwhile. Raises StreamLost."""
        if self._stream is None:
            self._stream = self._opened(self._kind)
        if some:
            self._stream.send(some)
        if self._kind == "chain" and self._leaving is not self._stream and self._halt():
            self._leaving = self._stream
            self._stream.leave()
        answers = self._stream.answers(POLL_S)
        for told in self._stream.told():
            self.on_tell(told)
        return answers

    def _answered(self, answer: Answer, flying: dict[int, _Flying], work: _Work) -> tuple[Any, Any]:
        self._fruitless = self._put_aside = 0
        self._lately.append(time.monotonic())
        self.cpu_s[work.function.__name__] += answer.cpu_s
        one = flying.pop(answer.number)
        ended, told = _result(answer.content)
        if isinstance(ended, Lost):
            ended.told = told
        if isinstance(ended, Back):
            if ended.data is not None:
                Path(one.row.to).write_bytes(ended.data)
            ended = ended.result
        if work.then is None:
            return one.row, ended
        self.cpu_s[work.then.__name__] += answer.then_cpu_s
        self.busy_s[work.then.__name__] += answer.busy_s
        return one.row, (ended, _result(answer.then) if answer.then else None)

    def _lost(self, error: StreamLost, flying: dict[int, _Flying], again: deque[_Flying]) -> Iterator[tuple[Any, Any]]:
        """What was on its way is sent again, or put aside. Raises EngineLost."""
        stream, self._stream = self._stream, None
        began = stream is not None and stream.ready
        if stream is not None:
            stream.kill()
        alone = began and len(flying) == 1 and self._fruitless > 1
        self._fruitless += 1
        log.info("ray: %s. %s started again for %d rows", error, "It is" if self._fruitless < STARTS else "It is not", len(flying))
        waiting = list(flying.values())
        flying.clear()
        if alone:
            waiting[0].alone += 1
            if waiting[0].alone >= ALONE:
                self._put_aside, self._fruitless = self._put_aside + 1, STARTS - ALONE
                if self._put_aside >= STARTS:
                    raise EngineLost(f"engine ray: lost over each of {STARTS} rows in a row: {error}")
                yield waiting[0].row, Lost("killed from outside", f"Ray was lost over it {ALONE} times: {error}")
                return
        again.extendleft(reversed(waiting))
        if self._fruitless > STARTS:
            raise EngineLost(f"engine ray: lost {STARTS} times in a row before any row was done: {error}")
