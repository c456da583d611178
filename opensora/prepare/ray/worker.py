"""An actor of the pool: one row at a time, each in a guard child of its own.

Owns the guard of one actor, and that an actor says that it is alive. Refuses to do dangerous work itself: what crashes, hangs or eats
memory is the guard's, so that Ray sees actors that never fail.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import ray

from opensora.errors import TrainerError
from opensora.prepare.__main__ import ONE_THREAD
from opensora.prepare.elsewhere import Back
from opensora.prepare.guard import Guards
from opensora.prepare.pool import Handed
from opensora.prepare.ray.setup import Setup

BEAT_S = 5.0
"""Between two signs of life."""


class Guarded:
    """A guard in an actor, which says every BEAT_S that it lives."""

    def __init__(self, guards: Callable[[], Guards], feed: Any, threads: int = 1) -> None:
        for name in ONE_THREAD:
            os.environ.setdefault(name, str(threads))
        # A guard would import the actor's main module, which is Ray's: a second of CPU and 100 MB in each
        vars(sys.modules["__main__"]).pop("__file__", None)
        self._feed, self._guards = feed, guards()
        self.leaves = False
        """Whether the run is to leave, as of the last sign of life."""
        self._guards.on_tell = lambda content: self._feed.say.remote(pickle.dumps(content))
        threading.Thread(target=self._beat, daemon=True, name="beat").start()

    def done(self, function: Callable[[Any], Any], row: Any, seconds: float) -> tuple[str, Any, float]:
        """(`done`, result or Leaves, CPU-seconds), or (`stop`, error that is about all rows, CPU-seconds)."""
        before = sum(self._guards.cpu_s.values())
        kind: str = "done"
        try:
            [(_, ended)] = self._guards.map(function, [row], seconds)
        except TrainerError as error:
            kind, ended = "stop", error
        return kind, ended, sum(self._guards.cpu_s.values()) - before

    def _beat(self) -> None:
        while True:
            with contextlib.suppress(ray.exceptions.RayError):  # the feed is lost with Ray, which the engine notices
                self.leaves = ray.get(self._feed.beat.remote())
            threading.Event().wait(BEAT_S)


class Worker:
    """For `Dataset.map_batches` with blocks of one row: {number, seconds, content, then, then_s} → {number, answer, cpu_s}, and where
    models come after it {then, then_s, onward}: `onward` is the pickled row of the second function, or empty."""

    def __init__(self, setup: Setup, feed: Any) -> None:
        self._guarded = Guarded(lambda: Guards(1, setup.limits, preload=setup.preload), feed)
        self._then = setup.models is not None

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[Any]]:
        function, row = pickle.loads(batch["content"][0])  # noqa: S301 - the engine sent it
        kind, ended, cpu_s = self._guarded.done(function, row, float(batch["seconds"][0]))
        ended, onward = _split(ended)
        answer = pickle.dumps((kind, (ended, getattr(ended, "told", ())) if kind == "done" else ended))
        found: dict[str, list[Any]] = {"number": [int(batch["number"][0])], "content": [answer], "cpu_s": [cpu_s]}
        if self._then:
            sent = pickle.dumps(onward) if onward is not None else b""
            found |= {"then": [batch["then"][0]], "then_s": [float(batch["then_s"][0])], "onward": [sent]}
        return found


def _split(ended: Any) -> tuple[Any, Any]:
    """What comes back, and what goes on to the models."""
    inner = ended.result if isinstance(ended, Back) else ended
    if not isinstance(inner, Handed):
        return ended, None
    return (replace(ended, result=inner.kept) if isinstance(ended, Back) else inner.kept), inner.onward
