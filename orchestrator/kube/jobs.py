"""The batch/v1 Jobs that run `osctl` itself in a cluster: a pipeline's driver, a reader of data that only pods can see, and a check of the
trainer's image. Pure. The Job that prepares raw videos is made of the same parts (`prepare_job`).

Owns what such a Job runs, with which rights, and which exit codes end it. A lost pod is started again, because the program in it keeps
nothing that it could not read again. Refuses to write an attempt's job (`manifest`) and to talk to a cluster.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from orchestrator.kube import names
from orchestrator.kube.parts import (
    Manifest,
    check_store,
    confined,
    credentials,
    data_mounts,
    data_volumes,
    env,
    env_of_osctl,
    literal,
    lost_node,
    part,
    pod,
    template,
    tolerations,
)
from orchestrator.labels import Annotation, Label
from orchestrator.recipe.cluster_profile import ClusterProfile
from orchestrator.recipe.pipeline import Pipeline

DRIVER_EXITS = (2, 3, 4, 130)
"""Exit codes of a driver that has failed for good: another try would end in the same way."""
NOT_ACCEPTED = 64
"""Exit code if the image lacks something that is needed (`orchestrator.agent.accepts`)."""
DRIVER_REQUESTS: Mapping[str, str] = {"cpu": "100m", "memory": "256Mi"}
ROLE = "driver"
"""The role of all these Jobs: a reader needs the same network access as a driver."""


def driver_job(pipeline: Pipeline, store_url: str, revision: int, launch: int, targets: Sequence[str], order: str = "") -> Manifest:
    """The Job that drives a launched revision of a pipeline from inside the cluster.

    It starts another driver whenever one is lost, and ends when a driver exits with 0 or one of DRIVER_EXITS.

    Args:
        revision: the revision's number in the ledger.
        launch: number of this launch. The Job's name is made from it, the store and the pipeline.
        targets: names of the stages to run. Empty means all.
        order: digest of the order of a preparation that comes first. Empty means that none does.

    Raises:
        Refused: the store's URL holds credentials.
    """
    profile = pipeline.cluster
    assert profile is not None, f"{pipeline.name}: a driver's Job needs a cluster"
    check_store(store_url)
    command = ["osctl", "drive", "--store", store_url, "--pipeline", pipeline.name, "--revision", str(revision)]
    command += [word for target in targets for word in ("--target", target)]
    command += ["--prepare", order] if order else []
    container = container_of(
        "driver",
        profile.driver_image,
        command,
        profile,
        # Its quality of service is not Guaranteed: it mostly sleeps, and if it is evicted, the next driver simply goes on.
        resources={"requests": DRIVER_REQUESTS, "limits": {"cpu": "1", "memory": "2Gi"}},
        mounts=[],
    )
    driver = pod(
        profile,
        profile.driver_service_account,
        token=True,
        restart_policy="Never",
        termination_grace_period_seconds=30,
        tolerations=lost_node(profile),
        containers=[container],
        volumes=[_tmp()],
    )
    name, key = names.driver_name(pipeline.name, store_url, launch), names.driver_key(pipeline.name, launch)
    return job_of(
        metadata_of(profile, store_url, name, key, {Label.PIPELINE: pipeline.name}),
        driver,
        profile,
        backoff_limit=100,
        pod_replacement_policy="Failed",  # a driver that is still exiting holds the lease
        pod_failure_policy=last_words("driver", DRIVER_EXITS),
    )


def register_job(profile: ClusterProfile, store_url: str, name: str, source: str, number: int, *, by_name: bool = False) -> Manifest:
    """The Job that reads a data set where it lies and writes its manifest into the store.

    It runs `osctl data register` in the trainer's image, which reads every kind of place that a trainer reads, and with the same volumes.
    It uses the driver's account, which may write to the store, but not that account's token, since it sends no request to the API server.

    Args:
        name: name of the data set.
        source: where the data set is read from: a path in a pod, or an address.
        number: number of this Job. The Job's name is made from it, the store and the data set's name.
        by_name: whether the files are registered without opening them.

    Raises:
        Refused: the store's URL holds credentials.
    """
    check_store(store_url)
    container = container_of(
        "register",
        profile.image,
        ["osctl", "data", "register", name, source, "--store", store_url, *(["--by-name"] if by_name else [])],
        profile,
        resources={"requests": {"cpu": "1", "memory": "2Gi"}, "limits": {"cpu": "4", "memory": "8Gi"}},
        mounts=data_mounts(profile, read_only=True),
    )
    reader = pod(
        profile,
        profile.driver_service_account,
        token=False,
        restart_policy="Never",
        termination_grace_period_seconds=5,
        tolerations=[*tolerations(profile), *lost_node(profile)],
        containers=[container],
        volumes=[_tmp(), *data_volumes(profile)],
    )
    return job_of(
        # It has no pipeline label, so that no launch takes it for a driver.
        metadata_of(profile, store_url, names.register_name(name, store_url, number), names.register_key(name, number), {}),
        reader,
        profile,
        backoff_limit=5,
        pod_failure_policy=last_words("register", (1, *DRIVER_EXITS)),
    )


def image_check_job(profile: ClusterProfile, store_url: str, needs: str, number: int) -> Manifest:
    """The Job that checks whether the trainer's image has what a launch needs. It holds no device and reads no store.

    Args:
        needs: JSON of `orchestrator.recipe.image_needs.ImageNeeds`.
        number: number of this Job among those with the same question.

    Raises:
        Refused: the store's URL holds credentials.
    """
    check_store(store_url)
    key = names.image_check_key(profile.image, needs)
    container = container_of(
        "check",
        profile.image,
        ["python", "-m", "orchestrator.agent.accepts", needs],
        profile,
        resources={"requests": {"cpu": "100m", "memory": "256Mi"}, "limits": {"cpu": "1", "memory": "1Gi"}},
        mounts=[],
    )
    asked = pod(
        profile,
        profile.driver_service_account,
        token=False,
        restart_policy="Never",
        termination_grace_period_seconds=5,
        tolerations=[*tolerations(profile), *lost_node(profile)],  # on the trainers' nodes, so that these have the image later
        containers=[container],
        volumes=[_tmp()],
    )
    return job_of(
        metadata_of(profile, store_url, names.image_check_name(store_url, key, number), key, {}),
        asked,
        profile,
        backoff_limit=5,
        active_deadline_seconds=int(profile.start_deadline_s),
        pod_failure_policy=last_words("check", (1, 2, NOT_ACCEPTED)),
    )


def container_of(
    name: str,
    image: str,
    command: Sequence[str],
    profile: ClusterProfile,
    *,
    resources: Mapping[str, Mapping[str, str]],
    mounts: Sequence[Manifest],
) -> Manifest:
    return part(
        "V1Container",
        name=name,
        image=image,
        image_pull_policy="IfNotPresent",
        command=list(map(literal, command)),
        env=[*env(env_of_osctl(profile)), *credentials(profile)],
        resources=part("V1ResourceRequirements", **resources),
        security_context=confined(),
        volume_mounts=[part("V1VolumeMount", name="tmp", mount_path="/tmp"), *mounts],
    )


def _tmp() -> Manifest:
    return part("V1Volume", name="tmp", empty_dir=part("V1EmptyDirVolumeSource", size_limit="2Gi"))


def metadata_of(profile: ClusterProfile, store_url: str, name: str, key: str, labels: Mapping[str, str], role: str = ROLE) -> Manifest:
    """Metadata of a Job. `key` is its run key, `labels` are added to those of every Job."""
    return part(
        "V1ObjectMeta",
        name=name,
        namespace=profile.namespace,
        labels={Label.MANAGED_BY: names.MANAGER, **labels, Label.RUN: names.run_hash(store_url, key), Label.ROLE: role},
        annotations={Annotation.RUN_KEY: key, Annotation.STORE: store_url},
    )


def job_of(
    metadata: Manifest,
    spec: Manifest,
    profile: ClusterProfile,
    *,
    backoff_limit: int | None,
    pods: int = 1,
    queue: Mapping[str, str] | None = None,
    **policy: object,
) -> Manifest:
    """A Job.

    Args:
        spec: its pod's spec.
        backoff_limit: None means that `policy` says how often a pod is started again.
        pods: how many, all at once.
        queue: labels by which Kueue finds it. None means the profile's queue of such Jobs, if it has one.
        policy: when the pod is started again, with the names of V1JobSpec's fields.
    """
    labels = metadata["labels"]
    if queue is None and profile.driver_queue is not None:
        queue = {Label.QUEUE_NAME: profile.driver_queue}
    if queue:
        metadata = {**metadata, "labels": {**labels, **queue}}
        policy["suspend"] = True  # Kueue starts it
    job = part(
        "V1JobSpec",
        completions=pods,
        parallelism=pods,
        backoff_limit=backoff_limit,
        ttl_seconds_after_finished=profile.keep_s,
        **policy,
        template=template(labels, spec),
    )
    return names.sealed(part("V1Job", api_version="batch/v1", kind="Job", metadata=metadata, spec=job))


def last_words(container: str, exits: Sequence[int]) -> Manifest:
    """The policy by which the Job fails at the first of these exit codes. A pod that the cluster took away never counts."""
    done = part("V1PodFailurePolicyOnExitCodesRequirement", container_name=container, operator="In", values=list(exits))
    disrupted = part("V1PodFailurePolicyOnPodConditionsPattern", type="DisruptionTarget", status="True")
    rules = [
        part("V1PodFailurePolicyRule", action="Ignore", on_pod_conditions=[disrupted]),
        part("V1PodFailurePolicyRule", action="FailJob", on_exit_codes=done),
    ]
    return part("V1PodFailurePolicy", rules=rules)
