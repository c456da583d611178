"""Contents that lie outside of a recipe, on the real cluster: clips that pods alone see, and encoders that a launch or a person brings in.

Real: a claim over a folder of the node, the Job that reads it, its pods, the S3 store, an AutoencoderKL and a T5.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import film_clips
import pytest
import raw_videos
import yaml
from cluster.kube_rig import client
from cluster.pipelines import Site, installed, until
from conftest import Cluster
from tiny_encoders import WIDTH, make_autoencoder, make_text
from tiny_recipe import Osctl

from orchestrator.errors import Refused
from orchestrator.kube import image_check
from orchestrator.recipe.cluster_profile import ClusterProfile
from orchestrator.recipe.image_needs import ImageNeeds

pytestmark = [pytest.mark.cluster("pods"), pytest.mark.timeout(300)]

SEEN_BY_PODS = "/data"


@pytest.fixture(scope="module")
def site(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """Pods see a folder of the node as /data, by a claim; this machine sees nothing there."""
    assert not Path(SEEN_BY_PODS).exists()
    place = tmp_path_factory.mktemp("site")
    folder = place / "disk"
    film_clips.make(folder / "clips")
    with installed(cluster, place, mlflow=False, cpu="1", volumes=[{"claim": "clips", "path": SEEN_BY_PODS}]) as site:
        named = f"clips-{site.namespace}"
        shared = {"accessModes": ["ReadOnlyMany"], "storageClassName": ""}
        claim = {"namespace": site.namespace, "name": "clips"}
        volume = shared | {"capacity": {"storage": "1Gi"}, "hostPath": {"path": str(folder)}, "claimRef": claim}
        request = shared | {"volumeName": named, "resources": {"requests": {"storage": "1Gi"}}}
        for kind, metadata, spec in (("PersistentVolume", {"name": named}, volume), ("PersistentVolumeClaim", claim, request)):
            made = {"apiVersion": "v1", "kind": kind, "metadata": metadata, "spec": spec}
            cluster.kubectl("create", "-f", "-", stdin=json.dumps(made))
        try:
            yield site
        finally:
            cluster.kubectl("delete", "persistentvolume", named, "--wait=false")


def test_clips_that_pods_alone_see_and_encoders_of_this_machine_make_a_result(site: Site, tmp_path: Path) -> None:
    make_autoencoder(tmp_path / "vae")
    make_text(tmp_path / "t5")
    changes: dict[str, Any] = {
        "data": {"source": {"kind": "folder", "path": f"{SEEN_BY_PODS}/clips"}, "frames": 1, "height": 16, "width": 16},
        "model": {"depth": 2, "width": 32, "heads": 2, "latent_channels": 4, "caption_width": WIDTH, "caption_tokens": 8},
        "autoencoder": {"kind": "kl", "path": str(tmp_path / "vae"), "factor": 2},
        "text": {"kind": "t5", "path": "tiny-t5", "dtype": "fp32"},
        "batch_size": 2,
        "prompts": [],
    }
    osctl = site.osctl(tmp_path / "contents", stages=1, nodes=1, devices=1, changes=changes)
    text = osctl.json("weights", "add", "tiny-t5", str(tmp_path / "t5"), "--as", "text")

    refused = osctl("launch", expect=4).stderr
    command = shlex.split(refused.strip().splitlines()[-1].split("Register it where it lies: osctl ")[1])
    registered = osctl.json(*command)
    assert (registered["rows"], registered["source"], registered["unreadable"]) == (3, f"{SEEN_BY_PODS}/clips", 0)
    shown = osctl.json("data", "show", registered["name"])
    assert {row["name"]: row["text"] for row in shown} == film_clips.CAPTIONS and all(row["sha256"] for row in shown)
    nowhere = osctl("data", "register", "none", f"{SEEN_BY_PODS}/none", "--cluster", str(site.profile), expect=4).stderr
    assert f"{SEEN_BY_PODS}/none" in nowhere and "Correct the path" in nowhere, nowhere

    launched = osctl("launch", "--wait", timeout=240)
    assert "asks the trainer's image whether it knows imports" in launched.stderr, "0.1.0 fetched no encoders"
    root = osctl.json("lineage", "--verify")[-1]
    assert root["verdict"] == "verified" and root["contents"]["data"] == registered["digest"]
    imported = {one["role"]: one for one in root["imports"]}
    assert imported["text"]["digest"] == text["digest"] and imported["autoencoder"]["source"] == str(tmp_path / "vae")
    log = osctl("logs", "stage1").stdout
    assert "3 of 1x16x16 pixels" in log, log


def test_a_recipe_of_raw_videos_is_prepared_here_and_pods_train_on_what_came_out(site: Site, tmp_path: Path) -> None:
    """As docs/datasets.md says. What a cluster would refuse later is refused before anything is prepared."""
    (tmp_path / "films").mkdir()
    for seed, name in enumerate(("rust", "moss")):
        raw_videos.written(tmp_path / f"films/{name}.mp4", raw_videos.moving(raw_videos.texture(seed), 48))
        (tmp_path / f"films/{name}.txt").write_text(f"{name} that moves")
    data = {"source": {"kind": "digits", "clips": 48}, "frames": 1, "height": 16, "width": 16}
    changes = {"steps": 2, "checkpoint": {"every_steps": 2}, "batch_size": 2, "prompts": [], "data": data}
    prepare = {"sources": [{"path": str(tmp_path / "films")}]}
    osctl = site.osctl(tmp_path / "raw", stages=1, nodes=1, devices=1, changes=changes, prepare=prepare)

    assert "which no pod sees" in osctl("launch", "--store", str(tmp_path / "store"), expect=2).stderr
    config = yaml.safe_load(site.cluster.kubeconfig.read_text())
    config["clusters"][0]["cluster"]["server"] = "https://127.0.0.1:9"
    (tmp_path / "kubeconfig").write_text(yaml.safe_dump(config))
    away = Osctl(osctl.folder, {**site.env, "KUBECONFIG": str(tmp_path / "kubeconfig")})
    assert "127.0.0.1:9" in away("launch", expect=5).stderr
    assert not (tmp_path / "store").exists() and not (osctl.folder / ".osctl/prepare").exists()

    said = osctl("launch", "--wait", timeout=240).stderr
    place = f"{site.store}/datasets/raw/"
    assert f"raw: prepared; 2 clips, 4.0 s, at {place}" in said, said
    root, origin = osctl.json("lineage", "--verify")
    assert root["verdict"] == "verified" and root["data"].endswith(" raw"), root
    assert (origin["name"], origin["verdict"]) == ("raw", "verified"), origin
    assert "2 of 1x16x16 pixels" in osctl("logs", "stage1").stdout


@pytest.fixture
def fresh(cluster: Cluster, tmp_path: Path) -> Iterator[Site]:
    """In which no image was asked anything."""
    with installed(cluster, tmp_path, mlflow=False, cpu="1") as site:
        yield site


def test_an_image_that_cannot_run_a_stage_is_refused_before_a_job_of_it_is_there(fresh: Site) -> None:
    """The needs are those of a release to come: to it, this image is an old one."""
    profile = ClusterProfile.model_validate(yaml.safe_load(fresh.profile.read_text()))
    said: list[str] = []
    with client(fresh.cluster.kubeconfig, fresh.namespace) as api:
        needs = ImageNeeds(abilities=("imports", "telepathy"))
        with pytest.raises(Refused, match=r"telepathy: this release cannot.*nothing was started"):
            image_check.check(api, profile, fresh.store, needs, "launch demo", ["telepathy"], said.append)
        (asked,) = said[:1]
        assert "asks the trainer's image whether it knows telepathy" in asked
        needs = ImageNeeds(abilities=("imports",))
        for _ in range(2):
            image_check.check(api, profile, fresh.store, needs, "launch demo", ["imports"], said.append)
    jobs = fresh.json("get", "jobs")["items"]
    assert len([job for job in jobs if "image-check" in job["metadata"]["name"]]) == 2, "a question that was answered is not asked again"
    assert fresh.json("get", "pytorchjobs")["items"] == []


class Told(Exception):
    """The first line about a wait."""


def test_pods_that_cannot_be_made_are_told_of_in_kubernetes_words(fresh: Site, tmp_path: Path) -> None:
    """Without its service account a Job gets no pod: there are events about the Job, and nothing else to look at."""
    fresh.cluster.kubectl("-n", fresh.namespace, "delete", "serviceaccount", "osctl-driver")

    def say(words: str) -> None:
        if " waits: " in words:
            raise Told(words)

    profile = ClusterProfile.model_validate(yaml.safe_load(fresh.profile.read_text()))
    with client(fresh.cluster.kubeconfig, fresh.namespace) as api, pytest.raises(Told, match='serviceaccount "osctl-driver" not found'):
        image_check.check(api, profile, fresh.store, ImageNeeds(abilities=("imports",)), "launch demo", ["imports"], say)

    osctl = fresh.osctl(tmp_path / "orphan", stages=1, nodes=1, devices=1)
    osctl("launch")
    (waits,) = until("its reason", lambda: [one for one in osctl.json("status")["waits"] if one["kind"] == "fault"])
    assert (waits["cause"], 'serviceaccount "osctl-driver" not found' in waits["why"]) == ("refused", True), waits
