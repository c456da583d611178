"""The Job that prepares raw videos in a cluster: osctl's own launcher of a preparation, over an order in the store. Pure.

Of one pod, or of several: an Indexed Job, each index a shard of the sources; index 0 merges what the others do, and publishes. Owns what
pods run, what they take of their nodes and which of their ends are final. Refuses to give them the token of an account: they decode what
strangers made. Refuses to hold a secret and to talk to a cluster.
"""

from __future__ import annotations

from collections.abc import Mapping

from orchestrator.kube import names
from orchestrator.kube.jobs import DRIVER_EXITS, container_of, job_of, last_words, metadata_of
from orchestrator.kube.manifest import queue_labels
from orchestrator.kube.parts import Manifest, check_store, data_mounts, data_volumes, env, lost_node, part, pod, tolerations
from orchestrator.labels import Label
from orchestrator.recipe.cluster_profile import ClusterProfile, Toleration

ROLE = "prepare"
CONTAINER = "prepare"
TRIES = 6
"""How often a pod that ends without a last word is started again. Each goes on from what is kept; Kubernetes' own default."""
SINCE = "/run/osctl-pod"
"""A folder that kubelet fills as soon as it has got the pod, before it fetches an image: its age says since when the node is held."""
INDEX, JOB_UID = "JOB_COMPLETION_INDEX", "OSCTL_JOB_UID"
"""Variables of a pod of an Indexed Job: its index, which Kubernetes sets, and its Job's uid, by which its pods find each other's words."""
CORES, GPUS, POD, JOB = "OSCTL_POD_CORES", "OSCTL_POD_GPUS", "OSCTL_POD_NAME", "OSCTL_JOB_NAME"
"""Variables by which a pod knows what it takes of its node, its own name, and that of its Job or RayJob."""
SELECTOR, NAMESPACE = "OSCTL_PODS", "OSCTL_NAMESPACE"
"""Variables with the label selector of all pods that a launcher pays for, and their namespace. Absent: it pays for its own alone."""


def prepare_job(profile: ClusterProfile, store_url: str, name: str, order: str, number: int, *, pods: int = 1, gpus: int = 0) -> Manifest:
    """The Job that prepares the data set `name` as `order` says.

    Args:
        profile: without pools.
        order: digest of the order in the store.
        number: number of this Job. Its name is made from it, the store and the data set's name.
        pods: among how many pods the sources are divided.
        gpus: how many GPUs the pod gets, for models that caption, score or encode. Of one pod alone.

    Raises:
        Refused: the store's URL holds credentials.
    """
    check_store(store_url)
    site = at(profile, gpus)
    command = ["osctl", "prepare", "drive", "--store", store_url, "--name", name, "--order", order]
    resources = {"cpu": site.cpu, "memory": site.memory, "ephemeral-storage": site.scratch}
    if gpus and site.gpu_resource is not None:
        resources[site.gpu_resource] = str(gpus)
    container = container_of(
        CONTAINER,
        site.image,
        [*command, *(["--shards", str(pods)] if pods > 1 else [])],
        site,
        resources={"requests": resources, "limits": dict(resources)},
        mounts=[
            part("V1VolumeMount", name="shm", mount_path="/dev/shm"),
            part("V1VolumeMount", name="since", mount_path=SINCE, read_only=True),
            *data_mounts(site, read_only=True),
        ],
    )
    metadata = prepare_metadata(site, store_url, name, number)
    own = {CORES: site.cpu, GPUS: str(gpus), JOB: metadata["name"]}
    container["env"] = [*container["env"], *env(own), own_name(), *(_job_uid() if pods > 1 else ()), *caption_key(site)]
    spec = pod(
        site,
        site.driver_service_account,
        token=False,
        restart_policy="Never",
        termination_grace_period_seconds=site.grace_s,
        priority_class_name=site.priority_class,
        node_selector=dict(sorted(site.node_selector.items())) or None,
        tolerations=[*tolerations(site), *lost_node(site)],
        containers=[container],
        volumes=[*room(site), since(), *data_volumes(site)],
    )
    return job_of(
        metadata,
        spec,
        site,
        pods=pods,
        backoff_limit=TRIES if pods == 1 else None,
        **(INDEXED if pods > 1 else {}),
        queue=queue_labels(site) or None,
        pod_replacement_policy="Failed",  # one that is still leaving holds the lease
        pod_failure_policy=last_words(CONTAINER, DRIVER_EXITS),
    )


INDEXED: Mapping[str, object] = {"completion_mode": "Indexed", "backoff_limit_per_index": TRIES, "max_failed_indexes": 0}
"""A shard that is lost TRIES times ends the Job: nobody can merge without it, and waiting pods are paid for."""


def prepare_metadata(profile: ClusterProfile, store_url: str, name: str, number: int) -> Manifest:
    """Metadata of a Job or RayJob. It has no pipeline label, so that no launch takes it for a driver."""
    job, key = names.prepare_name(name, store_url, number), names.prepare_key(name, number)
    return metadata_of(profile, store_url, job, key, {Label.DATA_SET: names.run_hash(store_url, name)}, ROLE)


def at(profile: ClusterProfile, gpus: int) -> ClusterProfile:
    """The profile of a pod that decodes, or with `gpus` of one that has them: there the profile's nodes are meant, as a trainer's."""
    own = profile.prepare
    changes: dict[str, str | None] = {"cpu": own.cpu, "memory": own.memory, "scratch": own.scratch}
    where: dict[str, Mapping[str, str] | tuple[Toleration, ...] | None] = {}
    if not gpus:
        where = {"node_selector": own.node_selector, "tolerations": own.tolerations}
    return profile.model_copy(update={key: value for key, value in {**changes, **where}.items() if value is not None})


def room(profile: ClusterProfile) -> list[Manifest]:
    """Volumes `tmp` and `shm`."""
    return [
        part("V1Volume", name="tmp", empty_dir=part("V1EmptyDirVolumeSource", size_limit=profile.scratch)),
        part("V1Volume", name="shm", empty_dir=part("V1EmptyDirVolumeSource", medium="Memory", size_limit=profile.shm)),
    ]


def since() -> Manifest:
    """The volume for SINCE."""
    field = part("V1ObjectFieldSelector", api_version="v1", field_path="metadata.uid")
    items = [part("V1DownwardAPIVolumeFile", path="uid", field_ref=field)]
    return part("V1Volume", name="since", downward_api=part("V1DownwardAPIVolumeSource", items=items))


def own_name() -> Manifest:
    """The variable POD."""
    field = part("V1ObjectFieldSelector", api_version="v1", field_path="metadata.name")
    return part("V1EnvVar", name=POD, value_from=part("V1EnvVarSource", field_ref=field))


def _job_uid() -> list[Manifest]:
    """The variable JOB_UID."""
    field = part("V1ObjectFieldSelector", api_version="v1", field_path="metadata.labels['batch.kubernetes.io/controller-uid']")
    return [part("V1EnvVar", name=JOB_UID, value_from=part("V1EnvVarSource", field_ref=field))]


def caption_key(profile: ClusterProfile) -> list[Manifest]:
    """The captioning server's key as a reference, where the profile names its secret."""
    if profile.prepare.caption_secret is None:
        return []
    reference = part("V1SecretKeySelector", name=profile.prepare.caption_secret, key="OSCTL_CAPTION_KEY")
    return [part("V1EnvVar", name="OSCTL_CAPTION_KEY", value_from=part("V1EnvVarSource", secret_key_ref=reference))]
