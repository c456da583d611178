"""`osctl doctor`: everything a launch needs, looked at before it is needed. A line a check, with what mends it.

Looks with the person's own rights. What those do not let it see is `not checked`, never `ok`. Changes nothing: a job that is sent is sent
as a dry run, and the one object that the store's probe writes stays the same.
"""

from __future__ import annotations

import contextlib
import http.client
import itertools
import os
import re
import socket
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import TYPE_CHECKING, Annotated, Any, Literal
from urllib.parse import urlsplit

import typer

from orchestrator.cli import options, output
from orchestrator.cli.workspace import Workspace
from orchestrator.errors import NotFound, OsctlError, Refused, Unreachable, UsageError
from orchestrator.redact import redacted

if TYPE_CHECKING:
    from orchestrator.adapters.kube.api import Api
    from orchestrator.cluster import ClusterProfile
    from orchestrator.config import Pipeline, Stage

RIGHTS: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("batch", "jobs", ("get", "list", "watch", "create", "delete")),
    ("kubeflow.org", "pytorchjobs", ("get", "list", "watch", "create", "patch", "delete")),
    ("", "pods", ("get", "list", "watch", "delete")),
    ("", "pods/log", ("get",)),
    ("", "events", ("get", "list", "watch")),
    ("scheduling.x-k8s.io", "podgroups", ("get", "list", "watch")),
    ("", "resourcequotas", ("get", "list")),
)
"""What a person needs: the Role `osctl-user` of k8s/base, but for Kueue's part."""
KUEUE_RIGHTS = (("kueue.x-k8s.io", "workloads", ("get", "list")), ("kueue.x-k8s.io", "localqueues", ("get", "list")))

PATIENCE_S = "10"
"""How long an object store may take. A launch is more patient."""
HTTP_S = 5.0
"""How long an MLflow server may take."""
INSTALL_OPERATOR = "install the training operator (k8s/operator/README.md)"
DECIMAL = {"m": Decimal("0.001"), "": Decimal(1)} | {letter: Decimal(1000) ** power for power, letter in enumerate("kMGTP", 1)}
BINARY = {f"{letter}i": Decimal(1024) ** power for power, letter in enumerate("KMGTP", 1)}
UNITS = DECIMAL | BINARY

Verdict = Literal["ok", "failed", "not checked"]


@dataclass(frozen=True)
class Check:
    name: str
    verdict: Verdict
    fact: str
    """What was found."""
    fix: str = ""
    """What mends it."""


class NotChecked(Exception):
    """This person or this place cannot see it."""


def doctor(
    file: options.File = None,
    settings: options.Set = None,
    store: options.Store = None,
    tracking: options.Tracking = None,
    cluster: options.Cluster = None,
    output_: options.Output = output.Format.table,
    only: Annotated[str | None, typer.Option("--only", metavar="WORD", help="Checks whose name holds this word alone, e.g. store.")] = None,
) -> None:
    """Look at everything that a launch needs.

    Store and MLflow; with kubernetes also images, rights, accounts, quota, nodes, operator and scheduler.
    Each line is ok, failed (with what mends it) or not checked (what this person may not see). Exit code 4 where something failed.

    Examples: osctl doctor          osctl doctor --cluster my-pool.yaml --store s3://bucket/runs -o json
    """
    os.environ.setdefault("OSCTL_S3_PATIENCE_S", PATIENCE_S)
    named = cluster or os.environ.get("OSCTL_CLUSTER") or None
    workspace = Workspace.open(file, settings=settings, store=store, tracking=tracking, cluster=named)
    checks = [check for check in examine(workspace) if only is None or only in check.name]
    if output_ is output.Format.table:
        output.table([vars(check) for check in checks], {"name": "check", "verdict": "", "fact": "found", "fix": "what mends it"})
    else:
        output.emit([vars(check) for check in checks], output_)
    failed = [check for check in checks if check.verdict == "failed"]
    if failed:
        names = ", ".join(check.name for check in failed)
        raise Refused(
            f"doctor {workspace.pipeline.name}: {len(failed)} of {len(checks)} checks failed: {names}. Each line says what mends it"
        )


def examine(workspace: Workspace) -> Iterator[Check]:
    profile = workspace.pipeline.cluster
    yield _try("store", lambda: _store(workspace), "name a bucket and credentials that may read, write and list it")
    if profile is None:
        yield _try("mlflow", lambda: _mlflow(workspace.pipeline, None), "start the server, or name another with --tracking")
        return
    yield _try(
        "images", lambda: _images(profile), "build and push both targets of the Dockerfile, and write their digests into the profile"
    )
    yield _try("data", lambda: _data(workspace.pipeline, profile), "mount a claim with the data: `volumes` of the profile")
    from orchestrator.cli.remote import connect

    with contextlib.ExitStack() as opened:
        try:
            api = opened.enter_context(contextlib.closing(connect(workspace)))
            version = api.ask("/version")["gitVersion"]
        except (OsctlError, NotFound) as error:
            yield Check("api server", "failed", str(error), "look at the kubeconfig (kubectl version), or at `context` of the profile")
            yield _try("mlflow", lambda: _mlflow(workspace.pipeline, None), "start the server, or name another with --tracking")
            return
        yield Check("api server", "ok", f"{api.server}, Kubernetes {version}, namespace {api.namespace}")
        yield from _cluster(workspace.pipeline, profile, api, workspace.store_url)


def _cluster(pipeline: Pipeline, profile: ClusterProfile, api: Api, store_url: str) -> Iterator[Check]:
    stage = max(pipeline.stages, key=lambda stage: stage.devices)
    job = _job(pipeline, stage, profile, store_url)
    install = "apply k8s/ or install the chart helm/osctl"
    yield _try("namespace", lambda: _namespace(api), f"{install}: they make the namespace with its Pod Security labels")
    yield _try("pytorchjobs", lambda: _kind(api, "/apis/kubeflow.org/v1", "pytorchjobs"), INSTALL_OPERATOR)
    yield _try("operator", lambda: _operator(api), INSTALL_OPERATOR)
    yield _try("gang", lambda: _gang(api, profile), "install a scheduler with PodGroups (scheduler-plugins), or use queue: kueue")
    yield _try("rights", lambda: _rights(api, profile), f"{install}, and join the group osctl-users")
    yield _try("accounts", lambda: _accounts(api, profile), install)
    yield _try("driver's rights", lambda: _driver_rights(api, profile), install)
    yield _try(
        "s3 secret", lambda: _secret(api, profile), "make it: kubectl create secret generic NAME --from-literal=AWS_ACCESS_KEY_ID=..."
    )
    yield _try("priority class", lambda: _priority(api, profile), "apply k8s/priority, or leave priority_class out of the profile")
    yield _try("volumes", lambda: _volumes(api, profile), "make the claims, and wait until they are bound")
    yield _try(
        "quota", lambda: _quota(api, stage, job), "ask for a larger ResourceQuota, or take fewer nodes: --set STAGE.resources.nodes=N"
    )
    yield _try(
        "nodes", lambda: _nodes(api, profile, stage, job), "compare node_selector, tolerations and resources of the profile with the nodes"
    )
    yield _try("admission", lambda: _admission(api, job), "`osctl render` shows what was sent")
    yield _try("mlflow", lambda: _mlflow(pipeline, api), "install the chart helm/osctl, or name another server with --tracking")


def _try(name: str, check: Callable[[], str], fix: str) -> Check:
    """A check says what it found, or raises."""
    try:
        return Check(name, "ok", check())
    except NotChecked as reason:
        return Check(name, "not checked", str(reason))
    except Refused as error:
        hidden = "is forbidden: User" in str(error)
        return Check(name, "not checked" if hidden else "failed", str(error), "" if hidden else fix)
    except Unreachable as error:
        return Check(name, "failed", str(error), fix)
    except NotFound as error:
        return Check(name, "failed", str(error), fix)


# --- What needs no cluster -------------------------------------------------------------------------------------------------------------


def _store(workspace: Workspace) -> str:
    if workspace.pipeline.cluster is not None and not workspace.store_url.startswith("s3://"):
        raise Refused(f"{workspace.store_url} is a folder of this machine, which no pod sees")
    try:
        workspace.store.probe()
    except UsageError as error:
        raise Refused(str(error)) from error
    return f"{workspace.store_url} honours conditional writes"


def _images(profile: ClusterProfile) -> str:
    from orchestrator.cluster import PINNED

    images = {"image": profile.image, "driver_image": profile.driver_image}
    for field, image in images.items():
        if image.startswith("registry.example.com/") or image.endswith("0" * 64):
            raise Refused(f"{field} {image} is the shipped placeholder")
    tagged = [image for image in images.values() if not PINNED.match(image)]
    return f"named by a tag, as the profile allows: {', '.join(tagged)}" if tagged else "pinned by digest"


def _data(pipeline: Pipeline, profile: ClusterProfile) -> str:
    mounts = [volume.path for volume in profile.volumes]
    for stage in pipeline.stages:
        path = getattr(stage.config.data.source, "path", None)
        if path is None or "://" in path:
            continue
        if not any(path == mount or path.startswith(mount.rstrip("/") + "/") for mount in mounts):
            raise Refused(f"{stage.name} reads {path}, and pods mount {', '.join(mounts) or 'no claim'}")
    return f"under {', '.join(mounts)}" if mounts else "no stage reads a folder"


def _mlflow(pipeline: Pipeline, api: Api | None) -> str:
    uri = pipeline.tracking
    if uri == "none":
        return "not used"
    if "://" not in uri or uri.startswith("sqlite:"):
        if pipeline.cluster is not None:
            raise Refused(f"tracking {uri} lies on this machine, which the driver does not reach")
        return f"{uri}, on this machine"
    host = urlsplit(uri).hostname or ""
    service = re.fullmatch(r"([a-z0-9-]+)\.([a-z0-9-]+)\.svc(\.cluster\.local)?", host)
    if service and api is not None and service[2] == api.namespace:
        there = api.get("services", service[1])
        return f"Service {there['metadata']['name']} is there; its pages are not asked from outside of the cluster"
    try:
        with urllib.request.urlopen(f"{uri.rstrip('/')}/health", timeout=HTTP_S) as answer:
            return f"{uri} answers: {answer.read(20).decode(errors='replace').strip()}"
    except urllib.error.HTTPError as error:
        raise Refused(f"{uri}: /health answers {error.code} {error.reason}") from error
    except (OSError, http.client.HTTPException) as error:  # URLError and a timeout are OSErrors
        reason = getattr(error, "reason", error)
        if isinstance(reason, socket.gaierror):
            raise NotChecked(f"{host} has no address here; a name of the cluster has one only inside of it") from error
        raise Unreachable(redacted(f"{uri}: {reason}")) from error


# --- What the cluster has --------------------------------------------------------------------------------------------------------------


def _namespace(api: Api) -> str:
    labels = api.get("namespaces", api.namespace)["metadata"].get("labels", {})
    enforced = labels.get("pod-security.kubernetes.io/enforce", "nothing")
    return f"{api.namespace} is there, and enforces {enforced}"


def _kind(api: Api, group: str, kind: str) -> str:
    try:
        kinds = {one["name"] for one in api.ask(group)["resources"]}
    except NotFound:
        kinds = set()
    if kind not in kinds:
        raise Refused(f"the cluster knows no {kind} of {group.removeprefix('/apis/')}")
    return f"{kind} of {group.removeprefix('/apis/')}"


def _operator(api: Api) -> str:
    """Where it is commonly installed; under another name it is not found, which says nothing."""
    try:
        found = api.ask("/apis/apps/v1/namespaces/kubeflow/deployments/training-operator")
    except NotFound:
        raise NotChecked("no Deployment training-operator in namespace kubeflow; it may be called otherwise") from None
    image = found["spec"]["template"]["spec"]["containers"][0]["image"]
    if not found.get("status", {}).get("availableReplicas"):
        raise Refused(f"{image} has no pod that is available; jobs would be made, and wait")
    return f"{image}, available"


def _gang(api: Api, profile: ClusterProfile) -> str:
    if profile.queue == "kueue":
        _kind(api, "/apis/kueue.x-k8s.io/v1beta1", "localqueues")
        assert profile.kueue_queue is not None
        api.get("localqueues", profile.kueue_queue)
        return f"Kueue's LocalQueue {profile.kueue_queue} is there"
    found = _kind(api, "/apis/scheduling.x-k8s.io/v1alpha1", "podgroups")
    return f"{found}; that {profile.scheduler or 'the default scheduler'} acts on it shows only with a job"


def _rights(api: Api, profile: ClusterProfile) -> str:
    rights = (*RIGHTS, *(KUEUE_RIGHTS if profile.queue == "kueue" else ()))
    missing = [
        f"{verb} {resource}{f'.{group}' if group else ''}"
        for group, resource, verbs in rights
        for verb in verbs
        if not api.can_i(verb, group, resource)
    ]
    if missing:
        raise Refused(f"in namespace {api.namespace} you may not: {', '.join(missing)}")
    return f"all {sum(len(verbs) for _, _, verbs in rights)} that are needed in namespace {api.namespace}"


def _driver_rights(api: Api, profile: ClusterProfile) -> str:
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
    needed = {(group, resource, verb) for group, resource, verbs in RIGHTS if resource != "jobs" for verb in verbs}
    if missing := sorted(f"{verb} {resource}" for group, resource, verb in needed - given):
        raise Refused(f"{account} may not: {', '.join(missing)}")
    return f"{account} has what a driver needs"


def _accounts(api: Api, profile: ClusterProfile) -> str:
    names = (profile.service_account, profile.driver_service_account)
    for name in names:
        api.get("serviceaccounts", name)
    return f"{' and '.join(names)} are there"


def _secret(api: Api, profile: ClusterProfile) -> str:
    from orchestrator.manifest import CREDENTIALS

    if profile.s3_secret is None:
        return "none is named: the service accounts' own identity is used"
    if not api.can_i("get", "", "secrets"):
        raise NotChecked(f"you may not read secrets of namespace {api.namespace}, which is as it should be; {profile.s3_secret} is named")
    keys = api.ask(f"/api/v1/namespaces/{api.namespace}/secrets/{profile.s3_secret}").get("data") or {}
    missing = [key for key, optional in CREDENTIALS.items() if not optional and key not in keys]
    if missing:
        raise Refused(f"{profile.s3_secret} lacks {', '.join(missing)}")
    return f"{profile.s3_secret} has the keys that are needed"


def _priority(api: Api, profile: ClusterProfile) -> str:
    if profile.priority_class is None:
        return "none is named"
    found = api.get("priorityclasses", profile.priority_class)
    return f"{profile.priority_class}: {found['value']}"


def _volumes(api: Api, profile: ClusterProfile) -> str:
    for volume in profile.volumes:
        claim = api.get("persistentvolumeclaims", volume.claim)
        phase, storage = claim.get("status", {}).get("phase"), claim["spec"].get("storageClassName")
        if phase != "Bound":
            raise Refused(f"claim {volume.claim} is {phase}, of storage class {storage or 'none'}")
    return f"{', '.join(volume.claim for volume in profile.volumes)}: bound" if profile.volumes else "none are named"


def _quota(api: Api, stage: Stage, job: Mapping[str, Any]) -> str:
    from orchestrator.manifest import pods

    quotas, _ = api.list("resourcequotas")
    needs = _needs(pods(job))
    tight = []
    for quota in quotas:
        status = quota.get("status") or {}
        hard, used = status.get("hard") or {}, status.get("used") or {}
        for name, need in needs.items():
            if name in hard and need > (free := quantity(hard[name]) - quantity(used.get(name, "0"))):
                tight.append(f"{quota['metadata']['name']}: {name}: {stage.name} needs {need:f}, {free:f} of {hard[name]} are free")
    if tight:
        raise Refused("; ".join(tight))
    names = ", ".join(quota["metadata"]["name"] for quota in quotas)
    return f"room in {names} for {stage.name}" if quotas else "none in this namespace"


def _needs(pods: Sequence[Mapping[str, Any]]) -> dict[str, Decimal]:
    """What a quota counts of these pods and their job."""
    needs: dict[str, Decimal] = {"pods": Decimal(len(pods)), "count/pods": Decimal(len(pods)), "count/pytorchjobs.kubeflow.org": Decimal(1)}
    for pod in pods:
        for container in pod["spec"]["containers"]:
            for name, value in container["resources"]["requests"].items():
                names = (name, f"requests.{name}") if name in ("cpu", "memory", "ephemeral-storage") else (f"requests.{name}",)
                for key in names:
                    needs[key] = needs.get(key, Decimal(0)) + quantity(value)
            for name, value in container["resources"]["limits"].items():
                needs[f"limits.{name}"] = needs.get(f"limits.{name}", Decimal(0)) + quantity(value)
    return needs


def _nodes(api: Api, profile: ClusterProfile, stage: Stage, job: Mapping[str, Any]) -> str:
    from orchestrator.manifest import pods

    wanted = pods(job)
    requests = wanted[0]["spec"]["containers"][0]["resources"]["requests"]
    nodes, _ = api.list("nodes", ",".join(f"{key}={value}" for key, value in profile.node_selector.items()))
    room, fitting, reasons = 0, 0, []
    for node in nodes:
        why = _unfit(node, profile, requests)
        if why is None:
            fitting += 1
            room += _pods_beside(node["status"]["allocatable"], requests)
        else:
            reasons.append(f"{node['metadata']['name']}: {why}")
    if room < len(wanted):
        several = f"; {reasons[0]}" + (f" (and {len(reasons) - 1} more)" if len(reasons) > 1 else "") if reasons else ""
        raise Refused(
            f"{stage.name} needs {len(wanted)} pods at once, {fitting} of {len(nodes)} nodes that match the selector are fit, "
            f"with room for {room}{several}"
        )
    return f"room for {room} pods on {fitting} fit nodes, {stage.name} needs {len(wanted)}; who holds them now is not looked at"


def _pods_beside(allocatable: Mapping[str, str], requests: Mapping[str, str]) -> int:
    """How many pods an empty node takes. A pod with all of a node's devices is alone there; small ones share it."""
    return min(int(quantity(allocatable[name]) // quantity(value)) for name, value in requests.items() if quantity(value) > 0)


def _unfit(node: Mapping[str, Any], profile: ClusterProfile, requests: Mapping[str, str]) -> str | None:
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


def _admission(api: Api, job: dict[str, Any]) -> str:
    """The job itself, as a dry run: schema, webhooks and quotas of jobs say what they would say."""
    from orchestrator.adapters.kube.api import AlreadyExists

    try:
        api.create("pytorchjobs", job, dry_run=True)
    except AlreadyExists:
        return "a job of this name is there already"
    return "the API server and its webhooks take the job"


def _job(pipeline: Pipeline, stage: Stage, profile: ClusterProfile, store_url: str) -> dict[str, Any]:
    """The PyTorchJob of a stage's first attempt, as `osctl render` prints it."""
    from orchestrator import manifest
    from orchestrator.cli.render import Coming, coming

    first = coming(pipeline, None)[stage.name]
    assert isinstance(first, Coming), f"{stage.name}: nothing is committed where nothing has run"
    return manifest.pytorch_job(first.intent, profile, store_url)


def quantity(text: str) -> Decimal:
    """A Kubernetes quantity as a number: `500m`, `1600Gi`, `128`."""
    match = re.fullmatch(r"([0-9.]+(?:[eE][+-]?[0-9]+)?)([a-zA-Z]*)", text)
    assert match is not None and match[2] in UNITS, f"{text!r} is no quantity"
    return Decimal(match[1]) * UNITS[match[2]]
