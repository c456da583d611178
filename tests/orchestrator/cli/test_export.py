"""What needs no run: tests/e2e/test_three_stages.py exports a committed stage, tests/opensora/test_export.py opens what was exported."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_recipe import Osctl, write


@pytest.fixture
def osctl(tmp_path: Path) -> Osctl:
    return Osctl(write(tmp_path / "recipe"))


@pytest.mark.parametrize("stage", [None, "stage2"])
def test_before_a_commit_there_is_nothing_to_export(osctl: Osctl, stage: str | None) -> None:
    refused = osctl("export", "out", *(["--stage", stage] if stage else []), expect=4).stderr
    assert f"export {stage or 'tiny'}: nothing is committed to export" in refused
    assert f"osctl launch{f' {stage}' if stage else ''}" in refused
    assert not (osctl.folder / "out").exists()


@pytest.mark.parametrize("options", [["--format", "onnx"], ["--weights", "best"], ["--dtype", "int4"]])
def test_an_unknown_form_is_a_wrong_command(osctl: Osctl, options: list[str]) -> None:
    assert options[1] in osctl("export", "out", *options, expect=2).stderr
