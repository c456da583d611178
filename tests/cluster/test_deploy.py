"""What is deployed, on the real API server: a release's life, and that each account may do what is written and nothing else.

Roles are tried in two ways: by the API server's own list of an account's rights, and by one real call for each verb of each resource that the
server knows (changes as dry runs), whose answer must be Forbidden unless the verb is written.
"""

from __future__ import annotations

import http.client
import json
import re
import secrets
import ssl
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import yaml
from deploy.rendering import CACHE, CHART, OVERLAYS, REPOSITORY, Manifest, ci, kustomize, merged, tool
from deploy.rights import OF_DRIVER, OF_TRAINER, OF_USER, Rights

from orchestrator.cluster import ClusterProfile
from orchestrator.document import read, validate

pytestmark = pytest.mark.cluster

EVERYBODYS: Rights = {
    ("authentication.k8s.io", "selfsubjectreviews"): ("create",),
    ("authorization.k8s.io", "selfsubjectaccessreviews"): ("create",),
    ("authorization.k8s.io", "selfsubjectrulesreviews"): ("create",),
}
"""Kubernetes' own system:basic-user: who am I, what may I."""
METHODS = {
    "get": "GET", "list": "GET", "watch": "GET", "create": "POST", "update": "PUT", "patch": "PATCH",
    "delete": "DELETE", "deletecollection": "DELETE",
}  # fmt: skip
RELEASE = "osctl"


class Cluster:
    """kubectl, helm and plain HTTP on the test cluster."""

    def __init__(self) -> None:
        self.kubeconfig = CACHE / "conf/admin.kubeconfig"
        config = yaml.safe_load(self.kubeconfig.read_text())
        self.server, self.ca = config["clusters"][0]["cluster"]["server"], config["clusters"][0]["cluster"]["certificate-authority"]
        self.admin = config["users"][0]["user"]["token"]

    def kubectl(self, *words: str | Path, given: str | None = None, check: bool = True) -> str:
        return self._run("kubectl", *words, given=given, check=check)

    def helm(self, *words: str | Path, given: str | None = None, check: bool = True) -> str:
        return self._run("helm", *words, given=given, check=check)

    def _run(self, name: str, *words: str | Path, given: str | None, check: bool) -> str:
        command = [tool(name), "--kubeconfig", self.kubeconfig, *words]
        done = subprocess.run(command, input=given, capture_output=True, text=True, timeout=240)
        assert not check or done.returncode == 0, f"{name} {' '.join(map(str, words))}: {done.stderr}"
        return done.stdout if check else done.stdout + done.stderr

    def token(self, namespace: str, account: str) -> str:
        """A short-lived one, by TokenRequest."""
        return self.kubectl("-n", namespace, "create", "token", account, "--duration=10m").strip()
