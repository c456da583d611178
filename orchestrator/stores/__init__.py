"""Object stores: a folder, or S3. The only other package that imports an SDK of a store is `inputs`, which reads clips and imports.

`open_store` turns a URL into a store and imports only what that store needs, so that a laptop without S3 never loads boto3.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import unquote, urlsplit

from orchestrator.errors import UsageError
from orchestrator.ports import Store
from orchestrator.redact import redacted


def open_store(url: str, env: Mapping[str, str] = os.environ) -> Store:
    """The store at a URL: a folder (`path`, `file:///path`) or an S3 prefix (`s3://bucket/prefix`).

    Sends no request to the store; `Store.probe` does. Raises UsageError.

    Args:
        env: the environment variables with endpoint and credentials.
    """
    scheme, separator, _ = url.partition("://")
    if not separator or scheme == "file":
        from orchestrator.stores.folder import FolderStore

        return FolderStore(Path(_file_path(url) if separator else url))
    if scheme == "s3":
        from orchestrator.stores.s3 import S3Store

        return S3Store(url, env=env)
    raise UsageError(f"store {redacted(url)}: {scheme}:// is not a known kind of store; give a folder, file:///path or s3://bucket/prefix")


def _file_path(url: str) -> str:
    parts = urlsplit(url)
    if parts.netloc not in ("", "localhost") or not parts.path:
        place = redacted(f"file:///{parts.netloc.rpartition('@')[2]}{parts.path}")
        raise UsageError(f"store {redacted(url)}: a file URL names an absolute path of this host; write {place}")
    return unquote(parts.path)
