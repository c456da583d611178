"""Ledgers that earlier releases wrote (tests/ledgers) are read, continued and verified by this one."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path
from typing import Any

import pytest
from tiny_recipe import Osctl

from orchestrator.adapters.folder import FolderStore
from orchestrator.adapters.s3 import S3Store
from orchestrator.ledger import Ledger
from orchestrator.ports import Store

LEDGERS = Path(__file__).parents[1] / "ledgers"


def unpacked(folder: Path) -> Osctl:
    """The recipe of 0.1.0 with its store, in a folder."""
    with tarfile.open(LEDGERS / "0.1.0.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    recipe = folder / "0.1.0"
    (recipe / ".osctl").mkdir()
    (recipe / "store").rename(recipe / ".osctl/store")
    return Osctl(recipe)


@pytest.fixture
def old(tmp_path: Path) -> Osctl:
    return unpacked(tmp_path)


def states(osctl: Osctl) -> list[tuple[str, str, int]]:
    return [(stage["name"], stage["state"], stage["step"]) for stage in json.loads(osctl("status", "-o", "json").stdout)["stages"]]


def test_an_old_ledger_is_shown_as_it_was(old: Osctl) -> None:
    assert states(old) == [("stage1", "committed", 6), ("stage2", "ready", 29), ("stage3", "blocked", 0)]
    (line,) = json.loads(old("list", "-o", "json").stdout)
    assert (line["name"], line["state"]) == ("old", "suspended")


def test_an_old_bill_is_the_bill_of_then(old: Osctl) -> None:
    def read(text: str) -> list[tuple[Any, ...]]:
        return [(row["name"], row.get("attempt"), row["held_s"], row["device_seconds"], row["usd"]) for row in json.loads(text)]

    assert read(old("cost", "--by-attempt", "-o", "json").stdout) == read((old.folder / "cost.json").read_text())


def test_old_lineage_verifies_and_says_what_was_not_recorded(old: Osctl) -> None:
    (row,) = json.loads(old("lineage", "--verify", "-o", "json").stdout)
    assert (row["name"], row["verdict"]) == ("stage1", "verified")
    assert row["remarks"] == ["data not recorded: the release that trained it kept no digest"]


def test_a_change_of_execution_finds_the_old_work_too(old: Osctl) -> None:
    said = old("launch", "--dry-run", "--set", "stage2.activations.recompute=full").stderr
    assert "stage2 goes on where it was: activations.recompute is full (was none)" in said
    begins = old("launch", "--dry-run", "--set", "stage2.optimizer.lr=0.5").stderr
    assert "stage2 begins anew, because optimizer.lr is 0.5 (was 0.001); 29 steps under earlier inputs" in begins


def goes_on(osctl: Osctl, store: Store) -> None:
    """Launch all: stage 2 from its last step, stage 3 from its result; nothing of the old ledger is written over."""
    before = {key: store.read(key).data for key in store.list("old/stages/") if not key.endswith(".safetensors")}
    osctl("launch", "-q")
    assert states(osctl) == [("stage1", "committed", 6), ("stage2", "committed", 300), ("stage3", "committed", 6)]
    assert {key: store.read(key).data for key in before} == before
    ledger = Ledger(store, "old")
    (inputs,) = ledger.inputs_of("stage2")
    assert inputs == "1d81ffb41da5", "goes on under the name that the old release gave it"
    resumed = ledger.intent("stage2", inputs, 2)
    assert resumed is not None and resumed.resume is not None and resumed.resume.step == 29
    rows = json.loads(osctl("lineage", "stage3", "--verify", "-o", "json").stdout)
    assert [(row["name"], row["verdict"]) for row in rows] == [(f"stage{n}", "verified") for n in (3, 2, 1)]
    assert json.loads(osctl("cost", "-o", "json").stdout)
    again = osctl("launch", "--dry-run").stderr
    assert "anew" not in again


@pytest.mark.long
def test_old_work_goes_on_to_the_end(old: Osctl) -> None:
    goes_on(old, FolderStore(old.folder / ".osctl/store"))


@pytest.mark.long
@pytest.mark.s3
def test_old_work_goes_on_to_the_end_in_s3(s3: Any, tmp_path: Path) -> None:
    plain = unpacked(tmp_path)
    folder = FolderStore(plain.folder / ".osctl/store")
    store = S3Store(s3.url("upgrade"), env=s3.env)
    for key in folder.list(""):
        store.create(key, folder.read(key).data)
    goes_on(Osctl(plain.folder, {**s3.env, "OSCTL_STORE": s3.url("upgrade")}), store)
