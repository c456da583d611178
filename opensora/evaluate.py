"""How good a checkpoint is: `python -m opensora.evaluate CHECKPOINT --out DIR`.

Owns the command and the file `result.json` in DIR. It judges in one process what a stage judges at its end (`training.after_training`:
samples of the prompts, clips of digits), and what needs a checkpoint alone: the loss on held-out clips (`evaluation.held_out`), beside that
of the weights that the stage started from. Refuses to train, and to write anything outside of DIR.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from opensora import last_resort
from opensora.config import StageConfig
from opensora.distributed.ranks import Ranks
from opensora.errors import ConfigError, TrainerError
from opensora.evaluation import held_out
from opensora.evaluation.sampler import Sampler
from opensora.evaluation.saved_model import open_model
from opensora.evaluation.video_files import written
from opensora.printable import printable
from opensora.training import after_training
from opensora.training.run_directory import RunDirectory, stage_of

RESULT = "result.json"
log = logging.getLogger("opensora.evaluate")


def evaluate(checkpoint: Path, out: Path, *, stage: StageConfig | None = None, parent: Path | None = None) -> dict[str, object]:
    """Judge a checkpoint, and write samples and `result.json` into `out`.

    Args:
        checkpoint: a checkpoint directory, or an export.
        stage: what is asked for: `evaluate`, `prompts` and `sampling` of it count. None: the checkpoint's own.
        parent: the checkpoint that the stage started from. None: it has none.

    Returns:
        what `result.json` holds.

    Raises:
        ConfigError: nothing is asked for, or the stage's clips cannot be judged.
        ParentError: a checkpoint is not whole, or its weights are of another model.
        TrainerError: all of it failed.
    """
    began, cpu = time.time(), time.process_time()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = open_model(checkpoint, device)
    asked = stage if stage is not None else model.stage
    if not after_training.is_asked(asked):
        raise ConfigError(f"{checkpoint}: its stage has neither prompts nor `evaluate`; say what is asked for with --stage FILE")
    out.mkdir(parents=True, exist_ok=True)
    run = RunDirectory(out, rank=0)
    shown = after_training.show(run, asked, Ranks(0, 1, device), step=0, prepared=model, averaged=lambda: dict(model.weights))
    readings, digest = dict(shown.readings), None
    warnings = [warning.removesuffix(f"; {after_training.WHOLE}") for warning in shown.warnings]
    if asked.evaluate is not None and asked.evaluate.held_out_clips:
        own = Sampler(asked, model.weights, model.autoencoder, model.text, device=device)
        before = [Sampler(asked, open_model(parent, device).weights, model.autoencoder, model.text, device=device)] if parent else []
        found, digest = _held_out(run, asked, [own, *before])
        readings |= found
    if asked.evaluate is not None and not readings and warnings:
        raise TrainerError(warnings[0])
    result: dict[str, object] = {"schema": 1, "readings": readings, "warnings": warnings, "held_out": digest}
    result |= {"samples": str(run.samples), "device": device.type, "cpu_s": time.process_time() - cpu}
    result |= {"started": began, "ended": time.time()}
    with written(out / RESULT) as partial:
        partial.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return result


def _held_out(run: RunDirectory, stage: StageConfig, samplers: Sequence[Sampler]) -> tuple[dict[str, float], str]:
    """Of clips as they are generated; of a stage of images, of images too."""
    how = stage.evaluate
    assert how is not None

    def beat() -> None:
        after_training.alive(run, 0)

    readings, digest = held_out.judged(samplers, clips=how.held_out_clips, frames=how.frames, seed=how.seed, beat=beat)
    if stage.data.frames == 1:
        readings |= held_out.judged(samplers, clips=how.held_out_clips, frames=1, seed=how.seed, prefix="image_", beat=beat)[0]
    return readings, digest


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m opensora.evaluate", description="Judge a checkpoint's moving average, or an export.")
    add = parser.add_argument
    add("checkpoint", type=Path, help="a checkpoint directory, for example run/checkpoints/step-00000100, or an export")
    add("--out", type=Path, required=True, metavar="DIR", help="where result.json and samples/ go")
    add("--stage", type=Path, metavar="FILE", help="a stage file whose evaluate, prompts and sampling count [the checkpoint's own]")
    add("--parent", type=Path, metavar="CHECKPOINT", help="the checkpoint that the stage started from: its loss on the same clips is read")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """0 done · 1 it failed · 2 the command is wrong."""
    args = _arguments(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        result = evaluate(args.checkpoint, args.out, stage=stage_of(args.stage) if args.stage else None, parent=args.parent)
    except TrainerError as error:
        sys.stderr.write(f"error: {printable(str(error))}\n")
        return 2 if error.kind == "config" else 1
    except OSError as error:
        sys.stderr.write(f"error: --out {args.out}: {error.strerror or error}; make room, or name a folder that can be written\n")
        return 1
    sys.stdout.write(json.dumps(result) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(last_resort.run("evaluate", main))
