"""Single files of an export."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file

from opensora.export.files import write_tensors


def test_tensors_are_asked_for_one_by_one_and_the_file_is_safetensors(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(3, 5), "b.c": torch.tensor(2.5), "d": torch.randn(2, 0), "e": torch.randn(4, 4).T}
    asked = []

    def tensor(name: str) -> torch.Tensor:
        asked.append(name)
        return tensors[name]

    for dtype in (torch.float32, torch.bfloat16):
        size = write_tensors(tmp_path / "x", {name: tuple(value.shape) for name, value in tensors.items()}, dtype, tensor)
        assert size == (tmp_path / "x").stat().st_size
        found = load_file(tmp_path / "x")
        assert found.keys() == tensors.keys() and all(torch.equal(found[name], value.to(dtype)) for name, value in tensors.items())
    assert asked == [*tensors, *tensors]
