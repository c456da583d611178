"""Results of steps in the store, beside those of the run directory: a preparation goes on on another machine, or after its disk is lost.

    RUN_DIR/kept/STEP/DIGEST/NAME.jsonl  <->  datasets/<name>/kept/STEP/DIGEST/NAME.jsonl

A pack of results has its final name once it is whole, and never changes: so what is there is not looked at again, and of two machines that
made the same one the first counts. Owns what of a run directory is copied. Refuses to overwrite, and to delete what nobody asked it to.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from opensora.dataset.kept_packs import SUFFIX, name_of, without
from orchestrator.errors import NotFound, StoreConflict
from orchestrator.ports import Store, check_key

TRANSFERS = 8
"""Files on their way at a time."""
ROUND_S = 2.0
"""A look at new files copies for so long at most, then the caller has its turn."""
UNFINISHED = (".tmp", ".part", ".partial")
"""Ends of names that are no result yet; so are names that begin with a dot."""


class Mirror:
    def __init__(self, folder: Path, store: Store, prefix: str, clock: Callable[[], float] = time.monotonic) -> None:
        """`folder`: RUN_DIR/kept; `prefix`: the folder of the store that holds the same."""
        self._folder, self._store, self._prefix, self._clock = folder, store, prefix, clock
        self._there: set[str] = set()
        """Names that the store has."""
        self._looked: dict[Path, int] = {}
        """Folders as they were when all in them had been copied: mtime in nanoseconds."""
        self._waiting: list[str] = []
        self._rest_until = 0.0

    def bring_back(self, say: Callable[[int, int], None] = lambda done, total: None, *, only: str = "") -> int:
        """Fetch what the store has and this folder has not; how many files. Raises Unreachable, Refused.

        Args:
            say: told after each file (fetched, to fetch).
            only: how names end that are fetched.
        """
        self._there = {check_key(key).removeprefix(f"{self._prefix}/") for key in self._store.list(f"{self._prefix}/")}
        missing = sorted(name for name in self._there if name.endswith(only) and not (self._folder / name).is_file())
        with ThreadPoolExecutor(TRANSFERS) as pool:
            for done, _ in enumerate(pool.map(self._fetch, missing), 1):
                say(done, len(missing))
        return len(missing)

    def copy_new(self, *, all_: bool = False) -> int:
        """Copy results that are new into the store; how many. `all_`: until none is left. Raises Unreachable, Refused."""
        began, copied = self._clock(), 0
        if not self._waiting:
            if not all_ and began < self._rest_until:
                return 0
            self._waiting = list(self._new())
            self._rest_until = self._clock() + 20 * (self._clock() - began)  # looking must not become the work
        try:
            while self._waiting and (all_ or self._clock() - began < ROUND_S):
                some, self._waiting = self._waiting[: 4 * TRANSFERS], self._waiting[4 * TRANSFERS :]
                self._send(some)
                copied += len(some)
        except BaseException:
            self._waiting, self._looked = [], {}  # what was not copied is found again
            raise
        return copied

    def forget(self, names: Sequence[str]) -> None:
        """Remove results on request, here and in the store; absent is well. Raises Unreachable, Refused."""
        for name in names:
            (self._folder / name).unlink(missing_ok=True)
            self._store.discard(f"{self._prefix}/{name}")

    def shorten(self, name: str, keys: Collection[str]) -> None:
        """Take the results of these keys out of a pack, here and in the store. Repeatable. Raises Unreachable, Refused."""
        path = self._folder / name
        left = without(path.read_bytes(), keys)
        new = f"{name.rpartition('/')[0]}/{name_of(left)}"
        if left and new != name:
            draft = path.with_name(f".{path.name}.partial")
            draft.write_bytes(left)
            draft.replace(self._folder / new)
            self._send([new])
        self.forget([name])

    def _new(self) -> Iterator[str]:
        """Packs last: whoever has a pack of clips may trust that the store has the clips."""
        packs: list[str] = []
        for name in self._found():
            if name.endswith(SUFFIX):
                packs.append(name)
            else:
                yield name
        yield from packs

    def _found(self) -> Iterator[str]:
        for place, folders, files in os.walk(self._folder):
            folder = Path(place)
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            with contextlib.suppress(FileNotFoundError):
                changed = folder.stat().st_mtime_ns
                if self._looked.get(folder) == changed:
                    continue
                inside = folder.relative_to(self._folder).as_posix()
                names = [name if inside == "." else f"{inside}/{name}" for name in sorted(files) if is_result(name)]
                yield from (name for name in names if name not in self._there)
                self._looked[folder] = changed if changed < time.time_ns() - 2 * 10**9 else 0  # a clock of files may be coarse

    def _send(self, names: Sequence[str]) -> None:
        """Packs after all others; several are on their way at a time."""
        packs = [name for name in names if name.endswith(SUFFIX)]
        with ThreadPoolExecutor(TRANSFERS) as pool:
            for some in ([name for name in names if not name.endswith(SUFFIX)], packs):
                for name in pool.map(self._send_one, some):
                    self._there.add(name)

    def _send_one(self, name: str) -> str:
        key = check_key(f"{self._prefix}/{name}")
        with contextlib.suppress(StoreConflict, FileNotFoundError):  # another machine's counts; or it is gone again
            self._store.upload(key, self._folder / name)
        return name

    def _fetch(self, name: str) -> None:
        with contextlib.suppress(NotFound):
            self._store.download(f"{self._prefix}/{name}", self._folder / name)


def is_result(name: str) -> bool:
    return not name.startswith(".") and not name.endswith(UNFINISHED)
