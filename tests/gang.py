"""Several ranks of one job for a test: real processes that meet over gloo on the loopback."""

from __future__ import annotations

import os
import socket
import subprocess
import sys


def start(world: int, *command: str, env: dict[str, str] | None = None) -> list[subprocess.Popen[str]]:
    """One process a rank: `python *command`, with torchrun's variables."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = os.environ | {"OMP_NUM_THREADS": "1", "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    shared |= {"LOCAL_WORLD_SIZE": str(world)} | (env or {})
    return [
        subprocess.Popen(
            [sys.executable, *command],
            env=shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(world)
    ]


def run(world: int, *command: str, env: dict[str, str] | None = None, timeout: float = 120) -> None:
    """All ranks to their end. Fails with the output of the first that did not end well."""
    processes = start(world, *command, env=env)
    try:
        outputs = [process.communicate(timeout=timeout)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    for rank, (process, output) in enumerate(zip(processes, outputs, strict=True)):
        assert process.returncode == 0, f"rank {rank} of {world} ended with {process.returncode}:\n{output}"
