"""Sync beside a launch until the launch has ended and MLflow shows everything.

Owns when to sync, when to give up and when to exit. Refuses to know how to sync (`sync` does).
"""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Sequence

import psutil

from orchestrator.errors import Unreachable
from orchestrator.ledger.records import Event
from orchestrator.ports import Tracker
from orchestrator.tracking.facts import Facts
from orchestrator.tracking.statuses import is_undecided
from orchestrator.tracking.sync import Sync

log = logging.getLogger(__name__)


def follow(sync: Sync, pid: int, interval_s: float) -> bool:
    """Sync until the launch of process `pid` has ended. Returns whether MLflow is then up to date with the ledger.

    Handles SIGINT and SIGTERM of this process, and may end the process: see `_leave_in_time`.
    """
    launch = Launch(pid, sync.reader.events)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C in the terminal is for the launcher, which ends first
    signal.signal(signal.SIGTERM, launch.ask)
    os.nice(10)  # training comes first
    threading.Thread(target=_leave_in_time, args=(launch, sync.tracker), daemon=True).start()
    return Follower(sync.update, launch.over, launch.rest, interval_s, lambda: launch.asked).follow()


class Follower:
    """Syncs every `interval_s` until the launch is over and MLflow shows everything. If MLflow is down, only one line is logged.

    If the launcher was killed, it has written no end. Then this goes on until the attempts have been silent long enough to count as ended.
    """

    LAG = 0.02
    """See `Sync.update`."""
    LAST_TRIES = 3
    """Number of tries after the launch has ended, with 1 and 2 s between them. After that the user can run `osctl sync`."""
    LAST_ANSWER_S = 4.0
    """How long a server may take to answer once the launcher waits for this process to exit."""
    BACKOFF_S = 60.0
    """The longest pause between two tries while MLflow is down."""
    LINGER_S = 300.0
    """How long to go on for attempts that no driver drives any more."""

    def __init__(
        self,
        update: Callable[[float], Facts | None],
        over: Callable[[], bool],
        rest: Callable[[float], None],
        interval_s: float,
        waited_for: Callable[[], bool] = lambda: False,
    ):
        """
        Args:
            update: `Sync.update`.
            over: whether the launch has ended.
            rest: sleeps for some seconds.
            waited_for: whether the launcher waits for this process to exit.
        """
        self.update, self.over, self.rest, self.interval_s, self.waited_for = update, over, rest, interval_s, waited_for

    def follow(self) -> bool:
        """Returns whether MLflow is up to date with the ledger at the end."""
        down = 0
        last_tries = 0
        lingered_s = 0.0
        while True:
            over = self.over()  # asked before the update, so that the update shows all that was written until the end
            try:
                facts = self.update(0.0 if over else self.LAG)
            except Unreachable as error:
                down += 1
                if down == 1:
                    log.warning("%s", error)
                last_tries += over
                if last_tries >= self.LAST_TRIES:
                    return False
                self.rest(min(2.0 ** ((last_tries or down) - 1), self.BACKOFF_S))
                continue
            if down:
                log.warning("MLflow is back, and up to date with the ledger")
            down = 0
            if over and (lingered_s >= self.LINGER_S or self.waited_for() or facts is None or not is_undecided(facts)):
                return True
            lingered_s += self.interval_s if over else 0.0
            self.rest(self.interval_s)


class Launch:
    """A launch whose end is waited for. It has ended if its process has ended, if the ledger says so, or if it has sent a SIGTERM."""

    def __init__(self, pid: int, events: Callable[[], Sequence[Event]]):
        """`events` gives all events of the ledger, and may raise Unreachable."""
        self.events = events
        self.asked = False
        """Whether the launcher has sent a SIGTERM."""
        try:
            self.process: psutil.Process | None = psutil.Process(pid)
            self.since = self.process.create_time()
        except psutil.NoSuchProcess:
            self.process, self.since = None, 0.0

    def over(self) -> bool:
        return self.asked or not self._alive() or self._ended()

    def ask(self, *_: object) -> None:
        """Signal handler for SIGTERM: the launch has ended, so sync once more and exit."""
        self.asked = True

    def rest(self, seconds: float) -> None:
        """Sleep for some seconds, or until a SIGTERM."""
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0 and not self.asked:
            time.sleep(min(left, 0.1))

    def _alive(self) -> bool:
        try:
            return self.process is not None and self.process.is_running() and self.process.status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False

    def _ended(self) -> bool:
        try:
            ends = [event for event in self.events() if event.kind in ("launched", "ended")]
        except Unreachable:
            return False
        return bool(ends) and ends[-1].kind == "ended" and ends[-1].time >= self.since


class Silence:
    """How long a server has not answered since the launch ended."""

    def __init__(self) -> None:
        self._owed_s, self._answers = 0.0, 0

    def after(self, passed_s: float, tracker: Tracker, *, launch_is_over: bool) -> float:
        """Seconds without an answer, after `passed_s` more have passed. An answer resets them; without an open request they stay."""
        if not launch_is_over or tracker.answers != self._answers:
            self._owed_s, self._answers = 0.0, tracker.answers
        elif tracker.waits:
            self._owed_s += passed_s
        return self._owed_s


def _leave_in_time(launch: Launch, tracker: Tracker) -> None:
    """End this process if a silent server keeps it, since the launcher waits for it. `Sync.update` may be stopped anywhere."""
    silence, before = Silence(), time.monotonic()
    while True:
        time.sleep(0.1)
        passed_s, before = time.monotonic() - before, time.monotonic()
        if silence.after(passed_s, tracker, launch_is_over=launch.asked) > Follower.LAST_ANSWER_S:
            log.warning("MLflow %s: does not answer at the end of the launch; `osctl sync` brings it up to date", tracker.url)
            os._exit(Unreachable.exit_code)
