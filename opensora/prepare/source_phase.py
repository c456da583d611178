"""From sources to rows of clips: download, probe and one decode of each, with every result kept.

Owns which sources are worked on, in which order rows come out, and what two sources of the same content are (one). Refuses to judge clips.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace

from opensora.dataset.left_out import of_run
from opensora.dataset.rows import Drop, Fetched, Leaves, Looked, Media, Quarantine, Source, clip_id
from opensora.prepare.compact import ClipRows, pack_bounds, pack_media, pack_shot, pack_source, unpack_bounds, unpack_source
from opensora.prepare.digests import key_of
from opensora.prepare.fetching import Fetching, local_path
from opensora.prepare.pool import Later, Lost
from opensora.prepare.run_state import RunState
from opensora.prepare.steps import Inspect, Inspected
from opensora.printable import one_line

log = logging.getLogger(__name__)
COPY = "same file as another source"
EXCLUDED = "taken out on request"
TOO_SHORT = "shorter than cut.min_s"
SAME_CLIP = "same clip as another source's"


@dataclass(slots=True)
class Content:
    """One file's content, however many sources have it."""

    first: int
    """Place in the list of the first source that has it."""
    source: bytes
    """`pack_source`."""
    media: bytes | None = None
    """None: not seen yet, or it left."""
    shots: bytes = pack_bounds(())
    """`pack_bounds` of its shots, by their start."""
    too_short: int = 0

    @property
    def name(self) -> str:
        return unpack_source(self.source)[0].name


@dataclass(frozen=True)
class Rows:
    clips: ClipRows
    """In order of source name and start."""
    fetching: Fetching


class SourcePhase:
    def __init__(self, state: RunState) -> None:
        self.state = state
        self.contents: dict[str, Content] = {}
        self.several: set[str] = set()
        """First 20 digits of files of which a list names clips: another source may name the same ones."""
        self.downloads, self.probes, self.frames = (state.begin(step) for step in ("download", "probe", "frames"))
        self.fetching = Fetching(
            state.steps.fetch,
            state.folders.sources,
            state.config.download,
            state.fetched,
            state.halt,
            state.config.limits.max_bytes,
            self._needs_file,
            elsewhere=not state.guards.shares_files,
        )
        self.ready = self.fetching.all(self._listed())

    def run(self) -> Rows:
        """Raises Drained, TooMany, ConfigError, DiskFull."""
        state = self.state
        state.begin("download")
        for row, ended in state.guards.map(state.steps.inspect, self._to_inspect(), state.config.limits.deadline_s):
            self._ended(row, ended)
        for step in ("download", "probe", "frames"):
            state.settle(step)
        return self._rows()

    def _listed(self) -> Iterator[Source]:
        left_out, shard = of_run(self.state.folders.path), self.state.shard
        for source in self.state.steps.listed(self.state.config.sources, left_out):
            if shard is not None and not shard.has(source):
                continue
            self.downloads.into += 1
            yield source
        if told := left_out.told():
            log.info("%s", one_line(told, 400))

    def _needs_file(self, source: Source, fetched: Fetched) -> bool:
        key = content_key(fetched.sha256, source)
        return not self.state.looked.has(key) and not isinstance(self.state.media.read(key), Leaves)

    def _to_inspect(self) -> Iterator[Inspect | Later]:
        """Sources that need a guard. What is kept is counted on the way."""
        for ready in self.ready:
            if isinstance(ready, Later):
                yield ready
                continue
            place, source, fetched = ready
            cut, limits, segments = self.state.config.cut, self.state.config.limits, source.provenance.segments
            if fetched is None:
                yield Inspect("", "", segments, None, cut, limits, source, place=place)
                continue
            if not self._is_new(place, source, fetched):
                continue
            assert isinstance(fetched, Fetched)
            key = content_key(fetched.sha256, source)
            self.probes.into += 1
            media = self.state.media.read(key)
            looked = self.state.looked.read(key) if isinstance(media, Media) else None
            if isinstance(media, Leaves) or looked is not None:
                self._inspected(key, media, looked)
                continue
            there = source if self.fetching.elsewhere and not local_path(source) else None
            yield Inspect(key, fetched.path, segments, media, cut, limits, there, fetched.sha256, place)

    def _is_new(self, place: int, source: Source, fetched: Fetched | Leaves) -> bool:
        """Whether a source is there, and no other source has its content. Counts the download."""
        if isinstance(fetched, Fetched) and fetched.sha256 in self.state.config.exclude:
            fetched = Drop(EXCLUDED, fetched.sha256)
        if isinstance(fetched, Leaves):
            self.state.fetched.write(key_of(source.uri), fetched) if isinstance(fetched, Quarantine) else None
            self.state.leave("download", fetched, source.name)
            return False
        if source.provenance.segments:
            self.several.add(fetched.sha256[:20])
        new = Content(place, pack_source(source, fetched.sha256, fetched.path))
        known = self.contents.setdefault(content_key(fetched.sha256, source), new)
        if known is not new:
            if place < known.first:  # the first of the list has it, whoever was fetched first
                known.first, known.source = place, new.source
            self.state.leave("download", Drop(COPY, f"{source.name} and {known.name}"), source.name)
            return False
        self.downloads.kept += 1
        return True

    def _ended(self, row: Inspect, ended: Inspected | Leaves) -> None:
        """Keep what a guard found."""
        state = self.state
        if not row.content:
            key = self._fetched(row, ended)
            if key is None:
                return
            row = replace(row, content=key)
        if isinstance(ended, Leaves):
            told = ended.told if isinstance(ended, Lost) else ()
            media = next((one for one in told if isinstance(one, Media)), row.media)
            ended = Inspected(media, ended) if media is not None else Inspected(ended, None)
        if row.media is None:
            state.media.write(row.content, ended.media)
        if ended.looked is not None:
            state.looked.write(row.content, ended.looked)
        self._inspected(row.content, ended.media, ended.looked)

    def _fetched(self, row: Inspect, ended: Inspected | Leaves) -> str | None:
        """Keep what is known of a source that was fetched elsewhere; under which key it is kept, or None: it left."""
        assert row.source is not None
        told = ended.told if isinstance(ended, Lost) else ()
        found = ended.fetched if isinstance(ended, Inspected) else next((one for one in told if isinstance(one, Fetched)), ended)
        assert isinstance(found, Fetched | Leaves)
        if isinstance(found, Fetched):
            self.state.fetched.write(key_of(row.source.uri), found)
        if not self._is_new(row.place, row.source, found) or isinstance(found, Leaves):
            return None
        self.probes.into += 1
        return content_key(found.sha256, row.source)

    def _inspected(self, key: str, media: Media | Leaves | None, looked: Looked | Leaves | None) -> None:
        """Count it."""
        content, state = self.contents[key], self.state
        if isinstance(media, Leaves):
            state.leave("probe", media, content.name)
            return
        self.probes.kept += 1
        self.frames.into += 1
        if isinstance(looked, Leaves):
            state.leave("frames", looked, content.name)
            return
        assert looked is not None
        self.frames.kept += 1
        content.media, content.too_short = pack_media(looked.media), looked.too_short
        shots = sorted(looked.shots, key=lambda shot: shot.start_pts)
        content.shots = pack_bounds((shot.start_pts, shot.end_pts, pack_shot(shot)) for shot in shots)

    def _rows(self) -> Rows:
        tally = self.state.begin("filter")
        through = sorted((one for one in self.contents.values() if one.media is not None), key=lambda one: one.name)
        self.contents.clear()
        clips, seen = ClipRows(), set[str]()
        through.reverse()
        while through:  # from its end, so that what is done with is freed
            content = through.pop()
            _, sha256, _ = unpack_source(content.source)
            assert content.media is not None
            clips.add_source(content.source, content.media)
            shots = unpack_bounds(content.shots)
            tally.into += content.too_short + len(shots)
            if content.too_short:
                tally.dropped[TOO_SHORT] += content.too_short
            for start, end, shot in shots:
                name = clip_id(sha256, start, end, self.state.digests.frames)
                if name in seen:
                    tally.dropped[SAME_CLIP] += 1
                    continue
                if sha256[:20] in self.several:
                    seen.add(name)
                clips.add(name, shot)
        return Rows(clips, self.fetching)


def content_key(sha256: str, source: Source) -> str:
    """Under which probe and look are kept: the file's content, and the segments of it that a list names."""
    bounds = tuple((start, end) for start, end, _ in source.provenance.segments)
    return key_of(sha256, bounds) if bounds else sha256[:20]
