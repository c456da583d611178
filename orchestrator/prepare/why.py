"""Why a clip or a source is in a data set, or is not: at which step it left, for which reason, with its numbers. Only reads."""

from __future__ import annotations

import time
from collections import Counter
from typing import Any

from opensora.dataset.rows import Fetched, Leaves, Looked
from opensora.printable import several
from orchestrator.errors import Refused
from orchestrator.prepare.clip_rows import ClipRow, Clips, told
from orchestrator.prepare.kept import Found, content_key
from orchestrator.prepare.records import REASON, Removed

LEAST = 6
"""Digits of an id that must be given."""
COPY = "same file as another source"
"""As the engine counts it (`opensora.prepare.source_phase`)."""


def why(clips: Clips, wanted: str, place: str | None) -> dict[str, Any]:
    """What is known of a clip (its id, or 6 digits or more of it) or a source (name, path, address, sha256).

    Args:
        place: of the data set in its store; None: it is not published.

    Raises Refused where nothing of that name was seen, or several.
    """
    sources = _sources(clips, wanted)
    if len(sources) == 1:
        return _source(clips, sources[0])
    if len(sources) > 1:
        which = ", ".join(f"{_name(one)} ({_sha(one)[:12]})" for one in sources[:5])
        raise Refused(f"why {wanted}: means {several(len(sources), 'source')}. Give the path, address or sha256 of one: {which}")
    for gone in clips.removed.values():
        if wanted in (gone.source, gone.uri) or (len(wanted) >= LEAST and gone.sha256.startswith(wanted.lower())):
            return _taken_out(gone)
    digits = wanted.removeprefix("clips/").removesuffix(".mp4")
    rows = [row for row in clips.rows() if row.id.startswith(digits)] if len(digits) >= LEAST else []
    if len(rows) == 1:
        return _clip(rows[0], place)
    if len(rows) > 1:
        raise Refused(f"why {wanted}: {several(len(rows), 'clip begins', 'clips begin')} so. Give more digits")
    raise Refused(
        f"why {wanted}: neither a clip nor a source that {clips.config.name} has seen. A clip is named by {LEAST} digits of its id, "
        f"a source by its name: osctl data show {clips.config.name} --about"
    )


def _sources(clips: Clips, wanted: str) -> list[Fetched | Leaves]:
    """By content; where several that have it are meant, the one whose clips they are. Those not fetched are known by their reason."""
    found: dict[str, Fetched | Leaves] = {}
    for one in clips.sources():
        if isinstance(one, Fetched):
            names = (one.source.name, one.source.uri, one.source.provenance.uri, one.path)
            if wanted in names or wanted in map(told, names) or (len(wanted) >= LEAST and one.sha256.startswith(wanted.lower())):
                key = content_key(one)
                found[key] = clips.owner(one) if key in found or one.source.uri == clips.owner(one).source.uri else one
        elif wanted in one.detail or wanted in told(one.detail):
            found.setdefault(str(one), one)
    return list(found.values())


def _source(clips: Clips, one: Fetched | Leaves) -> dict[str, Any]:
    if isinstance(one, Leaves):
        return {"kind": "source", "name": told(one.detail), "step": "download", "verdict": one.reason, "detail": told(one.detail)}
    about: dict[str, Any] = {
        "kind": "source", "name": told(one.source.name), "uri": told(one.source.provenance.uri or one.source.uri), "sha256": one.sha256,
        "bytes": one.size, "licence": one.source.provenance.licence,
    }  # fmt: skip
    if clips.is_out(one.sha256):
        return about | {"step": "download", "verdict": REASON, "detail": ""}
    owner = clips.owner(one)
    seen = _seen(clips, clips.kept.found(owner))
    if owner.source.uri == one.source.uri:
        return about | seen
    detail = f"its content is that of {told(owner.source.name)}, whose clips they are: {seen['verdict']}"
    return about | seen | {"step": "download", "verdict": COPY, "detail": detail, "same_as": told(owner.source.name)}


def _taken_out(gone: Removed) -> dict[str, Any]:
    """A source of which no result is kept any more."""
    when = time.strftime("%Y-%m-%d %H:%M", time.localtime(gone.time))
    about = {"kind": "source", "name": gone.source, "uri": gone.uri, "sha256": gone.sha256}
    return about | {"step": "download", "verdict": REASON, "detail": f"by {gone.holder}, {when}"}


def _seen(clips: Clips, found: Found) -> dict[str, Any]:
    for step, outcome in (("probe", found.media), ("frames", found.looked)):
        if isinstance(outcome, Leaves):
            return {"step": step, "verdict": outcome.reason, "detail": outcome.detail}
        if outcome is None:
            return {"step": "", "verdict": "not reached yet", "detail": f"nothing is kept of it at {step}"}
    assert isinstance(found.looked, Looked)
    ids = {name for name, _ in found.clips()}
    mine = [row for row in clips.rows() if row.id in ids]
    verdicts = Counter(f"{row.step}: {row.verdict}" if row.step else row.verdict for row in mine)
    kept = verdicts.get("kept", 0)
    return {
        "step": "", "verdict": f"{kept} of {len(mine)} clips are kept", "detail": _too_short(found.looked.too_short),
        "seconds": found.looked.media.duration_s, "cuts": list(found.looked.cuts), "verdicts": dict(verdicts),
        "clips": [{"id": row.id, "start_s": row.shot.start_s, "end_s": row.shot.end_s, "step": row.step, "verdict": row.verdict,
                   "detail": row.detail} for row in mine],
    }  # fmt: skip


def _too_short(scenes: int) -> str:
    return "" if not scenes else several(scenes, "scene was too short", "scenes were too short")


def _clip(row: ClipRow, place: str | None) -> dict[str, Any]:
    return {
        "kind": "clip", "name": row.id, "source": row.source, "uri": row.uri, "licence": row.licence, "start_s": row.shot.start_s,
        "end_s": row.shot.end_s, "start_pts": row.shot.start_pts, "end_pts": row.shot.end_pts, "frames": row.shot.frames,
        "step": row.step, "verdict": row.verdict, "detail": row.detail, "columns": dict(row.columns), "caption": row.caption,
        "caption_by": row.caption_by, "file": f"{place}/{row.file}" if row.file and place else row.file,
    }  # fmt: skip


def _name(one: Fetched | Leaves) -> str:
    return told(one.source.name if isinstance(one, Fetched) else one.detail)


def _sha(one: Fetched | Leaves) -> str:
    return one.sha256 if isinstance(one, Fetched) else str(one)
