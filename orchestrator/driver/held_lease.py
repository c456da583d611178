"""The lease of a driver at work: renewed by a thread, and checked before each effect.

Owns the renewals, and the refusal of everything once another driver has the lease or the lease is gone.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Iterator

from orchestrator.driver.clock import Clock
from orchestrator.errors import Refused, StoreConflict, Unreachable
from orchestrator.ledger.lease import LeaseHandle

log = logging.getLogger(__name__)


class HeldLease:
    """A lease that is kept alive by a thread while the driver acts or waits for a slow store, and checked before each effect."""

    def __init__(
        self,
        handle: LeaseHandle,
        clock: Clock,
        ttl_s: float,
        pipeline: str,
        *,
        follow: str = "osctl watch",
        again: str = "osctl launch",
    ):
        """
        Args:
            follow: the command that shows what another holder does.
            again: the command that begins again, where somebody has removed the lease.
        """
        self._follow, self._again = follow, again
        self.handle, self.clock, self.ttl_s, self.pipeline = handle, clock, ttl_s, pipeline
        self._lock = threading.Lock()
        self._renewed = clock.now()
        self._lost = False
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="lease", daemon=True)

    def __enter__(self) -> HeldLease:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    @property
    def epoch(self) -> int:
        return self.handle.epoch

    def check(self) -> None:
        """Renew where a third of its life is over. Raises Refused where another driver has taken it, or somebody has removed it."""
        with self.ours(), self._lock:
            if self._lost:
                raise StoreConflict(f"{self.pipeline}: lease")
            now = self.clock.now()
            if not 0 <= now - self._renewed < self.ttl_s / 3:
                self.handle.renew(now)
                self._renewed = now

    @contextlib.contextmanager
    def ours(self) -> Iterator[None]:
        """Turns the loss of the lease into a refusal."""
        try:
            yield
        except StoreConflict as error:
            self._lost = True
            if self.handle.gone:
                raise Refused(
                    f"{self.pipeline}: {self.handle.gone}; nobody else has taken over. This launch stops, since it cannot write down what "
                    f"it does. Put back what was removed, or begin anew: {self._again}"
                ) from error
            raise Refused(
                f"{self.pipeline}: another launch has taken over the lease (epoch {self.epoch} is over). "
                f"This one stops; follow the other with: {self._follow}"
            ) from error

    def _keep(self) -> None:
        """Goes on after any fault but the loss of the lease: a driver whose lease is not renewed is taken for dead."""
        said = ""
        while not self._over.wait(self.ttl_s / 3):
            try:
                self.check()
                said = ""
            except Exception as error:  # noqa: BLE001 - whatever it is, the next renewal may succeed, and `check` tells the driver too
                if self._lost:
                    return
                if said != (said := f"{type(error).__name__}: {error}"):
                    log.warning("lease not renewed: %s", error if isinstance(error, Unreachable) else said)
