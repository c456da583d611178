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
from cluster.pipelines import Site, installed
from conftest import Cluster
from tiny_encoders import WIDTH, make_autoencoder, make_text

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]

SEEN_BY_PODS = "/data"


@pytest.fixture
def site(cluster: Cluster, tmp_path: Path) -> Iterator[Site]:
    """Pods see a folder of the node as /data, by a claim; this machine sees nothing there."""
    assert not Path(SEEN_BY_PODS).exists()
    folder = tmp_path / "disk"
    film_clips.make(folder / "clips")
    with installed(cluster, tmp_path, mlflow=False, cpu="1", volumes=[{"claim": "clips", "path": SEEN_BY_PODS}]) as site:
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

    osctl("launch", "--wait", timeout=240)
    root = osctl.json("lineage", "--verify")[-1]
    assert root["verdict"] == "verified" and root["contents"]["data"] == registered["digest"]
    imported = {one["role"]: one for one in root["imports"]}
    assert imported["text"]["digest"] == text["digest"] and imported["autoencoder"]["source"] == str(tmp_path / "vae")
    log = osctl("logs", "stage1").stdout
    assert "3 of 1x16x16 pixels" in log, log
