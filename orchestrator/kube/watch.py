"""Watches that keep a `WatchCache` of our jobs, pods and events up to date, so that reading them needs no request.

Owns the threads and when the cache may be trusted (`fresh`). Refuses to say what the objects mean (`life` does) and to change anything in
the cluster.

Each kind is listed once and then watched from that version on. If the server ends a watch normally, the next one continues from there.
After any fault, also 410 (the version is too old) and silence, the kind is listed anew, and objects that the list lacks are gone.
A kind of job that the cluster does not serve is not watched, and counts as watched; it is asked for again every `REFUSED_PAUSE_S`.

No thread ends before `close`, whatever is raised in it, and none fails silently: a kind that is not watched is not fresh, also while a
login hangs between two watches. A fault is logged once; after a pause the kind is listed anew. An object that cannot be read is skipped
with a line in the log, and whether its attempt lives is unknown until it can be read.
"""

from __future__ import annotations

import contextlib
import logging
import re
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from orchestrator.errors import NotFound, OsctlError, Refused, Unreachable
from orchestrator.kube.client import SILENCE_S, Api, Stream
from orchestrator.kube.discovery import is_served, none_of
from orchestrator.kube.faults import Expired
from orchestrator.kube.operator import BY_PLURAL, OPERATORS, Operator
from orchestrator.kube.watch_cache import WatchCache
from orchestrator.redact import redacted

log = logging.getLogger(__name__)

STALE_S = 3.0
"""How long the cache is still trusted after a watch broke: most watches are back at once."""
PAUSE_S = 1.0
"""Pause before the next request to a server that did not answer."""
REFUSED_PAUSE_S = 15.0
"""Pause before a refused request is sent again: somebody may grant the right in the meantime."""
CLOSE_S = 10.0
"""How long `close` waits for a thread: a login's plugin may hang, and nothing can end it."""
LOG_AGAIN_S = 600.0
"""A fault that was logged is logged again after this long."""
REMEMBERED = 1000
"""How many logged lines are remembered, so that each is logged once."""
LISTED_WAIT_S = 10.0
"""How long the first list of events waits for the list of jobs."""


class Watcher:
    """Keeps a cache of the objects that a label selects, with one background thread for each kind. Close it."""

    def __init__(
        self,
        api: Api,
        selector: str,
        on_change: Callable[[], None] = lambda: None,
        *,
        clock: Callable[[], float] = time.time,
        silence_s: float = SILENCE_S,
    ):
        """
        Args:
            on_change: called, from another thread, when the cache or `fresh` may have changed.
            clock: gives the Unix time at which an object is seen.
            silence_s: a watch that sends nothing for this long is dead.
        """
        self.cache = WatchCache(clock)
        self._api, self._selector, self._on_change, self._silence_s = api, selector, on_change, silence_s
        self._over = threading.Event()
        self._lock = threading.Condition()
        self._broken: dict[str, float] = dict.fromkeys((*BY_PLURAL, "pods"), 0.0)
        """Since when (monotonic clock) a kind is not watched. Infinity means it is watched. Events are left out: nothing needs them."""
        self._unserved: set[str] = set()
        """Kinds of jobs that the cluster does not serve: there is nothing to watch. They are asked for again and again."""
        self._was_fresh = False
        self._refused: dict[str, Refused] = {}
        self._faults: dict[str, str] = {}
        """Why a kind is not watched, for people."""
        self._logged: OrderedDict[str, float] = OrderedDict()
        """Lines that were logged, and when (monotonic clock)."""
        self._jobs_listed = threading.Event()
        self._listed: set[str] = set()
        """Kinds of jobs that were listed."""
        self._streams: dict[str, Stream] = {}
        self._threads: list[threading.Thread] = []

    def start(self) -> None:
        """Start the threads. Idempotent."""
        with self._lock:
            if self._threads or self._over.is_set():
                return
            for kind in (*BY_PLURAL, "pods", "events"):
                thread = threading.Thread(target=self._keep_up, args=(kind,), name=f"watch {kind}", daemon=True)
                self._threads.append(thread)
                thread.start()

    def close(self) -> None:
        """End all watches. Returns when no thread is left, except one whose login hangs."""
        self._over.set()
        self._jobs_listed.set()
        with self._lock:
            streams, threads = list(self._streams.values()), list(self._threads)
            self._lock.notify_all()
        for stream in streams:
            stream.close()
        for thread in threads:
            thread.join(CLOSE_S)

    def fresh(self) -> bool:
        """Whether the cache shows the cluster as it is now, apart from a short delay.

        Raises Refused if this user may not list or watch, unless that was possible before: then the right or the login may come back.
        """
        with self._lock:
            for kind in () if self._was_fresh else self._broken:
                if kind in self._refused:
                    raise self._refused[kind]
            if not self._served() and not self._was_fresh:
                raise Refused(f"{self._api.server}: knows {none_of(OPERATORS)}; {' or '.join(one.install for one in OPERATORS)}")
            return bool(self._served()) and all(time.monotonic() - since < STALE_S for since in self._watched().values())

    def served(self) -> list[Operator]:
        """The kinds of jobs that the cluster served when it was last asked; all, before it answered."""
        with self._lock:
            return self._served()

    def _served(self) -> list[Operator]:
        return [one for one in OPERATORS if one.plural not in self._unserved]

    def _watched(self) -> dict[str, float]:
        """Of `_broken`, the kinds that there are."""
        return {kind: since for kind, since in self._broken.items() if kind not in self._unserved}

    def why(self) -> str:
        """Why the cache is not fresh. Empty means that no reason is known."""
        with self._lock:
            return next((self._faults[kind] for kind in self._watched() if kind in self._faults), "")

    def wait_until_fresh(self, patience_s: float) -> bool:
        """Wait until `fresh`, for at most `patience_s`. Returns `fresh`, and raises what it raises."""
        deadline = time.monotonic() + patience_s
        while not self.fresh():
            with self._lock:
                left = deadline - time.monotonic()
                if left <= 0 or self._over.is_set():
                    return False
                self._lock.wait(min(left, 1.0))
        return True

    # --- Threads -------------------------------------------------------------------------------------------------------------------

    def _keep_up(self, kind: str) -> None:
        version: str | None = None
        if kind == "events":
            self._jobs_listed.wait(LISTED_WAIT_S)
        while not self._over.is_set():
            try:
                if version is None and not self._is_served(kind):
                    self._over.wait(REFUSED_PAUSE_S)
                    continue
                if version is None:
                    version = self._list(kind)
                version = self._watch(kind, version)
            except Expired:
                version = None
            except BaseException as error:  # noqa: BLE001 - if the thread ended here, the cache would look current for ever
                version = None
                self._over.wait(self._on_fault(kind, error))

    def _is_served(self, kind: str) -> bool:
        """Whether there is a kind to watch. Where the answer changes, the cache and who waits are told."""
        served = kind not in BY_PLURAL or is_served(self._api, BY_PLURAL[kind])
        with self._lock:
            if served == (kind not in self._unserved):
                return served
            self._unserved ^= {kind}
            self._broken[kind] = 0.0  # nothing is known of a kind that is there by now, until it was listed
            self._faults.pop(kind, None)
            self._refused.pop(kind, None)
            self._was_fresh = self._was_fresh or self._all_watched()
            self._lock.notify_all()
        if not served:
            for name in self.cache.names(kind):
                self.cache.on_delete(kind, name)
            if len(self._unserved | self._listed) >= len(BY_PLURAL):
                self._jobs_listed.set()
        self._notify()
        return served

    def _all_watched(self) -> bool:
        return bool(self._served()) and all(since == float("inf") for since in self._watched().values())

    def _list(self, kind: str) -> str:
        things, version = self._api.list(kind, self._selector_of(kind))
        names = {name for thing in things if (name := _name_of(thing))}
        for name in self.cache.names(kind) - names:
            self.cache.on_delete(kind, name)
        for thing in things:
            self._update(kind, thing)
        if kind in BY_PLURAL:
            self._listed.add(kind)
            if len(self._unserved | self._listed) >= len(BY_PLURAL):
                self._jobs_listed.set()
        return version

    def _watch(self, kind: str, version: str) -> str:
        """Watch until the server ends the watch normally. Returns the version that the watch reached."""
        stream = self._api.watch(kind, self._selector_of(kind), version, silence_s=self._silence_s)
        with self._lock:
            self._streams[kind] = stream
        if self._over.is_set():  # `close` was called while the stream was opened
            stream.close()
        self._on_watching(kind)
        try:
            for change in stream:
                version = _version_of(change.object) or version
                if change.type == "BOOKMARK":
                    continue
                self._update(kind, change.object)
                if change.type == "DELETED" and (name := _name_of(change.object)):
                    self.cache.on_delete(kind, name)  # after its last state was cached
                self._notify()
        finally:
            self._on_end(kind)
            stream.leave()
        return version

    def _update(self, kind: str, thing: Any) -> None:
        try:
            self.cache.on_update(kind, thing)
        except MemoryError:  # a fault of this process, not of the object
            raise
        except Exception as error:  # noqa: BLE001 - whatever is wrong with this object, the others must be read
            name, version = _name_of(thing), _version_of(thing)
            if name and kind != "events":
                self.cache.on_unreadable(kind, name)
            what = f"{name} at version {version}" if name else f"one without a name: {redacted(repr(thing))[:200]}"
            self._log_once(f"watch of {kind}: an object that cannot be read is skipped: {what}: {_words_of(error)}")

    def _notify(self) -> None:
        """Call the listener. If it raises, the watch goes on."""
        try:
            self._on_change()
        except BaseException as error:  # noqa: BLE001 - see _keep_up
            self._log_once(f"a listener of the watches fails and may miss changes: {_words_of(error)}")

    def _log_once(self, line: str, about: str = "") -> None:
        """Log a line once. `about`: what other lines say too, of which one is enough."""
        now, about = time.monotonic(), about or line
        with self._lock:
            if now - self._logged.get(about, float("-inf")) < LOG_AGAIN_S:
                return
            self._logged[about] = now
            self._logged.move_to_end(about)
            if len(self._logged) > REMEMBERED:
                self._logged.popitem(last=False)
        log.warning("%s", line)

    def _selector_of(self, kind: str) -> str:
        return "" if kind == "events" else self._selector  # events have no labels

    def _on_watching(self, kind: str) -> None:
        with self._lock:
            self._refused.pop(kind, None)
            self._faults.pop(kind, None)
            if kind in self._broken:
                self._broken[kind] = float("inf")
            self._was_fresh = self._was_fresh or self._all_watched()
            self._lock.notify_all()
        self._notify()

    def _on_end(self, kind: str) -> None:
        with self._lock:
            self._streams.pop(kind, None)
            if kind in self._broken:
                self._broken[kind] = min(self._broken[kind], time.monotonic())

    def _on_fault(self, kind: str, error: BaseException) -> float:
        """Note a fault. Returns how many seconds pass until the kind is listed anew."""
        if self._over.is_set():
            return 0.0
        self._on_end(kind)
        if isinstance(error, NotFound):
            error = Refused(f"{self._api.server}: knows no {kind}: {error}; osctl doctor says what is not installed")
        elif isinstance(error, Refused) and kind in BY_PLURAL:
            error = Refused(f"{error}; the cluster serves {kind}, and an attempt may be one: grant that right (osctl doctor names all)")
        with self._lock:
            self._faults[kind] = _words_of(error)
            if isinstance(error, Refused):
                self._refused[kind] = error
            self._lock.notify_all()
        if isinstance(error, Unreachable):  # all watches meet the same outage: one line
            said = re.sub(rf"^{re.escape(self._api.server)}: ([^:]+: )?", "", self._faults[kind])
            words = f"{self._api.server}: cannot be watched now ({said}); osctl goes on asking, and reads anew what it missed"
            self._log_once(words, about="an outage")
        else:
            self._log_once(f"watch of {kind}: {self._faults[kind]}; it is listed anew")
        self._notify()
        return REFUSED_PAUSE_S if isinstance(error, Refused) else PAUSE_S


def _name_of(thing: Any) -> str:
    with contextlib.suppress(AttributeError, KeyError, TypeError):
        return name if isinstance(name := thing["metadata"]["name"], str) else ""
    return ""


def _version_of(thing: Any) -> str:
    with contextlib.suppress(AttributeError, KeyError, TypeError):
        return str(thing["metadata"]["resourceVersion"] or "")
    return ""


def _words_of(error: BaseException) -> str:
    """The text of an error, and for errors of other libraries also the file and line that raised it."""
    try:
        words = " ".join(redacted(str(error)).split())
    except Exception:  # noqa: BLE001 - even its text cannot be made
        words = ""
    if isinstance(error, OsctlError):
        return words
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    place = f" ({Path(trace.tb_frame.f_code.co_filename).name}:{trace.tb_lineno})" if trace is not None else ""
    return f"{type(error).__name__}{f': {words}' if words else ''}{place}"
