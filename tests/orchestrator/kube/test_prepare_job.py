"""The Job that prepares raw videos. Golden manifest: golden/prepare.yaml; after a change that is meant, `OSCTL_UPDATE_GOLDEN=1` writes it
anew, as those of test_manifest.py."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import yaml
from manifest_specs import expanded
from pod_security import violations

from orchestrator.errors import Refused
from orchestrator.kube import manifest, names, yaml_text
from orchestrator.kube.prepare_job import prepare_job
from orchestrator.labels import Label
from orchestrator.recipe.cluster_profile import ClusterProfile

GOLDEN = Path(__file__).parents[1] / "golden/prepare.yaml"
INDEXED = GOLDEN.with_name("prepare-indexed.yaml")
STORE = "s3://b/$(HOME)"


def with_changes(profile: ClusterProfile, **changes: Any) -> ClusterProfile:
    return ClusterProfile.model_validate(profile.model_dump() | changes)


def test_a_pod_that_decodes_what_strangers_made_is_confined_and_has_no_token(profile: ClusterProfile) -> None:
    job = prepare_job(profile, STORE, "mine", "0" * 16, 2)
    (pod,) = manifest.pods(job)
    (container,) = pod["spec"]["containers"]
    assert [expanded(word, {"HOME": "/oops"}) for word in container["command"]] == [
        *("osctl", "prepare", "drive", "--store", STORE, "--name", "mine", "--order", "0" * 16)
    ]
    assert violations(pod) == [] and pod["spec"]["automountServiceAccountToken"] is False
    assert container["image"] == profile.image, "the driver's image decodes nothing"
    assert container["resources"]["requests"] == container["resources"]["limits"]
    assert profile.gpu_resource not in container["resources"]["requests"], "GPUs are given to who asks for them"
    assert Label.PIPELINE not in job["metadata"]["labels"], "no launch takes it for a driver"
    assert names.is_ours(job, STORE, names.prepare_key("mine", 2)) and len(job["metadata"]["name"]) <= 50
    assert yaml.safe_load(yaml_text.dump([job])) == job


def test_it_is_tried_again_until_it_has_said_a_last_word(profile: ClusterProfile) -> None:
    spec = prepare_job(profile, STORE, "mine", "0" * 16, 1)["spec"]
    ignored, done = spec["podFailurePolicy"]["rules"]
    assert (ignored["action"], ignored["onPodConditions"][0]["type"]) == ("Ignore", "DisruptionTarget")
    assert (done["action"], done["onExitCodes"]["values"]) == ("FailJob", [2, 3, 4, 130])
    assert (spec["podReplacementPolicy"], spec["template"]["spec"]["restartPolicy"]) == ("Failed", "Never")


def test_what_the_profile_says_of_pods_that_prepare_comes_before_what_it_says_of_trainers(profile: ClusterProfile) -> None:
    own = {"cpu": "8", "memory": "128Gi", "scratch": "100Gi", "node_selector": {"pool": "cpu"}, "tolerations": [], "caption_secret": "key"}
    site = with_changes(profile, prepare=own)
    (pod,) = manifest.pods(prepare_job(site, STORE, "mine", "0" * 16, 1))
    (container,) = pod["spec"]["containers"]
    assert container["resources"]["requests"] == {"cpu": "8", "memory": "128Gi", "ephemeral-storage": "100Gi"}
    assert pod["spec"]["nodeSelector"] == {"pool": "cpu"}
    assert {one["key"].partition("/")[0] for one in pod["spec"]["tolerations"]} == {"node.kubernetes.io"}
    (key,) = (one for one in container["env"] if one["name"] == "OSCTL_CAPTION_KEY")
    assert key["valueFrom"]["secretKeyRef"]["name"] == "key", "the manifest names the secret and holds none"

    (pod,) = manifest.pods(prepare_job(site, STORE, "mine", "0" * 16, 1, gpus=4))
    assert pod["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "4"
    assert pod["spec"]["nodeSelector"] == profile.node_selector, "GPUs are on the trainers' nodes"


def test_kueue_starts_it_where_the_profile_queues(profile: ClusterProfile) -> None:
    free = prepare_job(profile, STORE, "mine", "0" * 16, 1)
    assert "suspend" not in free["spec"] and Label.QUEUE_NAME not in free["metadata"]["labels"]
    queued = prepare_job(with_changes(profile, queue="kueue", kueue_queue="train"), STORE, "mine", "0" * 16, 1)
    assert (queued["metadata"]["labels"][Label.QUEUE_NAME], queued["spec"]["suspend"]) == ("train", True)
    assert queued["spec"]["template"] == free["spec"]["template"]


def test_a_store_with_credentials_in_it_is_refused(profile: ClusterProfile) -> None:
    with pytest.raises(Refused, match="holds credentials"):
        prepare_job(profile, "s3://key:secret@b/p", "mine", "0" * 16, 1)


def test_of_several_pods_each_index_has_its_own_tries_and_knows_its_job(profile: ClusterProfile) -> None:
    job = prepare_job(profile, STORE, "mine", "0" * 16, 1, pods=8)
    spec, (pod,) = job["spec"], manifest.pods(job)[:1]
    assert (spec["completionMode"], spec["completions"], spec["parallelism"]) == ("Indexed", 8, 8)
    assert (spec["backoffLimitPerIndex"], spec["maxFailedIndexes"]) == (6, 0) and "backoffLimit" not in spec
    assert spec["podFailurePolicy"] == prepare_job(profile, STORE, "mine", "0" * 16, 1)["spec"]["podFailurePolicy"]
    (container,) = pod["spec"]["containers"]
    assert container["command"][-2:] == ["--shards", "8"] and violations(pod) == [] and not pod["spec"]["automountServiceAccountToken"]
    (uid,) = (one for one in container["env"] if one["name"] == "OSCTL_JOB_UID")
    assert uid["valueFrom"]["fieldRef"]["fieldPath"] == "metadata.labels['batch.kubernetes.io/controller-uid']"


def test_golden_manifest_of_a_preparation_on_several_pods(profile: ClusterProfile) -> None:
    text = yaml_text.dump([prepare_job(profile, "s3://open-sora/runs", "films", "0" * 16, 1, pods=4)])
    if os.environ.get("OSCTL_UPDATE_GOLDEN"):
        INDEXED.write_text(text)
    assert INDEXED.read_text() == text


def test_golden_manifest_of_a_preparation(profile: ClusterProfile) -> None:
    text = yaml_text.dump([prepare_job(profile, "s3://open-sora/runs", "films", "0" * 16, 1)])
    if os.environ.get("OSCTL_UPDATE_GOLDEN"):
        GOLDEN.write_text(text)
    assert GOLDEN.read_text() == text
