"""Laws of writing checkpoints: the same bytes on every way, nothing half, no failure unsaid. Several ranks are threads of this process,
or real processes where they are killed."""

from __future__ import annotations

import errno
import json
import os
import resource
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from opensora.checkpoint import reader as checkpoint
from opensora.checkpoint import safetensors_file
from opensora.checkpoint import writer as saver
from opensora.checkpoint.reader import TENSORS, TensorShard, divide
from opensora.checkpoint.writer import PeerFailed, Saver
from opensora.config import StageConfig, write_stage
from opensora.errors import DiskFull, NotFinite, OutOfMemory, ParentError, TrainerError

Stages = Callable[..., StageConfig]
CPU = torch.device("cpu")


@pytest.fixture
def encoders(tmp_path: Path) -> Path:
    """A directory with the two files that a checkpoint copies."""
    (tmp_path / "encoders").mkdir()
    for name in ("autoencoder", "text"):
        (tmp_path / "encoders" / f"{name}.safetensors").write_bytes(name.encode())
    return tmp_path / "encoders"


def all_kinds() -> dict[str, Tensor]:
    """Every type, no rows, no dimension, one row, rows that no number of ranks divides, and a view that is not contiguous."""
    generator = torch.Generator().manual_seed(0)
    wide = torch.randn(7, 6, generator=generator)
    return {
        "wide": wide,
        "transposed": torch.randn(3, 5, generator=generator).T,
        "half": wide.half()[:, :3],
        "brain": wide.bfloat16()[1:],
        "double": wide.double(),
        "count": torch.tensor(12, dtype=torch.int64),
        "numbers": torch.arange(5),
        "bytes": torch.arange(9, dtype=torch.uint8),
        "flags": torch.tensor([True, False, True]),
        "nothing": torch.zeros(0, 4),
        "one": torch.ones(1, 2, 2),
        "scale": torch.tensor(0.5),
    }


def alike(shards: dict[str, TensorShard]) -> dict[str, dict[str, TensorShard]]:
    """The same shards in every part."""
    return {part: shards for part in TENSORS}  # noqa: C420 - as dict.fromkeys it would be RUF024


def savers(folder: Path, stage: StageConfig, ranks: int) -> list[Saver]:
    return [Saver(folder, stage, writer=rank, writers=ranks, here=tuple(range(ranks)), device=CPU) for rank in range(ranks)]


def begin(one: Saver, shards: Mapping[str, Mapping[str, TensorShard]], encoders: Path, step: int, *, world: int = 1) -> None:
    one.save(shards, encoders, step=step, world_size=world, seen=(step, 2 * step), clips="", carried=("a",), reset=("b",))


def save(folder: Path, stage: StageConfig, tensors: Mapping[str, Tensor], encoders: Path, step: int = 1, ranks: int = 1) -> Path:
    """A checkpoint of `tensors` in every part, written by so many ranks, each a thread as in a process of its own."""
    ours = savers(folder, stage, ranks)

    def work(rank: int) -> None:
        begin(ours[rank], alike(divide(tensors, rank, ranks)), encoders, step, world=ranks)
        ours[rank].wait()

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return checkpoint.directory(folder, step)


def background(stage: Stages, *, on: bool = True, **keep: int) -> StageConfig:
    return stage(checkpoint={"every_steps": 1, "keep_last": 100, "background": on} | keep)


# --- What is in the files ----------------------------------------------------------------------------------------------


def test_a_file_is_what_safetensors_reads_and_writes(tiny_stage: Stages, tmp_path: Path, encoders: Path) -> None:
    path = save(tmp_path / "checkpoints", background(tiny_stage), all_kinds(), encoders)
    found = load_file(path / "ema.safetensors")
    assert found.keys() == all_kinds().keys()
    for name, tensor in all_kinds().items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(found[name], tensor)

    alike = {name: tensor.contiguous() for name, tensor in all_kinds().items() if tensor.dtype == torch.float32}
    save_file(alike, tmp_path / "theirs.safetensors")
    ours = save(tmp_path / "alike", background(tiny_stage), alike, encoders) / "model.safetensors"
    assert ours.read_bytes() == (tmp_path / "theirs.safetensors").read_bytes()


@pytest.mark.parametrize("ranks", [1, 3])
def test_on_every_way_the_bytes_are_the_same(ranks: int, tiny_stage: Stages, tmp_path: Path, encoders: Path) -> None:
    behind = save(tmp_path / "behind", background(tiny_stage), all_kinds(), encoders, ranks=ranks)
    shuffled = dict(sorted(all_kinds().items(), reverse=True))
    again = save(tmp_path / "again", background(tiny_stage), shuffled, encoders, ranks=ranks)
    at_once = save(tmp_path / "at-once", background(tiny_stage, on=False), all_kinds(), encoders, ranks=ranks)
    files = {path.name: path.read_bytes() for path in behind.iterdir() if path.suffix == ".safetensors"}
    assert len(files) == 3 * ranks + 2
    for other in (again, at_once):
        assert {name: (other / name).read_bytes() for name in files} == files


@settings(max_examples=60, deadline=None)
@given(rows=st.integers(0, 9), writers=st.integers(1, 12))
def test_ranks_divide_rows_as_torch_does_and_each_row_is_written_once(rows: int, writers: int) -> None:
    whole = torch.arange(3.0 * rows).reshape(rows, 3)
    shards = [divide({"w": whole, "n": torch.tensor(1)}, writer, writers) for writer in range(writers)]
    assert torch.equal(torch.cat([shard["w"].tensor for shard in shards]), whole)
    assert sum("n" in shard for shard in shards) == 1
    expected = [len(chunk) for chunk in whole.chunk(writers)] if rows else []
    assert [len(shard["w"].tensor) for shard in shards] == expected + [0] * (writers - len(expected))


@pytest.mark.parametrize("ranks", [1, 2, 4, 9])
def test_any_rows_are_read_from_any_number_of_files(ranks: int, tiny_stage: Stages, tmp_path: Path, encoders: Path) -> None:
    path = save(tmp_path / "checkpoints", background(tiny_stage), all_kinds(), encoders, ranks=ranks)
    reader = checkpoint.Reader(path)
    assert (reader.record.world_size, reader.record.seen, reader.record.clips_seen) == (ranks, (1, 2), 3)
    for name, whole in all_kinds().items():
        assert reader.names("optimizer")[name] == tuple(whole.shape)
        assert torch.equal(reader.tensor("model", name), whole)
        assert reader.tensor("model", name).dtype == whole.dtype
        for rows in [slice(a, b) for a in (None, 0, 2, 6, 20) for b in (None, 0, 3, 7, 20)] if whole.dim() else []:
            assert torch.equal(reader.tensor("model", name, rows), whole[rows]), rows
    assert reader.part("ema").keys() == all_kinds().keys()


def test_what_is_written_on_another_number_of_ranks_is_the_same_state(tiny_stage: Stages, tmp_path: Path, encoders: Path) -> None:
    stage, tensors = background(tiny_stage), all_kinds()
    one = save(tmp_path / "one", stage, tensors, encoders)
    paths = [one]
    for ranks in (4, 3, 1):
        paths.append(save(tmp_path / f"from-{len(paths)}", stage, checkpoint.Reader(paths[-1]).part("model"), encoders, ranks=ranks))
    assert (paths[-1] / "model.safetensors").read_bytes() == (one / "model.safetensors").read_bytes()


# --- What is refused ----------------------------------------------------------------------------------------------------


def broken(tiny_stage: Stages, tmp_path: Path, encoders: Path, change: Callable[[Path, dict[str, int]], None]) -> Path:
    """A checkpoint of three ranks in which `change` has been at work: with the directory, and the sizes in its record."""
    path = save(tmp_path / "checkpoints", background(tiny_stage), {"w": torch.ones(6, 2)}, encoders, ranks=3)
    record = json.loads((path / checkpoint.RECORD).read_text())
    change(path, record["files"])
    record["files"] = {name: (path / name).stat().st_size for name in record["files"]}
    (path / checkpoint.RECORD).write_text(json.dumps(record))
    return path


def rewrite(path: Path, shards: Mapping[str, TensorShard]) -> None:
    path.write_bytes(safetensors_file.lay_out(shards).head + b"".join(shard.tensor.numpy().tobytes() for shard in shards.values()))


SECOND = "model-00002-of-00003.safetensors"


def test_a_file_of_another_number_of_ranks_is_refused(tiny_stage: Stages, tmp_path: Path, encoders: Path) -> None:
    def forget(path: Path, files: dict[str, int]) -> None:
        del files[SECOND]

    with pytest.raises(ParentError, match=rf"{SECOND} is missing, model-00003-of-00003.safetensors is there"):
        checkpoint.Reader(broken(tiny_stage, tmp_path / "a", encoders, forget))

    def add(path: Path, files: dict[str, int]) -> None:
        files["model.safetensors"] = 0
        (path / "model.safetensors").write_bytes(b"")

    with pytest.raises(ParentError, match=r"model-00001-of-00003\.safetensors is there beside model\.safetensors"):
        checkpoint.Reader(broken(tiny_stage, tmp_path / "b", encoders, add))


@pytest.mark.parametrize(
    ("shards", "fact"),
    [
        ({}, r"model-00003-of-00003\.safetensors: w begins at row 4, the row before it is 1"),
        ({"w": TensorShard(torch.ones(2, 2), 1, 6)}, rf"{SECOND}: w begins at row 1, the row before it is 1"),
        ({"w": TensorShard(torch.ones(2, 2), 2, 7)}, rf"{SECOND}: w is F32 \(2, 2\) of 7 rows"),
        ({"w": TensorShard(torch.ones(2, 3), 2, 6)}, rf"{SECOND}: w is F32 \(2, 3\) of 6 rows"),
        ({"w": TensorShard(torch.ones(2, 2, dtype=torch.float16), 2, 6)}, rf"{SECOND}: w is F16"),
        ({"w": TensorShard(torch.ones(2, 2))}, rf"{SECOND}: w is F32 \(2, 2\) of None rows"),
    ],
)
def test_rows_that_do_not_follow_each_other_are_refused(
    shards: dict[str, TensorShard], fact: str, tiny_stage: Stages, tmp_path: Path, encoders: Path
) -> None:
    path = broken(tiny_stage, tmp_path, encoders, lambda path, files: rewrite(path / SECOND, shards))
    reader = checkpoint.Reader(path)
    with pytest.raises(ParentError, match=fact):
        reader.names("model")
    assert torch.equal(reader.tensor("ema", "w"), torch.ones(6, 2)), "a part that is whole can be read"


def test_the_last_rows_may_not_be_missing(tiny_stage: Stages, tmp_path: Path, encoders: Path) -> None:
    last = "model-00003-of-00003.safetensors"
    path = broken(tiny_stage, tmp_path, encoders, lambda path, files: rewrite(path / last, {"w": TensorShard(torch.ones(1, 2), 4, 6)}))
    with pytest.raises(ParentError, match=rf"{last}: w ends at row 5 of 6"):
        checkpoint.Reader(path).part("model")


def test_a_tensor_that_is_whole_twice_is_refused(tiny_stage: Stages, tmp_path: Path, encoders: Path) -> None:
    def twice(path: Path, files: dict[str, int]) -> None:
        for number in (1, 2):
            rewrite(path / f"model-0000{number}-of-00003.safetensors", {"n": TensorShard(torch.ones(()))})
        rewrite(path / "model-00003-of-00003.safetensors", {})

    with pytest.raises(ParentError, match=rf"{SECOND}: n is whole in model-00001-of-00003.safetensors too"):
        checkpoint.Reader(broken(tiny_stage, tmp_path, encoders, twice)).part("model")


@pytest.mark.parametrize("header", [b'{"__metadata__":{"about":"{"}}', b'{"__metadata__":{"about":"[]"}}', b"{"])
def test_a_header_that_says_nothing_is_refused(header: bytes, tiny_stage: Stages, tmp_path: Path, encoders: Path) -> None:
    def spoil(path: Path, files: dict[str, int]) -> None:
        (path / SECOND).write_bytes(len(header).to_bytes(8, "little") + header)

    with pytest.raises(ParentError, match=SECOND):
        checkpoint.Reader(broken(tiny_stage, tmp_path, encoders, spoil)).part("model")


# --- While training goes on ----------------------------------------------------------------------------------------------


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Background writes wait for this."""
    go, write = threading.Event(), saver.write
    monkeypatch.setattr(saver, "write", lambda path, chunks: (go.wait(30), write(path, chunks)))
    return go


def test_what_changes_after_a_save_began_is_not_in_it(tiny_stage: Stages, tmp_path: Path, encoders: Path, held: threading.Event) -> None:
    (one,) = savers(tmp_path / "checkpoints", background(tiny_stage), 1)
    weights = torch.ones(4)
    shards = alike({"w": TensorShard(weights)})
    begin(one, shards, encoders, 1)
    one.ready()
    weights.fill_(2)
    assert checkpoint.latest(tmp_path / "checkpoints") is None, "still being written"
    held.set()
    begin(one, shards, encoders, 2)
    one.wait()
    steps = checkpoint.finished(tmp_path / "checkpoints")
    assert [float(checkpoint.Reader(path).part("model")["w"][0]) for path in steps] == [1, 2]


def test_the_copy_is_made_into_the_same_memory_each_time(tiny_stage: Stages, tmp_path: Path, encoders: Path) -> None:
    (one,) = savers(tmp_path / "checkpoints", background(tiny_stage), 1)
    shards = alike({"w": TensorShard(torch.ones(4))})
    one.reserve(shards)
    places = {part: image.tensors["w"].data_ptr() for part, image in one._images.items()}
    for step in (1, 2):
        begin(one, shards, encoders, step)
    assert {part: image.tensors["w"].data_ptr() for part, image in one._images.items()} == places
    begin(one, alike({"w": TensorShard(torch.ones(9))}), encoders, 3)
    one.wait()
    assert [len(checkpoint.Reader(path).part("ema")["w"]) for path in checkpoint.finished(tmp_path / "checkpoints")] == [4, 4, 9]


def test_without_room_for_a_copy_the_way_out_is_named(tiny_stage: Stages, tmp_path: Path, encoders: Path) -> None:
    (one,) = savers(tmp_path / "checkpoints", background(tiny_stage), 1)
    huge = torch.zeros(1).expand(1 << 46)  # takes no memory by itself
    with pytest.raises(OutOfMemory, match=r"copy of model \(281474976710\d{3} bytes\); checkpoint.background false needs no copy"):
        begin(one, alike({"w": TensorShard(huge)}), encoders, 1)


@pytest.mark.parametrize("on", [True, False])
@pytest.mark.parametrize(("value", "dtype"), [(torch.nan, torch.float32), (torch.inf, torch.bfloat16), (-torch.inf, torch.float16)])
def test_weights_that_are_not_finite_are_never_published(
    on: bool, value: float, dtype: torch.dtype, tiny_stage: Stages, tmp_path: Path, encoders: Path
) -> None:
    (one,) = savers(tmp_path / "checkpoints", background(tiny_stage, on=on, keep_last=1), 1)
    sound = {"n": TensorShard(torch.arange(3)), "none": TensorShard(torch.ones(0, 2)), "w": TensorShard(torch.ones(3, dtype=dtype))}
    odd = sound | {"w": TensorShard(torch.tensor([1, value, 2], dtype=dtype))}
    begin(one, {"model": sound, "ema": odd, "optimizer": odd}, encoders, 1)  # only of weights it is a failure
    one.wait()
    with pytest.raises(NotFinite, match=r"step 2: weight w is not finite; nothing was saved"):
        begin(one, alike(odd), encoders, 2)
        one.wait()
    one.check()  # once
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000001"]


@pytest.mark.parametrize("call", ["check", "wait", "save"])
def test_a_failure_in_the_background_is_raised_by_whatever_is_called_next(
    call: str, tiny_stage: Stages, tmp_path: Path, encoders: Path
) -> None:
    (one,) = savers(tmp_path / "checkpoints", background(tiny_stage), 1)
    shards = alike({"w": TensorShard(torch.ones(3))})
    begin(one, shards, tmp_path / "no-encoders", 1)
    assert one._thread is not None
    one._thread.join()
    with pytest.raises(FileNotFoundError, match="no-encoders"):
        begin(one, shards, encoders, 2) if call == "save" else getattr(one, call)()
    begin(one, shards, encoders, 3)
    one.wait()
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000003"]


# --- Several ranks of a node ----------------------------------------------------------------------------------------------


def outcomes(ours: list[Saver], parts: list[dict[str, dict[str, TensorShard]]], encoders: Path, step: int) -> list[Exception | None]:
    """How a save of step `step` ended on each rank."""
    found: list[Exception | None] = [None] * len(ours)

    def work(rank: int) -> None:
        try:
            begin(ours[rank], parts[rank], encoders, step, world=len(ours))
            ours[rank].wait()
        except (TrainerError, PeerFailed, OSError) as error:
            found[rank] = error

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(len(ours))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive(), "a rank waits for one that has failed"
    return found


@pytest.mark.parametrize("on", [True, False])
@pytest.mark.parametrize("failing", [0, 1, 2])
def test_where_one_rank_fails_nothing_is_published_and_the_others_say_so(
    failing: int, on: bool, tiny_stage: Stages, tmp_path: Path, encoders: Path
) -> None:
    folder = tmp_path / "checkpoints"
    ours = savers(folder, background(tiny_stage, on=on, keep_last=1), 3)
    sound = [alike(divide({"w": torch.ones(6, 2)}, rank, 3)) for rank in range(3)]
    assert outcomes(ours, sound, encoders, 1) == [None, None, None]
    odd = [dict(parts) for parts in sound]
    odd[failing]["model"] = {"w": TensorShard(torch.full((2, 2), torch.nan), 2 * failing, 6)}
    ends = outcomes(ours, odd, encoders, 2)
    assert [type(end) for end in ends] == [NotFinite if rank == failing else PeerFailed for rank in range(3)]
    assert checkpoint.finished(folder) == [checkpoint.directory(folder, 1)]
    assert checkpoint.Reader(checkpoint.directory(folder, 1)).record.step == 1
    assert [path.name for path in folder.glob(".step-*/*")] == [], "not even in parts"


def test_a_full_disk_under_one_rank_leaves_the_earlier_checkpoints(tiny_stage: Stages, tmp_path: Path, encoders: Path) -> None:
    folder = tmp_path / "checkpoints"
    ours = savers(folder, background(tiny_stage, keep_last=1), 2)
    assert outcomes(ours, [alike(divide({"w": torch.ones(2)}, rank, 2)) for rank in range(2)], encoders, 1) == [None, None]
    large = [alike({name: TensorShard(torch.ones(size))}) for name, size in (("small", 4), ("large", 10_000))]
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))  # as a full disk: a file can grow no further
    try:
        first, second = outcomes(ours, large, encoders, 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert isinstance(first, PeerFailed)
    assert isinstance(second, DiskFull) and "step-00000002" in str(second) and "earlier checkpoints are intact" in str(second)
    assert isinstance(second.__cause__, OSError) and second.__cause__.errno == errno.EFBIG
    assert checkpoint.finished(folder) == [checkpoint.directory(folder, 1)]


def test_what_a_failed_run_left_is_gone_when_the_next_begins(tiny_stage: Stages, tmp_path: Path, encoders: Path) -> None:
    folder = tmp_path / "checkpoints"
    for name in (".step-00000001.partial", ".step-00000002.failed", ".step-00000003.removed"):
        (folder / name).mkdir(parents=True)
        (folder / name / "model-00002-of-00002.safetensors").write_bytes(b"of another life")
    ours = savers(folder, background(tiny_stage), 2)
    assert list(folder.glob(".step-*")) == []
    parts = [alike(divide({"w": torch.ones(2)}, rank, 2)) for rank in range(2)]
    assert outcomes(ours, parts, encoders, 1) == [None, None]
    assert torch.equal(checkpoint.Reader(checkpoint.directory(folder, 1)).part("model")["w"], torch.ones(2))


def killed(tmp_path: Path, stage: StageConfig, *how: int) -> dict[str, Any]:
    """What tests/killed_savers.py saw."""
    write_stage(stage, tmp_path / "stage.yaml")
    command = [str(Path(__file__).parents[2] / "killed_savers.py"), str(tmp_path / "stage.yaml"), str(tmp_path / "checkpoints")]
    variables = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *command, *map(str, how)], capture_output=True, text=True, env=variables, timeout=200)
    assert done.returncode == 0, done.stderr
    seen: dict[str, Any] = json.loads(done.stdout)
    return seen


@pytest.mark.long
@pytest.mark.parametrize("who", [(), (0,), (2,)])
def test_a_kill_at_a_random_moment_leaves_whole_checkpoints_and_no_rank_that_waits(
    who: tuple[int, ...], tiny_stage: Stages, tmp_path: Path, encoders: Path
) -> None:
    seen = killed(tmp_path, tiny_stage(steps=100_000, checkpoint={"every_steps": 1, "keep_last": 2}), 8, 3, *who)
    assert seen["halves"] > 0, "some were killed in the middle of a save"
    assert seen["steps"][-1] > 0 and seen["steps"] == sorted(seen["steps"])


@pytest.mark.long
def test_a_kill_before_any_call_leaves_the_old_checkpoint_or_the_new_one(tiny_stage: Stages, tmp_path: Path, encoders: Path) -> None:
    seen = killed(tmp_path, tiny_stage(steps=100_000, checkpoint={"every_steps": 1, "keep_last": 1}))
    assert len(seen["steps"]) > 20, "calls"
    assert len(set(seen["steps"])) == len(seen["steps"])


# --- What is kept ----------------------------------------------------------------------------------------------------------


def test_the_last_and_every_nth_are_kept(tiny_stage: Stages, tmp_path: Path, encoders: Path) -> None:
    folder = tmp_path / "checkpoints"
    stage = background(tiny_stage, keep_last=2, keep_every=4)
    (one,) = savers(folder, stage, 1)
    kept = []
    for step in range(1, 12):
        begin(one, alike({"w": TensorShard(torch.ones(1))}), encoders, step)
        one.wait()
        kept.append([checkpoint.step_of(path) for path in checkpoint.finished(folder)])
    assert kept == [[1], [1, 2], [2, 3], [3, 4], [4, 5], [4, 5, 6], [4, 6, 7], [4, 7, 8], [4, 8, 9], [4, 8, 9, 10], [4, 8, 10, 11]]
    assert list(folder.glob(".*")) == []


def test_a_node_keeps_those_before_until_all_nodes_have_the_last(tiny_stage: Stages, tmp_path: Path, encoders: Path) -> None:
    """The other node may still be writing step 3 while this one has step 4, and fail; then step 2 is the last that is whole."""
    folder = tmp_path / "checkpoints"
    one = Saver(folder, background(tiny_stage, keep_last=1), writer=0, writers=2, here=(0,), device=CPU)
    for step in range(1, 5):
        begin(one, alike({"w": TensorShard(torch.ones(1), 0, 2)}), encoders, step, world=2)
        one.wait()
    assert [checkpoint.step_of(path) for path in checkpoint.finished(folder)] == [2, 3, 4]


def test_the_only_good_one_stays_until_the_next_is_whole(tiny_stage: Stages, tmp_path: Path, encoders: Path, held: threading.Event) -> None:
    folder = tmp_path / "checkpoints"
    (one,) = savers(folder, background(tiny_stage, keep_last=1), 1)
    shards = alike({"w": TensorShard(torch.ones(1))})
    held.set()
    begin(one, shards, encoders, 1)
    one.wait()
    held.clear()
    begin(one, shards, encoders, 2)
    assert checkpoint.latest(folder) == checkpoint.directory(folder, 1)
    held.set()
    one.wait()
    assert checkpoint.finished(folder) == [checkpoint.directory(folder, 2)]
