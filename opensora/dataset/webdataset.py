"""Shards of a WebDataset: tars of clips with their captions, read where they lie. Nothing is unpacked.

Owns which members of a tar are clips, which caption belongs to which clip, and where each clip's bytes lie. Refuses to write any member,
to follow links inside a tar, to open pickles, and to believe sizes: a member that reaches behind the end of its file is a ConfigError.

A sample is the members with one stem: `a.mp4` with `a.txt`, `a.caption` or `a.json` (an object with a caption: what video2dataset and
Panda-70M's downloader write; text comes before JSON). OpenVid's shards call them `a.video` and `a.caption`.
"""

from __future__ import annotations

import json
import posixpath
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from opensora.dataset.tables import TEXT_COLUMNS, is_clip, read_lines
from opensora.errors import ConfigError
from opensora.printable import quoted

TEXTS = (".txt", ".caption", ".text", ".prompt")
"""Ends of a caption's name, the one that counts first."""
JSON = ".json"
PICKLES = (".pkl", ".pickle", ".npy", ".npz", ".pt", ".pth", ".pyd")
"""Ends of files whose readers may run what is in them."""
VIDEO = ".video"
LONGEST = 1 << 20
"""Bytes of a caption's own member."""
HEADER = 1 << 24
"""Bytes of a tar's header that are read at once: names in it are short."""


@dataclass(frozen=True, slots=True)
class Member:
    """Where a clip lies inside a tar."""

    tar: str
    """Its name, relative to the folder of the data set."""
    name: str
    offset: int
    size: int
    """Bytes."""


@dataclass(frozen=True)
class Shard:
    clips: tuple[tuple[Member, str], ...]
    """With their captions, in the order of the tar."""
    bare: tuple[str, ...]
    """Clips without a caption."""
    pickled: tuple[str, ...]
    """Of these, those that have a pickle, which may hold one."""
    left: tuple[str, ...]
    """Clips and captions that are links, or have holes, and are not read."""


class Part:
    """The bytes of one member, as a file of its own over an open tar."""

    def __init__(self, file: Any, offset: int, size: int) -> None:
        self._file, self._offset, self.size = file, offset, size
        self._at = 0

    def read(self, count: int = -1) -> bytes:
        left = max(0, self.size - self._at)
        count = left if count < 0 else min(count, left)
        self._file.seek(self._offset + self._at)
        data = bytes(self._file.read(count)) if count else b""
        self._at += len(data)
        return data

    def seek(self, place: int, whence: int = 0) -> int:
        place += (0, self._at, self.size)[whence]
        if place < 0:
            raise ValueError(f"seek to {place}: before the beginning")
        self._at = place
        return place

    def tell(self) -> int:
        return self._at

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def fileno(self) -> int:
        """Of the tar: whoever looks at its dates learns whether the member was touched."""
        return int(self._file.fileno())


def members(file: Any, size: int, name: str) -> Iterator[tuple[tarfile.TarInfo, str]]:
    """Each member of a tar with its name. `size`: bytes of the file. Raises ConfigError, where it is no tar, or ends early."""
    guarded: Any = _Guarded(file)
    try:
        with tarfile.open(fileobj=guarded, mode="r:") as tar:
            for info in tar:
                if info.isreg() and info.offset_data + info.size > size:
                    shown = quoted(info.name, 80)
                    raise ConfigError(
                        f"{name}: {shown} should end at byte {info.offset_data + info.size:,}, the file has {size:,}. Fetch it again"
                    )
                yield info, _inside(info.name, name)
                tar.members.clear()  # type: ignore[attr-defined]  # it keeps every one
    except tarfile.TarError as error:
        raise ConfigError(f"{name}: no tar, or cut off ({error}). Fetch it again; of a compressed one: gunzip it") from None
    except (ValueError, UnicodeError, OverflowError) as error:
        raise ConfigError(f"{name}: no tar that can be read ({error}). Fetch it again") from None


def read_shard(file: Any, size: int, tar: str, name: str) -> Shard:
    """The clips of a tar with their captions.

    Args:
        tar: how members call it.
        name: how messages do.

    Raises ConfigError.
    """
    clips: dict[str, Member] = {}
    texts: dict[str, dict[str, Member]] = {}
    pickles: set[str] = set()
    left: list[str] = []
    for info, written in members(file, size, name):
        stem, ending = posixpath.splitext(written)
        ending = ending.lower()
        film, text = is_clip(written) or ending == VIDEO, ending in (*TEXTS, JSON)
        if posixpath.basename(written).startswith(".") or not (film or text or ending in PICKLES) or info.isdir():
            continue
        if ending in PICKLES:
            pickles.add(stem)
        elif not info.isreg() or info.sparse is not None:
            left.append(written)
        else:
            member = Member(tar, written, info.offset_data, info.size)
            kept = clips if film else texts.setdefault(stem, {})
            key = stem if film else ending
            if key in kept:
                raise ConfigError(f"{name}: {quoted(kept[key].name, 80)} and {quoted(written, 80)} are one sample. Pack each clip once")
            kept[key] = member
    captioned, bare = [], []
    for stem, clip in clips.items():
        caption = _caption(file, texts.get(stem, {}), name)
        if caption:
            captioned.append((clip, caption))
        else:
            bare.append(clip.name)
    pickled = tuple(clip for clip in bare if posixpath.splitext(clip)[0] in pickles)
    return Shard(tuple(captioned), tuple(bare), pickled, tuple(left))


def _caption(file: Any, found: dict[str, Member], name: str) -> str:
    """Empty: there is none."""
    for ending in (*TEXTS, JSON):
        if (member := found.get(ending)) is None:
            continue
        place = f"{name}/{member.name}"
        if member.size > LONGEST:
            raise ConfigError(f"{place}: {member.size:,} bytes, a caption has at most {LONGEST:,}. Is it one? Pack the shard without it")
        data = Part(file, member.offset, member.size).read()
        text = _of_json(data, place) if ending == JSON else " ".join(" ".join(read_lines(data, place)).split())
        if text:
            return text
    return ""


def _of_json(data: bytes, place: str) -> str:
    try:
        found = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{place}: no JSON ({error}). Mend it, and pack the shard again") from None
    texts = [found[key] for key in TEXT_COLUMNS if isinstance(found, dict) and isinstance(found.get(key), str)]
    return " ".join(texts[0].split()) if texts else ""


def _inside(written: str, name: str) -> str:
    """A member's name without `./`. Raises ConfigError for one that leads out of the tar."""
    parts = [part for part in written.split("/") if part not in ("", ".")]
    if written.startswith("/") or ".." in parts or "\0" in written:
        raise ConfigError(f"{name}: member {quoted(written, 80)} does not lie inside. Pack the shard with names relative to it")
    return "/".join(parts)


class _Guarded:
    """What tarfile reads of a file: headers, never a body, however long a header says that it is."""

    def __init__(self, file: Any) -> None:
        self._file = file
        self.seek, self.tell = file.seek, file.tell

    def read(self, count: int = -1) -> bytes:
        if count < 0 or count > HEADER:
            raise ValueError(f"a header of {count:,} bytes")
        return bytes(self._file.read(count))
