from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from training_runs import assert_same_state, in_process, metrics, one_step

from opensora.checkpoint import reader as checkpoint
from opensora.config import StageConfig
from opensora.diffusion.objective import Network, Objective
from opensora.distributed.ranks import PeerLost
from opensora.errors import NotFinite
from opensora.model import routing
from opensora.model.stdit import STDiTBlock
from opensora.training.run_directory import RunDirectory
from opensora.training.trainer import DrainRequest, Trainer

Stages = Callable[..., StageConfig]
Runs = Callable[..., RunDirectory]
Trainers = Callable[..., Trainer]
Complete = Callable[..., Path]
VIDEO = {"frames": 4}


@pytest.mark.long
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


def test_given_frames_change_the_loss_alone_and_none_given_changes_nothing(
    tiny_stage: Stages, make_run: Runs, make_trainer: Trainers
) -> None:
    """Times, noise and dropped captions are drawn before them."""

    def losses(**changes: Any) -> list[float]:
        trainer = make_trainer(make_run(tiny_stage(data=VIDEO, optimizer={"warmup_steps": 0}, **changes)))
        return [one_step(trainer)["loss"] for _ in range(3)]

    off = losses()
    assert losses(masks={"last_frame": 1e-9}) == pytest.approx(off, rel=1e-5)
    on = losses(masks={"first_frame": 0.5, "random": 0.5})
    assert all(abs(ours - theirs) > 1e-3 for ours, theirs in zip(on, off, strict=True))
    assert on == losses(masks={"first_frame": 0.5, "random": 0.5}), "they are a function of seed, rank and step"


def test_masks_need_clips_of_which_frames_are_left(tiny_stage: Stages) -> None:
    with pytest.raises(ValueError, match="masks give some frames of a clip, and the clips have 1"):
        tiny_stage(masks={"first_frame": 0.5})
    for shares in ({}, {"first_frame": 0.6, "random": 0.6}):
        with pytest.raises(ValueError, match="the shares add up to"):
            tiny_stage(data=VIDEO, masks=shares)


ROUTED = {"data": VIDEO, "model": {"depth": 3}, "routing": {"rate": 0.5, "first_blocks": 1, "last_blocks": 1}}


def test_routing_at_rate_0_is_training_without_it_bitwise(tiny_stage: Stages, complete: Complete) -> None:
    off, zero, on = (
        complete(tiny_stage(**ROUTED | {"routing": how})) for how in (None, ROUTED["routing"] | {"rate": 0.0}, ROUTED["routing"])
    )
    assert_same_state(off, zero)
    assert (off / "model.safetensors").read_bytes() != (on / "model.safetensors").read_bytes()


@pytest.mark.parametrize("changes", [ROUTED, {"optimizer": {"matrices": "muon"}}], ids=["routing", "muon"])
def test_a_resume_with_a_lever_continues_bitwise(changes: dict[str, Any], tiny_stage: Stages, make_run: Runs, complete: Complete) -> None:
    stage = tiny_stage(**changes)
    whole = complete(stage)
    run = make_run(stage, resume=whole.with_name("step-00000002"))
    assert in_process(run)["status"] == "completed"
    assert_same_state(whole, checkpoint.directory(run.checkpoints, stage.steps))


def test_each_rank_and_step_routes_other_tubes(
    tiny_stage: Stages, make_run: Runs, make_trainer: Trainers, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[tuple[int, ...]] = []
    real = routing.draw

    def spied(*given: Any) -> routing.Route | None:
        route = real(*given)
        assert route is not None
        drawn.append(tuple(route.through.flatten().tolist()))
        return route

    monkeypatch.setattr(routing, "draw", spied)
    run = make_run(tiny_stage(**ROUTED | {"batch_size": 16}))
    for rank in (0, 1, 0):
        trainer = make_trainer(run, rank, world=2)
        for _ in range(2):
            one_step(trainer)
    assert drawn[:2] == drawn[4:] and len(set(drawn)) == 4


def test_tokens_skip_blocks_in_training_and_in_no_sample(tiny_stage: Stages, complete: Complete, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[bool, int]] = []
    real = STDiTBlock.forward

    def spied(block: STDiTBlock, x: Tensor, *rest: Any) -> Tensor:
        seen.append((torch.is_grad_enabled(), x.shape[2]))
        return real(block, x, *rest)

    monkeypatch.setattr(STDiTBlock, "forward", spied)
    complete(tiny_stage(**ROUTED, steps=1, prompts=["a digit 3 moving left"]))
    tubes = tiny_stage(**ROUTED).tokens[1]
    assert [count for training, count in seen if training] == [tubes, tubes // 2, tubes]
    sampled = [count for training, count in seen if not training]
    assert sampled and set(sampled) == {tubes}


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
    sampling = {"method": "euler" if objective == "flow" else "ancestral"}
    stage = tiny_stage(objective={"kind": objective}, sampling=sampling, masks={"random": 0.5}, **ROUTED)
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

    def loss(self, network: Network, clean: Tensor, time: Tensor, noise: Tensor, given: Tensor | None = None) -> Tensor:
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
    for run, drain in ((by_file, DrainRequest()), (by_signal, DrainRequest(made=True))):
        said = in_process(run, drain)
        assert isinstance(said.pop("time"), float)
        assert said == {
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


def test_a_clip_is_lost_to_nobody_when_the_number_of_ranks_changes(tiny_stage: Stages, make_run: Runs, make_trainer: Trainers) -> None:
    run = make_run(tiny_stage(steps=2))
    in_process(run)
    trainer = make_trainer(run)
    assert trainer.seen == (8,)
    assert trainer.loader.clips(trainer.seen) == 4


def test_where_gradients_hide_who_spoilt_them_the_first_rank_says_so(tiny_stage: Stages, make_run: Runs, make_trainer: Trainers) -> None:
    run = make_run(tiny_stage())
    told, other = (make_trainer(run, rank, world=2)._not_finite(3, None, 1.0, math.inf) for rank in (0, 1))
    assert isinstance(told, NotFinite) and "step 3: loss 1.0 and gradient norm inf are not both finite on some rank" in str(told)
    assert isinstance(other, PeerLost)


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
