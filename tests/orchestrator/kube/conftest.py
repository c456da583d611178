"""What several files of tests of this room begin with: a published profile, an API server in memory, a client of it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import manifest_specs
import pytest
from fake_api_server import FakeApiServer, serve

from orchestrator.kube import watch
from orchestrator.kube.client import Api
from orchestrator.recipe.cluster_profile import ClusterProfile


@pytest.fixture
def profile() -> ClusterProfile:
    return manifest_specs.h800()


@pytest.fixture
def server() -> Iterator[FakeApiServer]:
    """An API server in memory."""
    with serve() as fake:
        yield fake


@pytest.fixture
def api(server: FakeApiServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Api]:
    """A client of it, found by a kubeconfig; watches of it pause for a moment alone."""
    one = [{"name": "one", "context": {"cluster": "c", "user": "u"}}]
    content = {"current-context": "one", "contexts": one, "clusters": [{"name": "c", "cluster": {"server": server.url}}]}
    (tmp_path / "kubeconfig").write_text(json.dumps({**content, "users": [{"name": "u", "user": {"token": "t"}}]}))
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "kubeconfig"))
    monkeypatch.setattr(watch, "PAUSE_S", 0.02)
    monkeypatch.setattr(watch, "REFUSED_PAUSE_S", 0.02)
    api = Api.connect(None, "osctl")
    yield api
    api.close()
