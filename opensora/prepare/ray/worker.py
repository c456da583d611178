"""An actor of the pool: one row at a time, each in a guard child of its own.

Owns the guard of one actor, and that an actor says that it is alive. Refuses to do dangerous work itself: what crashes, hangs or eats
memory is the guard's, so that Ray sees actors that never fail.
"""

from __future__ import annotations

import os
import pickle
import sys
import threading
from typing import Any

from opensora.errors import TrainerError
from opensora.prepare.__main__ import ONE_THREAD
from opensora.prepare.guard import Guards
from opensora.prepare.ray.setup import Setup

BEAT_S = 5.0
"""Between two signs of life."""


class Worker:
    """For `Dataset.map_batches` with blocks of one row: {number, seconds, content} → {number, answer, cpu_s}."""

    def __init__(self, setup: Setup, feed: Any) -> None:
        for name in ONE_THREAD:
            os.environ.setdefault(name, "1")
        # A guard would import the actor's main module, which is Ray's: a second of CPU and 100 MB in each
        vars(sys.modules["__main__"]).pop("__file__", None)
        self._feed = feed
        self._guards = Guards(1, setup.limits, preload=setup.preload)
        self._guards.on_tell = lambda content: self._feed.say.remote(pickle.dumps(content))
        threading.Thread(target=self._beat, daemon=True, name="beat").start()

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[Any]]:
        function, row = pickle.loads(batch["content"][0])  # noqa: S301 - the engine sent it
        before = sum(self._guards.cpu_s.values())
        try:
            [(_, ended)] = self._guards.map(function, [row], float(batch["seconds"][0]))
            answer = pickle.dumps(("done", (ended, getattr(ended, "told", ()))))
        except TrainerError as error:
            answer = pickle.dumps(("stop", error))
        spent = sum(self._guards.cpu_s.values()) - before
        return {"number": [int(batch["number"][0])], "answer": [answer], "cpu_s": [spent]}

    def _beat(self) -> None:
        while True:
            self._feed.beat.remote()
            threading.Event().wait(BEAT_S)
