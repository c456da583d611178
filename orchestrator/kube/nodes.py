"""How many nodes of a cluster could hold a pod of an attempt, whoever holds them now: what `doctor` shows, and what lets a stage shrink.

Owns which node is fit: Ready, schedulable, of the profile's labels, with taints that are tolerated and enough allocatable. Refuses to ask
who holds a node: a node that others hold is there, and waiting for it is right.

A driver looks at nodes only for stages with `min_nodes`. It needs the right to list them (k8s/nodes), which belongs to no namespace;
without it a driver works, and no stage goes on with fewer nodes.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import Any

from orchestrator.errors import Refused
from orchestrator.kube.client import Api
from orchestrator.kube.trainer_pod import requests_of
from orchestrator.recipe.cluster_profile import ClusterProfile

log = logging.getLogger(__name__)

DECIMAL = {"m": Decimal("0.001"), "": Decimal(1)} | {letter: Decimal(1000) ** power for power, letter in enumerate("kMGTP", 1)}
BINARY = {f"{letter}i": Decimal(1024) ** power for power, letter in enumerate("KMGTP", 1)}
UNITS = DECIMAL | BINARY
QUANTITY = re.compile(r"([0-9.]+(?:[eE][+-]?[0-9]+)?)([a-zA-Z]*)")


class KubeNodes:
    """`ports.NodeCounter` on a cluster."""

    def __init__(self, api: Api, profile: ClusterProfile) -> None:
        self._api, self._profile = api, profile

    def count(self, pool: str | None, devices_per_node: int) -> int:
        """How many pods of an attempt the nodes of a pool could hold at once, if nobody else held any: where a pod takes a whole node, the
        number of nodes.

        Raises Refused where this account may not list nodes; Unreachable.
        """
        profile = self._profile.in_pool(pool)
        try:
            found = of_profile(self._api, profile)
        except Refused as error:
            if "is forbidden" not in str(error):
                raise
            raise Refused("this account may not list nodes; `kubectl apply -k k8s/nodes` gives it the right") from error
        return sum(places(node, profile, requests_of(devices_per_node, profile)) for node in found)


def of_profile(api: Api, profile: ClusterProfile) -> Sequence[Mapping[str, Any]]:
    """The nodes with a profile's labels, fit or not. Raises Refused, Unreachable."""
    found, _ = api.list("nodes", ",".join(f"{key}={value}" for key, value in profile.node_selector.items()))
    return found


def places(node: Mapping[str, Any], profile: ClusterProfile, requests: Mapping[str, str]) -> int:
    """How many pods of an attempt an empty node takes: one where a pod has all of its devices; small ones share it. 0: it is not fit, or
    it is not as Kubernetes writes nodes."""
    try:
        return 0 if unfit(node, profile, requests) is not None else pods_beside(node["status"]["allocatable"], requests)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        log.warning("a node is passed over, as it is not as Kubernetes writes nodes: %s: %s", type(error).__name__, error)
        return 0


def pods_beside(allocatable: Mapping[str, str], requests: Mapping[str, str]) -> int:
    """How many pods an empty node takes."""
    return min(int(quantity(allocatable[name]) // quantity(value)) for name, value in requests.items() if quantity(value) > 0)


def unfit(node: Mapping[str, Any], profile: ClusterProfile, requests: Mapping[str, str]) -> str | None:
    """Why a pod of ours would never run there; none: it would, once the node is free."""
    metadata, spec, status = node["metadata"], node.get("spec", {}), node.get("status", {})
    if metadata.get("labels", {}).get("kubernetes.io/hostname", metadata["name"]) in profile.exclude_nodes:
        return "is excluded by the profile"
    if spec.get("unschedulable"):
        return "is cordoned"
    if not any(one["type"] == "Ready" and one["status"] == "True" for one in status.get("conditions", ())):
        return "is not ready"
    for taint in spec.get("taints", ()):
        if taint["effect"] != "PreferNoSchedule" and not _tolerated(taint, profile):
            return f"has the taint {taint['key']}={taint.get('value', '')}:{taint['effect']}, which is not tolerated"
    allocatable = status.get("allocatable", {})
    for name, value in requests.items():
        if quantity(allocatable.get(name, "0")) < quantity(value):
            return f"has {allocatable.get(name, '0')} {name}, a pod takes {value}"
    return None


def _tolerated(taint: Mapping[str, str], profile: ClusterProfile) -> bool:
    return any(
        one.key == taint["key"] and one.effect in (None, taint["effect"]) and (one.operator == "Exists" or one.value == taint.get("value"))
        for one in profile.tolerations
    )


def quantity(text: str) -> Decimal:
    """A Kubernetes quantity as a number: `500m`, `1600Gi`, `128`. Raises ValueError."""
    match = QUANTITY.fullmatch(text)
    if match is None or match[2] not in UNITS:
        raise ValueError(f"{text!r} is no quantity")
    return Decimal(match[1]) * UNITS[match[2]]
