"""Under which digest each step's results are kept: what they depend on, and nothing else. Pure.

Owns which part of `prepare.yaml` each step depends on. A step's VERSION is raised whenever it would make another result of the same input.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from opensora.config import Frozen
from opensora.dataset.prepare_config import PrepareConfig, step_digest


@dataclass(frozen=True)
class Digests:
    download: str
    probe: str
    frames: str
    clips: str
    text_area: str
    scores: str
    caption: str


def digests(config: PrepareConfig, versions: Mapping[str, int]) -> Digests:
    """`versions`: of each step."""
    bounds = ("max_bytes", "max_hours", "max_side", "max_frames", "max_bits", "min_side", "hdr")
    probe = step_digest(versions["probe"], differing(config.limits, *bounds))
    # a bound of the probe changes no frame of a video that passes: raising max_hours decodes nothing again
    frames = step_digest(versions["frames"], config.cut, str(versions["probe"]), config.limits.hdr)
    clips = step_digest(versions["clips"], config.clips, frames)
    text_area = step_digest(versions["text_area"], None, clips)
    scores = step_digest(versions["scores"], (config.filter.scores or "",), clips)
    caption = step_digest(versions["caption"], config.caption, clips)
    return Digests(step_digest(versions["download"], None), probe, frames, clips, text_area, scores, caption)


def differing(part: Frozen, *fields: str) -> tuple[tuple[str, object], ...]:
    """Those of these fields that are not at their default."""
    content = part.model_dump(mode="json", exclude_defaults=True)
    return tuple((name, content[name]) for name in sorted(fields) if name in content)


def key_of(*content: object) -> str:
    """20 hex digits."""
    return hashlib.sha256("\0".join(map(str, content)).encode(errors="surrogateescape")).hexdigest()[:20]


def result_digest(config: PrepareConfig, stages: Mapping[str, Path], of_steps: Digests) -> str:
    """Over all of the configuration that changes a result, and the stages that clips are encoded for."""
    parts: tuple[object, ...] = (
        config.name,
        differing(config.filter, *type(config.filter).model_fields),
        config.caption_words,
        config.languages,
        tuple((name, hashlib.sha256(path.read_bytes()).hexdigest()) for name, path in sorted(stages.items())),
        vars(of_steps),
    )
    return step_digest(1, parts)
