"""Manifests on the real API server: random specs are accepted by the schema, the webhook and Pod Security, and broken ones are not.

Everything is a dry run. Checkers of pods see nothing inside a PyTorchJob, so its pods are sent as the pods that the operator would make.
"""

from __future__ import annotations

import copy
import json
import secrets
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import manifest_specs
import pytest
import tiny_recipe
import yaml
from hypothesis import HealthCheck, Phase, given, settings
from manifest_specs import HOSTILE, Spec
from pod_security import violations
from tiny_recipe import Osctl
from written_ledger import Writer

from orchestrator.errors import OsctlError, Refused
from orchestrator.kube import manifest, operator, yaml_text
from orchestrator.kube.client import Api
from orchestrator.kube.diff import job_differences
from orchestrator.kube.jobs import driver_job
from orchestrator.labels import Annotation
from orchestrator.ledger.store import Ledger
from orchestrator.recipe import adapt, files, resolve
from orchestrator.recipe.cluster_profile import ClusterProfile
from orchestrator.stores.folder import FolderStore

pytestmark = pytest.mark.cluster

NAMESPACE = f"manifests-{secrets.token_hex(4)}"
THREADS = 4


@pytest.fixture(scope="module")
def api(cluster: Any) -> Iterator[Api]:
    """A namespace that enforces "restricted", with the accounts that pods name."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KUBECONFIG", str(cluster.kubeconfig))
        api = Api.connect(None, NAMESPACE)
    labels = {"pod-security.kubernetes.io/enforce": "restricted"}
    namespace = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": NAMESPACE, "labels": labels}}
    cluster.kubectl("create", "-f", "-", stdin=yaml.safe_dump(namespace))
    try:
        for name in ("default-of-tests", "osctl-driver"):
            api.create("serviceaccounts", {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": name}})
        yield api
    finally:
        cluster.kubectl("delete", "namespace", NAMESPACE, "--wait=false")
        api.close()


def here(profile: ClusterProfile) -> ClusterProfile:
    """What a namespace must hold for a pod to be admitted, and this one does."""
    accounts = {"service_account": "default-of-tests", "driver_service_account": "osctl-driver"}
    return profile.model_copy(update={"namespace": NAMESPACE, "priority_class": None, **accounts})


def drawn(number: int) -> list[Spec]:
    found: list[Spec] = []

    @settings(max_examples=number, deadline=None, database=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck))
    @given(manifest_specs.specs())
    def draw(spec: Spec) -> None:
        found.append(spec.on(here(spec.profile)))

    draw()
    return found


def published() -> Spec:
    profile = manifest_specs.open_sora().cluster
    assert profile is not None
    return Spec(manifest_specs.intent("open-sora-1.0", "stage2", "0" * 12, 1, 8, 8), here(profile), "s3://open-sora/runs")


def rendered(spec: Spec) -> dict[str, Any]:
    return manifest.pytorch_job(spec.intent, spec.profile, spec.store_url, exclude_nodes=spec.exclude_nodes)


def said(api: Api, kind: str, body: dict[str, Any]) -> str | None:
    """What the server has against an object; none: nothing."""
    try:
        api.create(kind, body, dry_run=True)
    except OsctlError as error:
        return str(error)
    return None


def test_every_valid_spec_is_accepted_by_schema_webhook_and_pod_security(api: Api) -> None:
    assert refused(api, 200) == []


@pytest.mark.prove("specs-on-a-server")
@pytest.mark.timeout(2700)
def test_two_thousand_valid_specs_are_accepted_as_train_jobs(api: Api) -> None:
    assert refused_train_jobs(api, 2000) == []


def test_every_valid_spec_is_accepted_as_a_train_job(api: Api) -> None:
    assert refused_train_jobs(api, 60) == []


def refused_train_jobs(api: Api, number: int) -> list[tuple[Spec, str]]:
    """Trainer's webhook looks for a TrainJob's runtime, so each runtime is really there while its job is sent as a dry run."""
    kind = operator.TRAIN_JOB

    def verdict(spec: Spec) -> tuple[Spec, str | None]:
        *beside, job = objects = kind.objects(spec.intent, spec.profile, spec.store_url, exclude_nodes=spec.exclude_nodes)
        try:
            made = [(kind.plurals[one["kind"]], api.create(kind.plurals[one["kind"]], one)["metadata"]) for one in beside]
        except OsctlError as error:
            return spec, str(error)
        try:
            deadline = time.monotonic() + 10
            while (why := said(api, "trainjobs", job)) is not None and kind.is_early(why) and time.monotonic() < deadline:
                time.sleep(0.05)
            return spec, why or said(api, "pods", kind.pods(objects)[-1])
        finally:
            for plural, about in made:
                api.delete(plural, about["name"], uid=about["uid"])

    by_run = {(spec.store_url, spec.intent.run_key): spec for spec in drawn(number)}  # those of one name would meet on the server
    with ThreadPoolExecutor(THREADS) as pool:
        return [(spec, why) for spec, why in pool.map(verdict, by_run.values()) if why is not None]


def test_the_server_keeps_a_train_job_and_its_runtime_as_they_were_sent(api: Api) -> None:
    spec = published()
    kept = []
    objects = operator.TRAIN_JOB.objects(spec.intent, spec.profile, spec.store_url)
    for one in objects[:-1]:
        kept.append(api.create(operator.TRAIN_JOB.plurals[one["kind"]], one, dry_run=True))
        assert kept[-1]["spec"] == one["spec"], one["kind"]
        assert kept[-1]["metadata"]["annotations"] == one["metadata"]["annotations"]
    assert job_differences([*kept, objects[-1]], objects) == []


@pytest.mark.prove("specs-on-a-server")
@pytest.mark.timeout(2700)
def test_two_thousand_valid_specs_are_accepted(api: Api) -> None:
    assert refused(api, 2000) == []


def refused(api: Api, number: int) -> list[tuple[Spec, str]]:
    """Of so many random specs, those that the server does not take, with its words."""

    def verdict(spec: Spec) -> tuple[Spec, str | None]:
        job = rendered(spec)
        return spec, said(api, "pytorchjobs", job) or said(api, "pods", manifest.pods(job)[-1])

    with ThreadPoolExecutor(THREADS) as pool:
        return [(spec, why) for spec, why in pool.map(verdict, drawn(number)) if why is not None]


@pytest.mark.parametrize("stage", [stage.name for stage in manifest_specs.open_sora().stages])
def test_the_published_stages_and_their_driver_are_accepted(stage: str, api: Api) -> None:
    pipeline = manifest_specs.open_sora()
    resources = pipeline.stage(stage).spec.resources
    intent = manifest_specs.intent("open-sora-1.0", stage, "0" * 12, 1, resources.nodes, resources.devices_per_node)
    job = rendered(Spec(intent, published().profile, "s3://open-sora/runs"))
    assert said(api, "pytorchjobs", job) is None
    assert [said(api, "pods", pod) for pod in manifest.pods(job)] == [None] * resources.nodes
    driver = driver_job(pipeline.model_copy(update={"cluster": published().profile}), "s3://open-sora/runs", 1, 1, [stage])
    assert said(api, "jobs", driver) is None
    assert said(api, "pods", manifest.pods(driver)[0]) is None


def worker(job: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = job["spec"]["pytorchReplicaSpecs"]["Worker"]
    return found


@pytest.mark.parametrize(
    ("breaks", "words"),
    [
        (lambda job: job["metadata"].update(name="1-starts-with-a-digit"), "DNS-1035"),
        (lambda job: job["metadata"].update(name="Upper"), "RFC 1123"),
        (lambda job: job["spec"].update(pytorchReplicaSpecs={"Wrker": worker(job)}), "Wrker"),
        (lambda job: worker(job)["template"]["spec"]["containers"][0].update(name="trainer"), "pytorch"),
        (lambda job: worker(job).update(replicas=0), "replicas"),
        (lambda job: job["spec"]["elasticPolicy"].update(nProcPerNode=8), "nprocPerNode"),
        (lambda job: worker(job)["template"]["spec"]["containers"][0]["env"].append({"name": "A", "value": 1.0e3}), "value"),
        (lambda job: worker(job)["template"]["spec"]["containers"][0]["resources"]["limits"].update(cpu="many"), "quantities must match"),
    ],
)
def test_a_broken_job_is_refused_so_the_check_can_fail(breaks: Callable[[dict[str, Any]], Any], words: str, api: Api) -> None:
    job = rendered(published())
    breaks(job)
    with pytest.raises(Refused) as caught:
        api.create("pytorchjobs", job, dry_run=True)
    assert words in str(caught.value)


@pytest.mark.parametrize("rule", manifest_specs.BREAKS)
def test_the_server_refuses_what_our_checker_of_pod_security_sees(rule: str, api: Api) -> None:
    pod = manifest.pods(rendered(published()))[0]
    bad = copy.deepcopy(pod)
    manifest_specs.BREAKS[rule](bad)
    assert violations(bad)
    with pytest.raises(Refused, match=r'violates PodSecurity "restricted|Invalid|Forbidden'):
        api.create("pods", bad, dry_run=True)


def test_the_server_keeps_what_it_was_sent(api: Api) -> None:
    """No schema's default and no webhook changes a job, so the one that runs can be compared with what would be sent now."""
    job = rendered(published())
    kept = api.create("pytorchjobs", job, dry_run=True)
    assert kept["spec"] == job["spec"]
    assert kept["metadata"]["labels"] == job["metadata"]["labels"]
    assert kept["metadata"]["annotations"] == job["metadata"]["annotations"]
    assert job_differences([kept], [job]) == []


def test_kubectl_reads_hostile_words_as_we_wrote_them(api: Api, cluster: Any) -> None:
    """Go's reader of YAML, and not ours, is what a manifest in a file meets."""
    spec = published()
    jobs = []
    for number, word in enumerate(HOSTILE):
        profile = spec.profile.model_copy(update={"nccl_ib_hca": word, "s3_region": word})
        intent = manifest_specs.intent("no", "null", "1e3e1e3e1e3e", number + 1, 2, 8)
        jobs.append(manifest.pytorch_job(intent, profile, f"/mnt/{word}"))
    told = cluster.kubectl("create", "--dry-run=server", "-o", "json", "-f", "-", stdin=yaml_text.dump(jobs))
    objects = json.loads("[" + told.replace("}\n{", "},{") + "]")
    for job, read in zip(jobs, objects, strict=True):
        assert read["spec"] == job["spec"]
        assert read["metadata"]["annotations"] == job["metadata"]["annotations"]


def test_what_osctl_prints_is_what_kubectl_apply_takes(api: Api, cluster: Any, tmp_path: Path) -> None:
    profile = yaml.safe_load((files.shipped_folder() / "clusters/h800-64.yaml").read_text()) | {"namespace": NAMESPACE}
    (tmp_path / "here.yaml").write_text(yaml.safe_dump(profile))
    printed = Osctl(tmp_path)("render", "-f", "open-sora-1.0", "--cluster", "here.yaml", "--store", "store", "--driver").stdout
    said = cluster.kubectl("apply", "--dry-run=server", "-f", "-", stdin=printed)
    assert said.count("created (server dry run)") == 5, "four stages and a driver"


# --- osctl diff -----------------------------------------------------------------------------------------------------------------------


def test_diff_says_what_a_change_means_for_the_job_that_runs(api: Api, cluster: Any, tmp_path: Path) -> None:
    profile = {"namespace": NAMESPACE, "service_account": "default-of-tests", "queue": "kueue", "kueue_queue": "none-lets-it-go"}
    content = yaml.safe_load((files.shipped_folder() / "clusters/kind-cpu.yaml").read_text()) | profile
    (tmp_path / "here.yaml").write_text(yaml.safe_dump(content))
    tiny_recipe.write(tmp_path, stages=1, backend="kubernetes", cluster="here.yaml", flush_s=5.0)
    osctl = Osctl(tmp_path, {"KUBECONFIG": str(cluster.kubeconfig)})
    store = str(tmp_path / ".osctl/store")
    pipeline = adapt.on_devices(resolve.load(tmp_path / "osctl.yaml"), 0)
    assert pipeline.cluster is not None

    writer = Writer(Ledger(FolderStore(Path(store)), "tiny"), pipeline)
    writer.launch()
    intent = writer.begin("stage1")
    assert "has no job in namespace" in osctl("diff").stderr
    job = api.create("pytorchjobs", manifest.pytorch_job(intent, pipeline.cluster, store))
    assert "stage1 attempt 1: runs as it would be sent now" in osctl("diff").stderr

    changed = osctl("diff", "--set", "stage1.batch_size=2", "-o", "json")
    batch, field = json.loads(changed.stdout)
    assert (batch["field"], batch["running"], batch["now"]) == ("global batch", 8, 4)
    assert "exact resume is not possible" in batch["meaning"]
    assert (field["field"], field["running"], field["now"]) == ("stage.batch_size", 4, 2)

    (tmp_path / "here.yaml").write_text(yaml.safe_dump(content | {"shm": "128Mi"}))
    (shm,) = json.loads(osctl("diff", "-o", "json").stdout)
    assert (shm["field"], shm["running"], shm["now"]) == ("pod.volumes.shm.emptyDir.sizeLimit", "256Mi", "128Mi")
    assert shm["meaning"] == "takes effect at the next attempt"

    api.patch(
        "pytorchjobs",
        job["metadata"]["name"],
        {"metadata": {"annotations": {Annotation.STORE: "s3://someone/else"}}},
        uid=job["metadata"]["uid"],
    )
    assert "was not made by osctl for tiny/stage1@" in osctl("diff", expect=4).stderr
