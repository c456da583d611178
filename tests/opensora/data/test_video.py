"""Laws of decoding: what a player shows of a file is what the model sees, and one file's fault costs one clip.

Files are made here as cameras and editors make them; what is expected is known by construction, or from Pillow.
"""

from __future__ import annotations

import base64
import os
import resource
import socket
import struct
import zlib
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import av.filter
import fsspec
import hand_made_videos as made
import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from opensora.config import Bucket, DataConfig, FolderSource, ManifestSource
from opensora.data.folder import FileClips
from opensora.errors import DataError

ORIENTATIONS = range(1, 9)
AS_SHOWN = {1: "RGBW", 2: "GRWB", 3: "WBGR", 4: "BWRG", 5: "RBGW", 6: "BRWG", 7: "WGBR", 8: "GWRB"}
"""`quadrants` in each orientation of EXIF: 6 is a phone held upright."""


def config(folder: Path, frames: int = 1, height: int = 64, width: int = 96, **more: Any) -> DataConfig:
    source = FolderSource(kind="folder", path=str(folder))
    return DataConfig(source=source, frames=frames, height=height, width=width, **more)


def listed(folder: Path, *names: str) -> Path:
    """`captions.csv` of these files, or of all that are there."""
    found = names or sorted(path.name for path in folder.iterdir() if path.name != "captions.csv")
    (folder / "captions.csv").write_text("path,text\n" + "".join(f"{name},a clip {number}\n" for number, name in enumerate(found)))
    return folder


def seen(folder: Path, *args: Any, **more: Any) -> torch.Tensor:
    """Clips of the only bucket; none may be left out."""
    clips = FileClips(config(folder, *args, **more))
    read, indices = clips.read(0, len(clips))
    assert (len(indices), dict(clips.skipped)) == (len(clips), {})
    return read


# --- How it lies on the screen ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_a_film_is_turned_and_mirrored_as_its_display_matrix_says(tmp_path: Path, orientation: int) -> None:
    made.turn(made.write(tmp_path / "film.mp4", [made.quadrants()] * 4), orientation)
    height, width = (96, 64) if orientation > 4 else (64, 96)
    for frame in seen(listed(tmp_path), 4, height, width)[0]:
        assert made.corners(frame) == AS_SHOWN[orientation]


@pytest.mark.parametrize("kind", ["jpg", "png", "webp", "tiff", "avif"])
def test_a_picture_is_turned_and_mirrored_as_its_exif_says(tmp_path: Path, kind: str) -> None:
    for orientation in ORIENTATIONS:
        exif = Image.Exif()
        exif[0x0112] = orientation
        Image.fromarray(made.quadrants()).save(tmp_path / f"{orientation}.{kind}", exif=exif)
    listed(tmp_path)
    for number, picture in enumerate(seen(tmp_path, 1, 64, 64)):
        path = tmp_path / f"{number + 1}.{kind}"
        with Image.open(path) as stored:
            assert made.corners(picture[0]) == made.corners(ImageOps.exif_transpose(stored).convert("RGB")) == AS_SHOWN[number + 1], (
                path.name
            )


@pytest.mark.parametrize("orientation", [1, 6])
def test_what_a_player_shows_chooses_the_bucket(tmp_path: Path, orientation: int) -> None:
    """A film by its matrix, a picture by its EXIF, a stretched film by its pixels."""
    made.turn(made.write(tmp_path / "film.mp4", [made.quadrants()] * 4), orientation)
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(made.quadrants()).save(tmp_path / "still.jpg", exif=exif)
    stretched = made.write(tmp_path / "wide.mp4", [made.quadrants(96, 64)] * 4, setup=aspect(9, 4))  # 96x144
    made.turn(stretched, orientation)
    lying, standing = ({"frames": 1, "height": height, "width": width, "batch_size": 1} for height, width in ((64, 96), (96, 64)))
    clips = FileClips(config(listed(tmp_path), buckets=(Bucket(**lying), Bucket(**standing))))
    assert clips.counts == ((3, 0) if orientation == 1 else (0, 3))


def aspect(width: int, height: int) -> Callable[[Any], None]:
    def set_on(stream: Any) -> None:
        stream.codec_context.sample_aspect_ratio = Fraction(width, height)

    return set_on


@pytest.mark.parametrize("name", ["film.mp4", "film.mkv", "film.avi", "turned.mp4"])
def test_a_circle_stays_a_circle(tmp_path: Path, name: str) -> None:
    """Pixels that are twice as wide as high: DVDs, broadcasts, HDV."""
    rows, columns = np.mgrid[0:120, 0:80]
    circle = np.full((120, 80, 3), 10, np.uint8)
    circle[((columns - 40) * 2) ** 2 + (rows - 60) ** 2 < 45**2] = 240
    codec = "mpeg4" if name.endswith("avi") else "libx264"
    path = made.write(tmp_path / name, [circle] * 4, setup=aspect(2, 1), codec=codec, options={})
    if name == "turned.mp4":
        made.turn(path, 6)
    disc = seen(listed(tmp_path), 1, 60, 60)[0, 0, :, :, 0] > 120
    assert abs(int(disc.any(0).sum()) - int(disc.any(1).sum())) <= 2
    assert int(disc.any(0).sum()) in range(43, 48)  # 90 of the 120 rows


# --- What is shown of it ----------------------------------------------------------------------------------------------------------------


def test_what_an_edit_list_leaves_out_is_not_shown_and_not_counted(tmp_path: Path) -> None:
    whole = made.write(tmp_path / "whole.mp4", [made.clock(number / 24, 320) for number in range(96)], options={"crf": "5", "g": "48"})
    made.trimmed(whole, tmp_path / "cut.mp4", 1.3)
    listed(tmp_path, "cut.mp4")
    assert made.time_on(seen(tmp_path, 1, 32, 320)[0, 0]) == pytest.approx(32 / 24, abs=0.02)
    sizes = [{"frames": frames, "height": 32, "width": 320, "batch_size": 1} for frames in (64, 65)]
    assert FileClips(config(tmp_path, buckets=tuple(Bucket(**size) for size in sizes))).counts == (1, 0)
    for fps, frames in ((6, 16), (24, 64)):  # 64 frames of 24 a second are shown
        sizes = [{"frames": count, "height": 32, "width": 320, "batch_size": 1} for count in (frames, frames + 1)]
        clips = FileClips(config(tmp_path, buckets=tuple(Bucket(**size) for size in sizes), fps=fps))
        assert (clips.counts, len(clips.read(0, 1)[0])) == ((1, 0), 1)


def test_a_cover_picture_is_no_film(tmp_path: Path) -> None:
    cover = np.full((64, 64, 3), made.RED, np.uint8)
    made.with_cover(tmp_path / "film.mp4", cover, [made.quadrants()] * 4)
    made.with_cover(tmp_path / "song.mp3", cover, [])
    clips = FileClips(config(listed(tmp_path)))
    read, indices = clips.read(0, 2)
    assert (indices, made.corners(read[0, 0])) == ([0], "RGBW")
    assert dict(clips.skipped) == {"song.mp3": "no video stream, only a cover picture"}


TILES = zlib.decompress(base64.b85decode(
    rb"c-muNU{FXasVqn=%S>Yc0uY^>nP!-qnV9D5Xz0km!1ypXwIq=N0yHvGa*CjAhJwuG5(XrYlbHlFhOZ#ABo{2m2*hETIr+&Tjtc_=D_8`GnK*$o"
    rb"2Llt7CkUif8JM9wGa#+Pzyjq(f#q1Cym}xl3&ayLGxNZffn}tCoKz;Ljp;?1DbD#h`CzBQWEeqqC6*Z&Vv%9SDZ_$Oh80alA+sno4H^_8DVe$H"
    rb"VBJhWvsu6{oS9irQ~;#oGYgXQL25FK3sRx#8=zRAAhRM9B*4tU!2zU%lk;<m@{)5ZfM)SBur;7*bAV!=#4<zYMg_2#QD#9dEV_V!&CJNe%)rFL"
    rb"!qm#lzzm^SAQUTvVqln^o015ONJd7W6B>jVxHv6D>;JZ}m`FJoiHSL|NhG!~Y-xTKX3HhEbi-kZIW;^9sES14irxiZRK9Y|aW&`FcN=gS^zz2O"
    rb"o9fQZH$;zS96_^<53VR`{+@Pr0E)YP#Q"
))  # fmt: skip
"""Four coloured tiles of 64x64, by `avifenc --grid 2x2`: phones write their HEIC pictures so."""


def test_one_tile_of_a_picture_is_not_taken_for_it(tmp_path: Path) -> None:
    (tmp_path / "tiles.avif").write_bytes(TILES)
    clips = FileClips(config(listed(tmp_path)))
    assert clips.read(0, 1)[1] == []
    assert clips.skipped["tiles.avif"] == "a picture made of tiles (HEIF), which osctl does not read. Save it as JPEG"


def test_a_picture_with_a_second_one_behind_it_is_no_film(tmp_path: Path) -> None:
    """Phones put a map of depth or of light into a photo."""
    photo, depth = Image.fromarray(made.quadrants()), Image.new("RGB", (96, 64), made.BLUE)
    photo.save(tmp_path / "photo.jpg", format="MPO", save_all=True, append_images=[depth])
    buckets = tuple(Bucket(frames=frames, height=64, width=96, batch_size=1) for frames in (2, 1))
    clips = FileClips(config(listed(tmp_path), buckets=buckets))
    assert clips.counts == (0, 1)
    assert made.corners(clips.read(0, 1, 1)[0][0, 0]) == "RGBW"


def test_of_several_films_the_default_one_is_shown(tmp_path: Path) -> None:
    with av.open(str(tmp_path / "film.mkv"), "w") as out:
        streams: list[Any] = [out.add_stream("libx264", rate=24) for _ in range(2)]
        for stream in streams:
            stream.height, stream.width, stream.pix_fmt = 64, 96, "yuv420p"
        streams[0].disposition, streams[1].disposition = av.stream.Disposition(0), av.stream.Disposition.default
        for stream, picture in zip(streams, (made.quadrants()[::-1], made.quadrants()), strict=True):
            for packet in [*stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")), *stream.encode()]:
                out.mux(packet)
    assert made.corners(seen(listed(tmp_path))[0, 0]) == "RGBW"


def test_of_interlaced_frames_one_moment_is_shown_and_that_is_said(tmp_path: Path) -> None:
    moments = [made.clock(number / 16) for number in range(16)]
    woven = []
    for first, second in zip(moments[::2], moments[1::2], strict=True):
        woven.append(first.copy())
        woven[-1][1::2] = second[1::2]

    def interlaced(stream: Any) -> None:
        stream.codec_context.flags |= 0x20040000  # ildct, ilme

    made.write(tmp_path / "tape.mpg", woven, 25, codec="mpeg2video", options={"qmin": "1", "q": "1"}, setup=interlaced)
    clips = FileClips(config(listed(tmp_path), 8, 32, 64))
    read, _ = clips.read(0, 1)
    combed = (read[0, :, 1:].int() - read[0, :, :-1].int()).abs().amax(dim=(2, 3)) > 60
    assert combed.sum() == 0
    assert [round(made.time_on(frame) * 16) for frame in read[0]] == [0, 2, 4, 6, 8, 10, 12, 14]
    assert list(clips.remarks) == ["tape.mpg is interlaced: one field of each frame is used, which halves its rows"]


# --- Colours ----------------------------------------------------------------------------------------------------------------------------


GREEN = (30, 180, 60)


def planes(rgb: tuple[int, int, int], kr: float, kb: float, *, full: bool, height: int, width: int) -> np.ndarray:
    """yuv420p of one colour, by the definition of a matrix."""
    red, green, blue = (value / 255 for value in rgb)
    luma = kr * red + (1 - kr - kb) * green + kb * blue
    chroma = (blue - luma) / 2 / (1 - kb), (red - luma) / 2 / (1 - kr)
    codes = [255 * luma, *(255 * each + 128 for each in chroma)] if full else [219 * luma + 16, *(224 * each + 128 for each in chroma)]
    parts = [np.full((rows, width), round(code), np.uint8) for rows, code in zip((height, height // 4, height // 4), codes, strict=True)]
    return np.concatenate(parts)


@pytest.mark.parametrize(
    ("kr", "kb", "space", "full", "height"),
    [
        (0.299, 0.114, 5, False, 64),
        (0.2126, 0.0722, 1, False, 64),
        (0.2126, 0.0722, 1, True, 64),
        (0.2627, 0.0593, 9, False, 64),
        (0.299, 0.114, 2, False, 576),
        (0.2126, 0.0722, 2, False, 720),
    ],
    ids=["601", "709", "709 full", "2020", "untagged", "untagged HD"],
)
def test_colours_are_those_of_the_file(tmp_path: Path, kr: float, kb: float, space: int, full: bool, height: int) -> None:
    with av.open(str(tmp_path / "film.mp4"), "w") as out:
        stream: Any = out.add_stream("libx264", rate=24, options={"crf": "1", "preset": "ultrafast"})
        stream.height, stream.width, stream.pix_fmt = height, 64, "yuv420p"
        stream.codec_context.colorspace, stream.codec_context.color_range = space, 2 if full else 1
        frame = av.VideoFrame.from_ndarray(planes(GREEN, kr, kb, full=full, height=height, width=64), format="yuv420p")
        frame.colorspace, frame.color_range = space, 2 if full else 1
        for packet in [*stream.encode(frame), *stream.encode()]:
            out.mux(packet)
    pixel = seen(listed(tmp_path), 1, 16, 16)[0, 0, 8, 8].int()
    assert (pixel - torch.tensor(GREEN)).abs().max() <= 3


def test_pictures_of_every_depth_come_as_pillow_reads_them(tmp_path: Path) -> None:
    ramp = np.linspace(0, 255, 96).astype(np.uint8)[None].repeat(64, 0)
    colours = np.dstack([ramp, ramp[:, ::-1], ramp // 2])
    Image.fromarray(ramp).save(tmp_path / "grey.png")
    Image.fromarray(ramp.astype(np.uint16) * 257).save(tmp_path / "grey16.png")
    Image.fromarray(colours).quantize(64).save(tmp_path / "palette.png")
    Image.fromarray(colours).save(tmp_path / "colours.webp", lossless=True)
    Image.fromarray(ramp > 99).save(tmp_path / "two.png")
    Image.fromarray(colours).convert("CMYK").save(tmp_path / "print.jpg", quality=100, subsampling=0)
    Image.fromarray(np.dstack([ramp, 255 - ramp // 4])).save(tmp_path / "grey_alpha.png")
    expected = []
    for path in sorted(tmp_path.iterdir()):
        with Image.open(path) as picture:
            if path.name == "grey16.png":
                expected.append(np.dstack([ramp] * 3))
            else:
                on_white = Image.new("RGBA", picture.size, "white")
                on_white.alpha_composite(picture.convert("RGBA"))
                expected.append(np.asarray(on_white.convert("RGB")))
    for path, own, other in zip(sorted(tmp_path.iterdir()), seen(listed(tmp_path)), expected, strict=True):
        assert np.abs(own[0].numpy().astype(int) - other).max() <= 3, path.name


HIDDEN_RED = np.zeros((64, 64, 4), np.uint8)
HIDDEN_RED[..., 0] = 255
HIDDEN_RED[16:48, 16:48] = (0, 0, 255, 255)


@pytest.mark.parametrize("name", ["a.png", "a.webp", "a.mov", "a.webm", "a.gif", "vp8.webm"])
def test_what_is_transparent_lies_on_white_and_not_on_its_hidden_colour(tmp_path: Path, name: str) -> None:
    """A blue square, around it red that is wholly transparent."""
    path = tmp_path / name
    if name.endswith((".png", ".webp", ".gif")):
        Image.fromarray(HIDDEN_RED).save(path, **({"lossless": True, "exact": True} if name == "a.webp" else {}))
    else:
        codec, pix_fmt = {"a.mov": ("qtrle", "argb"), "a.webm": ("libvpx-vp9", "yuva420p"), "vp8.webm": ("libvpx", "yuva420p")}[name]
        options = {"auto-alt-ref": "0"} if name == "vp8.webm" else {}
        made.write(path, [HIDDEN_RED] * 3, codec=codec, pix_fmt=pix_fmt, source="rgba", options=options)
    for size in (64, 24):
        frame = seen(listed(tmp_path), 1, size, size)[0, 0].int()
        assert frame[2, 2].tolist() == pytest.approx([255, 255, 255], abs=4)
        assert frame[size // 2, size // 2].tolist() == pytest.approx([0, 0, 255], abs=12)
        edge = frame[size // 4 - 1 : size // 4 + 2, size // 2]  # between white and blue, never red
        assert bool((edge[:, 0] <= edge[:, 2] + 6).all())


# --- Frames by time ---------------------------------------------------------------------------------------------------------------------

VARIES = [0, 0.01, 0.02, 0.03, 0.25, 0.5, 0.75, 0.99]


@pytest.fixture
def rates(tmp_path: Path) -> Path:
    """The same second at 12, 24 and 60 frames, in several containers, and one whose rate varies."""
    for rate, kind in ((12, "mp4"), (24, "mkv"), (60, "mp4"), (60, "webm"), (24, "avi")):
        codec = {"webm": "libvpx-vp9", "avi": "mpeg4"}.get(kind, "libx264")
        options = {"lossless": "1"} if kind == "webm" else {"qmin": "1", "q": "1"} if kind == "avi" else None
        made.write(tmp_path / f"{rate}.{kind}", [made.clock(number / rate) for number in range(rate)], rate, codec=codec, options=options)
    made.write(tmp_path / "varies.mp4", [made.clock(time) for time in VARIES], times=VARIES, options={"crf": "5", "bf": "0"})
    return listed(tmp_path, "12.mp4", "24.mkv", "60.mp4", "60.webm", "24.avi", "varies.mp4")


def test_clips_by_time_show_the_same_moments_whatever_the_rate(rates: Path) -> None:
    *steady, varies = seen(rates, 6, 32, 64, fps=6)
    for clip in steady:
        assert [made.time_on(frame) for frame in clip] == pytest.approx([number / 6 for number in range(6)], abs=0.02)
    shown = [max(time for time in VARIES if time <= number / 6) for number in range(6)]
    assert [made.time_on(frame) for frame in varies] == pytest.approx(shown, abs=0.02)


def by_fps_filter(path: Path, fps: int) -> list[float]:
    """The moments on the frames that FFmpeg's own filter takes, which has no slack: of several until an instant the last."""
    found: list[float] = []
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        graph = av.filter.Graph()
        graph.link_nodes(graph.add_buffer(template=stream), graph.add("fps", f"fps={fps}:round=up"), graph.add("buffersink")).configure()
        for frame in [*container.decode(stream), None]:
            graph.push(frame)
            while True:
                try:
                    found.append(made.time_on(graph.pull().to_ndarray(format="rgb24")))
                except (BlockingIOError, EOFError):
                    break
    return found


@pytest.mark.parametrize("fps", [5, 7, 10, 20])
def test_frames_by_time_are_those_of_ffmpegs_fps_filter(rates: Path, fps: int) -> None:
    for name in ("12.mp4", "24.mkv", "60.mp4", "60.webm", "varies.mp4"):
        theirs = by_fps_filter(rates / name, fps)
        (rates / "captions.csv").write_text(f"path,text\n{name},a clip\n")
        own = seen(rates, len(theirs), 32, 64, fps=fps)[0]
        assert [made.time_on(frame) for frame in own] == pytest.approx(theirs, abs=0.02), name
        short = FileClips(config(rates, len(theirs) + 1, 32, 64, fps=fps))
        assert short.read(0, 1)[1] == [], name


@pytest.mark.parametrize("fps", [12, 24, 23.976])
def test_a_rate_that_is_the_files_own_takes_every_frame_once(tmp_path: Path, fps: float) -> None:
    """Times in mkv are rounded to milliseconds, and 29.97 is called 30: neither doubles a frame nor drops one."""
    for kind in ("mp4", "mkv"):
        made.write(tmp_path / f"film.{kind}", [made.clock(number / 24) for number in range(22)], Fraction(fps).limit_denominator(1001))
    for clip in seen(listed(tmp_path), 22, 32, 64, fps=fps):
        assert [made.time_on(frame) for frame in clip] == pytest.approx([number / 24 for number in range(22)], abs=0.02)


def test_a_film_that_is_too_short_at_a_rate_says_both_lengths(rates: Path) -> None:
    clips = FileClips(config(rates, 8, 32, 64, fps=6))
    assert clips.read(0, 6)[1] == []
    assert clips.skipped["12.mp4"] == "6 frames at 6 fps (1.00 s), 8 are needed (1.33 s)"
    assert set(clips.skipped) == set(clips._paths)


def test_buckets_are_filled_by_time(rates: Path) -> None:
    """At 6 fps a second gives 6 frames of every file, at 15 fps 15, at which one bucket is filled and the other is not."""
    buckets = tuple(Bucket(frames=frames, height=32, width=64, batch_size=1) for frames in (6, 15))
    assert FileClips(config(rates, buckets=buckets, fps=6)).counts == (6, 0)
    assert FileClips(config(rates, buckets=buckets, fps=15)).counts == (0, 6)
    clips = FileClips(config(rates, buckets=(buckets[1], buckets[1].model_copy(update={"frames": 9})), fps=6))
    assert clips.counts == (0, 0)
    assert clips.skipped["60.webm"] == "6 frames at 6 fps (1.00 s), 9 are needed (1.50 s)"


def test_mixed_rates_are_said_where_frames_are_counted(rates: Path) -> None:
    clips = FileClips(config(rates, 6, 32, 64))
    assert list(clips.remarks) == []
    clips.read(0, 6)
    assert len(clips.remarks) == 1
    assert "6 frames in 0.08 s (60.webm) to 6 frames in 0.50 s (varies.mp4)" in clips.remarks[0]
    assert clips.remarks[0].endswith("`osctl launch --set STAGE.data.fps=24`")
    every_other = FileClips(config(rates, 3, 32, 64, frame_interval=2))
    every_other.read(0, 6)
    assert every_other.remarks[0].endswith("`osctl launch --set STAGE.data.fps=12 --set STAGE.data.frame_interval=1`")
    by_time = FileClips(config(rates, 6, 32, 64, fps=6))
    by_time.read(0, 6)
    assert list(by_time.remarks) == []


def test_the_digest_counts_the_rate(rates: Path) -> None:
    assert len({FileClips(config(rates, fps=fps)).digest for fps in (None, 6, 12)}) == 3


# --- What cannot be used ----------------------------------------------------------------------------------------------------------------


def test_a_strip_is_cut_before_it_is_resized(tmp_path: Path) -> None:
    """1500x1 pixels cover a square of 256 rows when they are 384,000 columns wide: 4 GB."""
    Image.fromarray(np.full((1, 1500, 3), 90, np.uint8)).save(tmp_path / "lying.png")
    Image.fromarray(np.full((1500, 1, 3), 90, np.uint8)).save(tmp_path / "standing.png")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    read = seen(listed(tmp_path), 1, 256, 256)
    assert read.shape == (2, 1, 256, 256, 3)
    assert (read == 90).all()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 << 10  # KiB


def bomb(path: Path, side: int) -> None:
    """A black picture of side x side pixels in some KB."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    deflated, row = zlib.compressobj(9), bytes(1 + side // 8)
    pixels = b"".join(deflated.compress(row) for _ in range(side)) + deflated.flush()
    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b""))


def test_a_picture_that_would_fill_the_memory_is_left_out(tmp_path: Path) -> None:
    bomb(tmp_path / "bomb.png", 16_000)
    made.write(tmp_path / "film.mp4", [made.quadrants()] * 2)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    clips = FileClips(config(listed(tmp_path)))
    assert clips.read(0, 2)[1] == [1]
    assert "67,108,864" in clips.skipped["bomb.png"] or "cannot be decoded" in clips.skipped["bomb.png"]
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 << 10


@pytest.mark.timeout(60)
def test_only_regular_files_are_opened_and_each_other_says_what_it_is(tmp_path: Path) -> None:
    """A pipe, that nobody writes into, would be waited for for ever; a device never ends."""
    folder = tmp_path / "clips"
    made.write(folder / "film.mp4", [made.quadrants()] * 2)
    os.mkfifo(folder / "pipe.mp4")
    (folder / "folder.mp4").mkdir()
    (folder / "loop.mp4").symlink_to("loop.mp4")
    (folder / "dangling.mp4").symlink_to("nowhere")
    (folder / "device.mp4").symlink_to("/dev/zero")
    (folder / "empty.mp4").touch()
    with socket.socket(socket.AF_UNIX) as end:
        end.bind(str(folder / "s.mp4"))
        names = [
            "film.mp4",
            "pipe.mp4",
            "folder.mp4",
            "loop.mp4",
            "dangling.mp4",
            "device.mp4",
            "empty.mp4",
            "s.mp4",
            "film.mp4/x",
            "n" * 300,
        ]
        listed(folder, *names)
        for buckets in ((), tuple(Bucket(frames=1, height=side, width=side, batch_size=1) for side in (32, 64))):
            clips = FileClips(config(folder, buckets=buckets))
            read = [index for bucket in range(len(clips.counts)) for index in clips.read(0, len(names), bucket)[1]]
            assert read == [0]
            assert dict(clips.skipped) == {
                "pipe.mp4": "a pipe, not a regular file",
                "folder.mp4": "a folder, not a regular file",
                "loop.mp4": "Too many levels of symbolic links",
                "dangling.mp4": "No such file or directory",
                "device.mp4": "a device, not a regular file",
                "empty.mp4": "the file is empty",
                "s.mp4": "a socket, not a regular file",
                "film.mp4/x": "Not a directory",
                "n" * 300: "File name too long",
            }


@pytest.mark.parametrize("kind", ["mp4", "mkv", "avi", "gif", "png", "jpg"])
def test_whatever_is_damaged_costs_its_clip_alone(tmp_path: Path, kind: str) -> None:
    """Damaged files made PyAV raise ValueError, OSError and MemoryError beside FFmpeg's own errors."""
    whole = tmp_path / f"whole.{kind}"
    if kind in ("png", "jpg"):
        Image.fromarray(made.quadrants()).save(whole)
    else:
        codec, pix_fmt = {"avi": ("mpeg4", "yuv420p"), "gif": ("gif", "rgb8")}.get(kind, ("libx264", "yuv420p"))
        made.write(whole, [made.quadrants()] * 8, codec=codec, pix_fmt=pix_fmt, options={})
    content, random = whole.read_bytes(), np.random.default_rng(1)
    for number in range(24):
        damaged = bytearray(content[: random.integers(1, len(content))] if number % 3 == 0 else content)
        for _ in range(random.integers(1, 20)):
            damaged[random.integers(min(len(damaged), int(random.choice((64, 600, len(damaged))))))] = random.integers(256)
        (tmp_path / f"{number}.{kind}").write_bytes(bytes(damaged))
    buckets = tuple(Bucket(frames=frames, height=16, width=16, batch_size=1) for frames in (1, 4))
    clips = FileClips(config(listed(tmp_path), buckets=buckets))
    read = [index for bucket in range(2) for index in clips.read(0, len(clips), bucket)[1]]
    assert len(read) + len(clips.skipped) == len(clips) == 25


@pytest.mark.parametrize(
    "error", [ValueError("no"), OSError("no"), MemoryError(), UnicodeDecodeError("utf-8", b"", 0, 1, "no"), KeyError("no")]
)
def test_any_exception_of_one_file_is_a_reason_with_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    for name in ("good.mp4", "bad.mp4"):
        made.write(tmp_path / name, [made.quadrants()] * 2)
    opened = av.open

    def failing(file: Any, *args: Any, **more: Any) -> Any:
        if file.name.endswith("bad.mp4"):
            raise error
        return opened(file, *args, **more)

    monkeypatch.setattr(av, "open", failing)
    clips = FileClips(config(listed(tmp_path)))
    assert clips.read(0, 2)[1] == [1]
    assert type(error).__name__ in clips.skipped["bad.mp4"]


def test_a_place_that_fails_for_a_moment_loses_no_clip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a bucket that cannot be reached now nothing is known: its clips are not left out, the stage ends and is tried again."""
    memory = fsspec.filesystem("memory")
    memory.pipe("/momentary/film.mp4", made.write(tmp_path / "film.mp4", [made.quadrants()] * 2).read_bytes())
    (tmp_path / "clips.csv").write_text("path,text\nmemory://momentary/film.mp4,a film\nmemory://momentary/gone.mp4,gone\n")
    source = ManifestSource(kind="manifest", path=str(tmp_path / "clips.csv"), clips=2)
    data = DataConfig(source=source, frames=1, height=64, width=96)
    clips = FileClips(data)
    assert (clips.read(0, 2)[1], list(clips.skipped)) == ([0], ["memory://momentary/gone.mp4"])

    def failing(self: Any, *args: Any) -> bytes:
        raise TimeoutError("no answer in 10 s")

    monkeypatch.setattr(type(memory.open("/momentary/film.mp4")), "read", failing)
    with pytest.raises(DataError, match=r"momentary/film\.mp4: cannot be read now \(TimeoutError: no answer in 10 s\)"):
        FileClips(data).read(0, 2)


SDP = "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video {port} RTP/AVP 96\na=rtpmap:96 H264/90000\n"
MPD = """<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static" profiles="urn:mpeg:dash:profile:isoff-on-demand:2011"
 mediaPresentationDuration="PT1S"><Period><AdaptationSet mimeType="video/mp4"><Representation id="1" bandwidth="1">
<BaseURL>real.mp4</BaseURL></Representation></AdaptationSet></Period></MPD>"""


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (SDP, "sdp"),
        ("ffconcat version 1.0\nfile real.mp4\n", "concat"),
        ("#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nreal.mp4\n#EXT-X-ENDLIST\n", "hls"),
        (MPD, "dash"),
    ],
    ids=["sdp", "concat", "hls", "dash"],
)
@pytest.mark.parametrize("buckets", [False, True], ids=["decoded", "probed"])
def test_a_file_that_names_others_opens_none_of_them_and_no_port(tmp_path: Path, content: str, kind: str, *, buckets: bool) -> None:
    made.write(tmp_path / "real.mp4", [made.quadrants()])
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as held:
        held.bind(("127.0.0.1", 0))
        (tmp_path / "list.mp4").write_text(content.format(port=held.getsockname()[1] & ~1) if kind == "sdp" else content)
    more = (
        {"buckets": (Bucket(frames=1, height=64, width=96, batch_size=1), Bucket(frames=1, height=96, width=64, batch_size=1))}
        if buckets
        else {}
    )
    clips = FileClips(config(listed(tmp_path, "real.mp4", "list.mp4"), **more))
    assert clips.read(0, clips.counts[0])[1] == [0]
    assert clips.skipped["list.mp4"] == f"a list of other files ({kind}), not a video. Give the video itself"
