"""Laws of a checkpoint that several nodes publish together. What one node publishes is tested with the ledger."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from live_attempts import Attempts

from orchestrator.errors import CorruptCheckpoint
from orchestrator.ledger.checkpoints import discard, fetch, inspect, merge_parts, publish, publish_part, verify
from orchestrator.ledger.keys import Keys
from orchestrator.ledger.records import FileRef, Intent, weights_digest
from orchestrator.ports import Store
from orchestrator.stores.s3 import S3Store

SHARDS = {f"{part}-0000{n}-of-00002.safetensors": b"%s %d" % (part.encode(), n) for part in ("model", "ema", "optimizer") for n in (1, 2)}
FILES = SHARDS | {"stage.yaml": b"steps: 10\n"}


@pytest.fixture
def attempts(tmp_path: Path) -> Attempts:
    return Attempts(tmp_path)


def saved(folder: Path, files: Mapping[str, bytes], *, complete: bool = True) -> Path:
    """A checkpoint directory as a trainer leaves it."""
    folder.mkdir(parents=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    record = {"schema": 1, "step": 10, "complete": complete, "files": {name: len(data) for name, data in sorted(files.items())}}
    (folder / "CHECKPOINT.json").write_text(json.dumps(record, indent=1) + "\n")
    return folder


def shares(nodes: int) -> list[dict[str, bytes]]:
    names = sorted(FILES)
    return [{name: FILES[name] for name in names[node::nodes]} for node in range(nodes)]


def description(folder: Path) -> bytes:
    return (folder / "CHECKPOINT.json").read_bytes()


@pytest.mark.parametrize("nodes", [2, 3, 6])
def test_parts_of_all_nodes_make_the_checkpoint_that_one_node_would_have_made(attempts: Attempts, tmp_path: Path, nodes: int) -> None:
    alone = attempts.intend(stage="alone")
    _, expected = publish(attempts.store, alone, saved(tmp_path / "alone", FILES))
    intent = attempts.intend(stage="nodes", nodes=nodes)
    folders = [saved(tmp_path / f"node{node}", share) for node, share in enumerate(shares(nodes))]
    for node in reversed(range(nodes)):
        assert merge_parts(attempts.store, intent, 10, description(folders[0])) is None, f"node {node} is missing"
        assert attempts.published(intent) == []
        publish_part(attempts.store, intent, folders[node], node)
    merged = merge_parts(attempts.store, intent, 10, description(folders[0]))
    assert merged is not None
    key, manifest = merged
    assert (manifest.files, manifest.weights_digest, manifest.complete) == (expected.files, expected.weights_digest, True)
    assert merge_parts(attempts.store, intent, 10, description(folders[0])) == merged, "a repeated call is the same call"
    fetch(attempts.store, key, manifest.digest(), tmp_path / "fetched")
    assert {path.name: path.read_bytes() for path in (tmp_path / "fetched").iterdir()} == {
        path.name: path.read_bytes() for path in (tmp_path / "alone").iterdir()
    }


def test_verifying_every_byte_writes_nowhere(attempts: Attempts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a temporary folder that is not there, and a store that cannot be copied from."""
    intent = attempts.intend(stage="alone")
    key, manifest = publish(attempts.store, intent, saved(tmp_path / "alone", FILES))
    monkeypatch.setattr(tempfile, "tempdir", "/proc/nowhere")
    monkeypatch.setattr(attempts.store, "download", None)
    assert verify(attempts.store, key, manifest.digest(), full=True) == manifest
    changed = tmp_path / "store" / key.replace("MANIFEST.json", "stage.yaml")
    changed.write_bytes(changed.read_bytes().upper())
    _, faults = inspect(attempts.store, key, manifest.digest(), full=True)
    assert [(fault.kind, fault.key) for fault in faults] == [("file_changed", key.replace("MANIFEST.json", "stage.yaml"))]


def digest_of(*contents: bytes) -> str:
    """sha256 over the sha256s of these."""
    return hashlib.sha256("".join(hashlib.sha256(content).hexdigest() for content in contents).encode()).hexdigest()


def test_the_weights_digest_is_over_all_files_of_model_and_average_and_no_others() -> None:
    def digest(files: Mapping[str, bytes]) -> str:
        return weights_digest({name: FileRef(size=len(data), sha256=hashlib.sha256(data).hexdigest()) for name, data in files.items()})

    assert digest({"ema.safetensors": b"e", "model.safetensors": b"m", "optimizer.safetensors": b"o"}) == digest_of(b"m", b"e")
    shuffled = dict(sorted(FILES.items(), reverse=True))
    assert digest(shuffled) == digest_of(b"model 1", b"model 2", b"ema 1", b"ema 2")
    assert digest(shuffled | {"model-extra.safetensors": b"?", "models.safetensors": b"?", "optimizer.safetensors": b"?"}) == digest(FILES)
    assert digest({}) == hashlib.sha256(b"--").hexdigest()


def test_parts_of_another_attempt_are_never_mixed_in(attempts: Attempts, tmp_path: Path) -> None:
    first, second = (attempts.intend(stage="nodes", nodes=2, attempt=attempt) for attempt in (1, 2))
    mine, theirs = (saved(tmp_path / name, share) for name, share in zip(("node0", "node1"), shares(2), strict=True))
    publish_part(attempts.store, first, theirs, 1)
    publish_part(attempts.store, second, mine, 0)
    assert merge_parts(attempts.store, first, 10, description(mine)) is None
    assert merge_parts(attempts.store, second, 10, description(mine)) is None


def test_parts_of_another_step_do_not_count(attempts: Attempts, tmp_path: Path) -> None:
    intent = attempts.intend(stage="nodes", nodes=2)
    mine, theirs = (saved(tmp_path / name, share) for name, share in zip(("node0", "node1"), shares(2), strict=True))
    publish_part(attempts.store, intent, mine, 0)
    publish_part(attempts.store, intent, theirs, 1)
    assert merge_parts(attempts.store, intent, 1, description(mine)) is None


@pytest.mark.parametrize("wrong", ["twice", "unfinished", "damaged"])
def test_parts_that_do_not_belong_together_are_refused_and_the_part_named(attempts: Attempts, tmp_path: Path, wrong: str) -> None:
    intent: Intent = attempts.intend(stage="nodes", nodes=2)
    mine = saved(tmp_path / "node0", shares(2)[0])
    publish_part(attempts.store, intent, mine, 0)
    key = attempts.ledger.keys.part("nodes", intent.inputs_digest, 1, 10, 1)
    if wrong == "damaged":
        attempts.store.create(key, b"{")
    else:
        share = shares(2)[0] if wrong == "twice" else shares(2)[1]
        publish_part(attempts.store, intent, saved(tmp_path / "node1", share, complete=wrong == "twice"), 1)
    with pytest.raises(CorruptCheckpoint, match=r"step-00000010-001\.json: "):
        merge_parts(attempts.store, intent, 10, description(mine))
    assert attempts.published(intent) == []


@pytest.fixture(params=["folder", pytest.param("s3", marks=pytest.mark.s3)])
def littered(request: pytest.FixtureRequest, attempts: Attempts, tmp_path: Path) -> tuple[Store, Callable[[str], None]]:
    """A store, and what puts there what another tool would."""
    if request.param == "folder":
        root = attempts.store.root

        def touch(key: str) -> None:
            (root / key).parent.mkdir(parents=True, exist_ok=True)
            (root / key).mkdir(exist_ok=True) if key.endswith("/") else (root / key).touch()

        return attempts.store, touch
    server = request.getfixturevalue("s3")
    store = S3Store(server.url(f"littered/{tmp_path.name}"), env=server.env)
    return store, lambda key: store._requests.client.put_object(Bucket=store.bucket, Key=store.prefix + key, Body=b"")


def test_what_other_tools_leave_in_a_checkpoint_damages_nothing_and_stops_no_removal(
    attempts: Attempts, tmp_path: Path, littered: tuple[Store, Callable[[str], None]]
) -> None:
    store, touch = littered
    intent = attempts.intend()
    key, manifest = publish(store, intent, saved(tmp_path / "one", FILES))
    prefix = key.removesuffix("MANIFEST.json")
    for name in ("", ".DS_Store", "._MANIFEST.json", "Thumbs.db", "_SUCCESS", "x.tmp"):
        touch(prefix + name)
    assert verify(store, key, manifest.digest(), full=True) == manifest
    fetch(store, key, manifest.digest(), tmp_path / "fetched")
    assert {path.name for path in (tmp_path / "fetched").iterdir()} == set(manifest.files)

    store.discard(key)  # as if it had never been finished
    discard(store, intent, 10)
    assert list(store.list(prefix)) == []


def test_parts_are_merged_beside_copies_of_them(attempts: Attempts, tmp_path: Path) -> None:
    """A folder that two machines synchronise has `step-00000010-000 (1).json`, and a desktop its own files."""
    intent = attempts.intend(nodes=2)
    folders = [saved(tmp_path / f"node{node}", share) for node, share in enumerate(shares(2))]
    publish_part(attempts.store, intent, folders[0], 0)
    place = attempts.store.root / Keys(intent.pipeline).part(intent.stage, intent.inputs_digest, intent.attempt, 10, 0)
    place.with_name("step-00000010-000 (1).json").write_bytes(place.read_bytes())
    place.with_name("step-00000010-.DS_Store").touch()
    assert merge_parts(attempts.store, intent, 10, description(folders[0])) is None
    publish_part(attempts.store, intent, folders[1], 1)
    assert merge_parts(attempts.store, intent, 10, description(folders[0])) is not None
