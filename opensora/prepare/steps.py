"""The seam between the engine and the steps: what each step is called with, and the step functions that a run uses.

Owns the rows that go into a guard, and which function of which module does what. Imports those modules when they are first called: a guard
that cuts clips loads no captioner. Refuses to keep results and to count.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Protocol

from opensora.dataset.left_out import LeftOut
from opensora.dataset.prepare_config import Caption, Clips, Cut, Download, Filter, Given, Limits, PrepareConfig
from opensora.dataset.rows import Captioned, Clip, ClipFile, Fetched, Leaves, Looked, Media, Shot, Source
from opensora.prepare import guarded
from opensora.prepare.devices import Device

FRAMES_SHARES = (0.2, 0.5, 0.8)
"""Where in a clip frames are taken for text area and scores."""
LOAD_S = 1800.0
"""For models to be read from a folder, which may be far away and have 14 GB."""
FRAMES_SIDE = 640
"""Pixels of their longer side."""


@dataclass(frozen=True)
class Inspect:
    """A source for probe and look, in one guard call."""

    content: str
    """Key under which its results are kept."""
    path: str
    segments: tuple[tuple[float, float, str], ...]
    media: Media | None
    """Where the probe's result is kept already."""
    cut: Cut
    limits: Limits
    source: Source | None = None
    """That is to be fetched where it is worked on; None: `path` is there."""
    sha256: str = ""
    """That it must have; empty: it was never fetched, and `content` is not known."""
    place: int = -1
    """In the list of sources."""


@dataclass(frozen=True)
class Inspected:
    media: Media | Leaves
    looked: Looked | Leaves | None
    """None: the probe refused the source."""
    fetched: Fetched | Leaves | None = None
    """Of a source that was fetched where it was worked on."""


@dataclass(frozen=True)
class CutOut:
    """A clip that is to have its own file."""

    id: str
    path: str
    """Of its source."""
    media: Media
    shot: Shot
    to: str
    settings: Clips
    source: Source | None = None
    """That is to be fetched where it is worked on; None: `path` is there."""
    sha256: str = ""
    """That it must have."""


@dataclass(frozen=True)
class Measure:
    """A clip's file that is to be measured."""

    id: str
    path: str
    text_area: bool
    scores: str
    """Folder of the models; empty: none."""
    caption: str = ""


class Judged(Protocol):
    """See opensora.prepare.filters."""

    @property
    def dropped(self) -> Mapping[str, Leaves]: ...
    @property
    def alone(self) -> Mapping[str, int]: ...


class Spent(Protocol):
    """See opensora.prepare.captions."""

    @property
    def tokens_in(self) -> int: ...
    @property
    def tokens_out(self) -> int: ...
    @property
    def dollars(self) -> float: ...
    @property
    def stopped(self) -> str: ...


@dataclass(frozen=True)
class Captioning:
    """What captions are made with."""

    clips: Sequence[Clip]
    folder: Path
    settings: Caption
    on_done: Callable[[str, Captioned | Leaves], None]
    on_spent: Callable[[Any], None]
    halt: Callable[[], bool]
    before: Mapping[str, float]
    """requests, tokens_in, tokens_out, presumed, dollars that earlier runs used."""
    on_device: Callable[[Device], None] = lambda device: None
    """Is told what a model is put on, just before it is."""


# --- The steps themselves ---------------------------------------------------------------------------------------------------------------


def listed(given: Sequence[Given], left_out: LeftOut) -> Iterator[Source]:
    """Raises ConfigError."""
    from opensora.prepare import sources

    return sources.listed(given, left_out)


def fetch(source: Source, folder: Path, settings: Download, halt: Callable[[], bool], max_bytes: int) -> Fetched:
    """Raises Leaves, ConfigError."""
    from opensora.prepare import download

    return download.fetch(source, folder, settings, halt=halt, max_bytes=max_bytes)


def inspect(row: Inspect) -> Inspected:
    """In a guard: probe, then one decode. The deadline grows with the duration that the probe found. Raises ConfigError."""
    from opensora.prepare import look, probe

    media = row.media
    if media is None:
        try:
            media = probe.probe(Path(row.path), row.limits)
        except Leaves as leaves:
            return Inspected(leaves, None)
        guarded.tell(media)
    guarded.allow(row.limits.deadline_s + row.limits.deadline_per_s * media.duration_s)
    try:
        looked = look.look(Path(row.path), media, row.cut, segments=row.segments)
    except Leaves as leaves:
        return Inspected(media, leaves)
    return Inspected(media, looked)


def cut_out(row: CutOut) -> ClipFile:
    """In a guard. Raises Leaves."""
    from opensora.prepare import clip_files

    return clip_files.write(Path(row.path), row.media, row.shot, Path(row.to), row.settings)


def measure(row: Measure) -> dict[str, float]:
    """In a guard: the columns `text_area`, and those of the scorer. Raises Leaves, ConfigError."""
    from opensora.prepare import frames

    jpegs = frames.frames_of(Path(row.path), FRAMES_SHARES, FRAMES_SIDE)
    found: dict[str, float] = {}
    if row.text_area:
        from opensora.prepare.text_area import text_area

        found["text_area"] = text_area(jpegs)
    if row.scores:
        found |= scorer(row.scores).score(jpegs, row.caption)
    return found


@cache
def scorer(folder: str) -> Any:
    """Loaded once in each guard."""
    from opensora.prepare import devices
    from opensora.prepare.clip_scores import Scorer

    guarded.tell(devices.here())
    guarded.allow(LOAD_S)
    return Scorer(Path(folder))


def judge(clips: Sequence[Clip], settings: Filter, later: Sequence[str]) -> Judged:
    """Raises ConfigError."""
    from opensora.prepare import filters

    return filters.judged(clips, settings, later=later)


def caption(work: Captioning) -> Spent:
    """Raises ConfigError."""
    from opensora.prepare import captions, frames

    before = captions.Spent(**work.before)  # type: ignore[arg-type]
    return captions.caption_all(
        work.clips, work.folder, work.settings, on_done=work.on_done, halt=work.halt, on_spent=work.on_spent,
        frames_of=frames.frames_of, before=before, on_device=work.on_device,
    )  # fmt: skip


def check_caption(captioned: Captioned, config: PrepareConfig) -> None:
    """Raises Drop."""
    from opensora.prepare import captions

    captions.wanted(captioned, config)


def words(captioned: Captioned) -> int:
    from opensora.prepare import captions

    return captions.word_count(captioned)


def encode(out: Path, stages: Mapping[str, Path], progress: Callable[[int, int], None]) -> None:
    """In a process of its own. Raises ConfigError."""
    from opensora.prepare.encode import encode as fill_latents

    fill_latents(out, stages, progress)


def versions() -> dict[str, int]:
    """Of each step whose results are kept. A step raises its own whenever it would make something else of the same input."""
    from opensora.prepare import captions, clip_files, clip_scores, look, probe, text_area

    found = {"probe": probe.VERSION, "frames": look.VERSION, "clips": clip_files.VERSION, "caption": captions.VERSION}
    return {"download": 1} | found | {"text_area": text_area.VERSION, "scores": clip_scores.VERSION}


@dataclass(frozen=True)
class Steps:
    """What a run calls. Those marked with a guard are functions of a module, so that they can be sent by name."""

    listed: Callable[[Sequence[Given], LeftOut], Iterator[Source]] = listed
    fetch: Callable[[Source, Path, Download, Callable[[], bool], int], Fetched] = fetch
    inspect: Callable[[Inspect], Inspected] = inspect
    """Guard."""
    cut_out: Callable[[CutOut], ClipFile] = cut_out
    """Guard."""
    measure: Callable[[Measure], dict[str, float]] = measure
    """Guard."""
    judge: Callable[[Sequence[Clip], Filter, Sequence[str]], Judged] = judge
    caption: Callable[[Captioning], Spent] = caption
    check_caption: Callable[[Captioned, PrepareConfig], None] = check_caption
    words: Callable[[Captioned], int] = words
    encode: Callable[[Path, Mapping[str, Path], Callable[[int, int], None]], None] = encode
    """A process of its own."""
    versions: Callable[[], Mapping[str, int]] = versions
    preload: tuple[str, ...] = (
        *(f"opensora.prepare.{name}" for name in ("steps", "probe", "look", "clip_files", "frames")),
        "scipy.fftpack", *(f"PIL.{name}ImagePlugin" for name in ("Bmp", "Gif", "Jpeg", "Png", "Ppm")),
    )  # fmt: skip
    """Modules that every guard needs; imagehash and Pillow import the last ones over their first picture, 0.2 s in each guard."""
