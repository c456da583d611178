"""What needs no run: tests/e2e/test_readme.py exports a committed stage, tests/opensora/export opens what was exported."""

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


@pytest.mark.parametrize("command", [["export", "out"], ["sample", "a digit"]])
def test_a_stage_that_the_pipeline_lacks_is_answered_with_those_it_has(osctl: Osctl, command: list[str]) -> None:
    refused = osctl(*command, "--stage", "stage9", expect=2).stderr
    assert f"{command[0]} stage9: tiny has no such stage; it has stage1" in refused
    assert "osctl launch" not in refused and "osctl resume" not in refused  # which would be refused as well


@pytest.mark.parametrize("options", [["--format", "onnx"], ["--weights", "best"], ["--dtype", "int4"]])
def test_an_unknown_form_is_a_wrong_command(osctl: Osctl, options: list[str]) -> None:
    assert options[1] in osctl("export", "out", *options, expect=2).stderr
