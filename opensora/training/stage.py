"""One stage of training on one rank, from its run directory to its report.

Owns the order: find the start, encode the clips, train, wait for the other ranks, draw samples, write `result.json`; and the class of an
end that went wrong. Refuses to know a launcher, signals or exit codes: `opensora.train` (the command) and `opensora.api` do.

Invariants:
- A stage ends on all nodes or on none: a node reports `completed` or `drained` only after every rank has finished its work.
- What comes after the training decides nothing: a sample that cannot be drawn is a warning (`opensora.training.after_training`).
"""

from __future__ import annotations

import logging
from contextlib import suppress
from functools import partial

import torch

from opensora.checkpoint import reader as checkpoint
from opensora.checkpoint.writer import PeerFailed
from opensora.distributed.ranks import PeerLost, Ranks, is_peer_lost
from opensora.errors import Kind, TrainerError
from opensora.training import after_training
from opensora.training.announcement import announce
from opensora.training.clips import encoded_clips
from opensora.training.run_directory import RunDirectory, Status
from opensora.training.start import find_start
from opensora.training.trainer import DrainRequest, Trainer

log = logging.getLogger(__name__)


def run_stage(run: RunDirectory, ranks: Ranks, drain: DrainRequest, born: float) -> Status:
    """Train one stage, evaluate it and write `result.json`. All ranks call this.

    Args:
        born: when this process began with the stage, in Unix seconds; the time since then is booked as `init`.

    Returns:
        `completed` or `drained`.

    Raises:
        TrainerError: the stage ended otherwise; `report_failure` writes that down.
        PeerLost, PeerFailed: another rank ended, and reports why.
    """
    stage = run.stage()
    run.heartbeat(0, "init")
    start = find_start(run, stage, ranks.world)
    prepared = encoded_clips(run, stage, ranks, start)
    trainer = Trainer(run, stage, ranks, drain, prepared, start)
    del start
    if ranks.is_first:
        announce(stage, ranks, trainer.model, prepared, trainer.start)
    run.heartbeat(trainer.step, "init")
    trainer.metrics.begin(born)

    drained, shown = _train(trainer), after_training.Shown()
    trainer.wait_for_all()  # every node has written its files: they decide, and nothing after them
    if not drained and stage.judging == "gang" and after_training.is_asked(stage):
        shown = _show(trainer)
    status: Status = "drained" if drained else "completed"
    if ranks.is_first_here:
        run.finish(status, evaluation=shown.readings, warnings=shown.warnings, remarks=prepared.usage.sentences())
    if ranks.is_first:
        log.info("%s at step %d  %s", status, trainer.step, after_training.described(shown.readings))
    return status


def _train(trainer: Trainer) -> bool:
    """`Trainer.train`. If a step fails, a checkpoint that is being written is finished first."""
    try:
        with trainer.loader:
            return trainer.train()
    except Exception:
        try:  # a checkpoint that is being written when a step fails is as good as any other; if it fails too, it failed first
            trainer.saver.wait(trainer.beat)
        except PeerFailed as error:
            log.info("the checkpoint that was being written is lost: %s", error)
        raise


def _show(trainer: Trainer) -> after_training.Shown:
    """Samples and readings of the finished stage. Raises nothing."""
    run, ranks = trainer.run, trainer.ranks
    shown = after_training.show(run, trainer.stage, ranks, step=trainer.step, prepared=trainer.prepared, averaged=trainer.strategy.averaged)
    with suppress(OSError):
        trainer.metrics.book("evaluate")
    with suppress(PeerLost):  # the first rank is done with drawing and judging: if another one left before, torchrun would end the first
        ranks.barrier(partial(after_training.alive, run, trainer.step))
    return shown


def is_another_ranks(error: Exception) -> bool:
    """Whether a stage ended here because another rank ended. That one reports why; this one reports nothing."""
    return is_peer_lost(error) or isinstance(error, PeerFailed)


def report_failure(run: RunDirectory, error: Exception) -> Kind:
    """Write `failed` with its class into `result.json`, unless another rank did. Returns the class.

    Raises:
        OSError: the file cannot be written.
    """
    kind = classify(error)
    run.finish("failed", reason=f"{type(error).__name__}: {error}" if kind == "code" else str(error), kind=kind)
    return kind


def classify(error: Exception) -> Kind:
    """The class of an end, as `result.json` names it."""
    if isinstance(error, TrainerError):
        return error.kind
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or "DefaultCPUAllocator" in str(error):
        return "oom"
    return "disk" if checkpoint.is_disk_full(error) else "code"
