"""Laws of the probe: it says what a file is by its index and one frame; what is no good leaves with a reason, and nothing hangs."""

from __future__ import annotations

import resource
from fractions import Fraction
from pathlib import Path
from typing import Any

import broken_videos as broken
import hand_made_videos as made
import numpy as np
import phone_clips
import pytest
import raw_videos as raw

from opensora.dataset.prepare_config import Cut, Limits
from opensora.dataset.rows import Drop, Leaves, Quarantine
from opensora.prepare.look import look
from opensora.prepare.probe import probe, varies

FRAMES = raw.moving(raw.texture(1, 96, 64), 12)


def left(path: Path, limits: Limits | None = None) -> Leaves:
    """With which reason a file leaves, at the probe or at the decode."""
    with pytest.raises(Leaves) as caught:
        look(path, probe(path, limits or Limits()), Cut())
    return caught.value


REASONS = {
    "truncated.mp4": "cannot be decoded",
    "truncated_with_index.mp4": "breaks off",
    "empty.mp4": "empty file",
    "text.mp4": "cannot be decoded",
    "zeros.mp4": "cannot be decoded",
    "noise.mkv": "cannot be decoded",
    "web_page.mp4": "cannot be decoded",
    "archive.avi": "cannot be decoded",
    "playlist.mp4": "names other files",
    "list_of_files.mkv": "names other files",
    "sound_alone.mp4": "no video stream",
    "cover_alone.mp3": "no video stream",
    "no_frames.mkv": "cannot be decoded",
    "no_media.mp4": "no frame can be decoded",
    "huge_header.mp4": "cannot be decoded",
    "index_elsewhere.mp4": "no frame can be decoded",
    "index_of_noise.mp4": "cannot be decoded",
    "overwritten.mp4": "breaks off",
    "pipe.mp4": "no regular file",
    "folder.mp4": "no regular file",
    "loop.mp4": "cannot be read",
    "dangling.mp4": "cannot be read",
    "device.mp4": "no regular file",
    "end_of_a_wire.mp4": "no regular file",
    "missing.mp4": "cannot be read",
    "wide.mov": "above limits.max_side",
    "huge.mp4": "cannot be decoded",
    "large.mp4": "too many pixels",
    "tiny.mp4": "below limits.min_side",
    "hasty.mp4": "above limits.max_fps",
    "changes_its_size.ts": "size changes within the video",
}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", broken.KINDS)
def test_what_is_broken_leaves_with_its_reason(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    broken.KINDS[name](path)
    why = left(path)
    assert why.reason == REASONS[name]
    assert why.detail
    assert isinstance(why, Drop) == (name == "tiny.mp4")


@pytest.mark.prove("a-million-frames")
def test_a_million_frames_of_a_millisecond_are_refused(tmp_path: Path) -> None:
    broken.hasty(tmp_path / "hasty.mp4", 1_000_000)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert left(tmp_path / "hasty.mp4").reason == "above limits.max_fps"
    assert left(tmp_path / "hasty.mp4", Limits(max_fps=2000, max_frames=999_999)).reason == "above limits.max_frames"
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300 << 10


@pytest.mark.parametrize(
    ("limit", "reason"),
    [
        ({"max_bytes": 100}, "above limits.max_bytes"),
        ({"max_hours": 0.0001}, "above limits.max_hours"),
        ({"max_side": 90}, "above limits.max_side"),
        ({"max_frames": 11}, "above limits.max_frames"),
        ({"max_fps": 23}, "above limits.max_fps"),
        ({"max_bits": 7}, "above limits.max_bits"),
        ({"min_side": 65}, "below limits.min_side"),
    ],
)
def test_each_limit_holds_and_the_reason_has_both_numbers(tmp_path: Path, limit: dict[str, Any], reason: str) -> None:
    film = made.write(tmp_path / "film.mp4", FRAMES)
    assert probe(film, Limits()).frames == 12
    why = left(film, Limits.model_validate(limit))
    assert why.reason == reason
    assert f"{next(iter(limit.values())):,.10g}" in why.detail


def test_a_plain_film(tmp_path: Path) -> None:
    media = probe(made.write(tmp_path / "film.mp4", FRAMES), Limits())
    assert (media.codec, media.width, media.height, media.pixel_format, media.bits) == ("h264", 96, 64, "yuv420p", 8)
    assert (media.frames, media.fps, media.duration_s, media.start_pts) == (12, 24, 0.5, 0)
    assert (media.rotation, media.aspect, media.hdr, media.alpha, media.interlaced, media.variable) == (0, (1, 1), "", False, False, False)


@pytest.mark.parametrize(("orientation", "degrees"), [(1, 0), (3, 180), (6, 90), (8, 270)])
def test_the_size_is_that_on_the_screen(tmp_path: Path, orientation: int, degrees: int) -> None:
    film = made.write(tmp_path / "film.mp4", FRAMES)
    made.turn(film, orientation)
    media = probe(film, Limits())
    assert media.rotation == degrees
    assert (media.width, media.height) == ((64, 96) if degrees in (90, 270) else (96, 64))


def test_pixels_that_are_not_square_count(tmp_path: Path) -> None:
    def anamorphic(stream: Any) -> None:
        stream.codec_context.sample_aspect_ratio = Fraction(4, 3)

    media = probe(made.write(tmp_path / "film.mp4", FRAMES, setup=anamorphic), Limits())
    assert (media.aspect, media.width, media.height) == ((4, 3), 128, 64)


@pytest.mark.parametrize("kind", ["mp4", "mkv"])
def test_a_rate_that_varies_is_told_from_one_that_is_rounded(tmp_path: Path, kind: str) -> None:
    """Matroska counts milliseconds: of 24 frames a second some last 41, some 42."""
    times = raw.uneven_times(len(FRAMES))
    assert probe(made.write(tmp_path / f"varies.{kind}", FRAMES, times=times, options={"bf": "0"}), Limits()).variable
    assert not probe(made.write(tmp_path / f"even.{kind}", FRAMES), Limits()).variable
    assert not probe(made.write(tmp_path / f"ntsc.{kind}", FRAMES, Fraction(30_000, 1001)), Limits()).variable


def test_most_frames_tell_what_is_usual() -> None:
    assert not varies({})
    assert not varies({41: 5, 42: 4})
    assert varies({512: 100, 1024: 1})
    assert not varies({3003: 90, 3004: 10})


def test_hdr_is_named_and_dropped_by_rule(tmp_path: Path) -> None:
    phone_clips.hdr_film(tmp_path / "hdr.mov", 6)
    media = probe(tmp_path / "hdr.mov", Limits())
    assert (media.hdr, media.bits, media.width, media.height) == ("hlg", 10, 108, 192)
    with pytest.raises(Drop, match="HDR"):
        probe(tmp_path / "hdr.mov", Limits(hdr="drop"))


def test_alpha_is_told(tmp_path: Path) -> None:
    clear = [np.dstack([each, np.full(each.shape[:2], 90, np.uint8)]) for each in FRAMES]
    film = made.write(tmp_path / "film.mov", clear, codec="qtrle", pix_fmt="argb", source="rgba", options={})
    assert probe(film, Limits()).alpha


def test_a_start_that_is_not_zero_is_told(tmp_path: Path) -> None:
    times = [5 + number / 24 for number in range(12)]
    media = probe(made.write(tmp_path / "film.mkv", FRAMES, times=times, options={"bf": "0"}), Limits())
    assert media.start_pts * Fraction(*media.time_base) == 5


def test_sound_is_named() -> None:
    assert probe(raw.package_film("bigbuckbunny.mp4"), Limits()).audio == "aac"
    assert probe(raw.package_film("bikes.mp4"), Limits()).audio == ""


def rss() -> int:
    """Bytes of this process in memory now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def opens(path: Path, damaged: Path, times: int) -> None:
    for _ in range(times):
        probe(path, Limits())
        with pytest.raises(Quarantine):
            probe(damaged, Limits())


@pytest.mark.parametrize("times", [pytest.param(60, marks=pytest.mark.long), pytest.param(1000, marks=pytest.mark.prove("opens"))])
def test_memory_does_not_grow_with_files_opened(tmp_path: Path, times: int) -> None:
    film = made.write(tmp_path / "film.mp4", FRAMES)
    broken.no_media(tmp_path / "damaged.mp4")
    opens(film, tmp_path / "damaged.mp4", 20)
    before = rss()
    opens(film, tmp_path / "damaged.mp4", times)
    assert rss() - before < 8 << 20
