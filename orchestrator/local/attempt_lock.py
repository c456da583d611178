"""Whose an attempt's run directory is: its lock, the process that is its agent, its time of death.

It is all that a launcher and an agent say to each other besides signals.

Owns `RUN_DIR/lock`, `RUN_DIR/submitted.json`, `RUN_DIR/agent.json`, `RUN_DIR/asked`, `RUN_DIR/trouble.json` and `RUN_DIR/alive`.
Refuses to start or end anything. Linux only.

Invariants:
- The lock is a `flock` that a local launcher hands to the agent it starts, and that the agent and its guard hold together. Free means:
  no process of the attempt lives.
- `submitted.json` is written once, by the launcher that holds the lock, before it starts the agent. There means: devices are held from
  then on, even if the agent dies before it can say a word.
- `agent.json` is written once, by the agent that holds the lock. There means: this attempt has lived.
- `asked` is there while a launcher's request to leave is on its way: the agent takes it away with the signal that it belongs to.
- `alive` is touched every 20 ms while the agent lives, and once more when it dies. Its mtime is the time of death.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from orchestrator.local.processes import Process

log = logging.getLogger(__name__)

LOCK = "lock"
SUBMITTED = "submitted.json"
AGENT = "agent.json"
ALIVE = "alive"
ASKED = "asked"
TROUBLE = "trouble.json"
PULSE_S = 0.02


@dataclass(frozen=True)
class AgentRecord:
    """Who lives, or lived, an attempt."""

    agent: Process
    bound: float
    """Unix time since which the devices are held."""

    @classmethod
    def read(cls, run_dir: Path) -> AgentRecord | None:
        """None: no agent has ever lived this attempt."""
        try:
            content = json.loads((run_dir / AGENT).read_text())
        except FileNotFoundError:
            return None
        return cls(Process(**content["agent"]), content["bound"])

    def write(self, run_dir: Path) -> bool:
        """Whole or not at all, and once; False where another agent was first."""
        draft = run_dir / f".{AGENT}.{self.agent.pid}"
        draft.write_text(json.dumps({"schema": 1, **asdict(self)}))
        try:
            os.link(draft, run_dir / AGENT)
        except FileExistsError:
            return False
        finally:
            draft.unlink()
        return True

    def open_agent(self) -> int | None:
        """A pidfd of the agent, to be closed by the caller; none where it is dead. Never another process that got its pid."""
        try:
            handle = os.pidfd_open(self.agent.pid)
        except ProcessLookupError:
            return None
        if not self.agent.alive():  # asked while the handle is held, so the pid cannot change hands in between
            os.close(handle)
            return None
        return handle


def write_submission(run_dir: Path, bound: float) -> None:
    """Whole or not at all. For the holder of the lock."""
    draft = run_dir / f".{SUBMITTED}"
    draft.write_text(json.dumps({"schema": 1, "bound": bound}))
    draft.replace(run_dir / SUBMITTED)


def read_submission(run_dir: Path) -> float | None:
    """Unix time since which the devices are held; none: no launcher has started an agent here."""
    try:
        bound: float = json.loads((run_dir / SUBMITTED).read_text())["bound"]
    except FileNotFoundError:
        return None
    return bound


def read_trouble(run_dir: Path) -> str:
    """Why no checkpoint of this attempt reaches the store, in its agent's words; empty: they do, as far as anybody has said."""
    try:
        return str(json.loads((run_dir / TROUBLE).read_text())["reason"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def write_asked(run_dir: Path) -> None:
    """The launcher's next SIGTERM is a request to save and leave, whoever else sends one meanwhile."""
    with contextlib.suppress(OSError):  # a full disk: then both count
        (run_dir / ASKED).touch()


def take_asked(run_dir: Path) -> bool:
    """Whether a launcher's request is on its way; answered once."""
    try:
        (run_dir / ASKED).unlink()
    except OSError:
        return False
    return True


def take_lock(run_dir: Path) -> int | None:
    """Descriptor that holds the lock of a run directory until it and all its copies are closed; none where it is held."""
    lock = os.open(run_dir / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        return None
    return lock


def is_locked(run_dir: Path) -> bool:
    """Whether any process of the attempt lives. The question itself takes the lock for a moment, so ask only once something is there."""
    lock = take_lock(run_dir)
    if lock is not None:
        os.close(lock)
    return lock is None


def make_alive(run_dir: Path, now: float) -> None:
    """Make `alive` where it is missing. It never has the time of the file system, whose clock may be another one."""
    draft = run_dir / f".{ALIVE}"
    draft.touch()
    os.utime(draft, (now, now))
    with contextlib.suppress(FileExistsError):
        os.link(draft, run_dir / ALIVE)
    draft.unlink()


@contextlib.contextmanager
def pulse(run_dir: Path, clock: Callable[[], float]) -> Iterator[None]:
    """Keep `alive` as long as there is no guard to do it, and leave it at the time of the end. `clock`: the attempt's."""
    alive, over = run_dir / ALIVE, threading.Event()

    def touch() -> None:
        os.utime(alive, (clock(), clock()))

    def beat() -> None:
        said = False
        while not over.wait(PULSE_S):
            try:
                touch()
            except Exception:
                if not said:  # once: it comes again 50 times a second
                    log.exception("run directory %s: its time of death cannot be kept up", run_dir)
                said = True

    make_alive(run_dir, clock())
    thread = threading.Thread(target=beat, name="pulse", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        touch()


def last_alive(run_dir: Path) -> float | None:
    """Unix time, by the attempt's clock, at which the agent of a run directory was last seen alive."""
    with contextlib.suppress(FileNotFoundError):
        return (run_dir / ALIVE).stat().st_mtime  # set by the agent and its guard, never by the file system
    record = AgentRecord.read(run_dir)  # it died at once: nobody knows better than that it was started
    return record.bound if record is not None else read_submission(run_dir)
