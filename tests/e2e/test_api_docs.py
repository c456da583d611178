"""The code of docs/api.md and of docs/examples, executed on a small recipe of real training."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import raw_videos
from tiny_recipe import Osctl, warm_trainer, write

pytestmark = pytest.mark.long

DOCS = Path(__file__).parents[2] / "docs"
CHANGES = {"steps": 6, "batch_size": 1, "checkpoint": {"every_steps": 2}}


def run(folder: Path, *words: str) -> str:
    done = subprocess.run(
        [sys.executable, *words], cwd=folder, env=Osctl(folder).environment(), capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_page_on_the_api_does_what_it_says(tmp_path: Path) -> None:
    write(tmp_path / "my-model", devices=1, stages=2, changes=CHANGES, trainer=warm_trainer())
    (tmp_path / "videos").mkdir()
    shutil.copyfile(raw_videos.package_film("bikes.mp4"), tmp_path / "videos/bikes.mp4")
    (tmp_path / "videos/bikes.txt").write_text("bikes in a city")
    code = "\n".join(re.findall(r"```python\n(.*?)```", (DOCS / "api.md").read_text(), re.DOTALL))
    assert "launch(" in code and "compare(" in code
    said = run(tmp_path, "-c", code)
    assert "dollars are expected" in said and "running ['stage1 " in said and "succeeded ['stage1 4/4', 'stage2 6/6']" in said
    assert "5 clips, 9.7 s, $0.0" in said and "filter 6 5 ['shorter than cut.min_s: 1']" in said


def test_the_example_trains_and_draws(tmp_path: Path) -> None:
    write(tmp_path, devices=1, stages=2, changes=CHANGES, trainer=warm_trainer())
    said = run(tmp_path, str(DOCS / "examples/loss_over_dollars.py"), "--set", "stage1.steps=4")
    assert "stage1: loss" in said and "after 4 steps" in said and "drew loss-over-dollars.png" in said
    assert (tmp_path / "loss-over-dollars.png").read_bytes().startswith(b"\x89PNG")
    assert run(tmp_path, str(DOCS / "examples/loss_over_dollars.py"), "--set", "stage1.steps=4", "--out", "again.svg")
    assert "<svg" in (tmp_path / "again.svg").read_text()
