"""Laws of what Ray is started with. Nothing here starts it."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from opensora.dataset.prepare_config import PrepareConfig
from opensora.errors import ConfigError
from opensora.prepare.ray import opened
from opensora.prepare.steps import Steps

CONFIG: dict[str, Any] = {"name": "tiny", "sources": [{"path": "films"}]}


def test_without_its_package_it_is_one_line_that_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"engine ray: .*pip install 'osctl\[ray\]'"):
        opened.pool(PrepareConfig.model_validate(CONFIG), tmp_path, Steps(), 2, lambda: False)


def test_the_engine_does_not_import_ray() -> None:
    code = "import sys; from opensora.prepare import engine; from opensora.prepare.ray import opened; assert 'ray' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_names_of_rays_sockets_are_short_and_nothing_of_a_killed_run_is_left(tmp_path: Path) -> None:
    deep = tmp_path / ("long" * 20)
    deep.mkdir()
    first = Path(opened._folder(deep))
    assert len(str(first)) <= opened.LONGEST and first.is_dir()
    second = Path(opened._folder(deep))
    assert not first.exists() and second.is_dir()
    second.rmdir()


def test_nodes_share_files_only_where_ray_is_started_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def shares(**ray: Any) -> bool:
        config = PrepareConfig.model_validate(CONFIG | {"ray": ray})
        return opened.pool(config, tmp_path, Steps(), 2, lambda: False).shares_files

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert shares() and not shares(address="auto") and shares(address="auto", shared_files=True)
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:6379")
    assert not shares()
