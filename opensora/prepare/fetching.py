"""Sources on their way to this machine: threads fetch, and whoever works on the sources is never kept waiting by a network.

Owns the threads, and what of earlier fetches is still good: a file that has its size and date. Refuses to know protocols (`download`).
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from urllib.request import url2pathname

from opensora.dataset.prepare_config import Download, Limits
from opensora.dataset.rows import Fetched, Leaves, Quarantine, Source
from opensora.errors import DiskFull
from opensora.prepare.digests import key_of
from opensora.prepare.guarded import FULL_DISK
from opensora.prepare.kept import Kept
from opensora.prepare.pool import LATER, Later

THREADS = 16
"""Fetches at a time; each host has its own limit (`download.per_host`)."""
AHEAD = 4 * THREADS
"""Sources that are fetched before somebody works on them."""

Fetch = Callable[[Source, Path, Download, Callable[[], bool], int], Fetched]


def stamp_of(path: str) -> str:
    """State of a file: its size and date. Empty: it is not there."""
    with contextlib.suppress(OSError, ValueError):
        found = os.stat(path)  # noqa: PTH116 - once a source, hundreds of thousands of times
        return f"{found.st_size}-{found.st_mtime_ns}"
    return ""


def local_path(source: Source) -> str:
    """Of a file that is read where it lies; empty: it has to be fetched."""
    if "://" not in source.uri:
        return source.uri
    return url2pathname(source.uri.partition("://")[2]) if source.uri.startswith("file://") else ""


def is_there(fetched: Fetched) -> bool:
    try:
        return os.stat(fetched.path).st_size == fetched.size  # noqa: PTH116
    except (OSError, ValueError):
        return False


def key_of_source(source: Source) -> str:
    return key_of(source.uri)


@dataclass
class Fetching:
    """Fetches sources in order; those that are kept take no thread."""

    fetch: Fetch
    folder: Path
    settings: Download
    kept: Kept[Fetched]
    halt: Callable[[], bool]
    max_bytes: int = Limits().max_bytes
    needed: Callable[[Source, Fetched], bool] = lambda source, fetched: True
    """Whether anybody is going to open the file. Of an address whose results are all kept, as on another machine, nothing is fetched."""

    elsewhere: bool = False
    """Whether addresses are fetched by whoever works on them, on another machine: then they come out as None, and nothing is fetched."""

    def known(self, source: Source) -> Fetched | Leaves | None:
        """What is kept of a source, if it is still so."""
        key = key_of_source(source)
        path = local_path(source)
        stamp = stamp_of(path) if path else ""
        if path and not stamp:
            return None
        found = self.kept.read(key, stamp)
        if isinstance(found, Fetched):
            found = Fetched(source, found.path, found.sha256, found.size)  # its list may say something new of it
            if not path and not self.elsewhere and not is_there(found) and self.needed(source, found):
                return None
        return found

    def bring(self, wanted: Iterable[tuple[str, Source]]) -> Iterator[tuple[int, Fetched | Leaves] | Later]:
        """Fetch sources that are not on this machine, each with the sha256 that its content had.

        Yields the place of each in `wanted` with what became of it, in the order in which they are ready; LATER when none is. Few are held
        at a time. Raises ConfigError, DiskFull.
        """
        hashes: dict[int, str] = {}

        def numbered() -> Iterator[tuple[int, Source]]:
            for place, (sha256, source) in enumerate(wanted):
                hashes[place] = sha256
                yield place, source

        for ready in self._each(numbered(), lambda source: None):
            if isinstance(ready, Later):
                yield ready
                continue
            place, source, found = ready
            if isinstance(found, Fetched) and found.sha256 != hashes[place]:
                found = Quarantine("source has changed", f"{source.uri} has other content now")
            del hashes[place]
            assert found is not None  # nobody brings what is fetched elsewhere
            yield place, found

    def one(self, source: Source) -> Fetched:
        """Fetch now, and keep the result. Raises Leaves, ConfigError, DiskFull."""
        path = local_path(source)
        stamp = stamp_of(path) if path else ""
        try:
            found = self.fetch(source, self.folder, self.settings, self.halt, self.max_bytes)
        except OSError as error:
            if error.errno in FULL_DISK:
                raise DiskFull(f"{self.folder}: {error.strerror}. Make room, and run again: what is done stays") from error
            raise Quarantine(f"cannot be read ({error.strerror or type(error).__name__})", source.uri) from error
        if not path or (stamp and stamp == stamp_of(path)):  # else it changed meanwhile
            self.kept.write(key_of_source(source), found, stamp)
        return found

    def all(self, sources: Iterator[Source]) -> Iterator[tuple[int, Source, Fetched | Leaves | None] | Later]:
        """Each source with what became of it, in the order in which they are ready; LATER when none is. Raises ConfigError, DiskFull."""
        return self._each(enumerate(sources), self.known)

    def _each(
        self, numbered: Iterator[tuple[int, Source]], known_of: Callable[[Source], Fetched | Leaves | None]
    ) -> Iterator[tuple[int, Source, Fetched | Leaves | None] | Later]:
        with ThreadPoolExecutor(THREADS, thread_name_prefix="fetch") as pool:
            under_way: dict[Future[Fetched], tuple[int, Source]] = {}
            more = True
            try:
                while (more or under_way) and not self.halt():
                    while more and len(under_way) < AHEAD:
                        index, source = next(numbered, (-1, None))
                        if source is None:
                            more = False
                        elif (known := known_of(source)) is not None:
                            yield index, source, known
                            break
                        elif self.elsewhere and not local_path(source):
                            yield index, source, None
                            break
                        else:
                            under_way[pool.submit(self.one, source)] = (index, source)
                    ready = [future for future in under_way if future.done()]
                    for future in ready:
                        index, source = under_way.pop(future)
                        try:
                            yield index, source, future.result()
                        except Leaves as leaves:
                            if not self.halt():  # a fetch that was asked to stop says nothing about its source
                                yield index, source, leaves
                    if not ready and (not more or len(under_way) >= AHEAD):
                        yield LATER
            finally:
                for future in under_way:
                    future.cancel()
