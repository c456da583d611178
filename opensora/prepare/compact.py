"""Rows as a run holds them in memory, hundreds of thousands at a time: bytes, of which a row is made whenever somebody looks at it.

A row of objects takes 2 to 3 KB, its bytes some 400: values that many rows share (codec, licence, names of measures) are numbers here, hex
digits are bytes. Owns that form. Refuses to change a value: what is unpacked equals what was packed.
"""

from __future__ import annotations

import marshal
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import fields, replace
from itertools import groupby
from operator import attrgetter
from typing import Any, Final, overload

from opensora.dataset.rows import Clip, ClipFile, Media, Provenance, Shot, Source

VERSION: Final = 2
"""Of marshal's form: without references to equal objects, which take time to find."""
OWN: Final = ("start_pts", "end_pts", "frames", "fps")
"""Fields of Media that each video has its own of; the others are one number for all that are alike."""
_ALIKE = tuple(one.name for one in fields(Media) if one.name not in OWN)
_AT = next(place for place, one in enumerate(fields(Media)) if one.name in OWN)
"""Where those of its own stand among all fields, beside each other."""
_alike_of, _own_of = attrgetter(*_ALIKE), attrgetter(*OWN)


class _Numbered:
    """Values that many rows share, by number."""

    def __init__(self) -> None:
        self._numbers: dict[Any, int] = {}
        self._values: list[Any] = []

    def number(self, value: Any) -> int:
        number = self._numbers.get(value)
        if number is None:
            number = self._numbers[value] = len(self._values)
            self._values.append(value)
        return number

    def __getitem__(self, number: int) -> Any:
        return self._values[number]


_SHARED = _Numbered()


def pack_source(source: Source, sha256: str, path: str) -> bytes:
    one = source.provenance
    uri, at = None if one.uri == source.uri else one.uri, None if path == source.uri else path
    shared = _SHARED.number((one.set_name, one.licence))
    return marshal.dumps((source.uri, source.name, bytes.fromhex(sha256), at, shared, uri, one.title, one.caption, one.segments), VERSION)


def unpack_source(data: bytes) -> tuple[Source, str, str]:
    """(source, sha256, path)."""
    place, name, sha256, path, shared, uri, title, caption, segments = marshal.loads(data)
    set_name, licence = _SHARED[shared]
    provenance = Provenance(set_name, place if uri is None else uri, licence, title, caption, segments)
    return Source(place, name, provenance), sha256.hex(), place if path is None else path


def pack_media(media: Media) -> bytes:
    return marshal.dumps((_SHARED.number(_alike_of(media)), *_own_of(media)), VERSION)


def unpack_media(data: bytes) -> Media:
    number, *own = marshal.loads(data)
    alike = _SHARED[number]
    return Media(*alike[:_AT], *own, *alike[_AT:])


def pack_shot(shot: Shot) -> bytes:
    """Without its thumbnail."""
    names, values = _SHARED.number(tuple(shot.measures)), array("d", shot.measures.values()).tobytes()
    time_base, whole = _SHARED.number(shot.time_base), all(isinstance(value, float) for value in shot.measures.values())
    measures = values if whole else tuple(shot.measures.values())
    return marshal.dumps((shot.start_pts, shot.end_pts, time_base, shot.start_frame, shot.frames, names, measures, shot.phash), VERSION)


def unpack_shot(data: bytes) -> Shot:
    start_pts, end_pts, time_base, start_frame, frames, names, measures, phash = marshal.loads(data)
    values = array("d", measures) if isinstance(measures, bytes) else measures
    return Shot(start_pts, end_pts, _SHARED[time_base], start_frame, frames, dict(zip(_SHARED[names], values, strict=True)), phash)


def pack_bounds(shots: Iterable[tuple[int, int, bytes]]) -> bytes:
    """(start, end, `pack_shot`) of each: half of what the tuples take."""
    return marshal.dumps(tuple(shots), VERSION)


def unpack_bounds(data: bytes) -> tuple[tuple[int, int, bytes], ...]:
    found: tuple[tuple[int, int, bytes], ...] = marshal.loads(data)
    return found


def _pack_file(file: ClipFile) -> bytes:
    return marshal.dumps((bytes.fromhex(file.sha256), file.size, file.frames, file.width, file.height, file.fps, file.path), VERSION)


def _unpack_file(data: bytes) -> ClipFile:
    sha256, size, frames, width, height, fps, path = marshal.loads(data)
    return ClipFile(path, sha256.hex(), size, frames, width, height, fps)


class ClipRows(Sequence[Clip]):
    """Clips without captions. A row that is taken out of it is a copy."""

    def __init__(self) -> None:
        self._sources: list[bytes] = []
        self._media: list[bytes] = []
        self._source_of = array("I")
        self._ids: list[bytes] = []
        self._shots: list[bytes] = []
        self._files: list[bytes | None] = []
        self._measures: dict[int, bytes] = {}
        """By place, where a row has measures of its own."""
        self._last: tuple[int, Source, str, str, Media] | None = None
        """The source that was unpacked last; its clips lie beside each other."""

    def add_source(self, source: bytes, media: bytes) -> None:
        """Whose clips are added next: `pack_source`, `pack_media`."""
        self._sources.append(source)
        self._media.append(media)

    def add(self, name: str, shot: bytes) -> None:
        """A clip of the last source. `name`: its id."""
        self._ids.append(bytes.fromhex(name))
        self._source_of.append(len(self._sources) - 1)
        self._shots.append(shot)
        self._files.append(None)

    def set_file(self, place: int, file: ClipFile) -> None:
        self._files[place] = _pack_file(file)

    def set_measures(self, place: int, measures: dict[str, float | str]) -> None:
        self._measures[place] = marshal.dumps(tuple(measures.items()), VERSION)

    def chosen(self, places: Iterable[int]) -> ClipRows:
        """Some of these rows, which share their bytes with them."""
        some = ClipRows()
        some._sources, some._media = self._sources, self._media
        for place in places:
            if place in self._measures:
                some._measures[len(some._ids)] = self._measures[place]
            some._ids.append(self._ids[place])
            some._source_of.append(self._source_of[place])
            some._shots.append(self._shots[place])
            some._files.append(self._files[place])
        return some

    def id(self, place: int) -> str:
        return self._ids[place].hex()

    def file(self, place: int) -> ClipFile:
        data = self._files[place]
        assert data is not None
        return _unpack_file(data)

    def path_of_source(self, place: int) -> str:
        """Of a clip's source, on this machine."""
        return self._unpacked(self._source_of[place])[3]

    def source(self, place: int) -> tuple[Source, str]:
        """A clip's source, and its sha256."""
        return self._unpacked(self._source_of[place])[1:3]

    def sources(self) -> Iterator[tuple[Source, str, int]]:
        """Each source that has clips here, its sha256, and how many these are. Clips of one source lie beside each other."""
        for number, some in groupby(self._source_of):
            source, sha256, _ = unpack_source(self._sources[number])
            yield source, sha256, sum(1 for _ in some)

    def same_source(self, place: int, other: int) -> bool:
        return self._source_of[place] == self._source_of[other]

    def clear(self) -> None:
        """Have no rows. Its lists are left alone: rows that were chosen of these share them."""
        self._sources, self._media, self._ids, self._shots, self._files = [], [], [], [], []
        self._source_of, self._measures, self._last = array("I"), {}, None

    def __len__(self) -> int:
        return len(self._ids)

    @overload
    def __getitem__(self, place: int) -> Clip: ...
    @overload
    def __getitem__(self, place: slice) -> list[Clip]: ...
    def __getitem__(self, place: int | slice) -> Clip | list[Clip]:
        if isinstance(place, slice):
            return [self[one] for one in range(*place.indices(len(self)))]
        place = range(len(self))[place]
        _, source, sha256, _, media = self._unpacked(self._source_of[place])
        file, measures = self._files[place], self._measures.get(place)
        return Clip(
            self._ids[place].hex(), sha256, source, media, unpack_shot(self._shots[place]), None if file is None else _unpack_file(file),
            measures={} if measures is None else dict(marshal.loads(measures)),
        )  # fmt: skip

    def __iter__(self) -> Iterator[Clip]:
        return (self[place] for place in range(len(self)))

    def _unpacked(self, number: int) -> tuple[int, Source, str, str, Media]:
        if self._last is None or self._last[0] != number:
            self._last = number, *unpack_source(self._sources[number]), unpack_media(self._media[number])
        return self._last


def rows_of(clips: Iterable[Clip]) -> ClipRows:
    """Packed; the path of a source is its address."""
    rows = ClipRows()
    for place, clip in enumerate(clips):
        rows.add_source(pack_source(clip.source, clip.source_sha256, clip.source.uri), pack_media(clip.media))
        rows.add(clip.id, pack_shot(replace(clip.shot, thumbnail="")))
        if clip.file is not None:
            rows.set_file(place, clip.file)
        if clip.measures:
            rows.set_measures(place, dict(clip.measures))
    return rows
