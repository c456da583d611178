"""Ledgers that earlier releases wrote (tests/ledgers) are read, continued and verified by this one."""

from __future__ import annotations

import json
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from proofs import Proof
from tiny_recipe import Osctl, warm_trainer

from orchestrator.ledger.store import Ledger
from orchestrator.ports import Store
from orchestrator.stores.folder import FolderStore
from orchestrator.stores.s3 import S3Store

LEDGERS = Path(__file__).parents[1] / "ledgers"


@dataclass(frozen=True)
class Release:
    name: str
    drained_at: int
    """Step at which stage 2 was stopped."""
    inputs_digest: str
    """Of stage 2."""
    recorded: bool
    """Whether it wrote down what its data was."""

    def unpacked(self, folder: Path) -> Osctl:
        """Its recipe with its store, in a folder."""
        with tarfile.open(LEDGERS / f"{self.name}.tar.xz") as archive:
            archive.extractall(folder, filter="data")
        recipe = folder / self.name
        (recipe / ".osctl").mkdir()
        (recipe / "store").rename(recipe / ".osctl/store")
        return Osctl(recipe)


OLDEST = Release("0.1.0", 29, "1d81ffb41da5", recorded=False)
RELEASES = (OLDEST, Release("0.2.0", 35, "ce22c728f934", recorded=True))


def test_each_ledger_that_is_kept_is_tried() -> None:
    assert {f"{release.name}.tar.xz" for release in RELEASES} == {path.name for path in LEDGERS.glob("*.tar.xz")}


@pytest.fixture(params=RELEASES, ids=lambda release: release.name)
def release(request: pytest.FixtureRequest) -> Release:
    found: Release = request.param
    return found


@pytest.fixture
def old(release: Release, tmp_path: Path) -> Osctl:
    return release.unpacked(tmp_path)


def states(osctl: Osctl) -> list[tuple[str, str, int]]:
    return [(stage["name"], stage["state"], stage["step"]) for stage in json.loads(osctl("status", "-o", "json").stdout)["stages"]]


def test_an_old_ledger_is_shown_as_it_was(old: Osctl, release: Release) -> None:
    assert states(old) == [("stage1", "committed", 6), ("stage2", "ready", release.drained_at), ("stage3", "blocked", 0)]
    (line,) = json.loads(old("list", "-o", "json").stdout)
    assert (line["name"], line["state"]) == ("old", "suspended")


def test_an_old_bill_is_the_bill_of_then(old: Osctl) -> None:
    def read(text: str) -> list[tuple[Any, ...]]:
        return [(row["name"], row.get("attempt"), row["held_s"], row["device_seconds"], row["usd"]) for row in json.loads(text)]

    assert read(old("cost", "--by-attempt", "-o", "json").stdout) == read((old.folder / "cost.json").read_text())


def test_old_lineage_verifies_and_says_what_was_not_recorded(old: Osctl, release: Release) -> None:
    (row,) = json.loads(old("lineage", "--verify", "-o", "json").stdout)
    assert (row["name"], row["verdict"]) == ("stage1", "verified")
    assert row["remarks"] == ([] if release.recorded else ["data not recorded: the release that trained it kept no digest"])


def test_a_change_of_execution_finds_the_old_work_too(old: Osctl, release: Release) -> None:
    said = old("launch", "--dry-run", "--set", "stage2.activations.recompute=full").stderr
    assert "stage2 goes on where it was: activations.recompute is full (was none)" in said
    begins = old("launch", "--dry-run", "--set", "stage2.optimizer.lr=0.5").stderr
    steps = release.drained_at
    assert f"stage2 begins anew, because optimizer.lr is 0.5 (was 0.001); {steps} steps under earlier inputs" in begins


def goes_on(osctl: Osctl, store: Store, release: Release) -> None:
    """Launch all: stage 2 from its last step, stage 3 from its result; nothing of the old ledger is written over."""
    before = {key: store.read(key).data for key in store.list("old/stages/") if not key.endswith(".safetensors")}
    osctl("launch", "-q")
    assert states(osctl) == [("stage1", "committed", 6), ("stage2", "committed", 300), ("stage3", "committed", 6)]
    assert {key: store.read(key).data for key in before} == before
    ledger = Ledger(store, "old")
    (inputs_digest,) = ledger.inputs_of("stage2")
    assert inputs_digest == release.inputs_digest, "goes on under the name that the old release gave it"
    resumed = ledger.intent("stage2", inputs_digest, 2)
    assert resumed is not None and resumed.resume is not None and resumed.resume.step == release.drained_at
    rows = json.loads(osctl("lineage", "stage3", "--verify", "-o", "json").stdout)
    assert [(row["name"], row["verdict"]) for row in rows] == [(f"stage{n}", "verified") for n in (3, 2, 1)]
    assert json.loads(osctl("cost", "-o", "json").stdout)
    again = osctl("launch", "--dry-run").stderr
    assert "anew" not in again


def at_once(osctl: Osctl) -> Osctl:
    """What it trains begins at once."""
    with (osctl.folder / "osctl.yaml").open("a") as recipe:
        recipe.write(f"\ntrainer: {json.dumps(warm_trainer())}\n")
    return osctl


def in_s3(plain: Osctl, s3: Any, prefix: str) -> tuple[Osctl, Store]:
    """The same ledger in a bucket."""
    folder = FolderStore(plain.folder / ".osctl/store")
    store = S3Store(s3.url(prefix), env=s3.env)
    for key in folder.list(""):
        store.create(key, folder.read(key).data)
    return Osctl(plain.folder, {**s3.env, "OSCTL_STORE": s3.url(prefix)}), store


@pytest.mark.long
def test_work_of_the_release_before_goes_on_to_the_end(tmp_path: Path) -> None:
    before = RELEASES[-1]
    old = at_once(before.unpacked(tmp_path))
    goes_on(old, FolderStore(old.folder / ".osctl/store"), before)


@pytest.mark.long
@pytest.mark.s3
def test_work_of_the_oldest_release_goes_on_to_the_end_in_s3(s3: Any, tmp_path: Path) -> None:
    goes_on(*in_s3(at_once(OLDEST.unpacked(tmp_path)), s3, "upgrade"), OLDEST)


@pytest.mark.prove("old-ledgers")
def test_work_of_each_release_goes_on_in_each_store_under_plain_torchrun(s3: Any, tmp_path: Path, proof: Proof) -> None:
    for release in RELEASES:
        old = release.unpacked(tmp_path / "folder")
        goes_on(old, FolderStore(old.folder / ".osctl/store"), release)
        goes_on(*in_s3(release.unpacked(tmp_path / "s3"), s3, f"upgrade-{release.name}"), release)
        proof.count(2)
