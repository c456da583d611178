"""A data set on one page, as the model sees it: `python -m opensora.sheet OUT.png`, with the data section of a stage (JSON) on stdin.

Owns the page: a row for each clip, its frames from left to right, beside them its name, caption and size; at the foot what was left out and
why, and what else there is to say. Frames come as a stage gets them (`opensora.data.folder`), so that what is wrong is seen before a device
is held. Refuses to look at more clips than it shows, since of a million the first ones tell enough, and to write over a file that is no
sheet. The result goes to stdout: one line of JSON with shown, looked_at, clips, left_out and remarks.
"""

from __future__ import annotations

import argparse
import errno
import itertools
import json
import logging
import shlex
import sys
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, PngImagePlugin
from pydantic import ValidationError

from opensora import last_resort
from opensora.config import DataConfig
from opensora.data.folder import FileClips
from opensora.data.source import read_all
from opensora.errors import ConfigError, TrainerError
from opensora.evaluation.fonts import font
from opensora.evaluation.video_files import written
from opensora.printable import one_line, printable

CLIPS = 24
"""Rows at most, where nobody asks for more."""
COLUMNS = 8
"""Frames of a row at most; longer clips show as many, evenly spread from the first to the last."""
CELL = 96
"""Pixels of a frame's longer side on the page."""
MARGIN, LINE, LABEL, FONT_SIZE = 8, 17, 300, 13
MADE_BY = "osctl data show --sheet"
"""Stands in each sheet as its Software, so that a picture of somebody else is never taken for one."""
MOST_LEFT_OUT = 30
"""Reasons at the foot."""
PAPER, TEXT, FAINT, WARNING = (250, 250, 250), (20, 20, 20), (110, 110, 110), (170, 60, 0)


@dataclass(frozen=True)
class Row:
    """One clip on the page."""

    name: str
    caption: str
    about: str
    """Its size, and the seconds that it spans."""
    frames: list[Image.Image]


def rows(clips: FileClips) -> Iterator[tuple[int, Row]]:
    """Each clip that can be used, with its number."""
    for bucket, size in enumerate(clips.sizes):
        if not clips.counts[bucket]:
            continue
        for pixels, indices in read_all(clips, bucket):
            for clip, index in zip(pixels, indices, strict=True):
                chosen = torch.linspace(0, size.frames - 1, min(size.frames, COLUMNS)).round().long()
                path = clips.paths[index]
                span = clips.notes[path][1].span
                about = f"{size.height}x{size.width}" + (f", {size.frames} frames in {float(span):.2f} s" if size.frames > 1 else "")
                yield index, Row(path, clips.captions[index], about, [_cell(frame.numpy()) for frame in clip[chosen]])


def _cell(pixels: NDArray[np.uint8]) -> Image.Image:
    picture = Image.fromarray(pixels)
    scale = CELL / max(picture.size)
    sides = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    return picture.resize(sides, Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS)


def foot(clips: FileClips, stage: str) -> list[str]:
    """What is written below the rows."""
    said = [f"left out: {len(clips.skipped)} of {len(clips)}"] if clips.skipped else []
    names = sorted(clips.skipped)
    said += [f"    {name}: {clips.skipped[name]}" for name in names[:MOST_LEFT_OUT]]
    said += [f"    and {len(names) - MOST_LEFT_OUT:,} more"] if len(names) > MOST_LEFT_OUT else []
    said += [f"these are the first {len(clips)} of {clips.total:,} clips"] if len(clips) < clips.total else []
    return said + remarks(clips, stage)


def remarks(clips: FileClips, stage: str) -> list[str]:
    """With the stage's name where a setting is meant: a source of clips knows none."""
    return [one.replace("STAGE.data.", f"{stage}.data.") for one in clips.remarks]


def page(shown: Sequence[Row], below: Sequence[str]) -> Image.Image:
    """The whole sheet."""
    lettering = font(FONT_SIZE)
    across = max([sum(frame.width + MARGIN for frame in row.frames) for row in shown], default=0)
    width = max(LABEL + across + MARGIN, 2 * LABEL)
    letters = (width - 2 * MARGIN) * 2 // FONT_SIZE
    lines = [part for line in below for part in textwrap.wrap(one_line(line), letters, subsequent_indent="        ")]
    heights = [max(frame.height for frame in row.frames) for row in shown]
    heights = [max(height, 4 * LINE) + MARGIN for height in heights]
    sheet = Image.new("RGB", (width, MARGIN + sum(heights) + len(lines) * LINE + MARGIN), PAPER)
    draw, top = ImageDraw.Draw(sheet), MARGIN
    for row, height in zip(shown, heights, strict=True):
        fits = LABEL * 2 // FONT_SIZE
        told = [(one_line(row.name, fits), TEXT)]
        told += [(part, FAINT) for part in textwrap.wrap(one_line(row.caption), fits, max_lines=2, placeholder=" …")]
        for number, (text, colour) in enumerate([*told, (row.about, FAINT)]):
            draw.text((MARGIN, top + number * LINE), text, colour, lettering)
        left = LABEL
        for frame in row.frames:
            sheet.paste(frame, (left, top))
            left += frame.width + MARGIN
        top += height
    for number, line in enumerate(lines):
        draw.text((MARGIN, top + number * LINE), line, WARNING, lettering)
    return sheet


def refuse_target(out: Path) -> None:
    """Raises ConfigError where the sheet would not be a PNG, or would take the place of something that is no sheet."""
    if not out.parent.is_dir():
        raise ConfigError(f"--sheet {out}: there is no folder {out.parent}. Make it: mkdir -p {shlex.quote(str(out.parent))}")
    if out.suffix.lower() != ".png":
        fact = "a sheet is a PNG, and this name does not end in .png"
    elif out.is_dir():
        fact = "is a folder"
    elif out.exists() and not _is_sheet(out):
        fact = "is there already, and no sheet"
    else:
        return
    names = itertools.chain([f"{out.stem}-sheet.png"], (f"{out.stem}-sheet-{number}.png" for number in itertools.count(2)))
    free = next(name for name in names if not Path(name).exists())
    raise ConfigError(f"--sheet {out}: {fact}. Name another file: --sheet {shlex.quote(free)}")


def _is_sheet(path: Path) -> bool:
    try:
        with Image.open(path) as picture:
            return picture.format == "PNG" and picture.info.get("Software") == MADE_BY
    except Exception:  # noqa: BLE001 - Pillow raises many kinds, and what cannot be read is no sheet of ours
        return False


def draw(data: DataConfig, out: Path, most: int, stage: str) -> dict[str, object]:
    """The result as `main` prints it. Raises TrainerError, OSError."""
    refuse_target(out)
    clips = FileClips(data, first=most)
    shown = [row for _, row in sorted(rows(clips), key=lambda one: one[0])]
    made_by = PngImagePlugin.PngInfo()
    made_by.add_text("Software", MADE_BY)
    with written(out) as partial:
        page(shown, foot(clips, stage)).save(partial, "PNG", pnginfo=made_by)
    return {
        "shown": len(shown), "looked_at": len(clips), "clips": clips.total, "left_out": dict(clips.skipped),
        "remarks": remarks(clips, stage),
    }  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """0 drawn · 1 it failed · 2 the data cannot be used."""
    parser = argparse.ArgumentParser(prog="python -m opensora.sheet", description="Draw a data set as the model sees it.")
    parser.add_argument("out", type=Path, metavar="OUT.png")
    parser.add_argument("--clips", type=int, default=CLIPS, help="the first so many [%(default)s]")
    parser.add_argument("--stage", default="STAGE", help="name of the stage whose data this is")
    args = parser.parse_args(argv)
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)  # what is left out stands in the result
    try:
        data = DataConfig.model_validate_json(sys.stdin.buffer.read())
        sys.stdout.write(json.dumps(draw(data, args.out, args.clips, args.stage)) + "\n")
    except TrainerError as error:
        sys.stderr.write(f"error: {printable(str(error))}\n")
        return 2 if error.kind == "config" else 1
    except ValidationError as error:
        sys.stderr.write(f"error: stdin: {printable(str(error.errors()[0]['msg']))}. Give the data section of a stage as JSON\n")
        return 2
    except OSError as error:
        advice = "Make room, or name another file" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "Name another file"
        sys.stderr.write(f"error: {error.filename or args.out}: {error.strerror or error}. {advice}\n")
        return 1
    finally:
        logging.disable(disabled)
    return 0


if __name__ == "__main__":
    sys.exit(last_resort.run("sheet", main))
