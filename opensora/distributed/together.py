"""A command on several devices of this machine: one process is typed, the others start beside it.

Owns how they are started and how they end: with the first one, whatever it does. The first one keeps the terminal and its exit code; the
others say nothing, unless one of them ends alone. torchrun was not taken: of a prompt with an unknown word it makes forty lines of its own.

Refuses to know what the ranks do.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import IO

import torch

from opensora.distributed.ranks import PEER_LOST, Ranks, join
from opensora.errors import ConfigError

MOST_DEVICES = 64
GRACE_S = 10.0
"""How long the first rank may go on after another one has failed: most likely it fails as well, and says why."""


@contextmanager
def ranks_of_this_machine(devices: int, module: str, argv: Sequence[str]) -> Iterator[Ranks]:
    """This process as one of `devices` ranks; as the only one, if that is 1. Under torchrun the launcher's ranks.

    Args:
        module: `python -m module argv` is what the other ranks run.

    Raises:
        ConfigError: there are not so many devices.
    """
    if "WORLD_SIZE" in os.environ:
        with join() as ranks:
            yield ranks
        return
    if devices == 1:
        yield Ranks(0, 1, torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu"))
        return
    most = torch.cuda.device_count() if torch.cuda.is_available() else MOST_DEVICES
    if not 1 <= devices <= most:
        kind = "CUDA devices are visible" if torch.cuda.is_available() else "processes on a CPU"
        raise ConfigError(f"devices {devices}: not from 1 to {most} ({kind}); ask for as many at most")
    with ExitStack() as stack:
        shared = {"WORLD_SIZE": str(devices), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
        stack.callback(_restore, {name: os.environ.get(name) for name in (*shared, "RANK", "LOCAL_RANK")})
        os.environ |= shared | {"RANK": "0", "LOCAL_RANK": "0"}
        for rank in range(1, devices):
            stack.enter_context(_beside(rank, [sys.executable, "-m", module, *argv]))
        yield stack.enter_context(join())


@contextmanager
def _beside(rank: int, command: Sequence[str]) -> Iterator[None]:
    said: IO[bytes]
    with tempfile.TemporaryFile() as said:
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        process = subprocess.Popen(command, env=os.environ | place, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=said)
        over = threading.Event()
        watcher = threading.Thread(target=_watch, args=(rank, process, said, over), daemon=True)
        watcher.start()
        try:
            yield
        finally:
            over.set()
            process.terminate()
            process.wait()
            watcher.join()


def _watch(rank: int, process: subprocess.Popen[bytes], said: IO[bytes], over: threading.Event) -> None:
    """End this process if another rank fails and this one does not: over NCCL it would wait for minutes."""
    if process.wait() in (0, PEER_LOST) or over.wait(GRACE_S):
        return
    said.seek(0)
    words = said.read().decode(errors="replace").strip().splitlines()
    sys.stderr.write(f"error: rank {rank} ended with {process.returncode}: {words[-1] if words else 'it said nothing'}\n")
    sys.stderr.flush()
    os._exit(1)


def _restore(environment: dict[str, str | None]) -> None:
    for name, value in environment.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
