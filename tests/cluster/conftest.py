"""What tests of the backend and its driver on the cluster begin with."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cluster.kube_rig import allow_trainers, client, folder_ledger

from orchestrator.kube.client import Api
from orchestrator.ledger.store import Ledger


@pytest.fixture
def api(cluster: Any, namespace: str) -> Iterator[Api]:
    """A client for the test's namespace, in which trainers may be made."""
    with client(cluster.kubeconfig, namespace) as api:
        allow_trainers(api)
        yield api


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return folder_ledger(tmp_path)
