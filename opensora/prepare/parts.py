"""The beginning of a file that is on its way: kept on this disk with the state that it is of, so that a later try goes on with it.

Owns `.part` and the `.json` beside it, the bound on bytes, and what may be tried again. Refuses to know where bytes come from.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from opensora.dataset.rows import Quarantine
from opensora.prepare.addresses import without_credentials
from opensora.printable import quoted

STOPPED = "stopped"
"""Reason of a source that was under way when the run was asked to stop. It says nothing about the source."""

Halt = Callable[[], bool]
Sleep = Callable[[float], None]


def refuse_stopped(halt: Halt) -> None:
    """Raises Quarantine, where the run is to stop."""
    if halt():
        raise Quarantine(STOPPED, "the run was asked to stop; it is fetched when the run goes on")


def too_large(place: str, size: int, most: int) -> Quarantine:
    return Quarantine("larger than limits.max_bytes", f"{quoted(without_credentials(place), 200)}: {size:,} bytes, {most:,} are allowed")


class Again(Exception):
    """A try failed in a way that may pass."""

    def __init__(self, reason: str, detail: str, after_s: float | None = None) -> None:
        """`after_s`: seconds that the host asks for."""
        super().__init__(reason, detail)
        self.reason, self.detail, self.after_s = reason, detail, after_s


@dataclass(frozen=True)
class State:
    """Of a file at its place."""

    etag: str = ""
    """Empty: none, or a weak one, which says nothing about bytes."""
    modified: str = ""
    size: int | None = None
    """Bytes; None: the server does not say."""

    @property
    def known(self) -> bool:
        """Whether another answer can be told to be of the same state."""
        return bool(self.etag or self.modified)

    def same_as(self, other: State) -> bool:
        sizes = self.size is None or other.size is None or self.size == other.size
        return self.known and (self.etag, self.modified) == (other.etag, other.modified) and sizes


class Kept:
    """A `.part` beside its target, with the state that it is of. Implements Part."""

    def __init__(self, target: Path, uri: str, max_bytes: int, halt: Halt) -> None:
        self._target, self._uri, self._most, self._halt = target, uri, max_bytes, halt
        self._part, self._told = target.with_name(f"{target.name}.part"), target.with_name(f"{target.name}.json")
        self.size, self.state = 0, State()

    def __enter__(self) -> Kept:
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
            self.state = State(**json.loads(self._told.read_bytes()))
        self._file = self._part.open("ab") if self.state.known else self._part.open("wb")
        self.size = self._file.tell()
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        if not self.size:
            self._part.unlink(missing_ok=True)

    def begin(self, state: State) -> None:
        self._refuse_large(state.size or 0)
        if self.size:
            self._file.seek(0)
            self._file.truncate()
        self.size, self.state = 0, state
        self._told.unlink(missing_ok=True)
        if state.known:
            new = self._told.with_suffix(".new")
            new.write_text(json.dumps(asdict(state)))
            new.replace(self._told)

    def add(self, data: bytes) -> None:
        self._refuse_large(self.size + len(data))
        self._file.write(data)
        self.size += len(data)
        refuse_stopped(self._halt)

    def finish(self) -> None:
        """Raises Again, where the file is not whole."""
        if self.state.size is not None and self.size < self.state.size:
            raise Again("cut off", f"{self.size:,} of {self.state.size:,} bytes came")
        if self.state.size is not None and self.size > self.state.size:
            said = self.state.size
            self.begin(State())
            raise Again("longer than its server says", f"more than {said:,} bytes came")
        self._file.flush()
        os.fsync(self._file.fileno())
        self._part.replace(self._target)
        self._told.unlink(missing_ok=True)

    def _refuse_large(self, size: int) -> None:
        if size > self._most:
            self._told.unlink(missing_ok=True)
            self._part.unlink(missing_ok=True)
            raise too_large(self._uri, size, self._most)
