"""docs/own-clips.md is typed from its first command to its last, word by word, in one shell.

The recipe that its first command writes is made small before the others follow.
"""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path

import pytest
from doc_commands import Shell, commands_of
from hand_made_videos import quadrants, write
from tiny_recipe import warm_trainer

PAGE = "docs/own-clips.md"


def clips(folder: Path) -> None:
    folder.mkdir(parents=True)
    lines = ["path,text"]
    for number in range(6):
        write(folder / f"IMG_{number:04}.mp4", [quadrants() for _ in range(12)])
        lines.append(f"IMG_{number:04}.mp4,a red ball rolls past a house")
    (folder / "captions.csv").write_text("\n".join(lines) + "\n")


def made_small(recipe: Path) -> None:
    for stage in recipe.glob("stage*.yaml"):
        text = re.sub(r"^steps: .*$", "steps: 2", stage.read_text(), flags=re.MULTILINE)
        text = re.sub(r"^batch_size: .*$", "batch_size: 2", text, flags=re.MULTILINE)
        stage.write_text(re.sub(r"^  steps: .*$", "  steps: 2", text, flags=re.MULTILINE))  # of sampling
    with (recipe / "osctl.yaml").open("a") as file:
        file.write(f"\ntrainer: {json.dumps(warm_trainer())}\n")


@pytest.mark.long
def test_own_clips_become_a_video_by_the_commands_of_the_page(tmp_path: Path) -> None:
    first, *others = commands_of(PAGE, "tests/e2e/test_pages.py")
    clips(tmp_path / "clips")
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    shell = Shell(tmp_path, dict(os.environ) | {"HOME": str(tmp_path), "PATH": path, "OSCTL_TRACKING": "none"})
    shell(first)
    made_small(tmp_path / "my-model")
    for command in others:
        shell(command)
    assert (tmp_path / "my-model/ball.mp4").stat().st_size > 0 and (tmp_path / "my-model/clips.png").stat().st_size > 0
