"""Launching, following and stopping a pipeline whose driver lives in a cluster: a real S3, and an API server that can be made to fail."""

from __future__ import annotations

import itertools
import json
import re
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

import film_clips
import pytest
import tiny_recipe
import yaml
from deploy.rights import OF_USER
from fake_api_server import FakeApiServer, Fault, serve
from seen_objects import stamp
from written_ledger import Writer

from orchestrator.cli import main, output
from orchestrator.cli.following import Follower
from orchestrator.kube import names
from orchestrator.kube.nodes import quantity
from orchestrator.kube.operator import OPERATORS
from orchestrator.labels import Label
from orchestrator.ledger.records import Intent
from orchestrator.ledger.store import Ledger
from orchestrator.pipelines import cluster_driver
from orchestrator.pipelines.cluster_checks import KUEUE_RIGHTS, RAY_RIGHTS, RIGHTS
from orchestrator.pipelines.workspace import Workspace
from orchestrator.recipe.pipeline import Pipeline
from orchestrator.stores import open_store

pytestmark = pytest.mark.s3
JOBS = "/apis/batch/v1/namespaces/lab/jobs"

OF_OPERATORS = list(itertools.chain.from_iterable(one.rights for one in OPERATORS))


@dataclass(frozen=True)
class Done:
    code: int
    out: str
    err: str


@dataclass
class Site:
    """A recipe, a bucket's prefix and a cluster."""

    fake: FakeApiServer
    store: str
    folder: Path
    run: Callable[..., Done]

    def __call__(self, *words: str, expect: int = 0) -> Done:
        done = self.run(*words)
        assert done.code == expect, f"osctl {' '.join(words)}: exit {done.code}, expected {expect}\n{done.out}\n{done.err}"
        return done

    def launch(self, *words: str, expect: int = 0) -> Any:
        done = self("launch", "--cluster", "lab.yaml", "-o", "json", *words, expect=expect)
        return json.loads(done.out) if expect == 0 else done.err

    @property
    def ledger(self) -> Ledger:
        return Ledger(open_store(self.store), "tiny")

    @property
    def jobs(self) -> dict[str, Any]:
        return {path.rpartition("/")[2]: thing for path, thing in self.fake.objects.items() if path.startswith(f"{JOBS}/")}

    def finish(self, name: str, condition: str = "Complete") -> None:
        job = self.jobs[name]
        self.fake.put(f"{JOBS}/{name}", {**job, "status": {"conditions": [{"type": condition, "status": "True", "message": "it said so"}]}})


@pytest.fixture
def site(tmp_path: Path, s3: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Site]:
    tiny_recipe.write(tmp_path)
    profile = {
        "name": "lab", "namespace": "lab", "image": "trainer:1", "driver_image": "osctl:1", "allow_unpinned": ["trainer:1", "osctl:1"],
        "device": "h800", "cpu": "8", "memory": "64Gi", "shm": "1Gi", "s3_endpoint": s3.endpoint, "s3_secret": "osctl-s3",
    }  # fmt: skip
    (tmp_path / "lab.yaml").write_text(yaml.safe_dump(profile))
    store = s3.url(f"cli/{tmp_path.name}-{time.monotonic_ns()}")
    monkeypatch.chdir(tmp_path)
    for name, value in {**s3.env, "OSCTL_STORE": store, "KUBECONFIG": str(tmp_path / "kubeconfig"), "COLUMNS": "200"}.items():
        monkeypatch.setenv(name, value)

    def run(*words: str) -> Done:
        monkeypatch.setattr(sys, "argv", ["osctl", *words])
        capsys.readouterr()
        try:
            main()
            code = 0
        except SystemExit as stop:
            code = int(stop.code or 0)
        said = capsys.readouterr()
        return Done(code, said.out, said.err)

    with serve() as fake:
        (tmp_path / "kubeconfig").write_text(
            yaml.safe_dump(
                {
                    "apiVersion": "v1",
                    "kind": "Config",
                    "current-context": "lab",
                    "contexts": [{"name": "lab", "context": {"cluster": "lab", "user": "me"}}],
                    "clusters": [{"name": "lab", "cluster": {"server": fake.url}}],
                    "users": [{"name": "me", "user": {"token": "secret"}}],
                }
            )
        )
        yield Site(fake, store, tmp_path, run)


def test_a_launch_makes_one_driver_and_returns(site: Site) -> None:
    result = site.launch()
    [(name, job)] = site.jobs.items()
    assert result == {"pipeline": "tiny", "driver": name, "revision": 1}
    command = job["spec"]["template"]["spec"]["containers"][0]["command"]
    assert command == ["osctl", "drive", "--store", site.store, "--pipeline", "tiny", "--revision", "1"]
    revision = site.ledger.revision(1)
    assert revision is not None and Pipeline.model_validate(revision.pipeline).cluster is not None, "a driver needs no other file"
    assert site.ledger.lease() is None, "nobody drives from here"


def test_launching_again_attaches(site: Site) -> None:
    first = site.launch()
    again = site("launch", "--cluster", "lab.yaml", "-o", "json")
    assert json.loads(again.out) == first and "already" in again.err
    assert len(site.jobs) == 1 and len(site.ledger.revisions()) == 1


@pytest.mark.parametrize("other", [("--set", "stage1.steps=9"), ("stage1",)])
def test_a_live_driver_is_not_given_other_work(site: Site, other: tuple[str, ...]) -> None:
    first = site.launch()
    refused = site.launch(*other, expect=4)
    assert first["driver"] in refused and "osctl cancel" in refused
    assert ("what differs: osctl diff" in refused) == ("--set" in other)
    assert len(site.jobs) == 1 and len(site.ledger.revisions()) == 1


def test_a_driver_that_is_over_gets_a_successor(site: Site) -> None:
    first = site.launch()["driver"]
    site.finish(first, "Failed")
    second = site.launch("stage1")["driver"]
    assert (first[-2:], second[-2:]) == ("-1", "-2") and set(site.jobs) == {first, second}
    assert site("resume", "-o", "json").out == site("resume", "-o", "json").out, "resume attaches, whatever stages the driver was given"


def test_a_foreign_job_of_the_name_is_never_touched(site: Site) -> None:
    name = site.launch()["driver"]
    foreign = {"metadata": {"name": name, "uid": "theirs", "labels": {"app": "other"}}, "spec": {}}
    site.fake.remove(f"{JOBS}/{name}")
    stored = site.fake.put(f"{JOBS}/{name}", foreign)
    refused = site.launch(expect=4)
    assert name in refused and "left alone" in refused
    assert site.jobs == {name: stored}


def test_an_api_server_that_is_away_leaves_nothing_done(site: Site) -> None:
    site.fake.down = True
    refused = site.launch(expect=5)
    assert site.fake.url in refused
    assert list(open_store(site.store).list("")) == []


def test_a_lost_answer_makes_no_second_driver(site: Site) -> None:
    site.fake.faults.append(Fault("POST", "/jobs", effect=True))
    assert site.launch()["driver"] in site.jobs and len(site.jobs) == 1


def test_a_driver_at_a_desk_is_respected(site: Site) -> None:
    lease = site.ledger.acquire(time.time())
    refused = site.launch(expect=4)
    assert lease.record.holder in refused and not site.jobs


def test_a_budget_is_kept(site: Site) -> None:
    assert "budget" in site.launch("--set", "budget_usd=0.000000000001", expect=4)
    assert not site.jobs and not site.ledger.revisions()


def test_a_parent_has_to_be_there(site: Site) -> None:
    assert "osctl launch --cluster lab.yaml stage1" in site.launch("stage2", expect=4)
    assert not site.jobs and not site.ledger.revisions()


def test_what_is_committed_is_not_launched(site: Site) -> None:
    site.finish(site.launch()["driver"])
    revision = site.ledger.latest_revision()
    assert revision is not None
    Writer(site.ledger, Pipeline.model_validate(revision.pipeline), now=time.time() - 60).three_stages()
    assert site.launch() == {"pipeline": "tiny", "driver": None, "revision": None}
    assert len(site.jobs) == 1


@pytest.mark.parametrize(("exit_code", "condition"), [(0, "Complete"), (3, "Failed"), (4, "Failed"), (130, "Failed")])
def test_waiting_ends_as_the_driver_did(site: Site, exit_code: int, condition: str) -> None:
    name = site.launch()["driver"]
    labels = {"app.kubernetes.io/managed-by": "osctl", "batch.kubernetes.io/job-name": name}
    ended = {"terminated": {"exitCode": exit_code, "finishedAt": "2026-11-23T10:00:00Z"}}
    pod = {"metadata": {"name": f"{name}-x", "labels": labels}, "status": {"phase": "Failed", "containerStatuses": [{"state": ended}]}}
    site.fake.put("/api/v1/namespaces/lab/pods/one", pod)
    site.finish(name, condition)
    workspace = Workspace.open(None, cluster="lab.yaml")
    api = cluster_driver.connect(workspace)
    [driver] = cluster_driver.drivers(api, workspace)
    assert cluster_driver.wait(api, workspace, driver, print) == exit_code
    api.close()


def test_a_driver_that_has_not_begun_is_cancelled_by_removing_it(site: Site) -> None:
    site.launch()
    assert "removed" in site("cancel", "--cluster", "lab.yaml").err
    assert not site.jobs
    assert "nobody" in site("cancel", "--cluster", "lab.yaml").err


def test_a_cancel_reaches_a_driver_that_is_about_to_take_over(site: Site) -> None:
    site.launch()
    revision = site.ledger.latest_revision()
    assert revision is not None
    writer = Writer(site.ledger, Pipeline.model_validate(revision.pipeline), now=time.time() - 60)
    writer.launch()
    writer.begin("stage1")
    assert writer.lease is not None
    writer.lease.release()
    assert "will be asked" in site("cancel", "--now", "--cluster", "lab.yaml").err
    [asked] = [event for event in site.ledger.events() if event.kind == "cancel"]
    assert asked.epoch == 2 and asked.asks_to_kill and len(site.jobs) == 1
    # That driver never comes. The next launch is not what the cancel was for.
    site.finish(next(iter(site.jobs)), "Failed")
    site.launch()
    lease = site.ledger.lease()
    assert lease is not None and lease.epoch == 2 and site.ledger.holder(time.time()) is None


@pytest.mark.long
def test_the_ledger_is_shown_while_the_cluster_is_away(site: Site) -> None:
    site.launch()
    revision = site.ledger.latest_revision()
    assert revision is not None
    writer = Writer(site.ledger, Pipeline.model_validate(revision.pipeline), now=time.time() - 5)
    writer.launch()
    writer.begin("stage1")
    assert writer.lease is not None
    site.ledger.append_event(writer.lease, "observed", now=time.time(), detail="stage1 attempt 1: 0/8 nodes are available")
    site.fake.down = True
    done = site("status", "--cluster", "lab.yaml", "-o", "json")
    shown = json.loads(done.out)
    assert "does not answer" in done.err
    assert shown["stages"][0]["attempts"][0]["state"] == "waiting" and shown["pods"] == []
    [waits] = shown["waits"]
    assert (waits["source"], waits["why"]) == ("driver", "stage1 attempt 1: 0/8 nodes are available")


def test_credentials_are_in_no_manifest_and_no_record(site: Site, s3: Any) -> None:
    site.launch()
    store = open_store(site.store)
    written = [json.dumps(list(site.jobs.values())), *(store.read(key).data.decode() for key in store.list(""))]
    assert not any(s3.env[name] in text for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY") for text in written)


def test_doctor_asks_for_the_rights_that_are_written() -> None:
    """k8s/base is the source of roles; `deploy.rights` is what its tests hold it to."""
    asked = {(group, resource): verbs for group, resource, verbs in (*RIGHTS, *OF_OPERATORS, *KUEUE_RIGHTS, *RAY_RIGHTS)}
    assert {key: set(verbs) for key, verbs in asked.items()} == {key: set(verbs) for key, verbs in OF_USER.items()}


@pytest.mark.parametrize(
    ("text", "number"), [("500m", "0.5"), ("1600Gi", "1717986918400"), ("128", "128"), ("2k", "2000"), ("1e3", "1000")]
)
def test_quantities_are_read_as_kubernetes_reads_them(text: str, number: str) -> None:
    assert quantity(text) == Decimal(number)


def test_what_moves_in_the_cluster_is_shown_before_the_ledger_is_read_again(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    name = site.launch()["driver"]
    revision = site.ledger.latest_revision()
    assert revision is not None
    pipeline = Pipeline.model_validate(revision.pipeline)
    writer = Writer(site.ledger, pipeline, now=time.time() - 5)
    writer.launch()
    intent = writer.begin("stage1")
    shown: list[tuple[float, list[str]]] = []
    monkeypatch.setattr(output, "line", lambda row, *_: shown.append((time.monotonic(), [pod["phase"] for pod in row["pods"]])))
    workspace = Workspace.open(None, cluster="lab.yaml")
    labels = {"app.kubernetes.io/managed-by": "osctl", Label.ROLE: "trainer", Label.PIPELINE: "tiny"}
    labels[Label.RUN] = names.run_hash(site.store, intent.run_key)

    def pod(phase: str) -> float:
        thing = {"metadata": {"name": "tiny-worker-0", "labels": labels}, "spec": {}, "status": {"phase": phase}}
        site.fake.put("/api/v1/namespaces/lab/pods/tiny-worker-0", thing)
        return time.monotonic()

    def seen(phases: list[str]) -> float:
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            for moment, there in list(shown):
                if there == phases:
                    return moment
            time.sleep(0.01)
        raise AssertionError(f"{phases} was never shown: {shown}")

    with Follower(workspace, 60.0, output.Format.json):
        seen([])
        for phase in ("Pending", "Running"):
            moved = pod(phase)
            assert seen([phase]) - moved < 2.0, "0.2 s on a quiet machine; the ledger is read again after 60"
    assert name in site.jobs


def begun(site: Site) -> Intent:
    """What is launched has a driver, and its first attempt an intent and nothing else."""
    site.launch()
    revision = site.ledger.latest_revision()
    assert revision is not None
    writer = Writer(site.ledger, Pipeline.model_validate(revision.pipeline), now=time.time() - 100)
    writer.launch()
    return writer.begin("stage1")


def test_what_is_held_counts_before_an_agent_reports(site: Site) -> None:
    intent = begun(site)
    look = ("status", "--cluster", "lab.yaml")
    labels = {"app.kubernetes.io/managed-by": "osctl", Label.ROLE: "trainer", Label.PIPELINE: "tiny"}
    labels[Label.RUN] = names.run_hash(site.store, intent.run_key)
    scheduled = {"type": "PodScheduled", "status": "True", "lastTransitionTime": stamp(time.time() - 90)}
    thing = {"metadata": {"name": "tiny-worker-0", "labels": labels}, "spec": {"nodeName": "n"}}
    site.fake.put("/api/v1/namespaces/lab/pods/one", {**thing, "status": {"phase": "Running", "conditions": [scheduled]}})
    [stage] = json.loads(site(*look, "-o", "json").out)["stages"][:1]
    [attempt] = stage["attempts"]
    assert 90 <= time.time() - attempt["bound"] < 100 and attempt["state"] == "starting"
    devices = intent.nodes * intent.devices_per_node
    assert 90 * devices / 3600 <= stage["device_hours"] < 120 * devices / 3600
    assert Decimal(stage["usd"]) == Decimal(attempt["usd"]) > 0
    table = site(*look).out
    [line, *_] = [line for line in table.splitlines() if "stage1" in line]
    assert "attempt 1, starting" in line and "$0.00 " not in line


def test_what_nobody_knows_to_be_held_is_not_called_nothing(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    begun(site)
    look = ("status", "--cluster", "lab.yaml")
    assert "$0.00 " in site(*look).out and json.loads(site(*look, "-o", "json").out)["stages"][0]["attempts"][0]["bound"] is None
    monkeypatch.setattr("orchestrator.pipelines.cluster_view.FIRST_VIEW_S", 0.2)
    site.fake.down = True
    assert "not yet" in site(*look).out


def test_a_driver_whose_image_is_not_there_says_what_to_do(site: Site) -> None:
    name = site.launch()["driver"]
    labels = {"app.kubernetes.io/managed-by": "osctl", Label.ROLE: "driver", Label.PIPELINE: "tiny"}
    labels[Label.RUN] = names.run_hash(site.store, names.driver_key("tiny", 1))
    waiting = {"state": {"waiting": {"reason": "ErrImagePull", "message": "not found"}}}
    status = {"phase": "Pending", "containerStatuses": [waiting]}
    site.fake.put(
        "/api/v1/namespaces/lab/pods/one",
        {"metadata": {"name": f"{name}-x", "labels": labels}, "spec": {"nodeName": "n"}, "status": status},
    )
    [waits] = json.loads(site("status", "--cluster", "lab.yaml", "-o", "json").out)["waits"]
    assert (waits["kind"], waits["cause"]) == ("fault", "image") and "ErrImagePull: not found" in waits["why"]
    assert waits["next"] == "Mend `driver_image` in the cluster profile, or the registry; then launch again"


def test_pods_and_logs_of_a_train_job_are_shown_as_those_of_any_attempt(site: Site) -> None:
    intent = begun(site)
    name, run = names.job_name(site.store, intent.run_key), names.run_hash(site.store, intent.run_key)
    labels = {"app.kubernetes.io/managed-by": "osctl", Label.ROLE: "trainer", Label.PIPELINE: "tiny", Label.RUN: run}
    site.fake.serves = {"trainjobs"}
    annotations = {"osctl/store": site.store, "osctl/run-key": intent.run_key}
    job = {"metadata": {"name": name, "labels": labels, "annotations": annotations}, "spec": {"trainer": {"numNodes": 2}}}
    site.fake.put(f"/apis/trainer.kubeflow.org/v1alpha1/namespaces/lab/trainjobs/{name}", job)
    for index, state in enumerate(({"running": {}}, {"waiting": {"reason": "ErrImagePull", "message": "not found"}})):
        scheduled = {"type": "PodScheduled", "status": "True", "lastTransitionTime": stamp(time.time() - 9)}
        status = {
            "phase": "Running" if "running" in state else "Pending",
            "conditions": [scheduled],
            "containerStatuses": [{"state": state}],
        }
        metadata = {"name": f"{name}-w-0-{index}-abcde", "labels": {**labels, Label.COMPLETION_INDEX: str(index)}}
        pod = {"metadata": metadata, "spec": {"nodeName": f"host-{index}"}, "status": status}
        site.fake.put(f"/api/v1/namespaces/lab/pods/{metadata['name']}", pod)
    shown = json.loads(site("status", "--cluster", "lab.yaml", "-o", "json").out)
    assert [(pod["stage"], pod["node"], pod["host"], pod["phase"], pod["reason"]) for pod in shown["pods"]] == [
        ("stage1", 0, "host-0", "Running", ""),
        ("stage1", 1, "host-1", "Pending", "ErrImagePull: not found"),
    ]
    [waits] = [one for one in shown["waits"] if one["stage"] == "stage1"]
    assert (waits["why"], waits["cause"], waits["kind"]) == ("worker-1: ErrImagePull: not found", "image", "fault")
    site.ledger.append_log(intent, 0, 0, b"[rank0] step 1\n", time.time())
    assert site("logs", "stage1", "--cluster", "lab.yaml").out == "[rank0] step 1\n"


# --- Data that pods alone see -------------------------------------------------------------------------------------------------------------

AWAY = ("--set", "stage1.data.source={kind: folder, path: /volume/of/pods/clips}")


def test_a_launch_of_data_that_nobody_sees_is_refused_before_anything(site: Site, tmp_path: Path) -> None:
    refused = site.launch("stage1", *AWAY, expect=4)
    assert f"osctl data register clips /volume/of/pods/clips --store {site.store} --cluster {tmp_path / 'lab.yaml'}" in refused
    assert not site.jobs and site.ledger.latest_revision() is None


@pytest.mark.long
def test_clips_of_this_machine_are_refused_before_anything_is_sent_and_the_hint_leads_on(site: Site, tmp_path: Path) -> None:
    clips = film_clips.make(tmp_path / "my clips")
    mine = ("--data", str(clips))
    refused = site.launch("stage1", *mine, expect=4)
    assert f"data {clips}: lies on this machine, and pods of {tmp_path / 'lab.yaml'} do not see it: they mount nothing" in refused
    assert not site.jobs and site.ledger.latest_revision() is None and list(open_store(site.store).list("")) == []
    assert "pods of" in site("launch", "--cluster", "lab.yaml", "stage1", *mine, "--dry-run").err, "a plan says it, too"
    site("data", "register", "mine", str(clips))  # here, which tells nothing of what pods see
    assert "lies on this machine" in site.launch("stage1", *mine, expect=4)

    [hint] = re.findall(r"osctl (data add .*)", refused)
    sent = json.loads(site(*shlex.split(hint), "-o", "json").out)
    assert site.launch("stage1", "--data", sent["source"])["driver"] in site.jobs


def test_clips_below_a_volume_of_the_pods_are_not_refused(site: Site, tmp_path: Path) -> None:
    with tempfile.TemporaryDirectory(dir="/var/tmp") as shared:  # no volume lies in /tmp
        clips = film_clips.make(Path(shared) / "clips")
        profile = yaml.safe_load((tmp_path / "lab.yaml").read_text()) | {"volumes": [{"claim": "shared", "path": shared}]}
        (tmp_path / "lab.yaml").write_text(yaml.safe_dump(profile))
        assert site.launch("stage1", "--data", str(clips))["driver"] in site.jobs


def test_data_of_a_volume_is_read_by_a_job_and_then_launched(site: Site, tmp_path: Path) -> None:
    """The Job's pod is played: it runs the very command, with what lies under another path here."""
    import threading

    from opensora.config import FolderSource
    from orchestrator.inputs import datasets
    from orchestrator.inputs.data_files import DataFiles

    (tmp_path / "clips").mkdir()
    (tmp_path / "clips/captions.csv").write_text("path,text\na.mp4,one\n")
    (tmp_path / "clips/a.mp4").write_bytes(b"film")
    seen = DataFiles(tmp_path).manifest(FolderSource(kind="folder", path=str(tmp_path / "clips")))

    def pod() -> None:
        while not site.jobs:
            time.sleep(0.05)
        [(name, job)] = site.jobs.items()
        command = job["spec"]["template"]["spec"]["containers"][0]["command"]
        assert command == ["osctl", "data", "register", "hq", "/volume/of/pods/clips", "--store", site.store]
        datasets.register(open_store(site.store), "hq", "/volume/of/pods/clips", seen, now=1.0, holder="pod@node")
        site.finish(name)

    player = threading.Thread(target=pod, daemon=True)
    player.start()
    done = site("data", "register", "hq", "/volume/of/pods/clips", "--cluster", "lab.yaml", "-o", "json")
    player.join(10)
    assert json.loads(done.out)["digest"] == seen.digest
    launched = site.launch("stage1", *AWAY)
    revision = site.ledger.revision(launched["revision"])
    assert revision is not None and revision.pipeline["stages"][0]["contents"]["data"] == seen.digest


def test_a_job_that_failed_is_said_with_where_to_look(site: Site) -> None:
    import threading

    def pod() -> None:
        while not site.jobs:
            time.sleep(0.05)
        site.finish(next(iter(site.jobs)), "Failed")

    player = threading.Thread(target=pod, daemon=True)
    player.start()
    refused = site("data", "register", "hq", "/nowhere", "--cluster", "lab.yaml", expect=4).err
    player.join(10)
    assert "failed" in refused and "logs job/data-hq-" in refused


@pytest.mark.long
def test_a_job_that_cannot_start_says_why(site: Site) -> None:
    import threading

    missing = 'persistentvolumeclaim "clips" not found'

    def pod() -> None:
        while not site.jobs:
            time.sleep(0.05)
        name = next(iter(site.jobs))
        unmet = {"type": "PodScheduled", "status": "False", "message": missing}
        labels = {"app.kubernetes.io/managed-by": "osctl", "batch.kubernetes.io/job-name": name}
        site.fake.put("/api/v1/namespaces/lab/pods/one", {"metadata": {"name": "one", "labels": labels}, "status": {"conditions": [unmet]}})
        time.sleep(2.5)
        site.finish(name, "Failed")

    player = threading.Thread(target=pod, daemon=True)
    player.start()
    said = site("data", "register", "hq", "/volume", "--cluster", "lab.yaml", expect=4).err
    player.join(10)
    assert said.count(f"waits: {missing}") == 1


def test_a_list_asks_the_store_of_the_cluster_that_is_named(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    site.launch("stage1")
    monkeypatch.delenv("OSCTL_S3_ENDPOINT")
    monkeypatch.setenv("OSCTL_S3_PATIENCE_S", "1")
    monkeypatch.setenv("OSCTL_CLUSTER", "lab.yaml")
    assert [row["name"] for row in json.loads(site("list", "-o", "json").out)] == ["tiny"]
    monkeypatch.setenv("OSCTL_CLUSTER", "lap.yaml")
    assert "no such file or shipped cluster profile: 'lap.yaml'" in site("list", expect=2).err


def test_in_the_folder_of_a_recipe_for_a_cluster_its_store_is_asked_where_the_profile_says(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    site.launch("stage1")
    monkeypatch.delenv("OSCTL_S3_ENDPOINT")
    monkeypatch.setenv("OSCTL_S3_PATIENCE_S", "1")
    recipe = site.folder / "osctl.yaml"
    recipe.write_text(f"{recipe.read_text()}\nbackend: kubernetes\ncluster: lab.yaml\n")
    assert [row["name"] for row in json.loads(site("list", "-o", "json").out)] == ["tiny"]
    assert json.loads(site("status", "tiny", "-o", "json").out)["stages"]
    assert json.loads(site("data", "list", "-o", "json").out) == []
    assert json.loads(site("weights", "list", "-o", "json").out) == []
    assert "nobody has prepared it in s3://" in site("prepare", "status", "mine", expect=4).err
