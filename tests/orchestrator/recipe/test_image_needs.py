"""Laws of what a launch asks of the trainer's image."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny_recipe import write

from opensora.config import ADDED
from opensora.identity import Contents
from orchestrator.agent import accepts
from orchestrator.recipe.files import find
from orchestrator.recipe.image_needs import NEW_IN, ImageNeeds, needs_of, unmet
from orchestrator.recipe.pipeline import Pipeline
from orchestrator.recipe.resolve import load

DIGEST = "sha256:" + 64 * "0"
NEW: dict[str, Any] = {"accumulate": 2, "data.fps": 8.0, "data.max_left_out": 0.9, "masks": {"first_frame": 0.5}}
NEW |= {"routing": {"rate": 0.5, "first_blocks": 1, "last_blocks": 1}, "judging": "beside"}
NEW |= {"objective.min_snr": 5.0, "optimizer.matrices": "muon", "optimizer.momentum": 0.9}
NEW |= {"sampling.guidance_interval": [0.1, 0.8], "sampling.guidance_rescale": 0.5, "sampling.method": "heun"}


def pipeline(folder: Path, **changes: Any) -> Pipeline:
    content: dict[str, Any] = {}
    for name, value in changes.items():
        if name.startswith("data."):
            content["data"] = {"source": {"kind": "digits", "clips": 48}, "frames": 1, "height": 16, "width": 16, name[5:]: value}
        elif name.startswith("sampling."):
            content["sampling"] = {"steps": 2, "method": "euler", "guidance": 2.0, name[9:]: value}
        elif name == "objective.min_snr":
            content |= {"objective": {"kind": "iddpm", "min_snr": value}, "sampling": {"steps": 2, "method": "ddim", "guidance": 2.0}}
        elif name.startswith("optimizer."):
            content["optimizer"] = {"lr": 1e-3, name[10:]: value}
        else:
            content[name] = value
    if "routing" in changes:
        content["model"] = {"depth": 3, "width": 32, "heads": 2, "latent_channels": 8, "caption_width": 16, "caption_tokens": 8}
    if "masks" in changes:
        content |= {"freeze": "none", "data": {"source": {"kind": "digits", "clips": 48}, "frames": 4, "height": 16, "width": 16}}
    return load(write(folder, stages=1, changes=content) / "osctl.yaml")


def test_stages_that_0_1_0_can_run_ask_nothing(tmp_path: Path) -> None:
    assert needs_of(pipeline(tmp_path).stages) is None


def test_every_field_that_0_1_0_did_not_have_is_tried_here() -> None:
    added = {*ADDED, *(f"{part}.{name}" for part, names in NEW_IN.items() for name in names)}
    assert set(NEW) == added | {"sampling.method"}


@pytest.mark.parametrize("name", NEW)
def test_a_field_that_0_1_0_did_not_have_is_asked_for_and_this_release_has_it(tmp_path: Path, name: str) -> None:
    needs = needs_of(pipeline(tmp_path, **{name: NEW[name]}).stages)
    assert needs is not None and unmet(needs.model_dump_json()) == ""


def test_an_import_that_lies_in_the_store_is_asked_for(tmp_path: Path) -> None:
    stages = [stage.model_copy(update={"contents": Contents(weights=DIGEST)}) for stage in pipeline(tmp_path).stages]
    needs = needs_of(stages)
    assert needs == ImageNeeds(abilities=("imports",)) and unmet(needs.model_dump_json()) == ""
    assert needs_of([stage.model_copy(update={"contents": Contents(data=DIGEST)}) for stage in stages]) is None, "0.1.0 reads data by name"


@pytest.mark.parametrize(
    ("needs", "said"),
    [('{"abilities":["telepathy"]}', "telepathy"), ('{"stages":[{"hindsight":1}]}', "objective"), ("{", "JSON"), ('{"more":1}', "more")],
)
def test_what_a_later_release_asks_for_is_refused_in_one_line(needs: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert accepts.main([needs]) == accepts.NOT_ACCEPTED
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and said in line


def test_the_answer_is_an_exit_code() -> None:
    done = subprocess.run([sys.executable, "-m", "orchestrator.agent.accepts", "{}"], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_stage_that_may_shrink_needs_an_image_that_knows_parts_of_a_step() -> None:
    """On fewer nodes its intent has `accumulate`, which an agent of 0.1.0 refuses."""
    plain = load(find("open-sora-1.0")).stages[1]
    assert needs_of([plain]) is None
    resources = plain.spec.resources.model_copy(update={"min_nodes": 4})
    shrinks = plain.model_copy(update={"spec": plain.spec.model_copy(update={"resources": resources})})
    needs = needs_of([shrinks])
    assert needs is not None and [stage["accumulate"] for stage in needs.stages] == [2]
    assert unmet(needs.model_dump_json()) == ""
