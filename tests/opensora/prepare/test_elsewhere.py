"""Laws of rows on machines that have none of the engine's files."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from opensora.dataset.prepare_config import Cut, Download, Limits
from opensora.dataset.rows import Fetched, Quarantine, Source
from opensora.prepare.elsewhere import There, make_room, there
from opensora.prepare.steps import Inspect, Inspected, Measure


@dataclass(frozen=True)
class Written:
    path: str
    to: str
    source: Source | None = None
    sha256: str = ""


def fetch(source: Source, folder: Path, _settings: Download, halt: Callable[[], bool], _most: int) -> Fetched:
    assert not halt()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / source.name
    path.write_text(source.uri)
    return Fetched(source, str(path), hashlib.sha256(source.uri.encode()).hexdigest(), len(source.uri))


def copied(row: Written) -> str:
    Path(row.to).write_text(Path(row.path).read_text() * 2)
    return "done"


def inspected(row: Inspect) -> Inspected:
    return Inspected(Quarantine("seen", Path(row.path).read_text()), None)


def read(row: Measure) -> str:
    return Path(row.path).read_text()


def a_row(scratch: Path, function: Callable[..., object], row: object, data: bytes | None = None) -> There:
    return There(function, row, data, fetch, Download(), 1 << 20, str(scratch), most_bytes=10)


def test_a_source_is_fetched_and_what_was_written_comes_back(tmp_path: Path) -> None:
    back = there(a_row(tmp_path, copied, Written("", "/nowhere/at/all", Source("ftp://a", "a"))))
    assert (back.result, back.data) == ("done", b"ftp://aftp://a")
    assert not list((tmp_path / "work" / str(os.getpid())).iterdir()), "nothing of the row is left but its source"


def test_what_was_fetched_is_told_without_the_path_that_it_has_there(tmp_path: Path) -> None:
    back = there(a_row(tmp_path, inspected, Inspect("", "", (), None, Cut(), Limits(), Source("ftp://a", "a"))))
    assert isinstance(back.result.fetched, Fetched) and (back.result.fetched.path, back.result.media.detail) == ("", "ftp://a")


def test_a_source_that_has_changed_since_leaves(tmp_path: Path) -> None:
    with pytest.raises(Quarantine, match="source has changed"):
        there(a_row(tmp_path, copied, Written("", "to", Source("ftp://a", "a"), sha256="of another file")))


def test_a_file_that_is_here_alone_is_named_and_a_clips_file_comes_along(tmp_path: Path) -> None:
    nowhere = str(tmp_path / "film.mp4")
    with pytest.raises(Quarantine, match=f"not on this node.*{re.escape(nowhere)}.*by address"):
        there(a_row(tmp_path, inspected, Inspect("a", nowhere, (), None, Cut(), Limits())))
    assert there(a_row(tmp_path, read, Measure("a", nowhere, True, ""), b"a clip")).result == "a clip"


def test_the_longest_unused_sources_make_room_and_so_does_what_dead_processes_left(tmp_path: Path) -> None:
    for folder in ("sources", "work/999999999"):
        (tmp_path / folder).mkdir(parents=True)
    for age, name in enumerate("cba"):
        (tmp_path / "sources" / name).write_text("12345")
        os.utime(tmp_path / "sources" / name, (1000 - age, 1000 - age))
    (tmp_path / "work/999999999/source").touch()
    make_room(tmp_path, 10)
    assert sorted(path.name for path in (tmp_path / "sources").iterdir()) == ["b", "c"]
    assert not list((tmp_path / "work").iterdir())
