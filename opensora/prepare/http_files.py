"""Files over HTTP: one request of the rest of a file, with redirects, ranges and robots.txt.

Owns what an answer means. Refuses redirects to anything but http(s), pages (an address of a player is no file), and to ask a host more
often at once than `per_host` says, over all processes of a run.
"""

from __future__ import annotations

import asyncio
import contextlib
import email.utils
import hashlib
import os
import re
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urljoin, urlsplit

import aiohttp

from opensora.dataset.prepare_config import Download
from opensora.dataset.rows import Quarantine
from opensora.prepare.addresses import HTTP, scheme, without_credentials
from opensora.prepare.parts import STOPPED, Again, Halt, Kept, Sleep, State
from opensora.prepare.robots import EVERYTHING, LARGEST, Robots, parsed
from opensora.prepare.turns import slot
from opensora.printable import quoted

AGENT = "osctl (fetches videos for a data set; obeys robots.txt as osctl)"
CHUNK = 1 << 20
REDIRECTS = 10
ROBOTS_S = 24 * 3600
"""A host's robots.txt is believed for so long: RFC 9309, 2.4."""
HALT_S = 0.25
"""How often a run is asked whether it is to stop, while a host is silent."""
MAY_PASS = (408, 425, 429, 500, 502, 503, 504)
_REDIRECT = (301, 302, 303, 307, 308)
_REFUSED = {401: "host wants a login", 403: "host refuses", 404: "no such file", 410: "no such file", 451: "host refuses"}
Result = TypeVar("Result")


def copy(uri: str, part: Kept, folder: Path, settings: Download, halt: Halt, sleep: Sleep) -> None:
    """The rest of a file into its part. Raises Quarantine, Again, DiskFull."""
    asked = uri
    for _ in range(REDIRECTS):
        host = _host(asked)
        with slot(folder, host, settings.per_host, halt, sleep):
            if settings.robots and not _robots(asked, folder, settings, halt).allows(asked):
                raise Quarantine("robots.txt does not allow it", f"{_shown(asked)}; robots: false fetches it all the same, if you may")
            to = _run(_ask(asked, part, settings), halt)
        if to is None:
            return
        asked = _followed(asked, to)
    raise Quarantine("too many redirects", f"{_shown(uri)}: more than {REDIRECTS}")


def _host(address: str) -> str:
    parts = urlsplit(address)
    return f"{parts.hostname}-{parts.port or (443 if parts.scheme == 'https' else 80)}"


def _shown(address: str) -> str:
    return quoted(without_credentials(address), 200)


def _followed(asked: str, to: str) -> str:
    """The address that a redirect means. Raises Quarantine."""
    try:
        there = urljoin(asked, to)
        fine = scheme(there) in HTTP and "@" not in urlsplit(there).netloc and bool(urlsplit(there).hostname)
    except ValueError:
        there, fine = to, False
    if not fine or (scheme(asked) == "https" and scheme(there) == "http"):
        raise Quarantine("redirect that is not followed", f"{_shown(asked)}: to {_shown(there)}; only to http(s), and from https to https")
    return there


def _run(work: Coroutine[Any, Any, Result], halt: Halt) -> Result:
    """In a loop of its own: threads and guard processes fetch beside each other. Raises Again for what happens to connections."""
    try:
        return asyncio.run(_until_halted(work, halt))
    except TimeoutError as error:  # aiohttp's are of this kind, too
        raise Again("host does not answer", "no byte came in time") from error
    except aiohttp.ClientPayloadError as error:
        raise Again("cut off", "the connection ended early") from error
    except aiohttp.InvalidURL as error:
        raise Quarantine("no address", str(type(error).__name__)) from None
    except aiohttp.ClientConnectorCertificateError as error:
        raise Quarantine("host's certificate is not trusted", quoted(str(error.certificate_error), 200)) from None
    except (aiohttp.ClientConnectionError, ConnectionError) as error:
        raise Again("host cannot be reached", type(error).__name__) from error
    except aiohttp.ClientError as error:
        raise Again("no HTTP", quoted(without_credentials(str(error)), 160)) from error


async def _until_halted(work: Coroutine[Any, Any, Result], halt: Halt) -> Result:
    """Raises Quarantine, where the run is to stop while a host is silent."""
    task = asyncio.ensure_future(work)
    while not (await asyncio.wait([task], timeout=HALT_S))[0]:
        if halt():
            task.cancel()
            await asyncio.wait([task])
            raise Quarantine(STOPPED, "the run was asked to stop; it is fetched when the run goes on")
    return task.result()


@contextlib.asynccontextmanager
async def _answer(address: str, settings: Download, headers: dict[str, str]) -> AsyncIterator[aiohttp.ClientResponse]:
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=settings.timeout_s, sock_read=settings.timeout_s)
    base = {"User-Agent": AGENT, "Accept-Encoding": "identity"}
    async with (
        aiohttp.ClientSession(timeout=timeout, trust_env=True, auto_decompress=False, cookie_jar=aiohttp.DummyCookieJar()) as session,
        session.get(address, headers=base | headers, allow_redirects=False) as answer,
    ):
        yield answer


async def _ask(address: str, part: Kept, settings: Download) -> str | None:
    """Copy the rest; or where a redirect leads. Raises Quarantine, Again."""
    headers = {}
    if part.size and part.state.known:
        headers = {"Range": f"bytes={part.size}-", "If-Range": part.state.etag or part.state.modified}
    async with _answer(address, settings, headers) as answer:
        if answer.status in _REDIRECT and "Location" in answer.headers:
            return answer.headers["Location"]
        state = _state(answer)
        if answer.status == 206:
            if not _goes_on(answer, part, state):
                part.begin(State())
                raise Again("changed on its host", "what was there of it is of another state")
        elif answer.status == 416:
            if part.size and part.state.size == part.size:
                return None
            part.begin(State())
            raise Again("changed on its host", "it is shorter than it was")
        elif answer.status == 200:
            _refuse_other(answer, address)
            part.begin(state)
        else:
            raise _refused(answer, address)
        async for data in answer.content.iter_chunked(CHUNK):
            part.add(data)
    return None


def _state(answer: aiohttp.ClientResponse) -> State:
    """Of the whole file."""
    etag = answer.headers.get("ETag", "")
    size = answer.content_length if answer.status == 200 else None
    if found := re.fullmatch(r"bytes (\d+)-(\d+)/(\d+)", answer.headers.get("Content-Range", "")):
        size = int(found[3])
    return State("" if etag.startswith("W/") else etag, answer.headers.get("Last-Modified", ""), size)


def _goes_on(answer: aiohttp.ClientResponse, part: Kept, state: State) -> bool:
    """Whether an answer is the rest of what is there."""
    found = re.fullmatch(r"bytes (\d+)-\d+/(?:\d+|\*)", answer.headers.get("Content-Range", ""))
    return found is not None and int(found[1]) == part.size and part.state.same_as(state)


def _refuse_other(answer: aiohttp.ClientResponse, address: str) -> None:
    """Raises Quarantine."""
    if answer.headers.get("Content-Encoding", "identity").lower() != "identity":
        raise Quarantine("host compresses it", f"{_shown(address)}: {quoted(answer.headers['Content-Encoding'], 40)}, though asked not to")
    if answer.content_type in ("text/html", "application/xhtml+xml"):
        what = "a page, as of a player. Fetch the videos by the tool that you have for this site, and give their folder"
        raise Quarantine("page instead of a file", f"{_shown(address)}: {what}")


def _refused(answer: aiohttp.ClientResponse, address: str) -> Exception:
    said = f"HTTP {answer.status}"
    if answer.status in MAY_PASS:
        return Again("host answers 5xx" if answer.status >= 500 else said, said, _retry_after(answer.headers.get("Retry-After", "")))
    return Quarantine(_REFUSED.get(answer.status, said), f"{_shown(address)}: {said}")


def _retry_after(told: str, now: Callable[[], float] = time.time) -> float | None:
    """Seconds; None: not said, or not to be understood."""
    if told.strip().isdecimal():
        return float(told)
    with contextlib.suppress(ValueError, TypeError):
        return max(0.0, email.utils.parsedate_to_datetime(told).timestamp() - now())
    return None


# --- robots.txt -------------------------------------------------------------------------------------------------------------------------


def _robots(address: str, folder: Path, settings: Download, halt: Halt) -> Robots:
    """Of the host, asked for once a day over all processes of a run. Raises Again, where it cannot be read now."""
    parts = urlsplit(address)
    origin = f"{parts.scheme}://{parts.netloc}"
    kept = folder / ".robots" / hashlib.sha256(origin.lower().encode()).hexdigest()[:16]
    with contextlib.suppress(OSError):
        if time.time() - kept.stat().st_mtime < ROBOTS_S:
            return parsed(kept.read_bytes())
    status, data = _run(_text(f"{origin}/robots.txt", settings), halt)
    if status >= 500 or status == 429:
        raise Again("robots.txt cannot be read", f"{origin}: HTTP {status}")
    kept.parent.mkdir(parents=True, exist_ok=True)
    new = kept.with_name(f"{kept.name}.{os.getpid()}.{time.monotonic_ns()}")
    new.write_bytes(data if status == 200 else b"")  # RFC 9309, 2.3.1.3: of one that is not there nothing is forbidden
    new.replace(kept)
    return parsed(data) if status == 200 else EVERYTHING


async def _text(address: str, settings: Download) -> tuple[int, bytes]:
    for _ in range(5):
        async with _answer(address, settings, {}) as answer:
            if answer.status in _REDIRECT and "Location" in answer.headers:
                try:
                    address = _followed(address, answer.headers["Location"])
                except Quarantine:
                    return 404, b""
                continue
            return answer.status, await answer.content.read(LARGEST)
    return 404, b""
