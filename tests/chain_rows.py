"""Functions of a chain, for guards: of a module of their own, so that a guard can import them."""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Sequence
from typing import NamedTuple

from opensora.dataset.rows import Drop
from opensora.prepare.pool import Handed


class Film(NamedTuple):
    number: int
    what: str = ""
    """What happens to whoever works on it: `crash`, `drop`, `nothing for models`, `model crashes`, `model hangs`."""
    decode_s: float = 0.0
    caption_s: float = 0.0
    """How long decoders and models take, in seconds."""


class Seen(NamedTuple):
    number: int
    pid: int
    together: int
    """Rows of the same call."""


def decoded(row: Film) -> Handed:
    if row.what == "crash":
        ctypes.string_at(0)
    if row.what == "drop":
        raise Drop("not wanted")
    time.sleep(row.decode_s)
    return Handed(2 * row.number, row if row.what != "nothing for models" else None)


def captioned(rows: Sequence[Film]) -> list[Seen]:
    for row in rows:
        if row.what == "model crashes":
            os.abort()
        if row.what == "model hangs":
            time.sleep(3600)
        time.sleep(row.caption_s)
    return [Seen(row.number, os.getpid(), len(rows)) for row in rows]
