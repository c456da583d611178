"""Clips from prompts: `python -m opensora.sample CHECKPOINT --prompt "a digit 3 moving left" --out three.mp4`.

Owns the command: its arguments, which file each clip goes to, the progress bar. `opensora.api` draws.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

from opensora import api, last_resort
from opensora.config import SAMPLING_METHODS
from opensora.distributed.parallel import share_clips
from opensora.distributed.ranks import PEER_LOST, die_with_launcher, is_peer_lost
from opensora.distributed.together import ranks_of_this_machine
from opensora.errors import ConfigError, TrainerError
from opensora.evaluation.prompts import check as check_prompts
from opensora.evaluation.video_files import written
from opensora.printable import printable

MOST_PROMPTS = 100_000
NAME_CHARACTERS = 60
"""Of a prompt in a file's name."""
UNTRAINED = (
    "the model was not trained with given frames (`masks` of its stage): they are put in at each step, and the others may not go with them"
)
_PASSED_ON = (
    "frames", "height", "width", "fps", "steps", "guidance", "sampler", "negative", "guidance_rescale", "first_frame", "last_frame",
    "extend", "loop",
)  # fmt: skip
"""Arguments that are fields of `api.Drawing` under the same name."""


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m opensora.sample", description="Draw a clip for each prompt from a checkpoint's moving average, or from an export."
    )
    methods = ", ".join(method for some in SAMPLING_METHODS.values() for method in some)
    add = parser.add_argument
    add("checkpoint", type=Path, help="a checkpoint directory, for example run/checkpoints/step-00000100, or an export")
    add("--prompt", action="append", default=[], help='what to show, for example "a digit 3 moving left"; may be repeated')
    add("--prompts", type=Path, metavar="FILE", help="a text file with a prompt on each line, beside those of --prompt")
    add("--out", required=True, help=".mp4 or .gif (one prompt), .png (a sheet, a row per prompt), or a folder (an .mp4 each)")
    add("--seed", type=int, default=0, help="of the noise; prompt i uses seed + i [0]")
    add("--frames", type=int, help="of a clip [the stage's]")
    add("--height", type=int, help="pixels, with --width [the stage's]")
    add("--width", type=int, help="pixels, with --height [the stage's]")
    add("--fps", type=float, help="frames a second when it is played [the rate of the training's clips]")
    add("--steps", type=int, help="sampling steps on the way from noise to clip [the stage's]")
    add("--sampler", help=f"one of {methods} [the stage's]")
    add("--guidance", type=float, help="classifier-free guidance scale; 1: off [the stage's]")
    add("--guidance-interval", metavar="LOW,HIGH", help="guide between these times only, 0 clean to 1 noise [0,1]")
    add("--guidance-rescale", type=float, help="share of the unguided standard deviation that is given back, 0 to 1 [0]")
    add("--negative", help="what no clip should show [the null caption]")
    add("--first-frame", type=Path, metavar="IMAGE", help="a picture that each clip begins with")
    add("--last-frame", type=Path, metavar="IMAGE", help="a picture that each clip ends with")
    add("--extend", type=Path, metavar="VIDEO", help="a video that goes on with what is drawn")
    add("--loop", action="store_true", help="lead each clip back to its beginning")
    add("--devices", type=int, default=1, metavar="N", help="of this machine that share each clip [1]")
    add("--about", type=json.loads, default={}, metavar="JSON", help="what each file says of its model besides")
    return parser.parse_args(argv)


def _prompts(args: argparse.Namespace) -> list[str]:
    """Raises ConfigError."""
    prompts = list(args.prompt)
    if args.prompts is not None:
        try:
            lines = args.prompts.read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            fact = "it is not UTF-8" if isinstance(error, UnicodeDecodeError) else error.strerror
            raise ConfigError(f"--prompts {args.prompts}: {fact}; give a text file with a prompt on each line") from None
        prompts += [line.strip() for line in lines if line.strip()]
    if not prompts:
        where = f"--prompts {args.prompts}: there is no prompt in it" if args.prompts is not None else "no prompt is given"
        raise ConfigError(f"{where}; write one on each line")
    if len(prompts) > MOST_PROMPTS:
        raise ConfigError(f"{len(prompts):,} prompts: more than {MOST_PROMPTS:,}; draw them in several parts")
    return prompts


def _files(name: str, prompts: Sequence[str]) -> list[Path]:
    """Where clips go: one file, or one for each prompt. Raises ConfigError for what would be noticed only after the drawing."""
    out = Path(name)
    if out.is_dir() or not out.suffix or name.endswith("/"):
        if out.exists() and not out.is_dir():
            raise ConfigError(
                f"--out {out}: a file of this name is there, and it says neither .mp4, .gif nor .png; name a folder, or one of these"
            )
        digits = len(str(len(prompts) - 1))
        return [out / f"{number:0{digits}}-{_as_name(prompt)}.mp4" for number, prompt in enumerate(prompts)]
    if out.suffix not in api.SUFFIXES:
        raise ConfigError(f"--out {out}: its name ends in none of {', '.join(api.SUFFIXES)}; name one of them, or a folder: {out}/")
    if out.suffix != ".png" and len(prompts) > 1:
        one = f"an .mp4 or .gif holds one prompt ({len(prompts)} given), a .png or a folder any number"
        raise ConfigError(f"--out {out}: {one}; name one of them")
    if not out.parent.is_dir():
        raise ConfigError(f"--out {out}: the folder {out.parent} does not exist; make it first")
    return [out]


def _as_name(prompt: str) -> str:
    return re.sub(r"[^\w]+", "-", prompt.lower())[:NAME_CHARACTERS].strip("-") or "clip"


@contextmanager
def _progress(shown: bool) -> Iterator[Callable[[int, int], None]]:
    """What `api.generate_many` tells how far it is; on a terminal it is a bar on stderr."""
    if not shown:
        yield lambda done, total: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("drawing", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _draw(args: argparse.Namespace, argv: Sequence[str]) -> None:
    prompts = _prompts(args)
    files = _files(args.out, prompts)
    with ranks_of_this_machine(args.devices, "opensora.sample", argv) as ranks:
        model = api.load(args.checkpoint, ranks.device)
        if ranks.world > 1:
            model.sampler.sequence = share_clips(ranks, ranks.world)
        _draw_with(model, args, prompts, files, first=ranks.is_first)


def _draw_with(model: api.Model, args: argparse.Namespace, prompts: Sequence[str], files: Sequence[Path], *, first: bool) -> None:
    """Of ranks that draw together the first one writes and speaks."""
    how: dict[str, Any] = {name: getattr(args, name) for name in _PASSED_ON}
    if args.guidance_interval is not None:
        how["guidance_interval"] = _interval(args.guidance_interval)
    if first and model.stage.masks is None and (args.first_frame or args.last_frame or args.extend or args.loop):
        sys.stderr.write(f"{UNTRAINED}\n")
    check_prompts(prompts, model.sampler.text, args.negative)
    planned = api.plan(model, len(prompts), **how)
    if first and (sys.stderr.isatty() or planned.at_once < min(len(prompts), api.AT_ONCE)):
        sys.stderr.write(f"{planned.sentence()}\n")
    seeds = [args.seed + number for number in range(len(prompts))]
    with _place(files[0]) if first else nullcontext(), _progress(first and sys.stderr.isatty()) as on_step:
        if files[0].suffix == ".png":
            clips = api.generate_many(prompts, model, seeds=seeds, on_step=on_step, **how)
            if not first:
                return
            api.save_sheet(files[0], clips, args.about)
            _write_beside(files[0], {"clips": [clip.facts() for clip in clips], **args.about})
            _say_notes(clips)
            return
        batches = -(-len(prompts) // api.AT_ONCE)
        for batch in range(batches):  # written as they are drawn: whoever is killed keeps them, and memory holds one batch

            def on_own_step(done: int, total: int, batch: int = batch) -> None:
                on_step(batch * total + done, batches * total)

            some = slice(batch * api.AT_ONCE, (batch + 1) * api.AT_ONCE)
            clips = api.generate_many(prompts[some], model, seeds=seeds[some], on_step=on_own_step, **how)
            if not first:
                continue
            for path, clip in zip(files[some], clips, strict=True):
                clip.save(path, args.about)
                _write_beside(path, {**clip.facts(), **args.about})
            _say_notes(clips)


@contextmanager
def _place(file: Path) -> Iterator[None]:
    """Show that a file can be written before hours of drawing; its folder is made, and removed again if nothing came to lie in it.

    Raises OSError.
    """
    folder, made = file.parent, not file.parent.exists()
    folder.mkdir(parents=True, exist_ok=True)
    probe = file.with_name(f"{file.name}.partial")
    try:
        probe.touch()
        probe.unlink()
        yield
    finally:
        if made:
            with suppress(OSError):
                folder.rmdir()


def _say_notes(clips: Sequence[api.Clip]) -> None:
    for clip in clips:
        if clip.note:
            sys.stderr.write(f"{clip.note}\n")


def _interval(text: str) -> tuple[float, ...]:
    """Raises ConfigError."""
    try:
        low, high = (float(part) for part in text.split(","))
    except ValueError:
        raise ConfigError(f"--guidance-interval {text}: not two numbers from 0 to 1; write them as 0.1,0.8") from None
    return low, high


def _write_beside(path: Path, content: Mapping[str, Any]) -> None:
    """`three.mp4.json` beside `three.mp4`: whoever has the folder need not open the video to know what it shows."""
    with written(path.with_name(f"{path.name}.json")) as partial:
        partial.write_text(json.dumps({"schema": 1, **content}, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def _as_typed(reason: str) -> str:
    """`opensora.api` names its arguments; here they are flags of the same names."""
    names = "frames|height|width|fps|guidance_interval|guidance_rescale|guidance|sampler|seed|steps"
    names += "|first_frame|last_frame|extend|loop|devices|negative"
    return re.sub(rf"^({names})(?= )", lambda found: f"--{found[1].replace('_', '-')}", reason)


def main(argv: Sequence[str] | None = None) -> int:
    """0 done · 1 it failed · 2 the command is wrong."""
    args = _arguments(argv)
    if os.environ.get("RANK", "0") != "0":
        die_with_launcher()
    try:
        _draw(args, sys.argv[1:] if argv is None else argv)
    except TrainerError as error:
        sys.stderr.write(f"error: {printable(_as_typed(str(error)))}\n")
        return 2 if error.kind == "config" else 1
    except OSError as error:
        sys.stderr.write(f"error: --out {args.out}: {error.strerror or error}; make room, or name a file that can be written\n")
        return 1
    except Exception as error:
        if not is_peer_lost(error):
            raise
        sys.stderr.write(f"error: another rank ended ({printable(str(error).splitlines()[0])}); nothing more was drawn\n")
        return PEER_LOST
    if os.environ.get("RANK", "0") == "0":
        sys.stdout.write(f"{args.out}\n")
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # as an exception, so that no half file stays
    sys.exit(last_resort.run("sample", main))
