"""The test cluster as a benchmark sees it: its environment, its kubectl, and namespaces that are gone afterwards."""

from __future__ import annotations

import os
import secrets
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from conftest import Cluster

HOME = Path(os.environ.get("OSCTL_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "osctl") / "cluster"
S3 = dict(line.split("=", 1) for line in (HOME / "conf/s3.env").read_text().splitlines())
CLUSTER = Cluster(kubeconfig=HOME / "conf/admin.kubeconfig", bin=HOME / "bin", bucket="osctl", s3=S3)
KUBECTL = str(HOME / "bin/kubectl")


def environment(compiled: Path) -> dict[str, str]:
    """What a person's osctl and kubectl need. `compiled`: where Python keeps what it compiles, as it does on anybody's machine."""
    kept = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
    where = {
        "PYTHONPATH": str(Path(__file__).parents[1]),
        "PYTHONPYCACHEPREFIX": str(compiled),
    }  # this tree's code, wherever it is installed
    return kept | S3 | where | {"KUBECONFIG": str(CLUSTER.kubeconfig), "COLUMNS": "200"}


@contextmanager
def namespace() -> Iterator[str]:
    name = f"bench-{secrets.token_hex(4)}"
    CLUSTER.kubectl("create", "namespace", name)
    try:
        CLUSTER.kubectl("-n", name, "create", "serviceaccount", "osctl-trainer")
        yield name
    finally:
        for kind in ("jobs", "pytorchjobs"):
            CLUSTER.kubectl("-n", name, "delete", kind, "--all", "--wait=false", timeout_s=300)
        CLUSTER.kubectl("-n", name, "delete", "pods", "--all", "--wait=false", "--grace-period=0", "--force", timeout_s=300)
        CLUSTER.kubectl("delete", "namespace", name, "--wait=false")


def peer(name: str, *words: str, env: dict[str, str]) -> subprocess.Popen[str]:
    """kubectl in a namespace, beside us; its lines on stdout."""
    command = [KUBECTL, "-n", name, *words]
    return subprocess.Popen(command, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
