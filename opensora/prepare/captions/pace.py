"""How many requests are under way at a time: up to `concurrency`, fewer where the server says that it is busy, more again afterwards. Pure.

- A server that refuses a request (429, or an error with Retry-After) still works on the others that are under way: that many are its
  limit.
- After enough answers in a row one more is tried. Where that is refused, the next trial waits for twice as many answers: a server with
  a fixed limit costs few refused requests.
- `Retry-After` stops new requests for so long.
"""

from __future__ import annotations

ROUNDS = 4
"""Rounds of answers at a limit before one more request is tried."""
MOST_ROUNDS = 64


class Pace:
    def __init__(self, most: int) -> None:
        """Args: most: requests at a time, whatever the server takes."""
        self.limit, self.in_flight = most, 0
        self.refused_in_a_row = 0
        """While one request at a time was sent."""
        self._most, self._rounds, self._answers = most, ROUNDS, 0
        self._tried = False  # the limit was raised, and no request has been refused or answered enough since
        self._quiet_until = 0.0

    def wait(self, now: float) -> float | None:
        """Seconds until the next request may go; 0: now; None: not before one under way is answered."""
        if now < self._quiet_until:
            return self._quiet_until - now
        return 0.0 if self.in_flight < self.limit else None

    def sent(self) -> None:
        self.in_flight += 1

    def done(self) -> None:
        """A request has ended, in whatever way. Called before `answered` or `refused`."""
        self.in_flight -= 1

    def answered(self) -> None:
        """The server took the request."""
        self.refused_in_a_row = 0
        self._answers += 1
        if self.limit < self._most and self._answers >= self._rounds * self.limit:
            self.limit, self._answers, self._tried = self.limit + 1, 0, True

    def refused(self, now: float, retry_after_s: float | None) -> None:
        """The server is busy."""
        if self.in_flight == 0:
            self.refused_in_a_row += 1
        if self._tried:
            self._rounds = min(2 * self._rounds, MOST_ROUNDS)
        self.limit, self._answers, self._tried = max(1, min(self.limit, self.in_flight)), 0, False
        if retry_after_s is not None:
            self._quiet_until = max(self._quiet_until, now + retry_after_s)
