"""What a finished stage shows of itself: clips for its prompts, and readings of how well its model obeys prompts.

Owns the order of both, how the ranks divide the work, and the law that none of it decides about the stage. The weights are saved when this
begins. Whatever fails here (an exception of any kind, memory, a full disk, a lost rank) becomes a warning. Refuses to sample
(`evaluation.sampler`), to classify clips (`evaluation.digits`) and to write files of clips (`evaluation.video_files`).

No rank waits for one that has failed. Ranks meet only in `Ranks.tell`, over the network of the host, and each rank comes there whatever
happened to it. The one other exchange gathers a divided moving average; before it, all ranks find out whether each of them has the memory.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from opensora.config import StageConfig
from opensora.distributed.ranks import Ranks, is_peer_lost
from opensora.encoders.protocol import Autoencoder, TextEncoder
from opensora.errors import TrainerError
from opensora.evaluation.file_names import file_names
from opensora.evaluation.sampler import Sampler
from opensora.evaluation.video_files import frames_per_second, write_mp4, write_sheet, written
from opensora.planning.flops import parameters
from opensora.printable import one_line, quoted
from opensora.training.run_directory import RunDirectory
from opensora.training.seeds import generator_for

log = logging.getLogger(__name__)

LONGEST_TROUBLE = 300
"""The most characters of one rank's trouble that it tells the others."""
TOLD_PROMPTS, LONGEST_PROMPT = 3, 80
"""Prompts without a clip that get a warning of their own, and the most characters of a prompt in it."""
WHOLE = "the weights are saved and are the stage's result"


class Encoders(Protocol):
    """What brings the stage's encoders: its encoded clips, or a model that was read from files."""

    @property
    def autoencoder(self) -> Autoencoder: ...

    @property
    def text(self) -> TextEncoder: ...


@dataclass
class Shown:
    """What `result.json` says about the samples and readings of a stage."""

    readings: dict[str, float] = field(default_factory=dict)
    """Numbers by name, on the first rank; the other ranks have none."""
    warnings: list[str] = field(default_factory=list)
    """What could not be shown, and why. Equal on all ranks, except for what the first rank drew."""


@dataclass
class _Work:
    """What `show` needs of a trainer, and what it has found so far."""

    run: RunDirectory
    stage: StageConfig
    ranks: Ranks
    step: int
    prepared: Encoders
    averaged: Callable[[], dict[str, Tensor]]
    shown: Shown

    def alive(self) -> None:
        alive(self.run, self.step)

    def warn(self, what: str, trouble: str) -> None:
        self.shown.warnings.append(f"{what}: {trouble}; {WHOLE}")
        if self.ranks.is_first:
            log.info("warning: %s", one_line(self.shown.warnings[-1]))


def is_asked(stage: StageConfig) -> bool:
    """Whether the stage asks for samples or readings."""
    return bool(stage.prompts) or stage.evaluate is not None


def alive(run: RunDirectory, step: int) -> None:
    """Write a heartbeat, if that is possible."""
    with suppress(OSError):
        run.heartbeat(step, "evaluate")


def show(
    run: RunDirectory, stage: StageConfig, ranks: Ranks, *, step: int, prepared: Encoders, averaged: Callable[[], dict[str, Tensor]]
) -> Shown:
    """Draw samples and make readings with the moving average. All ranks call this, once all weights are saved. It raises nothing.

    Args:
        averaged: `strategy.Strategy.averaged`.
    """
    work = _Work(run, stage, ranks, step, prepared, averaged, Shown())
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
    """A sampler of the moving average. None, with a warning, if some rank cannot have it."""
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
    """Whether any rank has trouble; if so, all of them warn."""
    trouble = _first_trouble(work.ranks.tell(own[0] if own else "", work.alive))
    if trouble:
        work.warn(what, trouble)
    return bool(trouble)


def _first_trouble(said: Sequence[str]) -> str:
    """The first trouble among what each rank tells of itself; empty if there is none."""
    return next((f"rank {rank}: {text}" if len(said) > 1 else text for rank, text in enumerate(said) if text), "")


def _draw(work: _Work, sampler: Sampler) -> None:
    """Write clips, a sheet of them, and what was asked for. A failed prompt or a file that cannot be written costs one clip."""
    stage, folder = work.stage, work.run.samples
    frames = stage.evaluate.frames if stage.evaluate else stage.data.frames
    folder.mkdir(exist_ok=True)
    seeds = [generator_for(stage.seed, "sample", 0, i, torch.device("cpu")).initial_seed() for i in range(len(stage.prompts))]
    names = file_names(stage.prompts, ".mp4")
    clips, troubles = _clips(work, sampler, frames, seeds)
    for number, clip in list(clips.items()):
        with _caught() as trouble, written(folder / names[number]) as path:
            write_mp4(path, clip, frames_per_second(stage.data))
        if trouble:
            troubles[number] = trouble[0]
            del clips[number]
    _tell_of(work, troubles)
    if not clips:
        return
    with _caught() as trouble, written(folder / "sheet.png") as path:
        write_sheet(path, torch.stack(list(clips.values())), [stage.prompts[number] for number in clips])
    if trouble:
        work.warn("the sheet of samples was not drawn", trouble[0])
    listing = [{"file": names[number], "prompt": stage.prompts[number], "seed": seeds[number]} for number in clips]
    content = {"schema": 1, "frames": frames, "sampling": stage.sampling.model_dump(mode="json"), "clips": listing}
    with written(folder / "samples.json") as path:
        path.write_text(json.dumps(content, indent=1) + "\n")


def _clips(work: _Work, sampler: Sampler, frames: int, seeds: Sequence[int]) -> tuple[dict[int, Tensor], dict[int, str]]:
    """The clip of each prompt, or why there is none. Draws all at once, and one by one if that fails."""
    prompts, clips, troubles = work.stage.prompts, {}, {}
    with _caught() as trouble:
        clips = dict(enumerate(sampler.generate_in_batches(prompts, frames, seeds, beat=work.alive)))
    if trouble and len(prompts) == 1:
        troubles[0] = trouble[0]
    elif trouble:
        for number, prompt in enumerate(prompts):
            with _caught() as trouble:
                clips[number] = sampler.generate_in_batches([prompt], frames, [seeds[number]], beat=work.alive)[0]
            if trouble:
                troubles[number] = trouble[0]
    return clips, troubles


def _tell_of(work: _Work, troubles: Mapping[int, str]) -> None:
    """Warn once if nothing was drawn. Else warn for each of the first prompts without a clip, and once for the others."""
    if len(troubles) == len(work.stage.prompts):
        work.warn("no samples were drawn", next(iter(troubles.values())))
        return
    for number, trouble in list(troubles.items())[:TOLD_PROMPTS]:
        work.warn(f"the sample of prompt {number} ({quoted(work.stage.prompts[number], LONGEST_PROMPT)}) was not delivered", trouble)
    if len(troubles) > TOLD_PROMPTS:
        work.warn(f"samples of {len(troubles) - TOLD_PROMPTS} more prompts were not delivered", "the log says why")


def _judge(work: _Work, sampler: Sampler) -> None:
    """Make readings on generated clips; the ranks divide the clips."""
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
    from opensora.evaluation import digits  # it brings scikit-learn, which takes a second that no step should wait for

    def generate(captions: Sequence[str], frames: int, seeds: Sequence[int]) -> Tensor:
        work.alive()
        return sampler.generate(captions, frames, seeds)

    assert work.stage.evaluate is not None
    return digits.tally(generate, work.stage.evaluate, images=images, rank=work.ranks.rank, world=work.ranks.world)


def _readings(work: _Work, video: Tensor, images: Tensor | None) -> dict[str, float]:
    from opensora.evaluation import digits

    return digits.readings(video, images, digits.ceilings(work.stage, work.prepared.autoencoder, images=images is not None))


@contextmanager
def _caught() -> Iterator[list[str]]:
    """Run something whose failure decides nothing: the failure is in the list afterwards. A lost rank is raised."""
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
    text = one_line(" ".join(said.split()))
    return text if len(text) <= LONGEST_TROUBLE else f"{text[: LONGEST_TROUBLE - 1]}…"


def described(readings: Mapping[str, float]) -> str:
    """Readings as one line of the log."""
    return "  ".join(f"{name} {value:.3f}" for name, value in readings.items())
