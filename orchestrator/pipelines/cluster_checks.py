"""What a cluster has to have for a launch: scheduler, rights, accounts, secret, claims. Each returns what it found.

Each raises Refused or NotFound where it is not there, NotChecked where this person cannot see it, and Unreachable.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from orchestrator.errors import NotFound, Refused

if TYPE_CHECKING:
    from orchestrator.kube.client import Api
    from orchestrator.recipe.cluster_profile import ClusterProfile
    from orchestrator.recipe.pipeline import Stage

RIGHTS: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("batch", "jobs", ("get", "list", "watch", "create", "delete")),
    ("", "pods", ("get", "list", "watch", "delete")),
    ("", "pods/log", ("get",)),
    ("", "events", ("get", "list", "watch")),
    ("", "resourcequotas", ("get", "list")),
)
"""What a person needs with every operator, with and without Kueue: a part of the Role `osctl-user` of k8s/base."""
RAY_RIGHTS = (("ray.io", "rayjobs", ("get", "list", "watch", "create", "delete")),)
"""For `osctl prepare run --engine ray --cluster`, where KubeRay is there."""
PREPARE_RIGHTS = (("batch", "jobs", ("get", "list", "create", "delete")), ("ray.io", "rayjobs", ("get", "list", "create", "delete")))
"""What a driver needs for a recipe with `prepare:`: of RayJobs where KubeRay is there."""
KUEUE_RIGHTS = (
    ("kueue.x-k8s.io", "workloads", ("get", "list", "watch")),
    ("kueue.x-k8s.io", "localqueues", ("get", "list", "watch")),
    ("visibility.kueue.x-k8s.io", "localqueues/pendingworkloads", ("get",)),
)


class NotChecked(Exception):
    """This person or this place cannot see it."""


def namespace(api: Api) -> str:
    labels = api.get("namespaces", api.namespace)["metadata"].get("labels", {})
    enforced = labels.get("pod-security.kubernetes.io/enforce", "nothing")
    return f"{api.namespace} is there, and enforces {enforced}"


def kind(api: Api, group: str, kind: str) -> str:
    try:
        kinds = {one["name"] for one in api.ask(group)["resources"]}
    except NotFound:
        kinds = set()
    if kind not in kinds:
        raise Refused(f"the cluster knows no {kind} of {group.removeprefix('/apis/')}")
    return f"{kind} of {group.removeprefix('/apis/')}"


def gang(api: Api, profile: ClusterProfile) -> str:
    if profile.queue == "kueue":
        return "not used: Kueue admits all pods of an attempt, or none"
    found = kind(api, "/apis/scheduling.x-k8s.io/v1alpha1", "podgroups")
    return f"{found}; that {profile.scheduler or 'the default scheduler'} acts on it shows only with a job"


def node_count(api: Api, profile: ClusterProfile, stage: Stage, order: Sequence[str]) -> str:
    """How many nodes a stage that may go on with fewer finds now. Raises Refused where this person, or the driver, may not see nodes."""
    from orchestrator.kube.nodes import KubeNodes

    counter, devices = KubeNodes(api, profile), stage.spec.resources.devices_per_node
    counts = [(name, counter.count(name, devices)) for name in order or (None,)]
    found = ", ".join(f"pool {name} has {count}" if name else f"there are {count}" for name, count in counts)
    return f"{found} of {stage.spec.resources.nodes} nodes for {stage.name}"


def _of_operators(api: Api, operator: str) -> tuple[tuple[str, str, tuple[str, ...]], ...]:
    """What the operator that is used needs. Of the others that the cluster serves, only their jobs: an attempt may be one."""
    from orchestrator.kube import discovery
    from orchestrator.kube.operator import BY_NAME

    used = BY_NAME[operator]
    others = [one.rights[0] for one in discovery.served(api) if one is not used]
    return (*used.rights, *others)


def rights(api: Api, profile: ClusterProfile, operator: str) -> str:
    """`operator` is the name of the one that is used."""
    rights = (*RIGHTS, *_of_operators(api, operator), *(KUEUE_RIGHTS if profile.queue == "kueue" else ()))
    missing = [
        f"{verb} {resource}{f'.{group}' if group else ''}"
        for group, resource, verbs in rights
        for verb in verbs
        if not api.can_i(verb, group, resource)
    ]
    if missing:
        raise Refused(f"in namespace {api.namespace} you may not: {', '.join(missing)}")
    return f"all {sum(len(verbs) for _, _, verbs in rights)} that are needed in namespace {api.namespace}"


def driver_rights(api: Api, profile: ClusterProfile, operator: str) -> str:
    """What the Roles of this namespace give to the driver's account. Others (a ClusterRole) are not looked into."""
    account = profile.driver_service_account
    given: set[tuple[str, str, str]] = set()
    for binding in api.list("rolebindings")[0]:
        subjects = binding.get("subjects") or ()
        if not any(one["kind"] == "ServiceAccount" and one["name"] == account for one in subjects):
            continue
        if binding["roleRef"]["kind"] != "Role":
            raise NotChecked(f"{account} has the ClusterRole {binding['roleRef']['name']}, which is not looked into")
        for rule in api.get("roles", binding["roleRef"]["name"]).get("rules") or ():
            given |= set(itertools.product(rule.get("apiGroups", ()), rule.get("resources", ()), rule["verbs"]))
    rights = (*RIGHTS, *_of_operators(api, operator), *(KUEUE_RIGHTS if profile.queue == "kueue" else ()))
    needed = {(group, resource, verb) for group, resource, verbs in rights if resource != "jobs" for verb in verbs}
    if missing := sorted(f"{verb} {resource}" for group, resource, verb in needed - given):
        raise Refused(f"{account} may not: {', '.join(missing)}")
    kinds = PREPARE_RIGHTS if serves_rayjobs(api) else PREPARE_RIGHTS[:1]
    lacks = [f"{verb} {resource}" for group, resource, verbs in kinds for verb in verbs if (group, resource, verb) not in given]
    but = f", but for a recipe with `prepare:`: it may not {', '.join(lacks)}" if lacks else ""
    return f"{account} has what a driver needs{but}"


def accounts(api: Api, profile: ClusterProfile) -> str:
    names = (profile.service_account, profile.driver_service_account)
    for name in names:
        api.get("serviceaccounts", name)
    return f"{' and '.join(names)} are there"


def secret(api: Api, profile: ClusterProfile) -> str:
    from orchestrator.kube.parts import CREDENTIALS

    if profile.s3_secret is None:
        return "none is named: the service accounts' own identity is used"
    if not api.can_i("get", "", "secrets"):
        raise NotChecked(f"you may not read secrets of namespace {api.namespace}, which is as it should be; {profile.s3_secret} is named")
    keys = api.ask(f"/api/v1/namespaces/{api.namespace}/secrets/{profile.s3_secret}").get("data") or {}
    missing = [key for key, optional in CREDENTIALS.items() if not optional and key not in keys]
    if missing:
        raise Refused(f"{profile.s3_secret} lacks {', '.join(missing)}")
    return f"{profile.s3_secret} has the keys that are needed"


def priority(api: Api, profile: ClusterProfile) -> str:
    if profile.priority_class is None:
        return "none is named"
    found = api.get("priorityclasses", profile.priority_class)
    return f"{profile.priority_class}: {found['value']}"


def volumes(api: Api, profile: ClusterProfile) -> str:
    for volume in profile.volumes:
        claim = api.get("persistentvolumeclaims", volume.claim)
        phase, storage = claim.get("status", {}).get("phase"), claim["spec"].get("storageClassName")
        if phase != "Bound":
            raise Refused(f"claim {volume.claim} is {phase}, of storage class {storage or 'none'}")
    return f"{', '.join(volume.claim for volume in profile.volumes)}: bound" if profile.volumes else "none are named"


def admission(api: Api, operator: str, objects: list[dict[str, Any]]) -> str:
    """An attempt's objects themselves, as a dry run: schema, webhooks and quotas say what they would say."""
    from orchestrator.kube.faults import AlreadyExists
    from orchestrator.kube.operator import BY_NAME

    kind = BY_NAME[operator]
    for one in objects:
        try:
            api.create(kind.plurals[one["kind"]], one, dry_run=True)
        except AlreadyExists:
            return "a job of this name is there already"
        except Refused as error:
            if not kind.is_early(str(error)):
                raise
            beside = " and ".join(each["kind"] for each in objects[:-1])
            return f"the API server and its webhooks take {beside}; the {kind.kind} is asked only once they are there"
    return "the API server and its webhooks take the job"


def serves_rayjobs(api: Api) -> bool:
    """Whether the API server knows RayJobs. Raises Unreachable, Refused."""
    try:
        return any(one["name"] == "rayjobs" for one in api.ask("/apis/ray.io/v1")["resources"])
    except NotFound:
        return False


def missing_ray_rights(api: Api) -> list[str]:
    """What this person may not do with RayJobs. They are asked for `prepare run --engine ray` alone: nobody else has to have them."""
    return [f"{verb} {resource}" for group, resource, verbs in RAY_RIGHTS for verb in verbs if not api.can_i(verb, group, resource)]
