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
from typing import Any, Protocol

from opensora.dataset.prepare_config import Download
from opensora.dataset.rows import Leaves
from opensora.errors import TrainerError
from opensora.prepare.elsewhere import Back, Fetch, There, there
from opensora.prepare.pool import Later, Lost, Result, Row
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


class Opened(Protocol):
    def __call__(self, *, gpu: bool) -> Stream: ...


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


@dataclass
class _Flying:
    row: Any
    sent: Sent
    alone: int = 0
    """Times that Ray was lost over it while it was alone."""


class RayPool:
    def __init__(
        self, opened: Opened, actors: int, halt: Callable[[], bool], on_gpu: Container[str] = (), away: Away | None = None
    ) -> None:  # fmt: skip
        """
        Args:
            opened: starts Ray, and gives the stream to it.
            on_gpu: names of functions whose actors hold a GPU. They are other actors than those of the rest.
            away: None: actors see the files of this process.
        """
        self._away, self.shares_files = away, away is None
        self._opened, self._actors, self._halt, self._on_gpu = opened, actors, halt, on_gpu
        self._is_on_gpu = False
        self._stream: Stream | None = None
        self._number = 0
        self._fruitless, self._put_aside = 0, 0
        self._lately = deque[float](maxlen=MOST // 2)
        """When rows were answered."""
        self.cpu_s: dict[str, float] = defaultdict(float)
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
        given, flying, again = iter(rows), dict[int, _Flying](), deque[_Flying]()
        seconds_of = deadline_s if callable(deadline_s) else lambda row: deadline_s
        more, waits = True, False
        self._begin(gpu=function.__name__ in self._on_gpu)
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
                        one = _Flying(one, Sent(self._number, seconds_of(one), self._packed(function, one)))
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
                    yield self._answered(answer, flying, function.__name__)
        finally:
            if flying and self._stream is not None:  # whoever asked for the rows went away
                self._stream.kill()
                self._stream = None

    def _begin(self, *, gpu: bool) -> None:
        if gpu != self._is_on_gpu:
            self.empty()
            self._is_on_gpu = gpu

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
        return min(MOST, max(AHEAD * self._actors, sum(moment > since for moment in self._lately)))

    def _exchanged(self, some: list[Sent]) -> list[Answer]:
        """Send these rows; what has been answered meanwhile. Raises StreamLost."""
        if self._stream is None:
            self._stream = self._opened(gpu=self._is_on_gpu)
        if some:
            self._stream.send(some)
        answers = self._stream.answers(POLL_S)
        for told in self._stream.told():
            self.on_tell(told)
        return answers

    def _answered(self, answer: Answer, flying: dict[int, _Flying], name: str) -> tuple[Any, Any]:
        self._fruitless = self._put_aside = 0
        self._lately.append(time.monotonic())
        self.cpu_s[name] += answer.cpu_s
        one = flying.pop(answer.number)
        kind, content = pickle.loads(answer.content)  # noqa: S301 - an actor of ours wrote it
        if kind == "stop":
            raise content
        ended, told = content
        if isinstance(ended, Lost):
            ended.told = told
        if isinstance(ended, Back):
            if ended.data is not None:
                Path(one.row.to).write_bytes(ended.data)
            ended = ended.result
        return one.row, ended

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
