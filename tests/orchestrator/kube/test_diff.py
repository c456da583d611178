"""What differs between what runs and what would be sent now, and what that means."""

from __future__ import annotations

import copy
from typing import Any

import manifest_specs
import pytest
from hypothesis import given, settings
from manifest_specs import Spec, job_of, rendered

from orchestrator.kube import manifest
from orchestrator.kube.diff import job_differences, stage_differences
from orchestrator.labels import Annotation
from orchestrator.recipe.cluster_profile import ClusterProfile


def given_back(job: dict[str, Any]) -> dict[str, Any]:
    """As an API server, a queue and a drain leave it."""
    there = copy.deepcopy(job)
    there["metadata"] |= {"uid": "1", "resourceVersion": "5", "creationTimestamp": "2026-11-23T10:00:00Z", "generation": 2}
    there["metadata"]["annotations"][Annotation.WOKEN] = "1"
    there["metadata"]["labels"]["kueue.x-k8s.io/managed"] = "true"
    there["spec"]["runPolicy"]["suspend"] = not there["spec"]["runPolicy"]["suspend"]
    there["status"] = {"conditions": []}
    return there


@settings(max_examples=100, deadline=None)
@given(manifest_specs.specs())
def test_the_next_attempt_of_the_same_differs_in_nothing(spec: Spec) -> None:
    intent = spec.intent
    following = manifest_specs.intent(
        intent.pipeline, intent.stage, intent.inputs_digest, intent.attempt + 1, intent.nodes, intent.devices_per_node
    )
    later = manifest.pytorch_job(following, spec.profile, spec.store_url, exclude_nodes=spec.exclude_nodes)
    assert job_differences([given_back(rendered(spec))], [later]) == []
    assert stage_differences(intent, following) == []


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
    (found,) = job_differences([given_back(job_of(profile))], [job_of(profile.model_copy(update=update))])
    assert (found.path, found.new) == (path, new)
    assert old is None or found.old == old
    assert meaning in found.meaning


def test_a_longer_save_is_told_from_what_waits(profile: ClusterProfile) -> None:
    found = job_differences([job_of(profile)], [job_of(profile.model_copy(update={"save_s": 300}))])
    assert [each.path for each in found] == ["container.lifecycle.preStop.exec.command", "pod.terminationGracePeriodSeconds"]
    assert all("until then a save must fit into the old one" in each.meaning for each in found)


def test_another_global_batch_cannot_be_resumed() -> None:
    config = manifest_specs.stage_config()
    old = manifest_specs.intent("p", "s", "0" * 12, 1, 8, 8, config=config.model_copy(update={"batch_size": 8}))
    halved = manifest_specs.intent("p", "s", "1" * 12, 1, 8, 8, config=config.model_copy(update={"batch_size": 4}))
    batch, field = stage_differences(old, halved)
    assert (batch.path, batch.old, batch.new) == ("global batch", 512, 256)
    assert "exact resume is not possible" in batch.meaning
    assert (field.path, field.old, field.new) == ("stage.batch_size", 8, 4)
    fewer = stage_differences(old, old.model_copy(update={"nodes": 4, "inputs_digest": "2" * 12}))
    assert [(each.path, each.old, each.new) for each in fewer] == [("global batch", 512, 256), ("nodes", 8, 4)]


def test_another_model_is_another_result_and_other_devices_of_the_same_number_are_not() -> None:
    old = manifest_specs.intent("p", "s", "0" * 12, 1, 8, 8)
    model = old.config.model.model_copy(update={"depth": 3})
    (found,) = stage_differences(old, old.model_copy(update={"config": old.config.model_copy(update={"model": model})}))
    assert found.path == "stage.model.depth"
    assert "the old result stays" in found.meaning
    spread = stage_differences(old, old.model_copy(update={"nodes": 16, "devices_per_node": 4}))
    assert [each.path for each in spread] == ["nodes", "devices_per_node"]
    assert all("resumes" in each.meaning for each in spread)


def test_a_parent_that_was_made_anew_is_named() -> None:
    old = manifest_specs.intent("p", "s", "0" * 12, 1, 1, 1)
    (found,) = stage_differences(old, old.model_copy(update={"inputs_digest": "1" * 12}))
    assert "its parent has another result now" in found.meaning
    (found,) = stage_differences(old, old.model_copy(update={"hang_timeout_s": 600.0}))
    assert (found.path, found.meaning) == ("hang_timeout_s", "takes effect at the next attempt")
