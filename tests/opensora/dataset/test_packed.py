"""Tars, Parquet and other trainers' TOML give the rows that their files say, or an error that names the file; no pickle is ever opened."""

from __future__ import annotations

import io
import json
import pickle
import tarfile
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as arrow
import pyarrow.parquet as parquet
import pytest

from opensora.dataset.layouts import Captioned, NotThere, is_table, read_file, read_folder
from opensora.dataset.places import Folder
from opensora.dataset.webdataset import Member, Part
from opensora.errors import ConfigError


def folder(root: Path) -> Captioned:
    return read_folder(Folder(fsspec.filesystem("file"), str(root)), "clips")


def file(path: Path) -> Captioned:
    return read_file(Folder(fsspec.filesystem("file"), str(path.parent)), path.name, path.name)


def rows(found: Captioned) -> dict[str, str]:
    return {row.path: row.text for row in found.rows}


def tar(path: Path, members: list[tuple[str, bytes] | tarfile.TarInfo]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as packed:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                packed.addfile(member, io.BytesIO(b"x" * member.size) if member.isreg() else None)
            else:
                info = tarfile.TarInfo(member[0])
                info.size = len(member[1])
                packed.addfile(info, io.BytesIO(member[1]))
    return path


def table(where: Path, /, **columns: list[Any]) -> Path:
    where.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(arrow.table(columns), where)
    return where


def link(name: str, target: str) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = tarfile.SYMTYPE, target
    return info


class Bomb:
    """Says that it was opened."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.mark,)


# WebDataset


def test_shards_give_their_samples_in_order_and_each_clips_bytes_where_they_lie(tmp_path: Path) -> None:
    tar(tmp_path / "b-0001.tar", [("d.mp4", b"dddd"), ("d.json", b'{"key": "d", "caption": "a  disk"}')])
    tar(
        tmp_path / "b-0000.tar",
        [
            ("./a.mp4", b"aa"),
            ("./a.txt", b"a box\r\n"),
            ("a.json", b'{"caption": "not this"}'),
            ("x/c.video", b"c"),
            ("x/c.caption", b"a cone"),
        ],
    )
    found = folder(tmp_path)
    assert found.layout == "WebDataset, 2 shards"
    assert [(row.path, row.text) for row in found.rows] == [
        ("b-0000.tar/a.mp4", "a box"),
        ("b-0000.tar/x/c.video", "a cone"),
        ("b-0001.tar/d.mp4", "a disk"),
    ]
    for path, content in (("b-0000.tar/a.mp4", b"aa"), ("b-0000.tar/x/c.video", b"c"), ("b-0001.tar/d.mp4", b"dddd")):
        member = found.members[path]
        with (tmp_path / member.tar).open("rb") as opened:
            assert Part(opened, member.offset, member.size).read() == content
    assert rows(file(tmp_path / "b-0001.tar")) == {"b-0001.tar/d.mp4": "a disk"}


def test_samples_without_a_caption_are_counted_and_pickles_are_named_and_never_opened(tmp_path: Path) -> None:
    bomb = pickle.dumps(Bomb(tmp_path / "opened"))
    tar(tmp_path / "s.tar", [("a.mp4", b"a"), ("a.txt", b"a box"), ("b.mp4", b"b"), ("b.pkl", bomb), ("c.mp4", b"c"), ("a.npy", bomb)])
    found = folder(tmp_path)
    assert found.remarks == (
        "2 clips have no caption and are not used: s.tar/b.mp4, s.tar/c.mp4",
        "1 caption may be in pickles, which are never opened: s.tar/b.mp4",
    )
    tar(tmp_path / "s.tar", [("b.mp4", b"b"), ("b.pickle", bomb)])
    with pytest.raises(ConfigError, match=r"clips/s\.tar: 1 clip and no captions in s\.tar \(1 caption may be in pickles"):
        folder(tmp_path)
    for name in ("x.pkl", "x.pickle", "x.npy", "x.pt"):
        (tmp_path / name).write_bytes(bomb)
        assert is_table(name)
        with pytest.raises(ConfigError, match=f"{name}: a pickle, which may run a program when it is opened: it is never opened. Write"):
            file(tmp_path / name)
    assert not (tmp_path / "opened").exists()


def claims(name: str, size: int) -> bytes:
    info = tarfile.TarInfo(name)
    info.size = size
    return info.tobuf(format=tarfile.GNU_FORMAT)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ([("../a.mp4", b"a"), ("../a.txt", b"x")], r"s\.tar: member '?\.\./a\.mp4'? does not lie inside"),
        ([("/etc/a.mp4", b"a")], r"s\.tar: member '?/etc/a\.mp4'? does not lie inside"),
        ([("x/../../a.mp4", b"a")], "does not lie inside"),
        ([("a.mp4", b"a"), ("a.txt", b"x"), ("a.mp4", b"b")], r"s\.tar: a\.mp4 and a\.mp4 are one sample"),
        ([("a.mp4", b"a"), ("a.mov", b"b"), ("a.txt", b"x")], r"s\.tar: a\.mp4 and a\.mov are one sample"),
        ([("a.mp4", b"a"), ("a.txt", b"caf\xe9")], r"s\.tar/a\.txt:1: not UTF-8 at byte 3"),
        ([("a.mp4", b"a"), ("a.txt", b"x\0")], r"s\.tar/a\.txt:1: a NUL character"),
        ([("a.mp4", b"a"), ("a.txt", b"x" * (10 << 20))], r"s\.tar/a\.txt: 10,485,760 bytes, a caption has at most 1,048,576"),
        ([("a.mp4", b"a"), ("a.json", b"{")], r"s\.tar/a\.json: no JSON"),
        ([("a.mp4", b"a"), ("a.json", b"[" * 100_000)], r"s\.tar/a\.json: no JSON"),
        (claims("a.mp4", 10 << 40) + bytes(512), r"s\.tar: a\.mp4 should end at byte 10,995,116,278,272, the file has 1,024"),
        (b"no tar at all" * 100, r"s\.tar: no tar, or cut off"),
        (b"\x1f\x8b" + bytes(600), r"s\.tar: no tar, or cut off .* of a compressed one: gunzip it"),
        (b"", r"s\.tar: no tar, or cut off \(empty file\)"),
    ],
    ids=lambda value: "",
)  # fmt: skip
def test_a_tar_that_lies_is_refused_with_its_member(tmp_path: Path, content: Any, says: str) -> None:
    path = tmp_path / "s.tar"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        tar(path, content)
    with pytest.raises(ConfigError, match=says):
        folder(tmp_path)
    assert [one.name for one in tmp_path.iterdir()] == ["s.tar"]


def test_a_header_that_claims_a_long_name_is_not_read_into_memory(tmp_path: Path) -> None:
    info = tarfile.TarInfo("././@LongLink")
    info.type, info.size = tarfile.GNUTYPE_LONGNAME, 1 << 40
    (tmp_path / "s.tar").write_bytes(info.tobuf(format=tarfile.GNU_FORMAT) + bytes(2048))
    with pytest.raises(ConfigError, match=r"s\.tar: no tar that can be read \(a header of 1,099,511,627,776 bytes\)"):
        folder(tmp_path)


def test_a_truncated_tar_is_refused_and_links_in_one_are_not_followed(tmp_path: Path) -> None:
    whole = tar(tmp_path / "s.tar", [("a.mp4", b"a" * 5000), ("a.txt", b"x")]).read_bytes()
    (tmp_path / "s.tar").write_bytes(whole[:3000])
    with pytest.raises(ConfigError, match=r"a\.mp4 should end at byte 5,512, the file has 3,000"):
        folder(tmp_path)
    tar(tmp_path / "s.tar", [("a.mp4", b"a"), ("a.txt", b"x"), link("b.mp4", "/etc/passwd"), link("c.txt", "a.txt")])
    assert folder(tmp_path).remarks == ("2 members are links or have holes, and not read: s.tar/b.mp4, s.tar/c.txt",)


def test_a_part_is_a_file_that_ends_where_its_member_does(tmp_path: Path) -> None:
    part = Part(io.BytesIO(b"0123456789"), 2, 5)
    assert (part.read(2), part.tell(), part.read(), part.read()) == (b"23", 2, b"456", b"")
    assert part.seek(-1, 2) == 4 and part.read(9) == b"6" and part.seek(99) == 99 and part.read() == b""
    with pytest.raises(ValueError, match="before the beginning"):
        part.seek(-1)


# Parquet


OPEN_SORA_2 = {
    "num_frames": [9, 9],
    "height": [90, 90],
    "width": [160, 160],
    "aspect_ratio": [0.5, 0.5],
    "resolution": ["1", "1"],
    "fps": [24, 24],
}


def test_parquet_gives_the_columns_of_open_sora_and_of_openvid(tmp_path: Path) -> None:
    table(tmp_path / "mine" / "a.parquet", path=["a.mp4", "b/c.mp4"], text=["a box", " a cone "], **OPEN_SORA_2)
    assert (file(tmp_path / "mine/a.parquet").layout, rows(folder(tmp_path / "mine"))) == (
        "a.parquet, columns path and text",
        {"a.mp4": "a box", "b/c.mp4": "a cone"},
    )
    table(tmp_path / "openvid.parquet", video=["a.mp4"], caption=["a box"], seconds=[4.0])
    assert rows(file(tmp_path / "openvid.parquet")) == {"a.mp4": "a box"}
    table(tmp_path / "two/train-0.parquet", path=["a.mp4"], text=["x"])
    table(tmp_path / "two/train-1.parquet", path=["b.mp4"], text=["y"])
    assert rows(folder(tmp_path / "two")) == {"a.mp4": "x", "b.mp4": "y"}


def test_a_table_of_text_counts_before_parquet_and_tars_as_it_did(tmp_path: Path) -> None:
    table(tmp_path / "a.parquet", path=["a.mp4"], text=["of parquet"])
    tar(tmp_path / "s.tar", [("a.mp4", b""), ("a.txt", b"of a tar")])
    with pytest.raises(ConfigError, match=r"a\.parquet and s\.tar may both be meant"):
        folder(tmp_path)
    (tmp_path / "metadata.csv").write_text("file_name,text\na.mp4,of a csv\n")
    assert rows(folder(tmp_path)) == {"a.mp4": "of a csv"}


@pytest.mark.parametrize(
    ("columns", "says"),
    [
        ({"name": ["a"], "text": ["x"]}, r"a\.parquet: no column of files among name,text\. Call it path"),
        ({"path": ["a.mp4"], "label": ["x"]}, r"a\.parquet: no column of captions among path,label\. Call it text"),
        (
            {"video": [b"film"], "caption": ["x"]},
            r"a\.parquet: column video is of type binary, texts are needed\. Write the videos into files",
        ),
        ({"path": ["a.mp4"], "text": [["x"]]}, r"column text is of type list.*texts are needed\. Write one text a row"),
        ({"path": ["a.mp4"], "text": ["x" * (1 << 20) + "x"]}, r"a\.parquet:1: text: 1,048,577 characters"),
        ({"path": ["a.mp4"], "text": ["x\0"]}, r"a\.parquet:1: text: holds NUL"),
        ({"path": ["a.mp4", None], "text": ["x", "y"]}, r"a\.parquet:2: no path"),
        ({"path": ["a.mp4"], "text": arrow.array([None], arrow.string())}, r"a\.parquet:1: a\.mp4 has no text"),
        ({"path": arrow.array([], arrow.string()), "text": arrow.array([], arrow.string())}, r"a\.parquet: no clips"),
        ({"path": ["a.mp4", "a.mp4"], "text": ["x", "y"]}, r"a\.parquet:2: a\.mp4 is on line 1 already"),
        ({"path": ["../a.mp4"], "text": ["x"]}, "does not lie inside the folder"),
        ({"path": ["a"], "video": ["b"], "file": ["c"], "caption": ["x"], "prompt": ["y"]}, "caption and prompt may both be meant"),
    ],
    ids=lambda value: "",
)
def test_parquet_that_cannot_be_read_rightly_is_refused(tmp_path: Path, columns: dict[str, Any], says: str) -> None:
    table(tmp_path / "a.parquet", **columns)
    with pytest.raises(ConfigError, match=says):
        folder(tmp_path)


def test_truncated_parquet_is_refused_and_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    whole = table(tmp_path / "a.parquet", path=["a.mp4"] * 9, text=["x"] * 9).read_bytes()
    for cut in (0, 3, 4, len(whole) // 2, len(whole) - 1):
        (tmp_path / "a.parquet").write_bytes(whole[:cut])
        with pytest.raises(ConfigError, match=r"a\.parquet: no Parquet, or cut off"):
            file(tmp_path / "a.parquet")
    damaged = bytearray(whole)
    damaged[4:40] = bytes(36)
    (tmp_path / "a.parquet").write_bytes(damaged)
    with pytest.raises(ConfigError, match=r"a\.parquet"):
        file(tmp_path / "a.parquet")
    with pytest.raises(NotThere):
        file(tmp_path / "none.parquet")


# TOML


def clips(root: Path, *names: str, ending: str = ".txt") -> Path:
    root.mkdir(parents=True, exist_ok=True)
    for name in names:
        (root / f"{name}.mp4").write_bytes(b"film")
        (root / f"{name}{ending}").write_text(f"caption of {name}\n")
    return root


def test_the_toml_of_diffusion_pipe_names_folders_whose_own_clips_are_read(tmp_path: Path) -> None:
    clips(tmp_path / "one", "a", "b")
    clips(tmp_path / "one/below", "c")
    clips(tmp_path / "elsewhere/two", "d")
    (tmp_path / "sets").mkdir()
    (tmp_path / "sets/d.toml").write_text(
        f'resolutions = [512]\n[[directory]]\npath = "../one"\nnum_repeats = 5\n[[directory]]\npath = "{tmp_path}/elsewhere/two/"\n'
    )
    found = file(tmp_path / "sets/d.toml")
    assert rows(found) == {
        "../one/a.mp4": "caption of a",
        "../one/b.mp4": "caption of b",
        f"{tmp_path}/elsewhere/two/d.mp4": "caption of d",
    }
    assert (found.layout, found.remarks) == ("d.toml, [[directory]]", ("d.toml repeats clips (num_repeats): each counts once here",))


def test_the_toml_of_musubi_tuner_names_folders_and_lists(tmp_path: Path) -> None:
    clips(tmp_path / "one", "a", ending=".caption")
    clips(tmp_path / "two", "b")
    clips(tmp_path / "lists/films", "c")
    lines = [{"video_path": "films/c.mp4", "caption": "of a list"}, {"video_path": f"{tmp_path}/two/b.mp4", "caption": "from the root"}]
    (tmp_path / "lists/l.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "d.toml").write_text(
        '[general]\ncaption_extension = ".caption"\nresolution = [960, 544]\n[[datasets]]\nvideo_directory = "one"\n'
        '[[datasets]]\nvideo_directory = "two"\ncaption_extension = "txt"\ntarget_frames = [1, 25]\nsource_fps = 30.0\n'
        '[[datasets]]\nvideo_jsonl_file = "lists/l.jsonl"\n'
    )
    assert rows(file(tmp_path / "d.toml")) == {
        "one/a.mp4": "caption of a",
        "two/b.mp4": "caption of b",
        "lists/films/c.mp4": "of a list",
        f"{tmp_path}/two/b.mp4": "from the root",
    }


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", r"d\.toml: neither \[\[directory\]\] with path nor \[\[datasets\]\]"),
        ("x = ", r"d\.toml: no TOML"),
        ("a" + ".a" * 30_000 + " = 1", r"d\.toml:1: a line of more than 2,048 characters"),
        ("x = " + "[" * 2_000, r"d\.toml: no TOML"),
        ("x = 1\n" * 20_000, r"d\.toml: 120,000 bytes, a configuration has at most 65,536"),
        ("caf\xe9 = 1", r"d\.toml: no TOML"),
        ('[directory]\npath = "a"', r"d\.toml: directory is no list of tables\. Write \[\[directory\]\]"),
        ("[[directory]]\npath = 3", r"d\.toml: entry 1 of \[\[directory\]\]: path is 3, a path is needed"),
        ('[[directory]]\npath = "none"', r"d\.toml: none: no such folder"),
        ('[[directory]]\npath = "empty"', r"d\.toml: empty: no clip with a caption beside it \(a\.mp4 with a\.txt\)"),
        ('[[directory]]\npath = "s3://b/x"', r"path s3://b/x is an address"),
        ("[[datasets]]\nx = 1", r"entry 1 of \[\[datasets\]\]: names none of video_directory, image_directory"),
        ('[[datasets]]\nvideo_directory = "a"\nvideo_jsonl_file = "b"', "names video_directory and video_jsonl_file. Name one"),
        ('[[datasets]]\nvideo_directory = "a"\ncaption_extension = "../x"', "is no end of a name"),
        ('[[datasets]]\nvideo_jsonl_file = "none.jsonl"', r"d\.toml: none\.jsonl: no such file"),
    ],
    ids=lambda value: "",
)
def test_a_toml_that_names_nothing_is_refused_with_its_entry(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "d.toml").write_text(text)
    with pytest.raises(ConfigError, match=says):
        file(tmp_path / "d.toml")


def test_what_is_compressed_says_how_it_is_unpacked(tmp_path: Path) -> None:
    for name in ("a.tar.gz", "a.tgz", "a.zip", "a.arrow"):
        with pytest.raises(ConfigError, match=rf"{name}: "):
            file(tmp_path / name)


def test_members_are_plain_data() -> None:
    assert Member("s.tar", "a.mp4", 512, 2) == Member("s.tar", "a.mp4", 512, 2)
