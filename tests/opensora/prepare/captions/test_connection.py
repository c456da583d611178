"""What kind of end a request took, and that no message holds a secret."""

from __future__ import annotations

import asyncio
import email.utils
import json
import math
from typing import Any

import pytest
from caption_server import Stub, serving

from opensora.dataset.prepare_config import CaptionServer
from opensora.errors import ConfigError
from opensora.prepare.captions.connection import Connection, Failed, Refused, retry_after
from opensora.prepare.captions.profiles import Shown, request

NOW = 1_800_000_000.0


def settings(url: str, **changes: Any) -> CaptionServer:
    return CaptionServer.model_validate({"kind": "server", "url": url, "model": "stub-vl"} | changes)


def ask(url: str, key: str = "", body: dict[str, Any] | None = None) -> object:
    async def once() -> object:
        async with Connection(settings(url), key) as connection:
            return await connection.ask(
                json.dumps(body or request(settings(url), "vllm", Shown(jpegs=("/9j/",)), seed=0, temperature=0)).encode()
            )

    return asyncio.run(once())


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        (None, None), ("7", 7), ("0.5", 0.5), ("-3", 0), ("soon", None), ("nan", None), ("", None),
        (email.utils.formatdate(NOW + 90, usegmt=True), 90), (email.utils.formatdate(NOW - 90, usegmt=True), 0),
    ],
)  # fmt: skip
def test_retry_after_is_seconds_or_a_date(header: str | None, seconds: float | None) -> None:
    found = retry_after(header, NOW)
    assert found == seconds or (found is not None and seconds is not None and math.isclose(found, seconds))


@pytest.mark.parametrize("ending", ["", "/", "/chat/completions", "?a=b", "#x"])
def test_an_address_is_understood_with_and_without_its_end(ending: str) -> None:
    with serving(Stub()) as stub:
        assert ask(stub.url + ending)


@pytest.mark.parametrize(
    "url", ["", "localhost:8000", "ftp://host/v1", "http://", "//host/v1", "http://user:secret@:x/v1", "file:///etc/passwd"]
)
def test_what_is_no_address_is_refused_without_quoting_it(url: str) -> None:
    with pytest.raises(ConfigError, match=r"caption\.url is no address") as error:
        Connection(settings(url), "")
    assert "secret" not in str(error.value)


@pytest.mark.parametrize("key", ["two words", "line\nend", "schlüssel", "nul\0"])
def test_a_key_that_no_header_carries_is_refused_without_quoting_it(key: str) -> None:
    with pytest.raises(ConfigError, match="OSCTL_CAPTION_KEY") as error:
        Connection(settings("http://127.0.0.1:1/v1"), key)
    assert key not in str(error.value)


def test_the_password_of_an_address_is_sent_and_stands_in_no_message() -> None:
    with serving(Stub(answering=lambda number, body: "400")) as stub:
        address = stub.url.replace("http://", "http://user:pass-word@")
        with pytest.raises(Refused) as error:
            ask(address)
        assert stub.headers[0]["Authorization"] == "Basic dXNlcjpwYXNzLXdvcmQ="
        assert "pass-word" not in str(error.value) + Connection(settings(address), "").address


def test_an_answer_without_an_end_is_not_read_to_its_end() -> None:
    with serving(Stub(answering=lambda number, body: "a long story " * 200_000)) as stub, pytest.raises(Failed, match="longer than 1 MiB"):
        ask(stub.url)


def test_a_server_elsewhere_is_not_followed() -> None:
    """A redirect would make a GET of the POST, and send the key to whoever is named."""
    with serving(Stub()) as stub:
        with pytest.raises(ConfigError, match=r"answers 307.*Set caption\.url"):
            ask(stub.url.replace("/v1", "/moved/v1"))
        assert not stub.requests


def test_an_address_where_nothing_is_says_how_one_looks() -> None:
    with serving(Stub()) as stub, pytest.raises(ConfigError, match=r"answers 404.*caption\.url should end as in http://host:8000/v1"):
        ask(stub.url.replace("/v1", "/v2"))
