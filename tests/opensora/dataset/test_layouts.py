"""A folder of clips is taken for one thing, and that is said; names are found in any form; nothing is guessed and nothing vanishes."""

from __future__ import annotations

import itertools
import os
import unicodedata
from pathlib import Path

import fsspec
import pytest

from opensora.dataset.layouts import Captioned, NotThere, read_file, read_folder
from opensora.dataset.places import Folder
from opensora.errors import ConfigError

NFC, NFD = (unicodedata.normalize(form, "café.mp4") for form in ("NFC", "NFD"))
CSV = "path,text\n"


def make(root: Path, files: dict[str, str | bytes]) -> Path:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return root


def read(root: Path) -> Captioned:
    return read_folder(Folder(fsspec.filesystem("file"), str(root)), "clips")


def rows(found: Captioned) -> dict[str, str]:
    return {row.path: row.text for row in found.rows}


def refusal(root: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        read(root)
    return str(caught.value)


WANTED = {"a.mp4": "a box", "more/b.mp4": "two boxes"}
CLIPS: dict[str, str | bytes] = {"a.mp4": b"film", "more/b.mp4": b"film"}
LAYOUTS: dict[str, dict[str, str | bytes]] = {
    "captions.csv, columns path and text": {"captions.csv": CSV + "a.mp4,a box\nmore/b.mp4,two boxes\n"},
    "captions.csv, no header, as Open-Sora 1.0 wrote it": {"captions.csv": "a.mp4,a box,12\nmore/b.mp4,two boxes,24\n"},
    "metadata.csv, columns file_name and text, semicolons": {"metadata.csv": "file_name;text\na.mp4;a box\nmore/b.mp4;two boxes\n"},
    "metadata.jsonl, video_path and caption of each object": {
        "metadata.jsonl": '{"video_path": "a.mp4", "caption": "a box"}\n{"video_path": "more/b.mp4", "caption": "two boxes"}\n'
    },
    "metadata.json, video and prompt of each object": {
        "metadata.json": '[{"video": "a.mp4", "prompt": "a box"}, {"video": "more/b.mp4", "prompt": "two boxes"}]'
    },
    "lines of prompts.txt and videos.txt": {"prompts.txt": "a box\r\ntwo boxes\r\n\r\n", "videos.txt": "a.mp4\nmore/b.mp4"},
    "a.mp4 with a.txt beside it": {"a.txt": "a box\n", "more/b.TXT": "two\r\nboxes"},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_layout_gives_the_same_rows_and_says_what_it_is(tmp_path: Path, layout: str) -> None:
    found = read(make(tmp_path, CLIPS | LAYOUTS[layout] | {".DS_Store": b"", "._a.mp4": b"", "__MACOSX/a.mp4": b"", "README.md": ""}))
    assert (found.layout, rows(found), found.notes) == (layout, WANTED, ())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_address_is_read_as_a_disk_is(tmp_path: Path, layout: str) -> None:
    make(tmp_path / "clips", CLIPS | LAYOUTS[layout])
    memory, place = fsspec.filesystem("memory"), f"/layouts-{abs(hash(layout))}"
    memory.put(f"{tmp_path}/clips/", f"{place}/", recursive=True)
    far = read_folder(Folder(memory, place), "clips")
    near = read(tmp_path / "clips")
    assert (far.layout, far.rows, far.notes, far.files) == (near.layout, near.rows, near.notes, near.files)


@pytest.mark.parametrize("name", ["Captions.csv", "METADATA.CSV"])
def test_capitals_of_a_table_do_not_matter(tmp_path: Path, name: str) -> None:
    assert rows(read(make(tmp_path, {"IMG_1.MOV": b"", name: "Path;Text\r\nIMG_1.MOV;a box\r\n"}))) == {"IMG_1.MOV": "a box"}


def test_the_layout_of_cosmos_is_read_and_its_pickles_are_not(tmp_path: Path) -> None:
    found = read(make(tmp_path, {"videos/a.mp4": b"", "metas/a.txt": "a box", "t5_xxl/a.pickle": b"\x80\x04."}))
    assert (found.layout, rows(found)) == ("videos/a.mp4 with metas/a.txt", {"videos/a.mp4": "a box"})


@pytest.mark.parametrize(
    ("one", "other"), list(itertools.combinations([name for name in LAYOUTS if not name.startswith("captions.csv")], 2))
)
def test_two_layouts_in_one_folder_are_refused_with_both_names(tmp_path: Path, one: str, other: str) -> None:
    said = refusal(make(tmp_path, CLIPS | LAYOUTS[one] | LAYOUTS[other]))
    assert "may both be meant" in said
    for layout in (one, other):
        assert (layout.partition(",")[0] if "," in layout else layout.removeprefix("lines of ").split()[0]) in said


def test_captions_csv_counts_before_all_others_and_that_is_said(tmp_path: Path) -> None:
    found = read(make(tmp_path, CLIPS | LAYOUTS["a.mp4 with a.txt beside it"] | {"captions.csv": CSV + "a.mp4,mine\nmore/b.mp4,too\n"}))
    assert rows(found)["a.mp4"] == "mine"
    assert found.notes == ("a.mp4 with a.txt beside it are there too, and not read: captions.csv counts first",)


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ({"captions.csv": CSV, "Captions.CSV": CSV}, "Captions.CSV and captions.csv may both be meant"),
        ({"prompts.txt": "x\ny\n", "videos.txt": "a.mp4\n"}, "clips: prompts.txt has 2 lines, videos.txt 1. Write one line a clip"),
        ({"prompts.txt": "x\n\ny\n", "videos.txt": "a.mp4\nb.mp4\nc.mp4\n"}, "clips/prompts.txt:2: b.mp4 has no text"),
        ({"prompts.txt": "x\n", "captions.txt": "x\n", "videos.txt": "a.mp4\n"}, "captions.txt and prompts.txt may both be meant"),
        ({"prompts.txt": "x\n", "a.mp4": ""}, "clips/captions.csv: no such file (prompts.txt without videos.txt)"),
        ({"x-0001.tar": b""}, "clips/x-0001.tar: no tar, or cut off (empty file)"),
        ({"data/x.parquet": b""}, "data/x.parquet may be meant. Name it: clips/data/x.parquet"),
        ({"d.toml": ""}, "d.toml may be meant. Name it: clips/d.toml"),
        ({"a.mp4": b"", "b.mov": b""}, "clips/captions.csv: no such file (2 clips and no captions)"),
        ({"mine.csv": CSV}, "or name the table: clips/mine.csv"),
        ({}, "clips/captions.csv: no such file (no captions)"),
        ({"a.mp4": b"", "a.txt": b"caf\xe9"}, "clips/a.txt:1: not UTF-8 at byte 3"),
        ({"a.mp4": b"", "a.txt": b"x" * (1 << 20) + b"x"}, "clips/a.txt: 1,048,577 bytes, a caption has at most"),
        ({"a.mp4": b"", "a.txt": b" \n"}, "no clip has a caption: 1 file of a caption is empty (a.txt)"),
        ({"captions.csv": CSV + "../a.mp4,x\n"}, "clips/captions.csv:2: path '../a.mp4' does not lie inside the folder"),
        ({"captions.csv": CSV + "..\\a.mp4,x\n"}, "clips/captions.csv:2: path '..\\\\a.mp4' does not lie inside"),
        ({"captions.csv": CSV + "C:\\clips\\a.mp4,x\n"}, "clips/captions.csv:2: path"),
        ({"captions.csv": CSV + "s3://b/a.mp4,x\n"}, "clips/captions.csv:2: path"),
        ({"captions.csv": CSV + "a.mp4,x\nb.mp4,y\n./a.mp4,z\n"}, "clips/captions.csv:4: a.mp4 is on line 2 already"),
        ({"captions.csv": CSV + f"{NFC},x\n{NFD},y\n", NFC: b""}, "is on line 2 already"),
        ({"captions.csv": CSV + " ,x\n"}, "clips/captions.csv:2: no path"),
    ],
    ids=lambda value: "",
)
def test_what_is_no_layout_or_is_broken_is_said_with_its_place(tmp_path: Path, files: dict[str, str | bytes], says: str) -> None:
    assert says in refusal(make(tmp_path, files))


def test_a_clip_without_a_caption_and_a_caption_without_a_clip_are_counted(tmp_path: Path) -> None:
    names = [f"gone{number}.mp4" for number in range(5)]
    csv = CSV + "a.mp4,x\n" + "".join(f"{name},y\n" for name in names)
    found = read(make(tmp_path, {"a.mp4": b"", "IMG 1.MOV": b"", "notes.txt": "", "captions.csv": csv}))
    assert len(found.rows) == 6
    assert found.notes == (
        "1 clip has no caption and is not used: IMG 1.MOV",
        "5 captions name files that are not there: gone0.mp4, gone1.mp4, gone2.mp4 and 2 more",
    )
    (tmp_path / "captions.csv").unlink()
    make(tmp_path, {"a.txt": "x", "b.mp4": b"", "c.mp4": b"", "c.txt": ""})
    assert read(tmp_path).notes == (
        "1 file of a caption is empty: c.txt",
        "3 clips have no caption and are not used: IMG 1.MOV, b.mp4, c.mp4",
    )


# Names


@pytest.mark.parametrize(("written", "file"), [(NFC, NFD), (NFD, NFC), ("more\\a.mp4", "more/a.mp4"), ("a b.mp4", "a b.mp4 "), ("x", " x")])
def test_a_file_is_found_however_its_name_is_written(tmp_path: Path, written: str, file: str) -> None:
    found = read(make(tmp_path, {file: b"film", "captions.csv": CSV + f"{written},a box\n"}))
    (row,) = found.rows
    assert found.files.get(row.path, row.path) == file and not found.notes


@pytest.mark.parametrize(("one", "other"), [(NFC, NFD), ("more\\a.mp4", "more/a.mp4"), ("a.mp4", "a.mp4 "), ("100%.mp4", "100%25.mp4")])
def test_two_files_whose_names_read_the_same_are_told_apart(tmp_path: Path, one: str, other: str) -> None:
    found = read(make(tmp_path, {one: b"", other: b"", "captions.csv": CSV + f'{one},one\n"{other}",other\n'}))
    assert [found.files.get(row.path, row.path) for row in found.rows] == [one, other] and not found.notes


def test_pairs_are_the_same_rows_in_the_same_order_whatever_system_copied_them(tmp_path: Path) -> None:
    names = ["a.mp4", "café.mp4", "cafz.mp4", "é/x.mp4", "Z.mp4"]
    found = []
    for form in ("NFC", "NFD"):
        files = {unicodedata.normalize(form, name): b"" for name in names}
        found.append(read(make(tmp_path / form, files | {f"{Path(name).with_suffix('.txt')}": "x" for name in files})))
    assert [row.path for row in found[0].rows] == [row.path for row in found[1].rows] == sorted(names)
    assert all(not one.notes for one in found)


def test_a_path_written_from_the_root_on_is_inside_of_it(tmp_path: Path) -> None:
    make(tmp_path / "clips", {"a.mp4": b"", "captions.csv": CSV + f"{tmp_path}/clips/a.mp4,x\n"})
    assert rows(read(tmp_path / "clips")) == {"a.mp4": "x"}
    (tmp_path / "clips/captions.csv").write_text(CSV + f"{tmp_path}/clips-of-others/a.mp4,x\n")
    assert "does not lie inside" in refusal(tmp_path / "clips")


def test_folders_behind_links_are_listed_and_circles_end(tmp_path: Path) -> None:
    make(tmp_path / "elsewhere", {"a.mp4": b""})
    make(tmp_path / "clips", {"captions.csv": CSV + "link/a.mp4,x\nfilm.mp4,y\n"})
    (tmp_path / "clips/link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "clips/film.mp4").symlink_to(tmp_path / "elsewhere/a.mp4")
    (tmp_path / "clips/round").symlink_to(tmp_path / "clips")
    (tmp_path / "clips/broken.mp4").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "clips/pipe.mp4")
    assert read(tmp_path / "clips").notes == ()


# A table by its own name


def table(path: Path) -> Captioned:
    return read_file(Folder(fsspec.filesystem("file"), str(path.parent)), path.name, str(path))


def test_a_table_that_is_named_may_name_files_anywhere(tmp_path: Path) -> None:
    make(tmp_path, {"all.csv": CSV + f"a.mp4,x\n{tmp_path}/b.mp4,y\ns3://b/c.mp4,z\n"})
    assert rows(table(tmp_path / "all.csv")) == {"a.mp4": "x", f"{tmp_path}/b.mp4": "y", "s3://b/c.mp4": "z"}
    make(tmp_path, {"all.jsonl": '{"video_path": "a.mp4", "caption": "x"}', "all.txt": "path\ttext\na.mp4\tx"})
    assert rows(table(tmp_path / "all.jsonl")) == rows(table(tmp_path / "all.txt")) == {"a.mp4": "x"}
    make(tmp_path, {"captions.txt": "x\n", "videos.txt": "a.mp4\n"})
    assert rows(table(tmp_path / "captions.txt")) == rows(table(tmp_path / "videos.txt")) == {"a.mp4": "x"}


def test_a_table_that_is_not_there_is_a_pipe_or_is_packed_is_said(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.csv")
    for name, error, says in (
        ("none.csv", NotThere, "none.csv: no such file"),
        ("pipe.csv", ConfigError, "pipe.csv: is no regular file"),
        ("a.parquet", NotThere, "a.parquet: no such file"),
    ):
        with pytest.raises(error, match=says):
            table(tmp_path / name)
    with pytest.raises(NotThere, match="no such folder"):
        read(tmp_path / "none")
    make(tmp_path, {"file": ""})
    assert "is no folder" in refusal(tmp_path / "file")


def test_captions_whose_clip_is_not_there_are_counted(tmp_path: Path) -> None:
    texts = {"c.txt": "orphan", "sub/b.txt": "of a .vob", "sub/b.vob": b"x", "README.txt": "of the archive", "licence.txt": "free"}
    found = read(make(tmp_path, {"a.mp4": b"x", "a.txt": "a", **texts}))
    assert found.remarks == ("2 captions have no clip: c.txt, sub/b.txt",) and len(found.rows) == 1
    cosmos = read(make(tmp_path / "cosmos", {"videos/a.mp4": b"x", "metas/a.txt": "a", "metas/c.txt": "c", "notes.txt": "n"}))
    assert cosmos.remarks == ("1 caption has no clip: metas/c.txt",)
