"""What a person's own runs took, as a plan shows it beside what was measured here."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from stand_in_prepare import MEDIA, keep_row

from opensora.dataset.rows import ClipFile, Drop
from orchestrator.prepare.own_rates import measured

FRAMES_720 = ClipFile("a.mp4", "ab" * 32, 10, 250, 1280, 720, 25.0)


def run(folder: Path, cpu_s: float) -> Path:
    """It looked at 40 s of 720p25 and cut out 20 s of it, in twice as many CPU-seconds for the clips."""
    folder.mkdir(parents=True)
    steps = {"frames": {"cpu_s": cpu_s}, "clips": {"cpu_s": 2 * cpu_s}}
    (folder / "status.json").write_text(json.dumps({"steps": steps}))
    for key in ("1" * 20, "2" * 20):
        keep_row(folder, "probe", "p" * 16, key, replace(MEDIA, width=1280, height=720, fps=25.0, end_pts=160))
        keep_row(folder, "clips", "c" * 16, key, FRAMES_720)
    return folder


def test_rates_count_pixels_so_that_videos_of_each_size_tell_the_same(tmp_path: Path) -> None:
    run(tmp_path / "hd" / "one", 40.0)
    found = measured(tmp_path / "hd")
    assert (found.look, found.cut_out, found.runs) == (pytest.approx(1.0), pytest.approx(4.0), 2)
    large = run(tmp_path / "4k" / "one", 40.0)
    for key in ("1" * 20, "2" * 20):
        for step in ("probe/" + "p" * 16, "clips/" + "c" * 16):
            (large / f"kept/{step}/{key[:2]}/{key}.json").unlink()
        keep_row(large, "probe", "p" * 16, key, replace(MEDIA, width=2560, height=1440, fps=25.0, end_pts=160))
        keep_row(large, "clips", "c" * 16, key, replace(FRAMES_720, width=2560, height=1440))
    found = measured(tmp_path / "4k")
    assert (found.look, found.cut_out) == (pytest.approx(0.25), pytest.approx(1.0)), "a quarter for each of four times as many pixels"


def test_short_runs_and_what_left_count_nothing(tmp_path: Path) -> None:
    run(tmp_path / "one", 1.0)
    assert measured(tmp_path) == measured(tmp_path / "nowhere")
    folder = run(tmp_path / "two", 40.0)
    left = Drop("too short", "")
    path = folder / ("kept/clips/" + "c" * 16) / "33" / ("3" * 20 + ".json")
    path.parent.mkdir()
    path.write_text(json.dumps({"drop": {"reason": left.reason, "detail": left.detail}}))
    assert measured(tmp_path).cut_out == pytest.approx(4.0)
