"""Evaluations beside a driver of this machine: a process each, `python -m orchestrator.pipelines.evaluating_beside`.

Owns that process: how it is started, how nice it is to the training, that it ends with its driver. What it does is `evaluating`'s. It
writes its answer into the ledger itself, so a driver that is killed loses nothing but the time.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from opensora import last_resort
from opensora.printable import printable
from orchestrator import modules
from orchestrator.errors import OsctlError, Refused
from orchestrator.pipelines.host import Host

NICE = 10
"""The training, which holds the devices and is billed for them, goes first: beside it, at this niceness, an evaluation gets a tenth of a
core's time that both want (Linux' weights 110 and 1024), and all that the training leaves."""
LOOK_S = 0.5
"""Seconds between two looks whether the driver still lives."""


class BesideDriver:
    """An `Evaluator` of processes on this machine."""

    def __init__(self, pipeline: str, store_url: str, host: Host) -> None:
        self._pipeline, self._store_url, self._host = pipeline, store_url, host
        self._processes: dict[tuple[str, str], subprocess.Popen[bytes]] = {}
        self._faults: dict[tuple[str, str], str] = {}

    def start(self, stage: str, inputs_digest: str, *, yields: bool) -> None:
        about = stage, inputs_digest
        if about in self._processes or about in self._faults:
            return
        words = ["--store", self._store_url, "--pipeline", self._pipeline, "--stage", stage, "--inputs", inputs_digest]
        command = modules.command(
            "orchestrator.pipelines.evaluating_beside", *words, "--launcher-pid", str(os.getpid()), *(["--yields"] if yields else [])
        )
        log = self._log(stage)
        try:
            log.parent.mkdir(parents=True, exist_ok=True)
            with log.open("wb") as output:
                self._processes[about] = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                    env=self._host.for_children(),
                    start_new_session=True,  # a Ctrl-C in the terminal is the driver's, and it ends whole
                )
        except OSError as error:
            self._faults[about] = f"{log}: {error.strerror or error}"

    def state(self, stage: str, inputs_digest: str) -> tuple[Literal["absent", "running", "ended"], str]:
        about = stage, inputs_digest
        if about in self._faults:
            return "ended", self._faults[about]
        process = self._processes.get(about)
        if process is None:
            return "absent", ""
        code = process.poll()
        if code is None:
            return "running", ""
        return "ended", "" if code == 0 else self._last_word(stage) or f"its process ended with {code}"

    def close(self) -> None:
        for process in self._processes.values():
            with contextlib.suppress(ProcessLookupError):
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def _log(self, stage: str) -> Path:
        return self._host.home / "log" / f"evaluation-{self._pipeline}-{stage}.log"

    def _last_word(self, stage: str) -> str:
        with contextlib.suppress(OSError):
            lines = self._log(stage).read_text(errors="replace").splitlines()
            return lines[-1].removeprefix("error: ") if lines else ""
        return ""


def _end_with(launcher: int) -> None:
    """Kill this process and its children once its driver is gone."""

    def watch() -> None:
        while os.getppid() == launcher:
            time.sleep(LOOK_S)
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()


def run(options: argparse.Namespace) -> None:
    """Judge one stage as the pipeline was launched last. Raises OsctlError."""
    from orchestrator.pipelines.evaluating import evaluate
    from orchestrator.pipelines.find import launched

    workspace = launched(options.pipeline, None, store=options.store, host=Host.here())
    committed = workspace.ledger.committed(options.stage, options.inputs)
    if committed is None:
        raise Refused(f"eval {options.stage}@{options.inputs}: is not committed. Make it with: osctl launch {options.stage}")

    def say(text: str) -> None:
        sys.stderr.write(f"{printable(text)}\n")
        sys.stderr.flush()

    evaluate(workspace, workspace.pipeline.stage(options.stage), committed, say)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m orchestrator.pipelines.evaluating_beside", description="Judge a committed stage.")
    for name in ("store", "pipeline", "stage", "inputs"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--launcher-pid", type=int, required=True, help="the driver, with which this ends")
    parser.add_argument("--yields", action="store_true", help="leave the machine to a training beside it")
    options = parser.parse_args(argv)
    if options.yields:
        os.nice(NICE)
    _end_with(options.launcher_pid)
    try:
        run(options)
    except OsctlError as error:
        sys.stderr.write(f"error: {printable(str(error))}\n")
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(last_resort.run("evaluation", main))
