"""One file for each outside world; nothing else imports an SDK.

`open_store` turns a URL into a store and imports only what that store needs, so that a laptop without S3 never loads boto3.
"""

from __future__ import annotations

from pathlib import Path
from urllib.parse import unquote, urlsplit

from orchestrator.errors import Refused, UsageError
from orchestrator.ports import Store


def open_store(url: str) -> Store:
    """A folder (`path`, `file:///path`) or an S3 prefix (`s3://bucket/prefix`).

    Asks nothing of the store yet: `Store.probe` does. Raises UsageError.
    """
    scheme, separator, _ = url.partition("://")
    if not separator or scheme == "file":
        from orchestrator.adapters.folder import FolderStore

        return FolderStore(Path(_file_path(url) if separator else url))
    if scheme == "s3":
        from orchestrator.adapters.s3 import S3Store

        return S3Store(url)
    raise UsageError(f"store {url}: {scheme}:// is not a known kind of store; give a folder, file:///path or s3://bucket/prefix")


def _file_path(url: str) -> str:
    parts = urlsplit(url)
    if parts.netloc not in ("", "localhost") or not parts.path:
        raise UsageError(f"store {url}: a file URL names an absolute path of this host; write file:///{parts.netloc}{parts.path}")
    return unquote(parts.path)


def check_key(key: str) -> str:
    """The key itself, if it means the same object in every kind of store. Raises Refused.

    A key is never trusted: manifests name files, and a manifest may have been written by someone else.
    """
    parts = key.split("/")
    if not key or any(part in ("", ".", "..") for part in parts):
        raise Refused(f"key {key!r}: has an empty, `.` or `..` part; keys are relative paths below the store")
    if not key.isprintable() or "\\" in key:
        raise Refused(f"key {key!r}: holds a backslash or a character that cannot be printed")
    if len(key.encode()) > 900 or any(len(part.encode()) > 200 for part in parts):
        raise Refused(f"key {key!r}: {len(key.encode())} bytes long; 900 at most, and 200 a part")
    return key
