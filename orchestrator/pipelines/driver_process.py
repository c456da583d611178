"""A driver in a process of its own, on this machine: what `orchestrator.api` starts where `osctl launch` would drive by itself.

    python -m orchestrator.pipelines.driver_process

stdin is one JSON object: the store, the resolved pipeline, the stages, whether MLflow is kept up to date. stdout is one JSON object a
line: `{"driving": true}` once the lease is held, and `{"exit_code": …, "reason": …}` at the end. stderr is the log. SIGINT, SIGTERM
and SIGHUP ask it to save and stop, as they ask `osctl launch`. It goes on when the process that started it ends.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as NotYet
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING, Any

from orchestrator import modules
from orchestrator.errors import OsctlError, Refused, RunFailed, Unreachable, UsageError

if TYPE_CHECKING:
    from orchestrator.ledger.records import Event
    from orchestrator.pipelines.launch import Prepared

BY_CODE: Mapping[int, type[OsctlError]] = {error.exit_code: error for error in (UsageError, RunFailed, Refused, Unreachable)}


@dataclass(frozen=True)
class End:
    """How a driver has ended."""

    exit_code: int
    """0 succeeded · 1 expected failure · 2 usage · 3 a stage failed · 4 refused · 5 unreachable · 6 a fault of osctl · 130 stopped."""
    reason: str

    def check(self) -> None:
        """Raises the error that the driver ended with, where it is one of the caller's to act on: UsageError, Refused, Unreachable."""
        if self.exit_code not in (0, RunFailed.exit_code, 130):
            raise BY_CODE.get(self.exit_code, OsctlError)(self.reason)


class DriverProcess:
    """The process, seen from the one that started it. Safe to wait for in several threads."""

    def __init__(self, process: subprocess.Popen[str], log: str):
        self.pid = process.pid
        self.log = log
        self._driving: Future[bool] = Future()
        self._end: Future[End] = Future()
        # Whoever forgets this object leaves no zombie: the thread waits for the process.
        threading.Thread(target=self._listen, args=(process,), name=f"waits for driver {process.pid}", daemon=True).start()

    @classmethod
    def start(cls, prepared: Prepared) -> DriverProcess:
        """Start it, and wait until it drives. Raises what the driver was refused with: Refused, Unreachable; OsctlError where it died."""
        workspace, host = prepared.workspace, prepared.host
        request = {
            "store": workspace.store_url,
            "pipeline": workspace.pipeline.model_dump(mode="json"),
            "targets": list(prepared.targets),
            "mlflow": not prepared.all_committed,
        }
        log = host.home / "log" / f"driver-{workspace.pipeline.name}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as errors:
            process = subprocess.Popen(
                modules.command("orchestrator.pipelines.driver_process"),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                env=host.for_children(),
                start_new_session=True,  # a Ctrl-C in the terminal is the caller's
                text=True,
            )
        driver = cls(process, str(log))
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError), process.stdin as out:  # one that died says so by its end
            json.dump(request, out)
        if not driver._driving.result():
            end = driver.wait()
            assert end is not None
            end.check()
        return driver

    def wait(self, timeout_s: float | None = None) -> End | None:
        """How it ended; None: it has not ended after `timeout_s` seconds."""
        try:
            return self._end.result(timeout_s)
        except NotYet:
            return None

    def _listen(self, process: subprocess.Popen[str]) -> None:
        said: dict[str, Any] = {}
        assert process.stdout is not None
        with process.stdout as lines:
            for line in lines:
                said |= parsed(line)
                if said.get("driving") and not self._driving.done():
                    self._driving.set_result(True)
        code = process.wait()
        reason = str(said.get("reason") or f"driver process {self.pid} ended with {code} and no word; its log is {self.log}")
        self._end.set_result(End(int(said.get("exit_code", code or OsctlError.exit_code)), reason))
        if not self._driving.done():
            self._driving.set_result(False)


def parsed(line: str) -> dict[str, Any]:
    """A line of such a process; empty: it is none."""
    with contextlib.suppress(ValueError):
        found = json.loads(line)
        return found if isinstance(found, dict) else {}
    return {}


def main() -> int:
    """Drive what stands on stdin; the exit code."""
    request = json.load(sys.stdin)
    say = speaker(sys.stdout)
    try:
        code, reason = drive(request, lambda: say({"driving": True}))
    except OsctlError as error:
        code, reason = error.exit_code, str(error)
    except KeyboardInterrupt:
        code, reason = 130, "interrupted before it drove"
    say({"exit_code": code, "reason": reason})
    return code


def speaker(out: IO[str]) -> Callable[[Mapping[str, Any]], None]:
    """Says one JSON object a line to whoever started this process."""

    def say(content: Mapping[str, Any]) -> None:
        with contextlib.suppress(OSError):  # who started it may be gone
            out.write(json.dumps(content) + "\n")
            out.flush()

    return say


def drive(request: Mapping[str, Any], driving: Callable[[], None]) -> tuple[int, str]:
    """(exit code, reason) of the run. Calls `driving` once the lease is held. Raises as `Runner.run`."""
    import logging

    from opensora.printable import log_to
    from orchestrator.pipelines.host import Host
    from orchestrator.pipelines.launch import Prepared
    from orchestrator.pipelines.signals import save_on_signals
    from orchestrator.pipelines.workspace import Workspace
    from orchestrator.recipe.pipeline import Pipeline

    log_to(sys.stderr, logging.INFO, "%(asctime)s %(message)s")
    log = logging.getLogger("driver")
    host = Host.here()
    workspace = Workspace(Pipeline.model_validate(request["pipeline"]), host)
    targets: Sequence[str] = request["targets"]

    def heard(event: Event) -> None:
        if event.kind == "launched":
            driving()
        attempt = f" {event.stage} attempt {event.attempt}" if event.attempt is not None else f" {event.stage or ''}".rstrip()
        log.info("%s%s: %s", event.kind, attempt, event.detail)

    prepared = Prepared(workspace, host, tuple(targets), not request["mlflow"])
    runner = prepared.runner(heard)
    with save_on_signals(runner, log.info), prepared.mlflow(log.warning):
        result = runner.run(list(targets) or None)
    return result.exit_code, f"{result.status}: {result.reason}"


if __name__ == "__main__":
    sys.exit(main())
