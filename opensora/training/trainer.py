"""The loop of a stage on one rank: its steps, when it saves, and when it ends.

Owns the optimizer step and the agreement of the ranks on what happens next. Refuses to choose where a stage starts (`start`), to read clips
(`clips`), to build the network (`network`) and to report an end (`stage`).

Invariants:
- A step is a function of (stage, weights, step, data-parallel rank). Noise, times and dropped captions come from a generator seeded with
  (seed, rank, step); clips come from the position in the stream. So a run that stops anywhere and resumes has the bits of the unbroken run.
  Ranks that share a clip have the same data-parallel rank, and so the same numbers. A step in several parts (`accumulate`) equals a step
  of as many times the ranks: part j of rank r has the clips and the numbers of data-parallel rank r x parts + j.
- The gradients of a step travel together with its loss, with whether anybody asked to drain, and with which rank saw a number that is not
  finite. The ranks therefore always agree on what happens next.
- The host never waits for the GPU within a step: it reads the metrics of a step when the next one is in flight.
"""

from __future__ import annotations

import math
import time
from collections import deque
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from opensora.checkpoint import reader as checkpoint
from opensora.checkpoint.writer import Saver
from opensora.config import StageConfig
from opensora.diffusion import given_frames, guidance, objective
from opensora.distributed import parallel
from opensora.distributed.ranks import PeerLost, Ranks
from opensora.errors import LossSpike, NotFinite
from opensora.latents.loader import Ahead, Batch, Loader
from opensora.latents.prepared import Prepared
from opensora.model import routing
from opensora.optim.adamw import learning_rate
from opensora.training import network
from opensora.training.loss_spike import SPIKES, LossWindow
from opensora.training.metrics import Metrics
from opensora.training.run_directory import RunDirectory
from opensora.training.seeds import generator_for
from opensora.training.start import Start


@dataclass
class DrainRequest:
    """Whether this process was asked to save and leave. Signal handlers set it; the `drain` file in the run directory asks too."""

    made: bool = False


@dataclass
class Step:
    """A step in flight: its metrics are still on the device."""

    number: int
    """Of the step, from 1."""
    lr: float
    clips: int
    """Of all ranks and parts."""
    tokens: int
    """Of all ranks and parts."""
    data_wait_s: float
    """Seconds that this rank waited for its clips."""
    metrics: Tensor
    """(3 + world,): the norm of the gradient; then, as sums over the ranks, the loss, how many ranks were asked to drain, and for each rank
    1 if it saw a number that is not finite."""
    arrived: torch.cuda.Event | None
    """When `metrics` has arrived on the CPU. None: it is there."""


class Trainer:
    """Everything that one rank needs to train one stage."""

    def __init__(self, run: RunDirectory, stage: StageConfig, ranks: Ranks, drain: DrainRequest, prepared: Prepared, start: Start) -> None:
        """Build the network and its strategy, and load what the stage starts from. All ranks call this together.

        Raises:
            ConfigError: the model or the division of the ranks does not work as configured.
            ParentError: the weights do not fit.
            OutOfMemory: the device, or the host's memory for the copy of a checkpoint, is too small.
        """
        self.run, self.stage, self.ranks, self.drain, self.prepared = run, stage, ranks, drain, prepared
        self.data_rank, data_world = parallel.data_ranks(ranks, stage.parallel.ranks_per_clip)
        loader = Loader(prepared, seed=stage.seed, rank=self.data_rank, world=data_world, parts=stage.accumulate)
        self.loader = Ahead(loader, ranks.device)
        self.objective = objective.build(stage.objective)
        self.model = network.build(stage, ranks, start, prepared)
        self.strategy = parallel.build(self.model, stage, ranks)
        if start.reader is not None:
            self.strategy.load(start.reader, ema=start.ema, optimizer=start.optimizer)
        self.start = replace(start, reader=None)  # as long as its files are mapped, their disk is not free
        self.step = start.step
        self.seen = start.seen if start.seen is not None else self.loader.start
        writer = self.strategy.writer
        here = tuple(writer(rank) for rank in ranks.here)
        self.saver = Saver(run.checkpoints, stage, writer=writer(ranks.rank), writers=ranks.world, here=here, device=ranks.device)
        self.saver.reserve(self.strategy.shards())
        ranks.barrier()  # the first rank of a node has removed what a killed run left: nobody saves before that
        half = ranks.device.type == "cuda" and stage.dtype == "bf16"
        self.autocast = torch.autocast(ranks.device.type, torch.bfloat16, enabled=half)
        self.in_flight: deque[Step] = deque()
        self.most_in_flight = 1 if ranks.device.type == "cuda" else 0  # while the next step is launched; a CPU has none
        self.losses = LossWindow(stage.loss_spike)
        self.metrics = Metrics(run, first_step=start.step, steps=stage.steps, in_log=ranks.is_first)

    def train(self) -> bool:
        """Run optimizer steps until the stage is complete or a drain is requested; save at the end.

        Returns:
            True if drained: the stage is not complete.

        Raises:
            NotFinite, LossSpike: the training went wrong; nothing was saved since.
            DiskFull: a checkpoint could not be written; the earlier ones are there.
            PeerLost, PeerFailed: another rank ended.
        """
        drained, saved = False, self.step if checkpoint.directory(self.run.checkpoints, self.step).is_dir() else -1
        while self.step < self.stage.steps and not drained:
            self.saver.check()
            self.launch()
            due = self.step % self.stage.checkpoint.every_steps == 0 or self.step == self.stage.steps
            lines, drained = self.settle(0 if due else self.most_in_flight)
            checkpoint_s = 0.0
            if due or drained:
                lines += self.settle(0)[0]
                checkpoint_s, saved = self.save(), self.step
            self.metrics.report(lines, checkpoint_s)
            self.run.heartbeat(self.step, "train")
        if saved != self.step:  # a stage without steps
            self.save()
        self.saver.wait(self._stand_still)
        self.metrics.book("checkpoint")
        return drained and self.step < self.stage.steps

    def launch(self) -> None:
        """Launch one optimizer step. When this returns, the device may have done none of it yet.

        Raises:
            DataError: a file of the encoded clips was cut.
            PeerLost: another rank ended.
        """
        flags = torch.zeros(2 + self.ranks.world, device=self.ranks.device)
        parts, data_wait_s = self.stage.accumulate, 0.0
        for part in range(parts):
            if part:
                self.run.heartbeat(self.step, "train")
            began = time.time()
            batch = self.loader.batch(self.seen, part).to(self.ranks.device)
            data_wait_s += time.time() - began
            loss = self._loss(batch, part) / parts
            self.strategy.backward(loss, first=part == 0, last=part == parts - 1)
            flags[0] += loss.detach()
        flags[1] = float(self.drain.made or self.run.drain_asked())
        flags[2 + self.ranks.rank] = ~(flags[0].isfinite() & self.strategy.finite())
        flags = self.strategy.reduce(flags)
        norm = self.strategy.norm()

        lr = learning_rate(self.stage.optimizer, self.step, self.stage.steps)
        clip = self.stage.optimizer.grad_clip
        scale = torch.ones_like(norm) if clip is None else (clip / (norm + 1e-6)).clamp(max=1)
        self.saver.ready()  # the background may still copy the weights as they are
        self.strategy.step(lr, scale, self.step)

        clips = self.loader.clips(self.seen)
        frames, spatial = self.stage.tokens_of(self.stage.buckets[batch.bucket])
        metrics, arrived = torch.cat([norm[None], flags]), None
        if self.ranks.device.type == "cuda":  # into page-locked memory: the host would wait for a copy into any other
            metrics = torch.empty(metrics.shape, pin_memory=True).copy_(metrics, non_blocking=True)
            arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            arrived.record()
        self.step += 1
        self.seen = self.loader.after(self.seen)
        self.in_flight.append(Step(self.step, lr, clips, clips * frames * spatial, data_wait_s, metrics, arrived))

    def _loss(self, batch: Batch, part: int) -> Tensor:
        """0-dim mean loss of this rank's clips of one part of a step."""
        clean = batch.latents
        generator = generator_for(self.stage.seed, "step", self.data_rank * self.stage.accumulate + part, self.step, self.ranks.device)
        moment = self.objective.draw_time(len(clean), generator)
        noise = torch.randn(clean.shape, generator=generator, device=clean.device)
        drop = torch.rand(len(clean), generator=generator, device=clean.device) < self.stage.model.caption_dropout
        given = None
        if self.stage.masks is not None:
            given = given_frames.draw(self.stage.masks, len(clean), clean.shape[2], generator, self.stage.model.patch[0])
        model: guidance.CaptionedNetwork = self.strategy.model
        if self.stage.routing is not None:
            tubes = self.stage.tokens_of(self.stage.buckets[batch.bucket])[1]
            route = routing.draw(self.stage.routing, self.stage.model.depth, len(clean), tubes, generator)
            model = partial(self.strategy.model, route=route)
        with self.autocast:
            conditioned = guidance.conditional(model, batch.vectors, batch.mask, drop, given)
            return self.objective.loss(conditioned, clean, moment, noise, given).mean()

    def settle(self, most: int) -> tuple[list[dict[str, float]], bool]:
        """Read the metrics of the oldest steps until at most `most` steps are in flight.

        Returns:
            A line of metrics for each step that was read, and whether the ranks agreed to drain.

        Raises:
            NotFinite, LossSpike: on the rank that reports it.
            PeerLost: on the other ranks.
        """
        lines, drained = [], False
        while len(self.in_flight) > most:
            step = self.in_flight.popleft()
            if step.arrived is not None:
                step.arrived.synchronize()
            norm, loss, drains, *bad = step.metrics.tolist()
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
                    "data_wait_s": step.data_wait_s,
                    "time": time.time(),
                }
            )
        return lines, drained

    def _spiked(self, step: int, loss: float) -> LossSpike | PeerLost:
        if not self.ranks.is_first:
            return PeerLost("the loss left its range; the first rank reports it")
        return LossSpike(
            f"step {step}: loss {loss:.4g}, for the {SPIKES}rd time in a row above {self.stage.loss_spike:g} times the median of the steps "
            f"before ({self.losses.median:.4g}), with optimizer.lr {self.stage.optimizer.lr:g}"
        )

    def _not_finite(self, step: int, blamed: int | None, loss: float, norm: float) -> NotFinite | PeerLost:
        """What this rank raises: NotFinite if it saw the number first, else PeerLost. If no rank can be blamed, the first rank reports."""
        if (blamed or 0) != self.ranks.rank:
            return PeerLost(f"a number is not finite; rank {blamed or 0} reports it")
        unknown = " on some rank (gradients are summed before they are looked at)" if blamed is None and self.ranks.world > 1 else ""
        return NotFinite(
            f"step {step}: loss {loss} and gradient norm {norm} are not both finite{unknown}, with optimizer.lr "
            f"{self.stage.optimizer.lr:g}; this step was not taken and not saved"
        )

    def save(self) -> float:
        """Begin a checkpoint of this step; each rank saves its rows.

        Returns:
            Seconds that training stood still for it.

        Raises:
            DiskFull, NotFinite, PeerFailed: the save before this one failed, or this one did.
        """
        began = time.time()
        self.beat()
        self.saver.wait(self.beat)
        self.saver.save(
            self.strategy.shards(),
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
        """Write a heartbeat: this rank lives while it waits for a disk."""
        self.run.heartbeat(self.step, "checkpoint")

    def wait_for_all(self) -> None:
        """Return when every rank has written its files.

        A rank that waits stands still for a save, and books that time as it goes on: the agent gives up a node that is silent for long.

        Raises:
            PeerLost: another rank ended.
        """

        def wait() -> None:
            with suppress(OSError):  # the files are there: a disk that is full by now takes nothing away from them
                self._stand_still()

        if self.ranks.world > 1:
            self.ranks.barrier(wait)
            wait()

    def _stand_still(self) -> None:
        self.beat()
        self.metrics.book("checkpoint")
