"""From an intent and a cluster profile to the objects that are sent to Kubernetes. Pure, and the only place where one is written.

Every part of an object is described with the models of the official clients (`kubernetes`, `kubeflow-training`), by `_part`: a field that
Kubernetes does not have is an error here, and not a value that a server drops. The models are imported when a job is written, since they
cost more than everything else that a command imports.

Owns names, labels and annotations of everything that osctl makes in a cluster, the test for what is ours, and what it means that a
running job differs from what would be sent now. Refuses to talk to a cluster, and to hold a secret: credentials are named.

Invariants:
- A manifest is a function of its arguments alone. Nothing in it depends on a clock, on the epoch or on what an attempt resumes from, so
  what `osctl render` prints before an intent exists is what `osctl launch` sends.
- Every value that came from a person stays that value: kubelet's `$(VARIABLE)` is escaped, and `dump` leaves no string that YAML 1.1 or
  1.2 reads as something else.
- Requests are limits in a trainer's pod, and every pod obeys Pod Security "restricted".
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import yaml

from opensora import identity
from orchestrator.cluster import ClusterProfile, Volume, amount
from orchestrator.config import Pipeline
from orchestrator.errors import Refused
from orchestrator.records import Intent, Keys

Manifest = dict[str, Any]
"""A Kubernetes object, as the API server takes it."""

MANAGER = "osctl"
MANAGED_BY = "app.kubernetes.io/managed-by"
PIPELINE, STAGE, ATTEMPT, RUN, ROLE = "osctl/pipeline", "osctl/stage", "osctl/attempt", "osctl/run", "osctl/role"
"""Labels. RUN holds 12 hex digits of (store, run key): what a watch selects by."""
RUN_KEY, STORE, INTENT, SPEC_HASH = "osctl/run-key", "osctl/store", "osctl/intent", "osctl/spec-hash"
"""Annotations: whose an object is, where its intent lies, and the digest of what was sent."""

NAME_CHARACTERS = 50
"""Of a job. A pod's name, the host name in it and its Service are 63 at most, and the operator appends `-worker-<index>`."""
RUN_DIR = "/run/osctl/attempt"
NODE_LABEL = "training.kubeflow.org/replica-index"
"""The operator's label on each pod of a job: which node of the attempt this is."""
PORT = 23456
"""The operator's own default, named by it `pytorchjob-port`; written out so that what is sent is what is stored."""
USER = 1000
HURRY_S = 15
"""Between kubelet's SIGTERM, which the agent takes as "hurry", and its SIGKILL."""

KUEUE_QUEUE = "kueue.x-k8s.io/queue-name"
CREDENTIALS = {"AWS_ACCESS_KEY_ID": False, "AWS_SECRET_ACCESS_KEY": False, "AWS_SESSION_TOKEN": True}
"""Keys of the profile's secret, and whether one may be missing in it."""

DRIVER_EXITS = (2, 3, 4, 130)
"""Exit codes with which a driver is done, though not with a success: another try would say the same."""


# --- Parts --------------------------------------------------------------------------------------------------------------------------------


@functools.cache
def _model(name: str) -> Any:
    """A class of one of the clients. kubeflow-training's is imported for a PyTorchJob alone: a driver's Job needs none of it."""
    if name.startswith("Kubeflow"):
        from kubeflow.training import models
    else:
        from kubernetes import client as models
    return getattr(models, name)


@functools.cache
def _configuration() -> Any:
    """One for all: a model that is given none makes its own, which takes thirty times as long as the model."""
    from kubernetes.client import Configuration

    return Configuration()


def _part(model: str, /, **fields: Any) -> Manifest:
    """A part of an object as its model describes it, in the order in which it is written here. What is None is left out.

    Raises:
        TypeError: the model has no field of this name.
        ValueError: a field that must be there is missing, or has no possible value.
    """
    described = _model(model)(**fields, local_vars_configuration=_configuration())
    return {described.attribute_map[name]: value for name, value in fields.items() if value is not None}


# --- Names, and whose an object is ----------------------------------------------------------------------------------------------------


def job_name(store_url: str, run_key: str) -> str:
    """Of an attempt's PyTorchJob: a DNS-1035 label of at most 50 characters.

    Holds 8 digits of a hash of store and run key, so that pipelines of one name in two stores never meet in a namespace.
    """
    pipeline, _, rest = run_key.partition("/")
    stage, _, tail = rest.partition("@")
    return _name(f"{pipeline}-{stage}", f"a{tail.rpartition('/a')[2]}-{run_hash(store_url, run_key)[:8]}")


def driver_key(pipeline: str, launch: int) -> str:
    """What a driver's Job carries as its run key. No attempt's run key looks like it: those hold an `@`."""
    return f"{pipeline}/driver/{launch}"


def driver_name(pipeline: str, store_url: str, launch: int) -> str:
    return _name(pipeline, f"driver-{run_hash(store_url, pipeline)[:8]}-{launch}")


def run_hash(store_url: str, key: str) -> str:
    """12 hex digits: the label `osctl/run`."""
    return hashlib.sha256(f"{store_url}\n{key}".encode()).hexdigest()[:12]


def owner(manifest: Mapping[str, Any]) -> tuple[str, str] | None:
    """(store URL, run key) of an object that an osctl has made; none: a foreign one."""
    metadata = manifest.get("metadata") or {}
    annotations = metadata.get("annotations") or {}
    if (metadata.get("labels") or {}).get(MANAGED_BY) != MANAGER or STORE not in annotations or RUN_KEY not in annotations:
        return None
    return annotations[STORE], annotations[RUN_KEY]


def is_ours(manifest: Mapping[str, Any], store_url: str, run_key: str) -> bool:
    """Whether an object of our name is ours. Anything else is foreign: never adopted, changed or deleted."""
    return owner(manifest) == (store_url, run_key)


def spec_hash(manifest: Mapping[str, Any]) -> str:
    """16 hex digits over everything but the annotation that holds it. Of an object as it was sent, not as a server gives it back."""
    metadata = dict(manifest["metadata"])
    metadata["annotations"] = {key: value for key, value in metadata["annotations"].items() if key != SPEC_HASH}
    return hashlib.sha256(json.dumps({**manifest, "metadata": metadata}, sort_keys=True).encode()).hexdigest()[:16]


def _name(words: str, tail: str) -> str:
    slug = re.sub(r"[^a-z0-9]+", "-", words.lower())[: NAME_CHARACTERS - len(tail) - 1].strip("-")
    return f"{slug}-{tail}"


# --- An attempt -----------------------------------------------------------------------------------------------------------------------


def pytorch_job(intent: Intent, profile: ClusterProfile, store_url: str, *, exclude_nodes: Sequence[str] = ()) -> Manifest:
    """The PyTorchJob (kubeflow.org/v1) of one attempt: as many workers as nodes, and no master.

    Without a master there is one kind of pod and no init container of the operator's, and all nodes are scheduled as one set.

    Args:
        exclude_nodes: host names that nothing is placed on, besides the profile's.

    Raises:
        Refused: the store's URL holds credentials.
    """
    _check_store(store_url)
    labels = {
        MANAGED_BY: MANAGER,
        PIPELINE: intent.pipeline,
        STAGE: intent.stage,
        ATTEMPT: str(intent.attempt),
        RUN: run_hash(store_url, intent.run_key),
        ROLE: "trainer",
    }
    name = job_name(store_url, intent.run_key)
    intent_key = Keys(intent.pipeline).intent(intent.stage, intent.inputs, intent.attempt)
    kueue = {KUEUE_QUEUE: profile.kueue_queue} if profile.kueue_queue else {}
    template = _template(labels, _trainer_pod(intent, intent_key, profile, store_url, exclude_nodes))
    metadata = _part(
        "V1ObjectMeta",
        name=name,
        namespace=profile.namespace,
        labels={**labels, **kueue},
        annotations={RUN_KEY: intent.run_key, STORE: store_url, INTENT: intent_key},
    )
    spec = _part(
        "KubeflowOrgV1PyTorchJobSpec",
        run_policy=_run_policy(intent, profile),
        nproc_per_node=str(intent.devices_per_node),
        elastic_policy=_rendezvous(name, intent.nodes),
        pytorch_replica_specs={
            "Worker": _part("KubeflowOrgV1ReplicaSpec", replicas=intent.nodes, restart_policy="Never", template=template)
        },
    )
    return _sealed(_part("KubeflowOrgV1PyTorchJob", api_version="kubeflow.org/v1", kind="PyTorchJob", metadata=metadata, spec=spec))


def _run_policy(intent: Intent, profile: ClusterProfile) -> Manifest:
    """An attempt is one life: nothing in it is restarted, and its driver decides what comes next."""
    # minResources is written out as nothing, or the operator fills it in: Coscheduling then counts the whole cluster before each try
    # and, once it found too little ("resource gap"), is woken by new pods alone, never by a node that became free. A gang would then wait
    # for up to five minutes beside free nodes (seen with scheduler-plugins 0.34.7).
    gang = _part("KubeflowOrgV1SchedulingPolicy", min_available=intent.nodes, min_resources={})
    return _part(
        "KubeflowOrgV1RunPolicy",
        clean_pod_policy="Running",  # ends the other nodes when one failed; those that are over keep their logs
        backoff_limit=0,
        ttl_seconds_after_finished=profile.keep_s,
        suspend=profile.queue == "kueue",  # Kueue lets it go; created running, it would race with Kueue's webhook
        scheduling_policy=gang if profile.queue == "gang" else None,  # beside Kueue, two gangs would wait for each other
    )


def _rendezvous(name: str, nodes: int) -> Manifest | None:
    """How the nodes find each other. Alone, a node needs nobody: without the policy the operator sets no PET_RDZV_ENDPOINT."""
    if nodes == 1:
        return None
    return _part(
        "KubeflowOrgV1ElasticPolicy",
        rdzv_backend="c10d",
        rdzv_id=name,
        min_replicas=nodes,  # min = max: another number of nodes would be another global batch
        max_replicas=nodes,
        max_restarts=0,  # how long they wait for each other is the agent's to say: PET_RDZV_CONF
    )


def _trainer_pod(intent: Intent, intent_key: str, profile: ClusterProfile, store_url: str, exclude_nodes: Sequence[str]) -> Manifest:
    command = ["python", "-m", "orchestrator.agent", "--store", store_url, "--intent", intent_key, "--run-dir", RUN_DIR]
    resources = _resources(intent.devices_per_node, profile)
    env = {**profile.store_env(), **_trainer_env(intent.devices_per_node, profile)}
    node_field = _part("V1ObjectFieldSelector", api_version="v1", field_path=f"metadata.labels['{NODE_LABEL}']")
    container = _part(
        "V1Container",
        name="pytorch",  # the operator looks for this name
        image=profile.image,
        image_pull_policy="IfNotPresent",
        command=[*map(_literal, command), "--node", "$(OSCTL_NODE)"],
        env=[
            _part("V1EnvVar", name="OSCTL_NODE", value_from=_part("V1EnvVarSource", field_ref=node_field)),
            *_env(env),
            *_credentials(profile),
        ],
        ports=[_part("V1ContainerPort", name="pytorchjob-port", container_port=PORT, protocol="TCP")],
        resources=_part("V1ResourceRequirements", requests=resources, limits=dict(resources)),
        lifecycle=_save_first(profile),
        security_context=_confined(),
        volume_mounts=[
            _part("V1VolumeMount", name="scratch", mount_path="/run/osctl", sub_path="run"),
            _part("V1VolumeMount", name="scratch", mount_path="/tmp", sub_path="tmp"),
            _part("V1VolumeMount", name="shm", mount_path="/dev/shm"),
            *(
                _part("V1VolumeMount", name=f"data-{number}", mount_path=volume.path, read_only=volume.read_only)
                for number, volume in enumerate(profile.volumes)
            ),
        ],
    )
    return _pod(
        profile,
        profile.service_account,
        token=False,
        termination_grace_period_seconds=profile.grace_s,
        priority_class_name=profile.priority_class,
        scheduler_name=profile.scheduler,
        node_selector=dict(sorted(profile.node_selector.items())) or None,
        affinity=_away_from({*profile.exclude_nodes, *exclude_nodes}),
        tolerations=[*_tolerations(profile), *_lost_node(profile)],
        containers=[container],
        volumes=[
            _part("V1Volume", name="scratch", empty_dir=_part("V1EmptyDirVolumeSource", size_limit=profile.scratch)),
            _part("V1Volume", name="shm", empty_dir=_part("V1EmptyDirVolumeSource", medium="Memory", size_limit=profile.shm)),
            *(_claim(f"data-{number}", volume) for number, volume in enumerate(profile.volumes)),
        ],
    )


def _save_first(profile: ClusterProfile) -> Manifest:
    """The hook raises the agent's drain flag and then holds kubelet back; it dies with the container when the agent has left.

    A kubelet that is not held back would send its own SIGTERM at once, and to the agent a second one means "hurry".
    """
    command = ["sh", "-c", f"kill -TERM 1; sleep {profile.grace_s - HURRY_S}"]
    return _part("V1Lifecycle", pre_stop=_part("V1LifecycleHandler", _exec=_part("V1ExecAction", command=command)))


def _claim(name: str, volume: Volume) -> Manifest:
    claim = _part("V1PersistentVolumeClaimVolumeSource", claim_name=volume.claim, read_only=volume.read_only)
    return _part("V1Volume", name=name, persistent_volume_claim=claim)


def _resources(devices: int, profile: ClusterProfile) -> dict[str, str]:
    """Requests and limits in one: quality of service Guaranteed, so that a neighbour never costs us memory."""
    gpus = {profile.gpu_resource: str(devices)} if profile.gpu_resource else {}
    rdma = {profile.rdma_resource: str(profile.rdma_per_node)} if profile.rdma_resource else {}
    return {"cpu": profile.cpu, "memory": profile.memory, "ephemeral-storage": profile.scratch, **gpus, **rdma}


def _trainer_env(devices: int, profile: ClusterProfile) -> dict[str, str]:
    """What a pod's container and its site need. What NCCL writes down is said by the agent, on any backend."""
    env = {
        "HOME": "/tmp",
        "USER": "osctl",  # the image knows no user of this id, and torch asks for its name
        "TORCHINDUCTOR_CACHE_DIR": "/tmp/torchinductor",
        "TRITON_CACHE_DIR": "/tmp/triton",
        "PYTHONFAULTHANDLER": "1",
        "OMP_NUM_THREADS": str(max(1, int(amount(profile.cpu)) // devices)) if profile.gpu_resource else "1",
    }
    if profile.gpu_resource is None:
        return env
    env |= {
        "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
    }
    site = {
        "NCCL_SOCKET_IFNAME": profile.nccl_socket_ifname,
        "NCCL_IB_HCA": profile.nccl_ib_hca,
        "NCCL_IB_GID_INDEX": None if profile.nccl_ib_gid_index is None else str(profile.nccl_ib_gid_index),
    }
    return env | {name: value for name, value in site.items() if value is not None}


def _away_from(nodes: set[str]) -> Manifest | None:
    if not nodes:
        return None
    other = _part("V1NodeSelectorRequirement", key="kubernetes.io/hostname", operator="NotIn", values=sorted(nodes))
    selector = _part("V1NodeSelector", node_selector_terms=[_part("V1NodeSelectorTerm", match_expressions=[other])])
    return _part("V1Affinity", node_affinity=_part("V1NodeAffinity", required_during_scheduling_ignored_during_execution=selector))


def _tolerations(profile: ClusterProfile) -> list[Manifest]:
    return [_part("V1Toleration", **toleration.model_dump()) for toleration in profile.tolerations]


def _lost_node(profile: ClusterProfile) -> list[Manifest]:
    """How long a pod stays bound to a node that is gone."""
    return [
        _part(
            "V1Toleration",
            key=f"node.kubernetes.io/{state}",
            operator="Exists",
            effect="NoExecute",
            toleration_seconds=profile.lost_node_s,
        )
        for state in ("not-ready", "unreachable")
    ]


# --- A driver -------------------------------------------------------------------------------------------------------------------------


def driver_job(pipeline: Pipeline, store_url: str, revision: int, launch: int, targets: Sequence[str]) -> Manifest:
    """The batch/v1 Job that drives a launched revision of a pipeline from inside the cluster.

    A driver keeps nothing that it could not read again, so the Job starts another one whenever one is lost; it ends when a driver has
    said a last word.

    Args:
        revision: number in the ledger.
        launch: number of this launch; with the store and the pipeline it makes the name.
        targets: stages to run.

    Raises:
        Refused: the store's URL holds credentials.
    """
    profile = pipeline.cluster
    assert profile is not None, f"{pipeline.name}: a driver's Job needs a cluster"
    _check_store(store_url)
    key = driver_key(pipeline.name, launch)
    labels = {MANAGED_BY: MANAGER, PIPELINE: pipeline.name, RUN: run_hash(store_url, key), ROLE: "driver"}
    command = ["osctl", "drive", "--store", store_url, "--pipeline", pipeline.name, "--revision", str(revision)]
    command += [word for target in targets for word in ("--target", target)]
    env = _without_a_home(profile)
    # Not Guaranteed: it mostly sleeps, and one that is evicted costs nothing, since the next goes on.
    resources = {"requests": {"cpu": "100m", "memory": "256Mi"}, "limits": {"cpu": "1", "memory": "2Gi"}}
    container = _part(
        "V1Container",
        name="driver",
        image=profile.driver_image,
        image_pull_policy="IfNotPresent",
        command=list(map(_literal, command)),
        env=[*_env(env), *_credentials(profile)],
        resources=_part("V1ResourceRequirements", **resources),
        security_context=_confined(),
        volume_mounts=[_part("V1VolumeMount", name="tmp", mount_path="/tmp")],
    )
    pod = _pod(
        profile,
        profile.driver_service_account,
        token=True,
        restart_policy="Never",
        termination_grace_period_seconds=30,
        tolerations=_lost_node(profile),
        containers=[container],
        volumes=[_part("V1Volume", name="tmp", empty_dir=_part("V1EmptyDirVolumeSource", size_limit="2Gi"))],
    )
    metadata = _part(
        "V1ObjectMeta",
        name=driver_name(pipeline.name, store_url, launch),
        namespace=profile.namespace,
        labels=labels,
        annotations={RUN_KEY: key, STORE: store_url},
    )
    spec = _part(
        "V1JobSpec",
        completions=1,
        parallelism=1,
        backoff_limit=100,
        ttl_seconds_after_finished=profile.keep_s,
        pod_replacement_policy="Failed",  # a driver that is still leaving holds the lease
        pod_failure_policy=_last_words("driver", DRIVER_EXITS),
        template=_template(labels, pod),
    )
    return _sealed(_part("V1Job", api_version="batch/v1", kind="Job", metadata=metadata, spec=spec))


def _last_words(container: str, exits: Sequence[int]) -> Manifest:
    done = _part("V1PodFailurePolicyOnExitCodesRequirement", container_name=container, operator="In", values=list(exits))
    disrupted = _part("V1PodFailurePolicyOnPodConditionsPattern", type="DisruptionTarget", status="True")
    rules = [
        _part("V1PodFailurePolicyRule", action="Ignore", on_pod_conditions=[disrupted]),
        _part("V1PodFailurePolicyRule", action="FailJob", on_exit_codes=done),
    ]
    return _part("V1PodFailurePolicy", rules=rules)


# --- A look at data that pods alone see -----------------------------------------------------------------------------------------------


def register_key(name: str, number: int) -> str:
    """What the Job of `osctl data register` carries as its run key."""
    return f"data/{name}/{number}"


def _without_a_home(profile: ClusterProfile) -> dict[str, str]:
    """Variables of a container that runs `osctl` and may write below /tmp alone."""
    return {**profile.store_env(), "HOME": "/tmp", "USER": "osctl", "OSCTL_HOME": "/tmp/osctl", "PYTHONUNBUFFERED": "1"}


def register_job(profile: ClusterProfile, store_url: str, name: str, source: str, number: int, *, by_name: bool = False) -> Manifest:
    """The batch/v1 Job that reads a data set where it lies and writes its manifest into the store.

    It runs `osctl data register` in the trainer's image, which reads every kind of place that a trainer reads, with the same volumes; as
    the driver's account, which may write to the store, and without that account's token, since it asks no API server. A pod that is lost
    is tried again: what was read is read again, nothing is written twice.

    Args:
        number: of this look; with the store and the name it makes the Job's name.

    Raises:
        Refused: the store's URL holds credentials.
    """
    _check_store(store_url)
    key = register_key(name, number)
    labels = {MANAGED_BY: MANAGER, RUN: run_hash(store_url, key), ROLE: "driver"}
    command = ["osctl", "data", "register", name, source, "--store", store_url, *(["--by-name"] if by_name else [])]
    env = _without_a_home(profile)
    resources = {"requests": {"cpu": "1", "memory": "2Gi"}, "limits": {"cpu": "4", "memory": "8Gi"}}
    container = _part(
        "V1Container",
        name="register",
        image=profile.image,
        image_pull_policy="IfNotPresent",
        command=list(map(_literal, command)),
        env=[*_env(env), *_credentials(profile)],
        resources=_part("V1ResourceRequirements", **resources),
        security_context=_confined(),
        volume_mounts=[
            _part("V1VolumeMount", name="tmp", mount_path="/tmp"),
            *(
                _part("V1VolumeMount", name=f"data-{place}", mount_path=volume.path, read_only=True)
                for place, volume in enumerate(profile.volumes)
            ),
        ],
    )
    pod = _pod(
        profile,
        profile.driver_service_account,
        token=False,
        restart_policy="Never",
        termination_grace_period_seconds=5,
        tolerations=[*_tolerations(profile), *_lost_node(profile)],
        containers=[container],
        volumes=[
            _part("V1Volume", name="tmp", empty_dir=_part("V1EmptyDirVolumeSource", size_limit="2Gi")),
            *(_claim(f"data-{place}", volume) for place, volume in enumerate(profile.volumes)),
        ],
    )
    metadata = _part(
        "V1ObjectMeta",
        name=_name(f"data-{name}", f"{run_hash(store_url, name)[:8]}-{number}"),
        namespace=profile.namespace,
        labels=labels,
        annotations={RUN_KEY: key, STORE: store_url},
    )
    spec = _part(
        "V1JobSpec",
        completions=1,
        parallelism=1,
        backoff_limit=5,
        ttl_seconds_after_finished=profile.keep_s,
        pod_failure_policy=_last_words("register", (1, *DRIVER_EXITS)),
        template=_template(labels, pod),
    )
    return _sealed(_part("V1Job", api_version="batch/v1", kind="Job", metadata=metadata, spec=spec))


# --- What every pod has ---------------------------------------------------------------------------------------------------------------


def _pod(profile: ClusterProfile, account: str, *, token: bool, **fields: Any) -> Manifest:
    secrets = [_part("V1LocalObjectReference", name=name) for name in dict.fromkeys(profile.image_pull_secrets)]
    return _part(
        "V1PodSpec",
        service_account_name=account,
        automount_service_account_token=token,
        enable_service_links=False,  # else every Service of the namespace becomes environment variables
        image_pull_secrets=secrets or None,
        security_context=_part(
            "V1PodSecurityContext",
            run_as_non_root=True,
            run_as_user=USER,
            run_as_group=USER,
            fs_group=USER,
            fs_group_change_policy="OnRootMismatch",  # a claim full of clips is not walked at each start
            seccomp_profile=_part("V1SeccompProfile", type="RuntimeDefault"),
        ),
        **fields,
    )


def _confined() -> Manifest:
    return _part(
        "V1SecurityContext",
        allow_privilege_escalation=False,
        read_only_root_filesystem=True,
        run_as_non_root=True,
        capabilities=_part("V1Capabilities", drop=["ALL"]),
        seccomp_profile=_part("V1SeccompProfile", type="RuntimeDefault"),
    )


def _env(values: Mapping[str, str]) -> list[Manifest]:
    return [_part("V1EnvVar", name=name, value=_literal(value)) for name, value in values.items()]


def _credentials(profile: ClusterProfile) -> list[Manifest]:
    """By reference; none where the service account is the identity."""
    if profile.s3_secret is None:
        return []
    references = {
        key: _part("V1SecretKeySelector", name=profile.s3_secret, key=key, optional=optional or None)
        for key, optional in CREDENTIALS.items()
    }
    return [
        _part("V1EnvVar", name=key, value_from=_part("V1EnvVarSource", secret_key_ref=reference)) for key, reference in references.items()
    ]


def _literal(text: str) -> str:
    """What kubelet turns into `text`: it replaces `$(NAME)` in commands and values, and `$$` by `$`."""
    return text.replace("$", "$$")


def _check_store(store_url: str) -> None:
    if "@" in urlsplit(store_url).netloc:
        shown = f"{store_url.partition('://')[0]}://…@{urlsplit(store_url).netloc.rpartition('@')[2]}"
        raise Refused(f"store {shown}: holds credentials, and a manifest would show them. Put them into the profile's s3_secret")


def _template(labels: Mapping[str, str], spec: Manifest) -> Manifest:
    # Istio's proxy would outlive the trainer and keep the pod, and would stand between the ranks.
    metadata = _part("V1ObjectMeta", labels={**labels, "sidecar.istio.io/inject": "false"})
    return _part("V1PodTemplateSpec", metadata=metadata, spec=spec)


def _sealed(manifest: Manifest) -> Manifest:
    manifest["metadata"]["annotations"][SPEC_HASH] = spec_hash(manifest)
    return manifest


def _pod_template(manifest: Mapping[str, Any]) -> Manifest:
    spec = manifest["spec"]
    template: Manifest = spec["template"] if "template" in spec else spec["pytorchReplicaSpecs"]["Worker"]["template"]
    return template


def pods(manifest: Mapping[str, Any]) -> list[Manifest]:
    """The pods that an operator would make of a job's template: for checkers, which see nothing inside a PyTorchJob."""
    metadata, template = manifest["metadata"], _pod_template(manifest)
    worker = manifest["spec"].get("pytorchReplicaSpecs", {}).get("Worker", {})
    count = worker.get("replicas", 1)
    policy = {"restartPolicy": worker["restartPolicy"]} if worker else {}
    return [
        {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": f"{metadata['name']}-worker-{index}", "namespace": metadata["namespace"], **template["metadata"]},
            "spec": {**template["spec"], **policy},
        }
        for index in range(count)
    ]


# --- What differs, and what that means --------------------------------------------------------------------------------------------------

NEXT = "takes effect at the next attempt"
ANEW = "another result: the stage starts again from its parent, and the old result stays"


@dataclass(frozen=True)
class Difference:
    path: str
    """`container.resources.limits.memory`, `stage.model.depth`."""
    old: Any
    """What runs; none: nothing."""
    new: Any
    """What would be sent now; none: nothing."""
    meaning: str


_MEANINGS: Sequence[tuple[str, str]] = (
    ("namespace", "another place: the running job stays where it is, end it first with osctl cancel"),
    ("store", "another ledger, which knows nothing of this run"),
    ("container.image", f"{NEXT}; other code may give other numbers"),
    ("pod.terminationGracePeriodSeconds", f"{NEXT}; until then a save must fit into the old one"),
    ("container.lifecycle", f"{NEXT}; until then a save must fit into the old one"),
)
"""By the beginning of a path. Everything else waits for the next attempt too: pods are never changed while they run."""


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[Difference]:
    """Of an attempt's job, as a server gives it back, from what would be sent now.

    What every attempt has of its own (name, number, intent) is no difference, nor is what a server, a queue or a drain wrote into it.
    """
    return [Difference(path, was, now, _meaning(path)) for path, was, now in _changes(_comparable(old), _comparable(new))]


def stage_differences(old: Intent, new: Intent) -> list[Difference]:
    """Of what is trained. A change of identity (`opensora.identity`) is another result; with the rest the next attempt goes on."""
    before, after = old.nodes * old.devices_per_node, new.nodes * new.devices_per_node
    changed = identity.differences(old.config, new.config, before, after)
    found = [_stage_difference(one) for one in changed]
    if old.inputs != new.inputs and not any(one.kind == "identity" for one in changed):
        found.append(Difference("inputs", old.inputs, new.inputs, f"its parent has another result now, or its data changed; {ANEW}"))
    resumes = f"{NEXT}, which resumes" + (": as many devices as before" if before == after else " at the same global batch, not bitwise")
    devices = ANEW if any(one.path == "global batch" for one in changed) else resumes
    meanings = {
        "nodes": devices,
        "devices_per_node": devices,
        "device": f"{NEXT}; an attempt is billed at the price that it was made under",
        "trainer": NEXT,
        "hang_timeout_s": NEXT,
        "flush_s": NEXT,
    }
    found += [
        Difference(name, getattr(old, name), getattr(new, name), meaning)
        for name, meaning in meanings.items()
        if getattr(old, name) != getattr(new, name)
    ]
    return found


def _stage_difference(changed: identity.Difference) -> Difference:
    if changed.path == "global batch":
        old, new = (batch[0] if batch is not None and len(batch) == 1 else batch for batch in (changed.old, changed.new))
        return Difference("global batch", old, new, f"exact resume is not possible; {ANEW}")
    meaning = ANEW if changed.kind == "identity" else f"{NEXT}, which goes on from the last checkpoint"
    return Difference(f"stage.{changed.path}", changed.old, changed.new, meaning)


def _meaning(path: str) -> str:
    return next((meaning for beginning, meaning in _MEANINGS if path.startswith(beginning)), NEXT)


def _changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    for path in [*new, *(path for path in old if path not in new)]:
        if old.get(path) != new.get(path):
            yield path, old.get(path), new.get(path)


def _comparable(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Leaves of a job by short paths, without what belongs to one attempt alone, or to the cluster."""
    metadata, spec = manifest["metadata"], manifest["spec"]
    policy = {key: value for key, value in spec["runPolicy"].items() if key != "suspend"}  # Kueue's, and a drain's
    elastic = {key: value for key, value in spec.get("elasticPolicy", {}).items() if key != "rdzvId"}
    worker = spec["pytorchReplicaSpecs"]["Worker"]
    pod = dict(worker["template"]["spec"])
    container = dict(pod.pop("containers")[0])
    words = container.pop("command")
    options = {name: value for name, value in zip(words[3::2], words[4::2], strict=False) if name not in ("--store", "--intent")}
    # Requests are limits. Nodes and processes are the stage's devices, which `stage_differences` speaks of.
    container["resources"] = {"limits": container["resources"]["limits"]}
    return {
        "namespace": metadata["namespace"],
        "store": metadata["annotations"][STORE],
        **_flat({"queue": metadata["labels"].get(KUEUE_QUEUE)}, "job"),
        **_flat(policy, "job"),
        **_flat({key: value for key, value in elastic.items() if "Replicas" not in key}, "job"),
        "worker.restartPolicy": worker["restartPolicy"],
        "container.command": " ".join(words[:3]),
        **_flat(options, "container.command"),
        **_flat(container, "container"),
        **_flat(pod, "pod"),
    }


def _flat(value: Any, path: str) -> dict[str, Any]:
    """Leaves by dotted path; items of a list by their name where they have one, else the list is a leaf."""
    if isinstance(value, list) and value and all(isinstance(each, dict) and "name" in each for each in value):
        value = {each["name"]: each.get("value", {key: inner for key, inner in each.items() if key != "name"}) for each in value}
    if isinstance(value, dict) and value:
        return {name: leaf for key, inner in value.items() for name, leaf in _flat(inner, f"{path}.{key}").items()}
    return {} if value in (None, [], {}) else {path: value}


# --- As text --------------------------------------------------------------------------------------------------------------------------

_PLAIN = re.compile(r"[A-Za-z/][A-Za-z0-9_./@-]*")
_WORDS = frozenset({"y", "n", "yes", "no", "on", "off", "true", "false", "null"})


class _Dumper(yaml.CSafeDumper):
    """Quotes every string that any reader of YAML could take for something else: Go's reads `1e3` as a number, Python's does not.

    libyaml's emitter: PyYAML's own takes 3.2 ms a manifest, this one 0.7.
    """

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _represent_text(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    plain = _PLAIN.fullmatch(text) is not None and text.lower() not in _WORDS
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=None if plain else '"')


_Dumper.add_representer(str, _represent_text)


def dump(manifests: Iterable[Mapping[str, Any]]) -> str:
    """YAML documents, as `kubectl apply -f` takes them."""
    text: str = yaml.dump_all(
        manifests, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=10_000, explicit_start=True, default_flow_style=False
    )
    return text
