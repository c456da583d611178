"""Which file is meant by a path, a folder, a name, or by nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from orchestrator.errors import UsageError
from orchestrator.recipe.files import find, shipped


def test_the_shipped_pipelines_are_the_demo_and_open_sora() -> None:
    assert set(shipped()) == {"demo", "demo-videos", "open-sora-1.0"}


def test_without_a_name_the_local_file_comes_before_the_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert find(None) == shipped()["demo"]
    (tmp_path / "osctl.yaml").write_text("")
    assert find(None) == Path("osctl.yaml")


def test_a_file_a_folder_and_a_shipped_name_are_found(recipe: Path) -> None:
    assert find("pipeline.yaml") == Path("pipeline.yaml")
    assert find(".") == Path("pipeline.yaml")
    assert find("open-sora-1.0") == shipped()["open-sora-1.0"]
    Path("demo").mkdir()
    assert find("demo") == shipped()["demo"], "an empty folder hides no shipped name"
    Path("demo/osctl.yaml").write_text("")
    assert find("demo") == Path("demo/osctl.yaml")


def test_what_is_not_found_is_answered_with_the_closest_name(recipe: Path) -> None:
    with pytest.raises(UsageError) as caught:
        find("open-sora-1")
    assert str(caught.value) == "open-sora-1: no such file, folder or shipped pipeline. Did you mean 'open-sora-1.0'?"
    Path("empty").mkdir()
    with pytest.raises(UsageError) as caught:
        find("empty")
    assert str(caught.value) == "empty: a folder without pipeline.yaml or osctl.yaml. Name the pipeline file in it"


def test_a_folder_of_clips_hides_no_pipeline_of_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bikes").mkdir()
    assert find("bikes", missing_ok=True) is None, "it may be in the store"
    with pytest.raises(UsageError, match=r"a folder without pipeline\.yaml"):
        find("bikes")
