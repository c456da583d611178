"""Which operators a cluster has, which one osctl uses there and why, and whether its pods run.

Owns what is known of an operator's installation: the kinds that it brings, where it is commonly installed, the command that installs it.
Refuses to know how an attempt's objects look (`kube.operator`) and what holds them back (`kueue_checks`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from orchestrator.errors import NotFound, Refused
from orchestrator.pipelines.cluster_checks import NotChecked, missing_ray_rights, serves_rayjobs

if TYPE_CHECKING:
    from orchestrator.kube.client import Api
    from orchestrator.recipe.cluster_profile import ClusterProfile


@dataclass(frozen=True)
class Installation:
    """An operator as an administrator installs it."""

    name: str
    """As `kube.operator` and a profile call it."""
    said: str
    kinds: tuple[tuple[str, str], ...]
    """(path of the API, plural) of each kind that an attempt needs."""
    deployments: tuple[tuple[str, str], ...]
    """(namespace, name), where its own manifests put them."""
    install: str
    """Command of an administrator."""


V1 = Installation(
    "pytorchjob",
    "PyTorchJob (training operator, v1)",
    (("/apis/kubeflow.org/v1", "pytorchjobs"),),
    (("kubeflow", "training-operator"),),
    "kubectl apply --server-side -k k8s/operator",
)
V2 = Installation(
    "trainjob",
    "TrainJob (Trainer v2)",
    (
        ("/apis/trainer.kubeflow.org/v1alpha1", "trainjobs"),
        ("/apis/trainer.kubeflow.org/v1alpha1", "trainingruntimes"),
        ("/apis/jobset.x-k8s.io/v1alpha2", "jobsets"),
    ),
    (("kubeflow-system", "kubeflow-trainer-controller-manager"), ("jobset-system", "jobset-controller-manager")),
    "kubectl apply --server-side -k k8s/trainer",
)
KNOWN = (V1, V2)


def used(api: Api, profile: ClusterProfile) -> Installation:
    """The operator that a launch with this profile uses. Raises Refused where the cluster has none that osctl can use; Unreachable."""
    from orchestrator.kube.operator import OPERATORS

    there = _there(api)
    usable = [one for operator in OPERATORS for one in there if one.name == operator.name]
    if not there:
        raise Refused(f"the cluster serves neither {V1.said} nor {V2.said}, so that nobody would make an attempt's pods")
    if not usable:
        raise Refused(f"the cluster serves {_names(there)}, which osctl cannot use")
    wanted = next((one for one in KNOWN if one.name == profile.operator), usable[0])
    if wanted not in usable:
        raise Refused(f"the profile says operator: {wanted.name}, and the cluster serves {_names(there)}; install it, or say auto")
    return wanted


def operators(api: Api, profile: ClusterProfile) -> str:
    """What is served, and what is used. Raises Refused, Unreachable."""
    chosen, there = used(api, profile), _there(api)
    if len(there) == 1:
        return f"the cluster serves {chosen.said} alone, and osctl uses it"
    why = "which comes first where both are there" if profile.operator == "auto" else "as the profile says"
    return f"the cluster serves {_names(there)}; osctl uses {chosen.said}, {why}"


def available(api: Api, operator: Installation | None) -> str:
    """Whether its pods run where it is commonly installed; under another name they are not found, which says nothing."""
    if operator is None:
        raise NotChecked("there is none")
    images = []
    for namespace, name in operator.deployments:
        try:
            found = api.ask(f"/apis/apps/v1/namespaces/{namespace}/deployments/{name}")
        except NotFound:
            raise NotChecked(f"no Deployment {name} in namespace {namespace}; it may be called otherwise") from None
        image = found["spec"]["template"]["spec"]["containers"][0]["image"]
        if not found.get("status", {}).get("availableReplicas"):
            raise Refused(
                f"Deployment {name} in namespace {namespace} ({image}) has no pod that is available; jobs would be made, and wait"
            )
        images.append(image)
    return f"{' and '.join(images)}: available"


def mend() -> str:
    """What to install, as a command."""
    from orchestrator.kube.operator import OPERATORS

    usable = [one.install for one in KNOWN if one.name in [operator.name for operator in OPERATORS]]
    return f"an administrator installs it (k8s/operator/README.md): {', or '.join(usable)}"


def serves(api: Api, path: str, plural: str) -> bool:
    """Whether the API server knows a kind, whoever acts on it. Raises Unreachable, Refused."""
    try:
        return any(one["name"] == plural for one in api.ask(path)["resources"])
    except NotFound:
        return False


def kuberay(api: Api) -> str:
    """Whether raw videos can be prepared on many pods. Raises NotChecked where they cannot: training needs none of it; Unreachable."""
    if not serves_rayjobs(api):
        raise NotChecked("KubeRay is not installed; raw videos are prepared in one pod: osctl prepare run --cluster --engine inline")
    if missing := missing_ray_rights(api):
        told = f"the cluster serves RayJobs (KubeRay), and in namespace {api.namespace} you may not: {', '.join(missing)}"
        raise NotChecked(f"{told}. osctl prepare run --engine ray needs it; the Role of k8s/ or of the chart has it")
    return "the cluster serves RayJobs (KubeRay), for osctl prepare run --cluster --engine ray"


def _there(api: Api) -> list[Installation]:
    return [one for one in KNOWN if all(serves(api, path, plural) for path, plural in one.kinds)]


def _names(there: list[Installation]) -> str:
    return " and ".join(one.said for one in there)
