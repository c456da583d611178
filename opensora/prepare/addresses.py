"""Addresses of videos: which schemes are fetched, and how they are written down without the credentials in them. Pure.

Owns both for everything in `opensora.prepare`. Refuses to open them. An address that holds credentials is never fetched: it would have to
stand in every row of the data set. The clients of object stores, and `~/.netrc` for HTTP, have credentials of their own.
"""

from __future__ import annotations

import re
from urllib.parse import unquote, urlsplit

from opensora.errors import ConfigError
from opensora.printable import quoted

HTTP = ("http", "https")
STORES = ("s3", "s3a", "gs", "gcs", "az", "abfs", "hf")
"""Object stores, through their clients of fsspec; s3fs is installed with this package, the others are not."""
LOCAL = ("file", "tar")
HIDDEN = "…"

_USER = re.compile(r"(?<=://)[^\s/?#]*@")
_SIGNED = re.compile(
    r"(?i)([?&](?:[\w.-]*(?:secret|token|passw(?:or)?d|credential|api[_-]?key|access[_-]?key(?:[_-]?id)?|signature)|sig|key)=)[^&#\s]+"
)


def is_address(path: str) -> bool:
    """`scheme://…`; all else is a path of this machine."""
    return "://" in path


def scheme(address: str) -> str:
    return address.partition("://")[0].lower()


def without_credentials(address: str) -> str:
    """With an ellipsis for what stands before the host, and for the values of parameters that are named like secrets."""
    return _SIGNED.sub(rf"\1{HIDDEN}", _USER.sub(f"{HIDDEN}@", address))


def hides_credentials(address: str) -> bool:
    """Whether `without_credentials` took some away."""
    return f"://{HIDDEN}@" in address or re.search(rf"[?&][\w.-]+={HIDDEN}(?:&|#|$)", address) is not None


def refuse_unknown(address: str, place: str, allowed: tuple[str, ...] = (*HTTP, *STORES, *LOCAL)) -> str:
    """The address, if its scheme is one that is fetched. `place`: where it stands, for the message. Raises ConfigError."""
    found = scheme(address)
    if found not in allowed:
        shown = quoted(without_credentials(address), 120)
        raise ConfigError(f"{place}: {shown}: addresses with {quoted(found, 40)}:// are not fetched. Give one of {', '.join(allowed)}")
    if found in HTTP and not _host(address):
        raise ConfigError(f"{place}: {quoted(without_credentials(address), 120)}: no address of a file. Write https://HOST/PATH")
    return address


def refuse_credentials(address: str, place: str) -> str:
    """Raises ConfigError, where an address that a person typed holds credentials."""
    shown = without_credentials(address)
    if shown != address:
        raise ConfigError(
            f"{place}: {quoted(shown, 160)}: holds credentials, which would stand in every row. Put them into the environment "
            "(AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY), or into ~/.netrc for https"
        )
    return address


def member_address(member: str, tar: str) -> str:
    """Of a file inside a tar, as fsspec writes it: `tar://a.mp4::s3://bucket/shard.tar`."""
    return f"tar://{member.replace('%', '%25').replace('::', '%3A%3A')}::{tar}"


def tar_and_member(address: str) -> tuple[str, str]:
    """Of a `tar://`."""
    member, _, tar = address.partition("://")[2].partition("::")
    return tar, member.replace("%3A", ":").replace("%25", "%")


def last_part(address: str) -> str:
    """The file's name in an address or a path, for people: `films/a%20b.mp4?x=1` gives `a b.mp4`."""
    path = urlsplit(address).path if scheme(address) in HTTP and is_address(address) else address.partition("://")[2] or address
    return unquote(path.rstrip("/").rpartition("/")[2]) or _host(address) or address


def _host(address: str) -> str:
    try:
        return urlsplit(address).hostname or ""
    except ValueError:  # of half an IPv6 address
        return ""
