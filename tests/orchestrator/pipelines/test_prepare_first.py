"""A recipe's raw videos in a cluster: what a launch leaves to its driver, and what that does until the first stage may begin.

A real S3; an API server in memory; the pod's own program runs here, on real films. The whole in real pods: tests/cluster.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import pytest
import raw_videos
import tiny_recipe
import yaml
from fake_api_server import FakeApiServer, serve
from tiny_recipe import Osctl

from orchestrator.driver.decide import Finish
from orchestrator.driver.first import NotYet
from orchestrator.errors import Refused
from orchestrator.ledger.store import Ledger
from orchestrator.pipelines import cluster_driver, prepare_first, preparing
from orchestrator.pipelines.host import Host
from orchestrator.pipelines.prepare_first import PreparedFirst
from orchestrator.pipelines.workspace import Workspace
from orchestrator.prepare import order
from orchestrator.recipe import launched
from orchestrator.recipe.pipeline import Pipeline
from orchestrator.stores import open_store

pytestmark = pytest.mark.s3
JOBS = "/apis/batch/v1/namespaces/lab/jobs"


@dataclass
class Site:
    fake: FakeApiServer
    folder: Path
    env: dict[str, str]
    films: str
    said: list[str] = field(default_factory=list)
    names: ClassVar[dict[str, str]] = {"kubeconfig": "kubeconfig", "profile": "lab.yaml"}

    @property
    def osctl(self) -> Osctl:
        return Osctl(self.folder, self.env)

    @property
    def store(self) -> str:
        return self.env["OSCTL_STORE"]

    @property
    def ledger(self) -> Ledger:
        return Ledger(open_store(self.store, self.env), "tiny")

    def jobs(self, role: str) -> list[Any]:
        found = [thing for path, thing in sorted(self.fake.objects.items()) if path.startswith(f"{JOBS}/")]
        return [job for job in found if job["metadata"]["labels"]["osctl/role"] == role]

    def launch(self) -> list[str]:
        """Words of the driver's command."""
        self.said.append(self.osctl("launch", "--cluster", "lab.yaml", "-q").stderr)
        return list(self.jobs("driver")[-1]["spec"]["template"]["spec"]["containers"][0]["command"])

    def finish(self, job: Any, condition: str = "Complete") -> None:
        status = {"conditions": [{"type": condition, "status": "True", "message": "it said so"}]}
        self.fake.put(f"{JOBS}/{job['metadata']['name']}", {**job, "status": status})

    def work(self, job: Any) -> None:
        """What its pod does."""
        words = job["spec"]["template"]["spec"]["containers"][0]["command"]
        pod = self.folder / "pod"
        pod.mkdir(exist_ok=True)
        Osctl(pod, self.env | {"OSCTL_JOB_NAME": job["metadata"]["name"], "OSCTL_POD_CORES": "1", "OSCTL_HOME": str(pod / "home")})(
            *words[1:]
        )
        self.finish(job)

    @contextlib.contextmanager
    def driver(self, words: list[str]) -> Iterator[tuple[Pipeline, PreparedFirst | None]]:
        """As a driver's pod begins with these words."""
        said = dict(zip(words[2::2], words[3::2], strict=True))
        number = int(said["--revision"])
        found = self.ledger.revision(number)
        assert found is not None
        workspace = Workspace(launched.resolve(self.ledger, number, found), Host.here(self.env, self.folder / "driver"))
        with contextlib.closing(cluster_driver.connect(workspace)) as api:
            yield prepare_first.begin(workspace, number, said["--prepare"], (), api, self.said.append)


@pytest.fixture
def site(tmp_path: Path, s3: Any) -> Iterator[Site]:
    profile = {
        "name": "lab", "namespace": "lab", "image": "trainer:1", "driver_image": "osctl:1", "allow_unpinned": ["trainer:1", "osctl:1"],
        "device": "h800", "cpu": "1", "memory": "64Gi", "shm": "1Gi", "s3_endpoint": s3.endpoint, "s3_secret": "osctl-s3",
    }  # fmt: skip
    (tmp_path / "lab.yaml").write_text(yaml.safe_dump(profile))
    name = f"first/{tmp_path.name}-{time.monotonic_ns()}"
    env = {**s3.env, "OSCTL_STORE": s3.url(name), "KUBECONFIG": str(tmp_path / "kubeconfig"), "OSCTL_HOME": str(tmp_path / "home")}
    films = open_store(s3.url(f"{name}-films"), env)
    raw_videos.written(tmp_path / "a.mp4", raw_videos.moving(raw_videos.texture(1, 64, 36), 48))
    (tmp_path / "a.txt").write_text("it moves")
    for file in ("a.mp4", "a.txt"):
        films.upload(file, tmp_path / file)
    prepare = {"name": "films", "sources": [{"path": films.url, "licence": "mine"}], "filter": {"rules": []}, "limits": {"min_side": 16}}
    tiny_recipe.write(tmp_path, prepare=prepare)
    with serve() as fake:
        config = {
            "apiVersion": "v1", "kind": "Config", "current-context": "lab",
            "contexts": [{"name": "lab", "context": {"cluster": "lab", "user": "me"}}],
            "clusters": [{"name": "lab", "cluster": {"server": fake.url}}], "users": [{"name": "me", "user": {"token": "secret"}}],
        }  # fmt: skip
        (tmp_path / "kubeconfig").write_text(yaml.safe_dump(config))
        yield Site(fake, tmp_path, env, films.url)


def test_a_launch_orders_the_clips_and_makes_a_driver_alone(site: Site) -> None:
    foretold = site.osctl("launch", "--cluster", "lab.yaml", "--dry-run").stderr
    assert f"first: its driver has films prepared of {site.films}; not prepared yet" in foretold and site.fake.objects == {}
    words = site.launch()
    assert words[-2] == "--prepare" and site.jobs("prepare") == [], site.said
    assert order.read(open_store(site.store, site.env), "films", words[-1]).config["sources"][0]["path"] == site.films
    _, revision = site.ledger.revisions()[-1]
    sources = {stage["config"]["data"]["source"]["path"] for stage in revision.pipeline["stages"]}
    assert sources == {f"{site.store}/datasets/films"}, "which version it will be is not known"
    again = site.osctl("launch", "--cluster", "lab.yaml", "-q").stderr
    assert "drives it already" in again and len(site.jobs("driver")) == 1 and len(site.ledger.revisions()) == 1


def test_a_driver_has_them_made_once_and_goes_on_with_what_came_out(site: Site) -> None:
    words = site.launch()
    with site.driver(words) as (pipeline, first):
        assert first is not None and not preparing.is_on_version(pipeline)
        assert isinstance(first.look(None, cancelled=False), NotYet)
        (job,) = site.jobs("prepare")
    with site.driver(words) as (_, first):  # the one before was killed
        assert first is not None and first.look(None, cancelled=False) == NotYet(f"films is prepared first, by {job['metadata']['name']}")
        site.work(job)
        found = first.look(None, cancelled=False)
        assert isinstance(found, Pipeline) and preparing.is_on_version(found)
        assert all(stage.contents.data is not None for stage in found.stages) and len(site.jobs("prepare")) == 1
        site.ledger.add_revision(found.model_dump(mode="json"), time.time())  # as a driver does then
    with site.driver(words) as (later, first):
        assert first is None and later == found, "stages go on with the clips that they began with"
    again = site.osctl("launch", "--cluster", "lab.yaml", "-q").stderr
    assert "nothing has changed since it was prepared" in again and "drives it already" in again
    site.finish(site.jobs("driver")[0])
    assert "--prepare" not in site.launch(), "they are made, and its stages are left"


def test_an_end_without_clips_is_the_drivers_end(site: Site) -> None:
    with site.driver(site.launch()) as (_, first):
        assert first is not None
        first.look(None, cancelled=False)
        (job,) = site.jobs("prepare")
        site.finish(job, "Failed")
        end = first.look(None, cancelled=False)
        assert (
            isinstance(end, Finish) and (end.status, end.exit_code) == ("failed", 3) and "films was not prepared: it said so" in end.reason
        )
    with site.driver(site.launch()) as (_, first):  # whoever launches again tries again
        assert first is not None and isinstance(first.look(None, cancelled=False), NotYet)
        assert len(site.jobs("prepare")) == 2


def test_a_job_that_somebody_deleted_is_not_made_again_behind_his_back(site: Site) -> None:
    with site.driver(site.launch()) as (_, first):
        assert first is not None
        first.look(None, cancelled=False)
        site.fake.remove(f"{JOBS}/{site.jobs('prepare')[0]['metadata']['name']}")
        end = first.look(None, cancelled=False)
        assert isinstance(end, Finish) and "somebody deleted" in end.reason and site.jobs("prepare") == []


def test_a_stop_stops_the_preparation(site: Site) -> None:
    with site.driver(site.launch()) as (_, first):
        assert first is not None
        first.look(None, cancelled=False)
        assert isinstance(first.look("drain", cancelled=True), NotYet)
        assert site.jobs("prepare") == [] and "was removed" in site.said[-1]
        assert first.look("drain", cancelled=True) == Finish(
            "cancelled", 130, "stopped while films was prepared, before the first stage; what is prepared of it is kept"
        )


def test_what_somebody_else_prepares_otherwise_is_left_alone(site: Site) -> None:
    words = site.launch()
    with site.driver(words) as (_, first):
        assert first is not None
        first.look(None, cancelled=False)
        (job,) = site.jobs("prepare")
    osctl = site.osctl
    osctl("cancel", "--cluster", "lab.yaml")
    path = site.folder / "osctl.yaml"
    content = yaml.safe_load(path.read_text())
    path.write_text(yaml.safe_dump(content | {"prepare": content["prepare"] | {"cut": {"max_s": 1}}}))
    site.finish(site.jobs("driver")[0], "Failed")
    with site.driver(site.launch()) as (_, first):
        assert first is not None
        with pytest.raises(Refused, match=f"{job['metadata']['name']} prepares it by another order"):
            first.look(None, cancelled=False)


def change(site: Site, change: Callable[[dict[str, Any]], object]) -> None:
    path = site.folder / "osctl.yaml"
    content = yaml.safe_load(path.read_text())
    change(content)
    path.write_text(yaml.safe_dump(content))


def test_a_decision_waits_until_it_is_known_what_changed(site: Site) -> None:
    said = site.osctl("launch", "--cluster", "lab.yaml", "--anew", "stage1", expect=2).stderr
    assert "known once its clips are made" in said and site.jobs("driver") == []


def test_films_of_this_machine_are_prepared_here_and_that_is_said(site: Site) -> None:
    change(site, lambda recipe: recipe["prepare"].update(sources=[{"path": str(site.folder / "a.mp4")}]))
    said = site.osctl("launch", "--cluster", "lab.yaml", "--dry-run").stderr
    assert "films: is prepared on this machine" in said and "which no pod sees" in said
    assert "first: prepares films of" in said and site.fake.objects == {}
