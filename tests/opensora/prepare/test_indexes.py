"""Published lists give their videos, captions and clips as their authors wrote them, or name the line that cannot be read."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from typing import Any

import pytest

from opensora.dataset.places import Names
from opensora.errors import ConfigError
from opensora.prepare.indexes import Listed, read

WEBVID = """videoid,contentUrl,duration,page_dir,name
21179416,https://example.org/videos/21179416/preview/stock.mp4,PT00H00M11S,006001_006050,"Aerial shot, winter forest"
5629184,https://example.org/5629184.mp4,PT00H00M29S,071501_071550,Senior couple looking through binoculars
"""
PANDA_CELLS = (
    "[['0:01:20.880', '0:01:23.983'], ['1:02:31.151', '1:02:34.320']]",
    """['A neuron.', ""A woman's hand.""]""",
    "[0.45, 0.49]",
    "['desirable', 'desirable']",
    "[[['0:00:00.000', '0:00:03.069']], []]",
)
PANDA = (
    "videoID,url,timestamp,caption,matching_score,desirable_filtering,shot_boundary_detection\n"
    "-2yHu,https://example.org/watch?v=-2yHu," + ",".join(f'"{cell}"' for cell in PANDA_CELLS) + "\n"
)
OPENVID = """video,caption,aesthetic score,motion score,temporal consistency score,camera motion,frame,fps,seconds
--_S9IDQPLg_70_0to104.mp4,"In the video, a man speaks.",5.03,8.8,0.99,static,104,24.0,4.33
celebv_x_1.mp4,A woman.,4.9,2.3,0.99,Undetermined,90,30.0,3.0
"""
HD_VG = {
    "aBc-1": {
        "url": "https://example.org/watch?v=aBc-1",
        "clip": {
            "aBc-1.0.mp4": {
                "fps": 25.0,
                "span": ["00:00:10.000", "00:00:20.000"],
                "scene_split": [
                    {"clip_id": "aBc-1.0_0", "caption": "a dog runs", "scene_cut": [0, 50]},
                    {"clip_id": "aBc-1.0_1", "caption": "a cat", "scene_cut": [50, -1]},
                ],
            }
        },
    },
    "dEf": {"url": "https://example.org/watch?v=dEf", "clip": {}},
}


def rows(text: str | bytes, layout: Any = "auto", files: tuple[str, ...] = ()) -> list[Listed]:
    data = text if isinstance(text, bytes) else text.encode()
    return list(read(io.BytesIO(data), layout, "list.csv", lambda: Names(files)))


def refusal(text: str | bytes, layout: Any = "auto") -> str:
    with pytest.raises(ConfigError) as caught:
        rows(text, layout)
    return str(caught.value)


@pytest.mark.parametrize("layout", ["auto", "webvid"])
def test_webvid(layout: Any) -> None:
    assert rows(WEBVID, layout) == [
        Listed("21179416", "https://example.org/videos/21179416/preview/stock.mp4", "Aerial shot, winter forest"),
        Listed("5629184", "https://example.org/5629184.mp4", "Senior couple looking through binoculars"),
    ]


@pytest.mark.parametrize("layout", ["auto", "panda-70m"])
def test_panda(layout: Any) -> None:
    assert rows(PANDA, layout) == [
        Listed(
            "-2yHu", "https://example.org/watch?v=-2yHu", "",
            ((80.88, 83.983, "A neuron."), (3751.151, 3754.32, "A woman's hand.")),
        )
    ]  # fmt: skip


@pytest.mark.parametrize("layout", ["auto", "openvid"])
def test_openvid_names_files_that_are_found_wherever_they_were_unpacked(layout: Any) -> None:
    assert rows(OPENVID, layout, ("celebv_x_1.mp4",)) == [
        Listed("--_S9IDQPLg_70_0to104.mp4", "--_S9IDQPLg_70_0to104.mp4", "In the video, a man speaks."),
        Listed("celebv_x_1.mp4", "celebv_x_1.mp4", "A woman."),
    ]


@pytest.mark.parametrize("layout", ["auto", "hd-vg-130m"])
def test_hd_vg_counts_frames_from_the_beginning_of_their_span(layout: Any) -> None:
    assert rows(json.dumps(HD_VG, indent=1), layout) == [
        Listed("aBc-1", "https://example.org/watch?v=aBc-1", "", ((10.0, 12.0, "a dog runs"), (12.0, 20.0, "a cat"))),
        Listed("dEf", "https://example.org/watch?v=dEf"),
    ]


def test_a_list_is_read_as_it_comes() -> None:
    """The list of WebVid has 2.7 GB: its first video is there before its second line is read."""

    class Line(io.RawIOBase):
        given = 0

        def readable(self) -> bool:
            return True

        def readinto(self, into: Any) -> int:
            line = WEBVID.splitlines(True)[0 if self.given == 0 else 1].encode()
            self.given += 1
            into[: len(line)] = line
            return len(line)

        def seek(self, *_: Any) -> int:
            return 0

    raw = Line()
    found: Iterator[Listed] = read(io.BufferedReader(raw), "webvid", "endless.csv")
    assert next(found).name == "21179416" and raw.given < 2000


CELLS = PANDA.splitlines()[1]


@pytest.mark.parametrize(
    ("text", "layout", "says"),
    [
        ("", "auto", "list.csv: empty"),
        ("a,b\n1,2\n", "auto", "list.csv: no list that is known, by its header a,b. Known are panda-70m: videoID, url"),
        ("a,b\n1,2\n", "webvid", "list.csv: no column videoid, as webvid has. The header is a,b"),
        (WEBVID + "1,2\n", "auto", "list.csv:4: 2 columns, the header has 5"),
        (WEBVID + '1,"https://x/a', "auto", "list.csv:4: unexpected end of data"),
        (WEBVID.encode() + b"1,https://x/a,,,caf\xe9\n", "auto", "not UTF-8 behind this line"),
        (WEBVID + "1,https://x/a,,,x\0\n", "auto", "list.csv:4: a NUL character"),
        (WEBVID + f"1,https://x/a,,,{'x' * (1 << 24)}x\n", "auto", "list.csv:4: field larger than field limit"),
        (WEBVID + "1,file:///etc/passwd,,,x\n", "auto", "addresses with file:// are not fetched. Give one of http, https, s3"),
        (WEBVID + "1,/etc/passwd,,,x\n", "auto", "list.csv:4: /etc/passwd: "),
        (WEBVID + "1,http://,,,x\n", "auto", "list.csv:4: http://: no address of a file"),
        (PANDA + CELLS.replace("['A neuron.', ", "["), "auto", "list.csv:3: 2 times and 1 caption"),
        (PANDA + CELLS.replace("'0:01:23.983'", "'0:01:10.000'"), "auto", "list.csv:3: a clip from 80.88 s to 70 s"),
        (json.dumps(HD_VG).replace("25.0", "NaN"), "auto", "a clip from nan s to nan s. Give an end behind its start, below 10,000,000 s"),
        (json.dumps(HD_VG).replace("25.0", "1e-300"), "auto", "Give an end behind its start, below 10,000,000 s"),
        (PANDA + CELLS.replace("'0:01:23.983'", "'later'"), "auto", "list.csv:3: later is no time. Write H:MM:SS.mmm"),
        (PANDA + CELLS.replace("[['0:01", "__import__('os').system('x')#"), "auto", "list.csv:3: timestamp is no list as Python prints it"),
        (PANDA + 'x,https://x/a,"' + "[" * 100_000 + '","[]",,,\n', "auto", "list.csv:3: timestamp is no list as Python prints it"),
        (OPENVID + "../../etc/a.mp4,x,,,,,,,\n", "auto", "list.csv:4: video ../../etc/a.mp4 does not lie below the list"),
        (OPENVID + "/etc/a.mp4,x,,,,,,,\n", "auto", "list.csv:4: video /etc/a.mp4 does not lie below the list"),
        ('{"a": ', "auto", "list.csv:1: no JSON of a video"),
        ('{"a": {"url": "https://x/a", "clip": {}}', "auto", "list.csv:1: the object ends early"),
        ('{"a": {"url": 3, "clip": {}}}', "auto", "list.csv: a: no video of HD-VG-130M"),
        ('{"a": []}', "auto", "list.csv: a: no video of HD-VG-130M"),
        ('{"a": ' + "[" * 100_000, "auto", "list.csv:1: no JSON of a video"),
        ("[1]", "hd-vg-130m", "list.csv: no object of videos"),
        (json.dumps(HD_VG).replace("25.0", "0"), "auto", "list.csv: aBc-1: no video of HD-VG-130M"),
    ],
    ids=lambda value: "",
)
def test_a_list_that_cannot_be_read_rightly_is_refused_with_its_line(text: Any, layout: Any, says: str) -> None:
    assert says in refusal(text, layout)


def test_credentials_of_a_list_are_not_kept() -> None:
    [listed] = rows(WEBVID.splitlines(True)[0] + "1,https://me:verysecret@example.org/a.mp4?token=alsosecret,,,x\n")
    assert "secret" not in listed.address and listed.address.startswith("https://…@example.org/a.mp4")


def test_formulas_marks_and_line_ends_are_text() -> None:
    text = "\ufeff" + WEBVID.replace("\n", "\r\n") + "7,https://x/a,,,\"=cmd|'/c calc'!A0\r\nnext\"\r\n"
    assert rows(text)[-1].caption == "=cmd|'/c calc'!A0\r\nnext"
