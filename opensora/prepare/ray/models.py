"""An actor that holds models: rows that wait for it together are worked on together, in one guard that loads the models once.

Owns what a batch is, and that a batch that crashed or hung is tried row by row, so that only the row at fault leaves. Refuses to know which
models: the function of the rows loads them, in the guard.

Ray Data would wait for a full batch before it gives one out (`batch_size`), and at the end of what the engine sends none comes full. So
rows come one a block, on as many threads as two batches have rows; one thread works.
"""

from __future__ import annotations

import pickle
import threading
import time
from collections import deque
from dataclasses import dataclass, field
from typing import Any

from opensora.dataset.prepare_config import Limits
from opensora.dataset.rows import Leaves
from opensora.prepare.guard import Guards
from opensora.prepare.ray.setup import Setup
from opensora.prepare.ray.worker import Guarded

NO_LIMIT_GB = 1e6
"""Of memory: what a model takes is the size of its folder, and no row's doing; the pod has a limit."""
NEVER = 1 << 62
"""Rows after which this guard is renewed: it would load its models again."""


@dataclass
class _Waiting:
    function: Any
    row: Any
    seconds: float
    ended: threading.Event = field(default_factory=threading.Event)
    answer: bytes = b""
    cpu_s: float = 0.0
    busy_s: float = 0.0


class Models:
    """For `Dataset.map_batches` with blocks of one row: {number, content, cpu_s, then, then_s, onward} → the fields of `Answer`."""

    def __init__(self, setup: Setup, feed: Any) -> None:
        assert setup.models is not None
        limits = Limits.model_validate(setup.limits.model_dump() | {"memory_gb": NO_LIMIT_GB})
        threads = max(1, int(setup.models.num_cpus))
        self._guarded = Guarded(lambda: Guards(1, limits, preload=setup.preload, renew_after=NEVER), feed, threads)
        self._batch = setup.models.batch
        self._waiting, self._some = deque[_Waiting](), threading.Condition()
        threading.Thread(target=self._work, daemon=True, name="models").start()

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[Any]]:
        found = {name: [batch[name][0]] for name in ("number", "content", "cpu_s")}
        one = _Waiting(None, None, 0.0)
        if onward := batch["onward"][0]:
            one = _Waiting(pickle.loads(batch["then"][0]), pickle.loads(onward), float(batch["then_s"][0]))  # noqa: S301 - the engine's, a guard's
            with self._some:
                self._waiting.append(one)
                self._some.notify()
            one.ended.wait()
        return found | {"then": [one.answer], "then_cpu_s": [one.cpu_s], "busy_s": [one.busy_s]}

    def _work(self) -> None:
        while True:
            with self._some:
                self._some.wait_for(lambda: self._waiting)
                some = [self._waiting.popleft() for _ in range(min(self._batch, len(self._waiting)))]
            try:
                if not self._guarded.leaves:
                    self._together(some)
            except Exception as error:  # noqa: BLE001 - whoever waits must hear of it
                for one in some:
                    one.answer = one.answer or pickle.dumps(("stop", error))
            for one in some:
                one.ended.set()

    def _together(self, some: list[_Waiting]) -> None:
        began = time.monotonic()
        kind, ended, cpu_s = self._guarded.done(some[0].function, [one.row for one in some], some[0].seconds)
        if isinstance(ended, Leaves) and len(some) > 1:
            for one in some:
                self._together([one])
            return
        results = [ended] * len(some) if isinstance(ended, Leaves | Exception) else ended
        busy_s = time.monotonic() - began
        for one, result in zip(some, results, strict=True):
            one.answer = pickle.dumps((kind, result))
            one.cpu_s, one.busy_s = cpu_s / len(some), busy_s / len(some)
