"""What is sent to Kubernetes for an attempt: laws over random specs, its shape, what text becomes.

Golden manifests: golden/<stage>.yaml holds what open-sora-1.0 sends with the profile h800-64. After a change that is meant,
`OSCTL_UPDATE_GOLDEN=1 .venv/bin/pytest tests/orchestrator/kube/test_manifest.py -k golden` writes them anew; read the diff before
committing it.
"""

from __future__ import annotations

import copy
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import manifest_specs
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from manifest_specs import HOSTILE, Spec, container, environment, expanded, job_of, rendered
from pod_security import violations

from orchestrator.errors import Refused
from orchestrator.kube import manifest, names, yaml_text
from orchestrator.labels import Annotation, Label
from orchestrator.ledger.keys import Keys
from orchestrator.recipe.cluster_profile import ClusterProfile

GOLDEN = Path(__file__).parents[1] / "golden"
DNS_1035 = re.compile(r"[a-z]([a-z0-9-]*[a-z0-9])?")


class GoYaml(yaml.CSafeLoader):
    """Takes for numbers what Go's reader does, besides what Python's does."""

    yaml_implicit_resolvers = copy.deepcopy(yaml.CSafeLoader.yaml_implicit_resolvers)


GO_NUMBER = re.compile(r"[-+]?(0[xob])?[0-9a-fA-F_.]*[0-9.]([eE][-+]?[0-9]+)?")
for letter in "+-.0123456789":
    GoYaml.yaml_implicit_resolvers.setdefault(letter, []).append(("tag:yaml.org,2002:float", GO_NUMBER))


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
    text = yaml_text.dump([job])
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
    assert names.is_ours(job, spec.store_url, key)
    assert not names.is_ours(job, spec.store_url + "x", key)
    assert not names.is_ours(job, spec.store_url, key + "1")
    for place, name in (("labels", Label.MANAGED_BY), ("annotations", Annotation.RUN_KEY), ("annotations", Annotation.STORE)):
        foreign = copy.deepcopy(job)
        del foreign["metadata"][place][name]
        assert names.owner(foreign) is None


def it_is_a_function_of_what_it_names(spec: Spec, job: dict[str, Any]) -> None:
    """`osctl render` knows neither epoch nor time, and has verified no parent: none of these may be in it."""
    later = spec.intent.model_copy(update={"epoch": 99, "created": 1e9, "code": "other", "config_digest": "f", "device": "a100"})
    again = manifest.pytorch_job(later, spec.profile, spec.store_url, exclude_nodes=tuple(reversed(spec.exclude_nodes)))
    assert json.dumps(again) == json.dumps(job)
    assert job["metadata"]["annotations"][Annotation.SPEC_HASH] == names.spec_hash(job)


def it_waits_for_all_nodes_or_for_kueue(spec: Spec, job: dict[str, Any]) -> None:
    policy = job["spec"]["runPolicy"]
    kueue = job["metadata"]["labels"].get(Label.QUEUE_NAME)
    assert job["metadata"]["labels"].get(Label.QUEUE_PRIORITY) == spec.profile.kueue_priority
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


def obeys_every_law(spec: Spec) -> None:
    job = rendered(spec)
    for law in LAWS:
        law(spec, job)


@pytest.mark.long
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(manifest_specs.specs())
def test_every_valid_spec_obeys_every_law(spec: Spec) -> None:
    obeys_every_law(spec)


@pytest.mark.prove("specs")
@settings(max_examples=10_000, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(manifest_specs.specs())
def test_ten_thousand_valid_specs_obey_every_law(spec: Spec) -> None:
    obeys_every_law(spec)


@pytest.mark.parametrize("word", HOSTILE)
def test_a_hostile_word_stays_a_word_everywhere(word: str, profile: ClusterProfile) -> None:
    spec = Spec(
        manifest_specs.intent("no", "null", "1e3e1e3e1e3e", 1, 2, 8),
        profile.model_copy(update={"nccl_ib_hca": word, "s3_region": word, "s3_endpoint": word}),
        f"s3://{word}/x" if "@" not in word else word,
    )
    job = rendered(spec)
    text_stays_text(spec, job)
    (read,) = yaml.safe_load_all(yaml_text.dump([job]))
    assert expanded(environment(read)["NCCL_IB_HCA"], {"HOME": "/oops"}) == word
    assert read["metadata"]["annotations"][Annotation.STORE] == spec.store_url


# --- The shape of an attempt ----------------------------------------------------------------------------------------------------------


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


def test_a_store_url_with_credentials_is_refused_and_not_shown(profile: ClusterProfile) -> None:
    with pytest.raises(Refused) as caught:
        manifest.pytorch_job(manifest_specs.intent("p", "s", "0" * 12, 1, 1, 1), profile, "s3://AKIA:hunter2@bucket/p")
    assert "hunter2" not in str(caught.value)
    assert "s3_secret" in str(caught.value)


# --- Golden manifests -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", [stage.name for stage in manifest_specs.open_sora().stages])
def test_golden_manifests_of_the_published_stages(stage: str, profile: ClusterProfile) -> None:
    resources = manifest_specs.open_sora().stage(stage).spec.resources
    intent = manifest_specs.intent("open-sora-1.0", stage, "0" * 12, 1, resources.nodes, resources.devices_per_node)
    text = yaml_text.dump([manifest.pytorch_job(intent, profile, "s3://open-sora/runs")])
    path = GOLDEN / f"{stage}.yaml"
    if os.environ.get("OSCTL_UPDATE_GOLDEN"):
        path.write_text(text)
    assert text == path.read_text()
    assert Keys("open-sora-1.0").intent(stage, "0" * 12, 1) in text
