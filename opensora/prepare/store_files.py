"""Files of object stores and of tars, through fsspec: copied into a part, which goes on where it was.

Owns the clients' errors, turned into those of `download`. Refuses to write to a store.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import fsspec

from opensora.dataset.rows import Leaves, Quarantine
from opensora.dataset.webdataset import Member, Part, members
from opensora.errors import ConfigError, TrainerError
from opensora.prepare.addresses import scheme, tar_and_member, without_credentials
from opensora.prepare.parts import Again, Kept, State
from opensora.printable import quoted

CHUNK = 1 << 20


def copy(uri: str, part: Kept) -> None:
    """Raises Quarantine, Again, DiskFull."""
    shown = quoted(without_credentials(uri), 200)
    try:
        if scheme(uri) == "tar":
            _member(uri, part)
        else:
            _object(uri, part)
    except (Leaves, Again, TrainerError, FileNotFoundError, PermissionError) as error:
        if isinstance(error, ConfigError):
            raise Quarantine("cannot be read", str(error)) from None
        if isinstance(error, FileNotFoundError):
            raise Quarantine("no such file", shown) from None
        if isinstance(error, PermissionError):
            raise Quarantine("may not be read", shown) from None
        raise
    except (ImportError, ValueError) as error:
        raise Quarantine("no client for this address", f"{shown}: {_said(error)}") from None
    except OSError as error:
        if error.errno is not None and error.filename is not None:  # of this disk
            raise
        raise Again("store does not answer", _said(error)) from error
    except Exception as error:
        raise Again("store does not answer", _said(error)) from error


def _said(error: Exception) -> str:
    return quoted(without_credentials(f"{type(error).__name__}: {error}"), 200)


def _object(uri: str, part: Kept) -> None:
    files, path = fsspec.core.url_to_fs(uri)
    files.invalidate_cache(path)  # a listing of earlier knows an earlier state
    info = files.info(path)
    if info.get("type") == "directory":
        raise Quarantine("no regular file", f"{quoted(uri, 200)}: a folder")
    state = State(
        str(info.get("ETag") or info.get("etag") or ""), str(info.get("LastModified") or info.get("mtime") or ""), info.get("size")
    )
    if not part.state.same_as(state) or (state.size is not None and part.size > state.size):
        part.begin(state)
    with files.open(path, "rb", cache_type="readahead", block_size=8 * CHUNK) as file:
        if part.size:
            file.seek(part.size)
        while data := file.read(CHUNK):
            part.add(data)


def _member(uri: str, part: Kept) -> None:
    tar, name = tar_and_member(uri)
    found = _index(tar).get(name)
    if found is None:
        raise Quarantine("no such file", f"{quoted(uri, 200)}: the tar has no such member")
    part.begin(State(size=found.size))
    files, path = fsspec.core.url_to_fs(tar)
    with files.open(path, "rb") as file:
        inside = Part(file, found.offset, found.size)
        while data := inside.read(CHUNK):
            part.add(data)


@lru_cache(maxsize=32)
def _index(tar: str) -> dict[str, Member]:
    """Regular members of a tar, by name; read once for all of them. Raises ConfigError, and what its file system says."""
    files, path = fsspec.core.url_to_fs(tar)
    with files.open(path, "rb") as opened:
        file: Any = opened
        size = int(file.seek(0, 2))
        file.seek(0)
        return {
            name: Member(tar, name, info.offset_data, info.size)
            for info, name in members(file, size, without_credentials(tar))
            if info.isreg() and info.sparse is None
        }
