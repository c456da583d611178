"""Files of a latent cache at an address of fsspec, read whole or by ranges, as often as it takes.

Owns the patience with a store that fails for a while, and which failures no waiting mends: a file that is gone or that may not be read.
Refuses to know what the bytes mean (`streamed`). Credentials and endpoint are those of every reader of clips (`opensora.data.folder`).
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import fsspec
import fsspec.config

from opensora.errors import ConfigError, DataError
from opensora.printable import one_line, quoted

PATIENCE = "OSCTL_S3_PATIENCE_S"
"""Variable: seconds that a store may fail before it is said to stay away; the same for all of osctl's readers."""
PATIENCE_S = 30.0
PAUSES_S = (0.1, 0.3, 1.0, 2.0)
"""Between two tries; the last one again and again."""

ONE_TRY = {"total_max_attempts": 1}
"""For botocore: its own five tries under each of s3fs's five make one failure take 20 s, and the patience is ours."""

Span = tuple[int, int]
"""First byte, and the one after the last."""
Answer = TypeVar("Answer")

log = logging.getLogger(__name__)


class Remote:
    """A folder at an address."""

    def __init__(self, address: str, env: Mapping[str, str] = os.environ) -> None:
        """Raises ConfigError for an address that fsspec does not know, and for a patience that is no number."""
        self.address = address.rstrip("/")
        self._patience = _patience(env)
        try:
            self._files, self._root = fsspec.core.url_to_fs(self.address, **_options(self.address))
        except (ValueError, ImportError) as error:
            raise ConfigError(f"data.source {quoted(address)}: {error}. Give a path, or an address that fsspec knows") from error
        self.closed = threading.Event()
        """Set by whoever no longer needs the answers: then nobody waits for the store any longer."""

    def folders(self) -> list[str]:
        """Names of what lies in the folder. Nothing where there is no such folder. Raises DataError."""

        def ask() -> list[str]:
            try:
                found = self._files.ls(self._root, detail=False)
            except FileNotFoundError as error:
                if isinstance(error.__cause__, OSError) and not isinstance(error.__cause__, FileNotFoundError):
                    raise error.__cause__ from None
                return []
            return sorted(str(name).rstrip("/").rpartition("/")[2] for name in found)

        try:
            return self._patiently(ask, self.address)
        except _Gone:
            return []

    def read(self, name: str) -> bytes:
        """A whole file. Raises DataError; FileNotFoundError where it is not there."""
        place = f"{self.address}/{name}"
        try:
            return self._patiently(lambda: bytes(self._files.cat_file(f"{self._root}/{name}")), place)
        except _Gone as error:
            raise FileNotFoundError(place) from error

    def ranges(self, name: str, spans: Sequence[Span], size: int) -> list[bytes]:
        """These parts of a file, asked for side by side; again and again, while the store fails.

        Args:
            size: bytes that the file should have.

        Raises:
            DataError: the file is gone, is shorter, may not be read, or the store stays away.
        """
        place, path = f"{self.address}/{name}", f"{self._root}/{name}"
        found: dict[int, bytes] = {}

        def ask() -> None:
            left = [number for number in range(len(spans)) if number not in found]
            starts, ends = [spans[number][0] for number in left], [spans[number][1] for number in left]
            failed: Exception | None = None
            for number, answer in zip(left, self._files.cat_ranges([path] * len(left), starts, ends, on_error="return"), strict=True):
                start, end = spans[number]
                if isinstance(answer, Exception):
                    failed = failed or answer
                elif len(answer) != end - start:
                    failed = failed or OSError(f"{len(answer)} bytes came of {end - start}")
                else:
                    found[number] = bytes(answer)
            if failed is not None:
                self._refuse_other_size(name, size)
                raise failed

        try:
            self._patiently(ask, place)
        except _Gone as error:
            raise DataError(f"{place}: is gone. Publish the data set again, or train from one whose latents are whole") from error
        return [found[number] for number in range(len(spans))]

    def _refuse_other_size(self, name: str, size: int) -> None:
        """Raises DataError, where the file has another size. A store that does not say is asked again."""
        path = f"{self._root}/{name}"
        try:
            self._files.invalidate_cache(self._root)
            found = self._files.size(path)
        except Exception:  # noqa: BLE001 - the failure of the read itself says more
            return
        if found is not None and found != size:
            raise DataError(
                f"{self.address}/{name}: {found} bytes, the latent cache has {size} there; somebody changed it. Publish the data set again"
            )

    def _patiently(self, ask: Callable[[], Answer], place: str) -> Answer:
        began, tries = time.monotonic(), 0
        while True:
            try:
                return ask()
            except (DataError, ConfigError):
                raise
            except FileNotFoundError as error:
                if not isinstance(error.__cause__, OSError):
                    raise _Gone from error
                failure: Exception = error.__cause__  # fsspec's HTTP calls every failure a file that is not there
            except PermissionError as error:
                raise DataError(f"{place}: may not be read ({one_line(str(error))}). Mend the credentials, then launch again") from error
            except Exception as error:  # noqa: BLE001 - clients of file systems have kinds of their own (botocore's, aiohttp's)
                failure = error
            waited = time.monotonic() - began
            said = one_line(f"{type(failure).__name__}: {failure}")[:300]
            if waited >= self._patience or self.closed.is_set():
                raise DataError(
                    f"{place}: cannot be read ({said}), {tries + 1} tries in {waited:.0f} s. Mend the access to the store, then launch "
                    f"again: the stage goes on from its last checkpoint ({PATIENCE}={self._patience:g} is how long it waits)"
                ) from failure
            if not tries:
                log.warning("%s: cannot be read now (%s); tried again for %g s", place, said, self._patience)
            self.closed.wait(PAUSES_S[min(tries, len(PAUSES_S) - 1)])
            tries += 1


class _Gone(Exception):
    """There is no such file."""


def _options(address: str) -> dict[str, Any]:
    """Of the file system: what fsspec was told elsewhere (how buckets are addressed: `orchestrator.modules`), and one try."""
    if not address.startswith(("s3://", "s3a://")):
        return {}
    told = fsspec.config.conf.get("s3", {}).get("config_kwargs", {})
    return {"config_kwargs": {**told, "retries": dict(ONE_TRY)}}


def _patience(env: Mapping[str, str]) -> float:
    """Raises ConfigError."""
    text = env.get(PATIENCE) or str(PATIENCE_S)
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < float("inf"):
        raise ConfigError(f"{PATIENCE}: expected a number of seconds, found {text[:40]!r}. Correct it, or unset it")
    return seconds
