"""What the steps took in earlier runs on this machine: CPU-seconds of their status over the video of their kept results."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import TypeVar

from opensora.dataset.rows import ClipFile, Media, from_json
from orchestrator.prepare import rates
from orchestrator.prepare.kept import KeptResults
from orchestrator.prepare.plan import Own
from orchestrator.prepare.run_directory import RunDirectory
from orchestrator.prepare.watching import steps_of

R = TypeVar("R", Media, ClipFile)
MOST = 20_000
"""Videos, and clips, that are added up."""
LEAST_S = 5.0
"""CPU-seconds, below which a rate is chance."""


def measured(prepared: Path) -> Own:
    """`prepared`: the folder of run directories. Of a run that went on where another had ended, what it found kept costs it nothing: only
    those whose step took LEAST_S count."""
    look_s = look_cpu = cut_s = cut_cpu = captions = tokens_in = tokens_out = 0.0
    runs = 0
    for folder in sorted(prepared.iterdir()) if prepared.is_dir() else ():
        directory = RunDirectory(folder)
        status, about = directory.status(), directory.description()
        cpu = {row["name"]: float(row["cpu_s"] or 0) for row in steps_of(status)}
        if cpu.get("frames", 0) >= LEAST_S:
            runs, look_cpu, look_s = runs + 1, look_cpu + cpu["frames"], look_s + _video_seconds(directory.kept)
        if cpu.get("clips", 0) >= LEAST_S:
            runs, cut_cpu, cut_s = runs + 1, cut_cpu + cpu["clips"], cut_s + _clip_seconds(directory.kept)
        if about and status.get("tokens_in"):
            captions, tokens_in = captions + int(about.get("clips") or 0), tokens_in + status["tokens_in"]
            tokens_out += status.get("tokens_out") or 0
    return Own(
        look_cpu / look_s if look_s else None, cut_cpu / cut_s if cut_s else None,
        (tokens_in / captions, tokens_out / captions) if captions else None, runs,
    )  # fmt: skip


def _video_seconds(kept: Path) -> float:
    """Of all probed videos, as many seconds as they would have at `rates.PIXELS`."""
    found = (media.duration_s * media.width * media.height * (media.fps or 25) for media in _rows(kept, "probe", Media))
    return sum(found) / rates.PIXELS


def _clip_seconds(kept: Path) -> float:
    """The same of all clips' files."""
    return sum(one.frames * one.width * one.height for one in _rows(kept, "clips", ClipFile)) / rates.PIXELS


def _rows(kept: Path, step: str, kind: type[R]) -> Iterator[R]:
    results = KeptResults(kept.parent)
    for row in islice((row for digest in results.all_digests(step) for _, row in results.rows(step, digest)), MOST):
        with contextlib.suppress(ValueError, TypeError):  # how one left
            yield from_json(kind, json.dumps(row))
