"""An agent that knows that its attempt is over writes no manifest any more, whatever is on its way at that moment."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from live_attempts import Attempts, until

from orchestrator.agent import publication
from orchestrator.agent.publication import Publication, name_of
from orchestrator.agent.run_directory import RunDirectory
from orchestrator.ledger.records import Intent
from orchestrator.ledger.store import Ledger
from orchestrator.stores.folder import FolderStore

OVER = "epoch 2 (another launch) has closed this attempt"


class SlowStore(FolderStore):
    """A store in which each upload stands still, all its bytes sent, until it is let go."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.on_its_way, self.gate = threading.Event(), threading.Event()

    def upload(self, key: str, path: Path) -> None:
        super().upload(key, path)
        self.on_its_way.set()
        assert self.gate.wait(timeout=30)


class Site:
    """An attempt's checkpoints on their way to a slow store."""

    def __init__(self, root: Path, nodes: int) -> None:
        self.attempts = Attempts(root)
        self.store = SlowStore(root / "store")
        self.ledger = Ledger(self.store, "demo")
        self.intent: Intent = self.attempts.intend(nodes=nodes)
        self.run = RunDirectory(root / "run")
        self.over = ""
        self.publication = Publication(self.ledger, self.intent, self.run, 0, lambda: None, 30.0, lambda: self.over)

    def save(self, step: int) -> None:
        folder = self.run.checkpoint(step)
        folder.mkdir(parents=True)
        (folder / "model.safetensors").write_bytes(b"weights")
        (folder / "CHECKPOINT.json").write_text(json.dumps({"step": step, "complete": False, "files": {"model.safetensors": 7}}))

    def in_store(self) -> list[str]:
        """Names of what lies below `checkpoints/`."""
        return [key.rpartition("/")[2] for key in self.store.list("demo/stages/") if "/checkpoints/" in key]


@pytest.fixture(params=[1, 2], ids=["one node", "two nodes"])
def site(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Site]:
    opened = Site(tmp_path, request.param)
    yield opened
    opened.store.gate.set()


def test_what_is_on_its_way_when_the_attempt_is_over_gets_no_manifest_and_is_discarded(site: Site) -> None:
    site.save(5)
    site.save(10)
    site.publication.offer()
    assert site.store.on_its_way.wait(timeout=30)
    site.over = OVER
    site.store.gate.set()
    until(lambda: site.publication.uploads.idle, "both uploads end")
    for step in (5, 10):
        refusal = site.publication.refusal(step)
        assert refusal is not None and OVER in refusal.reason and name_of(step) in refusal.reason
    assert site.publication.published == set() and site.in_store() == []


def test_nothing_is_offered_once_the_attempt_is_over(site: Site) -> None:
    site.store.gate.set()
    site.over = OVER
    site.save(5)
    site.publication.offer()
    assert site.publication.uploads.idle and site.in_store() == []
    assert not site.run.pinned(5).exists()


@pytest.mark.parametrize("site", [2], indirect=True)
def test_parts_that_are_all_there_are_not_merged_once_the_attempt_is_over(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(publication, "TRAINING_POLL_S", 0.01)
    site.store.gate.set()
    site.save(5)
    site.publication.offer()
    until(lambda: site.publication.uploads.idle, "the part of node 0")
    site.over = OVER
    other = RunDirectory(site.attempts.root / "other").checkpoint(5)
    other.mkdir(parents=True)
    (other / "model-2.safetensors").write_bytes(b"more")
    (other / "CHECKPOINT.json").write_text(json.dumps({"step": 5, "complete": False, "files": {"model-2.safetensors": 4}}))
    site.ledger.publish_part(site.intent, other, 1)
    refusal = until(lambda: site.publication.refusal(5), "the merge is refused")
    assert OVER in refusal.reason
    until(lambda: site.in_store() == [], "the files of both nodes are discarded")
