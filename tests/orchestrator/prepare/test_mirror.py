"""Results of steps in the store: copied once each, brought back where they are missing, and nothing that is not whole."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
from prepare_bench import Bench

from orchestrator.errors import Refused, Unreachable
from orchestrator.prepare import attempts
from orchestrator.prepare.mirror import Mirror
from orchestrator.prepare.records import Keys
from orchestrator.stores.folder import FolderStore


class Away(FolderStore):
    """A store that takes no file for a while."""

    def __init__(self, root: Path, uploads: int) -> None:
        super().__init__(root)
        self.left = uploads

    def upload(self, key: str, path: Path) -> None:
        if self.left > 0:
            self.left -= 1
            raise Unreachable("store: does not answer")
        super().upload(key, path)


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    folder = tmp_path / "kept"
    (folder / "frames/d/ab").mkdir(parents=True)
    (folder / "frames/d/ab/abc.json").write_text("one")
    return folder


@pytest.fixture
def store(tmp_path: Path) -> FolderStore:
    return FolderStore(tmp_path / "store")


def test_what_is_whole_is_copied_once_and_what_is_not_is_left(kept: Path, store: FolderStore, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (".abd.json.1", "abd.json.tmp", "abd.json.partial", "abd.mp4.part"):
        (kept / "frames/d/ab" / name).write_text("half")
    mirror = Mirror(kept, store, "datasets/mine/kept")
    assert mirror.copy_new(all_=True) == 1 and list(store.list("")) == ["datasets/mine/kept/frames/d/ab/abc.json"]
    (kept / "frames/d/ab/abd.json").write_text("two")
    assert mirror.copy_new(all_=True) == 1 and mirror.copy_new(all_=True) == 0
    monkeypatch.setattr(store, "upload", None)
    assert Mirror(kept, store, "datasets/mine/kept").bring_back() == 0


def test_what_another_machine_kept_counts_and_is_brought_back(kept: Path, store: FolderStore, tmp_path: Path) -> None:
    store.create("datasets/mine/kept/frames/d/ab/abc.json", b"of another machine")
    store.create("datasets/mine/kept/clips/e/cd/cde.mp4", b"film")
    Mirror(kept, store, "datasets/mine/kept").copy_new(all_=True)
    assert store.read("datasets/mine/kept/frames/d/ab/abc.json").data == b"of another machine"
    elsewhere = tmp_path / "elsewhere"
    assert Mirror(elsewhere, store, "datasets/mine/kept").bring_back() == 2
    assert (elsewhere / "clips/e/cd/cde.mp4").read_bytes() == b"film" and not list(elsewhere.rglob(".*"))


def test_a_pack_is_in_the_store_after_the_clips_that_it_describes(tmp_path: Path) -> None:
    """A pod that shares no files believes a pack (`opensora.prepare.shards`)."""

    class Slow(FolderStore):
        def upload(self, key: str, path: Path) -> None:
            time.sleep(0.05 if key.endswith(".mp4") else 0)
            super().upload(key, path)
            sent.append(key.rpartition(".")[2])

    sent: list[str] = []
    for number in range(50):
        clip = tmp_path / f"kept/clips/d/{number % 7:02}/{number}.mp4"
        clip.parent.mkdir(parents=True, exist_ok=True)
        clip.write_text("film")
    (tmp_path / "kept/clips/d/0123.jsonl").write_text("rows")
    Mirror(tmp_path / "kept", Slow(tmp_path / "store"), "k").copy_new(all_=True)
    assert sent == ["mp4"] * 50 + ["jsonl"]


def test_a_store_never_leads_out_of_the_folder(kept: Path, store: FolderStore) -> None:
    class Lying(FolderStore):
        def list(self, prefix: str, after: str = "") -> Any:
            return iter([f"{prefix}../../escaped.json"])

    with pytest.raises(Refused):
        Mirror(kept, Lying(store.root), "datasets/mine/kept").bring_back()


def test_what_could_not_be_copied_is_copied_later(kept: Path, tmp_path: Path) -> None:
    store = Away(tmp_path / "store", 1)
    mirror = Mirror(kept, store, "datasets/mine/kept")
    with pytest.raises(Unreachable):
        mirror.copy_new(all_=True)
    assert mirror.copy_new(all_=True) == 1


def test_steps_go_on_while_the_store_is_away(tmp_path: Path, videos: Path) -> None:
    bench = Bench(tmp_path, Away(tmp_path / "store", 3), videos)
    prepared = bench.run("--slow", "0.1")
    assert prepared.published is not None and prepared.published.description.clips == 6
    assert any("the steps go on" in line for line in bench.said)
    assert [one.outcome.class_ for one in attempts.all_of(bench.store, Keys("mine")) if one.outcome] == ["completed"]
    assert len(list(bench.store.list("datasets/mine/kept/"))) == 27
