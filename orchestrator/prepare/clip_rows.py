"""Every clip of a preparation with its columns and how it fared, told from what the run directory keeps. Only reads.

Owns how a verdict follows from kept results: rules are judged here as the engine judges them (`opensora.prepare.filters`), since no step
writes down which clips a rule dropped. Refuses to decide what is kept: that the engine does.
"""

from __future__ import annotations

import contextlib
import math
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from opensora.dataset.duplicates import Near
from opensora.dataset.prepare_config import PrepareConfig, Rule
from opensora.dataset.rows import Fetched, Leaves, Shot
from orchestrator.errors import NotFound
from orchestrator.inputs import datasets
from orchestrator.ports import Store
from orchestrator.prepare import removed
from orchestrator.prepare.kept import Found, KeptResults, content_key
from orchestrator.prepare.publish import described
from orchestrator.prepare.records import Keys, Removed
from orchestrator.prepare.run_directory import RunDirectory, read_json

LATER = ("text_area", "aesthetic", "words", "language", "clip")
"""Columns that are measured after the filter."""
MANY = 100_000
"""Clips for which the search of near duplicates is laid out; it is exact for any number."""
KEPT, WAITS, DUPLICATE = "kept", "not reached yet", "near duplicate"


@dataclass(frozen=True)
class ClipRow:
    id: str
    source: str
    uri: str
    licence: str
    shot: Shot
    columns: Mapping[str, float | str]
    step: str
    """At which it left; empty: it did not."""
    verdict: str
    """`kept`, `not reached yet`, or the reason for which it left."""
    detail: str
    caption: str = ""
    caption_by: str = ""
    file: str = ""
    """In the data set: `clips/ID.mp4`."""


@dataclass
class Clips:
    """Read anew by each `of`: what is kept may be changing. Leaving its `with` closes the files that are held open for it."""

    directory: RunDirectory
    config: PrepareConfig
    kept: KeptResults
    removed: Mapping[str, Removed]
    """By sha256, what was taken out on request."""
    about: Mapping[str, Any]
    """DATASET.json of what the name means now; empty: nothing is finished."""
    _files: frozenset[str] = frozenset()
    _owners: dict[str, Fetched] = field(default_factory=dict)
    _names: dict[int, str] = field(default_factory=dict)
    """Of clips that passed the filter, the first of each hash."""
    _near: Near | None = None

    def __enter__(self) -> Clips:
        return self

    def __exit__(self, *_: object) -> None:
        self.kept.__exit__()

    @classmethod
    def of(cls, directory: RunDirectory, published: Mapping[str, Any] | None = None, gone: Sequence[Removed] = ()) -> Clips:
        """
        Args:
            published: DATASET.json of what the name means in its store; None: it means nothing, or what lies in the run directory.
            gone: sources that were taken out under this name.

        Raises ValueError where there is no prepare.yaml that can be read.
        """
        config = PrepareConfig.model_validate(read_json(directory.config))
        digests = directory.status().get("digests")
        kept = KeptResults(directory.path, {str(k): str(v) for k, v in digests.items()} if isinstance(digests, dict) else None)
        about = directory.description() if published is None else published
        clips = cls(directory, config, kept, {one.sha256: one for one in gone}, about, frozenset(about.get("files", {})))
        clips._owners = clips._find_owners()  # it holds no file open
        return clips

    @classmethod
    def in_store(cls, directory: RunDirectory, store: Store, name: str) -> Clips:
        """As of what the name means in its store: a source may have been taken out since the run directory's last run.

        Raises ValueError where there is no prepare.yaml that can be read, CorruptCheckpoint, Unreachable.
        """
        known = datasets.of_name(store, name)
        published = None
        if known and known[-1].prepared not in (None, directory.description().get("digest")):
            with contextlib.suppress(NotFound):
                published = described(store, name, known[-1].source.rpartition("/")[2]).content
        return cls.of(directory, published, removed.all_of(store, Keys(name)))

    def sources(self) -> Iterator[Fetched | Leaves]:
        for _, one in self.kept.sources():
            yield one

    def owner(self, one: Fetched) -> Fetched:
        """Of the sources that have this content, the one whose clips they are; with the name, address and licence that the set has."""
        return self._owners.get(content_key(one), one)

    def is_out(self, sha256: str) -> bool:
        """Whether this content was taken out on request."""
        return sha256 in self.removed or sha256 in self.config.exclude

    def found(self) -> Iterator[Found]:
        """What was seen of each content, by the name of its owner."""
        for one in sorted(self._owners.values(), key=lambda one: one.source.name):
            if not self.is_out(one.sha256):
                yield self.kept.found(one)

    def rows(self) -> Iterator[ClipRow]:
        bits = self.config.filter.duplicates
        self._names, self._near = {}, None if bits is None else Near(bits, MANY)
        seen = set[str]()
        for found in self.found():
            for name, shot in found.clips():
                if name not in seen:  # two lists may name the same part of one file
                    seen.add(name)
                    yield self.row(found, name, shot)

    def _find_owners(self) -> dict[str, Fetched]:
        """By content. A finished set says whose its clips are; of what is not in one, the source that is listed first has it."""
        named = {(str(one["sha256"]), str(one["name"])): one for one in self.about.get("sources", ())}
        owners: dict[str, tuple[tuple[object, ...], Fetched]] = {}
        for one in self.sources():
            if not isinstance(one, Fetched):
                continue
            entry = named.get((one.sha256, told(one.source.name)))
            if entry is not None:
                published = replace(one.source.provenance, uri=str(entry["uri"]), licence=str(entry["licence"]))
                one = replace(one, source=replace(one.source, provenance=published))
            key, rank = content_key(one), (entry is None, *self._place(one))
            if key not in owners or rank < owners[key][0]:
                owners[key] = rank, one
        return {key: one for key, (_, one) in owners.items()}

    def _place(self, one: Fetched) -> tuple[int, str, str]:
        """Where a source stands among `sources`, and in its folder: the engine lists it so."""
        uri = one.source.uri
        paths = [given.path.rstrip("/") for given in self.config.sources]
        of_path = (number for number, path in enumerate(paths) if uri == path or uri.startswith(f"{path}/"))
        of_name = (number for number, given in enumerate(self.config.sources) if given.name == one.source.provenance.set_name)
        return next(of_path, next(of_name, len(paths))), unicodedata.normalize("NFC", uri), uri

    def row(self, found: Found, name: str, shot: Shot) -> ClipRow:
        fetched, media = found.fetched, found.media
        columns: dict[str, float | str] = {"seconds": shot.end_s - shot.start_s, "frames": shot.frames}
        columns |= {"source": fetched.source.provenance.set_name, "licence": fetched.source.provenance.licence}
        if media is not None and not isinstance(media, Leaves):
            columns |= {"width": media.width, "height": media.height, "fps": media.fps or math.nan, "codec": media.codec, "hdr": media.hdr}
        columns |= dict(shot.measures)
        for step in ("text_area", "scores"):
            more = self.kept.read(step, name)
            columns |= more.get("values", {}) if isinstance(more, dict) else {}
        caption = self._caption(found, name)
        text, by = ("", "") if not isinstance(caption, dict) else (str(caption.get("text", "")), str(caption.get("by", "")))
        if text:
            columns |= {"words": len(text.split()), "language": str(caption.get("language", ""))}
        step, verdict, detail = self._verdict(name, shot, columns, caption)
        if step != "filter":
            self._remember(shot, name)
        provenance = fetched.source.provenance
        file = f"clips/{name}.mp4" if f"clips/{name}.mp4" in self._files else ""
        uri = provenance.uri or fetched.source.uri
        return ClipRow(name, told(fetched.source.name), told(uri), provenance.licence, shot, columns, step, verdict, detail, text, by, file)

    def _caption(self, found: Found, name: str) -> Any:
        asked, beside = self.kept.caption_keys(found.fetched, name)
        return self.kept.read("caption", beside if self.config.caption.kind == "beside" else asked)

    def _verdict(self, name: str, shot: Shot, columns: Mapping[str, float | str], caption: Any) -> tuple[str, str, str]:
        if f"clips/{name}.mp4" in self._files:
            return "", KEPT, ""
        for rule in self.config.filter.rules:
            if rule.column not in LATER and (why := broken(rule, columns)):
                return "filter", *why
        cut = self.kept.read("clips", name)
        if isinstance(cut, Leaves):
            return "clips", cut.reason, cut.detail
        if cut is None:
            return self._twin(shot) or ("", WAITS, "")
        for step in ("text_area", "scores"):
            if isinstance(left := self.kept.read(step, name), Leaves):
                return "score", left.reason, left.detail
        for rule in self.config.filter.rules:
            if rule.column in LATER and rule.column in columns and (why := broken(rule, columns)):
                return ("caption" if rule.column in ("words", "language", "clip") else "score"), *why
        if isinstance(caption, Leaves):
            return "caption", caption.reason, caption.detail
        least, most = self.config.caption_words
        words = columns.get("words")
        if isinstance(words, int | float) and not least <= words <= most:
            return "caption", f"words outside {least} to {most}", f"it has {words:g}"
        if self.config.languages and words is not None and columns.get("language") not in self.config.languages:
            return "caption", f"language none of {', '.join(self.config.languages)}", f"it is {columns.get('language') or 'not told'}"
        return "", WAITS, ""

    def _remember(self, shot: Shot, name: str) -> None:
        if self._near is not None and shot.phash:
            value = int(shot.phash, 16)
            if value not in self._names:
                self._names[value] = name
                self._near.add(value)

    def _twin(self, shot: Shot) -> tuple[str, str, str] | None:
        near = self._near.near(int(shot.phash, 16)) if self._near is not None and shot.phash else None
        return None if near is None else ("filter", DUPLICATE, f"of clip {self._names[near]}")


def told(name: str) -> str:
    """A name or place as DATASET.json has it: a byte of a file's name that is not UTF-8 is a question mark there."""
    return name.encode(errors="replace").decode()


def broken(rule: Rule, columns: Mapping[str, float | str]) -> tuple[str, str] | None:
    """(reason, detail) where a rule does not hold; None: it holds."""
    value = columns.get(rule.column, math.nan)
    if rule.any_of:
        return None if value in rule.any_of else (f"{rule.column} none of {', '.join(rule.any_of)}", f"it is {value}")
    if not isinstance(value, int | float) or math.isnan(value):
        return f"{rule.column} not measured", ""
    if rule.min is not None and value < rule.min:
        return f"{rule.column} below {rule.min:g}", f"it is {value:.4g}"
    if rule.max is not None and value > rule.max:
        return f"{rule.column} above {rule.max:g}", f"it is {value:.4g}"
    return None
