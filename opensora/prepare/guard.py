"""A pool of guard processes: functions over rows of which one may crash, hang or eat memory, and cost that row alone.

Owns the processes: when one starts and ends, its deadline, its memory limit, and what is said of a row that was lost with it. Refuses to
know steps, files and engines, so that any engine can use it.

A guard is forked by the standard library's fork server, which has imported the libraries of the steps once: a fork takes milliseconds where
a new interpreter takes 0.3 s of CPU. Guards end with the process that uses them, even when that one is killed: the fork server sees the
end of a pipe and leaves, and the kernel then kills its children (PR_SET_PDEATHSIG).

Memory is measured: the engine reads each guard's resident set every 50 ms and kills what is above the limit. RLIMIT_AS was tried and left:
it counts what a library maps (torch alone 3.4 GB, of which it uses 0.6), and where it is met, C code that does not check malloc crashes, so
that the same row leaves with another reason on each machine.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import resource
import selectors
import signal
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing import connection, get_context
from multiprocessing.context import ForkServerProcess
from typing import Any, NamedTuple

from opensora.dataset.prepare_config import Limits
from opensora.dataset.rows import Leaves
from opensora.errors import TrainerError
from opensora.prepare.guarded import serve
from opensora.prepare.pool import Later, Lost, Result, Row

RENEW_AFTER = 1000
"""Rows that one guard works on; what libraries leak ends with it. A new guard costs 25 ms of CPU."""
BATCH, BATCH_S = 32, 0.02
"""Rows that are sent to a guard at once: as many as it works on in so many seconds. Each is answered by itself, so that a guard that dies
costs the one row that it was working on. Of rows of no work (0.2 ms) one by one costs three times the CPU of 32 at once."""
POLL_S = 0.05
"""Between two looks at deadlines and memory."""
PRELOADED = ("numpy", "av", "cv2", "PIL.Image", "opensora.prepare.guarded")
"""What the fork server imports in any case. None of them starts threads by that."""
STARTS = 5
"""Tries to start a guard."""
START_PAUSE_S = 0.1
START_S = 120
"""For a guard to start. On a machine with much else to do the fork server's imports may take so long."""
SERVER_GONE = 255
"""Exit code that the standard library gives to the children of a fork server that was killed itself."""


class GuardFault(TrainerError):
    """Guards do not start: their environment is broken, not a row."""


class _Given(NamedTuple):
    """A row on its way."""

    row: Any
    seconds: float
    """Until its deadline."""
    retried: bool


@dataclass
class _Worker:
    process: ForkServerProcess
    wire: connection.Connection
    rows: int = 0
    """Worked on."""
    given: deque[_Given] = field(default_factory=deque)
    """Not answered yet. It works on the first."""
    ready: bool = False
    """Whether it has started: a deadline counts from then on."""
    told: list[Any] = field(default_factory=list)
    deadline: float = 0.0
    allowed_s: float = 0.0
    cpu_s: float = 0.0

    @property
    def busy(self) -> bool:
        return bool(self.given)

    def begins(self, now: float) -> None:
        """The first row's time counts from now on."""
        self.told = []
        self.allowed_s = self.given[0].seconds
        self.deadline = now + (self.allowed_s if self.ready else START_S)


class Guards:
    """A context manager. Guards are started by need, at most `workers` at a time."""

    def __init__(
        self,
        workers: int,
        limits: Limits,
        *,
        halt: Callable[[], bool] = lambda: False,
        renew_after: int = RENEW_AFTER,
        preload: Sequence[str] = (),
    ) -> None:
        """
        Args:
            limits: memory_gb is kept to; deadlines are given with the rows.
            halt: when it turns true no further row is begun; those in work are finished.
            preload: modules of the functions, so that they are imported once and not in each guard. The process's first pool counts.
        """
        self._limit, self._memory_gb = int(limits.memory_gb * 1e9), limits.memory_gb
        self._halt, self._most, self._renew_after = halt, workers, renew_after
        self._workers: list[_Worker] = []
        self._selector = selectors.DefaultSelector()
        self._pace_s: dict[str, float] = {}
        """Seconds that a row took lately, by the function's name."""
        self._context = get_context("forkserver")
        self._context.set_forkserver_preload([*PRELOADED, *preload])
        self.cpu_s: dict[str, float] = defaultdict(float)
        """CPU-seconds of guards, by the function's name."""
        self.shares_files = True
        self.chain = None
        self.on_tell: Callable[[Any], None] = lambda content: None
        """Hears what functions tell (`guarded.tell`), at once."""

    def __enter__(self) -> Guards:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End all guards, whatever they do."""
        self.empty()
        self._selector.close()

    def empty(self) -> None:
        """The same, but the pool goes on: new ones are started by need."""
        for worker in self._workers:
            self._end(worker)
        self._workers.clear()

    def pids(self) -> tuple[int, ...]:
        return tuple(worker.process.pid for worker in self._workers if worker.process.pid is not None)

    def map(
        self, function: Callable[[Row], Result], rows: Iterable[Row | Later], deadline_s: float | Callable[[Row], float]
    ) -> Iterator[tuple[Row, Result | Leaves]]:
        """As `Pool.map` says. A row whose guard somebody else killed (the kernel, short of memory, does so) is tried once more."""
        given, again, looked = iter(rows), deque[_Given](), time.monotonic()
        seconds_of = deadline_s if callable(deadline_s) else lambda row: deadline_s
        name, more, waits = function.__name__, True, False
        try:
            while True:
                waits = False
                while (again or (more and not waits)) and not self._halt() and (worker := self._free()) is not None:
                    some, more, waits = ([again.popleft()], more, waits) if again else self._taken(given, seconds_of, worker, name)
                    if some:
                        self._send(worker, function, some)
                busy = [worker for worker in self._workers if worker.busy]
                if not busy and (self._halt() or not (more or again)):
                    return
                if not busy:
                    time.sleep(POLL_S)
                for worker in self._heard() if busy else ():
                    yield from self._answers(worker, name, again)
                if (now := time.monotonic()) - looked >= POLL_S:
                    looked = now
                    for worker in busy:
                        if worker.busy and not worker.wire.poll() and (lost := self._over(worker, now, name, again)) is not None:
                            yield lost
        finally:
            for worker in [one for one in self._workers if one.busy]:  # whoever asked for the rows went away
                self._drop(worker)

    def _taken(
        self, given: Iterator[Any], seconds_of: Callable[[Any], float], worker: _Worker, name: str
    ) -> tuple[list[_Given], bool, bool]:
        """The next rows for a guard, whether there may be more, and whether these come later."""
        some: list[_Given] = []
        most = min(BATCH, self._renew_after - worker.rows, int(BATCH_S / max(self._pace_s.get(name, BATCH_S), 1e-6)))
        while len(some) < max(most, 1) and not (some and self._halt()):
            row = next(given, _NONE)
            if row is _NONE:
                return some, False, False
            if isinstance(row, Later):
                return some, True, True
            some.append(_Given(row, seconds_of(row), False))
        return some, True, False

    def _heard(self) -> list[_Worker]:
        """Guards that have said something, or have died."""
        return [key.data for key, _ in self._selector.select(POLL_S)]

    def _free(self) -> _Worker | None:
        for worker in self._workers:
            if not worker.busy:
                return worker
        return self._started() if len(self._workers) < self._most else None

    def _started(self) -> _Worker:
        """A new guard. The fork server may be killed as any process may: then the library starts another one. Raises GuardFault."""
        for number in range(1, STARTS + 1):
            ours, theirs = self._context.Pipe()
            process = self._context.Process(target=serve, args=(theirs,), daemon=True)
            try:
                process.start()
            except (OSError, EOFError) as error:
                ours.close()
                if number == STARTS:
                    raise GuardFault(f"a guard process cannot be started: {error or type(error).__name__}") from error
                time.sleep(START_PAUSE_S * number)  # the library starts another server once the kernel says that this one has ended
                continue
            finally:
                theirs.close()
            self._workers.append(_Worker(process, ours))
            self._selector.register(ours, selectors.EVENT_READ, self._workers[-1])
            break
        return self._workers[-1]

    def _send(self, worker: _Worker, function: Callable[..., Any], some: Sequence[_Given]) -> None:
        worker.given.extend(some)
        worker.rows += len(some)
        worker.begins(time.monotonic())
        with contextlib.suppress(OSError):  # it has died since its last row: reading its wire tells
            worker.wire.send_bytes(pickle.dumps((len(some), pickle.dumps((function, [one.row for one in some])))))

    def _answers(self, worker: _Worker, name: str, again: deque[_Given]) -> Iterator[tuple[Any, Any]]:
        """One message of a guard; of a dead one, the rows that it had not begun go to `again`."""
        try:
            kind, content, cpu_s, seconds = pickle.loads(worker.wire.recv_bytes())  # noqa: S301 - a child of ours wrote it
        except (EOFError, OSError):
            if not worker.busy:
                self._drop(worker)
            else:
                row = worker.given[0].row
                if (lost := self._died(worker, name, again)) is not None:
                    yield row, lost
            return
        if kind in ("done", "stop"):
            row = worker.given[0].row
            self._is_done(worker, name, cpu_s, seconds)
            if kind == "stop":
                raise content
            yield row, content
        elif kind == "ready":
            worker.ready, worker.deadline = True, time.monotonic() + worker.allowed_s
        elif kind == "allow":
            worker.allowed_s, worker.deadline = content, time.monotonic() + content
        else:
            worker.told.append(content)
            self.on_tell(content)

    def _is_done(self, worker: _Worker, name: str, cpu_s: float, seconds: float) -> None:
        """A guard's first row."""
        self.cpu_s[name] += cpu_s
        worker.cpu_s += cpu_s
        self._pace_s[name] = max(seconds, 0.9 * self._pace_s.get(name, 0.0) + 0.1 * seconds)
        worker.given.popleft()
        if worker.busy:
            worker.begins(time.monotonic())
        elif worker.rows >= self._renew_after:
            self._drop(worker)

    def _died(self, worker: _Worker, name: str, again: deque[_Given]) -> Lost | None:
        """What is said of the row; None where it is tried once more."""
        self._count(worker, name)
        worker.process.join(5)
        code, one = worker.process.exitcode, worker.given.popleft()
        told = worker.told
        again.extend(worker.given)
        self._drop(worker)
        if code in (-signal.SIGKILL, -signal.SIGTERM, SERVER_GONE):
            if not one.retried:
                again.append(one._replace(retried=True))
                return None
            return _lost(told, "killed from outside", "twice, as the kernel does when memory ends")
        if code is not None and code < 0:
            return _lost(told, f"crash ({signal.Signals(-code).name})", "the decoder or a library crashed")
        return _lost(told, "its process ended", f"with exit code {code}")

    def _over(self, worker: _Worker, now: float, name: str, again: deque[_Given]) -> tuple[Any, Lost] | None:
        """A guard's row, and what is said of it, if the guard is over its time or memory; then that guard is killed."""
        used = resident(worker.process.pid)
        if now < worker.deadline and used <= self._limit:
            return None
        self._count(worker, name)
        one, told = worker.given.popleft(), worker.told
        again.extend(worker.given)
        self._drop(worker)
        if used > self._limit:
            return one.row, _lost(told, "needs too much memory", f"{used / 1e9:.1f} GB, limits.memory_gb is {self._memory_gb:g}")
        detail = f"no result after {worker.allowed_s:g} s (limits.deadline_s, limits.deadline_per_s)"
        return one.row, _lost(told, "takes too long", detail)

    def _count(self, worker: _Worker, name: str) -> None:
        self.cpu_s[name] += max(0.0, _cpu_s(worker.process.pid) - worker.cpu_s)

    def _drop(self, worker: _Worker) -> None:
        self._end(worker)
        worker.given.clear()
        with contextlib.suppress(ValueError):
            self._workers.remove(worker)

    def _end(self, worker: _Worker) -> None:
        with contextlib.suppress(KeyError, ValueError):
            self._selector.unregister(worker.wire)
        worker.wire.close()
        if worker.process.is_alive():
            worker.process.kill()
        worker.process.join()
        worker.process.close()


_NONE = object()


def _lost(told: Sequence[Any], reason: str, detail: str) -> Lost:
    lost = Lost(reason, detail)
    lost.told = tuple(told)
    return lost


def resident(pid: int | None) -> int:
    """Bytes; 0 of a process that is gone."""
    try:
        with open(f"/proc/{pid}/statm", "rb") as file:  # noqa: PTH123 - twenty times a second for each guard
            return int(file.read().split()[1]) * resource.getpagesize()
    except (OSError, IndexError):
        return 0


def _cpu_s(pid: int | None) -> float:
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:  # noqa: PTH123
            fields = file.read().rpartition(b")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK") if len(fields) > 12 else 0.0
