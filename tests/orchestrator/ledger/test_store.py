"""Laws of the ledger, on a folder and on S3: nothing is overwritten, nothing damaged is believed, one driver at a time."""

from __future__ import annotations

import json
import os
import tracemalloc
from pathlib import Path
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st
from real_ledger import NOW, Lies, commit, intent, step_dir

from orchestrator.errors import CorruptCheckpoint, Refused, StoreConflict
from orchestrator.ledger import lineage
from orchestrator.ledger.record import ADVICE, Damaged, DamageKind
from orchestrator.ledger.records import Intent, JournalPiece, Outcome, Report, Sign
from orchestrator.ledger.store import Ledger, pipelines, read_intent
from orchestrator.ports import Object, Store

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
    assert (
        ledger.write_report(made, report.model_copy(update={"reason": "other"})) == report == ledger.report("stage1", made.inputs_digest, 1)
    )
    outcome = Outcome(**{"class": "lost"}, exit_code=None, reason="", step=None, bound=1, ended=2, devices=2, unaccounted_s=0, epoch=1)
    assert ledger.write_outcome(made, outcome) == outcome == ledger.outcome("stage1", made.inputs_digest, 1)
    assert read_intent(ledger.store, ledger.keys.intent("stage1", made.inputs_digest, 1)) == made


def test_attempts_come_in_order_of_their_number(folder_ledger: Ledger) -> None:
    for attempt in (10, 2, 1):
        folder_ledger.create_intent(intent(folder_ledger, attempt=attempt))
    assert folder_ledger.attempts("stage1", intent(folder_ledger).inputs_digest) == [1, 2, 10]


def test_inputs_of_a_stage_come_newest_first(ledger: Ledger) -> None:
    made = [ledger.create_intent(intent(ledger, frames=frames)) for frames in (1, 8, 4)]
    ledger.create_intent(intent(ledger, stage="stage10"))
    assert ledger.inputs_of("stage1") == [made[1].inputs_digest, made[2].inputs_digest, made[0].inputs_digest]
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
    assert ledger.journal("stage1", made.inputs_digest, 1) == [piece(0, 0), piece(0, 1), piece(1, 0)]
    ledger.append_journal(made, piece(0, 2))
    read: list[str] = []
    original = ledger.store.read
    monkeypatch.setattr(ledger.store, "read", lambda key: read.append(key) or original(key))
    assert ledger.journal("stage1", made.inputs_digest, 1) == [piece(0, 0), piece(0, 1), piece(0, 2), piece(1, 0)]
    assert len(read) == 4 and not any("/journal/" in key for key in ledger._objects.known), "a journal has no bound, and is not kept"


def test_a_log_can_be_followed_from_where_it_was_left(ledger: Ledger) -> None:
    made = intent(ledger)
    ledger.append_log(made, 0, 0, b"one", NOW)
    [first] = ledger.log("stage1", made.inputs_digest, 1)
    ledger.append_log(made, 0, 1, b"two", NOW + 0.25)
    ledger.append_log(made, 1, 0, b"other node", NOW + 1)
    assert (first.text(), first.node, first.written) == (b"one", 0, NOW)
    assert [piece.text() for piece in ledger.log("stage1", made.inputs_digest, 1, after=first.key)] == [b"two", b"other node"]
    assert [(piece.text(), piece.node) for piece in ledger.log("stage1", made.inputs_digest, 1, node=1)] == [(b"other node", 1)]


def test_log_pieces_of_an_older_version_carry_no_time(ledger: Ledger) -> None:
    made = intent(ledger)
    ledger.store.create(f"{ledger.keys.attempt('stage1', made.inputs_digest, 1)}/log/000-000000.txt", b"old")
    [piece] = ledger.log("stage1", made.inputs_digest, 1)
    assert (piece.text(), piece.node, piece.written) == (b"old", 0, None)


def test_samples_are_kept_under_their_names(ledger: Ledger, tmp_path: Path) -> None:
    made = intent(ledger)
    (tmp_path / "a.png").write_bytes(b"png")
    ledger.add_sample(made, "a.png", tmp_path / "a.png")
    [key] = ledger.samples("stage1", made.inputs_digest, 1)
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
        folder_ledger.keys.intent("stage1", made.inputs_digest, 1),
        folder_ledger.keys.outcome("stage1", made.inputs_digest, 1),
        folder_ledger.keys.committed("stage1", made.inputs_digest),
        folder_ledger.keys.lease,
    ):
        folder_ledger.store.create(key, data)
    for call, key in (
        (lambda: folder_ledger.intent("stage1", made.inputs_digest, 1), "attempts/1/intent.json"),
        (lambda: folder_ledger.outcome("stage1", made.inputs_digest, 1), "attempts/1/outcome.json"),
        (lambda: folder_ledger.committed("stage1", made.inputs_digest), "COMMITTED.json"),
        (lambda: folder_ledger.acquire(NOW), "lease.json"),
    ):
        with pytest.raises(Refused, match=key) as raised:
            call()
        assert "lease" in key or ADVICE[DAMAGED[data]] in str(raised.value)
    looked = folder_ledger.lenient()
    assert (
        looked.intent("stage1", made.inputs_digest, 1) is None
        and looked.committed("stage1", made.inputs_digest) is None
        and looked.lease() is None
    )
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
        ledger.keys.journal("stage1", made.inputs_digest, 1, 0, 0),
        ledger.keys.event(1, 1),
        f"{ledger.keys.checkpoint('stage1', made.inputs_digest, 200, 1)}/MANIFEST.json",
        ledger.keys.revision(2),
    )
    for other in broken:
        ledger.store.create(other, data)
    assert ledger.journal("stage1", made.inputs_digest, 1) == [piece] and list(ledger.events()) == [event]
    assert [key for key, _ in ledger.checkpoints("stage1", made.inputs_digest)] == [key]
    assert [number for number, _ in ledger.revisions()] == [1]
    assert {key: remark.kind for key, remark in ledger.remarks.items()} == dict.fromkeys(broken, DAMAGED[data])
    [(place, _)] = ledger.unread_manifests("stage1", made.inputs_digest)
    assert (place.step, place.attempt) == (200, 1)
    assert ledger.add_revision({"a": 2}, NOW) == 3


def test_a_record_that_was_mended_is_read_and_its_remark_is_gone(folder_ledger: Ledger, tmp_path: Path) -> None:
    made = folder_ledger.create_intent(intent(folder_ledger))
    path = tmp_path / "store" / folder_ledger.keys.intent("stage1", made.inputs_digest, 1)
    path.write_bytes(made.encode()[:40])
    looked = folder_ledger.lenient()
    assert looked.intent("stage1", made.inputs_digest, 1) is None and len(looked.remarks) == 1
    path.write_bytes(made.encode())
    assert looked.intent("stage1", made.inputs_digest, 1) == made and not looked.remarks


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
    key = ledger.keys.outcome("stage1", made.inputs_digest, 1)
    (lies.folder / key).touch()
    os.truncate(lies.folder / key, 100_000_000)
    tracemalloc.start()
    with pytest.raises(Refused, match="100000000 bytes"):
        Ledger(lies.reach(), "demo").outcome("stage1", made.inputs_digest, 1)
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
    assert looked.intent("stage1", made.inputs_digest, 1) is None
    [remark] = looked.remarks.values()
    assert remark.kind == "forbidden" and "may not be read" in str(remark) and "403" in str(remark)


def test_foreign_names_are_left_alone_and_told(folder_ledger: Ledger) -> None:
    made = folder_ledger.create_intent(intent(folder_ledger))
    folder = folder_ledger.keys.attempt("stage1", made.inputs_digest, 1)
    foreign = (
        "demo/revisions/README.txt", "demo/revisions/1.json", "demo/events/000001-000001 (1).json", "demo/stages/stage1/x.json",
        f"{folder}/journal/notes.txt", f"{folder}/log/000-x.txt", f"{folder}/report.json.bak",
        f"{folder_ledger.keys.stage('stage1', made.inputs_digest)}/attempts/01/intent.json",
        f"{folder_ledger.keys.stage('stage1', made.inputs_digest)}/checkpoints/step-9-a1/MANIFEST.json",
    )  # fmt: skip
    litter = (
        "demo/events/.DS_Store",
        "demo/stages/lost+found/x",
        f"{folder}/journal/Thumbs.db",
        f"{folder}/log/x.txt~",
        f"{folder}/_SUCCESS",
    )
    for key in (*foreign, *litter):  # of litter nothing is said
        folder_ledger.store.create(key, b"{}")
    assert (
        folder_ledger.revisions() == []
        and list(folder_ledger.events()) == []
        and folder_ledger.stages() == [("stage1", made.inputs_digest)]
    )
    assert folder_ledger.attempts("stage1", made.inputs_digest) == [1] and folder_ledger.journal("stage1", made.inputs_digest, 1) == []
    assert list(folder_ledger.log("stage1", made.inputs_digest, 1)) == [] and folder_ledger.reports("stage1", made.inputs_digest, 1) == []
    assert folder_ledger.checkpoints("stage1", made.inputs_digest) == []
    assert {remark.kind for remark in folder_ledger.remarks.values()} == {"foreign"} and len(folder_ledger.remarks) == len(foreign)


def test_names_of_others_tell_of_nobodys_life(folder_ledger: Ledger) -> None:
    """A copy that sorts behind all later pieces would make an agent that lives seem silent."""
    made = folder_ledger.create_intent(intent(folder_ledger))
    attempt = folder_ledger.keys.attempt("stage1", made.inputs_digest, 1)
    for name in ("journal/notes.json", "journal/000-999999 (1).json", "log/zzz.txt", "signs/README", "journal/~lock"):
        folder_ledger.store.create(f"{attempt}/{name}", b"{}")
    assert folder_ledger.newest_sign(made) == ("", "", "")
    folder_ledger.append_log(made, 0, 0, b"a word", 1.0)
    first = folder_ledger.newest_sign(made)
    folder_ledger.append_sign(made, Sign(node=0, seq=0, time=1.0))
    second = folder_ledger.newest_sign(made, first)
    assert first[1].endswith("log/000-000000-1000.txt") and second[:2] == first[:2] and second[2].endswith("signs/000-000000.json")
    assert folder_ledger.newest_piece(made, 0) == ""


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
        f"{ledger.keys.checkpoint('stage1', made.inputs_digest, 300, 1)}/model.safetensors", tmp_path / "step-00000100/model.safetensors"
    )
    assert [key for key, _ in ledger.checkpoints("stage1", made.inputs_digest)] == [keys[1], late, keys[0]]


def test_a_half_written_manifest_is_no_publication_and_a_later_step_can_be_published(ledger: Ledger, tmp_path: Path) -> None:
    """Of a store without atomic writes: a retry meets what its own first try left."""
    made = intent(ledger)
    first, _ = ledger.publish(made, step_dir(tmp_path, 100))
    ledger.store.create(f"{ledger.keys.checkpoint('stage1', made.inputs_digest, 200, 1)}/MANIFEST.json", b'{"schema": 1, "run')
    assert not ledger.is_published(made, 200)
    with pytest.raises(StoreConflict):
        ledger.publish(made, step_dir(tmp_path, 200))
    last, _ = ledger.publish(made, step_dir(tmp_path, 300))
    assert [key for key, _ in ledger.checkpoints("stage1", made.inputs_digest)] == [first, last]


def test_a_publisher_killed_before_the_manifest_is_finished_by_the_next(folder_ledger: Ledger, tmp_path: Path) -> None:
    made, source = intent(folder_ledger), step_dir(tmp_path, 100)
    create = folder_ledger.store.create

    def die(key: str, data: bytes) -> str:
        raise KeyboardInterrupt

    folder_ledger.store.create = die  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        folder_ledger.publish(made, source)
    assert folder_ledger.checkpoints("stage1", made.inputs_digest) == []
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
    assert list(folder_ledger.store.list("")) == [folder_ledger.keys.terms("stage1", made.inputs_digest, 1)]


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
    assert again == first == ledger.committed("stage1", made.inputs_digest)
    with pytest.raises(StoreConflict, match="attempt 2"):
        ledger.commit(first.model_copy(update={"attempt": 2, "manifest_digest": "0" * 64}))
    assert ledger.committed("stage1", made.inputs_digest) == first


def test_a_parent_that_is_not_committed_is_refused_with_the_command_that_makes_it(folder_ledger: Ledger) -> None:
    with pytest.raises(Refused, match="osctl launch stage1"):
        lineage.parent_ref(folder_ledger, "stage1", "0123456789ab")


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


TEXTS = st.text(st.characters(), max_size=30)


@given(TEXTS, st.dictionaries(TEXTS, st.floats(allow_nan=False, allow_infinity=False), max_size=3), st.lists(TEXTS, max_size=3))
def test_whatever_text_a_record_quotes_it_can_be_read_again(reason: str, evaluation: dict[str, float], warnings: list[str]) -> None:
    """A file's name that is no UTF-8 made a report that nobody could read."""
    content = {"class": "code", "reason": reason, "step": 1, "evaluation": evaluation, "warnings": warnings, "started": 0.0, "ended": 1.0}
    report = Report.model_validate(content)
    again = Report.decode(report.encode())
    assert again.encode() == report.encode()
    whole = [text for text in (reason, *warnings) if not any("\ud800" <= letter <= "\udfff" for letter in text)]
    assert set(whole) <= {again.reason, *again.warnings}
