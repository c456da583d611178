from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from training_runs import in_process, largest_file, result

from opensora.checkpoint import reader as checkpoint
from opensora.config import StageConfig
from opensora.errors import ParentError
from opensora.training.run_directory import RunDirectory
from opensora.training.stage import classify

Stages = Callable[..., StageConfig]
Runs = Callable[..., RunDirectory]
Complete = Callable[..., Path]
VIDEO = {"frames": 4}


def test_a_full_disk_is_reported_and_earlier_checkpoints_stay(tiny_stage: Stages, make_run: Runs) -> None:
    stage = tiny_stage(steps=3)
    first = make_run(stage)
    in_process(first)
    run = make_run(stage, resume=checkpoint.directory(first.checkpoints, 1))
    with largest_file(64_000):
        failed = in_process(run)
    assert (failed["status"], failed["class"]) == ("failed", "disk")
    assert "step-00000002" in failed["reason"]
    assert [path.name for path in run.checkpoints.iterdir()] == ["step-00000001"]
    checkpoint.read(checkpoint.directory(run.checkpoints, 1))


def test_the_first_rank_to_report_is_believed(tiny_stage: Stages, make_run: Runs) -> None:
    run = make_run(tiny_stage())
    run.reserve_result()
    size = (run.path / "result.json").stat().st_size
    assert (run.path / "result.json").read_text().isspace()
    assert RunDirectory(run.path, rank=3).finish("failed", reason="x" * 100_000, kind="oom")
    assert not run.finish("failed", reason="the ranks after it", kind="code")
    assert (result(run)["class"], result(run)["rank"]) == ("oom", 3)
    assert (run.path / "result.json").stat().st_size == size


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (MemoryError(), "oom"),
        (torch.OutOfMemoryError("CUDA out of memory"), "oom"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), "oom"),
        (OSError(28, "No space left on device"), "disk"),
        (ParentError("x"), "parent"),
        (RuntimeError("shape"), "code"),
    ],
)
def test_each_end_has_its_class(error: Exception, kind: str) -> None:
    assert classify(error) == kind


def test_a_broken_stage_file_is_a_config_error(tiny_stage: Stages, make_run: Runs) -> None:
    run = make_run(tiny_stage())
    (run.path / "stage.yaml").write_text((run.path / "stage.yaml").read_text().replace("batch_size: 4", "batch_size: -4"))
    failed = in_process(run)
    assert failed["class"] == "config"
    assert "batch_size" in failed["reason"] and "-4" in failed["reason"]


def test_a_pickle_is_never_loaded(tiny_stage: Stages, make_run: Runs, complete: Complete, tmp_path: Path) -> None:
    class Payload:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (tmp_path / "executed",)

    parent = complete(tiny_stage())
    (parent / "ema.safetensors").write_bytes(pickle.dumps(Payload()))
    record = json.loads((parent / checkpoint.RECORD).read_text())
    record["files"]["ema.safetensors"] = (parent / "ema.safetensors").stat().st_size
    (parent / checkpoint.RECORD).write_text(json.dumps(record))
    pickle.loads((parent / "ema.safetensors").read_bytes())  # noqa: S301 - it would have done something
    (tmp_path / "executed").unlink()

    assert in_process(make_run(tiny_stage(), parent=parent))["class"] == "parent"
    named = in_process(make_run(tiny_stage(weights=str(parent / "ema.safetensors"))))
    assert named["class"] == "parent"
    assert not (tmp_path / "executed").exists()


def test_a_stage_leaves_clips_a_sheet_and_what_was_asked(tiny_stage: Stages, make_run: Runs) -> None:
    run = make_run(tiny_stage(data=VIDEO, steps=1, prompts=["a digit 3 moving left", "a digit 7 moving up"]))
    in_process(run)
    listing = json.loads((run.samples / "samples.json").read_text())
    assert [clip["prompt"] for clip in listing["clips"]] == ["a digit 3 moving left", "a digit 7 moving up"]
    assert len({clip["seed"] for clip in listing["clips"]}) == 2
    assert all((run.samples / clip["file"]).stat().st_size > 0 for clip in listing["clips"])
    assert (run.samples / "sheet.png").read_bytes().startswith(b"\x89PNG")


def test_an_image_stage_is_judged_on_images_and_on_video(tiny_stage: Stages, make_run: Runs) -> None:
    run = make_run(tiny_stage(steps=1, evaluate={"kind": "digits", "clips": 40, "frames": 4}))
    readings = in_process(run)["evaluation"]
    assert readings["clips"] == readings["image_clips"] == 40
    assert {"digit_accuracy", "direction_accuracy", "image_digit_accuracy", "digit_ceiling"} <= readings.keys()
