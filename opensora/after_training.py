"""What a finished stage shows of itself: clips for its prompts, and readings of how well it obeys them.

Owns the order of both, the sharing of the work over the ranks, and the law that none of it decides about the stage: its weights are saved
when this begins, and whatever fails here (an exception of any kind, memory, a full disk, a lost rank) becomes a warning. Refuses to
sample (`sample`), to judge (`evaluate`) and to write pictures (`pictures`).

No rank waits for one that has failed: ranks meet in `Ranks.tell` alone, over the network of the host and not in the middle of anything,
and each comes there whatever happened to it. The one other exchange gathers a divided moving average; before it all ranks find out
whether each of them has the memory.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

import torch
from torch import Tensor

from opensora.config import StageConfig
from opensora.data.latents import Prepared
from opensora.errors import TrainerError
from opensora.file_names import file_names
from opensora.flops import parameters
from opensora.pictures import write_mp4, write_sheet, written
from opensora.ranks import Ranks, is_peer_lost
from opensora.run_directory import RunDirectory
from opensora.sample import Sampler, draw
from opensora.seeds import generator_for

log = logging.getLogger(__name__)

LONGEST_TROUBLE = 300
"""Characters of one rank's trouble that the others hear."""
WHOLE = "the weights are saved and are the stage's result"


@dataclass
class Shown:
    """Of one stage, for `result.json`."""

    readings: dict[str, float] = field(default_factory=dict)
    """On the first rank; the others have none."""
    warnings: list[str] = field(default_factory=list)
    """What could not be shown, and why. Equal on all ranks, but for what the first one drew."""


@dataclass
class _Work:
    """What `show` needs of a trainer, and what it has found."""

    run: RunDirectory
    stage: StageConfig
    ranks: Ranks
    step: int
    prepared: Prepared
    averaged: Callable[[], dict[str, Tensor]]
    shown: Shown

    def alive(self) -> None:
        alive(self.run, self.step)

    def warn(self, what: str, trouble: str) -> None:
        self.shown.warnings.append(f"{what}: {trouble}; {WHOLE}")
        if self.ranks.is_first:
            log.info("warning: %s", self.shown.warnings[-1])


def alive(run: RunDirectory, step: int) -> None:
    """A heartbeat, if it can be written."""
    with suppress(OSError):
        run.heartbeat(step, "evaluate")


def show(
    run: RunDirectory, stage: StageConfig, ranks: Ranks, *, step: int, prepared: Prepared, averaged: Callable[[], dict[str, Tensor]]
) -> Shown:
    """Draw and judge with the moving average. Called by all ranks, once the weights are saved on every node; raises nothing.

    Args:
        averaged: `parallel.Strategy.averaged`.
    """
    work = _Work(run, stage, ranks, step, prepared, averaged, Shown())
    if not stage.prompts and stage.evaluate is None:
        return work.shown
    try:
        _show(work)
    except Exception as error:  # noqa: BLE001 - a rank that is gone; anything else is caught where it happens
        work.warn("samples and readings", "another rank ended" if is_peer_lost(error) else _said(error))
    return work.shown


def _show(work: _Work) -> None:
    sampler = _sampler(work)
    if sampler is None:
        return
    if work.stage.prompts and work.ranks.is_first:
        with _caught() as trouble:
            _draw(work, sampler)
        if trouble:
            work.warn("no samples were drawn", trouble[0])
    if work.stage.evaluate is not None:
        _judge(work, sampler)


def _sampler(work: _Work) -> Sampler | None:
    """Of the moving average; none, with a warning, where some rank cannot have it."""
    stage, ranks = work.stage, work.ranks
    with _caught() as trouble:
        if ranks.world > 1 and stage.parallel.strategy != "ddp":  # ddp has it already
            torch.empty(4 * parameters(stage.model, stage.out_channels), dtype=torch.uint8, device=ranks.device)
    if _troubles(work, "samples and readings", trouble):
        return None
    sampler = None
    with _caught() as trouble:
        weights = work.averaged()
        prepared = work.prepared
        sampler = Sampler(stage, weights, prepared.autoencoder, prepared.text, device=ranks.device)
    return None if _troubles(work, "samples and readings", trouble) else sampler


def _troubles(work: _Work, what: str, own: Sequence[str]) -> bool:
    """Whether any rank has one; then all of them warn."""
    trouble = _first_trouble(work.ranks.tell(own[0] if own else "", work.alive))
    if trouble:
        work.warn(what, trouble)
    return bool(trouble)


def _first_trouble(said: Sequence[str]) -> str:
    """Of what each rank says of itself."""
    return next((f"rank {rank}: {text}" if len(said) > 1 else text for rank, text in enumerate(said) if text), "")


def _draw(work: _Work, sampler: Sampler) -> None:
    """Clips, a sheet of them, and what was asked for."""
    stage, folder = work.stage, work.run.samples
    frames = stage.evaluate.frames if stage.evaluate else stage.data.frames
    folder.mkdir(exist_ok=True)
    seeds = [generator_for(stage.seed, "sample", 0, i, torch.device("cpu")).initial_seed() for i in range(len(stage.prompts))]
    clips = draw(sampler, stage.prompts, frames, seeds, beat=work.alive)
    names = file_names(stage.prompts, ".mp4")
    for name, clip in zip(names, clips, strict=True):
        with written(folder / name) as path:
            write_mp4(path, clip)
    with written(folder / "sheet.png") as path:
        write_sheet(path, clips, stage.prompts)
    listing = [{"file": name, "prompt": prompt, "seed": seed} for name, prompt, seed in zip(names, stage.prompts, seeds, strict=True)]
    content = {"schema": 1, "frames": frames, "sampling": stage.sampling.model_dump(mode="json"), "clips": listing}
    with written(folder / "samples.json") as path:
        path.write_text(json.dumps(content, indent=1) + "\n")


def _judge(work: _Work, sampler: Sampler) -> None:
    """Readings on generated clips, the work split over the ranks."""
    ranks, images_too = work.ranks, work.stage.data.frames == 1
    tallies: list[list[int]] = []
    with _caught() as trouble:
        tallies = [_tally(work, sampler, images=images).tolist() for images in (False, True)[: 1 + images_too]]
    said = ranks.tell(json.dumps({"tallies": tallies, "trouble": trouble[0] if trouble else ""}, ensure_ascii=False), work.alive)
    told = [json.loads(one) for one in said]
    if first := _first_trouble([one["trouble"] for one in told]):
        work.warn("the stage was not judged", first)
    elif ranks.is_first:
        with _caught() as trouble:
            video, *images = (torch.tensor(counts).sum(0) for counts in zip(*(one["tallies"] for one in told), strict=True))
            work.shown.readings = _readings(work, video, images[0] if images else None)
        if trouble:
            work.warn("the stage was not judged", trouble[0])


def _tally(work: _Work, sampler: Sampler, *, images: bool) -> Tensor:
    from opensora import evaluate  # the judge brings scikit-learn, which takes a second that no step should wait for

    def generate(captions: Sequence[str], frames: int, seeds: Sequence[int]) -> Tensor:
        work.alive()
        return sampler.generate(captions, frames, seeds)

    assert work.stage.evaluate is not None
    return evaluate.tally(generate, work.stage.evaluate, images=images, rank=work.ranks.rank, world=work.ranks.world)


def _readings(work: _Work, video: Tensor, images: Tensor | None) -> dict[str, float]:
    from opensora import evaluate

    return evaluate.readings(video, images, evaluate.ceilings(work.stage, work.prepared.autoencoder, images=images is not None))


@contextmanager
def _caught() -> Iterator[list[str]]:
    """Run something whose failure decides nothing: it is in the list afterwards. A lost rank is not such a failure."""
    trouble: list[str] = []
    try:
        yield trouble
    except Exception as error:
        if is_peer_lost(error):
            raise
        trouble.append(_said(error))
        expected = isinstance(error, OSError | TrainerError | MemoryError | torch.OutOfMemoryError)
        log.info("%s", trouble[0], exc_info=not expected)


def _said(error: Exception) -> str:
    said = str(error) if isinstance(error, TrainerError) else f"{type(error).__name__}: {error}"
    text = " ".join(said.encode(errors="replace").decode().split())
    return text if len(text) <= LONGEST_TROUBLE else f"{text[: LONGEST_TROUBLE - 1]}…"


def described(readings: Mapping[str, float]) -> str:
    """For the log."""
    return "  ".join(f"{name} {value:.3f}" for name, value in readings.items())
