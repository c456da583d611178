"""`osctl weights`, and a launch that imports: refused before a device is held, or brought in, recorded and the end of the lineage."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import yaml
from live_attempts import STAND_IN
from tiny_recipe import Osctl, stage, write


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights/model.safetensors").write_bytes(b"weights of somebody")
    (tmp_path / "weights/README.md").write_text("---\nlicense: cc-by-4.0\n---\n")
    return tmp_path / "weights"


@pytest.fixture
def osctl(tmp_path: Path) -> Osctl:
    return Osctl(write(tmp_path / "recipe", devices=1, stages=2, trainer=[sys.executable, STAND_IN, "{run_dir}", "{devices}"]))


def importing(osctl: Osctl, name: str) -> None:
    (osctl.folder / "stage1.yaml").write_text(yaml.safe_dump(stage(1) | {"weights": name}))


@pytest.mark.long
def test_an_import_is_added_listed_and_the_end_of_a_lineage(osctl: Osctl, weights: Path) -> None:
    one = osctl.json("weights", "add", "pixart", str(weights))
    assert (one["role"], one["licence"], one["source"]) == ("weights", "cc-by-4.0", str(weights))
    assert osctl.json("weights", "add", "pixart", str(weights)) == one and osctl.json("weights", "list") == [one]
    importing(osctl, "pixart")
    osctl("launch", "--quiet")
    places = yaml.safe_load((osctl.folder / ".osctl/places.json").read_text())["places"]
    assert (Path(places["pixart"]) / "model.safetensors").read_bytes() == b"weights of somebody"
    root = osctl.json("lineage", "--verify")[-1]
    assert root["imports"] == [{"role": "weights", "digest": one["digest"], "source": str(weights), "licence": "cc-by-4.0"}]
    assert f"stage1 imports weights {one['short']} from {weights} (licence: cc-by-4.0)" in osctl("lineage").stderr
    assert "weights" not in osctl("list").stdout


@pytest.mark.long
def test_the_same_weights_by_name_and_by_path_are_the_same_result(osctl: Osctl, weights: Path) -> None:
    importing(osctl, str(weights))
    osctl("launch", "--quiet")
    before = osctl.digests()
    osctl("weights", "add", "pixart", str(weights))
    importing(osctl, "pixart")
    osctl("launch", "--quiet")
    assert len(list((osctl.folder / ".osctl/store/tiny/stages").glob("stage*@*/attempts/*"))) == 2 and osctl.digests() == before


def test_what_nobody_reaches_is_refused_before_a_device_is_held(osctl: Osctl) -> None:
    importing(osctl, "nobody-has-this")
    refused = osctl("launch", "--quiet", expect=4).stderr
    assert "osctl weights add nobody-has-this SOURCE --as weights" in refused and len(refused.strip().splitlines()) == 1
    assert not list(osctl.folder.rglob("intent.json"))
    assert osctl("plan").stdout, "a plan needs none"


def test_a_file_that_is_not_what_a_person_said_is_refused(osctl: Osctl, weights: Path) -> None:
    refused = osctl("weights", "add", "pixart", str(weights), "--sha256", "0" * 64, expect=4).stderr
    assert "Nothing was written" in refused and osctl.json("weights", "list") == []
    assert "Correct the source" in osctl("weights", "add", "x", str(weights / "none"), expect=4).stderr
    assert "is none of weights" in osctl("weights", "add", "x", str(weights), "--as", "vae", expect=2).stderr
