"""What an error answer of an API server means: whose fault it is, whether it passes, and what to do.

Owns the exceptions and the meaning of status codes. Refuses to send a request again (`client` does).
"""

from __future__ import annotations

import email.utils
import json
from collections.abc import Mapping
from typing import Any

from kubernetes.client.exceptions import ApiException

from orchestrator.errors import NotFound, Refused, Unreachable
from orchestrator.redact import redacted


class AlreadyExists(Exception):
    """An object of this name exists. Perhaps our own request created it, and its answer was lost."""


class Conflict(Exception):
    """The object is not the one that the caller has read: its uid or its version differs."""


class Expired(Exception):
    """The server no longer has this version, so no watch can begin there (410): list again."""


class WebhookDown(Unreachable):
    """The API server answers, but a webhook that it must call does not: an operator is down, and somebody must repair it."""


class Busy(Unreachable):
    """The server says that it cannot answer now."""

    def __init__(self, said: str, after_s: float):
        """`after_s` is how long the server asks to wait. 0 means that it does not say."""
        super().__init__(said)
        self.after_s = after_s


class OverQuota(Refused):
    """A ResourceQuota of the namespace is used up. The same request may succeed later."""


def fault_of(server: str, what: str, error: ApiException) -> Exception:
    """The exception for an error answer. `server` is the server's URL, `what` the request, for people."""
    status, code = _status(error.body), error.status
    if not code:  # the client reports a bad certificate in this way
        return Unreachable(f"{server}: {what}: {redacted(str(error.reason)).partition(chr(10))[2]}")
    words = status.get("message") or _text(error.body)[:300] or error.reason or code
    message = redacted(str(words).strip())
    told = f"{server}: {what}: {message}"
    match code:
        case 404:
            return NotFound(message)
        case 409:
            return AlreadyExists(message) if status.get("reason") == "AlreadyExists" else Conflict(message)
        case 410:
            return Expired(message)
        case 401:
            return Refused(f"{told}; log in again, or name another context in the cluster profile")
        case 429:
            return Busy(told, _retry_after(error.headers or {}))
        case 500 if "failed calling webhook" in message:
            return WebhookDown(message)
        case _ if code >= 500:
            return Busy(told, _retry_after(error.headers or {}))
        case _ if code < 400:
            return Refused(f"{told}; it points elsewhere, and nothing is sent there. Write the API server's own address")
        case 403 if "exceeded quota" in message:
            return OverQuota(message)
        case _:
            return Refused(message)


def _text(body: bytes | str | None) -> str:
    return body.decode(errors="replace") if isinstance(body, bytes) else body or ""


def _status(body: bytes | str | None) -> dict[str, Any]:
    try:
        told = json.loads(body or "")
    except ValueError:
        return {}
    return told if isinstance(told, dict) else {}


def _retry_after(headers: Mapping[str, str]) -> float:
    """Seconds that the server asks to wait. 0 means that it does not ask."""
    value = headers.get("Retry-After", "")
    if value.isdecimal():
        return float(value)
    try:
        until = email.utils.parsedate_to_datetime(value)
        return max(0.0, (until - email.utils.parsedate_to_datetime(headers.get("Date", ""))).total_seconds())  # both by the server's clock
    except ValueError:
        return 0.0
