"""Encoding in a process of its own: torch and the encoders stay out of the engine, and a crash there is told as what it is.

Owns that process. Refuses to know what is encoded (`steps.encode`).
"""

from __future__ import annotations

import ctypes
import os
import signal
import threading
import traceback
from collections.abc import Callable, Mapping
from multiprocessing import connection, get_context
from pathlib import Path
from typing import Any

from opensora.errors import ConfigError, DataError, DiskFull, OutOfMemory, TrainerError
from opensora.last_resort import said
from opensora.prepare import devices
from opensora.prepare.guarded import FULL_DISK

Encode = Callable[[Path, Mapping[str, Path], Callable[[int, int], None]], None]
LOOK_S = 0.2
_KINDS: Mapping[str, type[TrainerError]] = {one.kind: one for one in (ConfigError, DataError, DiskFull, OutOfMemory)}


def encode_apart(
    encode: Encode,
    out: Path,
    stages: Mapping[str, Path],
    progress: Callable[[int, int], None],
    halt: Callable[[], bool],
    on_device: Callable[[devices.Device], None] = lambda device: None,
) -> bool:
    """Whether it came to its end; False: it was asked to leave. What is encoded already stays in `out`.

    Args:
        on_device: told of a CUDA device within LOOK_S of the encoders' being put on it. It is held until this returns.

    Raises:
        TrainerError: of the kind that the process raised.
    """
    context = get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_run, args=(theirs, encode, out, dict(stages), os.getpid()), name="encode")
    process.start()
    theirs.close()
    try:
        while True:
            if halt():
                return False
            if not ours.poll(LOOK_S):
                continue
            try:
                kind, *content = ours.recv()
            except EOFError:
                process.join()
                raise TrainerError(f"encode: its process ended with exit code {process.exitcode}. Run again: what is done stays") from None
            if kind == "progress":
                progress(*content)
            elif kind == "device":
                on_device(content[0])
            elif kind == "done":
                return True
            else:
                raise _KINDS.get(kind, TrainerError)(content[0])
    finally:
        ours.close()
        if process.is_alive():
            process.terminate()
            process.join(5)
        if process.is_alive():
            process.kill()
        process.join()
        process.close()


def _run(wire: connection.Connection, encode: Encode, out: Path, stages: Mapping[str, Path], parent: int) -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:
        os._exit(0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    lock, ended = threading.Lock(), threading.Event()

    def send(*message: Any) -> None:
        with lock:
            wire.send(message)

    threading.Thread(target=_tell_device, args=(send, ended), daemon=True, name="device").start()
    try:
        encode(out, stages, lambda done, total: send("progress", done, total))
        send("done")
    except TrainerError as error:
        send(error.kind, str(error))
    except Exception as error:  # noqa: BLE001 - it is told on the other side
        if isinstance(error, OSError) and error.errno in FULL_DISK:
            send(DiskFull.kind, f"{error.filename or out}: {error.strerror}. Make room, and run again: what is done stays")
            return
        if os.environ.get("OSCTL_TRACEBACK", "") not in ("", "0"):
            traceback.print_exception(error)
        send("code", f"encode: {said(error)}")
    finally:
        ended.set()


def _tell_device(send: Callable[..., None], ended: threading.Event) -> None:
    """Which encoder is put on a GPU, and when, is theirs to know; that this process has something there, torch says."""
    while not ended.wait(LOOK_S):
        if devices.in_use():
            send("device", devices.here())
            return
