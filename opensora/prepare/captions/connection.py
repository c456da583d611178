"""One request to a captioning server, and what kind of end it took. The only module here that opens a connection.

Owns addresses, the key, time limits and the sorting of failures:

| what happens | raised | what it is |
|---|---|---|
| no connection | Unreachable | the server's fault, not the clip's |
| 429, or 5xx with Retry-After | Busy | send fewer, later |
| 5xx, 408, reset, no answer in time, wrong JSON | Failed | may be this clip's fault: again a few times |
| 401, 402, 403, 404, 3xx | ConfigError | the same for every clip |
| any other 4xx | Refused | this clip's fault: never again |

Refuses to send anything twice and to know of budgets. The key and the password of an address stand in no message: what a server says is
searched for both before it goes on.
"""

from __future__ import annotations

import email.utils
import io
import json
import time
from collections.abc import Mapping
from types import TracebackType

import aiohttp
import yarl

from opensora.dataset.prepare_config import CaptionServer
from opensora.errors import ConfigError
from opensora.prepare.captions import profiles
from opensora.printable import quoted

KEY_VARIABLE = "OSCTL_CAPTION_KEY"
MOST_ANSWER = 1 << 20
"""Bytes of an answer that are read. One of 4,096 tokens has some 40 KB, in Chinese with escapes."""
MOST_WORDS = 300
"""Characters of what a server says that are shown."""
CONNECT_S = 10.0
"""A connection that is not there after so long, or a list of models (or after `timeout_s`, where that is less), counts as none."""


class Unreachable(Exception):
    """No connection."""


class Busy(Exception):
    """The server asks for fewer requests."""

    def __init__(self, words: str, retry_after_s: float | None) -> None:
        super().__init__(words)
        self.retry_after_s = retry_after_s


class Failed(Exception):
    """The server did not manage this request."""

    def __init__(self, reason: str, detail: str) -> None:
        """Args: reason: a few stable words; detail: what happened."""
        super().__init__(detail)
        self.reason, self.detail = reason, detail


class Refused(Failed):
    """The server does not take this request, now or later."""


class Connection:
    """`async with` it."""

    def __init__(self, settings: CaptionServer, key: str) -> None:
        """
        Args:
            key: sent as a bearer token; empty: none.

        Raises:
            ConfigError: the address is none, or the key cannot be sent.
        """
        if not all(33 <= ord(letter) < 127 for letter in key):
            raise ConfigError(f"{KEY_VARIABLE} holds a space or a letter that no header can carry. Set it to the key alone")
        address = _address(settings.url)
        self._secrets = [secret for secret in (key, address.password) if secret]
        basic = aiohttp.encode_basic_auth(address.user, address.password or "") if address.user else ""
        self._authorization = f"Bearer {key}" if key else basic
        self._base = address.with_user(None).with_query(None).with_fragment(None)
        self._settings, self._key, self._connect_s = settings, key, min(CONNECT_S, settings.timeout_s)
        self._session: aiohttp.ClientSession | None = None

    @property
    def address(self) -> str:
        """As people may see it."""
        return str(self._base)

    async def __aenter__(self) -> Connection:
        self._session = aiohttp.ClientSession(
            timeout=aiohttp.ClientTimeout(total=self._settings.timeout_s, sock_connect=self._connect_s),
            connector=aiohttp.TCPConnector(limit=0),  # the pace is kept elsewhere; aiohttp's own limit is 100
            headers={"Authorization": self._authorization} if self._authorization else {},
        )
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._session is not None:
            await self._session.close()

    async def models(self) -> bytes:
        """What the server lists; empty where it does not say.

        Raises:
            Unreachable, ConfigError
        """
        try:
            status, _, content = await self._send("GET", "models", None, aiohttp.ClientTimeout(total=self._connect_s))
        except Failed as error:
            raise Unreachable(error.detail) from None
        if status in (401, 402, 403):
            raise self._not_ours(status, content)
        return content if status == 200 else b""

    async def ask(self, body: bytes) -> profiles.Answer:
        """
        Args:
            body: of the request, JSON.

        Raises:
            Unreachable, Busy, Failed, Refused, ConfigError: see above.
        """
        status, headers, content = await self._send("POST", "chat/completions", body)
        if status == 200:
            try:
                return profiles.answer(content)
            except ValueError as error:
                raise Failed("wrong JSON", self._shown(str(error))) from None
        words = f"{status}: {self._words(content)}"
        wait = retry_after(headers.get("Retry-After"), time.time())
        if status == 429 or (status >= 500 and wait is not None):
            raise Busy(words, wait)
        if status >= 500:
            raise Failed("server error", words)
        if status == 408:
            raise Failed("no answer in time", words)
        if status in (401, 402, 403, 404) or status < 400:
            raise self._not_ours(status, content)
        raise Refused("server refused the request", words)

    async def _send(
        self, method: str, what: str, body: bytes | None, timeout: aiohttp.ClientTimeout | None = None
    ) -> tuple[int, Mapping[str, str], bytes]:
        if self._session is None:
            raise RuntimeError("not entered")
        headers = {"Content-Type": "application/json", "Content-Length": str(len(body))} if body is not None else {}
        # A stream: aiohttp warns of large bodies that are plain bytes. Not followed: a redirect would turn POST into GET.
        data = io.BytesIO(body) if body is not None else None
        try:
            async with self._session.request(
                method, self._base / what, data=data, headers=headers, allow_redirects=False, timeout=timeout or self._session.timeout
            ) as response:
                return response.status, response.headers, await _limited(response)
        except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError) as error:
            raise Unreachable(self._shown(getattr(error, "strerror", None) or str(error) or type(error).__name__)) from None
        except TimeoutError:
            within = self._settings.timeout_s if timeout is None else self._connect_s
            raise Failed("no answer in time", f"none in {within:g} s") from None
        except (aiohttp.ClientError, OSError) as error:
            raise Failed("connection broke off", self._shown(str(error) or type(error).__name__)) from None

    def _not_ours(self, status: int, content: bytes) -> ConfigError:
        """What would be the same for every clip."""
        said = f"captioning server {self.address} answers {status}: {self._words(content)}."
        if status in (401, 402, 403):
            has = "The key of" if self._key else "There is no key in"
            return ConfigError(f"{said} {has} {KEY_VARIABLE}: set the variable to a key that may use {self._settings.model}")
        if status == 404:
            return ConfigError(
                f"{said} caption.url should end as in http://host:8000/v1, and caption.model ({self._settings.model}) be a name that "
                f"`curl {self.address}/models` lists"
            )
        return ConfigError(f"{said} Set caption.url to the address where chat completions are answered")

    def _words(self, content: bytes) -> str:
        """What a server says of an error: OpenAI's, FastAPI's or llama.cpp's form, or its text."""
        text = content.decode("utf-8", "replace")
        try:
            found = profiles.parsed(content)
        except ValueError:
            return self._shown(text) or "nothing"
        for name in ("error", "message", "detail"):
            if isinstance(found, dict) and found.get(name):
                found = found[name]
        return self._shown(found if isinstance(found, str) else json.dumps(found, ensure_ascii=False))

    def _shown(self, text: str) -> str:
        for secret in self._secrets:
            text = text.replace(secret, "***")
        return quoted(" ".join(text.split()), MOST_WORDS)


def _address(url: str) -> yarl.URL:
    try:
        address = yarl.URL(url.rstrip("/").removesuffix("/chat/completions"))
    except ValueError:
        address = yarl.URL()
    if address.scheme not in ("http", "https") or not address.host:
        # Not quoted: it may hold a password that nobody could find in what is no address.
        raise ConfigError("caption.url is no address. Write it as http://host:8000/v1")
    return address


def retry_after(header: str | None, now: float) -> float | None:
    """Seconds from `now` (Unix time) that a Retry-After header asks for: a number, or a date. None: it asks for nothing."""
    if header is None:
        return None
    try:
        seconds = float(header)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(header).timestamp() - now
        except (ValueError, OverflowError):
            return None
    return max(seconds, 0.0) if seconds == seconds else None  # NaN asks for nothing


async def _limited(response: aiohttp.ClientResponse) -> bytes:
    content = bytearray()
    async for chunk in response.content.iter_chunked(1 << 16):
        content += chunk
        if len(content) > MOST_ANSWER:
            raise Failed("wrong JSON", f"answer is longer than {MOST_ANSWER >> 20} MiB")
    return bytes(content)
