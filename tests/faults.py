"""Thirty kinds of fault, for threads that none of them may end in silence."""

from __future__ import annotations

import errno
import http.client
import json
import socket
import ssl
import struct
import subprocess
from collections.abc import Iterator

from orchestrator.errors import CorruptCheckpoint, NotFound, Refused, Unreachable, UsageError


def faults_of_thirty_kinds() -> Iterator[Exception]:
    yield from (Unreachable("store: away"), Refused("store: no"), CorruptCheckpoint("a file"), NotFound("a key"), UsageError("a device"))
    for number in (errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.EMFILE, errno.ESTALE, errno.ENOENT):
        yield OSError(number, errno.errorcode[number])
    yield from (ConnectionResetError("reset"), BrokenPipeError("pipe"), TimeoutError("time"), socket.gaierror(-3, "no name"))
    yield from (ssl.SSLError("a certificate"), http.client.IncompleteRead(b""), subprocess.TimeoutExpired("aws", 1.0))
    yield from (ValueError("odd"), KeyError("kind"), TypeError("none"), IndexError("7"), AttributeError("items"), ZeroDivisionError("0"))
    yield from (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "odd"), json.JSONDecodeError("odd", "{", 0), struct.error("short"))
    yield from (MemoryError("full"), RecursionError("deep"), AssertionError("never"))
