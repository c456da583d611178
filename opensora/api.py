"""What a notebook imports: train a stage, load a model, draw clips.

Owns three functions and their results. They change nothing of the process around them: no global seed, no default of torch, no working
directory, no signal handler, no logging handler. Each may be called from any thread, and so from an event loop's executor.

Example (`run_dir` holds a `stage.yaml`):

    >>> from opensora import api
    >>> trained = api.train(run_dir)
    >>> trained.status, trained.step
    ('completed', 4)
    >>> model = api.load(trained.checkpoint)
    >>> clip = api.generate("a digit 3 moving left", model, seed=1)
    >>> clip.frames.shape, clip.frames.dtype.name
    ((4, 16, 16, 3), 'uint8')
    >>> clip.save(run_dir / "three.mp4").name
    'three.mp4'
"""

from __future__ import annotations

import json
import math
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import psutil
import torch
from numpy.typing import NDArray
from pydantic import ValidationError

from opensora.checkpoint import reader as checkpoint
from opensora.config import SAMPLING_METHODS, SamplingConfig, StageConfig
from opensora.distributed.ranks import Ranks
from opensora.errors import ConfigError
from opensora.evaluation import given as given_files
from opensora.evaluation import memory_plan
from opensora.evaluation.prompts import check as check_prompts
from opensora.evaluation.sampler import Sampler, evaluations, too_long
from opensora.evaluation.saved_model import open_model
from opensora.evaluation.video_files import frames_per_second, write_gif, write_mp4, write_sheet, written
from opensora.printable import quoted
from opensora.training.run_directory import RunDirectory
from opensora.training.stage import report_failure, run_stage
from opensora.training.trainer import DrainRequest

MOST_SEED = 2**63 - 1
MOST_FPS = 240.0
BYTES_A_PIXEL = 3 * (4 + 1)
"""Of a clip that is decoded: three channels, as fp32 and as bytes."""
AT_ONCE = 16
"""Clips of a batch."""
SUFFIXES = (".mp4", ".gif", ".png")
"""Of files that a clip is written to."""


@dataclass(frozen=True)
class Clip:
    """A clip that was drawn, and what it was drawn from: the same values draw it again."""

    frames: NDArray[np.uint8]
    """(T, H, W, 3): RGB, 0 to 255."""
    fps: float
    """Frames a second when it is played: the rate at which the model's training clips were taken, 8 if none is known."""
    prompt: str
    seed: int
    """Of the noise."""
    steps: int
    """Sampling steps from noise to clip."""
    guidance: float
    """Classifier-free guidance scale."""
    note: str | None = None
    """A sentence about the prompt, if its end changes nothing in the clip because the model never saw prompts so long."""
    negative: str | None = None
    """What it should not show."""
    sampler: str = ""
    """Method of `SamplingConfig`."""
    stage: str = ""
    """Digest of the configuration of the model's stage (`StageConfig.digest`)."""
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    guidance_rescale: float = 0.0
    """See `SamplingConfig`."""
    given: Mapping[str, Any] = field(default_factory=dict)
    """Files of frames that were given, by name of the argument and sha256, and whether it is a loop."""

    def facts(self) -> dict[str, Any]:
        """What it was drawn from, as JSON: it stands in each file that is written of it."""
        frames, height, width, _ = self.frames.shape
        told = {
            "prompt": self.prompt, "negative": self.negative, "seed": self.seed, "sampler": self.sampler, "steps": self.steps,
            "guidance": self.guidance, "frames": frames, "height": height, "width": width, "fps": self.fps, "stage": self.stage,
        }  # fmt: skip
        if self.guidance_interval != (0.0, 1.0):
            told["guidance_interval"] = list(self.guidance_interval)
        if self.guidance_rescale:
            told["guidance_rescale"] = self.guidance_rescale
        told |= self.given
        return {name: value for name, value in told.items() if value not in (None, "")}

    def save(self, path: str | Path, about: Mapping[str, Any] | None = None) -> Path:
        """Write an .mp4 (h264) or a .gif, scaled up to at least 128 pixels, or a .png (frames beside each other).

        A file of this name is replaced. It says what the clip was drawn from (`facts`), and `about` besides.

        Returns:
            The path.

        Raises:
            ConfigError: the name ends in none of these, or its folder does not exist.
            OSError: the file cannot be written; nothing is left of it.
        """
        target = _checked_target(Path(path), clips=1)
        said = {"title": self.prompt, "comment": json.dumps({**self.facts(), **(about or {})}, ensure_ascii=False)}
        with written(target) as partial:
            match target.suffix:
                case ".mp4":
                    write_mp4(partial, torch.from_numpy(self.frames), self.fps, said)
                case ".gif":
                    write_gif(partial, torch.from_numpy(self.frames), self.fps, said)
                case _:
                    write_sheet(partial, torch.from_numpy(self.frames)[None], [self.prompt], said)
        return target


def save_sheet(path: str | Path, clips: Sequence[Clip], about: Mapping[str, Any] | None = None) -> Path:
    """Write clips of one size as a .png: a row for each clip, its prompt before it, time runs to the right.

    Returns:
        The path.

    Raises:
        ConfigError: the name does not end in .png, or its folder does not exist.
        OSError: the file cannot be written; nothing is left of it.
    """
    target = _checked_target(Path(path), clips=len(clips))
    said = {"comment": json.dumps({"clips": [clip.facts() for clip in clips], **(about or {})}, ensure_ascii=False)}
    with written(target) as partial:
        write_sheet(partial, torch.from_numpy(np.stack([clip.frames for clip in clips])), [clip.prompt for clip in clips], said)
    return target


@dataclass(frozen=True)
class Model:
    """A model that `load` opened. Several threads may draw from one: they take turns."""

    path: Path
    stage: StageConfig
    """How it was trained."""
    device: torch.device
    sampler: Sampler = field(repr=False)
    turn: threading.Lock = field(default_factory=threading.Lock, repr=False, compare=False)
    """Held while a clip is drawn."""


@dataclass(frozen=True)
class Trained:
    """How a stage ended."""

    status: Literal["completed", "drained"]
    """`drained`: it saved and left before its last step, because somebody asked. Call `train` again to go on."""
    step: int
    """Optimizer steps that the stage has taken."""
    checkpoint: Path
    """The directory of its last checkpoint, for `load`."""
    readings: dict[str, float]
    """What the evaluation at the end read (`evaluate` of the stage); empty if there was none."""
    warnings: tuple[str, ...] = ()
    """What went wrong after the training, such as a sample that could not be drawn."""
    remarks: tuple[str, ...] = ()
    """What of the data was not used."""


def load(path: str | Path, device: str | torch.device | None = None) -> Model:
    """Open a checkpoint directory, or a folder that `osctl export` wrote. Weights are mapped; a checkpoint's are its moving average.

    Args:
        device: of the network, such as "cuda:1". None means the current CUDA device if there is one, else the CPU.

    Raises:
        ConfigError: nothing of the kind lies there, or an encoder that the checkpoint names is not there.
        ParentError: the files are not whole.
    """
    chosen = _device(device)
    sampler = open_model(Path(path), chosen)
    return Model(Path(path), sampler.stage, chosen, sampler)


@dataclass(frozen=True)
class Drawing:
    """How clips are drawn, where it is not as the stage says: None means the stage's own."""

    frames: int | None = None
    """Of a clip, a multiple of the model's patch of frames."""
    height: int | None = None
    """Pixels, a multiple of what the autoencoder and the patch make one token of; so is `width`. One is given with the other."""
    width: int | None = None
    fps: float | None = None
    """Frames a second when it is played. It changes no frame."""
    steps: int | None = None
    """Sampling steps, at least 1."""
    guidance: float | None = None
    """Classifier-free guidance scale, at least 0; 1 turns it off."""
    sampler: str | None = None
    """A method that fits the stage's objective (`SamplingConfig.method`)."""
    negative: str | None = None
    """What no clip should show; it takes the place of the null caption."""
    guidance_interval: tuple[float, float] | None = None
    guidance_rescale: float | None = None
    """See `SamplingConfig`."""
    first_frame: str | Path | None = None
    """A picture that the clip begins with."""
    last_frame: str | Path | None = None
    """A picture that the clip ends with."""
    extend: str | Path | None = None
    """A video that the clip goes on with: its end is the clip's first quarter. The result is the video with the new frames behind it."""
    loop: bool = False
    """Draw a second clip that leads back, and so a video that may be played again and again without a jump."""


def generate(
    prompt: str,
    model: Model,
    *,
    seed: int = 0,
    frames: int | None = None,
    steps: int | None = None,
    guidance: float | None = None,
    **how: Any,
) -> Clip:
    """Draw one clip. The same arguments draw the same clip, whatever was drawn before.

    Args:
        seed: of the noise, from 0 to 2^63 - 1.
        how: other fields of `Drawing`, such as `sampler="dpm-solver++"`.

    Raises:
        ConfigError: a value is out of range, or the prompt has a word that the model does not know.
        ParentError: the weights do not fit the model.
        TypeError: `Drawing` has no such field.
    """
    return generate_many([prompt], model, seeds=[seed], frames=frames, steps=steps, guidance=guidance, **how)[0]


def generate_many(
    prompts: Sequence[str],
    model: Model,
    *,
    seeds: Sequence[int],
    frames: int | None = None,
    steps: int | None = None,
    guidance: float | None = None,
    on_step: Callable[[int, int], None] = lambda done, total: None,
    **how: Any,
) -> list[Clip]:
    """Draw a clip for each prompt, 16 at once or as many as fit; clip i is of seed i. Arguments and errors are those of `generate`.

    Args:
        on_step: is told before each evaluation of the network how many there were, and how many there will be.

    Raises:
        ValueError: there are not as many seeds as prompts.
    """
    asked = Drawing(frames=frames, steps=steps, guidance=guidance, **how)
    if len(prompts) != len(seeds):
        raise ValueError(f"{len(prompts)} prompts and {len(seeds)} seeds; give one seed for each prompt")
    count, size, sampling = _checked(model.stage, asked, len(prompts))
    for seed in seeds:
        if not 0 <= seed <= MOST_SEED:
            raise ConfigError(f"seed {seed}: not from 0 to {MOST_SEED}; choose another one")
    if not prompts:
        return []
    check_prompts(prompts, model.sampler.text, asked.negative)
    given, loops = _given(model.stage, asked, count, size), 2 if asked.loop else 1
    at_once = memory_plan.plan(model.sampler, min(len(prompts), AT_ONCE), count, size, sampling).at_once
    done, total = 0, -(-len(prompts) // at_once) * evaluations(sampling) * loops

    def beat() -> None:
        nonlocal done
        on_step(done, total)
        done += 1

    with model.turn:
        notes = [too_long(model.sampler.text, prompt) for prompt in prompts]
        drawn = model.sampler.generate_in_batches(
            prompts,
            count,
            seeds,
            sampling,
            batch=at_once,
            size=size,
            negative=asked.negative,
            given=given,
            loop=asked.loop,
            on_step=beat,
        )
    if given is not None and len(given.before):
        drawn = torch.cat([given.before.expand(len(drawn), -1, -1, -1, -1), drawn[:, given.taken :]], dim=1)
    on_step(total, total)
    fps, stage = asked.fps or frames_per_second(model.stage.data), model.stage.digest()
    return [
        Clip(
            pixels,
            fps,
            prompt,
            seed,
            sampling.steps,
            sampling.guidance,
            note,
            asked.negative,
            sampling.method,
            stage,
            sampling.guidance_interval,
            sampling.guidance_rescale,
            {**({} if given is None else given.facts), **({"loop": True} if asked.loop else {})},
        )
        for pixels, prompt, seed, note in zip(drawn.numpy(), prompts, seeds, notes, strict=True)
    ]


def plan(model: Model, clips: int, **how: Any) -> memory_plan.Plan:
    """How many of so many clips are drawn at once, and what that needs of what is free now. Nothing is loaded for it.

    Args:
        how: fields of `Drawing`.

    Raises:
        ConfigError: a value is out of range, or not one clip fits.
    """
    count, size, sampling = _checked(model.stage, Drawing(**how), clips)
    return memory_plan.plan(model.sampler, min(clips, AT_ONCE), count, size, sampling)


def train(run_dir: str | Path, device: str | torch.device | None = None) -> Trained:
    """Train the stage of a run directory as one process, to its end or until somebody asks it to drain.

    `run_dir` holds `stage.yaml` (docs/contracts.md, section 1) and may hold `parent/`. If it holds checkpoints, the stage goes on from the
    newest one. To save and leave at the next step, create the file `drain` there, from anywhere; it is removed when it was obeyed. Ctrl-C
    stops at once, and what was not saved is lost. Nobody else may train in the directory meanwhile; other directories may be trained at
    the same time. Progress goes to the logger `opensora.training`.

    Args:
        device: None means the current CUDA device if there is one, else the CPU.

    Raises:
        TrainerError: the stage failed; its kind is the `class` in `result.json`.
        OSError: the directory cannot be written.
    """
    path, chosen, born = Path(run_dir), _device(device), time.time()
    run = RunDirectory(path, rank=0)
    (path / "result.json").unlink(missing_ok=True)  # of an earlier call: the first to report wins
    run.reserve_result()
    try:
        with _compile_limit_restored(chosen):
            status = run_stage(run, Ranks(0, 1, chosen), DrainRequest(), born)
    except Exception as error:
        report_failure(run, error)
        raise
    if status == "drained":
        (path / "drain").unlink(missing_ok=True)
    told = json.loads((path / "result.json").read_bytes())
    return Trained(
        "drained" if status == "drained" else "completed",
        run.step,
        checkpoint.directory(run.checkpoints, run.step),
        told["evaluation"],
        tuple(told.get("warnings", ())),
        tuple(told.get("remarks", ())),
    )


def _checked_target(path: Path, *, clips: int) -> Path:
    if path.suffix not in SUFFIXES:
        raise ConfigError(f"{path}: its name ends in none of {', '.join(SUFFIXES)}; name one of them")
    if path.suffix != ".png" and clips > 1:
        raise ConfigError(f"{path}: an .mp4 or .gif holds one clip ({clips} given), a .png any number; name one of them")
    if not path.parent.is_dir():
        raise ConfigError(f"{path}: the folder {path.parent} does not exist; make it first")
    return path


def _check_memory(pixels: int) -> None:
    """Raises ConfigError for clips of so many pixels that they alone, as they are decoded, do not fit what is free now."""
    needed, free = pixels * BYTES_A_PIXEL, psutil.virtual_memory().available
    if needed > free:
        fact = f"these clips need at least {needed / 1e9:,.1f} GB of memory, {free / 1e9:,.1f} GB are free"
        raise ConfigError(f"{fact}; ask for fewer frames, a smaller size or fewer clips")


def _checked(stage: StageConfig, asked: Drawing, clips: int) -> tuple[int, tuple[int, int] | None, SamplingConfig]:
    """Frames, size in pixels (None: the stage's) and sampling. Raises ConfigError."""
    count = asked.frames if asked.frames is not None else stage.data.frames
    if count < 1:
        raise ConfigError(f"frames {count}: less than 1; ask for a multiple of {stage.model.patch[0]}")
    if asked.fps is not None and not 0 < asked.fps <= MOST_FPS:
        raise ConfigError(f"fps {asked.fps:g}: not above 0 and up to {MOST_FPS:g}; frames a second")
    if (asked.height is None) != (asked.width is None):
        given, missing = ("height", "width") if asked.width is None else ("width", "height")
        raise ConfigError(f"{given} {getattr(asked, given)}: without {missing}; give both, in pixels")
    size = None if asked.height is None or asked.width is None else (asked.height, asked.width)
    _check_memory(min(clips, AT_ONCE) * count * math.prod(size or (stage.data.height, stage.data.width)))
    if asked.steps is not None and asked.steps < 1:
        raise ConfigError(f"steps {asked.steps}: less than 1; ask for at least one")
    if asked.guidance is not None and not 0 <= asked.guidance < float("inf"):
        raise ConfigError(f"guidance {asked.guidance}: not a number of at least 0; 1 turns guidance off")
    fit = SAMPLING_METHODS[stage.objective.kind]
    if asked.sampler is not None and asked.sampler not in fit:
        raise ConfigError(f"sampler {asked.sampler}: does not fit a model of {stage.objective.kind}; use {' or '.join(fit)}")
    names = {
        "steps": asked.steps, "guidance": asked.guidance, "method": asked.sampler,
        "guidance_interval": asked.guidance_interval, "guidance_rescale": asked.guidance_rescale,
    }  # fmt: skip
    told = stage.sampling.model_dump() | {name: value for name, value in names.items() if value is not None}
    try:
        sampling = SamplingConfig.model_validate(told)
    except ValidationError as error:
        first = error.errors()[0]
        field = f"{first['loc'][0]} {names.get(str(first['loc'][0]))}: " if first["loc"] else ""
        raise ConfigError(f"{field}{first['msg'].removeprefix('Value error, ')}") from None
    if asked.negative is not None and sampling.guidance == 1:
        raise ConfigError(f"negative {quoted(asked.negative, 60)}: has no effect at guidance 1; leave it out, or ask for more guidance")
    return count, size, sampling


def _given(stage: StageConfig, asked: Drawing, frames: int, size: tuple[int, int] | None) -> given_files.Given | None:
    """Raises ConfigError."""
    if asked.loop and asked.extend is not None:
        raise ConfigError(f"extend {asked.extend}: does not go with a loop; leave one of them out")
    if asked.first_frame is not None and asked.extend is not None:
        raise ConfigError(f"first_frame {asked.first_frame}: the clip begins with the end of {asked.extend}; leave one of them out")
    files = given_files.Asked(*(None if path is None else Path(path) for path in (asked.first_frame, asked.last_frame, asked.extend)))
    if not files.any:
        return None
    pixels = size or (stage.data.height, stage.data.width)
    return given_files.read(files, frames, pixels, asked.fps or frames_per_second(stage.data), stage.model.patch[0])


def _device(device: str | torch.device | None) -> torch.device:
    chosen = torch.device(device) if device is not None else torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if chosen.type == "cuda" and chosen.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return chosen


@contextmanager
def _compile_limit_restored(device: torch.device) -> Iterator[None]:
    """Compiled blocks raise torch's limit of recompilations (`opensora.training.network`): put it back afterwards (not run on a GPU)."""
    if device.type != "cuda":
        yield
        return
    settings = torch._dynamo.config
    with settings.patch(recompile_limit=settings.recompile_limit):
        yield
