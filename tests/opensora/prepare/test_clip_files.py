"""Laws of clips' files: exactly the shot's frames, at their times, as a player shows them; and the same bytes each time."""

from __future__ import annotations

import itertools
from fractions import Fraction
from pathlib import Path
from typing import Any

import hand_made_videos as made
import numpy as np
import phone_clips
import pytest
import raw_videos as raw
import twins
from numpy.typing import NDArray

from opensora.data import video
from opensora.dataset.prepare_config import Clips, Cut, Limits
from opensora.dataset.rows import ClipFile, Looked, Quarantine
from opensora.prepare import clip_files
from opensora.prepare.clip_files import write
from opensora.prepare.films import Film, opened
from opensora.prepare.look import look
from opensora.prepare.probe import probe

GOOD = Clips(crf=1)


def looked(path: Path, **settings: object) -> Looked:
    return look(path, probe(path, Limits()), Cut.model_validate({"min_s": 0, **settings}))


def clips_of(path: Path, settings: Clips = GOOD, **cut: object) -> list[tuple[Path, ClipFile]]:
    found, clips = looked(path, **cut), []
    for number, shot in enumerate(found.shots):
        to = path.with_name(f"clip-{path.stem}-{number}.mp4")
        clips.append((to, write(path, found.media, shot, to, settings)))
    return clips


def shown(path: Path) -> NDArray[np.uint8]:
    """Each frame, as the trainer reads it."""
    count = video.probe(path, 10_000).frames
    return np.stack(list(video.decode(path, count)))


def seconds(path: Path) -> list[Fraction]:
    """When frames begin, after the first; and when the last one ends."""
    with opened(path) as film:
        timed = list(film.frames())
        return [(each.pts - timed[0].pts) * film.time_base for each in timed] + [
            (timed[-1].pts + timed[-1].lasts - timed[0].pts) * film.time_base
        ]


def psnr(one: NDArray[Any], other: NDArray[Any]) -> float:
    """dB."""
    assert one.shape == other.shape
    error = np.square(one.astype(float) - other.astype(float)).mean()
    return float(10 * np.log10(255**2 / max(error, 1e-9)))


def numbered(counts: list[int]) -> list[raw.Picture]:
    """Scenes of these lengths; each frame has a bar as long as its number, so that frames can be told apart."""
    frames = []
    for seed, count in enumerate(counts):
        frames += [raw.texture(seed, 256, 128).copy() for _ in range(count)]
    for number, frame in enumerate(frames):
        frame[:32] = 0
        frame[:32, : number + 1] = 255
    return frames


def numbers(path: Path) -> list[int]:
    """The frames that a file holds."""
    return [round(float(frame[4:28, :, 1].mean() / 255 * 256)) - 1 for frame in shown(path)]


@pytest.mark.long
@pytest.mark.parametrize("options", [{"g": "250"}, {"g": "12", "bf": "3"}, {"g": "17", "bf": "3", "x264-params": "open-gop=1"}])
@pytest.mark.parametrize("kind", ["mp4", "mkv", "ts"])
def test_no_clip_holds_a_frame_of_its_neighbour(tmp_path: Path, kind: str, options: dict[str, str]) -> None:
    film = made.write(tmp_path / f"film.{kind}", numbered([30, 41, 23, 60]), options={"crf": "8", "preset": "veryfast", **options})
    found = looked(film, max_s=1)
    assert found.cuts == (30, 71, 94)
    held = []
    for (clip, file), shot in zip(clips_of(film, max_s=1), found.shots, strict=True):
        assert numbers(clip) == list(range(shot.start_frame, shot.start_frame + shot.frames))
        assert file.frames == shot.frames
        held += numbers(clip)
    assert held == list(range(154))


def test_a_clip_is_the_same_whether_its_source_was_sought_or_read_from_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    film = made.write(
        tmp_path / "film.mkv", numbered([30, 40, 30]), options={"crf": "8", "g": "12", "bf": "3", "x264-params": "open-gop=1"}
    )
    sought = [clip.read_bytes() for clip, _ in clips_of(film)]
    monkeypatch.setattr(Film, "seek", lambda film, pts: None)
    assert [clip.read_bytes() for clip, _ in clips_of(film)] == sought


def test_a_seek_that_leads_elsewhere_costs_time_and_no_frame(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    film = made.write(tmp_path / "film.mp4", numbered([30, 40, 30]), options={"crf": "8", "g": "10"})
    seek = Film.seek
    monkeypatch.setattr(Film, "seek", lambda film, pts: seek(film, pts + 15 * film.period))
    assert [numbers(clip) for clip, _ in clips_of(film)] == [list(range(30)), list(range(30, 70)), list(range(70, 100))]


def test_the_same_shot_gives_the_same_bytes(tmp_path: Path) -> None:
    film = made.write(tmp_path / "film.mp4", numbered([40]))
    (first, file), (second, again) = clips_of(film)[0], clips_of(film)[0]
    assert first.read_bytes() == second.read_bytes()
    assert file == again
    assert file.size == first.stat().st_size


def test_a_rate_that_varies_stays_variable(tmp_path: Path) -> None:
    frames = numbered([30, 40])
    times = raw.uneven_times(len(frames))
    film = made.write(tmp_path / "film.mp4", frames, times=times, options={"crf": "8"})
    bounds = (0, 30, 70)
    for (clip, _), (start, end) in zip(clips_of(film), itertools.pairwise(bounds), strict=True):
        own = seconds(clip)
        expected = [times[number] - times[start] for number in range(start, end)]
        assert [float(each) for each in own[:-1]] == pytest.approx(expected, abs=1e-4)
        if end < 70:
            assert float(own[-1]) == pytest.approx(times[end] - times[start], abs=1e-4)


@pytest.mark.parametrize("rate", [Fraction(24), Fraction(30_000, 1001), Fraction(25, 2)])
def test_a_clip_lasts_as_long_as_its_shot(tmp_path: Path, rate: Fraction) -> None:
    film = made.write(tmp_path / "film.mp4", numbered([30, 30]), rate)
    for clip, file in clips_of(film):
        own = seconds(clip)
        assert own[-1] == 30 / rate
        assert own[1] == 1 / rate
        assert file.fps == pytest.approx(float(rate))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_turned_film_gives_upright_clips(tmp_path: Path, orientation: int) -> None:
    film = made.write(tmp_path / "film.mp4", [made.quadrants()] * 12)
    upright = shown(film)
    made.turn(film, orientation)
    ((clip, file),) = clips_of(film)
    own = shown(clip)
    assert (file.height, file.width) == own.shape[1:3] == ((96, 64) if orientation >= 5 else (64, 96))
    assert probe(clip, Limits()).rotation == 0
    assert made.corners(own[0]) == made.corners(twins.laid(upright[0], orientation))
    assert psnr(own[6], twins.laid(upright[6], orientation)) > 30


@pytest.mark.parametrize("transfer", ["pq", "hlg"])
@pytest.mark.parametrize("orientation", [1, 6])
def test_hdr_twins_look_like_their_upright_sdr_renderings(tmp_path: Path, transfer: str, orientation: int) -> None:
    upright = [raw.texture(3, 128, 192, 16, 200), *raw.moving(raw.texture(4, 128, 192, 16, 200), 11)]
    twins.hdr(tmp_path / "hdr.mov", [twins.stored(each, orientation) for each in upright], transfer)
    if orientation != 1:
        made.turn(tmp_path / "hdr.mov", orientation)
    assert probe(tmp_path / "hdr.mov", Limits()).hdr == transfer
    ((clip, _),) = clips_of(tmp_path / "hdr.mov", detector="none")
    own = shown(clip)
    for place in (0, 5, 11):
        assert psnr(own[place], upright[place]) > 30
    media = probe(clip, Limits())
    assert (media.hdr, media.bits, media.pixel_format) == ("", 8, "yuv420p")


def test_an_sdr_film_goes_through_with_its_colours(tmp_path: Path) -> None:
    for matrix, size in itertools.product((1, 6, 2), ((320, 180), (1288, 64))):

        def tag(stream: Any, matrix: int = matrix) -> None:
            stream.codec_context.colorspace = matrix

        film = made.write(tmp_path / f"film-{matrix}-{size[0]}.mp4", [raw.texture(3, *size)] * 3, setup=tag)
        ((clip, _),) = clips_of(film)
        assert psnr(shown(clip), shown(film)) > 40


@pytest.mark.parametrize("short_side", [90, 64])
@pytest.mark.parametrize("matrix", [1, 2])
def test_a_smaller_clip_has_the_colours_of_the_large_one(tmp_path: Path, short_side: int, matrix: int) -> None:
    """Untagged, 720 rows are BT.709's and 90 rows are BT.601's."""

    def tag(stream: Any) -> None:
        stream.codec_context.colorspace = matrix

    picture = made.quadrants(720, 1280)
    film = made.write(tmp_path / "film.mp4", [picture] * 3, setup=tag)
    ((clip, file),) = clips_of(film, Clips(crf=1, short_side=short_side))
    assert (file.height, file.width) == (short_side, 2 * round(short_side * 16 / 9) // 2 // 2 * 2)
    small, large = shown(clip)[0].astype(int), shown(film)[0].astype(int)
    for row, column in itertools.product((0.25, 0.75), repeat=2):
        of_small, of_large = (each[int(row * each.shape[0]), int(column * each.shape[1])] for each in (small, large))
        assert np.abs(of_small - of_large).max() <= 4


def test_a_short_side_that_is_longer_scales_nothing_up(tmp_path: Path) -> None:
    ((_, file),) = clips_of(made.write(tmp_path / "film.mp4", numbered([12])), Clips(short_side=720))
    assert (file.height, file.width) == (128, 256)


@pytest.mark.parametrize(("height", "width"), [(65, 97), (64, 97), (65, 96)])
@pytest.mark.parametrize("pix_fmt", ["yuv444p", "yuv420p"])
def test_sides_are_even(tmp_path: Path, height: int, width: int, pix_fmt: str) -> None:
    codec = "libx264" if pix_fmt == "yuv444p" else "libvpx-vp9"  # H.264 has no odd sides of yuv420p
    film = made.write(tmp_path / "film.mkv", [made.quadrants(height, width)] * 3, codec=codec, pix_fmt=pix_fmt, options={"crf": "5"})
    ((clip, file),) = clips_of(film)
    assert (file.height, file.width) == (64, 96)
    assert made.corners(shown(clip)[0]) == "RGBW"


def test_pixels_become_square(tmp_path: Path) -> None:
    def anamorphic(stream: Any) -> None:
        stream.codec_context.sample_aspect_ratio = Fraction(4, 3)

    ((clip, file),) = clips_of(made.write(tmp_path / "film.mp4", [made.quadrants()] * 3, setup=anamorphic))
    assert (file.height, file.width) == (64, 128)
    media = probe(clip, Limits())
    assert (media.aspect, media.height, media.width) == ((1, 1), 64, 128)


def test_what_is_transparent_lies_on_white(tmp_path: Path) -> None:
    clear = [np.dstack([np.zeros((64, 96, 3), np.uint8), np.full((64, 96), 0, np.uint8)])] * 3
    ((clip, _),) = clips_of(made.write(tmp_path / "film.mov", clear, codec="qtrle", pix_fmt="argb", source="rgba", options={}))
    assert (shown(clip) > 250).all()


def test_of_a_shot_that_is_not_there_nothing_is_written(tmp_path: Path) -> None:
    film = made.write(tmp_path / "film.mp4", numbered([30, 30]))
    found = looked(film)
    other = made.write(tmp_path / "other.mp4", numbered([40]))
    with pytest.raises(Quarantine, match="a shot's frames are not there"):
        write(other, found.media, found.shots[1], tmp_path / "clip.mp4", GOOD)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["film.mp4", "other.mp4"]


def test_a_first_rate_factor_gives_a_better_and_larger_file(tmp_path: Path) -> None:
    film = made.write(tmp_path / "film.mp4", raw.moving(raw.texture(3), 12, 3, 5))
    sizes = [clips_of(film, Clips(crf=crf))[0][1].size for crf in (4, 12, 30)]
    assert sizes[0] > sizes[1] > sizes[2]


@pytest.mark.parametrize(
    "name", [name for name in phone_clips.CAPTIONS if name.endswith(("mp4", "MOV")) and name not in phone_clips.BROKEN]
)
def test_videos_of_a_phone_give_the_frames_that_the_trainer_reads_of_them(phone: Path, tmp_path: Path, name: str) -> None:
    found = looked(phone / name, detector="none")
    (shot,) = found.shots
    clip_files.write(phone / name, found.media, shot, tmp_path / "clip.mp4", GOOD)
    assert psnr(shown(tmp_path / "clip.mp4"), shown(phone / name)) > 35


@pytest.fixture(scope="module")
def phone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return phone_clips.make(tmp_path_factory.mktemp("phone"))
