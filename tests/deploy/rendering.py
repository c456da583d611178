"""Runs `kubectl kustomize` and `helm template`, and gives back objects as plain data."""

from __future__ import annotations

import copy
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import yaml

REPOSITORY = Path(__file__).parent.parent.parent
CHART = REPOSITORY / "helm/osctl"
OVERLAYS = REPOSITORY / "k8s/overlays"
CACHE = Path(os.environ.get("OSCTL_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "osctl") / "cluster"

Manifest = dict[str, Any]


def tool(name: str) -> Path | None:
    """kubectl or helm, of the test cluster's cache or of the machine."""
    found = shutil.which(name, path=f"{CACHE / 'bin'}{os.pathsep}{os.environ.get('PATH', '')}")
    return Path(found) if found else None


def ci(name: str) -> Manifest:
    """Values of a site, as CI installs them."""
    values: Manifest = yaml.safe_load((CHART / "ci" / f"{name}.yaml").read_text())
    return values


def merged(values: Manifest, changes: Manifest) -> Manifest:
    """`values` with `changes` laid over; lists are replaced."""
    result = copy.deepcopy(values)
    for key, value in changes.items():
        result[key] = merged(result[key], value) if isinstance(value, dict) and isinstance(result.get(key), dict) else value
    return result


def helm_template(helm: Path, values: Manifest, namespace: str = "osctl") -> subprocess.CompletedProcess[str]:
    """With `values` on its standard input."""
    command = [helm, "template", "osctl", CHART, "--namespace", namespace, "--values", "-"]
    return subprocess.run(command, input=yaml.safe_dump(values), capture_output=True, text=True, timeout=60)


def chart(helm: Path, values: Manifest, namespace: str = "osctl") -> list[Manifest]:
    rendered = helm_template(helm, values, namespace)
    assert rendered.returncode == 0, rendered.stderr
    return [manifest for manifest in yaml.safe_load_all(rendered.stdout) if manifest]


def kustomize(kubectl: Path, folder: Path) -> list[Manifest]:
    rendered = subprocess.run([kubectl, "kustomize", folder], capture_output=True, text=True, timeout=60)
    assert rendered.returncode == 0, rendered.stderr
    return [manifest for manifest in yaml.safe_load_all(rendered.stdout) if manifest]


def plain(manifest: Manifest) -> Manifest:
    """An object without what says who installed it: standard labels, and the namespace where it is the release's own."""
    result = copy.deepcopy(manifest)
    metadata = result["metadata"]
    labels = {key: value for key, value in metadata.pop("labels", {}).items() if not key.startswith(("app.kubernetes.io/", "helm.sh/"))}
    metadata.pop("namespace", None)
    if labels:
        metadata["labels"] = labels
    return result


def identity(manifest: Manifest) -> tuple[str, str]:
    return manifest["kind"], manifest["metadata"]["name"]
