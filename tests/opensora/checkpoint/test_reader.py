from __future__ import annotations

import errno
import json
import resource
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from opensora.checkpoint import reader as checkpoint
from opensora.checkpoint.writer import Saver
from opensora.config import StageConfig
from opensora.errors import DiskFull, ParentError

Stages = Callable[..., StageConfig]


@pytest.fixture
def encoders(tmp_path: Path) -> Path:
    """A directory with the two files that a checkpoint copies."""
    (tmp_path / "encoders").mkdir()
    for name in ("autoencoder", "text"):
        (tmp_path / "encoders" / f"{name}.safetensors").write_bytes(name.encode())
    return tmp_path / "encoders"


def write(folder: Path, stage: StageConfig, encoders: Path, step: int, numbers: int = 4, *, node: int = 0, nodes: int = 1) -> Path:
    """A checkpoint as the one rank of node `node` writes it."""
    tensors = {"w": torch.full((numbers,), float(step))}
    saver = Saver(folder, stage, writer=node, writers=nodes, here=(node,), device=torch.device("cpu"))
    shards = {name: checkpoint.divide(tensors, node, nodes) for name in checkpoint.TENSORS}
    saver.save(shards, encoders, step=step, world_size=2, seen=(step * 6, step * 2), clips="", carried=("a",), reset=("b",), node=node)
    saver.wait()
    return checkpoint.directory(folder, step)


@pytest.mark.parametrize("nodes", [2, 3, 8])
def test_nodes_write_each_file_once_and_together_a_checkpoint(nodes: int, tiny_stage: Stages, tmp_path: Path, encoders: Path) -> None:
    stage = tiny_stage()
    whole = tmp_path / "together"
    sizes: dict[str, int] = {}
    whole.mkdir()
    for node in range(nodes):
        path = write(tmp_path / f"node{node}", stage, encoders, 4, node=node, nodes=nodes)
        files = {file.name: file.read_bytes() for file in path.iterdir()}
        record = json.loads(files.pop(checkpoint.RECORD))
        assert record["files"] == {name: len(data) for name, data in files.items()}
        assert not files.keys() & sizes.keys()
        sizes |= record["files"]
        for name, data in files.items():
            (whole / name).write_bytes(data)
    (whole / checkpoint.RECORD).write_text(json.dumps(record | {"files": sizes}))
    assert len(sizes) == 3 * nodes + 3
    assert all(torch.equal(checkpoint.Reader(whole).part(part)["w"], torch.full((4,), 4.0)) for part in checkpoint.TENSORS)


def test_what_was_saved_is_read(tiny_stage: Stages, tmp_path: Path, encoders: Path) -> None:
    stage = tiny_stage()
    path = write(tmp_path / "checkpoints", stage, encoders, 4)
    record, saved = checkpoint.read(path)
    assert path.name == "step-00000004"
    assert saved == stage
    assert (record.step, record.complete, record.clips_seen, record.seen, record.world_size) == (4, True, 32, (24, 8), 2)
    assert (record.carried, record.reset) == (("a",), ("b",))
    assert set(record.files) == {path.name for path in path.iterdir()} - {checkpoint.RECORD}
    assert json.loads((path / checkpoint.RECORD).read_text())["schema"] == 1
    assert torch.equal(checkpoint.Reader(path).part("ema")["w"], torch.full((4,), 4.0))
    assert (path / "text.safetensors").read_bytes() == b"text"


def test_equal_states_give_equal_bytes(tiny_stage: Stages, tmp_path: Path, encoders: Path) -> None:
    one, two = (write(tmp_path / name, tiny_stage(), encoders, 1) for name in ("one", "two"))
    assert all((two / path.name).read_bytes() == path.read_bytes() for path in one.iterdir())


def test_only_the_last_are_kept(tiny_stage: Stages, tmp_path: Path, encoders: Path) -> None:
    folder = tmp_path / "checkpoints"
    for step in (1, 2, 3, 10):
        write(folder, tiny_stage(checkpoint={"every_steps": 1, "keep_last": 2}), encoders, step)
    assert [path.name for path in checkpoint.finished(folder)] == ["step-00000003", "step-00000010"]
    assert checkpoint.latest(folder) == checkpoint.directory(folder, 10)


def test_what_is_not_whole_is_not_the_latest(tiny_stage: Stages, tmp_path: Path, encoders: Path) -> None:
    folder = tmp_path / "checkpoints"
    assert checkpoint.latest(folder) is None
    write(folder, tiny_stage(), encoders, 1)
    (write(folder, tiny_stage(), encoders, 2) / checkpoint.RECORD).unlink()
    (folder / ".step-00000003.partial").mkdir()
    shutil.copytree(checkpoint.directory(folder, 1), folder / "step-00000004-copy")
    assert checkpoint.latest(folder) == checkpoint.directory(folder, 1)


def test_a_killed_writer_leaves_nothing_that_the_next_one_keeps(tiny_stage: Stages, tmp_path: Path, encoders: Path) -> None:
    folder = tmp_path / "checkpoints"
    (folder / ".step-00000001.partial").mkdir(parents=True)
    (folder / ".step-00000001.partial" / "left.over").write_text("half")
    path = write(folder, tiny_stage(), encoders, 1)
    assert not (path / "left.over").exists()
    assert [path.name for path in folder.iterdir()] == ["step-00000001"]


def test_a_full_disk_leaves_the_earlier_checkpoints(tiny_stage: Stages, tmp_path: Path, encoders: Path) -> None:
    folder = tmp_path / "checkpoints"
    stage = tiny_stage(checkpoint={"every_steps": 1, "keep_last": 1})
    write(folder, stage, encoders, 1)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))  # as a full disk: a file can grow no further
    try:
        with pytest.raises(DiskFull, match="step-00000002"):
            write(folder, stage, encoders, 2, numbers=10_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [path.name for path in folder.iterdir()] == ["step-00000001"]
    checkpoint.read(checkpoint.directory(folder, 1))


def test_a_full_disk_is_known_by_its_number() -> None:
    assert checkpoint.is_disk_full(OSError(errno.ENOSPC, "No space left on device"))
    assert checkpoint.is_disk_full(OSError(errno.EDQUOT, "Disk quota exceeded"))
    assert not checkpoint.is_disk_full(OSError(errno.EACCES, "Permission denied"))
    assert not checkpoint.is_disk_full(ValueError("(os error 28)"))


@pytest.mark.parametrize(
    "name", ["model.safetensors", "ema.safetensors", "optimizer.safetensors", "autoencoder.safetensors", "text.safetensors"]
)
def test_missing_and_truncated_files_are_refused_by_name(name: str, tiny_stage: Stages, tmp_path: Path, encoders: Path) -> None:
    path = write(tmp_path / "checkpoints", tiny_stage(), encoders, 1)
    content = (path / name).read_bytes()
    (path / name).write_bytes(content[:-1])
    with pytest.raises(ParentError, match=f"{name} has {len(content) - 1} bytes, CHECKPOINT.json says {len(content)}"):
        checkpoint.read(path)
    (path / name).unlink()
    with pytest.raises(ParentError, match=f"{name} has no bytes"):
        checkpoint.read(path)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("step", -1),
        ("complete", True),
        ("steps", 9),
        ("schema", 2),
        ("surprise", 1),
        ("files", None),
        ("model", {"width": 64}),
        ("seen", [6]),
        ("seen", [9, -1]),
        ("clips_seen", 7),
    ],
)
def test_an_edited_record_is_refused(field: str, value: object, tiny_stage: Stages, tmp_path: Path, encoders: Path) -> None:
    path = write(tmp_path / "checkpoints", tiny_stage(), encoders, 1)
    record = json.loads((path / checkpoint.RECORD).read_text())
    (path / checkpoint.RECORD).write_text(json.dumps(record | {field: value}))
    with pytest.raises(ParentError):
        checkpoint.read(path)


def test_a_record_that_is_no_record_is_refused(tiny_stage: Stages, tmp_path: Path, encoders: Path) -> None:
    path = write(tmp_path / "checkpoints", tiny_stage(), encoders, 1)
    (path / "stage.yaml").write_text("steps: [")
    with pytest.raises(ParentError):
        checkpoint.read(path)
    (path / checkpoint.RECORD).write_text('{"schema": 1')
    with pytest.raises(ParentError):
        checkpoint.read(path)
    (path / checkpoint.RECORD).unlink()
    with pytest.raises(ParentError, match=r"CHECKPOINT\.json is missing"):
        checkpoint.read(path)


def test_a_broken_header_is_refused(tiny_stage: Stages, tmp_path: Path, encoders: Path) -> None:
    path = write(tmp_path / "checkpoints", tiny_stage(), encoders, 1)
    content = bytearray((path / "model.safetensors").read_bytes())
    content[0] ^= 0xFF  # the length of the header
    (path / "model.safetensors").write_bytes(content)
    with pytest.raises(ParentError, match="model"):
        checkpoint.Reader(path).part("model")


def test_names_and_shapes_must_agree() -> None:
    expected = {f"w{i:02d}": torch.zeros(2) for i in range(20)}
    checkpoint.compare(expected, dict(expected), "weights")
    with pytest.raises(ParentError, match=r"12 tensors missing \(w08, .*w17, \.\.\.\)") as missing:
        checkpoint.compare(expected, {name: expected[name] for name in list(expected)[:8]}, "weights")
    assert "w18" not in str(missing.value)  # ten names are enough
    with pytest.raises(ParentError, match=r"1 tensors unexpected \(extra\)"):
        checkpoint.compare(expected, expected | {"extra": torch.zeros(1)}, "weights")
    with pytest.raises(ParentError, match=r"w00 \(3,\) for \(2,\)"):
        checkpoint.compare(expected, expected | {"w00": torch.zeros(3)}, "weights")
    shapes: dict[str, tuple[int, ...]] = dict.fromkeys(expected, (2,))  # as `Reader.names` gives them
    checkpoint.compare(expected, shapes, "weights")
    with pytest.raises(ParentError, match=r"w01 \(2, 1\) for \(2,\)"):
        checkpoint.compare(expected, shapes | {"w01": (2, 1)}, "weights")
