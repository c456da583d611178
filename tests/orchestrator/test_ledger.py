"""Laws of the ledger, on a folder and on S3: nothing is overwritten, nothing damaged is believed, one driver at a time."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import pytest

from opensora import identity
from opensora.config import CheckpointConfig, DataConfig, DigitsSource, Flow, PatchAutoencoder, SamplingConfig, StageConfig, WordEncoder
from orchestrator import lease as leases
from orchestrator.adapters.folder import FolderStore
from orchestrator.adapters.s3 import S3Store
from orchestrator.errors import CorruptCheckpoint, NotFound, Refused, StoreConflict, Unreachable
from orchestrator.ledger import Ledger, pipelines, read_intent
from orchestrator.ports import Object, Store
from orchestrator.processes import Process
from orchestrator.records import (
    ADVICE,
    Committed,
    Damaged,
    DamageKind,
    Intent,
    JournalPiece,
    Manifest,
    Outcome,
    Report,
    Terms,
    run_key,
)

NOW = 1_800_000_000.0


@dataclass
class Lies:
    """A store, and the folder in which its objects lie as plain files."""

    store: Store
    folder: Path
    reach: Callable[[], Store]


@pytest.fixture(params=["folder", pytest.param("s3", marks=pytest.mark.s3)])
def lies(request: pytest.FixtureRequest, tmp_path: Path) -> Lies:
    if request.param == "folder":
        return Lies(FolderStore(tmp_path / "store"), tmp_path / "store", lambda: FolderStore(tmp_path / "store"))
    server = request.getfixturevalue("s3")
    prefix = f"ledger/{tmp_path.name}"

    def reach() -> S3Store:
        return S3Store(server.url(prefix), env=server.env)

    return Lies(reach(), server.root / server.bucket / prefix, reach)


@pytest.fixture
def ledger(lies: Lies) -> Ledger:
    return Ledger(lies.store, "demo")


@pytest.fixture
def folder_ledger(tmp_path: Path) -> Ledger:
    return Ledger(FolderStore(tmp_path / "store"), "demo")


def config(frames: int = 1) -> StageConfig:
    return StageConfig(
        objective=Flow(kind="flow"),
        data=DataConfig(source=DigitsSource(kind="digits", clips=100), frames=frames, height=16, width=16),
        autoencoder=PatchAutoencoder(kind="patch", factor=2),
        text=WordEncoder(kind="words"),
        steps=300,
        batch_size=4,
        checkpoint=CheckpointConfig(every_steps=100),
        sampling=SamplingConfig(method="euler"),
    )


def intent(ledger: Ledger, stage: str = "stage1", attempt: int = 1, parent: str | None = None, frames: int = 1) -> Intent:
    reference = ledger.parent_ref(parent, ledger.inputs_of(parent)[0]) if parent else None
    inputs = identity.name(config(frames), 2, reference.committed_digest if reference else None)
    ledger.write_terms(stage, inputs, attempt, Terms(identity=identity.VERSION, contents=identity.Contents(), price=None))
    return Intent(
        run_key=run_key(ledger.pipeline, stage, inputs, attempt), pipeline=ledger.pipeline, stage=stage, inputs=inputs, attempt=attempt,
        epoch=1, created=NOW + frames, config=config(frames), config_digest=config(frames).digest(), nodes=1, devices_per_node=2,
        device="cpu-core", trainer=(), hang_timeout_s=300, flush_s=5, parent=reference, resume=None, code="0.1.0",
    )  # fmt: skip


def step_dir(folder: Path, step: int, content: bytes = b"weights") -> Path:
    """A finished checkpoint of the trainer. Content differs from step to step, sizes do not."""
    path = folder / f"step-{step:08d}"
    path.mkdir(parents=True)
    files = {f"{name}.safetensors": b"%s of %s at %08d" % (content, name.encode(), step) for name in ("model", "ema", "optimizer")}
    for name, data in files.items():
        (path / name).write_bytes(data)
    sizes = {name: len(data) for name, data in files.items()}
    (path / "CHECKPOINT.json").write_text(json.dumps({"schema": 1, "step": step, "complete": step == 300, "files": sizes, "seed": 42}))
    return path


def commit(ledger: Ledger, made: Intent, key: str, manifest: Manifest) -> Committed:
    return ledger.commit(
        Committed(
            run_key=made.run_key, stage=made.stage, inputs=made.inputs, attempt=made.attempt, step=manifest.step, manifest=key,
            manifest_digest=manifest.digest(), weights_digest=manifest.weights_digest,
            parent_committed=made.parent.committed_digest if made.parent else None, evaluation={"digit": 0.5}, time=NOW, epoch=1,
        )
    )  # fmt: skip


def train(ledger: Ledger, folder: Path, stage: str, parent: str | None = None, frames: int = 1) -> Committed:
    """One stage from intent to commit, with a checkpoint on the way."""
    made = ledger.create_intent(intent(ledger, stage, parent=parent, frames=frames))
    ledger.publish(made, step_dir(folder / stage, 100, stage.encode()))
    return commit(ledger, made, *ledger.publish(made, step_dir(folder / stage, 300, stage.encode())))


# Records


def test_a_stage_that_was_never_worked_on_has_nothing(ledger: Ledger) -> None:
    assert (
        ledger.committed("stage1", "0a") is None and ledger.intent("stage1", "0a", 1) is None and ledger.outcome("stage1", "0a", 1) is None
    )
    assert ledger.attempts("stage1", "0a") == [] and ledger.checkpoints("stage1", "0a") == [] and ledger.inputs_of("stage1") == []
    assert ledger.stages() == [] and ledger.revisions() == [] and list(ledger.events()) == [] and ledger.lease() is None
    assert pipelines(ledger.store) == []


def test_of_two_records_in_one_place_the_first_stays(ledger: Ledger) -> None:
    made = intent(ledger)
    assert ledger.create_intent(made) == made
    assert ledger.create_intent(made.model_copy(update={"epoch": 2})) == made
    report = Report(**{"class": "completed"}, reason="", step=300, started=1, ended=2)
    assert ledger.write_report(made, report) == report
    assert ledger.write_report(made, report.model_copy(update={"reason": "other"})) == report == ledger.report("stage1", made.inputs, 1)
    outcome = Outcome(**{"class": "lost"}, exit_code=None, reason="", step=None, bound=1, ended=2, devices=2, unaccounted_s=0, epoch=1)
    assert ledger.write_outcome(made, outcome) == outcome == ledger.outcome("stage1", made.inputs, 1)
    assert read_intent(ledger.store, ledger.keys.intent("stage1", made.inputs, 1)) == made


def test_attempts_come_in_order_of_their_number(folder_ledger: Ledger) -> None:
    for attempt in (10, 2, 1):
        folder_ledger.create_intent(intent(folder_ledger, attempt=attempt))
    assert folder_ledger.attempts("stage1", intent(folder_ledger).inputs) == [1, 2, 10]


def test_inputs_of_a_stage_come_newest_first(ledger: Ledger) -> None:
    made = [ledger.create_intent(intent(ledger, frames=frames)) for frames in (1, 8, 4)]
    ledger.create_intent(intent(ledger, stage="stage10"))
    assert ledger.inputs_of("stage1") == [made[1].inputs, made[2].inputs, made[0].inputs]
    assert pipelines(ledger.store) == ["demo"]


def test_the_journal_comes_by_node_and_number_and_polling_reads_only_what_is_new(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    made = intent(ledger)

    def piece(node: int, seq: int) -> JournalPiece:
        return JournalPiece(node=node, seq=seq, start=seq, end=seq + 1, devices=2, spent={"step": 1.0})

    for node, seq in ((1, 0), (0, 1), (0, 0)):
        ledger.append_journal(made, piece(node, seq))
    ledger.append_journal(made, piece(0, 0))
    with pytest.raises(StoreConflict):
        ledger.append_journal(made, piece(0, 0).model_copy(update={"devices": 3}))
    assert ledger.journal("stage1", made.inputs, 1) == [piece(0, 0), piece(0, 1), piece(1, 0)]
    ledger.append_journal(made, piece(0, 2))
    read: list[str] = []
    original = ledger.store.read
    monkeypatch.setattr(ledger.store, "read", lambda key: read.append(key) or original(key))
    assert ledger.journal("stage1", made.inputs, 1) == [piece(0, 0), piece(0, 1), piece(0, 2), piece(1, 0)]
    assert len(read) == 4 and not any("/journal/" in key for key in ledger._known), "a journal has no bound, and is not kept"


def test_a_log_can_be_followed_from_where_it_was_left(ledger: Ledger) -> None:
    made = intent(ledger)
    ledger.append_log(made, 0, 0, b"one", NOW)
    [first] = ledger.log("stage1", made.inputs, 1)
    ledger.append_log(made, 0, 1, b"two", NOW + 0.25)
    ledger.append_log(made, 1, 0, b"other node", NOW + 1)
    assert (first.text(), first.node, first.written) == (b"one", 0, NOW)
    assert [piece.text() for piece in ledger.log("stage1", made.inputs, 1, after=first.key)] == [b"two", b"other node"]
    assert [(piece.text(), piece.node) for piece in ledger.log("stage1", made.inputs, 1, node=1)] == [(b"other node", 1)]


def test_log_pieces_of_an_older_version_carry_no_time(ledger: Ledger) -> None:
    made = intent(ledger)
    ledger.store.create(f"{ledger.keys.attempt('stage1', made.inputs, 1)}/log/000-000000.txt", b"old")
    [piece] = ledger.log("stage1", made.inputs, 1)
    assert (piece.text(), piece.node, piece.written) == (b"old", 0, None)


def test_samples_are_kept_under_their_names(ledger: Ledger, tmp_path: Path) -> None:
    made = intent(ledger)
    (tmp_path / "a.png").write_bytes(b"png")
    ledger.add_sample(made, "a.png", tmp_path / "a.png")
    [key] = ledger.samples("stage1", made.inputs, 1)
    assert key.endswith("/samples/a.png") and ledger.store.read(key).data == b"png"
    with pytest.raises(Refused):
        ledger.add_sample(made, "../intent.json", tmp_path / "a.png")


def test_the_same_pipeline_launched_again_makes_no_new_revision(ledger: Ledger) -> None:
    assert [ledger.add_revision(pipeline, NOW + n) for n, pipeline in enumerate([{"a": 1}, {"a": 1}, {"a": 2}, {"a": 1}])] == [1, 1, 2, 3]
    latest = ledger.latest_revision()
    assert latest is not None and (latest.pipeline, latest.created) == ({"a": 1}, NOW + 3)


DAMAGED: dict[bytes, DamageKind] = {
    b"": "empty",
    b"\0" * 300: "empty",
    b"{": "half_written",
    b'{"schema": 1, "run': "half_written",
    b"[]": "foreign",
    b"\xff\xfe": "foreign",
    b"[" * 100_000: "foreign",
    b"read me": "foreign",
    b'{"jobs": []}': "foreign",
    b'{"schema": 2}': "newer",
    b'{"schema": 0}': "older",
    b'{"schema": 1, "typo": 1}': "damaged",
    b'{"schema": 1, "\xff": 1}': "damaged",
}


@pytest.mark.parametrize("data", DAMAGED, ids=lambda data: repr(data[:20]))
def test_a_record_on_which_something_rests_is_an_error_that_names_it_and_says_what_it_is(folder_ledger: Ledger, data: bytes) -> None:
    made = intent(folder_ledger)
    for key in (
        folder_ledger.keys.intent("stage1", made.inputs, 1),
        folder_ledger.keys.outcome("stage1", made.inputs, 1),
        folder_ledger.keys.committed("stage1", made.inputs),
        folder_ledger.keys.lease,
    ):
        folder_ledger.store.create(key, data)
    for call, key in (
        (lambda: folder_ledger.intent("stage1", made.inputs, 1), "attempts/1/intent.json"),
        (lambda: folder_ledger.outcome("stage1", made.inputs, 1), "attempts/1/outcome.json"),
        (lambda: folder_ledger.committed("stage1", made.inputs), "COMMITTED.json"),
        (lambda: folder_ledger.acquire(NOW), "lease.json"),
    ):
        with pytest.raises(Refused, match=key) as raised:
            call()
        assert "lease" in key or ADVICE[DAMAGED[data]] in str(raised.value)
    looked = folder_ledger.lenient()
    assert looked.intent("stage1", made.inputs, 1) is None and looked.committed("stage1", made.inputs) is None and looked.lease() is None
    assert [remark.kind for remark in looked.remarks.values() if "lease" not in remark.key] == [DAMAGED[data]] * 2
    assert len(looked.remarks) == 3


@pytest.mark.parametrize("data", DAMAGED, ids=lambda data: repr(data[:20]))
def test_of_many_records_one_that_cannot_be_read_is_left_out_with_a_remark(ledger: Ledger, tmp_path: Path, data: bytes) -> None:
    made = intent(ledger)
    piece = JournalPiece(node=0, seq=1, start=1, end=2, devices=2, spent={"step": 1.0})
    ledger.append_journal(made, piece)
    held = ledger.acquire(NOW)
    event = ledger.append_event(held, "launched", now=NOW)
    key, _ = ledger.publish(made, step_dir(tmp_path, 100))
    ledger.add_revision({"a": 1}, NOW)
    broken = (
        ledger.keys.journal("stage1", made.inputs, 1, 0, 0),
        ledger.keys.event(1, 1),
        f"{ledger.keys.checkpoint('stage1', made.inputs, 200, 1)}/MANIFEST.json",
        ledger.keys.revision(2),
    )
    for other in broken:
        ledger.store.create(other, data)
    assert ledger.journal("stage1", made.inputs, 1) == [piece] and list(ledger.events()) == [event]
    assert [key for key, _ in ledger.checkpoints("stage1", made.inputs)] == [key]
    assert [number for number, _ in ledger.revisions()] == [1]
    assert {key: remark.kind for key, remark in ledger.remarks.items()} == dict.fromkeys(broken, DAMAGED[data])
    [(place, _)] = ledger.unread_manifests("stage1", made.inputs)
    assert (place.step, place.attempt) == (200, 1)
    assert ledger.add_revision({"a": 2}, NOW) == 3


def test_a_record_that_was_mended_is_read_and_its_remark_is_gone(folder_ledger: Ledger, tmp_path: Path) -> None:
    made = folder_ledger.create_intent(intent(folder_ledger))
    path = tmp_path / "store" / folder_ledger.keys.intent("stage1", made.inputs, 1)
    path.write_bytes(made.encode()[:40])
    looked = folder_ledger.lenient()
    assert looked.intent("stage1", made.inputs, 1) is None and len(looked.remarks) == 1
    path.write_bytes(made.encode())
    assert looked.intent("stage1", made.inputs, 1) == made and not looked.remarks


def test_a_record_of_another_release_is_told_from_a_damaged_one(folder_ledger: Ledger) -> None:
    made = intent(folder_ledger)
    content = json.loads(made.encode())
    for change, kind, says in (
        ({"wings": 2}, "newer", "the field wings"),
        ({"config": content["config"] | {"wings": 2}}, "newer", "the field config.wings"),
        ({"attempt": "many"}, "damaged", "attempt"),
        ({"created": float("nan")}, "damaged", "created"),
    ):
        with pytest.raises(Damaged, match=says) as raised:
            Intent.decode(json.dumps(content | change).encode())
        assert raised.value.kind == kind
    piece = {"node": 0, "seq": 0, "start": 0, "end": 1, "devices": 1}
    for change, kind, says in (
        ({"spent": {"flying": 1.0}}, "newer", "spent.flying"),
        ({"spent": {}, "metrics": [{"step": "x"}]}, "damaged", "metrics.0.step"),
        ({"spent": {}, "metrics": [{"step": 1, "loss": []}]}, "damaged", "metrics.0.loss"),
    ):
        with pytest.raises(Damaged, match=says) as raised:
            JournalPiece.decode(json.dumps(piece | change).encode())
        assert raised.value.kind == kind


def test_an_object_of_100_mb_is_not_read_into_memory(lies: Lies, ledger: Ledger) -> None:
    made = ledger.create_intent(intent(ledger))
    key = ledger.keys.outcome("stage1", made.inputs, 1)
    (lies.folder / key).touch()
    os.truncate(lies.folder / key, 100_000_000)
    tracemalloc.start()
    with pytest.raises(Refused, match="100000000 bytes"):
        Ledger(lies.reach(), "demo").outcome("stage1", made.inputs, 1)
    assert tracemalloc.get_traced_memory()[1] < 20_000_000
    tracemalloc.stop()


class Forbidding:
    """A store that shows some keys and does not let them be read, as a bucket's policy may."""

    def __init__(self, store: Store, word: str):
        self.store, self.word = store, word

    def __getattr__(self, name: str) -> Any:
        return getattr(self.store, name)

    def read(self, key: str) -> Object:
        if self.word in key:
            raise Refused(f"cannot read {key}: access denied (403 AccessDenied)")
        return self.store.read(key)


def test_what_may_not_be_read_is_told_so(folder_ledger: Ledger) -> None:
    made = folder_ledger.create_intent(intent(folder_ledger))
    looked = Ledger(cast(Store, Forbidding(folder_ledger.store, "intent")), "demo").lenient()
    assert looked.intent("stage1", made.inputs, 1) is None
    [remark] = looked.remarks.values()
    assert remark.kind == "forbidden" and "may not be read" in str(remark) and "403" in str(remark)


def test_foreign_names_are_left_alone_and_told(folder_ledger: Ledger) -> None:
    made = folder_ledger.create_intent(intent(folder_ledger))
    folder = folder_ledger.keys.attempt("stage1", made.inputs, 1)
    foreign = (
        "demo/revisions/README.txt", "demo/revisions/1.json", "demo/events/.DS_Store", "demo/stages/stage1/x.json",
        f"{folder}/journal/notes.txt", f"{folder}/log/000-x.txt", f"{folder}/report.json.bak",
        f"{folder_ledger.keys.stage('stage1', made.inputs)}/attempts/01/intent.json",
        f"{folder_ledger.keys.stage('stage1', made.inputs)}/checkpoints/step-9-a1/MANIFEST.json",
    )  # fmt: skip
    for key in foreign:
        folder_ledger.store.create(key, b"{}")
    assert folder_ledger.revisions() == [] and list(folder_ledger.events()) == [] and folder_ledger.stages() == [("stage1", made.inputs)]
    assert folder_ledger.attempts("stage1", made.inputs) == [1] and folder_ledger.journal("stage1", made.inputs, 1) == []
    assert list(folder_ledger.log("stage1", made.inputs, 1)) == [] and folder_ledger.reports("stage1", made.inputs, 1) == []
    assert folder_ledger.checkpoints("stage1", made.inputs) == []
    assert {remark.kind for remark in folder_ledger.remarks.values()} == {"foreign"} and len(folder_ledger.remarks) == len(foreign)


def test_data_sets_and_weights_are_no_pipelines(ledger: Ledger) -> None:
    for key in ("datasets/mine/manifest.json", "weights/t5/manifest.json", ".trash/x", "demo/lease.json"):
        ledger.store.create(key, b"{}")
    assert pipelines(ledger.store) == ["demo"]


# Checkpoints


def test_what_is_published_comes_back_to_the_byte(ledger: Ledger, tmp_path: Path) -> None:
    made, source = intent(ledger), step_dir(tmp_path, 100)
    key, manifest = ledger.publish(made, source)
    fetched = ledger.fetch(key, manifest.digest(), tmp_path / "deep" / "target")
    assert fetched == manifest and (manifest.step, manifest.complete, manifest.attempt) == (100, False, 1)
    target = tmp_path / "deep" / "target"
    assert {path.name: path.read_bytes() for path in target.iterdir()} == {path.name: path.read_bytes() for path in source.iterdir()}
    assert [path.name for path in target.parent.iterdir()] == ["target"]
    assert ledger.verify(key, manifest.digest(), full=True) == manifest


def test_publishing_again_changes_nothing_and_other_content_is_a_conflict(ledger: Ledger, tmp_path: Path) -> None:
    made, source = intent(ledger), step_dir(tmp_path, 100)
    assert ledger.publish(made, source) == ledger.publish(made, source)
    with pytest.raises(StoreConflict):
        ledger.publish(made, step_dir(tmp_path / "other", 100, b"garbage"))


def test_a_checkpoint_without_its_manifest_does_not_count(ledger: Ledger, tmp_path: Path) -> None:
    made = intent(ledger)
    keys = [ledger.publish(made, step_dir(tmp_path, step))[0] for step in (200, 100)]
    late, _ = ledger.publish(intent(ledger, attempt=2), step_dir(tmp_path / "2", 100))
    ledger.store.upload(
        f"{ledger.keys.checkpoint('stage1', made.inputs, 300, 1)}/model.safetensors", tmp_path / "step-00000100/model.safetensors"
    )
    assert [key for key, _ in ledger.checkpoints("stage1", made.inputs)] == [keys[1], late, keys[0]]


def test_a_half_written_manifest_is_no_publication_and_a_later_step_can_be_published(ledger: Ledger, tmp_path: Path) -> None:
    """Of a store without atomic writes: a retry meets what its own first try left."""
    made = intent(ledger)
    first, _ = ledger.publish(made, step_dir(tmp_path, 100))
    ledger.store.create(f"{ledger.keys.checkpoint('stage1', made.inputs, 200, 1)}/MANIFEST.json", b'{"schema": 1, "run')
    assert not ledger.is_published(made, 200)
    with pytest.raises(StoreConflict):
        ledger.publish(made, step_dir(tmp_path, 200))
    last, _ = ledger.publish(made, step_dir(tmp_path, 300))
    assert [key for key, _ in ledger.checkpoints("stage1", made.inputs)] == [first, last]


def test_a_publisher_killed_before_the_manifest_is_finished_by_the_next(folder_ledger: Ledger, tmp_path: Path) -> None:
    made, source = intent(folder_ledger), step_dir(tmp_path, 100)
    create = folder_ledger.store.create

    def die(key: str, data: bytes) -> str:
        raise KeyboardInterrupt

    folder_ledger.store.create = die  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        folder_ledger.publish(made, source)
    assert folder_ledger.checkpoints("stage1", made.inputs) == []
    folder_ledger.store.create = create  # type: ignore[method-assign]
    key, manifest = folder_ledger.publish(made, source)
    assert folder_ledger.verify(key, manifest.digest(), full=True) == manifest


def test_an_unfinished_directory_is_not_published(folder_ledger: Ledger, tmp_path: Path) -> None:
    made, source = intent(folder_ledger), step_dir(tmp_path, 100)
    (source / "ema.safetensors").write_bytes(b"short")
    with pytest.raises(CorruptCheckpoint, match=r"ema\.safetensors: has 5 bytes; CHECKPOINT\.json says 26"):
        folder_ledger.publish(made, source)
    (source / "ema.safetensors").unlink()
    with pytest.raises(CorruptCheckpoint, match=r"ema\.safetensors: is not a file"):
        folder_ledger.publish(made, source)
    (source / "ema.safetensors").symlink_to("/etc/passwd")
    with pytest.raises(CorruptCheckpoint, match=r"ema\.safetensors: is not a file"):
        folder_ledger.publish(made, source)
    (source / "CHECKPOINT.json").unlink()
    with pytest.raises(CorruptCheckpoint, match=r"has no CHECKPOINT\.json"):
        folder_ledger.publish(made, source)
    assert list(folder_ledger.store.list("")) == [folder_ledger.keys.terms("stage1", made.inputs, 1)]


def test_a_file_name_that_leads_elsewhere_is_refused(folder_ledger: Ledger, tmp_path: Path) -> None:
    source = step_dir(tmp_path, 100)
    (source / "CHECKPOINT.json").write_text(json.dumps({"step": 100, "complete": False, "files": {"../../escape": 1}}))
    with pytest.raises(Refused, match=r"\.\./\.\./escape"):
        folder_ledger.publish(intent(folder_ledger), source)


def test_nothing_is_fetched_over_what_is_there(folder_ledger: Ledger, tmp_path: Path) -> None:
    key, manifest = folder_ledger.publish(intent(folder_ledger), step_dir(tmp_path, 100))
    (tmp_path / "there").mkdir()
    with pytest.raises(FileExistsError):
        folder_ledger.fetch(key, manifest.digest(), tmp_path / "there")


# Commit


def test_a_stage_is_committed_once(ledger: Ledger, tmp_path: Path) -> None:
    made = ledger.create_intent(intent(ledger))
    key, manifest = ledger.publish(made, step_dir(tmp_path, 300))
    first = commit(ledger, made, key, manifest)
    again = ledger.commit(first.model_copy(update={"time": NOW + 9, "epoch": 2}))
    assert again == first == ledger.committed("stage1", made.inputs)
    with pytest.raises(StoreConflict, match="attempt 2"):
        ledger.commit(first.model_copy(update={"attempt": 2, "manifest_digest": "0" * 64}))
    assert ledger.committed("stage1", made.inputs) == first


def test_a_parent_that_is_not_committed_is_refused_with_the_command_that_makes_it(folder_ledger: Ledger) -> None:
    with pytest.raises(Refused, match="osctl launch stage1"):
        folder_ledger.parent_ref("stage1", "0123456789ab")


# Lineage: every way in which a committed checkpoint can stop being what was committed


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
        return self.lies.folder / self.ledger.keys.committed(committed.stage, committed.inputs)


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
    links = list(chain.ledger.lineage("stage2", chain.second.inputs, full=True))
    assert [(link.stage, link.ok) for link in links] == [("stage2", True), ("stage1", True)]
    assert links[0].parent == chain.ledger.parent_ref("stage1", chain.first.inputs)
    assert links[1].parent is None and links[1].committed == chain.first


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_found_and_named(chain: Chain, name: str, tmp_path: Path) -> None:
    """By lineage, and by what a child of the stage does before it starts: `parent_ref`, then `fetch`."""
    damage, kind, file = DAMAGE[name]
    damage(chain)
    child, parent = chain.ledger.lineage("stage2", chain.second.inputs, full=True)
    assert child.ok and kind in [fault.kind for fault in parent.faults]
    fault = next(fault for fault in parent.faults if fault.kind == kind)
    assert fault.key.endswith(file)
    with pytest.raises(CorruptCheckpoint, match=file.replace(".", r"\.")):
        reference = chain.ledger.parent_ref("stage1", chain.first.inputs)
        chain.ledger.fetch(reference.key, reference.manifest_digest, tmp_path / "fetched")
    assert not list(tmp_path.glob("*fetched*"))


def test_a_found_difference_says_both_values(chain: Chain) -> None:
    flip(chain.path(chain.first) / "model.safetensors")
    os.truncate(chain.path(chain.first) / "ema.safetensors", 3)
    _, parent = chain.ledger.lineage("stage2", chain.second.inputs, full=True)
    ema, model = parent.faults
    assert ema.text == f"3 bytes, committed were {parent.manifest.files['ema.safetensors'].size}" if parent.manifest else False
    assert parent.manifest and parent.manifest.files["model.safetensors"].sha256 in model.text and "sha256" in model.text


def test_an_edited_record_is_found_by_its_child_where_there_is_no_event(folder_ledger: Ledger, tmp_path: Path) -> None:
    first = train(folder_ledger, tmp_path, "stage1")
    second = train(folder_ledger, tmp_path, "stage2", parent="stage1", frames=8)
    edit(tmp_path / "store" / folder_ledger.keys.committed("stage1", first.inputs), evaluation={"digit": 1.0})
    _, parent = folder_ledger.lineage("stage2", second.inputs, full=False)
    assert [fault.kind for fault in parent.faults] == ["committed_edited"]


def test_an_unfinished_checkpoint_cannot_pass_for_a_result(folder_ledger: Ledger, tmp_path: Path) -> None:
    made = folder_ledger.create_intent(intent(folder_ledger))
    commit(folder_ledger, made, *folder_ledger.publish(made, step_dir(tmp_path, 100)))
    with pytest.raises(CorruptCheckpoint, match="step 100, which is not the stage's last"):
        folder_ledger.parent_ref("stage1", made.inputs)


def test_a_result_whose_intent_is_gone_or_was_edited_is_told(chain: Chain) -> None:
    path = chain.lies.folder / chain.ledger.keys.intent("stage2", chain.second.inputs, 1)
    edit(path, devices_per_node=4)
    [child, _] = Ledger(chain.lies.reach(), "demo").lineage("stage2", chain.second.inputs, full=False)
    assert [fault.kind for fault in child.faults] == ["inputs_mismatch"]
    path.unlink()
    [child] = Ledger(chain.lies.reach(), "demo").lineage("stage2", chain.second.inputs, full=False)
    assert [fault.kind for fault in child.faults] == ["intent_missing"]


def test_the_event_of_a_commit_is_written_once(folder_ledger: Ledger, tmp_path: Path) -> None:
    committed = train(folder_ledger, tmp_path, "stage1")
    held = folder_ledger.acquire(NOW)
    first = folder_ledger.append_committed(held, committed, NOW)
    held.release()
    assert folder_ledger.append_committed(folder_ledger.acquire(NOW), committed, NOW + 5) == first
    assert [event.kind for event in folder_ledger.events()] == ["committed"]


# Events


def test_events_come_in_order_of_epoch_and_number(ledger: Ledger) -> None:
    for epoch in (1, 2):
        held = ledger.acquire(NOW)
        for number in range(3):
            ledger.append_event(held, "observed", now=NOW + number, stage="stage1", attempt=1, detail=f"{epoch}.{number}")
        held.release()
    assert [event.detail for event in ledger.events()] == ["1.0", "1.1", "1.2", "2.0", "2.1", "2.2"]
    assert [event.detail for event in ledger.events(after=(1, 1))] == ["1.2", "2.0", "2.1", "2.2"]


def test_a_request_to_cancel_stands_among_the_drivers_own_events(ledger: Ledger, lies: Lies) -> None:
    held = ledger.acquire(NOW)
    ledger.append_event(held, "launched", now=NOW)
    assert Ledger(lies.reach(), "demo").ask_cancel(NOW + 1, "by somebody")
    ledger.append_event(held, "ended", now=NOW + 2)
    assert [(event.seq, event.kind) for event in ledger.events()] == [(0, "launched"), (1, "cancel"), (2, "ended")]
    held.release()
    assert not ledger.ask_cancel(NOW + 3)


# Lease


def foreign(number: int = 1) -> Process:
    return Process(f"host{number}", 100 + number, 5.0, f"boot{number}")


def test_a_second_driver_is_refused_and_told_who_drives_and_how_long(ledger: Ledger) -> None:
    held = ledger.acquire(NOW)
    with pytest.raises(Refused, match=rf"pipeline demo: is driven by .*:{os.getpid()} \(epoch 1\), its lease runs for another 11 s"):
        ledger.acquire(NOW + 4)
    holder = ledger.holder(NOW + 4)
    assert holder == held.record and holder.pid == os.getpid()


def test_a_released_lease_is_taken_at_once_and_the_epoch_grows(ledger: Ledger) -> None:
    for epoch in (1, 2, 3):
        held = ledger.acquire(NOW)
        assert held.epoch == epoch and held.valid(NOW + 14) and not held.valid(NOW + 15)
        held.renew(NOW + 10)
        assert held.valid(NOW + 24)
        held.release()
        assert not held.valid(NOW) and ledger.holder(NOW) is None


def test_an_expired_holder_is_taken_over_and_its_late_writes_fail(ledger: Ledger, lies: Lies) -> None:
    slow = ledger.acquire(NOW)
    fast = Ledger(lies.reach(), "demo").acquire(NOW + 15)
    assert fast.epoch == 2
    with pytest.raises(StoreConflict):
        slow.renew(NOW + 16)
    assert slow.lost and not slow.valid(NOW)
    with pytest.raises(StoreConflict):
        ledger.append_event(slow, "observed", now=NOW + 16)
    slow.release()
    fast.renew(NOW + 17)
    assert ledger.lease() == fast.record and list(ledger.events()) == []


HOLDER = """
import os, sys, time
from pathlib import Path
from orchestrator.adapters.folder import FolderStore
from orchestrator.ledger import Ledger
held = Ledger(FolderStore(Path(sys.argv[1])), "demo").acquire(float(sys.argv[2]))
print(held.epoch, flush=True)
time.sleep(60)
"""


def holder_process(folder: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen([sys.executable, "-c", HOLDER, folder, str(NOW)], stdout=subprocess.PIPE, text=True)
    assert process.stdout and process.stdout.readline() == "1\n"
    return process


def test_a_dead_process_of_this_host_is_taken_over_at_once(tmp_path: Path) -> None:
    ledger = Ledger(FolderStore(tmp_path), "demo")
    with holder_process(tmp_path) as process:
        try:
            with pytest.raises(Refused, match=f":{process.pid} "):
                ledger.acquire(NOW + 1)
        finally:
            process.kill()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        assert ledger.acquire(NOW + 1).epoch == 2  # it is dead, but nobody has reaped it: a zombie drives nothing
    assert process.returncode == -signal.SIGKILL


def test_a_stopped_process_keeps_its_lease_until_it_expires(tmp_path: Path) -> None:
    ledger = Ledger(FolderStore(tmp_path), "demo")
    with holder_process(tmp_path) as process:
        try:
            process.send_signal(signal.SIGSTOP)
            with pytest.raises(Refused):
                ledger.acquire(NOW + 14)
            assert ledger.acquire(NOW + 16).epoch == 2
        finally:
            process.kill()


def test_a_pid_used_again_is_another_process(folder_ledger: Ledger) -> None:
    me = Process.of(os.getpid())
    leases.acquire(folder_ledger.store, folder_ledger.keys.lease, NOW, me=replace(me, started=me.started - 1))
    assert folder_ledger.acquire(NOW + 1).epoch == 2


def test_a_process_of_another_boot_or_container_is_not_judged_by_its_pid(folder_ledger: Ledger) -> None:
    me = Process.of(os.getpid())
    leases.acquire(folder_ledger.store, folder_ledger.keys.lease, NOW, me=replace(me, started=1.0, boot="another"))
    with pytest.raises(Refused):
        folder_ledger.acquire(NOW + 1)


def test_another_hosts_expired_lease_is_watched_before_it_is_taken(ledger: Ledger) -> None:
    """Its clock may be behind ours: one that renews meanwhile lives."""
    key, waits = ledger.keys.lease, list[float]()
    there = leases.acquire(ledger.store, key, NOW, me=foreign(1))
    with pytest.raises(Refused, match="has just renewed"):
        leases.acquire(ledger.store, key, NOW + 1200, me=foreign(2), pause=lambda seconds: there.renew(NOW + 5))
    taken = leases.acquire(ledger.store, key, NOW + 1200, me=foreign(2), pause=waits.append)
    assert taken.epoch == 2 and waits == [7.5]
    with pytest.raises(StoreConflict):
        there.renew(NOW + 10)


def test_a_store_that_does_not_answer_does_not_cost_the_lease(folder_ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    held = folder_ledger.acquire(NOW)

    def silent(*_: object) -> str:
        raise Unreachable("gone")

    with monkeypatch.context() as patch, pytest.raises(Unreachable):
        patch.setattr(folder_ledger.store, "replace", silent)
        held.renew(NOW + 5)
    assert not held.lost
    held.renew(NOW + 6)
    assert held.expires == NOW + 21


RACER = """
import sys, time
from orchestrator.adapters import open_store
from orchestrator.errors import Refused
from orchestrator.ledger import Ledger
store, handles = open_store(sys.argv[1]), []
print("ready", flush=True)
for line in sys.stdin:
    at, pipeline, now = line.split()
    while time.time() < float(at): pass
    try: handles.append(Ledger(store, pipeline).acquire(float(now))); print("holds", handles[-1].epoch, flush=True)
    except Refused: print("refused", flush=True)
"""


def test_of_two_drivers_that_start_together_one_is_refused(lies: Lies, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    env = dict(os.environ)
    if lies.store.url.startswith("s3:"):
        env.update(request.getfixturevalue("s3").env)
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "env": env}
    racers = [subprocess.Popen([sys.executable, "-c", RACER, lies.store.url], **pipes) for _ in range(2)]
    try:
        assert [racer.stdout.readline() for racer in racers if racer.stdout] == ["ready\n"] * 2
        for number in range(20):
            # Even rounds begin without a lease, odd ones with one that its dead holder has left.
            if number % 2:
                leases.acquire(lies.store, f"p{number}/lease.json", NOW, me=replace(Process.of(os.getpid()), started=1.0))
            at = time.time() + 0.01
            for racer in racers:
                assert racer.stdin
                racer.stdin.write(f"{at} p{number} {NOW}\n")
                racer.stdin.flush()
            answers = sorted(racer.stdout.readline().strip() for racer in racers if racer.stdout)
            assert answers == [f"holds {1 + number % 2}", "refused"]
    finally:
        for racer in racers:
            racer.communicate()


def test_a_lease_that_was_removed_is_lost(folder_ledger: Ledger, tmp_path: Path) -> None:
    held = folder_ledger.acquire(NOW)
    (tmp_path / "store" / "demo" / "lease.json").unlink()
    with pytest.raises(NotFound):
        folder_ledger.store.read(folder_ledger.keys.lease)
    with pytest.raises(StoreConflict):
        held.renew(NOW + 1)
