"""What the TOML of another trainer names: folders of clips with captions beside them, and lists of both. Pure.

Owns the keys that are read. Refuses to guess at others: sizes, buckets and repeats are of that trainer, and that is said.

    [[directory]]                       diffusion-pipe (dataset.toml)
    path = "clips"                      a.mp4 with a.txt in that folder itself

    [general]                           musubi-tuner
    caption_extension = ".txt"          of all its folders that say nothing else
    [[datasets]]
    video_directory = "clips"           or image_directory; a.mp4 with a.txt in that folder itself
    caption_extension = ".caption"
    [[datasets]]
    video_jsonl_file = "clips.jsonl"    or image_jsonl_file; lines of {"video_path": …, "caption": …}

Both trainers start relative paths at the folder that they run in; here they start at the folder of the TOML.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from opensora.dataset.tables import decoded
from opensora.errors import ConfigError
from opensora.printable import quoted

LARGEST = 1 << 16
"""Bytes of a configuration. Parsing takes time that grows with the square of a key's parts, so both are bounded."""
LONGEST = 1 << 11
"""Characters of a line."""
TEXT = ".txt"
_FOLDERS, _LISTS = ("video_directory", "image_directory"), ("video_jsonl_file", "image_jsonl_file")


@dataclass(frozen=True)
class Place:
    """A folder or a list of clips."""

    path: str
    """As written, with / between its parts."""
    ending: str
    """Of captions beside the clips of a folder; empty: it is a list."""


@dataclass(frozen=True)
class Named:
    places: tuple[Place, ...]
    said: str
    """Whose TOML it is."""
    repeated: bool
    """Whether clips are to be repeated, which is not done."""


def read_toml(data: bytes, name: str) -> Named:
    """Raises ConfigError."""
    if len(data) > LARGEST:
        raise ConfigError(f"{name}: {len(data):,} bytes, a configuration has at most {LARGEST:,}. Is it one?")
    text = decoded(data, name)[0].replace("\r\n", "\n")
    if long := next((number for number, line in enumerate(text.split("\n"), 1) if len(line) > LONGEST), None):
        raise ConfigError(f"{name}:{long}: a line of more than {LONGEST:,} characters. Is it a configuration?")
    try:
        content = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError, ValueError) as error:
        raise ConfigError(f"{name}: no TOML ({' '.join(str(error).split())[:160]}). Mend it") from None
    entries, said = _tables(content, name)
    general = content.get("general", {})
    general = general if isinstance(general, dict) else {}
    places = tuple(_place(entry, general, said, f"{name}: entry {number} of {said}") for number, entry in enumerate(entries, 1))
    repeated = any(_repeats(entry) for entry in (content, general, *entries))
    return Named(places, said, repeated)


def _tables(content: Mapping[str, Any], name: str) -> tuple[list[dict[str, Any]], str]:
    for key in ("directory", "datasets"):
        found = content.get(key)
        if found is None:
            continue
        if not isinstance(found, list) or not found or not all(isinstance(one, dict) for one in found):
            raise ConfigError(f"{name}: {key} is no list of tables. Write [[{key}]]")
        return found, f"[[{key}]]"
    raise ConfigError(f"{name}: neither [[directory]] with path nor [[datasets]] with video_directory. Give a folder of clips, or a table")


def _place(entry: Mapping[str, Any], general: Mapping[str, Any], said: str, place: str) -> Place:
    if said == "[[directory]]":
        return Place(_path(entry, "path", place), TEXT)
    found = [key for key in (*_FOLDERS, *_LISTS) if key in entry]
    if len(found) != 1:
        fact = " and ".join(found) if found else f"none of {', '.join((*_FOLDERS, *_LISTS))}"
        raise ConfigError(f"{place}: names {fact}. Name one")
    if found[0] in _LISTS:
        return Place(_path(entry, found[0], place), "")
    ending = entry.get("caption_extension", general.get("caption_extension", TEXT))
    if not isinstance(ending, str) or not re.fullmatch(r"\.?[\w-]+", ending):
        raise ConfigError(f"{place}: caption_extension {quoted(repr(ending), 60)} is no end of a name. Write for example .txt")
    return Place(_path(entry, found[0], place), f".{ending.lstrip('.').lower()}")


def _path(entry: Mapping[str, Any], key: str, place: str) -> str:
    path = entry.get(key)
    if not isinstance(path, str) or not path.strip() or "\0" in path:
        raise ConfigError(f"{place}: {key} is {quoted(repr(path), 60)}, a path is needed. Write one")
    if "://" in path:
        raise ConfigError(f"{place}: {key} {quoted(path, 80)} is an address, which that trainer does not read. Give the address itself")
    return path.strip().replace("\\", "/").rstrip("/") or "/"


def _repeats(entry: Mapping[str, Any]) -> bool:
    return bool(entry.get("num_repeats", 1) != 1)
