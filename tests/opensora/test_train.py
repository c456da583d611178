from __future__ import annotations

import itertools
import json
import math
import os
import pickle
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gang
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from opensora import checkpoint, train
from opensora.config import StageConfig
from opensora.errors import DataError, NotFinite, ParentError, WeightsRefused
from opensora.model import STDiT
from opensora.objective import Network, Objective
from opensora.ranks import PeerLost, Ranks
from opensora.run_directory import RunDirectory

Stages = Callable[..., StageConfig]
Runs = Callable[..., RunDirectory]
Trainers = Callable[..., train.Trainer]
Complete = Callable[..., Path]

VIDEO = {"frames": 4}


def in_process(run: RunDirectory, notice: train.Notice | None = None) -> dict[str, Any]:
    """Run the stage as one rank in this process; its result."""
    train.run_reported(run, notice or train.Notice())
    return result(run)


def result(run: RunDirectory) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((run.path / "result.json").read_text())
    return content


def metrics(run: RunDirectory) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]


def assert_same_state(one: Path, other: Path) -> None:
    names = sorted(path.name for path in one.glob("*.safetensors"))
    assert len(names) >= 5 and names == sorted(path.name for path in other.glob("*.safetensors"))
    for name in names:
        assert (one / name).read_bytes() == (other / name).read_bytes(), name


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """No file of this process may grow beyond so many bytes: what a full disk looks like to whoever writes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


# ------------------------------------------------------------------------------------------------------------------
# A step
# ------------------------------------------------------------------------------------------------------------------


def one_step(trainer: train.Trainer) -> dict[str, float]:
    """One step of a trainer, and its line of metrics."""
    trainer.launch()
    ((line,), _) = trainer.settle(0)
    return line


def test_one_batch_is_learned(tiny_stage: Stages, make_run: Runs, make_trainer: Trainers) -> None:
    stage = tiny_stage(
        data={"source": {"kind": "digits", "clips": 4}}, model={"caption_dropout": 0.0}, optimizer={"decay": "constant"}, steps=150
    )
    trainer = make_trainer(make_run(stage))
    losses = [one_step(trainer)["loss"] for _ in range(stage.steps)]
    assert sum(losses[-20:]) < 0.5 * sum(losses[:20])


@pytest.mark.parametrize("objective", ["flow", "iddpm"])
def test_every_trained_weight_moves_but_the_frozen_ones(objective: str, tiny_stage: Stages, make_run: Runs, make_trainer: Trainers) -> None:
    method = "euler" if objective == "flow" else "ancestral"
    stage = tiny_stage(objective={"kind": objective}, sampling={"method": method}, freeze="temporal", optimizer={"warmup_steps": 0})
    trainer = make_trainer(make_run(stage))
    before = {name: weight.detach().clone() for name, weight in trainer.model.named_parameters()}
    for _ in range(4):  # zero-initialised layers hide what lies behind them for the first steps
        one_step(trainer)
    stayed = {name for name, weight in trainer.model.named_parameters() if torch.equal(before[name], weight)}
    assert stayed == {name for name in before if "temporal_attention" in name}
    assert not any("temporal_attention" in key for key in trainer.strategy.optimizer.state())


class Waits(TorchDispatchMode):
    """Notices operations for which a host would have to wait for its GPU."""

    NAMES = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "item", "unique")

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        if any(name in str(func) for name in self.NAMES):
            self.found.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("objective", ["flow", "iddpm"])
def test_nothing_in_a_step_waits_for_the_device(objective: str, tiny_stage: Stages, make_run: Runs, make_trainer: Trainers) -> None:
    stage = tiny_stage(data=VIDEO, objective={"kind": objective}, sampling={"method": "euler" if objective == "flow" else "ancestral"})
    trainer = make_trainer(make_run(stage))
    trainer.loader.batch(trainer.seen)  # clips come from the CPU
    with Waits() as waits:
        trainer.launch()
        trainer.launch()
    assert waits.found == []
    with waits:
        bool(trainer.strategy.norm() > 0)
    assert waits.found  # it would have noticed
    assert [line["step"] for line in trainer.settle(0)[0]] == [1, 2]


class Recorder:
    """An objective that remembers the noise and times it was given."""

    def __init__(self, real: Objective) -> None:
        self.real = real
        self.drawn: list[tuple[Tensor, Tensor]] = []

    def draw_time(self, clips: int, generator: torch.Generator) -> Tensor:
        return self.real.draw_time(clips, generator)

    def loss(self, network: Network, clean: Tensor, time: Tensor, noise: Tensor) -> Tensor:
        self.drawn.append((time, noise))
        return self.real.loss(network, clean, time, noise)


def test_ranks_and_steps_draw_their_own_noise_and_times(tiny_stage: Stages, make_run: Runs, make_trainer: Trainers) -> None:
    """Upstream gave every rank the same (open-sora 1.0: one seed, 1024, for all)."""
    drawn: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
    run = make_run(tiny_stage(steps=3))
    for rank in (0, 1, 0):
        trainer = make_trainer(run, rank, world=2)
        recorder = trainer.objective = Recorder(trainer.objective)  # type: ignore[assignment]
        for step in range(3):
            one_step(trainer)
            again = drawn.setdefault((rank, step), recorder.drawn[-1])
            assert all(torch.equal(old, new) for old, new in zip(again, recorder.drawn[-1], strict=True))
    for part in range(2):
        values = [drawn[key][part] for key in sorted(drawn)]
        assert len({tuple(value.flatten().tolist()) for value in values}) == 6


def test_gradients_are_clipped_together(tiny_stage: Stages, make_run: Runs, make_trainer: Trainers) -> None:
    trainer = make_trainer(make_run(tiny_stage(optimizer={"grad_clip": 1e-3})))
    line = one_step(trainer)
    assert line["grad_norm"] > 1e-2
    assert torch.cat([weight.grad.flatten() for weight in trainer.model.parameters() if weight.grad is not None]).norm() == pytest.approx(
        1e-3, rel=1e-2
    )


# ------------------------------------------------------------------------------------------------------------------
# Stopping and going on
# ------------------------------------------------------------------------------------------------------------------


def test_resume_continues_bitwise(tiny_stage: Stages, make_run: Runs) -> None:
    stage = tiny_stage(data=VIDEO, steps=5)
    unbroken = make_run(stage)
    assert in_process(unbroken)["status"] == "completed"
    for step in (1, 3):
        resumed = make_run(stage, resume=checkpoint.directory(unbroken.checkpoints, step))
        assert in_process(resumed)["status"] == "completed"
        assert [line["step"] for line in metrics(resumed) if "step" in line] == list(range(step + 1, 6))
        assert_same_state(checkpoint.directory(unbroken.checkpoints, 5), checkpoint.directory(resumed.checkpoints, 5))


def test_drain_saves_at_the_step_boundary_and_leaves(tiny_stage: Stages, make_run: Runs) -> None:
    stage = tiny_stage(steps=5, checkpoint={"every_steps": 100})
    by_file, by_signal = make_run(stage), make_run(stage)
    (by_file.path / "drain").touch()
    for run, notice in ((by_file, train.Notice()), (by_signal, train.Notice(given=True))):
        assert in_process(run, notice) == {
            "schema": 1,
            "status": "drained",
            "step": 1,
            "reason": "",
            "class": None,
            "rank": None,
            "evaluation": {},
        }
        record, _ = checkpoint.read(checkpoint.directory(run.checkpoints, 1))
        assert (record.step, record.complete, record.clips_seen) == (1, False, stage.batch_size)


def test_a_finished_stage_that_is_resumed_takes_no_step(tiny_stage: Stages, make_run: Runs, complete: Complete) -> None:
    """Killed between its last checkpoint and its result: only the evaluation is done again."""
    stage = tiny_stage()
    run = make_run(stage, resume=complete(stage))
    assert in_process(run)["status"] == "completed"
    assert all("phase" in line for line in metrics(run))


def test_another_stage_is_not_resumed(tiny_stage: Stages, make_run: Runs, complete: Complete) -> None:
    run = make_run(tiny_stage(optimizer={"lr": 0.5}), resume=complete(tiny_stage()))
    failed = in_process(run)
    assert (failed["status"], failed["class"]) == ("failed", "parent")
    assert "step 4 is of another stage (optimizer.lr was 0.01, is 0.5)" in failed["reason"]


def test_intervals_of_metrics_tile_the_run(tiny_stage: Stages, make_run: Runs) -> None:
    run = make_run(tiny_stage(prompts=["a digit 3"]))
    began = time.time()
    in_process(run)
    lines, ended = metrics(run), time.time()
    spans = [
        (line["start"], line["end"])
        if "phase" in line
        else (line["time"] - line["data_wait_s"] - line["step_s"] - line["checkpoint_s"], line["time"])
        for line in lines
    ]
    assert [line.get("phase", line.get("step")) for line in lines] == ["init", 1, 2, 3, 4, "checkpoint", "evaluate"]
    assert spans[0][0] < began  # the interpreter's start and the imports are init
    assert all(before[1] == pytest.approx(after[0], abs=1e-5) for before, after in itertools.pairwise(spans))
    assert spans[-1][1] == pytest.approx(ended, abs=0.5)


def test_a_clip_is_lost_to_nobody_when_the_number_of_ranks_changes(tiny_stage: Stages, make_run: Runs, make_trainer: Trainers) -> None:
    run = make_run(tiny_stage(steps=2))
    in_process(run)
    trainer = make_trainer(run)
    assert trainer.seen == (8,)
    assert trainer.loader.clips(trainer.seen) == 4


def test_why_blocks_are_not_compiled_is_said(tiny_stage: Stages, monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[str] = ["gcc"]
    monkeypatch.setattr(train.shutil, "which", lambda name: name if name in found else None)
    assert train._not_compiled(tiny_stage()) is None
    reasons = [
        train._not_compiled(tiny_stage(parallel={"sequence": 2})),
        train._not_compiled(tiny_stage(activations={"recompute": "selective"})),
    ]
    found.clear()
    reasons.append(train._not_compiled(tiny_stage()))
    assert [reason is not None and word in reason for reason, word in zip(reasons, ("graph", "selective", "compiler"), strict=True)] == [
        True
    ] * 3


def test_nodes_that_could_read_other_clips_do_not_train_together(tiny_stage: Stages, make_run: Runs, make_trainer: Trainers) -> None:
    class Second(Ranks):
        first = b""

        def hand_out(self, data: bytes) -> bytes:
            return type(self).first or data

    trainer = make_trainer(make_run(tiny_stage()))
    train._same_clips(trainer.prepared, Second(1, 2, torch.device("cpu"), node=1, nodes=2), train.Start())
    Second.first = b"other clips"
    with pytest.raises(DataError, match=r"node 1 could read 16 clips and left out 0"):
        train._same_clips(trainer.prepared, Second(1, 2, torch.device("cpu"), node=1, nodes=2), train.Start())


def test_a_resume_among_other_clips_is_refused_until_they_are_back(tiny_stage: Stages, make_run: Runs, tmp_path: Path) -> None:
    """The position in the stream would mean other clips. A cache is made again where a folder has changed; nothing else would tell."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(4):
        Image.new("RGB", (16, 16), (60 * number, 0, 0)).save(folder / f"{number}.png")
    (folder / "captions.csv").write_text("path,text\n" + "".join(f"{number}.png,a red square\n" for number in range(4)))
    stage = tiny_stage(data={"source": {"kind": "folder", "path": str(folder)}}, batch_size=2)
    run = make_run(stage)
    assert in_process(run)["status"] == "completed"
    step_2, away = checkpoint.directory(run.checkpoints, 2), tmp_path / "3.png"
    (folder / "3.png").rename(away)

    refused = in_process(make_run(stage, resume=step_2))
    assert (refused["class"], refused["step"]) == ("parent", 2)
    assert "step 2 was trained on other clips than the 3 that can be used now (1 are left out)" in refused["reason"]
    away.rename(folder / "3.png")
    resumed = make_run(stage, resume=step_2)
    assert in_process(resumed)["status"] == "completed"
    assert_same_state(checkpoint.directory(run.checkpoints, 4), checkpoint.directory(resumed.checkpoints, 4))


def test_where_gradients_hide_who_spoilt_them_the_first_rank_says_so(tiny_stage: Stages, make_run: Runs, make_trainer: Trainers) -> None:
    run = make_run(tiny_stage())
    told, other = (make_trainer(run, rank, world=2)._not_finite(3, None, 1.0, math.inf) for rank in (0, 1))
    assert isinstance(told, NotFinite) and "step 3: loss 1.0 and gradient norm inf are not both finite on some rank" in str(told)
    assert isinstance(other, PeerLost)


# ------------------------------------------------------------------------------------------------------------------
# Failures
# ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("lr", "culprit", "saved"), [(1e18, "loss", ["step-00000001"]), (1e38, "weight", [])])
def test_numbers_that_are_not_finite_are_never_saved(lr: float, culprit: str, saved: list[str], tiny_stage: Stages, make_run: Runs) -> None:
    """A step too long overflows the loss of the next step (1e18) or the weights themselves (1e38)."""
    stage = tiny_stage(optimizer={"lr": lr, "grad_clip": None, "warmup_steps": 0})
    run = make_run(stage)
    failed = in_process(run)
    assert (failed["status"], failed["class"], failed["rank"]) == ("failed", "nan", 0)
    assert culprit in failed["reason"]
    assert [path.name for path in checkpoint.finished(run.checkpoints)] == saved
    for path in checkpoint.finished(run.checkpoints):
        assert all(value.isfinite().all() for value in checkpoint.Reader(path).part("model").values())


def test_a_full_disk_is_reported_and_earlier_checkpoints_stay(tiny_stage: Stages, make_run: Runs) -> None:
    stage = tiny_stage(steps=3)
    first = make_run(stage)
    in_process(first)
    run = make_run(stage, resume=checkpoint.directory(first.checkpoints, 1))
    with largest_file(64_000):
        failed = in_process(run)
    assert (failed["status"], failed["class"]) == ("failed", "disk")
    assert "step-00000002" in failed["reason"]
    assert [path.name for path in run.checkpoints.iterdir()] == ["step-00000001"]
    checkpoint.read(checkpoint.directory(run.checkpoints, 1))


def test_the_first_rank_to_report_is_believed(tiny_stage: Stages, make_run: Runs) -> None:
    run = make_run(tiny_stage())
    run.reserve_result()
    size = (run.path / "result.json").stat().st_size
    assert (run.path / "result.json").read_text().isspace()
    assert RunDirectory(run.path, rank=3).finish("failed", reason="x" * 100_000, kind="oom")
    assert not run.finish("failed", reason="the ranks after it", kind="code")
    assert (result(run)["class"], result(run)["rank"]) == ("oom", 3)
    assert (run.path / "result.json").stat().st_size == size


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (MemoryError(), "oom"),
        (torch.OutOfMemoryError("CUDA out of memory"), "oom"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), "oom"),
        (OSError(28, "No space left on device"), "disk"),
        (ParentError("x"), "parent"),
        (RuntimeError("shape"), "code"),
    ],
)
def test_each_end_has_its_class(error: Exception, kind: str) -> None:
    assert train._classify(error) == kind


def test_a_broken_stage_file_is_a_config_error(tiny_stage: Stages, make_run: Runs) -> None:
    run = make_run(tiny_stage())
    (run.path / "stage.yaml").write_text((run.path / "stage.yaml").read_text().replace("batch_size: 4", "batch_size: -4"))
    failed = in_process(run)
    assert failed["class"] == "config"
    assert "batch_size" in failed["reason"] and "-4" in failed["reason"]


def test_a_pickle_is_never_loaded(tiny_stage: Stages, make_run: Runs, complete: Complete, tmp_path: Path) -> None:
    class Payload:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (tmp_path / "executed",)

    parent = complete(tiny_stage())
    (parent / "ema.safetensors").write_bytes(pickle.dumps(Payload()))
    record = json.loads((parent / checkpoint.RECORD).read_text())
    record["files"]["ema.safetensors"] = (parent / "ema.safetensors").stat().st_size
    (parent / checkpoint.RECORD).write_text(json.dumps(record))
    pickle.loads((parent / "ema.safetensors").read_bytes())  # noqa: S301 - it would have done something
    (tmp_path / "executed").unlink()

    assert in_process(make_run(tiny_stage(), parent=parent))["class"] == "parent"
    named = in_process(make_run(tiny_stage(weights=str(parent / "ema.safetensors"))))
    assert named["class"] == "parent"
    assert not (tmp_path / "executed").exists()


# ------------------------------------------------------------------------------------------------------------------
# From stage to stage
# ------------------------------------------------------------------------------------------------------------------


def test_three_stages_chain_with_new_position_tables(tiny_stage: Stages, complete: Complete) -> None:
    one = complete(tiny_stage(freeze="temporal"))
    two = complete(tiny_stage(data=VIDEO), parent=one)
    three = complete(
        tiny_stage(data={"frames": 6, "height": 24, "width": 24}, parent={"weights": "model", "optimizer": "carry"}), parent=two
    )

    assert checkpoint.read(one)[0].carried == ()
    second, third = checkpoint.read(two)[0], checkpoint.read(three)[0]
    assert second.carried == ("weights (ema)", "autoencoder", "text encoder")
    assert set(second.reset) >= {"optimizer", "position tables (1x4x4 -> 4x4x4)"}
    assert third.carried == ("weights (model)", "autoencoder", "text encoder", "optimizer")
    assert "position tables (4x4x4 -> 6x6x6)" in third.reset
    assert (third.step, third.clips_seen) == (4, 16)
    assert not any("position" in name for name in checkpoint.Reader(three).part("model"))
    assert (one / "autoencoder.safetensors").read_bytes() == (three / "autoencoder.safetensors").read_bytes()
    assert checkpoint.Reader(three).part("optimizer")["step/final_layer.linear.bias"] == 8  # Adam's own count: its moments are 8 steps old


def test_a_stage_starts_from_the_parents_average_and_a_fresh_optimizer(
    tiny_stage: Stages, make_run: Runs, make_trainer: Trainers, complete: Complete
) -> None:
    parent = complete(tiny_stage())
    trainer = make_trainer(make_run(tiny_stage(data=VIDEO), parent=parent))
    average = checkpoint.Reader(parent).part("ema")
    assert all(torch.equal(value, average[name]) for name, value in trainer.model.state_dict().items())
    assert all(torch.equal(value, average[name]) for name, value in trainer.strategy.ema.shadow.items())
    assert any(not torch.equal(value, average[name]) for name, value in checkpoint.Reader(parent).part("model").items())
    assert not any(value.any() for value in trainer.strategy.optimizer.state().values())
    assert (trainer.step, trainer.seen) == (0, (0,))


def test_the_video_model_starts_as_the_image_model_on_each_frame(
    tiny_stage: Stages, make_run: Runs, make_trainer: Trainers, complete: Complete
) -> None:
    """The law of zero effect: stage 1 leaves the temporal attention frozen at zero (default temporal_position)."""
    image_stage = tiny_stage(freeze="temporal")
    parent = complete(image_stage)
    assert not any(value.any() for name, value in checkpoint.Reader(parent).part("model").items() if "temporal_attention.proj" in name)
    video = make_trainer(make_run(tiny_stage(data=VIDEO), parent=parent)).model
    image = STDiT(image_stage.model, image_stage.latent_shape[1:], image_stage.out_channels)
    image.load_state_dict(checkpoint.Reader(parent).part("ema"))

    generator = torch.Generator().manual_seed(0)
    x, captions = torch.randn(2, 4, 4, 4, 4, generator=generator), torch.randn(2, 5, 16, generator=generator)
    moment = torch.tensor([100.0, 900.0])
    with torch.no_grad():
        whole = video(x, moment, captions)
        frames = torch.cat([image(x[:, :, frame : frame + 1], moment, captions) for frame in range(4)], dim=2)
    assert whole.abs().max() > 0.1
    torch.testing.assert_close(whole, frames, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "fact"),
    [
        ({"objective": {"kind": "iddpm"}, "sampling": {"method": "ancestral"}}, "objective.kind is flow, this stage's is iddpm"),
        ({"model": {"width": 48}}, "model.width is 32, this stage's is 48"),
        ({"model": {"depth": 3}}, "model.depth is 2, this stage's is 3"),
        ({"model": {"temporal_position": "residual"}}, "model.temporal_position is attention, this stage's is residual"),
        ({"autoencoder": {"factor": 2}}, "autoencoder.factor is 4, this stage's is 2"),
    ],
)
def test_a_parent_that_does_not_fit_is_refused(
    changes: dict[str, Any], fact: str, tiny_stage: Stages, make_run: Runs, complete: Complete
) -> None:
    failed = in_process(make_run(tiny_stage(**changes), parent=complete(tiny_stage(steps=1))))
    assert (failed["status"], failed["class"]) == ("failed", "parent")
    assert fact in failed["reason"]


def test_an_unfinished_parent_is_refused(tiny_stage: Stages, make_run: Runs) -> None:
    parent = make_run(tiny_stage())
    in_process(parent)
    failed = in_process(make_run(tiny_stage(), parent=checkpoint.directory(parent.checkpoints, 2)))
    assert failed["class"] == "parent"
    assert "step 2 of 4" in failed["reason"]


def test_an_import_takes_no_step(tiny_stage: Stages, make_run: Runs, complete: Complete) -> None:
    source = complete(tiny_stage())
    run = make_run(tiny_stage(steps=0, weights=str(source / "ema.safetensors")))
    assert in_process(run)["status"] == "completed"
    imported = checkpoint.directory(run.checkpoints, 0)
    assert checkpoint.read(imported)[0].complete
    assert (imported / "model.safetensors").read_bytes() == (source / "ema.safetensors").read_bytes()
    assert not any(value.any() for value in checkpoint.Reader(imported).part("optimizer").values())


def test_weights_of_another_model_are_not_imported(tiny_stage: Stages, make_run: Runs, make_trainer: Trainers, complete: Complete) -> None:
    source = complete(tiny_stage(model={"depth": 1}))
    with pytest.raises(WeightsRefused):
        make_trainer(make_run(tiny_stage(weights=str(source / "ema.safetensors"))))


def test_a_stage_leaves_clips_a_sheet_and_what_was_asked(tiny_stage: Stages, make_run: Runs) -> None:
    run = make_run(tiny_stage(data=VIDEO, steps=1, prompts=["a digit 3 moving left", "a digit 7 moving up"]))
    in_process(run)
    listing = json.loads((run.samples / "samples.json").read_text())
    assert [clip["prompt"] for clip in listing["clips"]] == ["a digit 3 moving left", "a digit 7 moving up"]
    assert len({clip["seed"] for clip in listing["clips"]}) == 2
    assert all((run.samples / clip["file"]).stat().st_size > 0 for clip in listing["clips"])
    assert (run.samples / "sheet.png").read_bytes().startswith(b"\x89PNG")


def test_an_image_stage_is_judged_on_images_and_on_video(tiny_stage: Stages, make_run: Runs) -> None:
    run = make_run(tiny_stage(steps=1, evaluate={"kind": "digits", "clips": 40, "frames": 4}))
    readings = in_process(run)["evaluation"]
    assert readings["clips"] == readings["image_clips"] == 40
    assert {"digit_accuracy", "direction_accuracy", "image_digit_accuracy", "digit_ceiling"} <= readings.keys()


# ------------------------------------------------------------------------------------------------------------------
# Real processes
# ------------------------------------------------------------------------------------------------------------------


def torchrun(run: RunDirectory, ranks: int) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), "--max-restarts", "0"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*command, "-m", "opensora.train", str(run.path)], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )


def wait_until(condition: Callable[[], bool], seconds: float = 240) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.02)


def heartbeat(run: RunDirectory, rank: int) -> dict[str, Any]:
    path = run.path / f"heartbeat-{rank}.json"
    return json.loads(path.read_text()) if path.exists() else {"phase": None, "step": 0}


@pytest.mark.long
@pytest.mark.parametrize("parallel", [{}, {"strategy": "fsdp"}, {"sequence": 2}], ids=["ddp", "fsdp", "sequence"])
def test_two_ranks_drain_and_resume_bitwise(parallel: dict[str, Any], tiny_stage: Stages, make_run: Runs) -> None:
    stage = tiny_stage(data=VIDEO, steps=4, evaluate={"kind": "digits", "clips": 10, "frames": 4}, parallel=parallel)
    unbroken = make_run(stage)
    with torchrun(unbroken, 2) as process:
        assert process.wait(240) == 0
    assert result(unbroken)["evaluation"]["clips"] == 10
    record = checkpoint.read(checkpoint.directory(unbroken.checkpoints, 4))[0]
    assert (record.world_size, record.seen) == (2, (4 * 4 * (1 if "sequence" in parallel else 2),))

    drained = make_run(stage, resume=checkpoint.directory(unbroken.checkpoints, 2))
    (drained.path / "drain").touch()
    with torchrun(drained, 2) as process:
        assert process.wait(240) == 0
    assert (result(drained)["status"], result(drained)["step"]) == ("drained", 3)
    assert_same_state(checkpoint.directory(unbroken.checkpoints, 3), checkpoint.directory(drained.checkpoints, 3))

    alone = make_run(tiny_stage(data=VIDEO, steps=4))
    in_process(alone)
    losses = [[line["loss"] for line in metrics(run) if "step" in line] for run in (unbroken, alone)]
    together = losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert together == ("sequence" in parallel)  # ranks that share clips are one; other ranks have clips and noise of their own


@pytest.mark.long
def test_a_stage_goes_on_under_another_strategy(tiny_stage: Stages, make_run: Runs) -> None:
    unbroken = make_run(tiny_stage(data=VIDEO, parallel={"strategy": "fsdp"}))
    gang.run(2, "-m", "opensora.train", str(unbroken.path))
    other = make_run(tiny_stage(data=VIDEO), resume=checkpoint.directory(unbroken.checkpoints, 2))
    gang.run(2, "-m", "opensora.train", str(other.path))
    ours, theirs = ({line["step"]: line["loss"] for line in metrics(run) if "step" in line} for run in (other, unbroken))
    assert list(ours) == [3, 4]
    assert [ours[3], ours[4]] == pytest.approx([theirs[3], theirs[4]], rel=1e-4)


def test_a_signal_drains(tiny_stage: Stages, make_run: Runs) -> None:
    run = make_run(tiny_stage(steps=1_000_000, checkpoint={"every_steps": 1_000_000}))
    with subprocess.Popen([sys.executable, "-m", "opensora.train", str(run.path)], stdout=subprocess.DEVNULL) as process:
        wait_until(lambda: heartbeat(run, 0)["phase"] == "train")
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    assert result(run)["status"] == "drained"
    step = result(run)["step"]
    assert checkpoint.read(checkpoint.directory(run.checkpoints, step))[0].step == step
