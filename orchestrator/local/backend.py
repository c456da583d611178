"""Attempts as processes of this machine: the very agent that runs in a pod, started by the launcher and dying with it.

Owns `ROOT/runs/<run>/`, one run directory an attempt, and the launcher's side of `orchestrator.local.attempt_lock`. Refuses to read the
ledger.

Invariants:
- An attempt whose `submitted.json` or `agent.json` is there is never started again. There is no moment at which a killed launcher could
  leave an agent that nobody finds: the agent is born with the run directory's lock in its hands.
- An attempt has ended when no process of it lives. Its time of death is its agent's, or, where that was killed, the moment at which the
  guard had ended the last of its ranks: they hold their devices until then.
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from orchestrator.effects import perform
from orchestrator.errors import Refused, Unreachable
from orchestrator.local.attempt_lock import (
    SUBMITTED,
    AgentRecord,
    is_locked,
    last_alive,
    read_submission,
    read_trouble,
    take_lock,
    write_asked,
    write_submission,
)
from orchestrator.local.clock import boottime
from orchestrator.modules import command, without_working_folder
from orchestrator.ports import Life
from orchestrator.redact import redacted

log = logging.getLogger(__name__)

AGENT_LOG = "agent.log"
LAST_WORDS_BYTES = 16_384

GONE_S = 30.0
"""How long a killed attempt may take to be gone; a process inside a driver's call cannot be killed sooner."""


def cuda_devices() -> int:
    """How many NVIDIA devices this process may use: CUDA_VISIBLE_DEVICES, else device nodes. The driver is not asked: that takes torch."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([name for name in visible.split(",") if name.strip() and name.strip() != "-1"])
    return sum(path.name.removeprefix("nvidia").isdigit() for path in Path("/dev").glob("nvidia*"))


@dataclass
class _Child:
    """An agent that this process started."""

    process: subprocess.Popen[bytes]
    bound: float
    boot: float
    """CLOCK_BOOTTIME at `bound`."""
    ended: float | None = None
    exit_code: int | None = None


class LocalBackend:
    def __init__(
        self,
        store_url: str,
        root: Path,
        *,
        clock: Callable[[], float] = time.time,
        options: Sequence[str] = (),
        env: Mapping[str, str] = os.environ,
    ) -> None:
        """`root`: holds the run directories; `options`: more of the agent's; `env`: what agents inherit."""
        self._env = env
        self._options = tuple(options)
        self._store_url, self._root, self._clock = store_url, root.resolve(), clock
        self._children: dict[str, _Child] = {}

    def run_dir(self, run_key: str) -> Path:
        return self._root / "runs" / run_key.replace("/", "_")

    def submit(self, intent_key: str, run_key: str) -> None:
        """Start the agent. An attempt that lives or has lived is left alone. Raises Refused."""
        run_dir = self.run_dir(run_key)
        if run_key in self._children:
            return
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
            lock = take_lock(run_dir)
            if lock is None:
                return
            try:
                if AgentRecord.read(run_dir) is None and read_submission(run_dir) is None:
                    self._start(intent_key, run_key, run_dir, lock)
            finally:
                os.close(lock)
        except OSError as error:
            raise Refused(f"run directory {run_dir}: {error.strerror}; nothing was started") from error

    def _start(self, intent_key: str, run_key: str, run_dir: Path, lock: int) -> None:
        bound, boot = self._clock(), boottime()
        write_submission(run_dir, bound)
        try:
            with (run_dir / AGENT_LOG).open("ab") as output:
                process = perform(
                    "process.start",
                    run_key,
                    lambda: subprocess.Popen(
                        self._command(intent_key, run_dir, bound, boot, lock),
                        stdin=subprocess.DEVNULL,
                        stdout=output,
                        stderr=output,
                        pass_fds=(lock,),
                        env=without_working_folder(self._env),
                        start_new_session=True,  # a Ctrl-C in the terminal is passed on by the launcher
                    ),
                )
        except OSError:
            (run_dir / SUBMITTED).unlink()
            raise
        child = self._children[run_key] = _Child(process, bound, boot)
        threading.Thread(target=self._witness, args=(child,), name=f"witness of {run_key}", daemon=True).start()

    def _command(self, intent_key: str, run_dir: Path, bound: float, boot: float, lock: int) -> list[str]:
        options = {"--store": self._store_url, "--intent": intent_key, "--run-dir": str(run_dir), "--bound": repr(bound)}
        words = [word for option in options.items() for word in option] + ["--anchor", f"{bound!r},{boot!r}", *self._options]
        return command("orchestrator.agent", *words, "--launcher-pid", str(os.getpid()), "--lock-fd", str(lock))

    def _witness(self, child: _Child) -> None:
        said = False
        while True:
            try:
                code = child.process.wait()
                break
            except Exception:
                if not said:  # once; without this thread the attempt would seem to run for ever
                    log.exception("agent %d: its end cannot be waited for; trying again", child.process.pid)
                said = True
                time.sleep(0.01)
        child.exit_code = 128 - code if code < 0 else code
        child.ended = child.bound + boottime() - child.boot  # last: who sees it sees the exit code too

    def check(self, run_key: str, nodes: int) -> None:
        """Any attempt can be started here."""

    def observe(self, run_key: str) -> Life:
        ended: float | None
        run_dir = self.run_dir(run_key)
        child, record = self._children.get(run_key), AgentRecord.read(run_dir)
        bound = record.bound if record is not None else read_submission(run_dir)
        if bound is None:
            return Life("absent")
        if (child is not None and child.ended is None) or is_locked(run_dir):
            return Life("running", bound, trouble=read_trouble(run_dir))
        if child is not None:
            # a killed agent's ranks hold their devices until the guard has ended them
            ended, code = max(child.ended or 0.0, last_alive(run_dir) or 0.0), child.exit_code
        else:
            ended, code = last_alive(run_dir), None
        return Life("ended", bound, ended, code, trouble=read_trouble(run_dir), last_words=_last_words(run_dir / AGENT_LOG))

    def drain(self, run_key: str) -> None:
        write_asked(self.run_dir(run_key))
        perform("process.drain", run_key, lambda: self._signal(run_key, signal.SIGTERM))

    def kill(self, run_key: str) -> None:
        """SIGKILL to the agent, whose guard then ends everything below it. Raises Unreachable where that takes too long."""
        perform("process.kill", run_key, lambda: self._signal(run_key, signal.SIGKILL))
        deadline = time.monotonic() + GONE_S
        while self.observe(run_key).state == "running":
            if time.monotonic() > deadline:
                raise Unreachable(f"{run_key}: killed {GONE_S:g} s ago and still not gone; look for its processes in state D")
            time.sleep(0.005)

    def forget(self, run_key: str) -> None:
        """Run directories stay: a person may want to look."""

    def _signal(self, run_key: str, number: signal.Signals) -> None:
        child = self._children.get(run_key)
        if child is not None:
            with suppress(ProcessLookupError):
                child.process.send_signal(number)
            return
        record = AgentRecord.read(self.run_dir(run_key))
        handle = record.open_agent() if record is not None else None
        if handle is not None:
            try:
                with suppress(ProcessLookupError):
                    signal.pidfd_send_signal(handle, number)
            finally:
                os.close(handle)


def _last_words(log: Path) -> str:
    """The end of what an agent printed, in whole lines, without the credentials that it has as we do."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - LAST_WORDS_BYTES))
            data = file.read(LAST_WORDS_BYTES)
    except OSError:
        return ""
    whole = data if len(data) < LAST_WORDS_BYTES else data[data.find(b"\n") + 1 :]
    return redacted(whole.decode(errors="replace"))
