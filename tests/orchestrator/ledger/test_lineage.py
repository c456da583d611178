"""Every way in which a committed checkpoint can stop being what was committed is found and named."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from real_ledger import NOW, Lies, commit, intent, step_dir, train

from orchestrator.errors import CorruptCheckpoint
from orchestrator.ledger import lineage
from orchestrator.ledger.records import Committed
from orchestrator.ledger.store import Ledger


@dataclass
class Chain:
    ledger: Ledger
    first: Committed
    second: Committed
    lies: Lies

    def path(self, committed: Committed) -> Path:
        """The committed checkpoint's folder."""
        return (self.lies.folder / committed.manifest).parent

    def older(self, committed: Committed) -> Path:
        return self.path(committed).parent / "step-00000100-a1"

    def record(self, committed: Committed) -> Path:
        return self.lies.folder / self.ledger.keys.committed(committed.stage, committed.inputs_digest)


@pytest.fixture
def chain(lies: Lies, ledger: Ledger, tmp_path: Path) -> Iterator[Chain]:
    held = ledger.acquire(NOW)
    first = train(ledger, tmp_path, "stage1")
    ledger.append_committed(held, first, NOW)
    second = train(ledger, tmp_path, "stage2", parent="stage1", frames=8)
    ledger.append_committed(held, second, NOW)
    yield Chain(Ledger(lies.reach(), "demo"), first, second, lies)


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}, sort_keys=True, separators=(",", ":")) + "\n")


def flip(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[:5] + bytes([data[5] ^ 1]) + data[6:])


def swap(source: Path, target: Path) -> None:
    """All files of another checkpoint in the place of this one's."""
    for path in source.iterdir():
        shutil.copyfile(path, target / path.name)


DAMAGE: dict[str, tuple[Callable[[Chain], object], str, str]] = {
    "a byte flipped": (lambda c: flip(c.path(c.first) / "model.safetensors"), "file_changed", "model.safetensors"),
    "a byte of CHECKPOINT.json flipped": (lambda c: flip(c.path(c.first) / "CHECKPOINT.json"), "file_changed", "CHECKPOINT.json"),
    "a file missing": (lambda c: (c.path(c.first) / "ema.safetensors").unlink(), "file_missing", "ema.safetensors"),
    "a file truncated": (lambda c: os.truncate(c.path(c.first) / "optimizer.safetensors", 3), "file_truncated", "optimizer.safetensors"),
    "a file emptied": (lambda c: os.truncate(c.path(c.first) / "model.safetensors", 0), "file_truncated", "model.safetensors"),
    "a file too many": (lambda c: (c.path(c.first) / "model.pt").write_bytes(b"x"), "file_extra", "model.pt"),
    "a file of an older checkpoint": (
        lambda c: shutil.copyfile(c.older(c.first) / "ema.safetensors", c.path(c.first) / "ema.safetensors"),
        "file_changed",
        "ema.safetensors",
    ),
    "the manifest edited": (lambda c: edit(c.path(c.first) / "MANIFEST.json", code="0.2.0"), "manifest_edited", "MANIFEST.json"),
    "the manifest damaged": (lambda c: (c.path(c.first) / "MANIFEST.json").write_text("{"), "manifest_damaged", "MANIFEST.json"),
    "the manifest missing": (lambda c: (c.path(c.first) / "MANIFEST.json").unlink(), "manifest_missing", "MANIFEST.json"),
    "another stage's checkpoint": (lambda c: swap(c.path(c.second), c.path(c.first)), "other_stage", "MANIFEST.json"),
    "an older checkpoint put back": (lambda c: swap(c.older(c.first), c.path(c.first)), "older_checkpoint", "MANIFEST.json"),
    "COMMITTED edited": (lambda c: edit(c.record(c.first), time=1.0), "committed_edited", "COMMITTED.json"),
    "COMMITTED turned to an older checkpoint": (
        lambda c: edit(c.record(c.first), manifest=c.first.manifest.replace("300", "100")),
        "committed_edited",
        "COMMITTED.json",
    ),
    "COMMITTED of another stage": (lambda c: shutil.copyfile(c.record(c.second), c.record(c.first)), "committed_edited", "COMMITTED.json"),
    "COMMITTED damaged": (lambda c: c.record(c.first).write_text("{"), "committed_damaged", "COMMITTED.json"),
}


def test_a_whole_chain_is_whole(chain: Chain) -> None:
    links = list(lineage.links(chain.ledger, "stage2", chain.second.inputs_digest, full=True))
    assert [(link.stage, link.ok) for link in links] == [("stage2", True), ("stage1", True)]
    assert links[0].parent == lineage.parent_ref(chain.ledger, "stage1", chain.first.inputs_digest)
    assert links[1].parent is None and links[1].committed == chain.first


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_found_and_named(chain: Chain, name: str, tmp_path: Path) -> None:
    """By lineage, and by what a child of the stage does before it starts: `parent_ref`, then `fetch`."""
    damage, kind, file = DAMAGE[name]
    damage(chain)
    child, parent = lineage.links(chain.ledger, "stage2", chain.second.inputs_digest, full=True)
    assert child.ok and kind in [fault.kind for fault in parent.faults]
    fault = next(fault for fault in parent.faults if fault.kind == kind)
    assert fault.key.endswith(file)
    with pytest.raises(CorruptCheckpoint, match=file.replace(".", r"\.")):
        reference = lineage.parent_ref(chain.ledger, "stage1", chain.first.inputs_digest)
        chain.ledger.fetch(reference.key, reference.manifest_digest, tmp_path / "fetched")
    assert not list(tmp_path.glob("*fetched*"))


def test_a_found_difference_says_both_values(chain: Chain) -> None:
    flip(chain.path(chain.first) / "model.safetensors")
    os.truncate(chain.path(chain.first) / "ema.safetensors", 3)
    _, parent = lineage.links(chain.ledger, "stage2", chain.second.inputs_digest, full=True)
    ema, model = parent.faults
    assert ema.text == f"3 bytes, committed were {parent.manifest.files['ema.safetensors'].size}" if parent.manifest else False
    assert parent.manifest and parent.manifest.files["model.safetensors"].sha256 in model.text and "sha256" in model.text


def test_a_stage_that_was_trained_again_because_its_files_were_taken_away_says_so(chain: Chain) -> None:
    edit(chain.record(chain.first), time=NOW + 86400)
    _, parent = lineage.links(chain.ledger, "stage2", chain.second.inputs_digest, full=False)
    (fault,) = parent.faults
    assert fault.kind == "committed_edited" and "the files of that one were taken away, and the stage was trained again" in fault.text
    then, now = (time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(NOW + days * 86400)) for days in (0, 1))
    assert f"is of {now}, and events/ remembers a result of {then}" in fault.text and "osctl launch --set name=OTHER" in fault.text


def test_an_edited_record_is_found_by_its_child_where_there_is_no_event(folder_ledger: Ledger, tmp_path: Path) -> None:
    first = train(folder_ledger, tmp_path, "stage1")
    second = train(folder_ledger, tmp_path, "stage2", parent="stage1", frames=8)
    edit(tmp_path / "store" / folder_ledger.keys.committed("stage1", first.inputs_digest), evaluation={"digit": 1.0})
    _, parent = lineage.links(folder_ledger, "stage2", second.inputs_digest, full=False)
    assert [fault.kind for fault in parent.faults] == ["committed_edited"]


def test_an_unfinished_checkpoint_cannot_pass_for_a_result(folder_ledger: Ledger, tmp_path: Path) -> None:
    made = folder_ledger.create_intent(intent(folder_ledger))
    commit(folder_ledger, made, *folder_ledger.publish(made, step_dir(tmp_path, 100)))
    with pytest.raises(CorruptCheckpoint, match="step 100, which is not the stage's last"):
        lineage.parent_ref(folder_ledger, "stage1", made.inputs_digest)


def test_a_result_whose_intent_is_gone_or_was_edited_is_told(chain: Chain) -> None:
    path = chain.lies.folder / chain.ledger.keys.intent("stage2", chain.second.inputs_digest, 1)
    edit(path, devices_per_node=4)
    [child, _] = lineage.links(Ledger(chain.lies.reach(), "demo"), "stage2", chain.second.inputs_digest, full=False)
    assert [fault.kind for fault in child.faults] == ["inputs_mismatch"]
    path.unlink()
    [child] = lineage.links(Ledger(chain.lies.reach(), "demo"), "stage2", chain.second.inputs_digest, full=False)
    assert [fault.kind for fault in child.faults] == ["intent_missing"]


def test_the_event_of_a_commit_is_written_once(folder_ledger: Ledger, tmp_path: Path) -> None:
    committed = train(folder_ledger, tmp_path, "stage1")
    held = folder_ledger.acquire(NOW)
    first = folder_ledger.append_committed(held, committed, NOW)
    held.release()
    assert folder_ledger.append_committed(folder_ledger.acquire(NOW), committed, NOW + 5) == first
    assert [event.kind for event in folder_ledger.events()] == ["committed"]
