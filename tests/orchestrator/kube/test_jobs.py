"""The Jobs that run `osctl` itself in a cluster."""

from __future__ import annotations

import manifest_specs
import yaml
from manifest_specs import expanded
from pod_security import violations

from orchestrator.kube import jobs, manifest, names, yaml_text
from orchestrator.labels import Label
from orchestrator.recipe.cluster_profile import ClusterProfile


def test_a_driver_is_tried_again_until_it_has_said_a_last_word() -> None:
    job = jobs.driver_job(manifest_specs.open_sora(), "s3://b/$(HOME)", 4, 2, ["stage2", "stage3a"])
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
    assert names.is_ours(job, "s3://b/$(HOME)", names.driver_key("open-sora-1.0", 2))
    assert yaml.safe_load(yaml_text.dump([job])) == job


def test_data_that_pods_alone_see_is_read_by_a_confined_job(profile: ClusterProfile) -> None:
    volumes = ({"claim": "clips", "path": "/data"},)
    site = ClusterProfile.model_validate(profile.model_dump() | {"volumes": volumes})
    job = jobs.register_job(site, "s3://b/runs", "hq", "/data/$(HOME)/hq.csv", 1)
    (pod,) = manifest.pods(job)
    (reader,) = pod["spec"]["containers"]
    command = [expanded(word, {"HOME": "/oops"}) for word in reader["command"]]
    assert command == ["osctl", "data", "register", "hq", "/data/$(HOME)/hq.csv", "--store", "s3://b/runs"]
    assert violations(pod) == [] and pod["spec"]["automountServiceAccountToken"] is False, "it asks no API server"
    assert {"name": "data-0", "mountPath": "/data", "readOnly": True} in reader["volumeMounts"]
    assert reader["image"] == site.image, "the driver's image opens no addresses"
    assert Label.PIPELINE not in job["metadata"]["labels"], "no launch takes it for a driver"
    assert len(job["metadata"]["name"]) <= 50 and yaml.safe_load(yaml_text.dump([job])) == job
    assert names.is_ours(job, "s3://b/runs", names.register_key("hq", 1))


def test_an_image_is_asked_by_a_confined_job_without_a_device(profile: ClusterProfile) -> None:
    needs = '{"stages":[{"prompts":["$(HOME)"]}]}'
    job = jobs.image_check_job(profile, "s3://b/runs", needs, 1)
    (pod,) = manifest.pods(job)
    (asked,) = pod["spec"]["containers"]
    assert [expanded(word, {"HOME": "/oops"}) for word in asked["command"]] == ["python", "-m", "orchestrator.agent.accepts", needs]
    assert asked["image"] == profile.image and violations(pod) == []
    assert pod["spec"]["automountServiceAccountToken"] is False
    assert set(asked["resources"]["requests"]) == set(asked["resources"]["limits"]) == {"cpu", "memory"}, "no device is held"
    assert job["spec"]["activeDeadlineSeconds"] == profile.start_deadline_s, "an image that cannot be pulled ends it"
    assert Label.PIPELINE not in job["metadata"]["labels"] and len(job["metadata"]["name"]) <= 50
    assert names.is_ours(job, "s3://b/runs", names.image_check_key(profile.image, needs))
    other = jobs.image_check_job(profile, "s3://b/runs", needs + " ", 1)
    assert other["metadata"]["name"] != job["metadata"]["name"], "another question is another Job"


def test_a_queue_holds_each_of_these_jobs_back_and_their_pods_know_nothing_of_it(profile: ClusterProfile) -> None:
    """Without one they are what they were, so that a Job of an earlier release is still adopted."""
    queued = profile.model_copy(update={"driver_queue": "drivers"})
    pipeline = manifest_specs.open_sora()
    made = [
        lambda site: jobs.driver_job(pipeline.model_copy(update={"cluster": site}), "s3://b/p", 1, 1, []),
        lambda site: jobs.register_job(site, "s3://b/runs", "hq", "/data/hq.csv", 1),
        lambda site: jobs.image_check_job(site, "s3://b/runs", "{}", 1),
    ]
    for make in made:
        job, free = make(queued), make(profile)
        assert (job["metadata"]["labels"][Label.QUEUE_NAME], job["spec"]["suspend"]) == ("drivers", True)
        assert Label.QUEUE_NAME not in free["metadata"]["labels"] and "suspend" not in free["spec"]
        assert job["spec"]["template"] == free["spec"]["template"]
        assert Label.QUEUE_NAME not in job["spec"]["template"]["metadata"]["labels"]
