"""Laws of the one decode: clips are shots with integer bounds, measures tell what was filmed, memory does not grow with length."""

from __future__ import annotations

import base64
import io
import subprocess
import sys
from pathlib import Path
from typing import Any

import hand_made_videos as made
import imagehash
import numpy as np
import phone_clips
import pytest
import raw_videos as raw
from PIL import Image

from opensora.dataset import columns, rows
from opensora.dataset.prepare_config import Cut, Limits
from opensora.dataset.rows import Looked, Quarantine
from opensora.prepare import looks
from opensora.prepare.films import opened
from opensora.prepare.look import look
from opensora.prepare.probe import probe


def looked(path: Path, segments: tuple[tuple[float, float, str], ...] = (), **settings: object) -> Looked:
    return look(path, probe(path, Limits()), Cut.model_validate({"min_s": 0, **settings}), segments=segments)


def scenes(*counts: int) -> list[raw.Picture]:
    return [frame for seed, count in enumerate(counts) for frame in raw.moving(raw.texture(seed), count)]


def pts_of(path: Path) -> list[int]:
    with opened(path) as film:
        return [timed.pts for timed in film.frames()]


# --- Clips ------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("uneven", [False, True])
def test_clips_hold_each_frame_of_their_scene_once(tmp_path: Path, *, uneven: bool) -> None:
    frames = scenes(30, 50, 20, 60)
    film = raw.written(tmp_path / "film.mp4", frames, times=raw.uneven_times(len(frames)) if uneven else None)
    found = looked(film, max_s=1)
    pts = [*pts_of(film), found.media.end_pts]
    place = 0
    for shot in found.shots:
        assert shot.start_frame == place
        assert (shot.start_pts, shot.end_pts) == (pts[place], pts[place + shot.frames])
        assert shot.end_s - shot.start_s <= 1
        place += shot.frames
    assert place == len(frames)
    assert set(found.cuts) == {30, 80, 100} <= {shot.start_frame for shot in found.shots}


def test_a_scene_that_is_too_short_is_counted(tmp_path: Path) -> None:
    found = looked(raw.written(tmp_path / "film.mp4", scenes(30, 20, 30)), min_s=1)
    assert ([shot.frames for shot in found.shots], found.too_short) == ([30, 30], 1)


def test_frames_beside_a_cut_are_trimmed_and_those_at_the_ends_are_not(tmp_path: Path) -> None:
    found = looked(raw.written(tmp_path / "film.mp4", scenes(30, 30, 30)), trim_frames=2)
    assert [(shot.start_frame, shot.frames) for shot in found.shots] == [(0, 28), (32, 26), (62, 28)]


def test_segments_of_a_list_take_the_place_of_cuts(tmp_path: Path) -> None:
    film = raw.written(tmp_path / "film.mp4", scenes(24, 24, 24))
    found = looked(film, ((0.5, 1.5, "a"), (1.25, 2, "b"), (2.5, 99, "c"), (50, 60, "nothing")))
    assert [(shot.start_frame, shot.frames) for shot in found.shots] == [(12, 24), (30, 18), (60, 12)]
    assert (found.cuts, found.too_short) == ((), 1)
    pictures = {base64.b64decode(shot.thumbnail) for shot in found.shots}
    assert len(pictures) == 3


def test_segments_begin_at_the_first_frame_whatever_its_time(tmp_path: Path) -> None:
    frames = scenes(48)
    film = raw.written(tmp_path / "film.mkv", frames, times=[7 + number / 24 for number in range(48)])
    (shot,) = looked(film, ((0.5, 1, ""),)).shots
    assert (shot.start_frame, shot.frames) == (12, 12)


def test_the_media_is_set_right_by_what_was_decoded(tmp_path: Path) -> None:
    """Matroska does not count frames."""
    film = raw.written(tmp_path / "film.mkv", scenes(48))
    assert probe(film, Limits()).frames == -1
    media = looked(film).media
    assert (media.frames, round(media.fps), media.variable) == (48, 24, False)
    assert media.duration_s == pytest.approx(2, abs=0.002)


def test_a_row_goes_to_json_and_back(tmp_path: Path) -> None:
    found = looked(raw.written(tmp_path / "film.mp4", scenes(30, 30)))
    assert rows.from_json(Looked, rows.to_json(found)) == found


def test_the_same_video_looks_the_same(tmp_path: Path) -> None:
    film = raw.written(tmp_path / "film.mp4", raw.any_video(5))
    assert rows.to_json(looked(film)) == rows.to_json(looked(film))


# --- Measures ---------------------------------------------------------------------------------------------------------------------------


def measured(path: Path, frames: list[raw.Picture], **more: Any) -> dict[str, float]:
    (shot,) = looked(raw.written(path / "film.mp4", frames, **more), detector="none").shots
    return dict(shot.measures)


def test_what_is_measured_has_the_names_that_rules_are_checked_by(tmp_path: Path) -> None:
    assert set(measured(tmp_path, raw.moving(raw.texture(3), 20))) == {"seconds", *columns.MEASURED}


@pytest.mark.parametrize(("pixels", "rate"), [(0, 24), (2, 24), (2, 12), (4, 24)])
def test_motion_is_hundredths_of_the_longer_side_a_second(tmp_path: Path, pixels: int, rate: int) -> None:
    found = measured(tmp_path, raw.moving(raw.texture(3), 36, pixels), rate=rate)["motion"]
    assert found == pytest.approx(100 * pixels * rate / 320, rel=0.25, abs=0.5)


def test_static_is_the_share_of_frames_that_stand_still(tmp_path: Path) -> None:
    frames = raw.moving(raw.texture(3), 25, 3)
    frames += [frames[-1]] * 75
    assert measured(tmp_path, frames)["static"] == pytest.approx(0.75, abs=0.03)


def test_black_is_the_share_of_black_frames(tmp_path: Path) -> None:
    frames = raw.moving(raw.texture(3), 30) + [np.full((180, 320, 3), 5, np.uint8)] * 10
    assert measured(tmp_path, frames)["black"] == pytest.approx(0.25, abs=0.01)


def test_brightness_and_contrast_are_those_of_the_picture(tmp_path: Path) -> None:
    picture = np.full((180, 320, 3), 50, np.uint8)
    picture[:, 160:] = 150
    found = measured(tmp_path, [picture] * 24)
    assert (found["brightness"], found["contrast"]) == (pytest.approx(100, abs=2), pytest.approx(50, abs=2))


def test_a_sharp_picture_is_sharper_than_a_blurred_one_and_a_flat_one_has_none(tmp_path: Path) -> None:
    from PIL import ImageFilter

    sharp = np.random.default_rng(0).integers(0, 256, (90, 160, 1), np.uint8).repeat(2, 0).repeat(2, 1).repeat(3, 2)
    blurred = np.asarray(Image.fromarray(sharp).filter(ImageFilter.GaussianBlur(3)))
    of_sharp, of_blurred, of_flat = (
        measured(tmp_path, [each] * 12)["sharpness"] for each in (sharp, blurred, np.full((180, 320, 3), 99, np.uint8))
    )
    assert of_sharp > 20 * of_blurred > of_flat
    assert of_flat == pytest.approx(0, abs=0.1)


def test_flashes_are_counted(tmp_path: Path) -> None:
    frames = raw.flashed(raw.flashed(raw.moving(raw.texture(3), 60), 15), 40, 3)
    assert measured(tmp_path, frames)["flashes"] == 2


def test_a_cut_to_a_brighter_scene_is_no_flash() -> None:
    assert looks.flashes(np.array([50] * 10 + [150] * 10, np.float32)) == 0


def test_fade_is_the_share_of_frames_in_fades(tmp_path: Path) -> None:
    scene = raw.moving(raw.texture(3), 60)
    frames = raw.faded(scene[:15], away=False) + scene[15:45] + raw.faded(scene[45:], away=True)
    assert measured(tmp_path, frames)["fade"] == pytest.approx(0.5, abs=0.1)
    assert measured(tmp_path, scene)["fade"] == 0


def test_flow_and_difference_across_a_cut_count_for_no_clip(tmp_path: Path) -> None:
    """Every frame of both scenes stands still; between them all changes. Frame 24, the last before the cut, is one whose flow is taken."""
    still = [frame for seed in (1, 2) for frame in [raw.texture(seed)] * 25]
    found = looked(made.write(tmp_path / "film.mp4", still, options={"crf": "0", "preset": "ultrafast"}))
    assert [shot.frames for shot in found.shots] == [25, 25]
    for shot in found.shots:
        assert shot.measures["static"] == 1
        assert shot.measures["motion"] < 0.01


@pytest.mark.parametrize("codec", ["libx264", "libx265"])
def test_ten_bits_measure_as_eight_do(tmp_path: Path, codec: str) -> None:
    frames = raw.moving(raw.texture(3), 24)
    eight = measured(tmp_path, frames)
    ten = measured(tmp_path, frames, codec=codec, pix_fmt="yuv420p10le")
    for name in ("brightness", "contrast", "motion", "black", "sharpness"):
        rounded = 0.2 if name == "sharpness" else 0.1  # rounding to 8 bits is noise, which looks sharp
        assert ten[name] == pytest.approx(eight[name], rel=rounded, abs=0.5), name


# --- Pictures ---------------------------------------------------------------------------------------------------------------------------


def test_the_hash_is_imagehashs_of_the_middle_and_the_thumbnail_shows_it(tmp_path: Path) -> None:
    still = [frame for seed in (1, 2, 3) for frame in [raw.texture(seed)] * 30]
    found = looked(raw.written(tmp_path / "film.mp4", still))
    for seed, shot in enumerate(found.shots, 1):
        own = imagehash.phash(Image.fromarray(raw.texture(seed)))
        assert imagehash.hex_to_hash(shot.phash) - own <= 2
        thumbnail = Image.open(io.BytesIO(base64.b64decode(shot.thumbnail)))
        assert thumbnail.size == (160, 90)
        difference = np.asarray(thumbnail, int) - np.asarray(Image.fromarray(raw.texture(seed)).resize((160, 90)), int)
        assert np.abs(difference).mean() < 6


def test_a_turned_hdr_film_has_an_upright_sdr_thumbnail(tmp_path: Path) -> None:
    phone_clips.hdr_film(tmp_path / "hdr.mov", 6)
    (shot,) = looked(tmp_path / "hdr.mov").shots
    thumbnail = np.asarray(Image.open(io.BytesIO(base64.b64decode(shot.thumbnail))), int)
    expected = phone_clips.scene(0.5, 108, 192).astype(int)
    assert thumbnail.shape == expected.shape
    assert np.abs(thumbnail - expected)[60:].mean() < 20  # the sun is brighter than white


@pytest.mark.long
def test_pictures_of_a_long_scene_are_thinned_and_each_clip_keeps_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(looks, "MOST_PICTURES", 20)
    film = raw.written(tmp_path / "film.mp4", raw.moving(raw.texture(3, 64, 48), 1200, 1))
    kept = []
    thin_out = looks.Looks._thin_out

    def counted(self: looks.Looks) -> None:
        thin_out(self)
        kept.append(sum(sample.small is not None for sample in self._samples))

    monkeypatch.setattr(looks.Looks, "_thin_out", counted)
    found = looked(film, max_s=10)
    assert [shot.frames for shot in found.shots] == [240] * 5
    assert all(shot.phash and shot.thumbnail for shot in found.shots)
    assert max(kept) <= 50 * 8 / 10 + 2
    assert len(kept) == 100


# --- Damage and memory ------------------------------------------------------------------------------------------------------------------


def test_a_video_that_breaks_off_is_put_aside_with_both_numbers(tmp_path: Path) -> None:
    film = raw.written(tmp_path / "film.mp4", scenes(40), container_options={"movflags": "+faststart"})
    media = probe(film, Limits())
    film.write_bytes(film.read_bytes()[: film.stat().st_size // 2])
    with pytest.raises(Quarantine, match=r"breaks off: \d+ of 40 frames"):
        look(film, media, Cut())


MEASURE = """
import resource, sys
from pathlib import Path
from opensora.dataset.prepare_config import Cut, Limits
from opensora.prepare.look import look
from opensora.prepare.probe import probe
path = Path(sys.argv[1])
media = probe(path, Limits())
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
found = look(path, media, Cut())
print(found.media.frames, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


def peak(film: Path) -> tuple[int, int]:
    """Frames, and MB that a look takes at most, beyond those of its imports."""
    done = subprocess.run([sys.executable, "-c", MEASURE, str(film)], capture_output=True, text=True, check=True)
    frames, megabytes = done.stdout.split()
    return int(frames), int(megabytes)


@pytest.mark.long
def test_memory_is_that_of_a_few_frames(tmp_path: Path) -> None:
    """300 frames of 720p are 400 MB as they are decoded."""
    pictures = raw.moving(raw.texture(3, 1280, 720), 10, 4)
    frames, megabytes = peak(raw.written(tmp_path / "film.mp4", pictures * 30))
    assert frames == 300
    assert megabytes < 150


@pytest.mark.prove("memory-of-ten-minutes")
@pytest.mark.timeout(1800)
def test_ten_minutes_of_1080p_take_a_few_hundred_megabytes(tmp_path: Path) -> None:
    pictures = raw.moving(raw.texture(3, 1920, 1080), 10, 4)
    film = raw.written(tmp_path / "film.mp4", pictures * 1800, 30)
    frames, megabytes = peak(film)
    assert frames == 18_000
    assert megabytes < 400
