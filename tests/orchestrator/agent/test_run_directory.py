"""Whatever a trainer leaves, whole or half, is read without harm."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from orchestrator.agent.run_directory import RunDirectory


def test_lines_come_once_whole_and_with_null_for_what_is_not_finite(tmp_path: Path) -> None:
    run, file = RunDirectory(tmp_path), tmp_path / "metrics.jsonl"
    assert run.new_lines() == []
    file.write_text('{"step": 1, "loss": NaN, "grad_norm": 1e999}\n{"step": 2, "lo')
    assert run.new_lines() == [{"step": 1, "loss": None, "grad_norm": None}]
    with file.open("a") as more:
        more.write('ss": 0.5}\n')
    assert run.new_lines() == [{"step": 2, "loss": 0.5}]
    assert run.new_lines() == []


def test_damaged_lines_are_left_out(tmp_path: Path) -> None:
    lines = ["{", "[]", "7", '{"step": -1}', '{"step": true}', '{"loss": 1}', "\udcff", '{"step": 3}']
    (tmp_path / "metrics.jsonl").write_bytes("\n".join(lines).encode(errors="surrogateescape") + b"\n")
    assert RunDirectory(tmp_path).new_lines() == [{"step": 3}]


def test_a_result_is_none_until_it_is_written_into_its_space(tmp_path: Path) -> None:
    run, file = RunDirectory(tmp_path), tmp_path / "result.json"
    assert run.result() is None
    for blank in (b"", b" " * 100, b"\0" * 100, b'{"status"'):
        file.write_bytes(blank)
        assert run.result() is None
    file.write_bytes(b'{"status": "completed"}\n' + b" " * 100)
    assert run.result() == {"status": "completed"}


def test_a_result_in_the_trainers_place_fits_into_the_space_that_was_kept(tmp_path: Path) -> None:
    (tmp_path / "result.json").write_bytes(b" " * 4096)
    RunDirectory(tmp_path).write_result({"status": "failed"})
    assert (tmp_path / "result.json").stat().st_size == 4096
    assert RunDirectory(tmp_path).result() == {"schema": 1, "status": "failed"}


def test_half_written_heartbeats_are_no_heartbeats(tmp_path: Path) -> None:
    (tmp_path / "heartbeat-0.json").write_text("{")
    (tmp_path / "heartbeat-1.json").write_text(json.dumps({"rank": 1, "step": 4, "phase": "train"}))
    os.utime(tmp_path / "heartbeat-1.json", (50, 50))
    (beat,) = RunDirectory(tmp_path).heartbeats()
    assert (beat.rank, beat.step, beat.phase, beat.time) == (1, 4, "train", 50)


def test_only_whole_checkpoints_are_published(tmp_path: Path) -> None:
    for name, whole in (
        ("step-00000010", True),
        ("step-00000002", True),
        (".step-00000020.partial", True),
        ("step-00000030", False),
        ("x", True),
    ):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
        if whole:
            (tmp_path / "checkpoints" / name / "CHECKPOINT.json").write_text("{}")
    assert list(RunDirectory(tmp_path).complete_checkpoints()) == [2, 10]


def test_a_pinned_checkpoint_outlives_the_trainers_own_copy(tmp_path: Path) -> None:
    run, own = RunDirectory(tmp_path), tmp_path / "checkpoints" / "step-00000010"
    assert not run.pin(10)
    own.mkdir(parents=True)
    (own / "model.safetensors").write_bytes(b"weights")
    (own / "CHECKPOINT.json").write_text('{"files": {"model.safetensors": 7, "ema.safetensors": 7}}')
    assert not run.pin(10), "half deleted"
    assert not run.pinned(10).exists()
    (own / "ema.safetensors").write_bytes(b"average")
    assert run.pin(10)
    (own / "model.safetensors").unlink()
    assert (run.pinned(10) / "model.safetensors").read_bytes() == b"weights"
    run.unpin(10)
    assert not run.pinned(10).exists()


def test_of_too_long_an_output_the_end_is_kept(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    assert run.rest_of_output() == (0, b"")
    run.log.write_bytes(b"a" * 100_000 + b"the end")
    assert run.new_output(10) == b"a" * 10
    unread, end = run.rest_of_output()
    assert unread == 100_000 - 10 + 7
    assert end.endswith(b"the end") and len(end) == 65_536
    assert run.rest_of_output() == (0, b"")


def test_output_comes_in_whole_lines_so_that_no_secret_is_cut_in_two(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path, lambda data: data.replace(b"hunter2", b"*"))
    run.log.write_bytes(b"one\nhun")
    assert (run.new_output(100), run.new_output(100)) == (b"one\n", b"")
    with run.log.open("ab") as log:
        log.write(b"ter2\n12 hunter2")
    assert run.new_output(10) == b"*\n"
    assert run.new_output(100) == b""
    assert run.new_output(100, final=True) == b"12 *"
    with run.log.open("ab") as log:
        log.write(b"x" * 65_530 + b"hunter2\nlast")
    assert run.output_tail() == b"last"


def test_samples_are_taken_once_they_have_settled(tmp_path: Path) -> None:
    (tmp_path / "samples").mkdir()
    run = RunDirectory(tmp_path)
    for name in ("a.mp4", "b.mp4", "c.partial", "._a.mp4"):
        (tmp_path / "samples" / name).write_text("")
    assert run.settled_samples(0.2) == [], "nobody knows yet"
    time.sleep(0.15)
    (tmp_path / "samples" / "b.mp4").write_text("more")
    assert run.settled_samples(0.2) == []
    time.sleep(0.1)
    assert [path.name for path in run.settled_samples(0.2)] == ["a.mp4"]
    assert [path.name for path in run.settled_samples(0.0)] == ["a.mp4", "b.mp4"]


@pytest.mark.parametrize("ahead_s", [-3600, 3600])
def test_the_file_systems_clock_is_compared_with_no_other(tmp_path: Path, ahead_s: float) -> None:
    """A shared file system gives files the times of its server."""
    run, theirs = RunDirectory(tmp_path), time.time() + ahead_s
    (tmp_path / "samples").mkdir()
    beat = {"rank": 0, "step": 4, "phase": "train", "time": 50.0}
    for name, text in (("samples/a.mp4", ""), ("heartbeat-0.json", json.dumps(beat))):
        (tmp_path / name).write_text(text)
        os.utime(tmp_path / name, (theirs, theirs))
    assert [path.name for path in run.settled_samples(0.0)] == ["a.mp4"], "at the end all are handed over"
    assert [beat.time for beat in run.heartbeats()] == [50.0]
