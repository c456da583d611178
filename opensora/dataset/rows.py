"""What goes from step to step: a source, its media, its clips; and the two ways in which a row leaves. Plain data, JSON both ways. Pure.

Owns the rows and a clip's identity. Refuses to open files.

PTS are integers in units of `time_base` seconds, as the container has them: the truth about time. Frame numbers and seconds are for people.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, TypeVar

Step = str
"""download | probe | frames | filter | clips | caption | encode"""
STEPS = ("download", "probe", "frames", "filter", "clips", "caption", "encode")
NO_CAPTION = "no caption"
"""Why a clip leaves, for which none came along."""


class Leaves(Exception):
    """A row leaves the pipeline at a step."""

    def __init__(self, reason: str, detail: str = "") -> None:
        """
        Args:
            reason: a few stable words that rows are counted by: `no video stream`, `static above 0.9`. No numbers of this very row.
            detail: the fact about this row, with its numbers.
        """
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason, self.detail = reason, detail

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.reason, self.detail)


class Drop(Leaves):
    """It could be worked on and is not wanted: a rule says so."""


class Quarantine(Leaves):
    """It could not be worked on: broken, too slow, too large, refused by a server. Counted against `max_quarantined`; may be retried."""


@dataclass(frozen=True, slots=True)
class Provenance:
    """Where a source comes from: kept in every row to the end."""

    set_name: str = ""
    """Of the source set (`Given.name`)."""
    uri: str = ""
    """Address or path, as its list or the person has it."""
    licence: str = ""
    title: str = ""
    caption: str = ""
    """That came along: of the list, or of a file beside it. Of the whole video, unless `segments` have their own."""
    segments: tuple[tuple[float, float, str], ...] = ()
    """Start and end in seconds and caption of clips that a published list names; then no detector is asked."""


@dataclass(frozen=True, slots=True)
class Source:
    """One raw video, as it is listed."""

    uri: str
    """Path or address that it is fetched from."""
    name: str
    """Short and unique in the run, for people and for `osctl prepare why`."""
    provenance: Provenance = Provenance()


@dataclass(frozen=True, slots=True)
class Fetched:
    """A source on this machine."""

    source: Source
    path: str
    sha256: str
    """Of the whole file."""
    size: int
    """Bytes."""


@dataclass(frozen=True, slots=True)
class Media:
    """What a probe found. Width and height are those shown: rotation and sample aspect applied."""

    container: str
    codec: str
    width: int
    height: int
    """Pixels."""
    rotation: int
    """Degrees clockwise that frames are turned for showing: 0, 90, 180, 270."""
    aspect: tuple[int, int]
    """Sample aspect ratio."""
    pixel_format: str
    bits: int
    """A sample's."""
    hdr: str
    """``, `pq` or `hlg`."""
    alpha: bool
    interlaced: bool
    time_base: tuple[int, int]
    """Seconds of one PTS unit, as a fraction."""
    start_pts: int
    """Of the first frame."""
    end_pts: int
    """Where the last frame ends."""
    frames: int
    """That can be decoded, as far as the container's index tells; -1: it does not."""
    fps: float
    """Mean; 0: unknown."""
    variable: bool
    """Whether frames last differently."""
    audio: str
    """Codec of the first audio stream; empty: none."""

    @property
    def duration_s(self) -> float:
        """Seconds."""
        return float((self.end_pts - self.start_pts) * Fraction(*self.time_base))


@dataclass(frozen=True, slots=True)
class Shot:
    """A clip of one source, before it has a file. It holds frames whose PTS p has start_pts <= p < end_pts."""

    start_pts: int
    end_pts: int
    time_base: tuple[int, int]
    start_frame: int
    frames: int
    """How many there are."""
    measures: Mapping[str, float]
    """Columns that rules bound: motion, static, black, brightness, contrast, sharpness, … (`docs/datasets.md`)."""
    phash: str
    """Perceptual hash of the middle frame: 16 hex digits."""
    thumbnail: str = ""
    """JPEG of the middle frame, base64: at most 160 pixels wide."""

    @property
    def start_s(self) -> float:
        """Seconds from PTS 0."""
        return float(self.start_pts * Fraction(*self.time_base))

    @property
    def end_s(self) -> float:
        return float(self.end_pts * Fraction(*self.time_base))


@dataclass(frozen=True, slots=True)
class Looked:
    """All that one decode of a source told."""

    media: Media
    """With frames, end and rate as they were decoded."""
    cuts: tuple[int, ...]
    """Frame numbers at which a new scene begins, 0 left out: as PySceneDetect counts."""
    shots: tuple[Shot, ...]
    too_short: int
    """Scenes that were left out for `cut.min_s`."""


@dataclass(frozen=True, slots=True)
class Captioned:
    """A caption, and how it came to be."""

    text: str
    by: str
    """`beside`, `digits`, `text`, or a model's name."""
    prompt: str = ""
    seed: int | None = None
    tokens_in: int = 0
    tokens_out: int = 0
    seconds: float = 0.0
    """That the answer took."""
    language: str = ""
    """ISO 639-1; empty: not asked."""


@dataclass(frozen=True, slots=True)
class ClipFile:
    """A clip's own file."""

    path: str
    """Relative to the data set's folder: `clips/ID.mp4`."""
    sha256: str
    size: int
    frames: int
    width: int
    height: int
    fps: float


@dataclass(frozen=True, slots=True)
class Clip:
    """A row of the result."""

    id: str
    source_sha256: str
    source: Source
    media: Media
    shot: Shot
    file: ClipFile | None = None
    caption: Captioned | None = None
    measures: Mapping[str, float | str] = field(default_factory=dict)
    """The shot's, and those that later steps add (text_area, aesthetic, clip, words, language)."""


def clip_id(source_sha256: str, start_pts: int, end_pts: int, cut_digest: str) -> str:
    """20 hex digits: identity of a clip is its source's content, its bounds and how it was cut."""
    return hashlib.sha256(f"{source_sha256} {start_pts} {end_pts} {cut_digest}".encode()).hexdigest()[:20]


Read = TypeVar("Read")


def to_json(row: Any) -> bytes:
    """One line, without its newline."""
    return json.dumps(dataclasses.asdict(row), sort_keys=True, separators=(",", ":")).encode()


def from_json(kind: type[Read], data: bytes | str) -> Read:
    """Raises ValueError where the data is no such row."""
    try:
        content: Read = _read(kind, json.loads(data))
    except (TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"no {kind.__name__}: {error}") from error
    return content


WHOLE = 1 << 63
"""A whole number of a row lies below it, and at or above its negative: manifests have 64 bits for each."""
COUNTED = ("tokens_in", "tokens_out")
MOST_COUNTED = 10**12
"""What a stranger's server counted: earlier releases kept whatever it said. Above this it counts as not told, and the caption is used."""
_PARTS: Mapping[str, Any] = {
    "provenance": Provenance, "source": Source, "media": Media, "shot": Shot, "file": ClipFile, "caption": Captioned,
}  # fmt: skip


def _read(kind: Any, content: Mapping[str, Any]) -> Any:
    values: dict[str, Any] = {}
    for name, value in content.items():
        if isinstance(value, dict) and name in _PARTS:
            value = _read(_PARTS[name], value)
        elif name == "shots":
            value = tuple(_read(Shot, one) for one in value)
        elif name == "segments":
            value = tuple((float(start), float(end), str(text)) for start, end, text in value)
        elif isinstance(value, list):
            value = tuple(value)
        elif name in COUNTED and isinstance(value, int) and not 0 <= value <= MOST_COUNTED:
            value = 0
        elif isinstance(value, int) and not -WHOLE <= value < WHOLE:
            raise TypeError(f"{name} has {value.bit_length():,} bits, a row has room for 64")
        values[name] = value
    return kind(**values)
