"""A name stands for its sources: another folder of the same name does not take it without a word."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from prepare_bench import Bench

from opensora.dataset.prepare_config import Given
from orchestrator.errors import Refused, RunFailed
from orchestrator.prepare import same_name
from orchestrator.prepare.run import Preparation, Prepared


def run(bench: Bench, *words: str, replace: bool = False, **settings: Any) -> Prepared:
    asked = dataclasses.replace(bench.asked(*words, **settings), replace=replace)
    return Preparation(asked, say=bench.said.append, clock=bench.clock).run()


@pytest.fixture
def other(tmp_path: Path) -> tuple[Given, ...]:
    folder = tmp_path / "other/videos"
    folder.mkdir(parents=True)
    (folder / "z.mp4").write_bytes(b"film z")
    return (Given(path=str(folder)),)


def test_other_sources_are_refused_with_both_places_and_nothing_of_the_set_is_touched(bench: Bench, other: tuple[Given, ...]) -> None:
    run(bench)
    before = {path: path.stat().st_mtime_ns for path in bench.directory().path.rglob("*") if path.is_file()}
    with pytest.raises(Refused) as caught:
        run(bench, sources=other)
    said = str(caught.value)
    assert str(bench.videos) in said and other[0].path in said and "--name OTHER" in said and "--replace" in said
    assert {path: path.stat().st_mtime_ns for path in bench.directory().path.rglob("*") if path.is_file()} == before
    assert run(bench).nothing_to_do
    assert run(bench, sources=other, replace=True).published is not None
    with pytest.raises(Refused, match=r"is made of .*other/videos"):
        run(bench)


def test_more_sources_a_folder_above_or_below_and_a_link_are_the_same_set(bench: Bench, other: tuple[Given, ...], tmp_path: Path) -> None:
    mine = Given(path=str(bench.videos))
    (tmp_path / "link").symlink_to(bench.videos)
    run(bench)
    for sources in ((mine, *other), (Given(path=str(tmp_path / "link")),), (Given(path=str(bench.videos / "a.mp4")),), (mine,)):
        assert run(bench, sources=sources).published is not None
    assert same_name.overlap(["s3://b/a/"], ["s3://b/a"]) and not same_name.overlap(["s3://b/a"], ["s3://b/ab"])
    assert same_name.overlap(["/a"], ["/a/b"]) and same_name.overlap(["/a/b"], ["/a"]) and not same_name.overlap(["/a"], ["/ab"])


def test_a_failed_try_takes_no_name(bench: Bench, other: tuple[Given, ...]) -> None:
    with pytest.raises(RunFailed):
        run(bench, "--fail", "data", sources=other)
    assert run(bench).published is not None


def test_whoever_follows_is_told_that_other_sources_are_prepared(bench: Bench, other: tuple[Given, ...]) -> None:
    run(bench)
    same_name.check_followed(bench.store, bench.asked().config)
    with pytest.raises(Refused, match=r"what somebody prepares under this name is made of .*videos, and this is .*other/videos"):
        same_name.check_followed(bench.store, bench.asked(sources=other).config)
