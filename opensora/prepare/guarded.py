"""What runs inside a guard process: rows in, results out; and what a function may say to the pool while it works.

Owns the life of the process. Refuses to start one and to judge how it ended (`guard`).
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import gc
import inspect
import os
import pickle
import resource
import signal
import time
import types
from collections.abc import Callable
from multiprocessing import connection
from typing import Any

from opensora.dataset.rows import Leaves, Quarantine
from opensora.errors import ConfigError, DiskFull

FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG)
"""EFBIG: of a user's limit (ulimit -f), or a file system without large files."""

_wire: connection.Connection | None = None


def allow(seconds: float) -> None:
    """From within a function: the row may take so many seconds more, from now on. Outside a guard it does nothing."""
    if _wire is not None:
        _wire.send_bytes(pickle.dumps(("allow", seconds, 0.0, 0.0)))


def tell(content: object) -> None:
    """From within a function: what is known already, for the case that the rest of the row is lost (`Lost.told`)."""
    if _wire is not None:
        _wire.send_bytes(pickle.dumps(("tell", content, 0.0, 0.0)))


def serve(wire: connection.Connection) -> None:
    """A guard's life: rows in, results out."""
    global _wire
    _alone(wire)
    gc.freeze()  # a collection would touch, and so copy, every page that the fork server shares
    _wire = wire
    wire.send_bytes(pickle.dumps(("ready", None, 0.0, 0.0)))
    while True:
        try:
            data = wire.recv_bytes()
        except (EOFError, OSError):
            os._exit(0)
        for function, row in _rows(data):
            answer = _answer(function, row)
            try:
                wire.send_bytes(answer)
            except OSError:
                os._exit(0)


def _rows(data: bytes) -> list[tuple[Callable[[Any], object], Any]]:
    """Of one message: a function, and the rows that it is called with. Where they cannot be read, each of them says so."""
    many, content = pickle.loads(data)  # noqa: S301 - our own process sent it
    try:
        function, rows = pickle.loads(content)  # noqa: S301
    except Exception as error:  # noqa: BLE001 - an import of the function's module may fail as it likes
        return [(_raise, error)] * many
    return [(function, row) for row in rows]


def _raise(error: Exception) -> None:
    raise error


def _answer(function: Callable[[Any], object], row: Any) -> bytes:
    """(kind, content, CPU-seconds, seconds)"""
    began, cpu_began = time.perf_counter(), time.process_time()
    kind, content = _worked(function, row)
    used = time.process_time() - cpu_began, time.perf_counter() - began
    try:
        return pickle.dumps((kind, content, *used))
    except Exception as error:  # noqa: BLE001 - of a row's own objects
        return pickle.dumps(("done", Quarantine("fault", f"its result cannot be sent: {type(error).__name__}: {error}"), *used))


def _worked(function: Callable[[Any], object], row: Any) -> tuple[str, object]:
    """`done` and a result or Leaves; `stop` and an error that is about all rows."""
    try:
        return "done", function(row)
    except Leaves as leaves:
        return "done", leaves
    except (ConfigError, DiskFull) as error:
        return "stop", error
    except MemoryError as error:
        return "done", Quarantine("needs too much memory", str(error))
    except OSError as error:
        if error.errno in FULL_DISK:
            return "stop", DiskFull(f"{error.filename or 'a file'}: {error.strerror}. Make room, and run again: what is done stays")
        return "done", _unforeseen(error)
    except Exception as error:  # noqa: BLE001 - one row's
        return "done", _unforeseen(error)


def _unforeseen(error: Exception) -> Quarantine:
    frame: types.TracebackType | None = error.__traceback__
    while frame is not None and frame.tb_next is not None:
        frame = frame.tb_next
    where = f" ({inspect.getfile(frame.tb_frame).rpartition('/')[2]}, line {frame.tb_lineno})" if frame is not None else ""
    return Quarantine(f"unforeseen {type(error).__name__}", f"{error}{where}"[:500])


def _alone(wire: connection.Connection) -> None:
    """Die with the fork server; be killed before the engine where memory ends; leave no core; hear no key of the terminal.

    All descriptors but the wire are closed: among them is one by which the fork server would wait for its children to end (Python 3.11).
    """
    os.closerange(3, wire.fileno())
    os.closerange(wire.fileno() + 1, resource.getrlimit(resource.RLIMIT_NOFILE)[0])
    parent = os.getppid()
    ctypes.CDLL(None, use_errno=True).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:
        os._exit(0)
    os.setsid()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:  # noqa: PTH123
        file.write("1000")
    quiet = os.open(os.devnull, os.O_RDWR)  # decoders write pages about broken files
    for stream in (0, 1, 2):
        os.dup2(quiet, stream)
