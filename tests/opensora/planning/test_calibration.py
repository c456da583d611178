"""A point says one thing, and a stage is stood for by the one most like it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from opensora.config import ModelConfig
from opensora.planning import calibration
from opensora.planning.calibration import Point
from opensora.planning.flops import forward_flops

TINY = ModelConfig(depth=2, width=64, heads=4, caption_width=32, caption_tokens=12)


def point(model: ModelConfig = TINY, frames: int = 4, tokens: int = 16, batch: int = 2, tflops: float = 0.05, **changes: Any) -> Point:
    work = 3 * forward_flops(model, 8, frames, tokens) * batch
    content = {
        "model": model.model_dump(mode="json"),
        "out_channels": 8,
        "frames": frames,
        "tokens": tokens,
        "captions": model.caption_tokens,
        "batch": batch,
        "dtype": "fp32",
        "step_s": work / tflops / 1e12,
        "tflops": tflops,
        "mfu": tflops / 0.1,
    }
    return Point.model_validate_json(json.dumps(content | changes))


def test_a_file_is_read_as_it_was_written(tmp_path: Path) -> None:
    made = calibration.Calibration(device="cpu-core", machine="one core", date="2026-11-23", command="bench/step.py", points=(point(),))
    (tmp_path / "a.json").write_text(made.model_dump_json(by_alias=True))
    assert json.loads((tmp_path / "a.json").read_text())["schema"] == 1
    assert calibration.read(tmp_path / "a.json") == made


def test_a_speed_that_is_not_flops_over_seconds_is_refused() -> None:
    with pytest.raises(ValidationError, match=r"tflops 0\.05 is not what"):
        point(step_s=1.0)


def test_ranks_that_share_a_clip_have_their_part_of_its_flops() -> None:
    alone = point()
    assert point(sequence=2, devices=2, step_s=alone.step_s / 2).flops() == alone.flops() / 2


def test_the_nearest_point_is_the_one_of_the_most_similar_work() -> None:
    wide = TINY.model_copy(update={"width": 256})
    points = [point(), point(frames=16), point(wide), point(batch=64)]
    for number, one in enumerate(points):
        found = calibration.nearest(points, model=one.model, out_channels=8, frames=one.frames, tokens=one.tokens, batch=one.batch)
        assert found == (points[number], 1.0)
    found = calibration.nearest(points, model=TINY, out_channels=8, frames=12, tokens=16, batch=2)
    assert found is not None
    assert found[0] == points[1]
    assert 1.3 < found[1] < 1.4
    assert calibration.nearest([], model=TINY, out_channels=8, frames=4, tokens=16, batch=2) is None
