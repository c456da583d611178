"""The code in an export needs nothing but stock packages, and stands in for einops."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from einops import rearrange

from opensora.export import export
from opensora.export.source_code import adapted_modules, path_of
from opensora.exported.rearrange import rearrange as stand_in

STOCK = {"torch", "diffusers", "transformers", "numpy", "PIL"}


def test_every_file_imports_what_lies_beside_it_and_stock_packages_alone(video: Path, tmp_path: Path) -> None:
    export(video, tmp_path / "out")
    texts: dict[str, set[str]] = {}
    for file in (tmp_path / "out").rglob("*.py"):
        texts.setdefault(file.name, set()).add(file.read_text())
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level:
                modules = [node.module] if node.module else [name.name for name in node.names]
                assert all((file.parent / f"{module}.py").is_file() for module in modules), (file, modules)
            elif isinstance(node, ast.Import | ast.ImportFrom):
                names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [name.name for name in node.names]
                assert {name.split(".")[0] for name in names} <= STOCK | set(sys.stdlib_module_names), (file, names)
    # diffusers puts the files of all folders into one: a name may not mean two things
    assert "opensora_config.py" in texts and all(len(each) == 1 for each in texts.values())


def patterns() -> list[tuple[str, list[str]]]:
    """Each `rearrange` that an export holds: its pattern, and the axes that it is given the sizes of."""
    found = {}
    for module in adapted_modules():
        if module in ("opensora.config", "opensora.exported.rearrange"):
            continue
        for node in ast.walk(ast.parse(path_of(module).read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "rearrange":
                assert isinstance(node.args[1], ast.Constant)
                found[str(node.args[1].value)] = [str(keyword.arg) for keyword in node.keywords]
    return sorted(found.items())


@pytest.mark.parametrize(("pattern", "given"), patterns())
def test_rearrange_without_einops_is_that_of_einops(pattern: str, given: list[str]) -> None:
    left = pattern.split("->")[0]
    axes = {name: 2 + number for number, name in enumerate(dict.fromkeys(left.replace("(", " ").replace(")", " ").split()))}
    groups = re.findall(r"\([^()]*\)|\S+", left)
    shape = [int(np.prod([axes[name] for name in group.strip("()").split()])) for group in groups]
    tensor, sizes = torch.arange(float(np.prod(shape))).reshape(shape), {name: axes[name] for name in given}
    assert torch.equal(stand_in(tensor, pattern, **sizes), rearrange(tensor, pattern, **sizes))


def test_rearrange_refuses_what_does_not_divide() -> None:
    with pytest.raises(ValueError, match="does not divide"):
        stand_in(torch.zeros(5, 2), "(a b) c -> a b c", b=2)
    with pytest.raises(ValueError, match="does not divide"):
        stand_in(torch.zeros(6, 2), "(a b) c -> a b c", a=2, b=2)
