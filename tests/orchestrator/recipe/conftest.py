from __future__ import annotations

from pathlib import Path

import pytest
from small_recipe import PIPELINE, STAGE


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working recipe in the working directory."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pipeline.yaml").write_text(PIPELINE)
    for name in ("stage1", "stage2"):
        (tmp_path / f"{name}.yaml").write_text(STAGE)
    return Path("pipeline.yaml")
