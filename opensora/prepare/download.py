"""Sources come to this machine: local files are hashed where they lie, addresses are fetched into a folder.

Owns what a fetched file is called (digits of its address, never a name from outside), tries and pauses, and the reason with which a source
leaves. `parts` keeps what a later try goes on with, `http_files` speaks HTTP, `store_files` all that fsspec knows. Refuses to look into
files.

A part goes on only if the server names the state that it is of (an ETag, or the date of the last change) and says that it still has that
one; else the file begins anew. A file takes its own name once it is whole, so what has a name is whole. Two processes that want one file
take turns. Errors that may pass (5xx, 408, 429, a broken line, silence) are tried again with growing pauses, or after the time that the
host asks for; all others leave at once.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import random
import shutil
import stat
import time
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from urllib.request import url2pathname

from opensora.dataset.prepare_config import Download, Limits
from opensora.dataset.rows import Fetched, Quarantine, Source
from opensora.dataset.tables import FILMS
from opensora.errors import DiskFull
from opensora.prepare import http_files, store_files
from opensora.prepare.addresses import HTTP, hides_credentials, is_address, last_part, scheme, without_credentials
from opensora.prepare.parts import Again, Halt, Kept, Sleep, refuse_stopped, too_large
from opensora.prepare.turns import turn
from opensora.printable import quoted

CHUNK = 1 << 20
FIRST_PAUSE_S = 1.0
LONGEST_PAUSE_S = 60.0
LONGEST_WAIT_S = 600.0
"""A host that asks for more patience is left: the source may be retried in a later run."""
_KINDS = {
    stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device", stat.S_IFDIR: "a folder",
}  # fmt: skip
_FULL = (errno.ENOSPC, errno.EDQUOT)


def fetch(
    source: Source,
    folder: Path,
    settings: Download,
    *,
    halt: Halt,
    max_bytes: int = Limits().max_bytes,
    sleep: Sleep = time.sleep,
) -> Fetched:
    """A source on this machine, whole, with its sha256.

    Args:
        folder: what is fetched lies there; also the locks by which processes keep to `per_host`.
        halt: asked often; true: what is there is kept for the next run, and Quarantine(STOPPED) raised.
        max_bytes: larger files are refused, before they are sent where their size is told.

    Raises:
        Quarantine: it cannot be had.
        DiskFull: the folder's disk has no room.
    """
    if not is_address(source.uri):
        return _local(source, source.uri, halt, max_bytes)
    if scheme(source.uri) == "file":
        return _local(source, url2pathname(source.uri.partition("://")[2]), halt, max_bytes)
    if hides_credentials(source.uri):
        raise Quarantine("address holds credentials", f"{source.uri}: they are not kept. Put them into ~/.netrc, or into the environment")
    with _room(folder):
        folder.mkdir(parents=True, exist_ok=True)
        target = folder / file_name(source.uri)
        with turn(target.with_name(f"{target.name}.lock"), halt, sleep):
            if not target.exists():
                _tried(source.uri, target, settings, halt, max_bytes, sleep)
        return Fetched(source, str(target), _hashed(target, halt), target.stat().st_size)


def file_name(uri: str) -> str:
    """Of a fetched file: 32 hex digits of its address, and the ending of a film, where the address has one."""
    ending = PurePosixPath(last_part(uri.partition("::")[0])).suffix.lower()
    return hashlib.sha256(uri.encode("utf-8", "surrogateescape")).hexdigest()[:32] + (ending if ending in FILMS else "")


# --- Local files ------------------------------------------------------------------------------------------------------------------------


def _local(source: Source, path: str, halt: Halt, max_bytes: int) -> Fetched:
    """Hashed where it lies."""
    try:
        found = os.stat(path)  # noqa: PTH116 - a name of any bytes
        kind = stat.S_IFMT(found.st_mode)
        if kind != stat.S_IFREG:
            raise Quarantine("no regular file", f"{path}: {_KINDS.get(kind, 'something else')}")
        if found.st_size > max_bytes:
            raise too_large(path, found.st_size, max_bytes)
        return Fetched(source, path, _hashed(Path(path), halt), found.st_size)
    except FileNotFoundError:
        raise Quarantine("no such file", path) from None
    except PermissionError as error:
        raise Quarantine("may not be read", f"{path}: {error.strerror}") from None
    except (OSError, ValueError) as error:
        reason = "a link into itself" if isinstance(error, OSError) and error.errno == errno.ELOOP else "cannot be read"
        raise Quarantine(reason, f"{path}: {getattr(error, 'strerror', None) or error}") from None


def _hashed(path: Path, halt: Halt) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
            refuse_stopped(halt)
    return digest.hexdigest()


# --- Tries ------------------------------------------------------------------------------------------------------------------------------


def _tried(uri: str, target: Path, settings: Download, halt: Halt, max_bytes: int, sleep: Sleep) -> None:
    """The file under its own name. Raises Quarantine, DiskFull."""
    dice = random.Random(uri)  # pauses of many processes must not beat in time
    for number in range(1, settings.tries + 1):
        refuse_stopped(halt)
        with Kept(target, uri, max_bytes, halt) as part:
            try:
                if scheme(uri) in HTTP:
                    http_files.copy(uri, part, target.parent, settings, halt, sleep)
                else:
                    store_files.copy(uri, part)
                part.finish()
                return
            except Again as error:
                failed = error
        if number == settings.tries:
            break
        pause = min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2 ** (number - 1)) * (0.5 + dice.random())
        if failed.after_s is not None:
            if failed.after_s > LONGEST_WAIT_S:
                raise Quarantine(
                    "host asks to wait", f"{_shown(uri)}: for {failed.after_s:,.0f} s, at most {LONGEST_WAIT_S:,.0f} are waited"
                )
            pause = max(pause, failed.after_s)
        paused(pause, halt, sleep)
    raise Quarantine(failed.reason, f"{_shown(uri)}: {failed.detail}, {settings.tries} tries")


def paused(seconds: float, halt: Halt, sleep: Sleep) -> None:
    """Sleep in small pieces. Raises Quarantine, where the run is to stop meanwhile."""
    while seconds > 0:
        refuse_stopped(halt)
        sleep(min(seconds, 0.5))
        seconds -= 0.5


def _shown(uri: str) -> str:
    return quoted(without_credentials(uri), 200)


@contextlib.contextmanager
def _room(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in _FULL:
            raise
        free = shutil.disk_usage(next(one for one in (folder, *folder.parents) if one.exists())).free
        raise DiskFull(f"{folder}: {error.strerror}, {free:,} bytes are free. Make room, and run again: what is fetched stays") from error
