"""One stage of training: `torchrun -m opensora.train RUN_DIR` (or plain `python -m` for one process).

Owns the loop: where a stage starts from, its steps, when it saves, drains and ends, and its report. All stages of a recipe run
here; what differs between them is data (`opensora.config`). Knows a run directory (docs/contracts.md, section 1) and nothing of
clusters, stores or trackers.

Invariants:
- A step is a function of (stage, weights, step, rank): noise, times and dropped captions come from a generator seeded with
  (seed, rank, step), clips from the position in the stream. So stopping anywhere and resuming gives the unbroken run's bits.
- The ranks exchange one buffer a step: gradients, loss, whether anybody was asked to drain, who saw a number that is not finite.
  They therefore always agree on what happens next.
- A stage ends on all nodes or on none: a node says `completed` or `drained` once every rank has come to the end of its work.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import math
import os
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from opensora import checkpoint, encoders, evaluate, guidance, objective, parallel, weights
from opensora.config import StageConfig
from opensora.data.latents import Prepared, prepare
from opensora.data.loader import Loader
from opensora.data.source import open_clips
from opensora.ema import EMA
from opensora.errors import ConfigError, Kind, NotFinite, ParentError, TrainerError
from opensora.model import STDiT
from opensora.optimizer import AdamW, learning_rate
from opensora.parallel import PeerLost, Ranks
from opensora.pictures import write_mp4, write_sheet
from opensora.run_directory import Phase, RunDirectory
from opensora.sample import Sampler, draw

if TYPE_CHECKING:
    from types import FrameType

log = logging.getLogger(__name__)

LINES = 40
"""Progress lines of a stage."""
SKIPPED = 20
"""Unreadable clips that are named in the log."""


def generator_for(seed: int, purpose: str, rank: int, step: int, device: torch.device) -> torch.Generator:
    """The source of a rank's random numbers in one step. A hash, so that (seed 1, rank 0) and (seed 0, rank 1) do not meet."""
    digest = hashlib.sha256(f"{purpose}/{seed}/{rank}/{step}".encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "big") >> 1)


# ------------------------------------------------------------------------------------------------------------------
# What a stage starts from
# ------------------------------------------------------------------------------------------------------------------

SAME_AS_PARENT = (
    "depth",
    "width",
    "heads",
    "mlp_ratio",
    "patch",
    "latent_channels",
    "caption_width",
    "caption_tokens",
    "temporal_position",
)
"""Of the model: what the weights' meaning depends on. The rest (scales, caption dropout) a stage may choose."""


@dataclass(frozen=True)
class Start:
    """Where a stage continues: tensors by checkpoint file, and how far it is. `carried` and `reset` go into CHECKPOINT.json."""

    tensors: Mapping[str, Mapping[str, Tensor]]
    encoders: Path | None
    """Directory of the encoders' files; none: they are made from the stage's own clips."""
    step: int = 0
    clips_seen: int = 0
    carried: tuple[str, ...] = ()
    reset: tuple[str, ...] = ()


def find_start(run: RunDirectory, stage: StageConfig) -> Start:
    """The newest checkpoint of this stage, else the parent's, else the configured import, else nothing.

    Raises:
        ParentError: what is there does not fit this stage.
    """
    own = checkpoint.latest(run.checkpoints)
    if own is not None:
        return _resume(own, stage)
    if run.parent is not None:
        return _chain(run.parent, stage)
    tables = f"position tables for {_size(stage)}"
    if stage.weights is not None:
        return Start({}, None, carried=(f"weights of {stage.weights}",), reset=(tables, "optimizer", "ema", "encoders"))
    return Start({}, None, reset=("weights", tables, "optimizer", "ema", "encoders"))


def _resume(path: Path, stage: StageConfig) -> Start:
    record, saved = checkpoint.read(path)
    if saved != stage:
        differ = [name for name in StageConfig.model_fields if getattr(saved, name) != getattr(stage, name)]
        raise ParentError(f"checkpoint {path}: made by another stage.yaml (different: {', '.join(differ)}); start the stage anew")
    tensors = {name: checkpoint.load(path, name) for name in checkpoint.TENSORS}
    return Start(tensors, path, record.step, record.clips_seen, record.carried, record.reset)


def _chain(path: Path, stage: StageConfig) -> Start:
    record, parent = checkpoint.read(path)
    if not record.complete:
        raise ParentError(f"parent {path}: it stopped at step {record.step} of {record.steps}; finish that stage first")
    pairs = [(f"model.{name}", getattr(stage.model, name), getattr(parent.model, name)) for name in SAME_AS_PARENT]
    pairs += [("objective.kind", stage.objective.kind, parent.objective.kind)]
    pairs += [("autoencoder", stage.autoencoder, parent.autoencoder), ("text", stage.text, parent.text)]
    for name, ours, theirs in pairs:
        if ours != theirs:
            raise ParentError(f"parent {path}: its {name} is {theirs}, this stage's is {ours}; no rule turns one into the other")
    source = stage.parent.weights
    chosen = checkpoint.load(path, source)
    tensors: dict[str, Mapping[str, Tensor]] = {"model": chosen, "ema": chosen}
    carried, reset = [f"weights ({source})", "autoencoder", "text encoder"], ["step", "data position", "ema (starts at the weights)"]
    if stage.parent.optimizer == "carry":
        tensors["optimizer"] = checkpoint.load(path, "optimizer")
        carried.append("optimizer")
    else:
        reset.append("optimizer")
    reset.append(f"position tables ({_size(parent)} -> {_size(stage)})")
    return Start(tensors, path, carried=tuple(carried), reset=tuple(reset))


def _size(stage: StageConfig) -> str:
    _, frames, rows, columns = stage.latent_shape
    return f"{frames}x{rows}x{columns}"


# ------------------------------------------------------------------------------------------------------------------
# The loop
# ------------------------------------------------------------------------------------------------------------------


class Exchange:
    """The one buffer that ranks add up in a step: every gradient (the parameters' `.grad` are views of it), then a few numbers."""

    def __init__(self, parameters: Sequence[nn.Parameter], ranks: Ranks) -> None:
        self._ranks = ranks
        sizes = [parameter.numel() for parameter in parameters]
        self._buffer = torch.zeros(sum(sizes) + 2 + ranks.world, device=ranks.device)
        self.gradients, self._extra = torch.split(self._buffer, [sum(sizes), 2 + ranks.world])
        for parameter, gradient in zip(parameters, torch.split(self.gradients, sizes), strict=True):
            parameter.grad = gradient.view_as(parameter)

    def clear(self) -> None:
        self._buffer.zero_()

    def average(self, loss: Tensor, drain: bool) -> tuple[float, bool, int | None]:
        """Mean gradients and loss over the ranks, whether anyone drains, and the first rank that saw a number that is not finite."""
        self._extra[0], self._extra[1] = loss.detach(), float(drain)
        self._extra[2 + self._ranks.rank] = (~(loss.detach() + self.gradients.sum()).isfinite()).float()
        self._ranks.sum_(self._buffer)
        self._buffer /= self._ranks.world
        mean, drains, *bad = self._extra.tolist()
        return mean, drains > 0, next((rank for rank, flag in enumerate(bad) if flag), None)


class Trainer:
    """The pieces of one stage, put together for one rank."""

    def __init__(self, run: RunDirectory, stage: StageConfig, ranks: Ranks, notice: Notice, prepared: Prepared, start: Start) -> None:
        self.run, self.stage, self.ranks, self.notice, self.prepared = run, stage, ranks, notice, prepared
        self.loader = Loader(prepared, seed=stage.seed, batch_size=stage.batch_size, rank=ranks.rank, world=ranks.world)
        self.objective = objective.build(stage.objective)
        self.model = _model(stage, ranks.device, start)
        self.names = {name: weight for name, weight in self.model.named_parameters() if weight.requires_grad}
        self.exchange = Exchange(list(self.names.values()), ranks)
        self.optimizer = AdamW(self.names, stage.optimizer)
        self.ema = EMA(self.model, stage.ema_decay)
        if "ema" in start.tensors:
            self.ema.load(start.tensors["ema"])
        if "optimizer" in start.tensors:
            self.optimizer.load(start.tensors["optimizer"])
        self.step, self.clips_seen, self.start = start.step, start.clips_seen, start
        self.autocast = torch.autocast(ranks.device.type, torch.bfloat16, enabled=ranks.device.type == "cuda" and stage.dtype == "bf16")
        self.booked = self.began = time.time()  # end of the last interval that metrics.jsonl accounts for; start of the loop

    def train(self) -> bool:
        """Steps until the stage is complete or somebody asks to drain; a checkpoint at the end either way.

        Returns:
            whether it was drained.

        Raises:
            NotFinite: nothing was saved since.
        """
        drained, saved = False, self.step if checkpoint.directory(self.run.checkpoints, self.step).is_dir() else -1
        while self.step < self.stage.steps and not drained:
            line, drained = self.train_step()
            checkpoint_s = 0.0
            if drained or self.step % self.stage.checkpoint.every_steps == 0 or self.step == self.stage.steps:
                checkpoint_s, saved = self.save(), self.step
            self._report(line, checkpoint_s)
        if saved != self.step:  # a stage without steps
            self.save()
            self.book("checkpoint")
        return drained and self.step < self.stage.steps

    def train_step(self) -> tuple[dict[str, float], bool]:
        """One optimizer step; its line of metrics, and whether the ranks agreed to drain after it."""
        began = time.time()
        batch = self.loader.batch(self.clips_seen)
        clean, vectors, mask = (part.to(self.ranks.device) for part in (batch.latents, batch.vectors, batch.mask))
        waited = time.time() - began

        generator = generator_for(self.stage.seed, "step", self.ranks.rank, self.step, self.ranks.device)
        moment = self.objective.draw_time(len(clean), generator)
        noise = torch.randn(clean.shape, generator=generator, device=clean.device)
        drop = torch.rand(len(clean), generator=generator, device=clean.device) < self.stage.model.caption_dropout

        self.exchange.clear()
        with self.autocast:
            network = guidance.conditional(self.model, vectors, mask, drop)
            loss = self.objective.loss(network, clean, moment, noise).mean()
        loss.backward()  # type: ignore[no-untyped-call]
        mean, drained, bad = self.exchange.average(loss, self.notice.given or self.run.drain_asked())
        norm = float(self.exchange.gradients.norm())
        if bad is not None or not math.isfinite(norm):
            raise self._not_finite(bad or 0, mean, norm)

        lr = learning_rate(self.stage.optimizer, self.step, self.stage.steps)
        if self.stage.optimizer.grad_clip is not None:
            self.exchange.gradients *= min(1.0, self.stage.optimizer.grad_clip / (norm + 1e-6))
        self.optimizer.step(lr)
        self.ema.update(self.step)

        self.step += 1
        self.clips_seen += self.loader.clips_per_step
        frames, spatial = self.stage.tokens
        tokens = self.loader.clips_per_step * frames * spatial
        return {
            "step": self.step,
            "loss": mean,
            "lr": lr,
            "grad_norm": norm,
            "clips": self.loader.clips_per_step,
            "tokens": tokens,
            "data_wait_s": waited,
        }, drained

    def _not_finite(self, rank: int, loss: float, norm: float) -> NotFinite | PeerLost:
        if rank != self.ranks.rank:
            return PeerLost(f"rank {rank} saw a number that is not finite")
        return NotFinite(
            f"step {self.step + 1}: loss {loss} and gradient norm {norm} are not both finite; this step was not taken and not saved, "
            f"lower optimizer.lr (now {self.stage.optimizer.lr:g}) or look at the clips"
        )

    def save(self) -> float:
        """Write a checkpoint of this step, each node its share of the files, by its first rank; seconds that it took.

        Raises:
            NotFinite: the weights are not: a gradient was finite and its update was not.
        """
        if not self.ranks.is_first_here:
            return 0.0
        began = time.time()
        for name, weight in self.names.items():
            if not weight.isfinite().all():
                raise NotFinite(f"step {self.step}: weight {name} is not finite; nothing was saved, lower optimizer.lr")
        self.run.heartbeat(self.step, "checkpoint")
        tensors = {"model": self.model.state_dict(), "ema": self.averaged(), "optimizer": self.optimizer.state()}
        checkpoint.save(
            self.run.checkpoints,
            self.stage,
            tensors,
            self.prepared.directory,
            step=self.step,
            world_size=self.ranks.world,
            clips_seen=self.clips_seen,
            carried=self.start.carried,
            reset=self.start.reset,
            node=self.ranks.node,
            nodes=self.ranks.nodes,
        )
        return time.time() - began

    def averaged(self) -> dict[str, Tensor]:
        """The moving average as a state dict: what is sampled from, and what the next stage starts from."""
        return self.model.state_dict() | self.ema.shadow

    def judge(self) -> dict[str, float]:
        """Readings of the finished stage on generated clips, the work split over the ranks; the same on every rank but for the ceilings."""
        config = self.stage.evaluate
        sampler = self._sampler()
        if self.stage.prompts and self.ranks.is_first:
            _draw_samples(self.run.samples, sampler, self.stage, config.frames if config else self.stage.data.frames)
        if config is None:
            return {}

        def generate(captions: Sequence[str], frames: int, seeds: Sequence[int]) -> Tensor:
            self.run.heartbeat(self.step, "evaluate")
            return sampler.generate(captions, frames, seeds)

        rank, world = self.ranks.rank, self.ranks.world
        images_too = self.stage.data.frames == 1
        video = self.ranks.sum_(evaluate.tally(generate, config, images=False, rank=rank, world=world))
        images = self.ranks.sum_(evaluate.tally(generate, config, images=True, rank=rank, world=world)) if images_too else None
        if not self.ranks.is_first:
            return {}
        return evaluate.readings(video, images, evaluate.ceilings(self.stage, self.prepared.autoencoder, images=images_too))

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

    def _sampler(self) -> Sampler:
        return Sampler(self.stage, self.averaged(), self.prepared.autoencoder, self.prepared.text, device=self.ranks.device)

    def _report(self, line: dict[str, float], checkpoint_s: float) -> None:
        self.run.heartbeat(self.step, "train")
        now = time.time()
        line |= {"time": now, "checkpoint_s": checkpoint_s, "step_s": now - self.booked - line["data_wait_s"] - checkpoint_s}
        self.booked = now
        self.run.record(line)
        done, elapsed = self.step - self.start.step, now - self.began
        if self.ranks.is_first and (self.step % max(1, self.stage.steps // LINES) == 0 or self.step == self.stage.steps):
            log.info(
                "step %6d/%d  loss %.4f  lr %.2e  grad %.2f  %6.1f clips/s  ETA %s",
                self.step,
                self.stage.steps,
                line["loss"],
                line["lr"],
                line["grad_norm"],
                line["clips"] * done / elapsed,
                _clock(elapsed / done * (self.stage.steps - self.step)),
            )


def _model(stage: StageConfig, device: torch.device, start: Start) -> STDiT:
    try:
        model = STDiT(
            stage.model,
            stage.latent_shape[1:],
            stage.out_channels,
            grad_checkpoint=stage.grad_checkpoint,
            generator=generator_for(stage.seed, "weights", 0, 0, torch.device("cpu")),
        )
    except ValueError as error:
        raise ConfigError(f"model: {error}") from error
    if "model" in start.tensors:
        for name in ("model", "ema"):
            checkpoint.compare(model.state_dict(), start.tensors[name], f"{name} weights to start from")
        model.load_state_dict(start.tensors["model"])
    elif stage.weights is not None:
        report = weights.load_file(Path(stage.weights), model)
        log.info("weights: %d tensors of %s (%s); recomputed: %s", len(report.mapped), stage.weights, report.format, report.recomputed)
    if stage.freeze == "temporal":
        model.freeze_temporal()
    return model.to(device).train()


def _draw_samples(folder: Path, sampler: Sampler, stage: StageConfig, frames: int) -> None:
    folder.mkdir(exist_ok=True)
    seeds = [generator_for(stage.seed, "sample", 0, i, torch.device("cpu")).initial_seed() for i in range(len(stage.prompts))]
    clips = draw(sampler, stage.prompts, frames, seeds)
    names = [f"{i:02d}-{'-'.join(prompt.lower().split())[:60]}.mp4" for i, prompt in enumerate(stage.prompts)]
    for name, clip in zip(names, clips, strict=True):
        write_mp4(folder / name, clip)
    write_sheet(folder / "sheet.png", clips, stage.prompts)
    listing = [{"file": name, "prompt": prompt, "seed": seed} for name, prompt, seed in zip(names, stage.prompts, seeds, strict=True)]
    content = {"schema": 1, "frames": frames, "sampling": stage.sampling.model_dump(mode="json"), "clips": listing}
    (folder / "samples.json").write_text(json.dumps(content, indent=1) + "\n")


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
    start = find_start(run, stage)
    prepared = _prepare(run, stage, ranks, start)
    trainer = Trainer(run, stage, ranks, notice, prepared, start)
    if ranks.is_first:
        _announce(trainer)
    trainer.begin(born)

    drained, readings = trainer.train(), {}
    if not drained:
        readings = trainer.judge()
        trainer.book("evaluate")
    ranks.barrier()  # every node has written its files, and the first one is done with judging
    if ranks.is_first_here:
        run.finish("drained" if drained else "completed", evaluation=readings)
    if ranks.is_first:
        log.info("%s at step %d  %s", "drained" if drained else "completed", trainer.step, _readings(readings))


def _prepare(run: RunDirectory, stage: StageConfig, ranks: Ranks, start: Start) -> Prepared:
    """The stage's clips, encoded once on each node."""
    carried = start.encoders
    if carried is None and ranks.nodes > 1:
        carried = _encoders_for_all(run, stage, ranks)
    directory = prepare(stage, run.latents, carried) if ranks.is_first_here else ""
    prepared = Prepared.open(Path(ranks.share(str(directory))))
    for clip, reason in list(prepared.skipped.items())[:SKIPPED]:
        log.info("skipped %s: %s", clip, reason)
    return prepared


def _encoders_for_all(run: RunDirectory, stage: StageConfig, ranks: Ranks) -> Path:
    """Directory of encoders that the first rank made from the stage's clips, equal on every node: two machines may round differently."""
    folder = run.path / "encoders"
    if ranks.is_first_here:
        folder.mkdir(exist_ok=True)
    if ranks.is_first:
        for encoder in encoders.build(stage, open_clips(stage.data, stage.seed), None):
            encoder.save(folder)
    for name in (encoders.AUTOENCODER_FILE, encoders.TEXT_FILE):
        content = ranks.hand_out((folder / name).read_bytes() if ranks.is_first else b"")
        if ranks.is_first_here:
            (folder / name).write_bytes(content)
    return folder


def _announce(trainer: Trainer) -> None:
    """What is about to run, for whoever reads the log."""
    stage, ranks, model, optimizer = trainer.stage, trainer.ranks, trainer.stage.model, trainer.stage.optimizer
    count = sum(weight.numel() for weight in trainer.model.parameters())
    trained = sum(weight.numel() for weight in trainer.names.values())
    (frames, spatial), pixels = stage.tokens, f"{stage.data.frames}x{stage.data.height}x{stage.data.width}"
    rows = {
        "model": f"STDiT {model.depth}x{model.width}, {model.heads} heads, {count:,} parameters, {trained:,} of them trained",
        "objective": f"{stage.objective.kind}, caption dropout {model.caption_dropout:g}, freeze {stage.freeze}",
        "clips": f"{len(trainer.prepared):,} of {pixels} pixels, {frames}x{spatial} tokens; {len(trainer.prepared.skipped)} skipped",
        "steps": f"{trainer.step} -> {stage.steps}, batch {stage.batch_size} x {ranks.world} ranks on {_place(ranks)}",
        "optimizer": f"AdamW, lr {optimizer.lr:g} ({optimizer.warmup_steps} warm-up, {optimizer.decay}), ema {stage.ema_decay:g}",
        "carried": ", ".join(trainer.start.carried) or "nothing",
        "reset": ", ".join(trainer.start.reset) or "nothing",
    }
    for name, value in rows.items():
        log.info("%-10s %s", name, value)


def _place(ranks: Ranks) -> str:
    return f"{ranks.device}" if ranks.nodes == 1 else f"{ranks.device}, {ranks.nodes} nodes"


def _readings(readings: Mapping[str, float]) -> str:
    return "  ".join(f"{name} {value:.3f}" for name, value in readings.items())


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
        with parallel.join() as ranks:
            run_stage(run, ranks, notice, _born())
    except PeerLost as error:
        log.info("rank %d: another rank ended (%s)", run.rank, str(error).splitlines()[0])
        return parallel.PEER_LOST
    except Exception as error:  # the boundary: whatever happened is reported, with its class
        kind = _classify(error)
        run.finish("failed", reason=f"{type(error).__name__}: {error}" if kind == "code" else str(error), kind=kind)
        log.info("error: rank %d: %s", run.rank, error, exc_info=kind == "code")
        return 1
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """See `run_reported`. The exit code of a launcher around it says less than `result.json`."""
    parallel.die_with_launcher()
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
