"""Look up in the ledger whether this attempt still counts, and write signs of life for others.

A launcher may be paused while its agent runs, and another launch may take the lease in that time. So the agent reads the lease regularly.
While the lease is its own driver's, it reads nothing else. Once the lease is a newer driver's, the attempt goes on as long as that driver
has neither closed it nor made another one; the agent does what the new driver asks in the ledger, and when its launcher dies it follows
the new driver. If the attempt is over, the agent ends its trainer at once.

Owns the look-ups and the signs of life. Refuses to end anything: `attempt` does.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Literal

from orchestrator.ledger.lease import is_free
from orchestrator.ledger.records import Intent, Lease, Sign
from orchestrator.ledger.store import Ledger
from orchestrator.local.clock import boottime

log = logging.getLogger(__name__)

SIGN_S = 30.0
"""If nothing else from an agent has reached the store for this long, it writes a sign of life."""


class Standing(threading.Thread):
    def __init__(
        self, ledger: Ledger, intent: Intent, node: int, wake: Callable[[], None], heard: Callable[[], float | None], silent_s: float
    ) -> None:
        """`heard` gives the `boottime` at which something from this agent last reached the store. `silent_s` is that of `AgentProcess`."""
        super().__init__(name="standing", daemon=True)
        self._ledger, self._intent, self._node, self._wake, self._others = ledger, intent, node, wake, heard
        self._every_s, self._sign_s = intent.flush_s, min(SIGN_S, silent_s / 10)
        self._changed = threading.Condition()
        self._asked_at: float | None = None
        """When `look` was last called."""
        self._signs = 0
        self._signed: float | None = None
        self._began = boottime()
        self.looked = 0.0
        """time.monotonic() when the last successful look-up began."""
        self.over = ""
        """Why this attempt no longer counts. Empty means that it counts, as far as is known."""
        self.asked: Literal["save", "now"] | None = None
        """What a newer driver asks of this attempt."""
        self.heir: Lease | None = None
        """The lease of a newer driver that is alive. None means there is none."""
        self.start()

    @property
    def heard(self) -> float:
        """The `boottime` at which something from this agent last reached the store."""
        return max(self._began, self._signed or 0.0, self._others() or 0.0)

    def look(self) -> None:
        """Look up as soon as possible; `looked` says when that was done."""
        with self._changed:
            self._asked_at = time.monotonic()
            self._changed.notify()

    def run(self) -> None:
        said = ""
        while True:
            began = time.monotonic()
            try:
                self._look()
                self.looked = began
                self._sign()
                said = ""
            except Exception as error:  # noqa: BLE001 - the next look-up may succeed; `heard` shows for how long none did
                if said != (said := f"{type(error).__name__}: {error}"):
                    log.warning("the ledger cannot be read: %s", said)
            self._wake()
            with self._changed:
                if self._asked_at is None or self._asked_at <= began:
                    self._changed.wait(self._every_s)

    def _look(self) -> None:
        intent, ledger = self._intent, self._ledger
        lease = ledger.lease()
        if lease is None or lease.epoch <= intent.epoch:
            return
        by = f"epoch {lease.epoch} ({lease.holder})"
        if ledger.outcome(intent.stage, intent.inputs_digest, intent.attempt) is not None:
            self.over = f"{by} has closed this attempt"
        elif ledger.has_attempt(intent.stage, intent.inputs_digest, intent.attempt + 1):
            self.over = f"{by} has made attempt {intent.attempt + 1}"
        else:
            self.asked = ledger.asked(intent) or self.asked
            self.heir = lease if is_free(lease, time.time()) is False else None

    def _sign(self) -> None:
        began = boottime()
        if began - self.heard < self._sign_s:
            return
        self._ledger.append_sign(self._intent, Sign(node=self._node, seq=self._signs, time=time.time()))
        self._signs, self._signed = self._signs + 1, began
