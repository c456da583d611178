"""Captions in text files of their own: `a.txt` beside `a.mp4`, or `metas/a.txt` of `videos/a.mp4`. Nothing is opened but captions.

Owns which caption belongs to which clip of a listing, and how such rows are called. Refuses to choose between layouts: `layouts` does.
"""

from __future__ import annotations

import posixpath
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from opensora.dataset.places import Entry, Folder, Names, denied
from opensora.dataset.tables import Record, is_clip, read_lines
from opensora.errors import ConfigError
from opensora.printable import quoted

COSMOS = "videos/a.mp4 with metas/a.txt"
LONGEST = 1 << 20
"""Bytes of a caption's own file; more is no caption."""
NAMED = 3
"""Names that a remark gives of many."""
_ABOUT = re.compile(r"(readme|licen[cs]e|copying|notice|change(log|s)|authors|citation|requirements)([._-].*)?\.txt", re.IGNORECASE)
"""Texts that come along with an archive and are no captions."""

Placed = tuple[Record, str]
"""A record, and its place for messages."""


def pairs(listing: Mapping[str, Entry], ending: str = ".txt") -> dict[str, dict[str, str]]:
    """Clips and the files of their captions, by layout; of clips without one the name alone is missing. `ending`: of captions."""
    names = Names(name for name in listing if name.lower().endswith(ending) and not is_hidden(name))
    cosmos: dict[str, str] = {}
    beside: dict[str, str] = {}
    for name in listing if names else ():
        if not is_clip(name) or is_hidden(name):
            continue
        stem = posixpath.splitext(name)[0]
        if (caption := names.find(f"{stem}{ending}") or names.find(f"{stem}{ending.upper()}")) is not None:
            beside[name] = caption
        if stem.startswith("videos/") and (caption := names.find(f"metas/{stem.removeprefix('videos/')}.txt")) is not None:
            cosmos[name] = caption
    return {COSMOS: cosmos, "a.mp4 with a.txt beside it": beside}


def captions_beside(
    folder: Folder, members: Mapping[str, str], listing: Mapping[str, Entry], name: str
) -> tuple[Sequence[Placed], Sequence[str]]:
    """Raises ConfigError."""
    spelled = _spelled(members)
    clips = sorted(members, key=lambda clip: spelled[clip])
    for clip in clips:
        size = listing[members[clip]].size or 0
        if size > LONGEST:
            raise ConfigError(f"{name}/{members[clip]}: {size:,} bytes, a caption has at most {LONGEST:,}. Is it one? Move it away")
    files = list(dict.fromkeys(members[clip] for clip in clips))
    try:
        texts = dict(zip(files, folder.read_all(files), strict=True))
    except PermissionError as error:
        raise denied(error.filename or name, error) from None
    records, empty = [], []
    for clip in clips:
        place = f"{name}/{members[clip]}"
        # one line, whether a version control system or an editor changed the ends of lines
        text = " ".join(" ".join(read_lines(texts[members[clip]], place)).split())
        if text:
            records.append((Record(1, spelled[clip], text), place))
        else:
            empty.append(members[clip])
    if not records:
        what = counted(empty, "file of a caption is", "files of captions are")
        raise ConfigError(f"data.source {name}: no clip has a caption: {what} empty ({empty[0]}). Write captions into them")
    return records, [f"{counted(empty, 'file of a caption is', 'files of captions are')} empty: {some(empty)}"] if empty else []


def text_file(film: str) -> Path | None:
    """`a.txt` beside one film of this machine, where there is one."""
    places = (Path(film).with_suffix(ending) for ending in (".txt", ".TXT"))
    return next((path for path in places if path.is_file()), None)


def text_beside(film: str) -> str:
    """What `a.txt` beside one film of this machine says, in one line; empty: there is none. Raises ConfigError."""
    if (path := text_file(film)) is None:
        return ""
    if (size := path.stat().st_size) > LONGEST:
        raise ConfigError(f"{quoted(str(path))}: {size:,} bytes, a caption has at most {LONGEST:,}. Is it one? Move it away")
    try:
        return " ".join(" ".join(read_lines(path.read_bytes(), str(path))).split())
    except PermissionError as error:
        raise denied(str(path), error) from None


def without_clip(listing: Mapping[str, Entry], members: Mapping[str, str], below: str) -> list[str]:
    """What is to be said of files of captions that lie beside no clip; `below`: the folder that captions lie in."""
    used = set(members.values())
    alone = sorted(
        name for name in listing
        if name.startswith(below) and name.lower().endswith(".txt") and name not in used and listing[name].size != 0
        and not is_hidden(name) and not _ABOUT.fullmatch(posixpath.basename(name))
    )  # fmt: skip
    return [f"{counted(alone, 'caption has', 'captions have')} no clip: {some(alone)}"] if alone else []


def _spelled(names: Iterable[str]) -> dict[str, str]:
    """How each file is called in rows: composed, so that a copy on another system gives the same rows in the same order; as it is, where
    two are composed alike."""
    names = list(names)
    composed = {name: unicodedata.normalize("NFC", name) for name in names}
    counts: dict[str, int] = {}
    for one in composed.values():
        counts[one] = counts.get(one, 0) + 1
    return {name: one if counts[one] == 1 else name for name, one in composed.items()}


def is_hidden(name: str) -> bool:
    """Of desktops and archives: .DS_Store, ._a.mp4, __MACOSX."""
    return any(part.startswith((".", "__MACOSX")) for part in name.split("/"))


def counted(names: Sequence[str], one: str, many: str) -> str:
    return f"1 {one}" if len(names) == 1 else f"{len(names):,} {many}"


def some(names: Sequence[str]) -> str:
    more = f" and {len(names) - NAMED:,} more" if len(names) > NAMED else ""
    return ", ".join(map(quoted, names[:NAMED])) + more
