"""Samples and readings never decide whether trained weights count: whatever fails in them is a warning, and no rank waits for another."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gang
import pytest
import torch
from hard_prompts import HARD
from PIL import Image

from opensora import train
from opensora.checkpoint import reader as checkpoint
from opensora.config import StageConfig
from opensora.errors import ConfigError
from opensora.evaluation.video_files import write_sheet
from opensora.training import after_training
from opensora.training.run_directory import RESULT_BYTES, RunDirectory
from opensora.training.trainer import DrainRequest

Stages = Callable[..., StageConfig]
Runs = Callable[..., RunDirectory]

SHOWN = {"prompts": ["a digit 3"], "evaluate": {"kind": "digits", "clips": 4, "frames": 1}}


def in_process(run: RunDirectory) -> dict[str, Any]:
    train.run_reported(run, DrainRequest())
    return result(run)


def result(run: RunDirectory) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((run.path / "result.json").read_text())
    return content


def test_every_prompt_is_drawn(tiny_stage: Stages, make_run: Runs, tmp_path: Path) -> None:
    """Captions of a person's folder become prompts. A `/` in one ended the stage after its training."""
    folder, prompts = tmp_path / "pictures", [" ".join(prompt.split()).replace("\0", " ") for prompt in HARD]
    prompts = [prompt for prompt in dict.fromkeys(prompts) if prompt.isprintable() and any(map(str.isalnum, prompt))]
    assert len(prompts) > 15
    folder.mkdir()
    rows = ["path,text"]
    for number, prompt in enumerate(prompts):
        Image.new("RGB", (16, 16), (9 * number % 256, 0, 0)).save(folder / f"{number}.png")
        rows.append(f'{number}.png,"{prompt.replace(chr(34), chr(34) * 2)}"')
    (folder / "captions.csv").write_text("\n".join(rows) + "\n")
    stage = tiny_stage(data={"source": {"kind": "folder", "path": str(folder)}}, steps=1, prompts=[*prompts, *prompts])
    run = make_run(stage)
    ended = in_process(run)
    assert (ended["status"], ended.get("warnings")) == ("completed", None), ended
    listing = json.loads((run.samples / "samples.json").read_text())["clips"]
    assert [clip["prompt"] for clip in listing] == [*prompts, *prompts]
    assert {path.name for path in run.samples.iterdir()} == {clip["file"] for clip in listing} | {"sheet.png", "samples.json"}


@pytest.mark.parametrize("prompt", HARD, ids=range(len(HARD)))  # type: ignore[arg-type]
def test_a_sheet_has_room_for_every_caption(prompt: str, tmp_path: Path) -> None:
    write_sheet(tmp_path / "sheet.png", torch.zeros(1, 1, 16, 16, 3, dtype=torch.uint8), [prompt])
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.size[1] > 16


FAULTS = [
    OSError(28, "No space left on device"),
    MemoryError(),
    torch.OutOfMemoryError("CUDA out of memory"),
    RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"),
    ConfigError("caption 'x': unknown word"),
    KeyError("\ud800"),
    ZeroDivisionError("x" * 100_000),
    AssertionError(),
    RecursionError(),
    ImportError("no module named sklearn"),
]


@pytest.mark.parametrize("place", ["generate_in_batches", "write_mp4", "write_sheet", "Sampler", "_tally", "_readings"])
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: type(fault).__name__)
def test_whatever_fails_after_the_training_is_a_warning(
    fault: Exception, place: str, tiny_stage: Stages, make_run: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise copy.copy(fault)  # an exception that lives on keeps what was on the stack, and its open files

    monkeypatch.setattr(after_training.Sampler if place == "generate_in_batches" else after_training, place, fail)
    run = make_run(tiny_stage(**SHOWN, steps=1))
    ended = in_process(run)
    assert (ended["status"], ended["step"], ended["class"]) == ("completed", 1, None)
    (warning,) = ended["warnings"]
    assert "the weights are saved" in warning and (str(fault)[:20] in warning or isinstance(fault, KeyError))
    assert (run.path / "result.json").stat().st_size == RESULT_BYTES
    assert checkpoint.read(checkpoint.directory(run.checkpoints, 1))[0].complete
    assert bool(ended["evaluation"]) == (place in ("generate_in_batches", "write_mp4", "write_sheet"))
    assert not run.samples.exists() or not list(run.samples.glob("*.partial"))


def test_a_samples_folder_that_cannot_be_made_is_a_warning(tiny_stage: Stages, make_run: Runs) -> None:
    run = make_run(tiny_stage(**SHOWN, steps=1))
    run.samples.write_text("a file where the folder should be")
    ended = in_process(run)
    assert ended["status"] == "completed" and "no samples were drawn: FileExistsError" in ended["warnings"][0]
    assert ended["evaluation"]["clips"] == 4


def test_a_prompt_that_cannot_be_drawn_is_said_before_the_training_and_never_after_it(tiny_stage: Stages, make_run: Runs) -> None:
    stage = tiny_stage(steps=1)
    first = make_run(stage)
    assert in_process(first)["status"] == "completed"
    unknown = tiny_stage(steps=1, prompts=["a word that no clip has"])
    assert in_process(make_run(unknown))["class"] == "config"
    again = make_run(unknown, resume=checkpoint.directory(first.checkpoints, 1))
    ended = in_process(again)
    assert ended["status"] == "completed" and "unknown word 'word'" in ended["warnings"][0]


ONE_RANK_FAILS = """
import os, sys
from opensora import train
from opensora.training import after_training
def fail(*_, **__):
    raise MemoryError("of this rank alone")
if os.environ["RANK"] == os.environ["FAILS"]:
    if os.environ["PLACE"] == "exit":
        setattr(after_training, "_tally", lambda *_, **__: os._exit(9))
    else:
        drawing = os.environ["PLACE"] == "generate_in_batches"
        setattr(after_training.Sampler if drawing else after_training, os.environ["PLACE"], fail)
code = train.main([sys.argv[1]])
assert code == 0, code
os._exit(0)
"""


@pytest.mark.parametrize(
    ("strategy", "place", "fails"),
    [("ddp", "generate_in_batches", 0), ("ddp", "_tally", 1), ("fsdp", "Sampler", 1), ("fsdp", "parameters", 0), ("fsdp", "_readings", 0)],
)
@pytest.mark.long
def test_no_rank_waits_for_one_that_has_failed(strategy: str, place: str, fails: int, tiny_stage: Stages, make_run: Runs) -> None:
    run = make_run(tiny_stage(**SHOWN, steps=1, parallel={"strategy": strategy}))
    gang.run(2, "-c", ONE_RANK_FAILS, str(run.path), env={"FAILS": str(fails), "PLACE": place}, timeout=90)
    ended = result(run)
    assert ended["status"] == "completed" and "of this rank alone" in ended["warnings"][0]
    assert bool(ended["evaluation"]) == (place == "generate_in_batches")


@pytest.mark.long
def test_a_rank_that_dies_while_the_stage_is_judged_takes_no_weights_with_it(tiny_stage: Stages, make_run: Runs) -> None:
    run = make_run(tiny_stage(**SHOWN, steps=1))
    processes = gang.start(2, "-c", ONE_RANK_FAILS, str(run.path), env={"FAILS": "1", "PLACE": "exit"})
    try:
        for process in processes:
            process.communicate(timeout=90)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert [process.returncode for process in processes] == [0, 9]
    ended = result(run)
    assert ended["status"] == "completed" and "another rank ended" in ended["warnings"][0]
