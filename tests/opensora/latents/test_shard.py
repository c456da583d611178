"""Laws of one file of the cache: what is written row by row is read as one tensor, and a file that is not whole is no shard."""

from __future__ import annotations

import os
import resource
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from opensora.errors import DataError, DiskFull
from opensora.latents.shard import Shard, Writer

LAW = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def write(path: Path, rows: torch.Tensor, dtype: torch.dtype = torch.float32, at_once: int = 2) -> None:
    with Writer(path, "rows", tuple(rows.shape[1:]), dtype) as writer:
        for part in torch.split(rows, at_once):
            writer.append(part)
        writer.finish({"numbers": torch.arange(len(rows))})


@LAW
@given(st.integers(0, 9), st.integers(1, 4), st.sampled_from((torch.float32, torch.float16, torch.bfloat16)))
def test_what_is_written_row_by_row_is_read_as_a_whole(count: int, at_once: int, dtype: torch.dtype) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path, rows = Path(folder) / "x.safetensors", torch.randn(count, 3, 5)
        write(path, rows, dtype, at_once)
        shard = Shard(path, "rows")
        assert torch.equal(shard.large, rows.to(dtype))
        assert torch.equal(shard.small["numbers"], torch.arange(count))
        assert shard.size == path.stat().st_size
        others = load_file(path)
        assert torch.equal(others["rows"], rows.to(dtype))
        assert torch.equal(others["numbers"], torch.arange(count))


def test_a_shard_larger_than_what_is_written_at_once_needs_no_more_memory_than_that(tmp_path: Path) -> None:
    part = torch.ones(4, 1 << 20)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with Writer(tmp_path / "x", "rows", (1 << 20,), torch.float32) as writer:
        for _ in range(12):
            writer.append(part)
        writer.finish({})
    assert writer.rows == 48
    assert (tmp_path / "x").stat().st_size > 48 << 22
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 48 << 10  # KiB: a quarter of it


def test_rows_of_another_shape_are_refused(tmp_path: Path) -> None:
    with (
        Writer(tmp_path / "x", "rows", (3,), torch.float32) as writer,
        pytest.raises(ValueError, match=r"rows of \(4,\), this file's are \(3,\)"),
    ):
        writer.append(torch.zeros(2, 4))


def test_a_file_that_was_not_finished_is_no_shard(tmp_path: Path) -> None:
    with Writer(tmp_path / "x", "rows", (3,), torch.float32) as writer:
        writer.append(torch.zeros(2, 3))
    with pytest.raises(DataError, match="no whole file"):
        Shard(tmp_path / "x", "rows")


@pytest.mark.parametrize("size", [0, 5, 1000, 16384, 16400])
def test_a_cut_file_is_refused_before_it_is_mapped(tmp_path: Path, size: int) -> None:
    write(tmp_path / "x", torch.randn(5, 3))
    os.truncate(tmp_path / "x", size)
    with pytest.raises(DataError, match=f"x: (no whole file|{size} bytes, the latent cache has 16484 there).*Start again"):
        Shard(tmp_path / "x", "rows")


def test_a_file_that_is_cut_later_is_found_out(tmp_path: Path) -> None:
    write(tmp_path / "x", torch.randn(5000, 3))
    shard = Shard(tmp_path / "x", "rows")
    shard.check()
    os.truncate(tmp_path / "x", 20000)
    with pytest.raises(DataError, match="x: 20000 bytes, the latent cache has 116384 there"):
        shard.check()


def test_a_file_that_is_replaced_later_does_no_harm(tmp_path: Path) -> None:
    rows = torch.randn(5, 3)
    write(tmp_path / "x", rows)
    shard = Shard(tmp_path / "x", "rows")
    write(tmp_path / "y", torch.randn(2, 3))
    (tmp_path / "y").rename(tmp_path / "x")
    shard.check()
    assert torch.equal(shard.large, rows)


def test_a_place_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    with pytest.raises(DiskFull, match="cannot be written"):
        Writer(tmp_path / "gone" / "x", "rows", (3,), torch.float32)
