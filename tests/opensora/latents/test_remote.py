"""Laws of reading from a place that may fail: what osctl says of the store counts, patience ends, what no waiting mends is said at once."""

from __future__ import annotations

import fsspec
import fsspec.config
import pytest

from opensora.errors import ConfigError, DataError
from opensora.latents.remote import PATIENCE, Remote


def test_how_buckets_are_addressed_is_what_osctl_told_fsspec(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(fsspec.config.conf, "s3", {"config_kwargs": {"s3": {"addressing_style": "virtual"}}})
    files = Remote("s3://bucket/set/latents")._files
    assert files.config_kwargs["s3"] == {"addressing_style": "virtual"}
    assert files.config_kwargs["retries"]["total_max_attempts"] == 1  # botocore adds a mode of its own to our words


def test_a_file_that_is_gone_or_forbidden_is_said_without_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    remote = Remote("memory://nothing/here", {PATIENCE: "1000"})
    assert remote.folders() == []
    with pytest.raises(FileNotFoundError):
        remote.read("x")
    with pytest.raises(DataError, match=r"memory://nothing/here/x: is gone\. Publish the data set again"):
        remote.ranges("x", [(0, 3)], 3)

    def forbidden(*_: object, **__: object) -> bytes:
        raise PermissionError("not yours")

    monkeypatch.setattr(type(remote._files), "cat_file", forbidden)
    with pytest.raises(DataError, match=r"x: may not be read \(not yours\). Mend the credentials"):
        remote.read("x")


def test_a_reader_that_was_closed_waits_no_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    remote = Remote("memory://some/where", {PATIENCE: "1000"})

    def failing(*_: object, **__: object) -> bytes:
        raise OSError("no route")

    monkeypatch.setattr(type(remote._files), "cat_file", failing)
    remote.closed.set()
    with pytest.raises(DataError, match=r"x: cannot be read \(OSError: no route\), 1 tries"):
        remote.read("x")


@pytest.mark.parametrize("text", ["soon", "-1", "inf", "nan"])
def test_a_patience_that_is_no_number_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=f"{PATIENCE}: expected a number of seconds, found '{text}'"):
        Remote("memory://x", {PATIENCE: text})


def test_an_address_that_nobody_knows_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"data\.source nowhere://x: "):
        Remote("nowhere://x")
