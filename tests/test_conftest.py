"""What a test has from those before it in the same process: nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import fsspec
import pytest


@pytest.mark.s3
@pytest.mark.parametrize("turn", ["first", "second"])
def test_a_bucket_is_read_from_the_server_of_this_test(turn: str, start_s3: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    server = start_s3()
    for name, value in server.env.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", server.endpoint)
    (server.root / server.bucket / "turn").write_text(turn)
    files, path = fsspec.core.url_to_fs(server.url("turn"))
    assert files.cat_file(path).decode() == turn
