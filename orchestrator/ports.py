"""The outside worlds as the core sees them. Adapters implement these protocols; tests run the same contract on each adapter."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol


@dataclass(frozen=True)
class Object:
    """Content and version of one object. `etag` is opaque; hand it to `replace`."""

    data: bytes
    etag: str


class Store(Protocol):
    """Objects under keys with `/`. Reads see every finished write. Nothing is ever overwritten but through `replace`."""

    url: str

    def read(self, key: str) -> Object:
        """Raises NotFound, Unreachable."""

    def create(self, key: str, data: bytes) -> str:
        """Put if absent; the etag. The same bytes again succeed. Raises StoreConflict where other content is there."""

    def replace(self, key: str, data: bytes, etag: str) -> str:
        """Put if the object still has this etag; the new etag. Raises StoreConflict, NotFound."""

    def list(self, prefix: str) -> Iterator[str]:
        """Keys that start with `prefix` (a plain string prefix), in lexical order."""

    def upload(self, key: str, path: Path) -> None:
        """`create` from a file of any size. Raises StoreConflict where other content is there."""

    def download(self, key: str, path: Path) -> None:
        """Write the object to `path`, whole or not at all. Raises NotFound, Unreachable."""

    def size(self, key: str) -> int:
        """Bytes. Raises NotFound."""


@dataclass(frozen=True)
class Life:
    """What is known of a submitted attempt's process or job.

    `unknown` is said when the backend cannot be asked. It is never guessed into another state.
    """

    state: Literal["absent", "running", "ended", "unknown"]
    bound: float | None = None
    """Unix time at which devices were first held."""
    ended: float | None = None
    """Unix time of death, as seen from outside."""
    exit_code: int | None = None
    """None: nobody saw it die."""


class Backend(Protocol):
    """Where attempts live: local processes, or a cluster."""

    def submit(self, intent_key: str, run_key: str) -> None:
        """Start the attempt. Idempotent: an attempt that lives or has lived is not started again. Raises Unreachable, Refused."""

    def observe(self, run_key: str) -> Life: ...

    def drain(self, run_key: str) -> None:
        """Ask it to save and leave. Returns at once."""

    def kill(self, run_key: str) -> None:
        """End it now. Returns when it is gone."""
