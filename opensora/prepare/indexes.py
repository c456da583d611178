"""Published lists of videos, read as their authors wrote them: which addresses there are, with which captions and clips. No data.

Owns the columns of each list and what they mean. Refuses to fetch, and to open a path that a list names: a list comes from a stranger, so
its addresses are http(s) or of an object store, and the file names in it lie below the list's own folder.

    webvid       CSV   videoid, contentUrl, duration, page_dir, name      the caption is `name`; one clip a video
    panda-70m    CSV   videoID, url, timestamp, caption, matching_score (, desirable_filtering, shot_boundary_detection)
                       the cells are lists as Python prints them, one entry a clip; times are H:MM:SS.mmm
    openvid      CSV   video, caption, aesthetic score, motion score, temporal consistency score, camera motion, frame, fps, seconds
                       `video` is a file that was unpacked from their archives: anywhere below the list's folder
    hd-vg-130m   JSON  {"<video id>": {"url", "clip": {"<name>": {"fps", "span": [from, to], "scene_split": [{"clip_id", "caption",
                       "scene_cut": [first frame, last frame or -1]}]}}}}; frames count from the beginning of their span

Where these columns were read: Panda-70M, `dataset_dataloading` of its repository (snap-research/Panda-70M); WebVid, dataset_examples of
video2dataset (iejMac/video2dataset) and simonw/webvid-datasette; OpenVid, the card of nkp37/OpenVid-1M and its readers; HD-VG-130M, whose
own page shows no format, public readers of its `hdvg_N.json`. YouTube's addresses in Panda-70M and HD-VG-130M are pages, not files:
fetching them says so. Fetch them by the tool that you have for it, and give the folder.
"""

from __future__ import annotations

import ast
import contextlib
import csv
import io
import json
import re
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import PurePosixPath
from typing import Any, BinaryIO, Literal

from opensora.dataset.places import Names
from opensora.dataset.prepare_config import Layout
from opensora.dataset.tables import decoded
from opensora.errors import ConfigError
from opensora.prepare.addresses import HTTP, STORES, refuse_unknown, without_credentials
from opensora.printable import quoted, several

Format = Literal["hd-vg-130m", "panda-70m", "openvid", "webvid"]
LATEST_S = 1e7
"""Seconds: no video has a moment behind it (a hundred days)."""
LONGEST_CELL = 1 << 24
"""Characters of one cell: Panda-70M's longest row has some hundred thousand."""


@dataclass(frozen=True)
class Listed:
    """One video of a list."""

    name: str
    """As the list calls it."""
    address: str
    """http(s), an object store's, or a path relative to the list's folder; without credentials."""
    caption: str = ""
    segments: tuple[tuple[float, float, str], ...] = ()
    """Start and end in seconds, and caption."""
    licence: str = ""
    """Of a column `licence` or `license`, and `title` of one of that name: none of these lists has them as published."""
    title: str = ""


@dataclass(frozen=True)
class _Row:
    cells: Mapping[str, str]
    place: str
    """`FILE:LINE`, for messages."""

    def __getitem__(self, column: str) -> str:
        return self.cells[column]


def read(file: BinaryIO, layout: Layout, name: str, listing: Callable[[], Names] = lambda: Names(())) -> Iterator[Listed]:
    """The videos of a list, in its order.

    Args:
        file: the list; read as a stream, but for HD-VG-130M, whose files are 0.3 GB of JSON each.
        name: how messages call it.
        listing: files below the list's folder, asked for OpenVid alone.

    Raises ConfigError, with the line, for what is no such list.
    """
    if layout == "hd-vg-130m" or (layout == "auto" and _begins_as_json(file)):
        yield from _hd_vg(file, name)
        return
    with contextlib.closing(_rows(file, name)) as rows:
        header, row = next(rows)
        found = _told(header, name) if layout == "auto" else layout
        needed = COLUMNS[found]
        if missing := [column for column in needed if column not in header]:
            raise ConfigError(
                f"{name}: no column {missing[0]}, as {found} has. The header is {quoted(','.join(header), 160)}. "
                "Give another index, or `index: auto`"
            )
        names = listing() if found == "openvid" else Names(())
        licences = "licence" if "licence" in header else "license"
        while row is not None:
            licence, title = (row.cells.get(column, "").strip() for column in (licences, "title"))
            yield replace(_READERS[found](row, names), licence=licence, title=title)
            _, row = next(rows, (header, None))


# --- Each list's rows -------------------------------------------------------------------------------------------------------------------

COLUMNS: Mapping[Format, tuple[str, ...]] = {
    "panda-70m": ("videoID", "url", "timestamp", "caption"),
    "webvid": ("videoid", "contentUrl", "name"),
    "openvid": ("video", "caption"),
}
"""That a list must have. Others are not read."""


def _webvid(row: _Row, _: Names) -> Listed:
    return Listed(row["videoid"] or row["contentUrl"], _address(row["contentUrl"], row.place), row["name"].strip())


def _panda(row: _Row, _: Names) -> Listed:
    times, captions = (_printed_list(row[column], column, row.place) for column in ("timestamp", "caption"))
    if len(times) != len(captions):
        raise ConfigError(f"{row.place}: {len(times):,} times and {several(len(captions), 'caption')}. Give a list with one of each a clip")
    segments = []
    for time, caption in zip(times, captions, strict=True):
        if not isinstance(time, list) or len(time) != 2:
            raise ConfigError(f"{row.place}: {quoted(repr(time), 60)} is no start and end. Give a list with both for each clip")
        segments.append(_segment(_seconds(time[0], row.place), _seconds(time[1], row.place), str(caption).strip(), row.place))
    return Listed(row["videoID"] or row["url"], _address(row["url"], row.place), "", tuple(segments))


def _openvid(row: _Row, names: Names) -> Listed:
    video = row["video"].strip()
    if not video or video.startswith("/") or ".." in PurePosixPath(video.replace("\\", "/")).parts or "://" in video or "\0" in video:
        raise ConfigError(f"{row.place}: video {quoted(video, 80)} does not lie below the list. Give a file's name")
    return Listed(video, names.find(video) or video, row["caption"].strip())


_READERS: Mapping[Format, Callable[[_Row, Names], Listed]] = {"panda-70m": _panda, "webvid": _webvid, "openvid": _openvid}


def _told(header: tuple[str, ...], name: str) -> Format:
    """By its columns. Raises ConfigError."""
    for layout in ("panda-70m", "webvid"):
        if all(column in header for column in COLUMNS[layout]):
            return layout
    if "video" in header and "caption" in header and "aesthetic score" in header:
        return "openvid"
    known = "; ".join(f"{layout}: {', '.join(columns)}" for layout, columns in COLUMNS.items())
    raise ConfigError(f"{name}: no list that is known, by its header {quoted(','.join(header), 160)}. Known are {known}; hd-vg-130m: JSON")


def _address(written: str, place: str) -> str:
    return without_credentials(refuse_unknown(written.strip(), place, (*HTTP, *STORES)))


def _printed_list(cell: str, column: str, place: str) -> list[Any]:
    """A list as Python prints it."""
    try:
        value = ast.literal_eval(cell.strip())
    except (ValueError, SyntaxError, MemoryError, RecursionError) as error:
        raise ConfigError(f"{place}: {column} is no list as Python prints it ({type(error).__name__}). Mend the cell") from None
    if not isinstance(value, list):
        raise ConfigError(f"{place}: {column} is {quoted(repr(value), 60)}, a list is needed. Mend the cell")
    return value


_CLOCK = re.compile(r"(?:(\d{1,3}):)?(\d{1,2}):(\d{1,2}(?:\.\d{1,9})?)")


def _seconds(time: object, place: str) -> float:
    """Of H:MM:SS.mmm, or of a number."""
    if isinstance(time, int | float) and not isinstance(time, bool) and 0 <= time < LATEST_S:
        return float(time)
    if (found := _CLOCK.fullmatch(str(time).strip())) is None:
        raise ConfigError(f"{place}: {quoted(str(time), 60)} is no time. Write H:MM:SS.mmm")
    return 3600 * int(found[1] or 0) + 60 * int(found[2]) + float(found[3])


def _segment(start: float, end: float, caption: str, place: str) -> tuple[float, float, str]:
    if not -LATEST_S < start < end < LATEST_S:  # also what is no number
        raise ConfigError(f"{place}: a clip from {start:g} s to {end:g} s. Give an end behind its start, below {LATEST_S:,.0f} s")
    return start, end, caption


# --- CSV --------------------------------------------------------------------------------------------------------------------------------


def _rows(file: BinaryIO, name: str) -> Generator[tuple[tuple[str, ...], _Row | None], None, None]:
    """The header, with each row that is not blank; with None, where there is none. Raises ConfigError."""
    before = csv.field_size_limit()
    csv.field_size_limit(LONGEST_CELL)
    text = io.TextIOWrapper(file, encoding="utf-8-sig", newline="")
    reader = csv.reader(text, strict=True)
    try:
        header = tuple(cell.strip() for cell in next(reader, []))
        if not header:
            raise ConfigError(f"{name}: empty. Give a list with a header")
        some = False
        while (cells := next(reader, None)) is not None:
            if not any(cells):
                continue
            place, some = f"{name}:{reader.line_num}", True
            if len(cells) != len(header):
                raise ConfigError(
                    f"{place}: {several(len(cells), 'column')}, the header has {len(header)}. Write every column; quote texts with commas"
                )
            if any("\0" in cell for cell in cells):
                raise ConfigError(f"{place}: a NUL character, which no text holds. Mend the line")
            yield header, _Row(dict(zip(header, cells, strict=True)), place)
        if not some:
            yield header, None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{name}:{reader.line_num + 1}: not UTF-8 behind this line ({error.reason}). Save it as UTF-8") from None
    except csv.Error as error:
        raise ConfigError(f"{name}:{reader.line_num}: {error}. Mend the line") from None
    finally:
        csv.field_size_limit(before)
        with contextlib.suppress(ValueError):  # whoever opened the file has closed it
            text.detach()


# --- HD-VG-130M -------------------------------------------------------------------------------------------------------------------------


def _begins_as_json(file: BinaryIO) -> bool:
    beginning = file.read(64).removeprefix(b"\xef\xbb\xbf").lstrip()
    file.seek(0)
    return beginning.startswith(b"{")


def _hd_vg(file: BinaryIO, name: str) -> Iterator[Listed]:
    """One entry is an object at a time; the text stands in memory. Raises ConfigError."""
    text, _ = decoded(file.read(), name)
    decoder, space = json.JSONDecoder(), re.compile(r"[ \t\r\n]*")

    def skipped(position: int) -> int:
        found = space.match(text, position)
        return position if found is None else found.end()

    position = skipped(0)
    if not text.startswith("{", position):
        raise ConfigError(f'{name}: no object of videos. Give a hdvg_N.json: {{"VIDEO ID": {{"url": …, "clip": …}}}}')
    position = skipped(position + 1)
    while not text.startswith("}", position):
        try:
            video, end = decoder.raw_decode(text, position)
            end = skipped(end)
            if not isinstance(video, str) or not text.startswith(":", end):
                raise ValueError("no name and value")
            entry, position = decoder.raw_decode(text, skipped(end + 1))
        except (ValueError, RecursionError) as error:
            line = text.count("\n", 0, position) + 1
            raise ConfigError(f"{name}:{line}: no JSON of a video ({error}). Mend the entry") from None
        yield _hd_vg_video(video, entry, name)
        position = skipped(position)
        if text.startswith(",", position):
            position = skipped(position + 1)
        elif not text.startswith("}", position):
            raise ConfigError(f"{name}:{text.count(chr(10), 0, position) + 1}: the object ends early. Give the whole file")


def _hd_vg_video(video: str, entry: Any, name: str) -> Listed:
    place = f"{name}: {quoted(video, 60)}"
    segments = []
    try:
        for clip in entry["clip"].values():
            start, end = (_seconds(time, place) for time in clip["span"])
            for scene in clip["scene_split"]:
                first, last = (int(frame) for frame in scene["scene_cut"])
                till = end if last < 0 else start + last / float(clip["fps"])
                segments.append(_segment(start + first / float(clip["fps"]), till, str(scene.get("caption", "")).strip(), place))
        address = entry["url"]
        if not isinstance(address, str):
            raise TypeError("url is no text")
    except (KeyError, TypeError, ValueError, AttributeError, ZeroDivisionError, OverflowError) as error:
        raise ConfigError(f"{place}: no video of HD-VG-130M ({error!r}). Mend the entry") from None
    return Listed(video, _address(address, place), "", tuple(segments))
