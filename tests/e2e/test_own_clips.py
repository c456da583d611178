"""`osctl launch --data FOLDER`: a folder as it comes from a phone trains on the first try, and the terminal says what was left out and why.

test_prepare.py trains on clips of real films.
"""

from __future__ import annotations

from pathlib import Path

import av
import phone_clips
import pytest
from tiny_recipe import Osctl, warm_trainer, write

pytestmark = pytest.mark.long


def test_a_phones_folder_trains_on_the_first_try_and_what_is_left_out_is_said(tmp_path: Path) -> None:
    folder = phone_clips.make(tmp_path / "my phone" / "Bilder Größe M")
    changes = {"steps": 2, "batch_size": 2, "checkpoint": {"every_steps": 2}}
    osctl = Osctl(write(tmp_path / "run", devices=1, stages=2, changes=changes, trainer=warm_trainer()))
    said = osctl("launch", "--data", str(folder)).stderr
    assert "captions.csv, columns path and text, semicolons; 9 rows" in said
    assert "stage1: 2 of 9 clips are left out" in said and "kaputt.mp4" in said and "leer.mp4): the file is empty" in said
    assert "stage2: 3 of 9 clips are left out" in said and "IMG_0007.JPG): 1 frame, 4 are needed" in said
    assert "osctl launch --data " in said and "--set stage2.data.fps=30" in said, "films of 24, 30 and 60 frames a second"
    assert ".DS_Store" not in said

    stages = osctl.json("status")["stages"]
    assert any("`osctl resume --set stage2.data.fps=30`" in said for said in stages[1]["data"]["sentences"]), (
        "pasted, it is about these clips"
    )
    assert [(stage["state"], stage["data"]["clips_left_out"]) for stage in stages] == [("committed", 2), ("committed", 3)]

    log = osctl("logs", "stage2").stdout
    assert "6 of 4x16x16 pixels" in log and "3 left out" in log and "kaputt.mp4" in log

    by_time = ("--set", "stage2.data.fps=8")
    said = osctl("launch", "--data", str(folder), *by_time).stderr
    assert "different frame rates" not in said and "stage2 begins anew, because data.fps is 8" in said
    osctl("sample", "a red ball rolls past a house", "--out", "ball.mp4")
    with av.open(str(osctl.folder / "ball.mp4")) as video:
        assert sum(1 for _ in video.decode(video=0)) == 4


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "captions.csv"),
        ("path,text\n", "captions.csv"),
        ("when,where\nnow,here\n", "captions.csv"),
        ("path,text\n../a.mp4,x\n", "captions.csv:2"),
    ],
    ids=["empty", "no rows", "no path column", "outside the folder"],
)
def test_a_folder_that_is_none_is_one_line(tmp_path: Path, content: str, said: str) -> None:
    osctl = Osctl(write(tmp_path / "run"))
    folder = tmp_path / "clips"
    folder.mkdir()
    (folder / "captions.csv").write_text(content)
    refused = osctl("launch", "--data", str(folder), expect=2)
    assert said in refused.stderr and len(refused.stderr.strip().splitlines()) == 1, refused.stderr
    assert not list(tmp_path.rglob("intent.json"))
