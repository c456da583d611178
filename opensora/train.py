"""One stage of training: `torchrun -m opensora.train RUN_DIR` (or plain `python -m` for one process).

Owns the loop: where a stage starts from, its steps, when it saves, drains and ends, and its report. All stages of a recipe run
here; what differs between them is data (`opensora.config`). Knows a run directory (docs/contracts.md, section 1) and nothing of
clusters, stores or trackers.

Invariants:
- A step is a function of (stage, weights, step, data-parallel rank): noise, times and dropped captions come from a generator seeded
  with (seed, rank, step), clips from the position in the stream. So stopping anywhere and resuming gives the unbroken run's bits.
  Ranks that share a clip have the same data-parallel rank, and so the same numbers. A step in several parts (`accumulate`) is that of as
  many times the ranks: part j of rank r has the clips and the numbers of data-parallel rank r x parts + j.
- With the gradients of a step travel its loss, whether anybody was asked to drain, and who saw a number that is not finite. The ranks
  therefore always agree on what happens next.
- Nothing in a step waits for a GPU: what a step came to is read when the next one is on its way.
- A stage ends on all nodes or on none: a node says `completed` or `drained` once every rank has come to the end of its work.
- What comes after the training decides nothing: a sample that cannot be drawn is a warning (`opensora.after_training`).
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import shutil
import signal
import statistics
import sys
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from opensora import after_training, checkpoint, encoders, guidance, identity, imports, memory, objective, parallel, weights
from opensora.config import Activations, StageConfig
from opensora.data.latents import Prepared, prepare
from opensora.data.loader import Ahead, Batch, Loader
from opensora.data.source import open_clips
from opensora.errors import ConfigError, DataError, Kind, LossSpike, NotFinite, OutOfMemory, ParentError, TrainerError
from opensora.model import STDiT
from opensora.optimizer import learning_rate
from opensora.ranks import PEER_LOST, PeerLost, Ranks, die_with_launcher, is_peer_lost, join
from opensora.run_directory import Phase, RunDirectory
from opensora.saver import PeerFailed, Saver
from opensora.seeds import generator_for

if TYPE_CHECKING:
    from types import FrameType

log = logging.getLogger(__name__)

LINES = 40
"""Progress lines of a stage."""
SKIPPED = 20
"""Unreadable clips that are named in the log."""
WINDOW, FEWEST, SPIKES = 100, 20, 3
"""Losses that a spike is measured against, how many there must be, and how many spikes in a row are an end. A single batch of a diffusion
model may be far off: its loss depends on the times drawn."""


# ------------------------------------------------------------------------------------------------------------------
# What a stage starts from
# ------------------------------------------------------------------------------------------------------------------

PLACES = ("data.source.path", "weights", "autoencoder.path", "text.path")
"""Fields of a stage that say where something lies. A checkpoint is resumed whatever these were: what lies there is compared by content,
clips by their digest (`_same_clips`), encoders by that of their files (`encoders.load`), and imported weights are in the checkpoint."""

LAYOUT = ("batch_size", "data.buckets", "accumulate", "parallel")
"""How the clips of a step lie on the ranks. Other values at the same global batch add up the same numbers in another order."""


@dataclass(frozen=True)
class Start:
    """Where a stage continues, and how far it is. `carried` and `reset` go into CHECKPOINT.json."""

    reader: checkpoint.Reader | None = None
    """The checkpoint that tensors come from; none: weights are imported or new."""
    weights: Literal["model", "ema"] = "model"
    """Which part of it the weights are."""
    ema: bool = False
    """Whether the moving average comes from it too; else it starts at the weights."""
    optimizer: bool = False
    step: int = 0
    seen: tuple[int, ...] | None = None
    """Position in the stream of clips; none: its start."""
    clips: str | None = None
    """Digest over the clips of that stream; none: any."""
    carried: tuple[str, ...] = ()
    reset: tuple[str, ...] = ()
    layout: str | None = None
    """How the ranks lie otherwise than those that made the checkpoint, in words; none: as they did, and the resume is bitwise."""

    @property
    def encoders(self) -> Path | None:
        """Directory of the encoders' files; none: they are made from the stage's own clips."""
        return self.reader.path if self.reader is not None else None


def find_start(run: RunDirectory, stage: StageConfig, world: int) -> Start:
    """The newest checkpoint of this stage, else the parent's, else the configured import, else nothing.

    Args:
        world: ranks of the job.

    Raises:
        ParentError: what is there does not fit this stage.
    """
    own = checkpoint.latest(run.checkpoints)
    if own is not None:
        return _resume(own, stage, world)
    if run.parent is not None:
        return _chain(run.parent, stage)
    tables = f"position tables for {_size(stage)}"
    if stage.weights is not None:
        return Start(carried=(f"weights of {stage.weights}",), reset=(tables, "optimizer", "ema", "encoders"))
    return Start(reset=("weights", tables, "optimizer", "ema", "encoders"))


def _resume(path: Path, stage: StageConfig, world: int) -> Start:
    reader = checkpoint.Reader(path)
    record = reader.record
    differences = identity.differences(reader.stage, stage, record.world_size, world)
    others = [one for one in differences if one.kind == "identity" and one.path not in PLACES]
    if others:
        facts = "; ".join(f"{one.path} was {_shown(one.path, one.old)}, is {_shown(one.path, one.new)}" for one in others)
        raise ParentError(
            f"checkpoint {path}: step {record.step} is of another stage ({facts}), and the numbers would be those of neither. "
            "Set these back to go on from it, or start the stage anew in a run directory without checkpoints"
        )
    return Start(
        reader,
        "model",
        ema=True,
        optimizer=True,
        step=record.step,
        seen=record.seen,
        clips=record.clips,
        carried=record.carried,
        reset=record.reset,
        layout=_layout(differences, record.world_size, world),
    )


def _shown(path: str, value: object) -> str:
    if path == "global batch" and isinstance(value, list):
        return " and ".join(f"{clips}" for clips in value) + " clips"
    return json.dumps(value) if isinstance(value, list | dict) else str(value)


def _layout(differences: Sequence[identity.Difference], then: int, now: int) -> str | None:
    """`resumed on 4 of 8 ranks, not bitwise`: what is added up in another order than in the checkpoint's steps."""
    changed = [one for one in differences if one.path.startswith(LAYOUT)]
    facts = [f"on {now} of {then} ranks" if now < then else f"on {now} ranks instead of {then}"] if now != then else []
    others = [f"{one.path} {_shown(one.path, one.new)} instead of {_shown(one.path, one.old)}" for one in changed]
    facts += [f"with {' and '.join(others)}"] if others else []
    return f"resumed {' '.join(facts)}, not bitwise" if facts else None


def _chain(path: Path, stage: StageConfig) -> Start:
    reader = checkpoint.Reader(path)
    record, parent = reader.record, reader.stage
    if not record.complete:
        raise ParentError(f"parent {path}: it stopped at step {record.step} of {record.steps}; finish that stage first")
    for one in identity.misfits(stage, parent):
        raise ParentError(f"parent {path}: its {one.path} is {one.old}, this stage's is {one.new}; no rule turns one into the other")
    source, carry = stage.parent.weights, stage.parent.optimizer == "carry"
    carried, reset = [f"weights ({source})", "autoencoder", "text encoder"], ["step", "data position", "ema (starts at the weights)"]
    (carried if carry else reset).append("optimizer")
    reset.append(f"position tables ({_size(parent)} -> {_size(stage)})")
    return Start(reader, source, optimizer=carry, carried=tuple(carried), reset=tuple(reset))


def _size(stage: StageConfig) -> str:
    _, frames, rows, columns = stage.latent_shape
    return f"{frames}x{rows}x{columns}"


# ------------------------------------------------------------------------------------------------------------------
# The loop
# ------------------------------------------------------------------------------------------------------------------


@dataclass
class Step:
    """A step that is on its way: what it came to is on the device."""

    number: int
    """Of the step, from 1."""
    lr: float
    clips: int
    tokens: int
    waited: float
    """Seconds for its clips."""
    came_to: Tensor
    """(3 + world,): norm of the gradient; then, as sums over the ranks: loss, askings to drain, each rank's flag of numbers that are not
    finite."""
    there: torch.cuda.Event | None
    """When `came_to` has arrived on the CPU; none: it is there."""


class Losses:
    """The losses of the last steps, and whether they left their range. A resumed run begins anew: its weights do not depend on it."""

    def __init__(self, factor: float | None) -> None:
        self._factor = factor
        self._recent: deque[float] = deque(maxlen=WINDOW)
        self._high = 0

    @property
    def median(self) -> float:
        return statistics.median(self._recent)

    def spiked(self, loss: float) -> bool:
        """Whether this is the SPIKES-th loss in a row that is far above the ones before."""
        if self._factor is not None and len(self._recent) >= FEWEST and loss > self._factor * self.median:
            self._high += 1  # and is kept out of the median
        else:
            self._high = 0
            self._recent.append(loss)
        return self._high >= SPIKES


class Trainer:
    """The pieces of one stage, put together for one rank."""

    def __init__(self, run: RunDirectory, stage: StageConfig, ranks: Ranks, notice: Notice, prepared: Prepared, start: Start) -> None:
        self.run, self.stage, self.ranks, self.notice, self.prepared = run, stage, ranks, notice, prepared
        self.data_rank, data_world = parallel.data_ranks(ranks, stage.parallel.ranks_a_clip)
        loader = Loader(prepared, seed=stage.seed, rank=self.data_rank, world=data_world, parts=stage.accumulate)
        self.loader = Ahead(loader, ranks.device)
        self.objective = objective.build(stage.objective)
        self.model = _model(stage, ranks, start, prepared)
        self.strategy = parallel.build(self.model, stage, ranks)
        if start.reader is not None:
            self.strategy.load(start.reader, ema=start.ema, optimizer=start.optimizer)
        self.start = replace(start, reader=None)  # as long as its files are mapped, their disk is not free
        self.step = start.step
        self.seen = start.seen if start.seen is not None else self.loader.start
        writer = self.strategy.writer
        here = tuple(writer(rank) for rank in ranks.here)
        self.saver = Saver(run.checkpoints, stage, shard=writer(ranks.rank), shards=ranks.world, here=here, device=ranks.device)
        self.saver.reserve(self.strategy.pieces())
        ranks.barrier()  # the first rank of a node has removed what a killed run left: nobody saves before that
        half = ranks.device.type == "cuda" and stage.dtype == "bf16"
        self.autocast = torch.autocast(ranks.device.type, torch.bfloat16, enabled=half)
        self.under_way: deque[Step] = deque()
        self.behind = 1 if ranks.device.type == "cuda" else 0  # steps that may be on their way when the next is launched; a CPU has none
        self.losses = Losses(stage.loss_spike)
        self.booked = self.began = time.time()  # end of the last interval that metrics.jsonl accounts for; start of the loop

    def train(self) -> bool:
        """Steps until the stage is complete or somebody asks to drain; a checkpoint at the end either way.

        Returns:
            whether it was drained.

        Raises:
            NotFinite, LossSpike: nothing was saved since.
            DiskFull: a checkpoint could not be written; the earlier ones are there.
        """
        drained, saved = False, self.step if checkpoint.directory(self.run.checkpoints, self.step).is_dir() else -1
        while self.step < self.stage.steps and not drained:
            self.saver.check()
            self.launch()
            due = self.step % self.stage.checkpoint.every_steps == 0 or self.step == self.stage.steps
            lines, drained = self.settle(0 if due else self.behind)
            checkpoint_s = 0.0
            if due or drained:
                lines += self.settle(0)[0]
                checkpoint_s, saved = self.save(), self.step
            self._report(lines, checkpoint_s)
        if saved != self.step:  # a stage without steps
            self.save()
        self.saver.wait(self.beat)
        self.book("checkpoint")
        return drained and self.step < self.stage.steps

    def launch(self) -> None:
        """One optimizer step, of which the device may have done nothing yet."""
        flags = torch.zeros(2 + self.ranks.world, device=self.ranks.device)
        parts, waited = self.stage.accumulate, 0.0
        for part in range(parts):
            if part:
                self.run.heartbeat(self.step, "train")
            began = time.time()
            batch = self.loader.batch(self.seen, part).to(self.ranks.device)
            waited += time.time() - began
            loss = self._loss(batch, part) / parts
            self.strategy.backward(loss, first=part == 0, last=part == parts - 1)
            flags[0] += loss.detach()
        flags[1] = float(self.notice.given or self.run.drain_asked())
        flags[2 + self.ranks.rank] = ~(flags[0].isfinite() & self.strategy.finite())
        flags = self.strategy.reduce(flags)
        norm = self.strategy.norm()

        lr = learning_rate(self.stage.optimizer, self.step, self.stage.steps)
        clip = self.stage.optimizer.grad_clip
        scale = torch.ones_like(norm) if clip is None else (clip / (norm + 1e-6)).clamp(max=1)
        self.saver.ready()  # a checkpoint of the weights as they are may still be on its way
        self.strategy.step(lr, scale, self.step)

        clips = self.loader.clips(self.seen)
        frames, spatial = self.stage.tokens_of(self.stage.buckets[batch.bucket])
        came_to, there = torch.cat([norm[None], flags]), None
        if self.ranks.device.type == "cuda":  # into page-locked memory: the host would wait for a copy into any other
            came_to = torch.empty(came_to.shape, pin_memory=True).copy_(came_to, non_blocking=True)
            there = torch.cuda.Event()  # type: ignore[no-untyped-call]
            there.record()
        self.step += 1
        self.seen = self.loader.after(self.seen)
        self.under_way.append(Step(self.step, lr, clips, clips * frames * spatial, waited, came_to, there))

    def _loss(self, batch: Batch, part: int) -> Tensor:
        clean = batch.latents
        generator = generator_for(self.stage.seed, "step", self.data_rank * self.stage.accumulate + part, self.step, self.ranks.device)
        moment = self.objective.draw_time(len(clean), generator)
        noise = torch.randn(clean.shape, generator=generator, device=clean.device)
        drop = torch.rand(len(clean), generator=generator, device=clean.device) < self.stage.model.caption_dropout
        with self.autocast:
            network = guidance.conditional(self.strategy.model, batch.vectors, batch.mask, drop)
            return self.objective.loss(network, clean, moment, noise).mean()

    def settle(self, most: int) -> tuple[list[dict[str, float]], bool]:
        """Read what steps came to until at most `most` are on their way: their lines of metrics, and whether the ranks agreed to drain.

        Raises:
            NotFinite, LossSpike, PeerLost: this is as far as it goes.
        """
        lines, drained = [], False
        while len(self.under_way) > most:
            step = self.under_way.popleft()
            if step.there is not None:
                step.there.synchronize()
            norm, loss, drains, *bad = step.came_to.tolist()
            loss /= self.ranks.world
            blamed = next((rank for rank, flag in enumerate(bad) if flag), None)
            if blamed is not None or not math.isfinite(norm):
                raise self._not_finite(step.number, blamed, loss, norm)
            if self.losses.spiked(loss):
                raise self._spiked(step.number, loss)
            drained |= drains > 0
            lines.append(
                {
                    "step": step.number,
                    "loss": loss,
                    "lr": step.lr,
                    "grad_norm": norm,
                    "clips": step.clips,
                    "tokens": step.tokens,
                    "data_wait_s": step.waited,
                    "time": time.time(),
                }
            )
        return lines, drained

    def _spiked(self, step: int, loss: float) -> LossSpike | PeerLost:
        if not self.ranks.is_first:
            return PeerLost("the loss left its range, which the first rank tells")
        return LossSpike(
            f"step {step}: loss {loss:.4g}, for the {SPIKES}rd time in a row above {self.stage.loss_spike:g} times the median of the steps "
            f"before ({self.losses.median:.4g}), with optimizer.lr {self.stage.optimizer.lr:g}"
        )

    def _not_finite(self, step: int, blamed: int | None, loss: float, norm: float) -> NotFinite | PeerLost:
        """What the rank that saw it first raises, and what the others do; where nobody can be blamed, the first rank tells."""
        if (blamed or 0) != self.ranks.rank:
            return PeerLost(f"rank {blamed or 0} tells of a number that is not finite")
        unknown = " on some rank (gradients are summed before they are looked at)" if blamed is None and self.ranks.world > 1 else ""
        return NotFinite(
            f"step {step}: loss {loss} and gradient norm {norm} are not both finite{unknown}, with optimizer.lr "
            f"{self.stage.optimizer.lr:g}; this step was not taken and not saved"
        )

    def save(self) -> float:
        """Begin a checkpoint of this step, each rank its rows; seconds that training stood still for it.

        Raises:
            DiskFull, NotFinite: the last one could not be written, or this one.
        """
        began = time.time()
        self.beat()
        self.saver.wait(self.beat)
        self.saver.save(
            self.strategy.pieces(),
            self.prepared.directory,
            beat=self.beat,
            step=self.step,
            world_size=self.ranks.world,
            seen=self.seen,
            clips=self.prepared.clips,
            carried=self.start.carried,
            reset=self.start.reset,
            node=self.ranks.node,
        )
        return time.time() - began

    def beat(self) -> None:
        """Say that this rank lives while it waits for a disk."""
        self.run.heartbeat(self.step, "checkpoint")

    def show(self) -> after_training.Shown:
        """Samples and readings of the finished stage; raises nothing."""
        shown = after_training.show(
            self.run, self.stage, self.ranks, step=self.step, prepared=self.prepared, averaged=self.strategy.averaged
        )
        with suppress(OSError):
            self.book("evaluate")
        with suppress(PeerLost):  # the first is done with drawing and judging: nobody leaves before, or torchrun would end it
            self.ranks.barrier(partial(after_training.alive, self.run, self.step))
        return shown

    def begin(self, born: float) -> None:
        """All that came before, since this process was born, was its init."""
        self.run.heartbeat(self.step, "init")
        self.booked = born
        self.book("init")
        self.began = self.booked

    def book(self, phase: Phase) -> None:
        """Account for the time since the last booking as something that is not a step."""
        now = time.time()
        self.run.record({"phase": phase, "start": self.booked, "end": now})
        self.booked = now

    def _report(self, lines: Sequence[dict[str, float]], checkpoint_s: float) -> None:
        """Write the lines of steps; the time of a save belongs to the last of them."""
        for line in lines:
            last = line is lines[-1]
            now = line["time"] = time.time() if last else line["time"]
            line["checkpoint_s"] = checkpoint_s if last else 0.0
            left = now - self.booked - line["checkpoint_s"]
            line["data_wait_s"] = min(line["data_wait_s"], left)  # of a step that was launched before the interval began
            line["step_s"] = left - line["data_wait_s"]
            self.booked = now
            self.run.record(line)
        self.run.heartbeat(self.step, "train")
        every = max(1, self.stage.steps // LINES)
        for line in lines if self.ranks.is_first else ():
            if line["step"] % every and line["step"] != self.stage.steps:
                continue
            done, elapsed = line["step"] - self.start.step, self.booked - self.began
            log.info(
                "step %6d/%d  loss %.4f  lr %.2e  grad %.2f  %6.1f clips/s  ETA %s",
                line["step"],
                self.stage.steps,
                line["loss"],
                line["lr"],
                line["grad_norm"],
                line["clips"] * done / elapsed,
                _clock(elapsed / done * (self.stage.steps - line["step"])),
            )


def _model(stage: StageConfig, ranks: Ranks, start: Start, prepared: Prepared) -> STDiT:
    """The network with the weights that the stage starts from, on the rank's device."""
    try:
        model = STDiT(
            stage.model,
            stage.latent_shape[1:],
            stage.out_channels,
            generator=generator_for(stage.seed, "weights", 0, 0, torch.device("cpu")),
            initial=start.reader is None,
        )
    except ValueError as error:
        raise ConfigError(f"model: {error}") from error
    if start.reader is not None:
        _take(start.reader, start.weights, model)
    elif stage.weights is not None:
        _import(Path(imports.local(stage.weights)), model, prepared)
    if stage.freeze == "temporal":
        model.freeze_temporal()
    model.keep(_activations(stage, ranks))
    model.to(ranks.device).train()
    if ranks.device.type == "cuda" and stage.compile and (reason := _not_compiled(stage)):
        log.info("compile: off, %s", reason)
    elif ranks.device.type == "cuda" and stage.compile:
        torch._dynamo.config.recompile_limit = 64  # of all blocks together: sizes, lengths of captions, with and without mask or position
        for block in model.blocks:
            block.compile()
    return model


def _not_compiled(stage: StageConfig) -> str | None:
    """Why blocks stay as they are on CUDA; none: nothing speaks against compiling them."""
    if stage.parallel.sequence > 1 or stage.parallel.plugin != "torch_ddp":
        return "exchanges inside of a block would cut its graph in three"
    if stage.activations.recompute == "selective":
        return "torch does not see into a compiled block what `selective` would keep, and would compute all of it again"
    if not any(shutil.which(name) for name in (os.environ.get("CC", "cc"), "gcc", "clang")):
        return "this machine has no C compiler, which Triton needs"
    return None


@torch.no_grad()
def _take(reader: checkpoint.Reader, part: Literal["model", "ema"], model: STDiT) -> None:
    """A checkpoint's weights, one tensor after the other: the files are mapped, no second copy of the model is made."""
    own = model.state_dict()
    checkpoint.compare(own, reader.names(part), f"{part} weights to start from")
    for name, weight in own.items():
        weight.copy_(reader.tensor(part, name))


@torch.no_grad()
def _import(path: Path, model: STDiT, prepared: Prepared) -> None:
    report = weights.load(path, model)
    log.info("weights: %d tensors of %s (%s); recomputed: %s", len(report.mapped), path, report.format, report.recomputed)
    missing = set(report.missing)
    if "null_caption" in missing:  # diffusers' layout has none: its pipeline encodes an empty prompt
        null = encoders.null_caption(prepared.text, *model.null_caption.shape)
        if null is not None:
            model.null_caption.copy_(null)
            missing.remove("null_caption")
    log.info("weights: not in the file and as in a new model: %s", ", ".join(sorted(missing)) or "nothing")


def _activations(stage: StageConfig, ranks: Ranks) -> Activations:
    """The stage's policy; for `auto` the fastest that fits, on a CPU that of keeping everything."""
    if stage.activations.recompute != "auto":
        return stage.activations
    if ranks.device.type != "cuda":
        return stage.activations.model_copy(update={"recompute": "none"})
    try:
        choice = memory.choose(stage, torch.cuda.get_device_properties(ranks.device).total_memory, ranks.world)
    except memory.DoesNotFit as error:
        raise OutOfMemory(str(error)) from error
    except ValueError as error:  # ranks that do not divide
        raise ConfigError(str(error)) from error
    log.info("activations: %s", choice.reason)
    return choice.activations


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"


# ------------------------------------------------------------------------------------------------------------------
# A process
# ------------------------------------------------------------------------------------------------------------------


@dataclass
class Notice:
    """Whether this process was asked to leave."""

    given: bool = False


def run_stage(run: RunDirectory, ranks: Ranks, notice: Notice, born: float) -> None:
    """Train, judge and report one stage.

    Raises:
        TrainerError: it ended otherwise.
        PeerLost: another rank did.
    """
    stage = run.stage()
    run.heartbeat(0, "init")
    start = find_start(run, stage, ranks.world)
    prepared = _prepare(run, stage, ranks, start)
    trainer = Trainer(run, stage, ranks, notice, prepared, start)
    del start
    if ranks.is_first:
        _announce(trainer)
    trainer.begin(born)

    drained, shown = _train(trainer), after_training.Shown()
    ranks.barrier(partial(after_training.alive, run, trainer.step))  # every node has written its files: they decide, and nothing after them
    if not drained:
        shown = trainer.show()
    if ranks.is_first_here:
        run.finish("drained" if drained else "completed", evaluation=shown.readings, warnings=shown.warnings)
    if ranks.is_first:
        log.info("%s at step %d  %s", "drained" if drained else "completed", trainer.step, after_training.described(shown.readings))


def _train(trainer: Trainer) -> bool:
    try:
        with trainer.loader:
            return trainer.train()
    except Exception:
        try:  # a checkpoint that is being written when a step fails is as good as any other; if it fails too, it failed first
            trainer.saver.wait(trainer.beat)
        except PeerFailed as error:
            log.info("the checkpoint that was being written is lost: %s", error)
        raise


def _prepare(run: RunDirectory, stage: StageConfig, ranks: Ranks, start: Start) -> Prepared:
    """The stage's clips, encoded once on each node."""
    carried = start.encoders
    if carried is None and ranks.nodes > 1:
        carried = _encoders_for_all(run, stage, ranks)

    def beat() -> None:
        run.heartbeat(start.step, "init")

    # what cannot be drawn or judged is said before the training, and never in the way of weights that are trained already
    asked = stage if start.step == 0 else stage.model_copy(update={"prompts": (), "evaluate": None})
    directory: Path | str = ""
    if ranks.is_first_here:
        directory = prepare(asked, run.latents, carried, progress=lambda _done, _of: beat(), recorded=run.recorded_data())
    prepared = Prepared.open(Path(ranks.share(str(directory), beat)), stage)
    _same_clips(prepared, ranks, start)
    for clip, reason in list(prepared.skipped.items())[:SKIPPED]:
        log.info("skipped %s: %s", clip, reason)
    return prepared


def _same_clips(prepared: Prepared, ranks: Ranks, start: Start) -> None:
    """Raises DataError where this node could use other clips than the first one, ParentError where the run before it was resumed had
    others: the same position would mean other clips, and nobody would notice."""
    if start.clips is not None and prepared.clips != start.clips:
        raise ParentError(  # and no fault of the cache: to encode the clips again would not bring back the others
            f"data.source: step {start.step} was trained on other clips than the {len(prepared)} that can be used now "
            f"({len(prepared.skipped)} are left out); put the clips and captions of then in their place and remove the cache "
            f"{prepared.directory}, or start the stage anew"
        )
    first = ranks.hand_out(prepared.clips.encode()).decode() if ranks.nodes > 1 else prepared.clips
    if prepared.clips != first:
        raise DataError(
            f"data.source: node {ranks.node} could read {len(prepared)} clips and left out {len(prepared.skipped)}, the first node others; "
            f"mend the files or the access to them, remove the cache {prepared.directory} on each node, and launch again"
        )


def _encoders_for_all(run: RunDirectory, stage: StageConfig, ranks: Ranks) -> Path:
    """Directory of encoders that the first rank made from the stage's clips, equal on every node: two machines may round differently."""
    folder = run.path / "encoders"
    if ranks.is_first_here:
        folder.mkdir(exist_ok=True)
    if ranks.is_first:
        for encoder in encoders.build(stage, open_clips(stage.data, stage.seed, run.recorded_data()), None):
            encoder.save(folder)
    ranks.barrier(lambda: run.heartbeat(0, "init"))
    for name in (encoders.AUTOENCODER_FILE, encoders.TEXT_FILE):
        content = ranks.hand_out((folder / name).read_bytes() if ranks.is_first else b"")
        if ranks.is_first_here:
            (folder / name).write_bytes(content)
    return folder


def _announce(trainer: Trainer) -> None:
    """What is about to run, for whoever reads the log."""
    stage, ranks, model, optimizer = trainer.stage, trainer.ranks, trainer.stage.model, trainer.stage.optimizer
    count = sum(weight.numel() for weight in trainer.model.parameters())
    trained = sum(weight.numel() for weight in trainer.model.parameters() if weight.requires_grad)
    rows = [
        ("model", f"STDiT {model.depth}x{model.width}, {model.heads} heads, {count:,} parameters, {trained:,} of them trained"),
        ("objective", f"{stage.objective.kind}, caption dropout {model.caption_dropout:g}, freeze {stage.freeze}"),
        *_said_of_clips(stage, ranks, [len(part) for part in trainer.prepared.parts], len(trainer.prepared.skipped), trainer.step),
        ("optimizer", f"AdamW, lr {optimizer.lr:g} ({optimizer.warmup_steps} warm-up, {optimizer.decay}), ema {stage.ema_decay:g}"),
        ("carried", ", ".join(trainer.start.carried) or "nothing"),
        ("reset", ", ".join(trainer.start.reset) or "nothing"),
    ]
    for name, value in rows:
        log.info("%-10s %s", name, value)
    if trainer.start.layout:
        log.info("%s", trainer.start.layout)


def _said_of_clips(stage: StageConfig, ranks: Ranks, counts: Sequence[int], skipped: int, step: int) -> list[tuple[str, str]]:
    """Clips, tokens and batch of each size, and which of them have fewer clips than a step takes."""
    rows, batches, repeats = [], [], []
    for bucket, clips, takes in zip(stage.buckets, counts, identity.global_batches(stage, ranks.world), strict=True):
        (frames, spatial), size = stage.tokens_of(bucket), f"{bucket.frames}x{bucket.height}x{bucket.width}"
        rows.append(("clips", f"{clips:,} of {size} pixels, {frames}x{spatial} tokens"))
        batches.append((size, f"{bucket.batch_size} x {_readers(stage, ranks)}"))
        if 0 < clips < takes:
            fact = f"bucket {size} has {clips} clips, a step takes {takes}: each step holds a clip more than once"
            repeats.append(("warning", fact))
    rows[-1] = ("clips", f"{rows[-1][1]}; {skipped} skipped")
    if len(batches) == 1:
        return [*rows, ("steps", f"{step} -> {stage.steps}, batch {batches[0][1]} on {_place(ranks)}"), *repeats]
    steps = ("steps", f"{step} -> {stage.steps} on {_place(ranks)}, each of one size")
    return [*rows, steps, *(("batch", f"{batch} of {size}") for size, batch in batches), *repeats]


def _readers(stage: StageConfig, ranks: Ranks) -> str:
    sharing = stage.parallel.ranks_a_clip
    readers = f"{ranks.world} ranks" if sharing == 1 else f"{ranks.world // sharing} groups of {sharing} ranks"
    return f"{readers} x {stage.accumulate} parts" if stage.accumulate > 1 else readers


def _place(ranks: Ranks) -> str:
    return f"{ranks.device}" if ranks.nodes == 1 else f"{ranks.device}, {ranks.nodes} nodes"


def _notice_signals() -> Notice:
    """SIGTERM and SIGINT mean: save at the next step boundary that all ranks agree on, and leave."""
    notice = Notice()

    def give(_number: int, _frame: FrameType | None) -> None:
        notice.given = True

    signal.signal(signal.SIGTERM, give)
    signal.signal(signal.SIGINT, give)
    return notice


def _classify(error: Exception) -> Kind:
    if isinstance(error, TrainerError):
        return error.kind
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or "DefaultCPUAllocator" in str(error):
        return "oom"
    return "disk" if checkpoint.is_disk_full(error) else "code"


def _born() -> float:
    """When this process started, in Unix seconds: the imports before `main` belong to its init."""
    started = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19]) / os.sysconf("SC_CLK_TCK")
    return time.time() - (time.clock_gettime(time.CLOCK_BOOTTIME) - started)


def run_reported(run: RunDirectory, notice: Notice) -> int:
    """`run_stage`, with every end but a peer's written to result.json. 0 completed or drained · 1 failed · 75 another rank ended."""
    try:
        run.reserve_result()
    except OSError as error:
        log.info("error: run directory %s: %s; nothing was started", run.path, error.strerror)
        return 1
    try:
        with join() as ranks:
            run_stage(run, ranks, notice, _born())
    except Exception as error:  # the boundary: whatever happened is reported, with its class
        if is_peer_lost(error) or isinstance(error, PeerFailed):
            log.info("rank %d: another rank ended (%s)", run.rank, str(error).splitlines()[0])
            return PEER_LOST
        kind = _classify(error)
        run.finish("failed", reason=f"{type(error).__name__}: {error}" if kind == "code" else str(error), kind=kind)
        log.info("error: rank %d: %s", run.rank, error, exc_info=kind == "code")
        return 1
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """See `run_reported`. The exit code of a launcher around it says less than `result.json`."""
    die_with_launcher()
    parser = argparse.ArgumentParser(prog="torchrun -m opensora.train", description="Run one stage of training in a run directory.")
    parser.add_argument("run_dir", type=Path, help="holds stage.yaml, and parent/ or checkpoints/ to start from")
    path = parser.parse_args(argv).run_dir
    logging.basicConfig(stream=sys.stdout, level=logging.INFO, format="%(message)s")
    rank = int(os.environ.get("RANK", "0"))
    return run_reported(RunDirectory(path, rank, lowest=rank - int(os.environ.get("LOCAL_RANK", "0"))), _notice_signals())


if __name__ == "__main__":
    code = main()
    logging.shutdown()
    sys.stdout.flush()
    os._exit(code)  # at once: taking the libraries down costs a second of every device, and aborts the process when a peer is gone
