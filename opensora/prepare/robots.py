"""What a host's robots.txt allows this program to fetch, as RFC 9309 says. Pure.

Owns groups, the longest match, and the patterns `*` and `$`, which Python's `urllib.robotparser` takes for letters. Refuses to fetch the
file (`http_files` does) and to know rates: the RFC has none, and `download.per_host` bounds connections.
"""

from __future__ import annotations

from dataclasses import dataclass
from urllib.parse import quote, unquote, urlsplit

AGENT = "osctl"
"""Product token that a host may name."""
LARGEST = 500 * 1024
"""Bytes of the file that are read: the least that RFC 9309 asks for."""


@dataclass(frozen=True)
class Robots:
    """Rules for this program, or for all where there are none for it."""

    rules: tuple[tuple[str, bool], ...] = ()
    """Path and whether it is allowed."""

    def allows(self, address: str) -> bool:
        """The longest rule that matches decides; of two as long, the one that allows. Nothing matches: allowed."""
        parts = urlsplit(address)
        path = _even(parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        if parts.path == "/robots.txt":
            return True
        found = [(len(pattern), allowed) for pattern, allowed in self.rules if _matches(pattern, path)]
        return max(found)[1] if found else True


EVERYTHING = Robots()


def parsed(data: bytes) -> Robots:
    """Lines that are none of its own count for nothing."""
    groups: dict[str, list[tuple[str, bool]]] = {}
    named: list[str] = []
    began = False
    for line in data[:LARGEST].decode("utf-8-sig", "replace").splitlines():
        key, colon, value = line.partition("#")[0].partition(":")
        key, value = key.strip().lower(), value.strip()
        if not colon:
            continue
        if key == "user-agent":
            named, began = ([] if began else named), False
            named.append(value.lower())
            groups.setdefault(value.lower(), [])
        elif key in ("allow", "disallow"):
            began = True
            if value:
                for name in named:
                    groups[name].append((_even(value), key == "allow"))
    return Robots(tuple(groups.get(AGENT, groups.get("*", ()))))


def _even(path: str) -> str:
    """One spelling for paths that differ in what is percent-encoded."""
    return quote(unquote(path, errors="surrogateescape"), safe="/*$?&=;:,@!+'()~.-_%", errors="surrogateescape")


def _matches(pattern: str, path: str) -> bool:
    """Each part between `*` where it first stands: time grows with the length alone, whatever a host writes."""
    end = pattern.endswith("$")
    first, *others = pattern.removesuffix("$").split("*")
    if not path.startswith(first):
        return False
    place = len(first)
    for number, part in enumerate(others, 1):
        if end and number == len(others):
            return len(path) - len(part) >= place and path.endswith(part)
        place = path.find(part, place)
        if place < 0:
            return False
        place += len(part)
    return not end or place == len(path)
