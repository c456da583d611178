"""`osctl render` prints exactly what a launch sends, whatever the ledger says and also where it cannot be read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny_recipe
import yaml
from tiny_recipe import Osctl
from written_ledger import Writer

from orchestrator.driver.runner import Runner
from orchestrator.errors import Refused
from orchestrator.kube import manifest, parts
from orchestrator.ledger.store import Ledger, read_intent
from orchestrator.ports import Life
from orchestrator.recipe import adapt, resolve
from orchestrator.recipe.pipeline import Pipeline
from orchestrator.stores.folder import FolderStore

CLUSTER = ("--cluster", "kind-cpu")
NO_ANSWER = {
    "AWS_ACCESS_KEY_ID": "a",
    "AWS_SECRET_ACCESS_KEY": "b",
    "OSCTL_S3_ENDPOINT": "http://127.0.0.1:9",
    "OSCTL_S3_PATIENCE_S": "0.2",
}


@pytest.fixture
def osctl(tmp_path: Path) -> Osctl:
    return Osctl(tiny_recipe.write(tmp_path / "recipe"))


def pipeline(osctl: Osctl) -> Pipeline:
    overrides = {"backend": "kubernetes", "cluster": "kind-cpu"}
    return adapt.on_devices(resolve.load(osctl.folder / "osctl.yaml", overrides=overrides), 0)


def ledger(osctl: Osctl) -> Ledger:
    return Ledger(FolderStore(osctl.folder / ".osctl/store"), "tiny")


class Recorder:
    """A cluster that writes down what it is sent, and says no."""

    def __init__(self, osctl: Osctl):
        self.osctl, self.sent = osctl, list[dict[str, Any]]()

    def submit(self, intent_key: str, run_key: str) -> None:
        profile = pipeline(self.osctl).cluster
        assert profile is not None
        store = FolderStore(self.osctl.folder / ".osctl/store")
        self.sent.append(manifest.pytorch_job(read_intent(store, intent_key), profile, str(self.osctl.folder / ".osctl/store")))
        raise Refused("no: as the test wants it")

    def check(self, run_key: str, nodes: int) -> None: ...

    def observe(self, run_key: str) -> Life:
        return Life("absent")

    def drain(self, run_key: str) -> None: ...
    def kill(self, run_key: str) -> None: ...
    def forget(self, run_key: str) -> None: ...


def launched(osctl: Osctl, *targets: str) -> list[dict[str, Any]]:
    """What a driver sends."""
    recorder = Recorder(osctl)
    Runner(pipeline(osctl), ledger(osctl), recorder).run(targets or None)
    return recorder.sent


def rendered(osctl: Osctl, *arguments: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(osctl("render", *CLUSTER, *arguments).stdout))


@pytest.mark.long
def test_what_is_rendered_is_what_launch_sends(osctl: Osctl) -> None:
    """For a first attempt, for the one after it, and for a stage whose parent is committed: its inputs, number and name."""
    for number in (1, 2):
        shown = rendered(osctl, "stage1")
        assert shown == launched(osctl, "stage1")
        assert shown[0]["metadata"]["labels"]["osctl/attempt"] == str(number)
    # A whole chain would need its checkpoints verified; the parent's record is what inputs, and so the name, come from.
    writer = Writer(ledger(osctl), pipeline(osctl))
    writer.launch()
    committed = writer.finish(writer.begin("stage1"))
    (shown,) = rendered(osctl, "stage2")
    assert shown["metadata"]["annotations"]["osctl/run-key"] == f"tiny/stage2@{writer.inputs_digest('stage2')}/a1"
    assert f"from stage1@{committed.inputs_digest} at step 8" in osctl("render", *CLUSTER, "stage2").stderr


def test_a_stage_whose_parent_is_not_committed_is_marked(osctl: Osctl) -> None:
    done = osctl("render", *CLUSTER)
    first, second, third = yaml.safe_load_all(done.stdout)
    assert "@000000000000/" not in first["metadata"]["annotations"]["osctl/run-key"]
    for job in (second, third):
        assert "@000000000000/" in job["metadata"]["annotations"]["osctl/run-key"]
    assert "stage2: attempt 1, once stage1 is committed; 000000000000 stands for its inputs" in done.stderr


def test_a_committed_stage_sends_nothing_and_an_open_attempt_is_gone_on_with(osctl: Osctl) -> None:
    writer = Writer(ledger(osctl), pipeline(osctl))
    writer.launch()
    writer.finish(writer.begin("stage1"))
    open_ = writer.begin("stage2")
    writer.publish(open_, 4)
    done = osctl("render", *CLUSTER)
    assert [job["metadata"]["labels"]["osctl/stage"] for job in yaml.safe_load_all(done.stdout)] == ["stage2", "stage3"]
    assert "stage1: is committed, launch sends nothing for it" in done.stderr
    assert "stage2: attempt 2" in done.stderr and "resumes at step 4" in done.stderr and "attempt 1 is still open" in done.stderr


def test_the_driver_is_rendered_with_the_revision_that_launch_would_write(osctl: Osctl) -> None:
    def revision() -> str:
        (driver,) = [each for each in rendered(osctl, "stage1", "--driver") if each["kind"] == "Job"]
        words = driver["spec"]["template"]["spec"]["containers"][0]["command"]
        assert words[words.index("--target") + 1] == "stage1"
        return str(words[words.index("--revision") + 1])

    assert revision() == "1"
    launched(osctl, "stage1")
    assert len(ledger(osctl).revisions()) == 1
    ledger(osctl).add_revision({"another": "pipeline"}, 1.0)
    assert revision() == "3"


@pytest.mark.parametrize(
    "env",
    [
        NO_ANSWER,
        {"AWS_EC2_METADATA_DISABLED": "true", "AWS_SHARED_CREDENTIALS_FILE": "/dev/null", "AWS_CONFIG_FILE": "/dev/null"},
    ],
    ids=["no answer", "no credentials"],
)
def test_without_store_and_cluster_it_prints_what_a_first_launch_would_send(env: dict[str, str], tmp_path: Path) -> None:
    osctl = Osctl(tmp_path, {**env, "KUBECONFIG": "/dev/null"})
    done = osctl("render", "-f", "open-sora-1.0")
    assert "printed as if nothing had run" in done.stderr
    golden = Path(__file__).parent.parent / "golden"
    for job in yaml.safe_load_all(done.stdout):
        kept = yaml.safe_load((golden / f"{job['metadata']['labels']['osctl/stage']}.yaml").read_text())
        assert job["spec"]["runPolicy"] == kept["spec"]["runPolicy"]
        if "@000000000000/" in job["metadata"]["annotations"]["osctl/run-key"]:
            assert job == kept
    assert list(tmp_path.iterdir()) == [], "it writes nothing"


def test_an_operator_is_named_on_the_command_line(tmp_path: Path) -> None:
    """As docs/train-jobs.md shows it."""
    osctl = Osctl(tmp_path, {"KUBECONFIG": "/dev/null"})
    told = ["render", "stage1", "-f", "demo", "--cluster", "kind-cpu"]
    by_default = osctl(*told)
    assert "operator: auto is printed as a PyTorchJob; launch takes what the cluster has" in by_default.stderr
    asked = osctl(*told, "--operator", "trainjob")
    kinds = [one["kind"] for one in yaml.safe_load_all(asked.stdout)]
    assert kinds[-2:] == ["TrainingRuntime", "TrainJob"] and "operator: auto" not in asked.stderr
    insisting = osctl(*told, "--set", "cluster.operator=trainjob")
    assert [one["kind"] for one in yaml.safe_load_all(insisting.stdout)] == kinds
    assert [one["kind"] for one in yaml.safe_load_all(by_default.stdout)] == ["PyTorchJob"]


def test_no_secret_of_the_environment_is_in_what_it_prints(tmp_path: Path) -> None:
    planted = {name: f"planted-{number}-{'x' * 20}" for number, name in enumerate(parts.CREDENTIALS)}
    planted |= {"MLFLOW_TRACKING_PASSWORD": "planted-9", "MLFLOW_TRACKING_TOKEN": "planted-10", "HF_TOKEN": "planted-11"}
    osctl = Osctl(tiny_recipe.write(tmp_path / "recipe"), planted)
    done = osctl("render", *CLUSTER, "--driver")
    assert "planted" not in done.stdout + done.stderr
    assert done.stdout.count("secretKeyRef") == 4 * len(parts.CREDENTIALS), "three stages and the driver name the profile's secret"


@pytest.mark.long
def test_a_slash_too_many_makes_no_other_job(tmp_path: Path) -> None:
    """Under another name, a launch would not find the attempts that run."""
    osctl = Osctl(tmp_path, NO_ANSWER)
    plain, slashed = (
        osctl("render", "-f", "open-sora-1.0", "--store", store).stdout for store in ("s3://bucket/runs", "s3://bucket//runs/")
    )
    assert plain == slashed


@pytest.mark.long
def test_machines_read_one_list_and_names(osctl: Osctl) -> None:
    listing = json.loads(osctl("render", *CLUSTER, "-o", "json").stdout)
    assert (listing["apiVersion"], listing["kind"]) == ("v1", "List")
    assert listing["items"] == rendered(osctl)
    names = osctl("render", *CLUSTER, "-o", "name").stdout.split()
    assert names == [f"pytorchjob/{job['metadata']['name']}" for job in listing["items"]]


def test_a_laptops_pipeline_has_no_manifest(osctl: Osctl) -> None:
    said = osctl("render", expect=2).stderr
    assert "its backend is local" in said and "--cluster" in said
    assert "stage9" in osctl("render", *CLUSTER, "stage9", expect=2).stderr


def test_with_nothing_open_there_is_nothing_to_compare(osctl: Osctl) -> None:
    done = osctl("diff", *CLUSTER, "-o", "json")
    assert json.loads(done.stdout) == []
    assert "was never attempted" in done.stderr
