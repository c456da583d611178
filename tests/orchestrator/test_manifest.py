"""What is sent to Kubernetes: laws over random specs, the shape of an attempt, whose an object is, what text becomes.

Golden manifests: golden/<stage>.yaml holds what open-sora-1.0 sends with the profile h800-64. After a change that is meant,
`OSCTL_UPDATE_GOLDEN=1 .venv/bin/pytest tests/orchestrator/test_manifest.py -k golden` writes them anew; read the diff before committing it.
"""

from __future__ import annotations

import copy
import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import manifest_specs
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from manifest_specs import HOSTILE, Spec
from pod_security import violations

from orchestrator import manifest
from orchestrator.agent import trainer_process
from orchestrator.cluster import ClusterProfile, Toleration
from orchestrator.errors import Refused
from orchestrator.records import Keys

GOLDEN = Path(__file__).parent / "golden"
DNS_1035 = re.compile(r"[a-z]([a-z0-9-]*[a-z0-9])?")


class GoYaml(yaml.CSafeLoader):
    """Takes for numbers what Go's reader does, besides what Python's does."""

    yaml_implicit_resolvers = copy.deepcopy(yaml.CSafeLoader.yaml_implicit_resolvers)


GO_NUMBER = re.compile(r"[-+]?(0[xob])?[0-9a-fA-F_.]*[0-9.]([eE][-+]?[0-9]+)?")
for letter in "+-.0123456789":
    GoYaml.yaml_implicit_resolvers.setdefault(letter, []).append(("tag:yaml.org,2002:float", GO_NUMBER))


def rendered(spec: Spec) -> dict[str, Any]:
    return manifest.pytorch_job(spec.intent, spec.profile, spec.store_url, exclude_nodes=spec.exclude_nodes)


def worker(job: dict[str, Any]) -> dict[str, Any]:
    pod: dict[str, Any] = job["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]["spec"]
    return pod


def container(job: dict[str, Any]) -> dict[str, Any]:
    (only,) = worker(job)["containers"]
    return dict(only)


def environment(job: dict[str, Any]) -> dict[str, str]:
    return {entry["name"]: entry["value"] for entry in container(job)["env"] if "value" in entry}


def expanded(text: str, variables: dict[str, str]) -> str:
    """As kubelet does it: `$(NAME)` is replaced, an unknown one stays, `$$` is `$`."""
    return re.sub(
        r"\$(\$|\(([^)]*)\))",
        lambda found: "$" if found[1] == "$" else variables.get(found[2], found[0]),
        text,
    )


def strings(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield key
            yield from strings(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from strings(inner)
    elif isinstance(value, str):
        yield value


# --- Laws -----------------------------------------------------------------------------------------------------------------------------


def names_fit(spec: Spec, job: dict[str, Any]) -> None:
    """The operator appends -worker-<index>; pods, host names and Services take 63 characters."""
    name = job["metadata"]["name"]
    assert len(name) <= 50
    assert DNS_1035.fullmatch(name)
    for pod in manifest.pods(job):
        assert len(pod["metadata"]["name"]) <= 63
        for value in pod["metadata"]["labels"].values():
            assert re.fullmatch(r"([A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?)?", value)


def no_pod_is_above_restricted(spec: Spec, job: dict[str, Any]) -> None:
    pods = manifest.pods(job)
    assert len(pods) == spec.intent.nodes
    for pod in pods:
        assert violations(pod) == []
        assert pod["spec"]["automountServiceAccountToken"] is False
        assert container(job)["securityContext"]["readOnlyRootFilesystem"] is True


def requests_are_limits(spec: Spec, job: dict[str, Any]) -> None:
    resources = container(job)["resources"]
    assert resources["requests"] == resources["limits"]
    assert {"cpu", "memory", "ephemeral-storage"} <= set(resources["limits"])
    if spec.profile.gpu_resource:
        assert resources["limits"][spec.profile.gpu_resource] == str(spec.intent.devices_per_node)


def text_stays_text(spec: Spec, job: dict[str, Any]) -> None:
    """Through YAML, as Python and as Go read it, and through kubelet."""
    text = manifest.dump([job])
    assert list(yaml.load_all(text, Loader=yaml.CSafeLoader)) == [job]
    assert list(yaml.load_all(text, Loader=GoYaml)) == [job]
    command = [expanded(word, {"OSCTL_NODE": "3", "HOME": "/oops"}) for word in container(job)["command"]]
    assert command[command.index("--store") + 1] == spec.store_url
    assert command[command.index("--node") + 1] == "3"
    env = {name: expanded(value, {"HOME": "/oops"}) for name, value in environment(job).items()}
    assert env["AWS_REGION"] == spec.profile.s3_region
    assert env.get("OSCTL_S3_ENDPOINT") == spec.profile.s3_endpoint
    if spec.profile.gpu_resource:
        assert env.get("NCCL_IB_HCA") == spec.profile.nccl_ib_hca


def credentials_are_references(spec: Spec, job: dict[str, Any]) -> None:
    for entry in container(job)["env"]:
        if entry["name"].startswith("AWS_") and entry["name"] != "AWS_REGION":
            assert "value" not in entry
            assert entry["valueFrom"]["secretKeyRef"]["name"] == spec.profile.s3_secret


def it_is_ours_and_nobody_elses(spec: Spec, job: dict[str, Any]) -> None:
    key = spec.intent.run_key
    assert manifest.is_ours(job, spec.store_url, key)
    assert not manifest.is_ours(job, spec.store_url + "x", key)
    assert not manifest.is_ours(job, spec.store_url, key + "1")
    for place, name in (("labels", manifest.MANAGED_BY), ("annotations", manifest.RUN_KEY), ("annotations", manifest.STORE)):
        foreign = copy.deepcopy(job)
        del foreign["metadata"][place][name]
        assert manifest.owner(foreign) is None


def it_is_a_function_of_what_it_names(spec: Spec, job: dict[str, Any]) -> None:
    """`osctl render` knows neither epoch nor time, and has verified no parent: none of these may be in it."""
    later = spec.intent.model_copy(update={"epoch": 99, "created": 1e9, "code": "other", "config_digest": "f", "device": "a100"})
    again = manifest.pytorch_job(later, spec.profile, spec.store_url, exclude_nodes=tuple(reversed(spec.exclude_nodes)))
    assert json.dumps(again) == json.dumps(job)
    assert job["metadata"]["annotations"][manifest.SPEC_HASH] == manifest.spec_hash(job)


def it_waits_for_all_nodes_or_for_kueue(spec: Spec, job: dict[str, Any]) -> None:
    policy = job["spec"]["runPolicy"]
    kueue = job["metadata"]["labels"].get(manifest.KUEUE_QUEUE)
    if spec.profile.queue == "kueue":
        assert (policy["suspend"], kueue) == (True, spec.profile.kueue_queue)
        assert "schedulingPolicy" not in policy, "two gangs would wait for each other"
    else:
        assert (policy["suspend"], kueue) == (False, None)
        assert policy["schedulingPolicy"] == {"minAvailable": spec.intent.nodes, "minResources": {}}


LAWS: list[Callable[[Spec, dict[str, Any]], None]] = [
    names_fit,
    no_pod_is_above_restricted,
    requests_are_limits,
    text_stays_text,
    credentials_are_references,
    it_is_ours_and_nobody_elses,
    it_is_a_function_of_what_it_names,
    it_waits_for_all_nodes_or_for_kueue,
]


@settings(max_examples=2000, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(manifest_specs.specs())
def test_every_valid_spec_obeys_every_law(spec: Spec) -> None:
    job = rendered(spec)
    for law in LAWS:
        law(spec, job)


@pytest.mark.parametrize("word", HOSTILE)
def test_a_hostile_word_stays_a_word_everywhere(word: str, profile: ClusterProfile) -> None:
    spec = Spec(
        manifest_specs.intent("no", "null", "1e3e1e3e1e3e", 1, 2, 8),
        profile.model_copy(update={"nccl_ib_hca": word, "s3_region": word, "s3_endpoint": word}),
        f"s3://{word}/x" if "@" not in word else word,
    )
    job = rendered(spec)
    text_stays_text(spec, job)
    (read,) = yaml.safe_load_all(manifest.dump([job]))
    assert expanded(environment(read)["NCCL_IB_HCA"], {"HOME": "/oops"}) == word
    assert read["metadata"]["annotations"][manifest.STORE] == spec.store_url


# --- The shape of an attempt ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def profile() -> ClusterProfile:
    cluster = manifest_specs.open_sora().cluster
    assert cluster is not None
    return cluster


def job_of(profile: ClusterProfile, *, nodes: int = 8, devices: int = 8, attempt: int = 1, **kwargs: Any) -> dict[str, Any]:
    return manifest.pytorch_job(manifest_specs.intent("p", "s", "0" * 12, attempt, nodes, devices), profile, "s3://b/p", **kwargs)


def test_an_attempt_is_one_life(profile: ClusterProfile) -> None:
    job = job_of(profile)
    worker_spec = job["spec"]["pytorchReplicaSpecs"]["Worker"]
    assert list(job["spec"]["pytorchReplicaSpecs"]) == ["Worker"], "a master brings an init container and a second set of pods"
    assert (worker_spec["replicas"], worker_spec["restartPolicy"]) == (8, "Never")
    assert job["spec"]["runPolicy"]["backoffLimit"] == 0
    assert job["spec"]["runPolicy"]["cleanPodPolicy"] == "Running"
    assert job["spec"]["runPolicy"]["ttlSecondsAfterFinished"] == profile.keep_s
    assert job["spec"]["elasticPolicy"]["maxRestarts"] == 0
    assert not {"livenessProbe", "readinessProbe", "startupProbe"} & set(container(job)), "a probe's kill breaks the gang"


def test_nodes_find_each_other_and_one_node_needs_nobody(profile: ClusterProfile) -> None:
    several, alone = job_of(profile, nodes=8), job_of(profile, nodes=1)
    policy = several["spec"]["elasticPolicy"]
    assert (policy["rdzvBackend"], policy["minReplicas"], policy["maxReplicas"]) == ("c10d", 8, 8)
    assert policy["rdzvId"] == several["metadata"]["name"]
    assert "rdzvConf" not in policy, "how long they wait is said by the agent alone"
    assert "nProcPerNode" not in policy, "deprecated, and forbidden beside nprocPerNode"
    assert several["spec"]["nprocPerNode"] == "8"
    assert "elasticPolicy" not in alone["spec"], "with it the operator would set PET_RDZV_ENDPOINT"
    assert alone["spec"]["runPolicy"]["schedulingPolicy"] == {"minAvailable": 1, "minResources": {}}


def test_the_hook_asks_for_a_save_and_leaves_time_to_hurry(profile: ClusterProfile) -> None:
    pod = worker(job_of(profile))
    assert pod["terminationGracePeriodSeconds"] == profile.grace_s == 300
    assert container(job_of(profile))["lifecycle"]["preStop"]["exec"]["command"] == ["sh", "-c", "kill -TERM 1; sleep 285"]


def test_a_lost_node_costs_a_minute_or_two_not_five(profile: ClusterProfile) -> None:
    waits = {each["key"]: each.get("tolerationSeconds") for each in worker(job_of(profile))["tolerations"]}
    assert waits["node.kubernetes.io/not-ready"] == waits["node.kubernetes.io/unreachable"] == profile.lost_node_s == 90
    assert "nvidia.com/gpu" in waits


def test_nothing_is_placed_on_an_excluded_node(profile: ClusterProfile) -> None:
    assert "affinity" not in worker(job_of(profile))
    job = job_of(profile.model_copy(update={"exclude_nodes": ("h800-7", "h800-1")}), exclude_nodes=["h800-3", "h800-1"])
    (term,) = worker(job)["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]["nodeSelectorTerms"]
    assert term == {"matchExpressions": [{"key": "kubernetes.io/hostname", "operator": "NotIn", "values": ["h800-1", "h800-3", "h800-7"]}]}


@pytest.mark.parametrize("nodes", [1, 8])
def test_a_variable_is_set_in_one_place(nodes: int, profile: ClusterProfile, tmp_path: Path) -> None:
    """The time of the meeting and NCCL's variables were set by manifest and agent, to different values, and one of them never acted."""
    pod = environment(job_of(profile, nodes=nodes))
    intent = manifest_specs.intent("p", "s", "0" * 12, 1, nodes, 8).model_copy(update={"device": "h800"})
    agent = trainer_process.environment(intent, {}, tmp_path)
    assert agent and not set(agent) & set(pod)
    assert ("PET_RDZV_CONF" in agent) == (nodes > 1)
    both = trainer_process.environment(intent, {"PET_RDZV_CONF": "join_timeout=1", **pod}, tmp_path)
    assert both == {**pod, **agent} | ({} if nodes > 1 else {"PET_RDZV_CONF": "join_timeout=1"})


def test_nccl_is_spoken_of_only_where_gpus_are(profile: ClusterProfile) -> None:
    with_gpus, without = environment(job_of(profile)), environment(job_of(profile.model_copy(update={"gpu_resource": None})))
    assert {name for name in with_gpus if "NCCL" in name} == {"NCCL_SOCKET_IFNAME", "NCCL_IB_HCA", "NCCL_IB_GID_INDEX"} & set(with_gpus)
    assert with_gpus["NCCL_SOCKET_IFNAME"] == "=eth0"
    assert with_gpus["OMP_NUM_THREADS"] == "15"
    assert not [name for name in without if "NCCL" in name or "CUDA" in name]
    assert without["OMP_NUM_THREADS"] == "1"
    assert with_gpus["HOME"] == without["HOME"] == "/tmp"


def test_what_a_pod_writes_lies_in_declared_volumes(profile: ClusterProfile) -> None:
    job = job_of(profile)
    mounts = {mount["mountPath"]: mount["name"] for mount in container(job)["volumeMounts"]}
    volumes = {volume["name"]: volume["emptyDir"] for volume in worker(job)["volumes"]}
    assert mounts == {"/run/osctl": "scratch", "/tmp": "scratch", "/dev/shm": "shm"}
    assert volumes == {"scratch": {"sizeLimit": "500Gi"}, "shm": {"medium": "Memory", "sizeLimit": "64Gi"}}
    assert environment(job)["TRITON_CACHE_DIR"].startswith("/tmp/")


def test_two_stores_never_meet_in_a_namespace() -> None:
    key = "demo/stage1@0123456789ab/a1"
    assert manifest.job_name("s3://a", key) != manifest.job_name("s3://b", key)
    assert manifest.job_name("s3://a", key) == manifest.job_name("s3://a", key)
    assert manifest.job_name("s3://a", key).startswith("demo-stage1-a1-")


def test_a_store_url_with_credentials_is_refused_and_not_shown(profile: ClusterProfile) -> None:
    with pytest.raises(Refused) as caught:
        manifest.pytorch_job(manifest_specs.intent("p", "s", "0" * 12, 1, 1, 1), profile, "s3://AKIA:hunter2@bucket/p")
    assert "hunter2" not in str(caught.value)
    assert "s3_secret" in str(caught.value)


# --- The official models --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "fields"),
    [
        ("KubeflowOrgV1RunPolicy", {"clean_pod_polcy": "Running"}),
        ("KubeflowOrgV1ElasticPolicy", {"min_replica": 2}),
        ("KubeflowOrgV1PyTorchJobSpec", {"pytorch_replica_specs": {}, "nproc_per_nodes": "8"}),
        ("V1Container", {"name": "pytorch", "imagePullPolicy": "Always"}),
        ("V1PodSpec", {"containers": [], "termination_grace_period": 30}),
        ("V1Toleration", {"tolerationSeconds": 90}),
    ],
)
def test_a_field_that_does_not_exist_is_an_error_when_it_is_written(model: str, fields: dict[str, Any]) -> None:
    with pytest.raises(TypeError, match="unexpected keyword"):
        manifest._part(model, **fields)


def test_a_field_that_must_be_there_is_missed_when_it_is_written() -> None:
    with pytest.raises(ValueError, match="name"):
        manifest._part("V1Container", image="x")


def test_a_profile_cannot_bring_in_a_field_that_does_not_exist(profile: ClusterProfile, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Toleration, "model_dump", lambda self, **_: {"key": self.key, "operater": "Exists"})
    with pytest.raises(TypeError, match="operater"):
        job_of(profile)


PRIMITIVES = {"str": str, "int": int, "bool": bool, "object": object, "datetime": str}


def unknown(value: Any, type_: str, path: str) -> Iterator[str]:
    """Fields of a written object that its model does not have, and values of another type than the model says."""
    if inner := re.fullmatch(r"list\[(.*)\]", type_):
        for number, item in enumerate(value):
            yield from unknown(item, inner[1], f"{path}[{number}]")
    elif inner := re.fullmatch(r"dict\([^,]*, (.*)\)", type_):
        for key, item in value.items():
            yield from unknown(item, inner[1], f"{path}.{key}")
    elif type_ in PRIMITIVES:
        if not isinstance(value, PRIMITIVES[type_]):
            yield f"{path}: {value!r} is no {type_}"
    else:
        model = manifest._model(type_)
        types = {key: model.openapi_types[name] for name, key in model.attribute_map.items()}
        for key, item in value.items():
            if key in types:
                yield from unknown(item, types[key], f"{path}.{key}")
            else:
                yield f"{path}.{key}: no field of {type_}"


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(manifest_specs.specs())
def test_all_that_is_written_is_what_the_official_models_describe(spec: Spec) -> None:
    assert list(unknown(rendered(spec), "KubeflowOrgV1PyTorchJob", "job")) == []
    driver = manifest.driver_job(manifest_specs.open_sora(), "s3://b/p", 1, 1, ["stage1"])
    assert list(unknown(driver, "V1Job", "driver")) == []


# --- A driver -------------------------------------------------------------------------------------------------------------------------


def test_a_driver_is_tried_again_until_it_has_said_a_last_word() -> None:
    job = manifest.driver_job(manifest_specs.open_sora(), "s3://b/$(HOME)", 4, 2, ["stage2", "stage3a"])
    (pod,) = manifest.pods(job)
    (driver,) = pod["spec"]["containers"]
    assert [expanded(word, {"HOME": "/oops"}) for word in driver["command"]] == [
        *("osctl", "drive", "--store", "s3://b/$(HOME)", "--pipeline", "open-sora-1.0", "--revision", "4"),
        *("--target", "stage2", "--target", "stage3a"),
    ]
    assert violations(pod) == []
    assert pod["spec"]["automountServiceAccountToken"] is True, "it talks to the API server"
    assert pod["spec"]["serviceAccountName"] == "osctl-driver"
    assert (job["spec"]["backoffLimit"], pod["spec"]["restartPolicy"]) == (100, "Never")
    ignored, done = job["spec"]["podFailurePolicy"]["rules"]
    assert ignored["action"] == "Ignore", "a driver that is evicted has not failed, whatever it left with"
    assert (done["action"], done["onExitCodes"]["values"]) == ("FailJob", [2, 3, 4, 130])
    assert len(job["metadata"]["name"]) <= 50
    assert manifest.is_ours(job, "s3://b/$(HOME)", manifest.driver_key("open-sora-1.0", 2))
    assert yaml.safe_load(manifest.dump([job])) == job


def test_data_that_pods_alone_see_is_read_by_a_confined_job(profile: ClusterProfile) -> None:
    volumes = ({"claim": "clips", "path": "/data"},)
    site = ClusterProfile.model_validate(profile.model_dump() | {"volumes": volumes})
    job = manifest.register_job(site, "s3://b/runs", "hq", "/data/$(HOME)/hq.csv", 1)
    (pod,) = manifest.pods(job)
    (reader,) = pod["spec"]["containers"]
    command = [expanded(word, {"HOME": "/oops"}) for word in reader["command"]]
    assert command == ["osctl", "data", "register", "hq", "/data/$(HOME)/hq.csv", "--store", "s3://b/runs"]
    assert violations(pod) == [] and pod["spec"]["automountServiceAccountToken"] is False, "it asks no API server"
    assert {"name": "data-0", "mountPath": "/data", "readOnly": True} in reader["volumeMounts"]
    assert reader["image"] == site.image, "the driver's image opens no addresses"
    assert "osctl/pipeline" not in job["metadata"]["labels"], "no launch takes it for a driver"
    assert len(job["metadata"]["name"]) <= 50 and yaml.safe_load(manifest.dump([job])) == job
    assert manifest.is_ours(job, "s3://b/runs", manifest.register_key("hq", 1))


# --- What differs ---------------------------------------------------------------------------------------------------------------------


def given_back(job: dict[str, Any]) -> dict[str, Any]:
    """As an API server, a queue and a drain leave it."""
    there = copy.deepcopy(job)
    there["metadata"] |= {"uid": "1", "resourceVersion": "5", "creationTimestamp": "2026-11-23T10:00:00Z", "generation": 2}
    there["metadata"]["annotations"]["osctl/woken"] = "1"
    there["metadata"]["labels"]["kueue.x-k8s.io/priority-class"] = "high"
    there["spec"]["runPolicy"]["suspend"] = not there["spec"]["runPolicy"]["suspend"]
    there["status"] = {"conditions": []}
    return there


@settings(max_examples=100, deadline=None)
@given(manifest_specs.specs())
def test_the_next_attempt_of_the_same_differs_in_nothing(spec: Spec) -> None:
    intent = spec.intent
    following = manifest_specs.intent(
        intent.pipeline, intent.stage, intent.inputs, intent.attempt + 1, intent.nodes, intent.devices_per_node
    )
    later = manifest.pytorch_job(following, spec.profile, spec.store_url, exclude_nodes=spec.exclude_nodes)
    assert manifest.differences(given_back(rendered(spec)), later) == []
    assert manifest.stage_differences(intent, following) == []


@pytest.mark.parametrize(
    ("update", "path", "old", "new", "meaning"),
    [
        ({"shm": "32Gi"}, "pod.volumes.shm.emptyDir.sizeLimit", "64Gi", "32Gi", "takes effect at the next attempt"),
        ({"memory": "800Gi"}, "container.resources.limits.memory", "1600Gi", "800Gi", "takes effect at the next attempt"),
        ({"image": "r/x@sha256:1"}, "container.image", None, "r/x@sha256:1", "other code may give other numbers"),
        ({"nccl_ib_hca": "mlx5_0"}, "container.env.NCCL_IB_HCA", None, "mlx5_0", "takes effect at the next attempt"),
        ({"priority_class": None}, "pod.priorityClassName", "osctl-training", None, "takes effect at the next attempt"),
        ({"keep_s": 60}, "job.ttlSecondsAfterFinished", 86400, 60, "takes effect at the next attempt"),
        ({"namespace": "other"}, "namespace", "osctl", "other", "end it first with osctl cancel"),
    ],
)
def test_a_change_of_the_profile_says_when_it_takes_effect(
    update: dict[str, Any], path: str, old: Any, new: Any, meaning: str, profile: ClusterProfile
) -> None:
    (found,) = manifest.differences(given_back(job_of(profile)), job_of(profile.model_copy(update=update)))
    assert (found.path, found.new) == (path, new)
    assert old is None or found.old == old
    assert meaning in found.meaning


def test_a_longer_save_is_told_from_what_waits(profile: ClusterProfile) -> None:
    found = manifest.differences(job_of(profile), job_of(profile.model_copy(update={"save_s": 300})))
    assert [each.path for each in found] == ["container.lifecycle.preStop.exec.command", "pod.terminationGracePeriodSeconds"]
    assert all("until then a save must fit into the old one" in each.meaning for each in found)


def test_another_global_batch_cannot_be_resumed() -> None:
    config = manifest_specs.stage_config()
    old = manifest_specs.intent("p", "s", "0" * 12, 1, 8, 8, config=config.model_copy(update={"batch_size": 8}))
    halved = manifest_specs.intent("p", "s", "1" * 12, 1, 8, 8, config=config.model_copy(update={"batch_size": 4}))
    batch, field = manifest.stage_differences(old, halved)
    assert (batch.path, batch.old, batch.new) == ("global batch", 512, 256)
    assert "exact resume is not possible" in batch.meaning
    assert (field.path, field.old, field.new) == ("stage.batch_size", 8, 4)
    fewer = manifest.stage_differences(old, old.model_copy(update={"nodes": 4, "inputs": "2" * 12}))
    assert [(each.path, each.old, each.new) for each in fewer] == [("global batch", 512, 256), ("nodes", 8, 4)]


def test_another_model_is_another_result_and_other_devices_of_the_same_number_are_not() -> None:
    old = manifest_specs.intent("p", "s", "0" * 12, 1, 8, 8)
    model = old.config.model.model_copy(update={"depth": 3})
    (found,) = manifest.stage_differences(old, old.model_copy(update={"config": old.config.model_copy(update={"model": model})}))
    assert found.path == "stage.model.depth"
    assert "the old result stays" in found.meaning
    spread = manifest.stage_differences(old, old.model_copy(update={"nodes": 16, "devices_per_node": 4}))
    assert [each.path for each in spread] == ["nodes", "devices_per_node"]
    assert all("resumes" in each.meaning for each in spread)


def test_a_parent_that_was_made_anew_is_named() -> None:
    old = manifest_specs.intent("p", "s", "0" * 12, 1, 1, 1)
    (found,) = manifest.stage_differences(old, old.model_copy(update={"inputs": "1" * 12}))
    assert "its parent has another result now" in found.meaning
    (found,) = manifest.stage_differences(old, old.model_copy(update={"hang_timeout_s": 600.0}))
    assert (found.path, found.meaning) == ("hang_timeout_s", "takes effect at the next attempt")


# --- The checker itself ---------------------------------------------------------------------------------------------------------------


def test_the_checker_of_pod_security_sees_each_rule_broken(profile: ClusterProfile) -> None:
    (good,) = manifest.pods(job_of(profile, nodes=1))
    assert violations(good) == []
    for name, breaks in manifest_specs.BREAKS.items():
        bad = copy.deepcopy(good)
        breaks(bad)
        assert violations(bad), name


# --- Golden manifests -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", [stage.name for stage in manifest_specs.open_sora().stages])
def test_golden_manifests_of_the_published_stages(stage: str, profile: ClusterProfile) -> None:
    resources = manifest_specs.open_sora().stage(stage).spec.resources
    intent = manifest_specs.intent("open-sora-1.0", stage, "0" * 12, 1, resources.nodes, resources.devices_per_node)
    text = manifest.dump([manifest.pytorch_job(intent, profile, "s3://open-sora/runs")])
    path = GOLDEN / f"{stage}.yaml"
    if os.environ.get("OSCTL_UPDATE_GOLDEN"):
        path.write_text(text)
    assert text == path.read_text()
    assert Keys("open-sora-1.0").intent(stage, "0" * 12, 1) in text
