"""Finds the pods that objects are or would make, and what this project asks of them beyond Pod Security "restricted" (pod_security.py).

Checkers that look for Pods see nothing inside a PyTorchJob or a Deployment; `pods` finds them wherever they lie.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any


def pods(manifest: Any, path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """(where, {metadata, spec}) of every pod that an object is or would make, however deep it lies."""
    if isinstance(manifest, dict):
        if manifest.get("kind") == "Pod":
            yield path or "Pod", manifest
        for key, value in manifest.items():
            if key == "template" and isinstance(value, dict) and "containers" in (value.get("spec") or {}):
                yield f"{path}.template", {"metadata": value.get("metadata", {}), "spec": value["spec"]}
            else:
                yield from pods(value, f"{path}.{key}")
    elif isinstance(manifest, list):
        for number, item in enumerate(manifest):
            yield from pods(item, f"{path}[{number}]")


def weaknesses(pod: dict[str, Any], *, token: bool = False) -> list[str]:
    """What "restricted" allows and this project does not. `token`: the pod is one that may talk to the API."""
    spec, found = pod["spec"], []
    if spec.get("automountServiceAccountToken") is not token:
        found.append(f"automountServiceAccountToken is not {str(token).lower()}")
    if spec.get("enableServiceLinks") is not False:
        found.append("enableServiceLinks: Services become environment variables")
    for container in [*spec.get("initContainers", []), *spec["containers"]]:
        name = container["name"]
        if container.get("securityContext", {}).get("readOnlyRootFilesystem") is not True:
            found.append(f"{name}: its root file system is writable")
        resources = container.get("resources", {})
        if not {"cpu", "memory"} <= set(resources.get("requests", {})):
            found.append(f"{name}: requests no CPU or memory, and a quota would refuse it")
        if "memory" not in resources.get("limits", {}):
            found.append(f"{name}: no memory limit")
        found += [
            f"{name}: {variable['name']} holds a credential by value"
            for variable in container.get("env", [])
            if "value" in variable and any(word in variable["name"] for word in ("SECRET", "PASSWORD", "TOKEN", "ACCESS_KEY"))
        ]
    found += [
        f"volume {volume['name']}: an emptyDir without a limit"
        for volume in spec.get("volumes", [])
        if "emptyDir" in volume and "sizeLimit" not in volume["emptyDir"]
    ]
    return found
