"""Laws of cuts: scenes begin where PySceneDetect's begin, in PTS, whatever the video; and near scores never change a cut."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import raw_videos as raw
from proofs import Proof

from opensora.dataset.prepare_config import Cut, Limits
from opensora.dataset.rows import Looked
from opensora.prepare import cuts
from opensora.prepare.look import look
from opensora.prepare.probe import probe


def looked(path: Path, **settings: object) -> Looked:
    return look(path, probe(path, Limits()), Cut.model_validate({"min_s": 0, "max_s": 1000, **settings}))


def cuts_of(path: Path, **settings: object) -> list[int]:
    """PTS after the first frame."""
    found = looked(path, **settings)
    return [shot.start_pts - found.media.start_pts for shot in found.shots][1:]


@pytest.mark.long
@pytest.mark.parametrize("detector", ["content", "adaptive"])
def test_the_cuts_of_a_film_are_known(detector: str) -> None:
    film = raw.package_film("bikes.mp4")
    assert looked(film, detector=detector).cuts == (30, 76, 137, 187, 242)
    assert cuts_of(film, detector=detector) == raw.peer_cuts(film, detector)


@pytest.mark.long
@pytest.mark.parametrize("near", [0, 10**9])
def test_a_film_of_one_shot_has_no_cut(monkeypatch: pytest.MonkeyPatch, near: int) -> None:
    monkeypatch.setattr(cuts, "NEAR_FROM", near)
    film = raw.package_film("bigbuckbunny.mp4")
    assert looked(film).cuts == ()
    assert raw.peer_cuts(film) == []


@pytest.mark.long
@pytest.mark.parametrize("near", [0, 10**9])
@pytest.mark.parametrize("seed", (0, 2))
def test_cuts_are_pyscenedetects(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int, near: int) -> None:
    """Near scores are forced for small pictures too."""
    monkeypatch.setattr(cuts, "NEAR_FROM", near)
    film = raw.written(tmp_path / "film.mp4", raw.any_video(seed))
    found = [cuts_of(film, detector=detector) for detector in raw.PEERS]
    assert found == [raw.peer_cuts(film, detector) for detector in raw.PEERS]
    assert any(found)


@pytest.mark.prove("cuts")
@pytest.mark.timeout(3000)
def test_cuts_are_pyscenedetects_in_many_videos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, proof: Proof) -> None:
    for seed in range(1000 + 40 * proof.seed, 1040 + 40 * proof.seed):
        frames = raw.any_video(seed)
        times = raw.uneven_times(len(frames), seed) if seed % 2 else None
        film = raw.written(tmp_path / f"{seed}.mp4", frames, times=times)
        for near in (0, 10**9):
            monkeypatch.setattr(cuts, "NEAR_FROM", near)
            for detector in raw.PEERS:
                assert cuts_of(film, detector=detector) == raw.peer_cuts(film, detector), f"seed {seed}, near from {near}, {detector}"
        film.unlink()
        proof.count()


@pytest.mark.parametrize("kind", ["mp4", "mkv"])
@pytest.mark.parametrize("detector", ["content", "adaptive"])
def test_cuts_are_pyscenedetects_where_frames_last_differently(tmp_path: Path, kind: str, detector: str) -> None:
    frames = raw.any_video(11)
    film = raw.written(tmp_path / f"film.{kind}", frames, times=raw.uneven_times(len(frames)))
    found = looked(film, detector=detector)
    assert found.media.variable
    assert cuts_of(film, detector=detector) == raw.peer_cuts(film, detector)
    assert len(found.cuts) >= 2


@pytest.mark.parametrize(
    ("tags", "name"),
    [((1, 1), "yuv420p"), ((1, 2), "yuvj420p"), ((6, 1), "yuv444p"), ((9, 1), "yuv420p"), ((2, 0), "yuv422p")],
)  # matrix and range, as FFmpeg numbers them
def test_near_scores_take_colours_as_they_are_tagged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tags: tuple[int, int], name: str
) -> None:
    """Two scenes of the same luma: their colours alone differ, by a little more than the threshold."""
    monkeypatch.setattr(cuts, "NEAR_FROM", 0)

    def tag(stream: object) -> None:
        stream.codec_context.colorspace, stream.codec_context.color_range = tags  # type: ignore[attr-defined]

    frames = []
    for level in (60, 92, 124, 156):
        scene = np.full((180, 320, 3), (120, 120, level), np.uint8)
        scene[:, ::2] = (level, 40, 90)
        frames += raw.moving(scene, 20, 1)
    film = raw.written(tmp_path / "film.mp4", frames, pix_fmt=name, setup=tag)
    for threshold in (9.0, 12.0, 15.0):
        assert cuts_of(film, threshold=threshold) == _peer_cuts_above(film, threshold)


def _peer_cuts_above(film: Path, threshold: float) -> list[int]:
    from scenedetect import ContentDetector, SceneManager
    from scenedetect.backends.pyav import VideoStreamAv

    manager = SceneManager()
    manager.add_detector(ContentDetector(threshold=threshold))
    manager.detect_scenes(VideoStreamAv(str(film), threading_mode="NONE"))
    return [start.pts for start, _ in manager.get_scene_list()][1:]


@pytest.mark.parametrize("shortest", [1, 5, 40])
def test_the_shortest_scene_is_pyscenedetects(tmp_path: Path, shortest: int) -> None:
    from scenedetect import ContentDetector, SceneManager
    from scenedetect.backends.pyav import VideoStreamAv

    frames = [each for seed, count in enumerate((20, 4, 4, 30, 10, 50, 3, 45, 12)) for each in raw.moving(raw.texture(seed), count)]
    film = raw.written(tmp_path / "film.mp4", frames)
    manager = SceneManager()
    manager.add_detector(ContentDetector(min_scene_len=shortest))
    manager.detect_scenes(VideoStreamAv(str(film), threading_mode="NONE"))
    expected = [start.pts for start, _ in manager.get_scene_list()][1:]
    assert cuts_of(film, min_scene_frames=shortest) == expected
    assert expected


def test_a_flash_makes_no_scene_of_its_own(tmp_path: Path) -> None:
    scenes = [raw.moving(raw.texture(1), 30), raw.flashed(raw.moving(raw.texture(2), 60), 30, 2)]
    film = raw.written(tmp_path / "film.mp4", [frame for scene in scenes for frame in scene])
    assert looked(film).cuts[0] == 30
    assert cuts_of(film) == raw.peer_cuts(film)


def test_without_a_detector_a_video_is_one_scene(tmp_path: Path) -> None:
    film = raw.written(tmp_path / "film.mp4", raw.moving(raw.texture(1), 20) + raw.moving(raw.texture(2), 20))
    found = looked(film, detector="none")
    assert found.cuts == ()
    assert [shot.frames for shot in found.shots] == [40]
