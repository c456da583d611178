"""What a launch needs, checked before it is needed: its store, its images, its data, MLflow, and in a cluster what `cluster_checks` knows.

Each check reads with the person's own rights. What those do not show is `not checked`, never `ok`. Changes nothing: a job that is sent is
sent as a dry run, and the one object that the store's probe writes stays the same.
"""

from __future__ import annotations

import contextlib
import http.client
import re
import socket
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urlsplit

from orchestrator.errors import NotFound, OsctlError, Refused, Unreachable, UsageError
from orchestrator.pipelines import cluster_checks as has
from orchestrator.pipelines import operator_checks
from orchestrator.pipelines.cluster_checks import NotChecked
from orchestrator.redact import redacted

if TYPE_CHECKING:
    from orchestrator.kube.client import Api
    from orchestrator.pipelines.operator_checks import Installation
    from orchestrator.pipelines.workspace import Workspace
    from orchestrator.recipe.cluster_profile import ClusterProfile
    from orchestrator.recipe.pipeline import Pipeline

HTTP_S = 5.0
"""How long an MLflow server may take."""

Verdict = Literal["ok", "failed", "not checked"]


@dataclass(frozen=True)
class Check:
    name: str
    verdict: Verdict
    fact: str
    """What was found."""
    fix: str = ""
    """What mends it."""


def examine(workspace: Workspace) -> Iterator[Check]:
    """Every check, one after the other. Never raises: a check that fails says so."""
    profile = workspace.pipeline.cluster
    yield _try("store", lambda: _store(workspace), "name a bucket and credentials that may read, write and list it")
    if profile is None:
        yield _try("mlflow", lambda: _mlflow(workspace.pipeline, None), "start the server, or name another with --tracking")
        return
    yield _try(
        "images", lambda: _images(profile), "build and push both targets of the Dockerfile, and write their digests into the profile"
    )
    yield _try("data", lambda: _data(workspace.pipeline, profile), "mount a claim with the data: `volumes` of the profile")
    from orchestrator.pipelines.cluster_driver import connect

    with contextlib.ExitStack() as opened:
        try:
            api = opened.enter_context(contextlib.closing(connect(workspace)))
            version = api.ask("/version")["gitVersion"]
        except (OsctlError, NotFound) as error:
            yield Check("api server", "failed", str(error), "look at the kubeconfig (kubectl version), or at `context` of the profile")
            yield _try("mlflow", lambda: _mlflow(workspace.pipeline, None), "start the server, or name another with --tracking")
            return
        yield Check("api server", "ok", f"{api.server}, Kubernetes {version}, namespace {api.namespace}")
        yield from of_cluster(workspace.pipeline, profile, api, workspace.store_url)


def of_cluster(pipeline: Pipeline, profile: ClusterProfile, api: Api, store_url: str) -> Iterator[Check]:
    """What a cluster has to have, and MLflow. Never raises."""
    from orchestrator.pipelines import coming, kueue_checks, room

    stage = max(pipeline.stages, key=lambda stage: stage.devices)
    of_all, profile = profile, coming.first_profile(pipeline, stage.name) or profile
    job = coming.first_job(pipeline, stage, profile, store_url)
    install = "apply k8s/ or install the chart helm/osctl"
    yield _try("namespace", lambda: has.namespace(api), f"{install}: they make the namespace with its Pod Security labels")
    yield _try("operators", lambda: operator_checks.operators(api, profile), operator_checks.mend())
    operator = _operator(api, profile)
    kind = operator.name if operator else operator_checks.V1.name
    yield _try("operator", lambda: operator_checks.available(api, operator), "look at it: kubectl -n NAMESPACE describe pods")
    yield _try("KubeRay", lambda: operator_checks.kuberay(api), "install KubeRay 1.5, which brings RayJobs")
    yield _try("gang", lambda: has.gang(api, profile), "install a scheduler with PodGroups (scheduler-plugins), or use queue: kueue")
    yield from _kueue(profile, api, operator, stage.name, job)
    yield _try("rights", lambda: has.rights(api, profile, kind), f"{install}, and join the group osctl-users")
    yield _try("accounts", lambda: has.accounts(api, profile), install)
    yield _try("driver's rights", lambda: has.driver_rights(api, profile, kind), install)
    yield _try(
        "s3 secret",
        lambda: has.secret(api, profile),
        "make it: kubectl create secret generic NAME --from-literal=AWS_ACCESS_KEY_ID=...",
    )
    yield _try("priority class", lambda: has.priority(api, profile), "apply k8s/priority, or leave priority_class out of the profile")
    yield _try("volumes", lambda: has.volumes(api, profile), "make the claims, and wait until they are bound")
    yield _try(
        "quota",
        lambda: room.quota(api, stage, job, kind),
        "ask for a larger ResourceQuota, or take fewer nodes: --set STAGE.resources.nodes=N",
    )
    yield _try(
        "nodes",
        lambda: room.nodes(api, profile, stage, job),
        "make the profile fit the nodes: node_selector, tolerations, resources",
    )
    order = pipeline.pools_of(stage)
    for name in order[1:]:
        yield _try(
            f"pool {name}",
            lambda name=name: kueue_checks.pool(api, of_all, name, stage, job),  # type: ignore[misc]
            "make the pool fit its nodes: node_selector, tolerations, kueue_queue",
        )
    if any(one.spec.resources.min_nodes is not None for one in pipeline.stages):
        yield _try(
            "node count", lambda: has.node_count(api, of_all, stage, order), "kubectl apply -k k8s/nodes; without it no stage shrinks"
        )
    objects = coming.first_objects(pipeline, stage, profile, store_url, kind)
    yield _try("admission", lambda: has.admission(api, kind, objects), f"`osctl render --operator {kind}` shows what was sent")
    yield _try("mlflow", lambda: _mlflow(pipeline, api), "install the chart helm/osctl, or name another server with --tracking")


def _kueue(profile: ClusterProfile, api: Api, operator: Installation | None, stage: str, job: dict[str, Any]) -> Iterator[Check]:
    from orchestrator.pipelines import kueue_checks

    yield _try("kueue", lambda: kueue_checks.kueue(api, profile), kueue_checks.INSTALL)
    yield _try("held back", lambda: kueue_checks.held_back(api, profile, operator, job), kueue_checks.HELD_BACK[profile.queue])
    yield _try("driver's queue", lambda: kueue_checks.drivers_queue(api, profile), kueue_checks.DRIVERS_QUEUE)
    if profile.queue == "kueue":
        requests = kueue_checks.requests_of(job)
        yield _try("queue", lambda: kueue_checks.queue(api, profile, requests), kueue_checks.QUEUES)
        yield _try(
            "queue's quota",
            lambda: kueue_checks.quota(api, profile, stage, requests),
            f"take fewer nodes: --set {stage}.resources.nodes=N, or ask an administrator for more quota: kubectl edit clusterqueue NAME",
        )
        yield _try("queue's RayJobs", lambda: kueue_checks.rayjobs(api, profile), kueue_checks.INSTALL)
        yield _try("queue's flavors", lambda: kueue_checks.flavors(api, profile, operator), kueue_checks.TOLERATIONS)


def _operator(api: Api, profile: ClusterProfile) -> Installation | None:
    """The one that is used. Where there is none, the check `operators` says so."""
    try:
        return operator_checks.used(api, profile)
    except (Refused, Unreachable):
        return None


def _try(name: str, check: Callable[[], str], fix: str) -> Check:
    """Do a check: it returns what it found, or raises."""
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


def _store(workspace: Workspace) -> str:
    if workspace.pipeline.cluster is not None and not workspace.store_url.startswith("s3://"):
        raise Refused(f"{workspace.store_url} is a folder of this machine, which no pod sees")
    try:
        workspace.store.probe()
    except UsageError as error:
        raise Refused(str(error)) from error
    return f"{workspace.store_url} honours conditional writes"


def _images(profile: ClusterProfile) -> str:
    from orchestrator.recipe.cluster_profile import PINNED

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
