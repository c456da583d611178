"""The binaries that render what is deployed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from deploy.rendering import tool


def _binary(name: str, require: Callable[[str, str], None]) -> Path:
    found = tool(name)
    if found is None:
        require("cluster", f"no {name}; tests/cluster/build brings kubectl and helm")
    assert found is not None
    return found


@pytest.fixture(scope="session")
def kubectl(require: Callable[[str, str], None]) -> Path:
    return _binary("kubectl", require)


@pytest.fixture(scope="session")
def helm(require: Callable[[str, str], None]) -> Path:
    return _binary("helm", require)
