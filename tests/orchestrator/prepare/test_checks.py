"""What is refused before a video is opened, and what is not."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from opensora.dataset.left_out import LeftOut
from opensora.dataset.prepare_config import PrepareConfig
from orchestrator.errors import UsageError
from orchestrator.prepare.checks import check


@pytest.fixture
def here(tmp_path: Path) -> Path:
    for name in (
        "films/deep/a.MP4",
        "films/deep/a.txt",
        "silent/a.mp4",
        "silent/.hidden.txt",
        "tables/list.csv",
        "shards/0.tar",
        "empty/deep/notes.md",
        "empty/.hidden.mp4",
        "mine/store/a.mp4",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "model").mkdir()
    (tmp_path / "pipe").mkdir()
    os.mkfifo(tmp_path / "pipe/a.mp4")
    return tmp_path


def checked(here: Path, *paths: str, **settings: Any) -> None:
    sources = [{"path": path if "://" in path else str(here / path)} for path in paths]
    config = PrepareConfig.model_validate({"name": "x", "sources": sources, **settings})
    check(config, LeftOut([here / "mine/store"]))


def test_videos_without_any_text_are_refused_where_captions_are_to_lie_beside_them(here: Path) -> None:
    for path in ("silent", "silent/a.mp4"):
        with pytest.raises(UsageError, match=r"neither a text .* nor a table lies with the videos.*--caption-url .*or --set 'caption="):
            checked(here, path)
        checked(here, path, caption={"kind": "digits"})
        checked(here, path, "s3://bucket/not-asked")
        checked(here, path, "films")
    (here / "silent/a.txt").write_text("a film")
    checked(here, "silent")
    checked(here, "silent/a.mp4")
    (here / "silent/a.txt").write_bytes(b"\0")
    with pytest.raises(UsageError, match=r"a\.txt"):
        checked(here, "silent/a.mp4")


def test_what_may_hold_a_video_passes(here: Path) -> None:
    (here / "model/config.json").touch()
    model = str(here / "model")
    checked(
        here, "films", "films/deep/a.MP4", "tables", "tables/list.csv", "shards", "pipe", "s3://bucket/not-asked", filter={"scores": model}
    )
    checked(here, "films", caption={"kind": "llava", "path": model})
    checked(here, "films", caption={"kind": "server", "url": "http://127.0.0.1:1/v1", "model": "m"})


@pytest.mark.parametrize(
    ("path", "settings", "said"),
    [
        ("nope", {}, r"sources\[1\]: .*nope: no such file or folder. Correct the path"),
        ("empty", {}, r"sources\[1\]: .*empty: no video .* lies in it. Give a folder that holds videos"),
        ("mine", {}, r"no video .* lies in it"),
        (
            "films",
            {"caption": {"kind": "server", "url": "foo", "model": "m"}},
            "caption.url is no address. Write it as http://host:8000/v1",
        ),
        ("films", {"caption": {"kind": "server", "url": "http://", "model": "m"}}, "caption.url is no address"),
        ("films", {"caption": {"kind": "server", "url": "ftp://host/v1", "model": "m"}}, "caption.url is no address"),
        ("films", {"caption": {"kind": "llava", "path": "/nonexist"}}, "caption.path /nonexist: no such folder"),
        ("films", {"filter": {"scores": "/nonexist"}}, "filter.scores /nonexist: no such folder"),
        ("films", {"filter": {"rules": [{"column": "moton", "min": 1}]}}, r"filter.rules\[0\]: no column moton. Is motion meant\? There"),
    ],
)
def test_what_cannot_become_a_data_set_is_refused(here: Path, path: str, settings: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        checked(here, "films", path, **settings)


@pytest.mark.parametrize("path", ["", " ", "a\0b"])
def test_a_source_has_a_path(path: str) -> None:
    config = PrepareConfig.model_validate({"name": "x", "sources": [{"path": path}]})
    with pytest.raises(UsageError, match=r"sources\[0\]: .*path is empty. Give a file, a folder or an address"):
        check(config, LeftOut())


def test_a_list_is_a_file_and_a_model_is_a_folder_of_one(here: Path) -> None:
    config = PrepareConfig.model_validate({"name": "x", "sources": [{"path": str(here / "films"), "index": "webvid"}]})
    with pytest.raises(UsageError, match="no such list"):
        check(config, LeftOut())
    with pytest.raises(UsageError, match=r"no config.json is in it"):
        checked(here, "films", filter={"scores": str(here / "model")})
