"""Labels, annotations and tags are spelled in one module, as the contract lists them, and old objects are found by them."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestrator.labels import Annotation, Label, Tag

REPOSITORY = Path(__file__).parents[2]
KEY = re.compile(r"(?<![\w./])osctl/[a-z][\w-]*")
"""A key of ours within a text: no path and no address holds `osctl/` at its beginning."""
ROW = re.compile(r"^\| `([^`]+)` \| (label|annotation|tag) \|", re.M)


def spelled() -> set[tuple[str, str]]:
    kinds = (("label", Label), ("annotation", Annotation), ("tag", Tag))
    return {(key, kind) for kind, keys in kinds for name, key in vars(keys).items() if name.isupper()}


def literals(path: Path) -> Iterator[str]:
    """Text in code: all but docstrings and comments."""
    tree = ast.parse(path.read_text())
    docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            yield node.value


def test_no_other_module_spells_one() -> None:
    found = {
        str(path.relative_to(REPOSITORY)): keys
        for path in sorted((REPOSITORY / "orchestrator").rglob("*.py"))
        if (keys := [key for text in literals(path) for key in KEY.findall(text)])
    }
    assert found.keys() == {"orchestrator/labels.py"}, found


def test_the_contract_lists_them_all() -> None:
    listed = ROW.findall((REPOSITORY / "docs/contracts.md").read_text())
    assert len(listed) == len(set(listed))
    assert set(listed) == spelled()


@pytest.mark.parametrize("folder", ["helm/osctl/templates", "k8s"])
def test_manifests_written_by_hand_use_no_other_key(folder: str) -> None:
    text = "\n".join(path.read_text() for path in (REPOSITORY / folder).rglob("*") if path.suffix in (".yaml", ".tpl"))
    keys = {found.removesuffix(":") for found in re.findall(r"(?<![\w./])osctl/[a-z-]+(?=:)|(?<=key: )osctl/[a-z-]+", text)}
    assert Label.ROLE in keys and keys <= {key for key, kind in spelled() if kind != "tag"}
