"""Every raw video of a place is listed once, with where it comes from; what cannot be a video is listed too, so that it is counted."""

from __future__ import annotations

import csv
import os
import tarfile
import unicodedata
from pathlib import Path
from typing import Any

import pyarrow as arrow
import pyarrow.parquet as parquet
import pytest
from file_servers import Files, served

from opensora.dataset.prepare_config import Download, Given
from opensora.dataset.rows import Provenance, Quarantine, Source
from opensora.errors import ConfigError
from opensora.prepare.download import fetch
from opensora.prepare.sources import listed


def make(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(name.encode())
    return root


def captions(of: list[Source]) -> dict[str, str]:
    return {source.name: source.provenance.caption for source in of}


def sources(*places: Any, **options: Any) -> list[Source]:
    return list(listed([Given(path=str(place), **options) for place in places]))


def refusal(place: Any, **options: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        sources(place, **options)
    return str(caught.value)


# Folders and files


def test_a_folder_gives_its_films_in_order_and_nothing_else(tmp_path: Path) -> None:
    names = ["b.MOV", "a.mp4", "день/фильм.mkv", "日本/映画.webm", "x y,z.mp4"]
    root = make(
        tmp_path / "films", *names, "Icon\r", "notes.txt", "a.jpg", ".hidden.mp4", "._a.mp4", "__MACOSX/a.mp4", ".git/a.mp4", "a.csv.mp4"
    )
    found = sources(root, licence="mine", name="home")
    assert [source.name for source in found] == sorted([*names, "a.csv.mp4"])
    assert found[0] == Source(f"{root}/a.csv.mp4", "a.csv.mp4", Provenance("home", f"{root}/a.csv.mp4", "mine"))
    assert all(Path(source.uri).read_bytes() == source.name.encode() for source in found)
    assert {source.provenance.set_name for source in sources(root)} == {"films"}


def test_one_file_is_one_source_whatever_it_is_called(tmp_path: Path) -> None:
    make(tmp_path, "film", "day.one/a.mp4")
    assert [source.uri for source in sources(tmp_path / "film", tmp_path / "day.one/a.mp4", (tmp_path / "day.one").as_uri())] == [
        f"{tmp_path}/film", f"{tmp_path}/day.one/a.mp4",
    ]  # fmt: skip


def test_one_file_has_the_caption_that_lies_beside_it(tmp_path: Path) -> None:
    make(tmp_path, "a.mp4", "b.mp4", "c.mp4")
    (tmp_path / "a.txt").write_bytes("a red\r\n ball\n".encode("utf-16"))
    (tmp_path / "b.TXT").write_text("it moves up")
    assert captions(sources(*(tmp_path / f"{name}.mp4" for name in "abc"))) == {"a.mp4": "a red ball", "b.mp4": "it moves up", "c.mp4": ""}
    assert captions(sources(tmp_path)) == {"a.mp4": "a red ball", "b.mp4": "it moves up", "c.mp4": ""}, "as in a folder"
    (tmp_path / "a.txt").write_bytes(b"x" * (1 << 20 | 1))
    assert "a caption has at most 1,048,576" in refusal(tmp_path / "a.mp4")


def test_names_are_unique_and_the_same_address_counts_once(tmp_path: Path) -> None:
    one, two = make(tmp_path / "one", "a.mp4", "b.mp4"), make(tmp_path / "two", "a.mp4", "two/a.mp4")
    assert [source.name for source in sources(one, two, one, one / "a.mp4")] == ["a.mp4", "b.mp4", "two/a.mp4", "two/two/a.mp4"]
    make(tmp_path / "x/two", "a.mp4")
    assert [source.name for source in sources(one, two, tmp_path / "x/two")] == [
        "a.mp4",
        "b.mp4",
        "two/a.mp4",
        "two/two/a.mp4",
        "two/a.mp4~2",
    ]


def test_names_of_a_copied_folder_are_the_same_on_each_system(tmp_path: Path) -> None:
    names = ["é.mp4", "f.mp4", "e.mp4"]
    made = [sources(make(tmp_path / form, *(unicodedata.normalize(form, name) for name in names))) for form in ("NFC", "NFD")]
    assert [source.name for source in made[0]] == [source.name for source in made[1]]
    assert Path(made[1][-1].uri).exists()


def test_what_is_no_file_is_a_source_too_and_leaves_with_its_reason(tmp_path: Path) -> None:
    root = make(tmp_path / "films", "a.mp4", "sub/b.mp4")
    os.mkfifo(root / "pipe.mp4")
    (root / "round.mp4").symlink_to("round.mp4")
    (root / "nowhere.mp4").symlink_to("none")
    (root / "sub/up").symlink_to("..")
    (root / "link.mp4").symlink_to("a.mp4")
    reasons = {}
    for source in sources(root):
        try:
            fetch(source, tmp_path / "to", Download(), halt=lambda: False)
        except Quarantine as gone:
            reasons[source.name] = gone.reason
        else:
            reasons[source.name] = ""
    assert reasons == {
        "a.mp4": "", "link.mp4": "", "sub/b.mp4": "",
        "pipe.mp4": "no regular file", "round.mp4": "a link into itself", "nowhere.mp4": "no such file",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("made", "place", "says"),
    [
        ((), "none", "none: no such file or folder. Correct the path"),
        (("empty/x.txt",), "empty", "1 file, none of them a film (.mp4"),
        ((), "", "path : no path"),
        ((), "gopher://h/a.mp4", "addresses with gopher:// are not fetched. Give one of http"),
        ((), "https:///a.mp4", "no address of a file. Write https://HOST/PATH"),
        ((), "https://me:verysecret@h/a.mp4", "https://…@h/a.mp4: holds credentials, which would stand in every row"),
        ((), "https://h/a.mp4?X-Amz-Signature=verysecret", "?X-Amz-Signature=…: holds credentials"),
        (("a.pkl",), "a.pkl", "a pickle, which may run a program when it is opened: it is never opened"),
        (("t.csv",), "t.csv", "t.csv:1: the header is t.csv"),
    ],
    ids=lambda value: "",
)
def test_a_place_without_videos_is_refused(tmp_path: Path, made: tuple[str, ...], place: str, says: str) -> None:
    make(tmp_path, *made)
    said = refusal(place if "://" in place or not place else tmp_path / place)
    assert says in said and "verysecret" not in said


# Captions that are there already


def test_captions_come_along_from_every_layout_and_a_bare_folder_has_none(tmp_path: Path) -> None:
    wanted = {"a.mp4": "a box", "b.mp4": "a cone"}

    def folder(name: str) -> Path:
        return make(tmp_path / name, *wanted)

    def table(path: Path, header: tuple[str, str]) -> Path:
        with path.open("w", newline="") as file:
            csv.writer(file).writerows([header, *wanted.items()])
        return path

    table(folder("csv") / "captions.csv", ("path", "text"))
    table(folder("hf") / "metadata.csv", ("file_name", "prompt"))
    for name, text in wanted.items():
        (folder("beside") / name).with_suffix(".txt").write_text(text)
    (folder("lines") / "prompts.txt").write_text("a box\na cone\n")
    (tmp_path / "lines/videos.txt").write_text("a.mp4\nb.mp4\n")
    parquet.write_table(arrow.table({"path": list(wanted), "text": list(wanted.values())}), folder("parquet") / "t.parquet")
    for name in ("csv", "hf", "beside", "lines", "parquet"):
        assert captions(sources(tmp_path / name)) == wanted, name
    (tmp_path / "d.toml").write_text('[[directory]]\npath = "beside"\n')
    for place in ("d.toml", "parquet/t.parquet", "csv/captions.csv"):
        assert list(captions(sources(tmp_path / place)).values()) == ["a box", "a cone"], place
    assert captions(sources(folder("bare"))) == {"a.mp4": "", "b.mp4": ""}


def test_a_film_without_a_caption_and_a_caption_without_a_film_are_both_listed(tmp_path: Path) -> None:
    make(tmp_path, "a.mp4", "b.mp4")
    (tmp_path / "captions.csv").write_text("path,text\na.mp4,a box\ngone.mp4,nothing\npicture.png,a picture\n")
    assert captions(sources(tmp_path)) == {"a.mp4": "a box", "b.mp4": "", "gone.mp4": "nothing"}


def test_a_broken_table_beside_videos_is_said_and_not_passed_over(tmp_path: Path) -> None:
    make(tmp_path, "a.mp4")
    (tmp_path / "captions.csv").write_text('path,text\na.mp4,"a box\n')
    assert "captions.csv:2: the quote that opens here is never closed" in refusal(tmp_path)


def test_clips_in_tars_are_sources_of_their_own(tmp_path: Path) -> None:
    make(tmp_path / "in", "a.mp4", "a.txt")
    (tmp_path / "tars").mkdir()
    with tarfile.open(tmp_path / "tars/s.tar", "w") as shard:
        shard.add(tmp_path / "in/a.mp4", "x::1%/a.mp4")
        shard.add(tmp_path / "in/a.txt", "x::1%/a.txt")
    for place in ("tars", "tars/s.tar"):
        [source] = sources(tmp_path / place)
        assert (source.name, source.provenance.caption) == ("s.tar/x::1%/a.mp4", "a.txt")
        found = fetch(source, tmp_path / "to", Download(), halt=lambda: False)
        assert Path(found.path).read_bytes() == b"a.mp4" and found.path.endswith(".mp4")


# Lists and addresses


def test_a_list_gives_addresses_with_captions_and_clips(tmp_path: Path) -> None:
    (tmp_path / "panda.csv").write_text(
        "videoID,url,timestamp,caption\nx,https://example.org/x.mp4,\"[['0:00:01.000', '0:00:03.500']]\",\"['a box']\"\n"
    )
    [source] = sources(tmp_path / "panda.csv", index="auto", licence="research only")
    assert source == Source(
        "https://example.org/x.mp4", "x",
        Provenance("panda", "https://example.org/x.mp4", "research only", segments=((1.0, 3.5, "a box"),)),
    )  # fmt: skip
    (tmp_path / "own.csv").write_text(
        "videoid,contentUrl,name,license,title\n1,https://h/1.mp4,a box,CC0,Boxes\n2,https://h/2.mp4,a cone,,\n"
    )
    found = sources(tmp_path / "own.csv", index="auto", licence="research only")
    assert [(one.provenance.licence, one.provenance.title) for one in found] == [("CC0", "Boxes"), ("research only", "")]
    make(tmp_path / "openvid", "video_folder/a.mp4")
    (tmp_path / "openvid/OpenVid-1M.csv").write_text("video,caption,aesthetic score\na.mp4,a box,5\ngone.mp4,a cone,5\n")
    found = sources(tmp_path / "openvid/OpenVid-1M.csv", index="openvid")
    assert [(source.uri, source.provenance.caption) for source in found] == [
        (f"{tmp_path}/openvid/video_folder/a.mp4", "a box"), (f"{tmp_path}/openvid/gone.mp4", "a cone"),
    ]  # fmt: skip
    assert "no such list" in refusal(tmp_path / "none.csv", index="auto")


def test_addresses_are_taken_as_they_are(tmp_path: Path) -> None:
    [source] = sources("https://example.org/films/a%20b.mp4?size=1")
    assert source == Source(
        "https://example.org/films/a%20b.mp4?size=1", "a b.mp4",
        Provenance("a b.mp4", "https://example.org/films/a%20b.mp4?size=1"),
    )  # fmt: skip


def test_a_table_at_an_address_names_files_beside_it(tmp_path: Path) -> None:
    content = b"path,text\na.mp4,a box\nhttps://example.org/b.mp4,a cone\n"
    with served(Files({"/set/t.csv": content, "/set/a.mp4": b"film"})) as host:
        found = sources(f"{host.url}/set/t.csv")
        assert [source.uri for source in found] == [f"{host.url}/set/a.mp4", "https://example.org/b.mp4"]
        fetched = fetch(found[0], tmp_path, Download(), halt=lambda: False)
        assert Path(fetched.path).read_bytes() == b"film"


@pytest.mark.s3
def test_a_folder_of_a_bucket_is_listed_with_its_captions(tmp_path: Path, s3: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in s3.env.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", s3.endpoint)
    make(s3.root / s3.bucket / "sources", "a.mp4", "sub/b.mp4")
    (s3.root / s3.bucket / "sources/captions.csv").write_text("path,text\nsub/b.mp4,a cone\n")
    found = sources(s3.url("sources"))
    assert [(source.uri, source.name, source.provenance.caption) for source in found] == [
        (s3.url("sources/a.mp4"), "a.mp4", ""), (s3.url("sources/sub/b.mp4"), "sub/b.mp4", "a cone"),
    ]  # fmt: skip
    assert sources(s3.url("sources/a.mp4"))[0].uri == s3.url("sources/a.mp4")
    assert Path(fetch(found[1], tmp_path, Download(), halt=lambda: False).path).read_bytes() == b"sub/b.mp4"
    assert "no such folder" in refusal(s3.url("none"))
