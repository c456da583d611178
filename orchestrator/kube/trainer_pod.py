"""The pod of one node of an attempt: agent and trainer in one container. It does not depend on the kind of job. Pure.

Owns command, environment, resources, hook, placement and volumes of that pod. Refuses to say how many there are and how they are started
together (`manifest` does).

Requests are limits, so its quality of service is Guaranteed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from orchestrator.kube.parts import (
    Manifest,
    confined,
    credentials,
    data_mounts,
    data_volumes,
    env,
    literal,
    lost_node,
    part,
    pod,
    tolerations,
)
from orchestrator.labels import Label
from orchestrator.ledger.records import Intent
from orchestrator.recipe.cluster_profile import ClusterProfile, amount

RUN_DIR = "/run/osctl/attempt"
PORT = 23456
"""Where the first node waits for the others. It is the default of the training operator, which calls it `pytorchjob-port`; it is written
out so that the job is stored as it was sent."""
HURRY_S = 15
"""Seconds between kubelet's SIGTERM, which tells the agent to hurry, and its SIGKILL."""


@dataclass(frozen=True)
class Surroundings:
    """What an operator wants or gives that another does not."""

    container: str
    """Name of the container, by which the operator finds it."""
    index_label: str
    """The pod's label that says which node of the attempt it is."""
    port_name: str
    env: Mapping[str, str] = field(default_factory=dict)
    """Variables that this operator does not set itself."""


PYTORCH_JOB = Surroundings("pytorch", Label.REPLICA_INDEX, "pytorchjob-port")


def trainer_pod(
    intent: Intent,
    intent_key: str,
    profile: ClusterProfile,
    store_url: str,
    exclude_nodes: Sequence[str],
    around: Surroundings = PYTORCH_JOB,
) -> Manifest:
    """The pod's spec. It is the same for every node of the attempt, since the pod reads its node's number from its own label.

    Args:
        intent_key: key of the intent in the store.
        store_url: the store's URL for pods.
        exclude_nodes: host names on which the pod is never placed, besides the profile's.
    """
    return pod(
        profile,
        profile.service_account,
        token=False,
        termination_grace_period_seconds=profile.grace_s,
        priority_class_name=profile.priority_class,
        scheduler_name=profile.scheduler,
        node_selector=dict(sorted(profile.node_selector.items())) or None,
        affinity=_away_from({*profile.exclude_nodes, *exclude_nodes}),
        tolerations=[*tolerations(profile), *lost_node(profile)],
        containers=[_container(intent, intent_key, profile, store_url, around)],
        volumes=[
            part("V1Volume", name="scratch", empty_dir=part("V1EmptyDirVolumeSource", size_limit=profile.scratch)),
            part("V1Volume", name="shm", empty_dir=part("V1EmptyDirVolumeSource", medium="Memory", size_limit=profile.shm)),
            *data_volumes(profile),
        ],
    )


def _container(intent: Intent, intent_key: str, profile: ClusterProfile, store_url: str, around: Surroundings) -> Manifest:
    command = ["python", "-P", "-m", "orchestrator.agent", "--store", store_url, "--intent", intent_key, "--run-dir", RUN_DIR]
    resources = requests_of(intent.devices_per_node, profile)
    node_field = part("V1ObjectFieldSelector", api_version="v1", field_path=f"metadata.labels['{around.index_label}']")
    return part(
        "V1Container",
        name=around.container,
        image=profile.image,
        image_pull_policy="IfNotPresent",
        command=[*map(literal, command), "--node", "$(OSCTL_NODE)"],
        env=[
            part("V1EnvVar", name="OSCTL_NODE", value_from=part("V1EnvVarSource", field_ref=node_field)),
            *env({**around.env, **profile.store_env(), **_environment(intent.devices_per_node, profile)}),
            *credentials(profile),
        ],
        ports=[part("V1ContainerPort", name=around.port_name, container_port=PORT, protocol="TCP")],
        resources=part("V1ResourceRequirements", requests=resources, limits=dict(resources)),
        lifecycle=_save_first(profile),
        termination_message_policy="FallbackToLogsOnError",  # if the agent dies without a report, its last output is in the pod's status
        security_context=confined(),
        volume_mounts=[
            part("V1VolumeMount", name="scratch", mount_path="/run/osctl", sub_path="run"),
            part("V1VolumeMount", name="scratch", mount_path="/tmp", sub_path="tmp"),
            part("V1VolumeMount", name="shm", mount_path="/dev/shm"),
            *data_mounts(profile),
        ],
    )


def _save_first(profile: ClusterProfile) -> Manifest:
    """A hook that asks the agent to drain and then makes kubelet wait. The hook ends with the container when the agent has exited.

    Without the wait kubelet would send its own SIGTERM at once, and a second SIGTERM tells the agent to hurry.
    """
    command = ["sh", "-c", f"kill -TERM 1; sleep {profile.grace_s - HURRY_S}"]
    return part("V1Lifecycle", pre_stop=part("V1LifecycleHandler", _exec=part("V1ExecAction", command=command)))


def requests_of(devices: int, profile: ClusterProfile) -> dict[str, str]:
    """What a pod with so many devices takes of its node. Both requests and limits, so that no other pod can take the memory."""
    gpus = {profile.gpu_resource: str(devices)} if profile.gpu_resource else {}
    rdma = {profile.rdma_resource: str(profile.rdma_per_node)} if profile.rdma_resource else {}
    return {"cpu": profile.cpu, "memory": profile.memory, "ephemeral-storage": profile.scratch, **gpus, **rdma}


def _environment(devices: int, profile: ClusterProfile) -> dict[str, str]:
    """Variables for a pod's container and its site. The agent sets what NCCL records, on any backend."""
    everywhere = {
        "HOME": "/tmp",
        "USER": "osctl",  # the image has no user with this id, and torch asks for its name
        "TORCHINDUCTOR_CACHE_DIR": "/tmp/torchinductor",
        "TRITON_CACHE_DIR": "/tmp/triton",
        "PYTHONFAULTHANDLER": "1",
        "OMP_NUM_THREADS": str(max(1, int(amount(profile.cpu)) // devices)) if profile.gpu_resource else "1",
    }
    if profile.latents_gb is not None:
        everywhere["OSCTL_LATENTS_GB"] = str(profile.latents_gb)
    if profile.gpu_resource is None:
        return everywhere
    site = {
        "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
        "NCCL_SOCKET_IFNAME": profile.nccl_socket_ifname,
        "NCCL_IB_HCA": profile.nccl_ib_hca,
        "NCCL_IB_GID_INDEX": None if profile.nccl_ib_gid_index is None else str(profile.nccl_ib_gid_index),
    }
    return everywhere | {name: value for name, value in site.items() if value is not None}


def _away_from(nodes: set[str]) -> Manifest | None:
    if not nodes:
        return None
    other = part("V1NodeSelectorRequirement", key=Label.HOSTNAME, operator="NotIn", values=sorted(nodes))
    selector = part("V1NodeSelector", node_selector_terms=[part("V1NodeSelectorTerm", match_expressions=[other])])
    return part("V1Affinity", node_affinity=part("V1NodeAffinity", required_during_scheduling_ignored_during_execution=selector))
