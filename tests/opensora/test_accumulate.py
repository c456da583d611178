"""A step in parts, one after the other: the same step as on as many times the ranks, and a stage goes on from one to the other."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gang
import pytest
import torch
from torch import Tensor

from opensora import train
from opensora.checkpoint import reader as checkpoint
from opensora.config import StageConfig
from opensora.diffusion.objective import Network, Objective
from opensora.errors import NotFinite
from opensora.latents.loader import Batch
from opensora.training.run_directory import RunDirectory
from opensora.training.trainer import DrainRequest, Trainer

Stages = Callable[..., StageConfig]
Runs = Callable[..., RunDirectory]
Trainers = Callable[..., Trainer]

CLIPS = {"source": {"kind": "digits", "clips": 64}}


def in_process(run: RunDirectory) -> dict[str, Any]:
    train.run_reported(run, DrainRequest())
    return result(run)


def result(run: RunDirectory) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((run.path / "result.json").read_text())
    return content


def steps(run: RunDirectory) -> list[dict[str, Any]]:
    return [line for line in map(json.loads, (run.path / "metrics.jsonl").read_text().splitlines()) if "step" in line]


def at(run: RunDirectory, step: int) -> Path:
    return checkpoint.directory(run.checkpoints, step)


def state(path: Path) -> dict[str, Tensor]:
    reader = checkpoint.Reader(path)
    return {f"{part}/{name}": reader.tensor(part, name).clone() for part in checkpoint.TENSORS for name in reader.names(part)}


def distance(one: Path, other: Path) -> float:
    """Largest difference of two states, over the largest number of their kind."""
    ours, theirs = state(one), state(other)
    assert ours.keys() == theirs.keys()
    worst = 0.0
    for part in checkpoint.TENSORS:
        names = [name for name in ours if name.startswith(part) and "/step/" not in name]
        scale = max(float(theirs[name].abs().max()) for name in names)
        worst = max(worst, max(float((ours[name] - theirs[name]).abs().max()) for name in names) / scale)
    return worst


class Recorder:
    """An objective that remembers what each of its calls was given, and may spoil one of them."""

    def __init__(self, real: Objective, spoilt: int | None = None, then: Callable[[], None] = lambda: None) -> None:
        self.real, self.spoilt, self.then = real, spoilt, then
        self.given: list[tuple[Tensor, Tensor, Tensor]] = []

    def draw_time(self, clips: int, generator: torch.Generator) -> Tensor:
        return self.real.draw_time(clips, generator)

    def loss(self, network: Network, clean: Tensor, time: Tensor, noise: Tensor, given: Tensor | None = None) -> Tensor:
        self.given.append((clean, time, noise))
        self.then()
        loss = self.real.loss(network, clean, time, noise, given)
        return loss * float("nan") if len(self.given) - 1 == self.spoilt else loss


def test_a_part_has_the_clips_noise_and_times_of_a_rank(tiny_stage: Stages, make_run: Runs, make_trainer: Trainers) -> None:
    given: dict[tuple[int, int, int], list[tuple[Tensor, ...]]] = {}
    drops: dict[tuple[int, int, int], list[Tensor]] = {}
    for ranks, parts in ((4, 1), (2, 2), (1, 4)):
        run = make_run(tiny_stage(data=CLIPS, accumulate=parts, model={"caption_dropout": 0.5}))
        for rank in range(ranks):
            trainer = make_trainer(run, rank, world=ranks)
            recorder = trainer.objective = Recorder(trainer.objective)  # type: ignore[assignment]
            batches: list[Tensor] = []
            loss = trainer._loss

            def watched(batch: Batch, part: int, loss: Any = loss, batches: list[Tensor] = batches) -> Tensor:
                batches.append(batch.index)
                return loss(batch, part)  # type: ignore[no-any-return]

            trainer._loss = watched  # type: ignore[method-assign]
            for _ in range(2):
                trainer.launch()
            for call, (one, index) in enumerate(zip(recorder.given, batches, strict=True)):
                step, part = divmod(call, parts)
                given.setdefault((step, rank * parts + part, 0), []).append(one)
                drops.setdefault((step, rank * parts + part, 0), []).append(index)
    assert len(given) == 2 * 4
    for key, found in given.items():
        assert len(found) == 3
        assert all(torch.equal(first, other) for one in found[1:] for first, other in zip(found[0], one, strict=True)), key
        assert all(torch.equal(drops[key][0], other) for other in drops[key][1:])
    assert len({tuple(found[0][2].flatten().tolist()) for found in given.values()}) == 8


def test_the_metrics_are_of_the_whole_step(tiny_stage: Stages, make_run: Runs) -> None:
    run, apart = make_run(tiny_stage(data=CLIPS, accumulate=3, steps=2)), make_run(tiny_stage(data=CLIPS, batch_size=12, steps=2))
    assert in_process(run)["status"] == in_process(apart)["status"] == "completed"
    for line, other in zip(steps(run), steps(apart), strict=True):
        assert (line["clips"], line["tokens"]) == (other["clips"], other["tokens"]) == (12, 12 * 4)
        assert 0 < line["loss"] < 100
    assert checkpoint.read(at(run, 2))[0].seen == (24,)


def test_a_step_in_parts_resumes_bitwise(tiny_stage: Stages, make_run: Runs) -> None:
    stage = tiny_stage(data=CLIPS, accumulate=2)
    unbroken = make_run(stage)
    assert in_process(unbroken)["status"] == "completed"
    resumed = make_run(stage, resume=at(unbroken, 2))
    assert in_process(resumed)["status"] == "completed"
    for name in ("model", "ema", "optimizer"):
        ours, theirs = ((at(run, 4) / f"{name}.safetensors").read_bytes() for run in (resumed, unbroken))
        assert ours == theirs


def test_a_drain_between_two_parts_saves_after_the_whole_step(tiny_stage: Stages, make_run: Runs, make_trainer: Trainers) -> None:
    run = make_run(tiny_stage(data=CLIPS, accumulate=3, checkpoint={"every_steps": 100}))
    trainer = make_trainer(run)

    def ask() -> None:
        trainer.drain.made = len(recorder.given) >= 5

    recorder = trainer.objective = Recorder(trainer.objective, then=ask)  # type: ignore[assignment]
    assert trainer.train()
    assert (len(recorder.given), trainer.step) == (6, 2)
    assert checkpoint.read(at(run, 2))[0].clips_seen == 2 * 3 * 4


@pytest.mark.parametrize("part", [0, 1, 2])
def test_a_number_that_is_not_finite_in_one_part_ends_the_step(
    part: int, tiny_stage: Stages, make_run: Runs, make_trainer: Trainers
) -> None:
    run = make_run(tiny_stage(data=CLIPS, accumulate=3))
    trainer = make_trainer(run)
    trainer.objective = Recorder(trainer.objective, spoilt=3 + part)  # type: ignore[assignment]
    with pytest.raises(NotFinite, match="step 2: loss nan"):
        trainer.train()
    trainer.saver.wait()
    assert [path.name for path in checkpoint.finished(run.checkpoints)] == ["step-00000001"]


@pytest.mark.long
def test_ranks_and_parts_of_one_product_take_the_same_steps(tiny_stage: Stages, make_run: Runs, caplog: pytest.LogCaptureFixture) -> None:
    """4 ranks; from step 2 on 2 ranks x 2 parts; from step 4 on 1 x 4: what the unbroken run on 4 ranks gives, up to the order of sums.

    Tolerance 1e-4 of the largest number of each kind, moments and moving average included.
    """
    same = {"data": CLIPS, "steps": 6, "batch_size": 2, "optimizer": {"lr": 1e-3, "eps": 1e-3}}
    four = make_run(tiny_stage(**same))
    gang.run(4, "-m", "opensora.train", str(four.path))
    two = make_run(tiny_stage(**same, accumulate=2), resume=at(four, 2))
    gang.run(2, "-m", "opensora.train", str(two.path))
    again = make_run(tiny_stage(**same, accumulate=2), resume=at(two, 4))
    gang.run(2, "-m", "opensora.train", str(again.path))
    one = make_run(tiny_stage(**same, accumulate=4), resume=at(two, 4))
    with caplog.at_level(logging.INFO, "opensora.training"):
        assert in_process(one)["status"] == "completed"
    assert "resumed on 1 of 2 ranks with accumulate 4 instead of 2, not bitwise" in caplog.text

    assert {line["clips"] for run in (four, two, again, one) for line in steps(run)} == {8}
    losses = {line["step"]: line["loss"] for line in steps(four)}
    for run in (two, again, one):
        assert [line["loss"] for line in steps(run)] == pytest.approx([losses[line["step"]] for line in steps(run)], rel=1e-5)
        assert distance(at(run, 6), at(four, 6)) < 1e-4
    for name in sorted(path.name for path in at(two, 6).glob("*.safetensors")):
        assert (at(two, 6) / name).read_bytes() == (at(again, 6) / name).read_bytes(), name


@pytest.mark.long
@pytest.mark.parametrize("parallel", [{"strategy": "fsdp"}, {"sequence": 2}], ids=["fsdp", "sequence"])
def test_each_strategy_takes_a_step_in_parts(parallel: dict[str, Any], tiny_stage: Stages, make_run: Runs) -> None:
    same = {"data": CLIPS | {"frames": 4}, "steps": 3, "batch_size": 1, "optimizer": {"lr": 1e-3, "eps": 1e-3}}
    shared = make_run(tiny_stage(**same, accumulate=2, parallel=parallel))
    gang.run(2, "-m", "opensora.train", str(shared.path))
    alone = make_run(tiny_stage(**same, accumulate=2 if "sequence" in parallel else 4))
    assert in_process(alone)["status"] == "completed"
    assert [line["loss"] for line in steps(shared)] == pytest.approx([line["loss"] for line in steps(alone)], rel=1e-4)
    assert distance(at(shared, 3), at(alone, 3)) < 1e-4


# ------------------------------------------------------------------------------------------------------------------
# What a resume may change
# ------------------------------------------------------------------------------------------------------------------

EXECUTION: list[dict[str, Any]] = [
    {"batch_size": 2, "accumulate": 2},
    {"batch_size": 1, "accumulate": 4},
    {"activations": {"recompute": "full"}},
    {"compile": False},
    {"loss_spike": None},
    {"checkpoint": {"every_steps": 2, "background": False}},
    {"prompts": ["a digit 3"]},
    {"prompts": ["words that no clip has"]},
    {"sampling": {"steps": 1, "guidance": 1.0}},
    {"evaluate": {"kind": "digits", "clips": 4, "frames": 1}},
]
IDENTITY: list[tuple[dict[str, Any], str]] = [
    ({"batch_size": 2}, "global batch was 4 clips, is 2 clips"),
    ({"accumulate": 2}, "global batch was 4 clips, is 8 clips"),
    ({"optimizer": {"lr": 0.5}}, "optimizer.lr was 0.01, is 0.5"),
    ({"ema_decay": 0.5}, "ema_decay was 0.9, is 0.5"),
    ({"seed": 8}, "seed was 7, is 8"),
    ({"steps": 5}, "steps was 4, is 5"),
    ({"freeze": "temporal"}, "freeze was none, is temporal"),
    ({"model": {"caption_dropout": 0.3}}, "model.caption_dropout was 0.1, is 0.3"),
    ({"data": {"horizontal_flip": True}}, "data.horizontal_flip was False, is True"),
    ({"data": {"source": {"kind": "digits", "clips": 17}}}, "data.source.clips was 16, is 17"),
]


@pytest.fixture
def half_way(tiny_stage: Stages, make_run: Runs) -> Path:
    """The checkpoint of a stage that was drained after its first step."""
    run = make_run(tiny_stage())
    (run.path / "drain").touch()
    assert in_process(run)["status"] == "drained"
    return at(run, 1)


@pytest.mark.parametrize("changes", EXECUTION, ids=lambda changes: ",".join(changes))
def test_a_resume_goes_on_where_execution_differs(changes: dict[str, Any], half_way: Path, tiny_stage: Stages, make_run: Runs) -> None:
    run = make_run(tiny_stage(**changes), resume=half_way)
    assert in_process(run)["status"] == "completed", result(run)["reason"]
    assert [line["step"] for line in steps(run)] == [2, 3, 4]


@pytest.mark.parametrize(("changes", "fact"), IDENTITY)
def test_a_resume_is_refused_where_identity_differs(
    changes: dict[str, Any], fact: str, half_way: Path, tiny_stage: Stages, make_run: Runs
) -> None:
    failed = in_process(make_run(tiny_stage(**changes), resume=half_way))
    assert (failed["status"], failed["class"]) == ("failed", "parent")
    assert fact in failed["reason"]


def test_the_log_says_that_a_resume_is_not_bitwise_and_why(
    half_way: Path, tiny_stage: Stages, make_run: Runs, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "opensora.training"):
        in_process(make_run(tiny_stage(loss_spike=None), resume=half_way))
        assert "bitwise" not in caplog.text
        in_process(make_run(tiny_stage(batch_size=2, accumulate=2), resume=half_way))
    assert "resumed with batch_size 2 instead of 4 and accumulate 2 instead of 1, not bitwise" in caplog.text


def test_each_size_of_clips_is_said_and_that_a_step_takes_more_than_there_are(
    tiny_stage: Stages, make_run: Runs, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    from PIL import Image

    folder, rows = tmp_path / "pictures", ["path,text"]
    folder.mkdir()
    for number in range(8):
        Image.new("RGB", (16, 16) if number < 5 else (8, 32), (20 * number, 0, 0)).save(folder / f"{number}.png")
        rows.append(f"{number}.png,a red square")
    (folder / "captions.csv").write_text("\n".join(rows))
    sizes = [{"frames": 1, "height": 16, "width": 16, "batch_size": 2}, {"frames": 1, "height": 32, "width": 8, "batch_size": 2}]
    data = {"source": {"kind": "folder", "path": str(folder)}, "buckets": sizes}
    with caplog.at_level(logging.INFO, "opensora.training"):
        assert in_process(make_run(tiny_stage(data=data, accumulate=2)))["status"] == "completed"
    for line in (
        "clips      5 of 1x16x16 pixels, 1x4 tokens",
        "clips      3 of 1x32x8 pixels, 1x4 tokens; 0 left out",
        "batch      2 x 1 ranks x 2 parts of 1x16x16",
        "batch      2 x 1 ranks x 2 parts of 1x32x8",
        "warning    bucket 1x32x8 has 3 clips, a step takes 4: each step holds a clip more than once",
    ):
        assert line in caplog.messages, line
    assert "bucket 1x16x16 has" not in caplog.text
