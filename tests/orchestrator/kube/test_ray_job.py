"""The RayJob that prepares raw videos on many pods. Golden manifest: golden/prepare-ray.yaml, as that of test_prepare_job.py.

That the API server and KubeRay take it is tested in tests/cluster/test_prepare_in_cluster.py.
"""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from pod_security import violations

from orchestrator.errors import Refused
from orchestrator.kube import names, yaml_text
from orchestrator.kube.ray_job import ray_job
from orchestrator.labels import Label
from orchestrator.recipe.cluster_profile import ClusterProfile

GOLDEN = Path(__file__).parents[1] / "golden/prepare-ray.yaml"
STORE = "s3://b/runs"


def with_changes(profile: ClusterProfile, **changes: Any) -> ClusterProfile:
    return ClusterProfile.model_validate(profile.model_dump() | changes)


def pods_of(job: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """By group, a pod as KubeRay makes it of its template."""
    cluster = job["spec"]["rayClusterSpec"]
    groups = {"head": cluster["headGroupSpec"]} | {group["groupName"]: group for group in cluster["workerGroupSpecs"]}
    return {name: group["template"] for name, group in groups.items()}


def test_every_pod_is_confined_and_the_head_alone_has_a_token(profile: ClusterProfile) -> None:
    pods = pods_of(ray_job(profile, STORE, "mine", "0" * 16, 1, pods=3, gpus=2))
    assert set(pods) == {"head", "cpu", "gpu"} and not [fault for pod in pods.values() for fault in violations(pod)]
    assert {name: pod["spec"]["automountServiceAccountToken"] for name, pod in pods.items()} == {"head": True, "cpu": False, "gpu": False}
    for pod in pods.values():
        (container,) = pod["spec"]["containers"]
        assert (
            container["securityContext"]["readOnlyRootFilesystem"]
            and container["resources"]["requests"] == container["resources"]["limits"]
        )
        assert "httpGet" in container["livenessProbe"] and "httpGet" in container["readinessProbe"], "KubeRay's own want wget in the image"
        assert not [one for one in container["env"] if "value" in one and "SECRET" in one["name"]], "credentials are named, not held"


def test_the_head_decodes_nothing_and_workers_offer_what_they_have(profile: ClusterProfile) -> None:
    job = ray_job(with_changes(profile, prepare={"cpu": "16"}), STORE, "mine", "0" * 16, 1, pods=3, gpus=2)
    cluster = job["spec"]["rayClusterSpec"]
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    cpu, gpu = cluster["workerGroupSpecs"]
    assert (cpu["replicas"], cpu["rayStartParams"]["num-cpus"]) == (3, "16") and "num-gpus" not in cpu["rayStartParams"]
    assert (gpu["replicas"], gpu["rayStartParams"]["num-gpus"]) == (2, "1")
    assert gpu["template"]["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "1"


def test_it_lives_once_and_its_pods_go_with_its_end(profile: ClusterProfile) -> None:
    job = ray_job(profile, STORE, "mine", "0" * 16, 2, pods=1)
    spec = job["spec"]
    assert shlex.split(spec["entrypoint"]) == ["osctl", "prepare", "drive", "--store", STORE, "--name", "mine", "--order", "0" * 16]
    assert (spec["backoffLimit"], spec["shutdownAfterJobFinishes"], spec["ttlSecondsAfterFinished"]) == (0, True, 0)
    assert spec["submissionMode"] == "HTTPMode", "the others start a submitter that dies with the head"
    assert spec["rayClusterSpec"]["authOptions"] == {"mode": "token"}
    assert names.is_ours(job, STORE, names.prepare_key("mine", 2)) and yaml.safe_load(yaml_text.dump([job])) == job


def test_its_name_leaves_room_for_what_kuberay_appends(profile: ClusterProfile) -> None:
    for name in ("m", "m" * 60):
        assert len(ray_job(profile, STORE, name, "0" * 16, 999, pods=1)["metadata"]["name"]) <= 47


def test_kueue_starts_it_where_the_profile_queues(profile: ClusterProfile) -> None:
    assert "suspend" not in ray_job(profile, STORE, "mine", "0" * 16, 1, pods=1)["spec"]
    queued = ray_job(with_changes(profile, queue="kueue", kueue_queue="train"), STORE, "mine", "0" * 16, 1, pods=1)
    assert (queued["metadata"]["labels"][Label.QUEUE_NAME], queued["spec"]["suspend"]) == ("train", True)


def test_a_store_with_credentials_in_it_is_refused(profile: ClusterProfile) -> None:
    with pytest.raises(Refused, match="holds credentials"):
        ray_job(profile, "s3://key:secret@b/p", "mine", "0" * 16, 1, pods=1)


def test_golden_manifest_of_a_preparation_on_ray(profile: ClusterProfile) -> None:
    text = yaml_text.dump([ray_job(profile, "s3://open-sora/runs", "films", "0" * 16, 1, pods=4, gpus=2)])
    if os.environ.get("OSCTL_UPDATE_GOLDEN"):
        GOLDEN.write_text(text)
    assert GOLDEN.read_text() == text
