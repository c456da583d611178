"""The page of a data set: where it is written, and what it never takes the place of."""

from __future__ import annotations

import io
import json
import logging
import shlex
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import film_clips
import pytest
from PIL import Image

from opensora import sheet
from opensora.config import DataConfig, FolderSource


@pytest.fixture
def clips(tmp_path: Path) -> Path:
    folder = film_clips.make(tmp_path / "clips")
    Image.new("RGB", (4, 4)).save(folder / "picture.png")
    (folder / "folder.png").mkdir()
    return folder


@pytest.fixture
def drawn(clips: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Calls `python -m opensora.sheet OUT` on the clips; exit code, result and stderr."""
    data = DataConfig(source=FolderSource(kind="folder", path=str(clips)), frames=8, height=16, width=16)
    monkeypatch.chdir(clips.parent)

    def call(out: str) -> tuple[int, Any, str]:
        monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(data.model_dump_json().encode())))
        code = sheet.main([out])
        said = capsys.readouterr()
        return code, json.loads(said.out or "null"), said.err

    return call


@pytest.mark.parametrize("name", ["one.mp4", "captions.csv", "picture.png", "new.jpg", "folder.png"])
def test_a_sheet_replaces_nothing_but_a_sheet(drawn: Any, clips: Path, name: str) -> None:
    before = {path.name: path.read_bytes() for path in clips.iterdir() if path.is_file()}
    code, _, said = drawn(str(clips / name))
    assert {path.name: path.read_bytes() for path in clips.iterdir() if path.is_file()} == before and name in said
    option, free = shlex.split(said.strip().rpartition("Name another file: ")[2])
    assert (code, option) == (2, "--sheet")
    for _ in range(2):  # an earlier sheet is replaced
        code, found, said = drawn(free)
        assert (code, found["shown"], said) == (0, 3, "")
    with Image.open(clips.parent / free) as page:
        assert page.format == "PNG" and page.width > 8 * 16


def test_who_draws_in_its_own_process_hears_warnings_as_before(drawn: Any) -> None:
    before = logging.root.manager.disable
    drawn("new.png")
    assert logging.root.manager.disable == before


def test_a_folder_that_is_not_there_is_said_with_what_makes_it(drawn: Any) -> None:
    code, found, said = drawn("no/such/folder/a.png")
    assert (code, found) == (2, None) and "no/such/folder/a.png: there is no folder no/such/folder. Make it: mkdir -p" in said
