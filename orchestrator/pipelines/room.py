"""Whether a cluster has room for a gang: what its quotas leave, and what its nodes could take if they were empty."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import TYPE_CHECKING, Any

from orchestrator.errors import Refused

if TYPE_CHECKING:
    from orchestrator.kube.client import Api
    from orchestrator.recipe.cluster_profile import ClusterProfile
    from orchestrator.recipe.pipeline import Stage


def quota(api: Api, stage: Stage, job: Mapping[str, Any], operator: str) -> str:
    """Raises Refused where a quota has too little left for a stage's pods; Unreachable. `operator` is the name of the one that is used."""
    from orchestrator.kube.manifest import pods
    from orchestrator.kube.nodes import quantity
    from orchestrator.kube.operator import BY_NAME

    quotas, _ = api.list("resourcequotas")
    needs = {**_needs(pods(job)), **{f"count/{plural}.{group}": Decimal(1) for group, plural, _ in BY_NAME[operator].rights}}
    tight = []
    for one in quotas:
        status = one.get("status") or {}
        hard, used = status.get("hard") or {}, status.get("used") or {}
        for name, need in needs.items():
            if name in hard and need > (free := quantity(hard[name]) - quantity(used.get(name, "0"))):
                tight.append(f"{one['metadata']['name']}: {name}: {stage.name} needs {need:f}, {free:f} of {hard[name]} are free")
    if tight:
        raise Refused("; ".join(tight))
    names = ", ".join(one["metadata"]["name"] for one in quotas)
    return f"room in {names} for {stage.name}" if quotas else "none in this namespace"


def _needs(pods: Sequence[Mapping[str, Any]]) -> dict[str, Decimal]:
    """What a quota counts of these pods."""
    from orchestrator.kube.nodes import quantity

    needs: dict[str, Decimal] = {"pods": Decimal(len(pods)), "count/pods": Decimal(len(pods))}
    for pod in pods:
        for container in pod["spec"]["containers"]:
            for name, value in container["resources"]["requests"].items():
                names = (name, f"requests.{name}") if name in ("cpu", "memory", "ephemeral-storage") else (f"requests.{name}",)
                for key in names:
                    needs[key] = needs.get(key, Decimal(0)) + quantity(value)
            for name, value in container["resources"]["limits"].items():
                needs[f"limits.{name}"] = needs.get(f"limits.{name}", Decimal(0)) + quantity(value)
    return needs


def nodes(api: Api, profile: ClusterProfile, stage: Stage, job: Mapping[str, Any]) -> str:
    """Raises Refused where a stage's pods never fit at once; Unreachable. Who holds the nodes now is not asked."""
    from orchestrator.kube.manifest import pods
    from orchestrator.kube.nodes import of_profile, pods_beside, unfit

    wanted = pods(job)
    requests = wanted[0]["spec"]["containers"][0]["resources"]["requests"]
    found = of_profile(api, profile)
    room, fitting, reasons = 0, 0, []
    for node in found:
        why = unfit(node, profile, requests)
        if why is None:
            fitting += 1
            room += pods_beside(node["status"]["allocatable"], requests)
        else:
            reasons.append(f"{node['metadata']['name']}: {why}")
    if room < len(wanted):
        several = f"; {reasons[0]}" + (f" (and {len(reasons) - 1} more)" if len(reasons) > 1 else "") if reasons else ""
        raise Refused(
            f"{stage.name} needs {len(wanted)} pods at once, {fitting} of {len(found)} nodes that match the selector are fit, "
            f"with room for {room}{several}"
        )
    return f"room for {room} pods on {fitting} fit nodes, {stage.name} needs {len(wanted)}; who holds them now is not looked at"
