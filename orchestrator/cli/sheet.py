"""The picture of a data set, as a stage's model sees it: what `osctl data show --sheet` draws, in a process of the trainer."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from opensora.printable import quoted
from orchestrator.cli import output

if TYPE_CHECKING:
    from opensora.config import DataConfig
    from orchestrator.pipelines.host import Host
    from orchestrator.pipelines.workspace import Workspace

SIZES = ("8x144x256", "8x256x144", "8x192x192", "1x144x256", "1x256x144", "1x192x192")
"""Lying, standing and square clips, and pictures: where nobody asks for other sizes."""
FPS = 8.0


def of_stage(workspace: Workspace, stage: str) -> DataConfig:
    """The data section of a stage. Raises UsageError."""
    from orchestrator.pipelines.find import check_stage

    check_stage(workspace, stage, "data show --stage")
    return workspace.pipeline.stage(stage).config.data


def as_asked(sizes: Sequence[str], fps: float | None) -> DataConfig:
    """The data section of a stage with these sizes. Raises UsageError."""
    from opensora.config import Bucket, DataConfig, FolderSource
    from orchestrator.errors import UsageError

    buckets = []
    for size in sizes or SIZES:
        parts = re.fullmatch(r"([1-9]\d{0,3})x([1-9]\d{0,3})x([1-9]\d{0,3})", size)
        if parts is None:
            raise UsageError(f"data show --size {size}: is frames x height x width, each 1 … 9999. Write for example --size 8x144x256")
        frames, height, width = map(int, parts.groups())
        buckets.append(Bucket(frames=frames, height=height, width=width, batch_size=1))
    first, nowhere = buckets[0], FolderSource(kind="folder", path="")
    return DataConfig(source=nowhere, frames=first.frames, height=first.height, width=first.width, buckets=tuple(buckets), fps=fps or FPS)


def draw(host: Host, place: str, sheet: Path, data: DataConfig, clips: int, stage: str | None) -> dict[str, Any]:
    """Draw it, and return what the drawing process found. Raises UsageError, Refused, SystemExit with its code."""
    from opensora.config import FolderSource
    from orchestrator import modules
    from orchestrator.errors import NotFound, Refused
    from orchestrator.inputs.data_files import DataFiles
    from orchestrator.inputs.own_clips import source_of

    source = source_of(place, host.env)
    if not isinstance(source, FolderSource):
        try:
            source = source.model_copy(update={"clips": len(DataFiles(host.home, host.env).captioned(source).rows)})
        except NotFound as error:
            raise Refused(f"data show {place}: {error} is not there. Correct the path") from None
    content = data.model_copy(update={"source": source}).model_dump_json()
    command = modules.command("opensora.sheet", str(sheet), "--clips", str(clips), *(("--stage", stage) if stage else ()))
    done = subprocess.run(
        command, check=False, input=content, stdout=subprocess.PIPE, text=True, env=modules.reading_clips(host.for_children())
    )
    if done.returncode:
        raise SystemExit(done.returncode if done.returncode > 0 else 128 - done.returncode)
    return dict(json.loads(done.stdout))


def emit(found: dict[str, Any], sheet: Path, output_: output.Format) -> None:
    """Print what was drawn, and what was left out and why."""
    row = {"sheet": str(sheet), "shown": found["shown"], "left_out": len(found["left_out"]), "clips": found["clips"]}
    for name, reason in sorted(found["left_out"].items()):
        output.note(f"left out {quoted(name)}: {reason}")
    for remark in found["remarks"]:
        output.note(remark)
    if output_ is not output.Format.table:
        row |= {"reasons": found["left_out"], "remarks": found["remarks"]}
    output.emit(row, output_, {"sheet": "sheet", "shown": "shown", "left_out": "left out", "clips": "clips"})
