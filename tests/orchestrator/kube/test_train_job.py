"""Laws of TrainJob manifests: they say of an attempt what a PyTorchJob says, and nothing starts it a second time."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import manifest_specs
import pytest
from hypothesis import HealthCheck, given, settings
from manifest_specs import Spec
from pod_security import violations

from orchestrator.errors import Refused
from orchestrator.kube import manifest, names, train_job, yaml_text
from orchestrator.kube.operator import OPERATORS, PYTORCH_JOB, TRAIN_JOB
from orchestrator.labels import Annotation, Label
from orchestrator.ledger.records import Intent
from orchestrator.recipe.cluster_profile import ClusterProfile

GOLDEN = Path(__file__).parents[1] / "golden"
DNS_1035 = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")


def objects_of(profile: ClusterProfile, *, nodes: int = 8, devices: int = 8, attempt: int = 1) -> list[dict[str, Any]]:
    return train_job.train_job(manifest_specs.intent("p", "s", "0" * 12, attempt, nodes, devices), profile, "s3://b/p")


def of_kind(objects: list[dict[str, Any]], kind: str) -> dict[str, Any]:
    (found,) = [one for one in objects if one["kind"] == kind]
    return found


def job_spec(objects: list[dict[str, Any]]) -> dict[str, Any]:
    (only,) = of_kind(objects, "TrainingRuntime")["spec"]["template"]["spec"]["replicatedJobs"]
    assert only["replicas"] == 1
    return dict(only["template"]["spec"])


def environment(container: dict[str, Any]) -> dict[str, str]:
    return {entry["name"]: entry["value"] for entry in container["env"] if "value" in entry}


def is_the_same_whichever_operator_makes_it(spec: Spec) -> None:
    """A pod, but for its name, the label that counts it, and the meeting, which one operator writes into it and the other does not."""
    of_v1, of_v2 = (one.pods(one.objects(spec.intent, spec.profile, spec.store_url, exclude_nodes=spec.exclude_nodes)) for one in OPERATORS)
    assert len(of_v1) == len(of_v2) == spec.intent.nodes
    one, other = of_v1[-1]["spec"], of_v2[-1]["spec"]
    first, second = one["containers"][0], other["containers"][0]
    alone = {"name", "env", "ports"}
    assert {key: value for key, value in first.items() if key not in alone} == {
        key: value for key, value in second.items() if key not in alone
    }
    assert {**one, "containers": []} == {**other, "containers": []}
    assert environment(second) == environment(first) | {
        name: value for name, value in environment(second).items() if name.startswith(("PET_NNODES", "PET_RDZV"))
    }
    assert first["env"][0]["valueFrom"]["fieldRef"]["fieldPath"] == f"metadata.labels['{Label.REPLICA_INDEX}']"
    assert second["env"][0]["valueFrom"]["fieldRef"]["fieldPath"] == f"metadata.labels['{Label.COMPLETION_INDEX}']"


def names_fit_and_no_pod_is_above_restricted(spec: Spec) -> None:
    objects = train_job.train_job(spec.intent, spec.profile, spec.store_url)
    assert len({one["metadata"]["name"] for one in objects}) == 1
    name = objects[0]["metadata"]["name"]
    assert len(name) <= 50 and DNS_1035.fullmatch(name)
    assert objects[-1]["spec"]["runtimeRef"]["name"] == name
    for pod in train_job.pods(objects):
        assert len(pod["metadata"]["name"]) <= 63 and violations(pod) == []
        assert names.attempt_of("Pod", pod["metadata"]["name"]) == (name, int(pod["metadata"]["labels"][Label.COMPLETION_INDEX]))
        assert pod["metadata"]["labels"][Label.RUN] == names.run_hash(spec.store_url, spec.intent.run_key)


@settings(max_examples=200, deadline=None)
@given(manifest_specs.specs())
def test_a_pod_is_the_same_whichever_operator_makes_it(spec: Spec) -> None:
    is_the_same_whichever_operator_makes_it(spec)


@settings(max_examples=200, deadline=None)
@given(manifest_specs.specs())
def test_names_fit_and_no_pod_is_above_restricted(spec: Spec) -> None:
    names_fit_and_no_pod_is_above_restricted(spec)


@pytest.mark.prove("specs")
@settings(max_examples=10_000, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(manifest_specs.specs())
def test_ten_thousand_valid_specs_are_good_train_jobs(spec: Spec) -> None:
    is_the_same_whichever_operator_makes_it(spec)
    names_fit_and_no_pod_is_above_restricted(spec)


def test_nothing_of_an_attempt_is_started_twice(profile: ClusterProfile) -> None:
    objects = objects_of(profile)
    job_set, job = of_kind(objects, "TrainingRuntime")["spec"]["template"]["spec"], job_spec(objects)
    assert job_set["failurePolicy"]["maxRestarts"] == 0 and job["backoffLimit"] == 0
    assert job["template"]["spec"]["restartPolicy"] == "Never"
    assert "ttlSecondsAfterFinished" not in str(objects), "Trainer makes a JobSet anew that has a time to live"
    assert of_kind(objects, "TrainJob")["metadata"]["annotations"][Annotation.KEEP_S] == str(profile.keep_s)


def test_a_gang_has_a_pod_group_without_min_resources_and_kueue_has_none(profile: ClusterProfile) -> None:
    gang = objects_of(profile)
    assert [one["kind"] for one in gang] == ["PodGroup", "TrainingRuntime", "TrainJob"], "the webhook wants the runtime first"
    assert gang[0]["spec"] == {"minMember": 8}, "with minResources a gang would wait beside free nodes"
    assert job_spec(gang)["template"]["metadata"]["labels"][Label.POD_GROUP] == gang[0]["metadata"]["name"]
    assert gang[-1]["spec"]["suspend"] is False and Label.QUEUE_NAME not in gang[-1]["metadata"]["labels"]
    queued = objects_of(profile.model_copy(update={"queue": "kueue", "kueue_queue": "train", "kueue_priority": "high"}))
    assert [one["kind"] for one in queued] == ["TrainingRuntime", "TrainJob"]
    assert queued[-1]["spec"]["suspend"] is True
    labels = queued[-1]["metadata"]["labels"]
    assert (labels[Label.QUEUE_NAME], labels[Label.QUEUE_PRIORITY]) == ("train", "high")
    assert Label.POD_GROUP not in job_spec(queued)["template"]["metadata"]["labels"]
    assert [one["kind"] for one in objects_of(profile, nodes=1)] == ["TrainingRuntime", "TrainJob"], "one pod is no gang"


def test_the_nodes_meet_at_the_first_by_its_name_in_the_headless_service(profile: ClusterProfile) -> None:
    objects = objects_of(profile)
    name = objects[0]["metadata"]["name"]
    env = environment(job_spec(objects)["template"]["spec"]["containers"][0])
    assert env["PET_RDZV_ENDPOINT"] == f"{name}-w-0-0.{name}:23456"
    assert (env["PET_RDZV_BACKEND"], env["PET_NNODES"]) == ("c10d", "8:8")
    alone = environment(job_spec(objects_of(profile, nodes=1))["template"]["spec"]["containers"][0])
    assert not [one for one in alone if one.startswith("PET_")], "the agent of one node starts torchrun alone"


@pytest.mark.parametrize("nodes", [2, 11, 64, 100])
def test_torchrun_puts_the_first_node_first_however_many_there_are(nodes: int) -> None:
    """It orders nodes by host name, as text; the pods' are by JobSet and Job."""
    hosts = [f"demo-stage2-a1-01234567-w-0-{index}.demo-stage2-a1-01234567.ns.svc.cluster.local" for index in range(nodes)]
    assert sorted(hosts)[0] == hosts[0]


def test_more_nodes_than_names_of_pods_allow_are_refused_with_both_numbers(profile: ClusterProfile) -> None:
    long = manifest_specs.intent("p" * 40, "s" * 40, "0" * 12, 1, 100, 1)
    assert train_job.train_job(long, profile, "s3://b/p")
    with pytest.raises(Refused, match=r"101 nodes .* 64 characters, and JobSet takes 63; shorten"):
        train_job.train_job(long.model_copy(update={"nodes": 101}), profile, "s3://b/p")


def test_the_first_attempt_is_refused_where_a_later_one_would_be(profile: ClusterProfile) -> None:
    """The number of an attempt is a part of its name: the tenth would be refused after nine that trained."""
    short = [f"p{'p' * more}" for more in range(40)]
    names = [manifest_specs.intent(pipeline, "ssssss", "0" * 12, 1, 120, 1) for pipeline in short]
    for first in names:
        later = [
            first.model_copy(update={"run_key": first.run_key.removesuffix("/a1") + f"/a{n}", "attempt": n}) for n in (9, 10, 100, 9999)
        ]
        assert refused(first, profile) or not any(refused(one, profile) for one in later), first.run_key
    assert refused(names[-1], profile) and not refused(names[0], profile)


def refused(intent: Intent, profile: ClusterProfile) -> bool:
    try:
        train_job.train_job(intent, profile, "s3://b/p")
    except Refused:
        return True
    return False


def test_objects_of_one_attempt_have_one_digest_and_any_change_is_in_it(profile: ClusterProfile) -> None:
    def digests(**changes: Any) -> set[str]:
        return {one["metadata"]["annotations"][Annotation.SPEC_HASH] for one in objects_of(profile.model_copy(update=changes))}

    assert len(digests()) == 1 and digests() == digests()
    assert digests(memory="800Gi").isdisjoint(digests()), "only the runtime differs, and the job tells"


def test_a_store_url_with_credentials_is_refused_and_not_shown(profile: ClusterProfile) -> None:
    with pytest.raises(Refused) as caught:
        train_job.train_job(manifest_specs.intent("p", "s", "0" * 12, 1, 1, 1), profile, "s3://AKIA:hunter2@bucket/p")
    assert "hunter2" not in str(caught.value)


def test_every_object_has_a_place_in_the_api() -> None:
    from orchestrator.kube.client import PLACES

    for operator in OPERATORS:
        assert {*operator.plurals.values(), *operator.beside, *operator.below, operator.plural} <= set(PLACES)
        assert operator.api == PLACES[operator.plural]


def test_a_suspension_that_a_driver_asks_for_says_so() -> None:
    for operator, where in ((PYTORCH_JOB, {"runPolicy": {"suspend": True}}), (TRAIN_JOB, {"suspend": True})):
        assert operator.suspend(asked=False) == {"spec": where}
        assert operator.suspend(asked=True) == {"spec": where, "metadata": {"annotations": {Annotation.ASKED: "to leave"}}}


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_golden_manifests_of_published_stages(stage: str, profile: ClusterProfile) -> None:
    resources = manifest_specs.open_sora().stage(stage).spec.resources
    intent = manifest_specs.intent("open-sora-1.0", stage, "0" * 12, 1, resources.nodes, resources.devices_per_node)
    text = yaml_text.dump(train_job.train_job(intent, profile, "s3://open-sora/runs"))
    path = GOLDEN / f"{stage}-trainjob.yaml"
    if os.environ.get("OSCTL_UPDATE_GOLDEN"):
        path.write_text(text)
    assert text == path.read_text()


def test_pods_of_a_pytorchjob_are_what_they_were(profile: ClusterProfile) -> None:
    intent = manifest_specs.intent("p", "s", "0" * 12, 1, 8, 8)
    job = manifest.pytorch_job(intent, profile, "s3://b/p")
    assert PYTORCH_JOB.objects(intent, profile, "s3://b/p") == [job] and PYTORCH_JOB.pods([job]) == manifest.pods(job)
