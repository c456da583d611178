"""Laws of encoding ahead: what the trainer would make, made once, and said in one line."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from opensora import train
from opensora.config import StageConfig, write_stage
from opensora.encode import Progress, clock, main
from opensora.latents.cache import prepare
from opensora.training.run_directory import RunDirectory
from opensora.training.trainer import DrainRequest

TinyStage = Callable[..., StageConfig]


@pytest.fixture
def stage_yaml(tmp_path: Path, tiny_stage: TinyStage) -> Path:
    write_stage(tiny_stage(), tmp_path / "stage.yaml")
    return tmp_path / "stage.yaml"


def result(capsys: pytest.CaptureFixture[str]) -> tuple[dict[str, Any], str]:
    said = capsys.readouterr()
    assert len(said.out.splitlines()) == 1
    return json.loads(said.out), said.err


def test_what_is_encoded_ahead_is_what_training_finds(
    tmp_path: Path, stage_yaml: Path, tiny_stage: TinyStage, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(stage_yaml), str(tmp_path / "cache")]) == 0
    told, _ = result(capsys)
    assert str(prepare(tiny_stage(), tmp_path / "cache")) == told["directory"]
    assert told["built"] and told["clips"] == tiny_stage().data.source.clips and told["skipped"] == 0
    assert told["bytes"] == sum(path.stat().st_size for path in Path(told["directory"]).iterdir())


def test_a_run_takes_what_was_encoded_for_all(
    tmp_path: Path, tiny_stage: TinyStage, make_run: Callable[..., RunDirectory], stage_yaml: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main([str(stage_yaml), str(tmp_path / "cache")]) == 0
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*")}
    monkeypatch.setenv("OSCTL_LATENTS", str(tmp_path / "cache"))
    run = make_run(tiny_stage())
    assert train.run_reported(run, DrainRequest()) == 0
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*")} == before
    assert not (run.path / "latents").exists()


def test_encoding_again_encodes_nothing(tmp_path: Path, stage_yaml: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = []
    for _ in range(2):
        assert main([str(stage_yaml), str(tmp_path / "cache")]) == 0
        results.append(result(capsys)[0])
    assert [told["built"] for told in results] == [True, False]
    assert results[0]["directory"] == results[1]["directory"]


def test_a_parents_encoders_are_used(
    tmp_path: Path,
    complete: Callable[..., Path],
    tiny_stage: TinyStage,
    make_run: Callable[..., RunDirectory],
    capsys: pytest.CaptureFixture[str],
) -> None:
    parent = complete(tiny_stage(steps=0))
    later = tiny_stage(seed=5)
    write_stage(later, tmp_path / "later.yaml")
    assert main([str(tmp_path / "later.yaml"), str(tmp_path / "cache"), "--parent", str(parent)]) == 0
    told, _ = result(capsys)
    assert prepare(later, tmp_path / "cache", parent) == Path(told["directory"])
    name = "autoencoder.safetensors"
    assert (Path(told["directory"]) / name).read_bytes() == (parent / name).read_bytes()
    assert main([str(tmp_path / "later.yaml"), str(tmp_path / "cache")]) == 0
    assert result(capsys)[0]["directory"] != told["directory"]


def test_progress_goes_to_stderr_with_pace_and_time_left(
    tmp_path: Path, stage_yaml: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("opensora.data.source.CLIPS_AT_ONCE", 8)
    monkeypatch.setattr("opensora.encode.SPOKEN_S", 0)
    assert main([str(stage_yaml), str(tmp_path / "cache"), "--name", "stage1"]) == 0
    told, said = result(capsys)
    lines = said.splitlines()
    assert len(lines) == -(-told["clips"] // 8)
    assert re.fullmatch(rf"stage1: 8 of {told['clips']} clips, [\d,.]+ clips/s, 0:\d\d left", lines[0])
    assert lines[-1].startswith(f"stage1: {told['clips']} of {told['clips']} clips") and lines[-1].endswith("0:00 left")


def test_progress_is_not_spoken_at_each_batch(capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress("stage1")
    for _ in range(100):
        progress(1, 1000)
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_times_are_read_by_people() -> None:
    assert [clock(seconds) for seconds in (0, 33, 599.6, 7635)] == ["0:00", "0:33", "10:00", "2:07:15"]


def test_a_mistake_is_one_line(tmp_path: Path, stage_yaml: Path, tiny_stage: TinyStage, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "nowhere.yaml"), str(tmp_path / "cache")]) == 2
    assert re.fullmatch(r"error: .*nowhere.yaml: no such file.*\n", capsys.readouterr().err)
    write_stage(tiny_stage(autoencoder={"kind": "kl", "path": "/nowhere/vae", "factor": 4}), stage_yaml)
    assert main([str(stage_yaml), str(tmp_path / "cache")]) == 2
    assert re.fullmatch(r"error: autoencoder.path /nowhere/vae: no such folder.*\n", capsys.readouterr().err)
    write_stage(tiny_stage(), stage_yaml)
    assert main([str(stage_yaml), str(tmp_path / "cache"), "--parent", str(tmp_path)]) == 1
    assert "autoencoder.safetensors" in capsys.readouterr().err
