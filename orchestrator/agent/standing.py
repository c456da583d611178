"""Whether this attempt is still the one that counts, looked up in the ledger; and the signs by which others see that it lives.

A launcher may stand still while its agent lives, and another launch may take the lease meanwhile. So an agent looks at the lease now and
then. While that is its own driver's, nothing else is looked at. Once it is a newer one's, the attempt goes on as long as that driver has
neither closed it nor made another; it obeys what the driver asks of it in the ledger; and when its launcher dies it goes over to that
driver. Where the attempt is over, the agent ends its trainer at once.

Owns the look-ups and the signs of life. Refuses to end anything: `attempt` does.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Literal

from orchestrator.clock import boottime
from orchestrator.lease import is_free
from orchestrator.ledger import Ledger
from orchestrator.records import Intent, Lease, Sign

log = logging.getLogger(__name__)

SIGN_S = 30.0
"""An agent of which nothing else has reached the store for so long leaves a sign of life."""


class Standing(threading.Thread):
    def __init__(
        self, ledger: Ledger, intent: Intent, node: int, wake: Callable[[], None], heard: Callable[[], float | None], silent_s: float
    ) -> None:
        """`heard`: `boottime` of the last thing of this agent that others can see; `silent_s`: see `AgentClaim`."""
        super().__init__(name="standing", daemon=True)
        self._ledger, self._intent, self._node, self._wake, self._others = ledger, intent, node, wake, heard
        self._every_s, self._sign_s = intent.flush_s, min(SIGN_S, silent_s / 10)
        self._changed = threading.Condition()
        self._asked_at: float | None = None
        """When somebody last wanted a look at once."""
        self._signs = 0
        self._signed: float | None = None
        self._began = boottime()
        self.looked = 0.0
        """time.monotonic() at which the last look that came to its end began."""
        self.over = ""
        """Why another attempt counts, or none; empty: this one does, as far as is known."""
        self.asked: Literal["save", "now"] | None = None
        """What another driver wants."""
        self.heir: Lease | None = None
        """The lease of a newer driver that lives."""
        self.start()

    @property
    def heard(self) -> float:
        """`boottime` of the last thing of this agent that others can see."""
        return max(self._began, self._signed or 0.0, self._others() or 0.0)

    def look(self) -> None:
        """As soon as can be; `looked` tells when it was done."""
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
            except Exception as error:  # noqa: BLE001 - whatever it is, the next look may succeed; how long none did is seen in `heard`
                if said != (said := f"{type(error).__name__}: {error}"):
                    log.warning("the ledger cannot be looked at: %s", said)
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
        if ledger.outcome(intent.stage, intent.inputs, intent.attempt) is not None:
            self.over = f"{by} has closed this attempt"
        elif ledger.has_attempt(intent.stage, intent.inputs, intent.attempt + 1):
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
