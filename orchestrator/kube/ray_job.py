"""The RayJob (ray.io/v1) that prepares raw videos on many pods: a head with osctl's launcher in it, and workers that decode. Pure.

Owns what KubeRay needs around the pods, and which of them may do what. The head decodes nothing, has the token with which it looks at the
pods that it pays for, and starts the launcher; workers have no token. Refuses to hold a secret: KubeRay makes one for each cluster, with
the token by which Ray's processes know each other. Pods are no gang (KubeRay knows none of scheduler-plugins for RayJobs), and need not be
one: the head waits for the first worker, and each further one makes it faster.

`submissionMode: HTTPMode`: the operator asks the head to start the launcher, and asks again once a lost head was replaced, so a preparation
survives its head. The other modes start a submitter that wants more of the image and ends with the head.
"""

from __future__ import annotations

import shlex

from orchestrator import modules
from orchestrator.kube import names
from orchestrator.kube.manifest import queue_labels
from orchestrator.kube.parts import (
    Manifest,
    check_store,
    confined,
    credentials,
    data_mounts,
    data_volumes,
    env,
    env_of_osctl,
    lost_node,
    part,
    pod,
    template,
    tolerations,
)
from orchestrator.kube.prepare_job import GPUS, JOB, NAMESPACE, SELECTOR, at, caption_key, own_name, prepare_metadata, room
from orchestrator.labels import Label
from orchestrator.recipe.cluster_profile import ClusterProfile, amount

RAY_VERSION = "2.60.0"
"""That the image has; KubeRay wants to know it, since 2.52 is the first with tokens."""
HEAD, CPU, GPU = "head", "cpu", "gpu"
DASHBOARD, AGENT = 8265, 52365
"""Ports of Ray's dashboard, by which jobs are submitted, and of the agent on each node."""
LEAVE_S = 10
"""A pod of Ray keeps nothing: what is done lies in the store."""


def ray_job(profile: ClusterProfile, store_url: str, name: str, order: str, number: int, *, pods: int, gpus: int = 0) -> Manifest:
    """The RayJob that prepares the data set `name` as `order` says.

    Args:
        profile: without pools.
        order: digest of the order in the store.
        number: number of this RayJob. Its name is made from it, the store and the data set's name.
        pods: how many pods decode.
        gpus: how many pods have a GPU each, for models.

    Raises:
        Refused: the store's URL holds credentials.
    """
    check_store(store_url)
    metadata = prepare_metadata(profile, store_url, name, number)
    command = ["osctl", "prepare", "drive", "--store", store_url, "--name", name, "--order", order]
    if queue := queue_labels(profile):
        metadata = {**metadata, "labels": {**metadata["labels"], **queue}}
    groups = [_workers(profile, metadata, CPU, pods)]
    if gpus:
        groups.append(_workers(profile, metadata, GPU, gpus))
    spec: Manifest = {
        "entrypoint": shlex.join(command),
        "submissionMode": "HTTPMode",
        "backoffLimit": 0,
        "shutdownAfterJobFinishes": True,
        "ttlSecondsAfterFinished": 0,  # pods are paid for while they are there
        **({"suspend": True} if queue else {}),  # Kueue starts it
        "rayClusterSpec": {
            "rayVersion": RAY_VERSION,
            "authOptions": {"mode": "token"},
            "headGroupSpec": {"rayStartParams": _start("0"), "template": _head(profile, metadata)},
            "workerGroupSpecs": groups,
        },
    }
    return names.sealed({"apiVersion": "ray.io/v1", "kind": "RayJob", "metadata": metadata, "spec": spec})


def _start(cores: str, gpus: int = 0) -> dict[str, str]:
    params = {"num-cpus": cores, "dashboard-host": "0.0.0.0", "disable-usage-stats": "true"}
    return {**params, "num-gpus": str(gpus)} if gpus else params


def _head(profile: ClusterProfile, metadata: Manifest) -> Manifest:
    own = profile.prepare
    site = at(profile, 0).model_copy(update={"cpu": own.head_cpu, "memory": own.head_memory})
    variables = {JOB: metadata["name"], SELECTOR: f"{Label.RUN}={metadata['labels'][Label.RUN]}", NAMESPACE: site.namespace}
    container = _container(site, HEAD, {}, [*env(variables), own_name(), *caption_key(site)])
    container["ports"] = [
        part("V1ContainerPort", name=port, container_port=number, protocol="TCP")
        for port, number in (("gcs-server", 6379), ("dashboard", DASHBOARD), ("client", 10001))
    ]
    container["readinessProbe"] = _probe("/api/gcs_healthz", DASHBOARD)
    return template(metadata["labels"], _pod(site, container, token=True))


def _workers(profile: ClusterProfile, metadata: Manifest, group: str, replicas: int) -> Manifest:
    gpus = 1 if group == GPU else 0
    site = at(profile, gpus)
    device = {site.gpu_resource: "1"} if gpus and site.gpu_resource is not None else {}
    pods = template(metadata["labels"], _pod(site, _container(site, group, device, env({GPUS: str(gpus)})), token=False))
    cores = str(max(1, int(amount(site.cpu))))
    return {
        "groupName": group, "replicas": replicas, "minReplicas": replicas, "maxReplicas": replicas,
        "rayStartParams": _start(cores, gpus), "template": pods,
    }  # fmt: skip


def _pod(site: ClusterProfile, container: Manifest, *, token: bool) -> Manifest:
    return pod(
        site,
        site.driver_service_account,
        token=token,
        termination_grace_period_seconds=LEAVE_S,
        priority_class_name=site.priority_class,
        node_selector=dict(sorted(site.node_selector.items())) or None,
        tolerations=[*tolerations(site), *lost_node(site)],
        containers=[container],
        volumes=[*room(site), *data_volumes(site)],
    )


def _container(site: ClusterProfile, group: str, device: dict[str, str], more: list[Manifest]) -> Manifest:
    resources = {"cpu": site.cpu, "memory": site.memory, "ephemeral-storage": site.scratch, **device}
    return part(
        "V1Container",
        name=f"ray-{group}",
        image=site.prepare.ray_image or site.image,
        image_pull_policy="IfNotPresent",
        env=[*env(modules.reading_clips(env_of_osctl(site))), *credentials(site), *more],  # workers fetch films by their addresses
        resources=part("V1ResourceRequirements", requests=resources, limits=dict(resources)),
        liveness_probe=_probe("/api/local_raylet_healthz", AGENT),
        readiness_probe=_probe("/api/local_raylet_healthz", AGENT),
        security_context=confined(),
        volume_mounts=[
            part("V1VolumeMount", name="tmp", mount_path="/tmp"),
            part("V1VolumeMount", name="shm", mount_path="/dev/shm"),
            *data_mounts(site, read_only=True),
        ],
    )


def _probe(path: str, port: int) -> Manifest:
    """By kubelet itself: KubeRay's own probes run bash and wget in the image."""
    return part(
        "V1Probe",
        http_get=part("V1HTTPGetAction", path=path, port=port),
        initial_delay_seconds=10,
        period_seconds=5,
        timeout_seconds=5,
        failure_threshold=24,  # two minutes, as KubeRay's own; a busy node answers late
    )
