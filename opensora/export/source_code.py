"""Copy the code of an export: this package's own source, file by file (`opensora.exported` and what it imports).

Three things change. Imports are relative and begin with `opensora_`, because diffusers puts the files of all local folders side by side.
`opensora.exported.rearrange` replaces einops. The configuration does not need pydantic. So the code needs only torch, diffusers and
transformers, and gives the same frames as `opensora.sample`.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

PACKAGE = Path(__file__).parent.parent
COMPONENTS = ("pipeline", "transformer", "scheduler", "vae", "text_encoder", "tokenizer")


def write_code(name: str, folder: Path, *, as_name: str | None = None) -> str:
    """Write a module of `opensora.exported` and all modules of this package that it imports. Returns the module's name in the export."""
    modules, root = adapted_modules(), f"opensora.exported.{name}"
    needed, waiting = {root}, [root]
    while waiting:
        new = modules[waiting.pop()].needs - needed
        needed |= new
        waiting += new
    for module in needed - {root}:
        (folder / f"{name_there(module)}.py").write_text(modules[module].text)
    # diffusers copies the files that a component's file imports, but not those that they import in turn
    beside = "".join(f"from .{name_there(module)} import __name__ as _\n" for module in sorted(needed - {root}))
    future = "from __future__ import annotations\n"
    head, tail = modules[root].text.split(future)
    named = as_name or name_there(root)
    (folder / f"{named}.py").write_text(f"{head}{future}\n{beside}{tail}")
    return named


@dataclass(frozen=True)
class Module:
    text: str
    needs: frozenset[str]


@cache
def adapted_modules() -> dict[str, Module]:
    """All modules of this package that any component needs, as they are written into an export.

    A module has the same text for every component, because diffusers puts the files of all components into one folder.
    """
    found: dict[str, Module] = {}
    fields: set[str] = set()  # names that are needed from opensora.config
    waiting = [f"opensora.exported.{name}" for name in COMPONENTS]
    while waiting:
        module = waiting.pop()
        if module not in found and module != "opensora.config":
            text, needs, names = _adapted(path_of(module).read_text())
            found[module] = Module(text, frozenset(needs))
            waiting += needs
            fields |= names
    found["opensora.config"] = Module(_plain_config(fields), frozenset())
    return found


def _adapted(text: str) -> tuple[str, list[str], set[str]]:
    """A module's text with changed imports, the modules of this package that it imports, and its names from `opensora.config`."""
    lines, needs, fields = text.splitlines(keepends=True), [], set()
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.ImportFrom) or node.module is None or node.module.split(".")[0] not in ("opensora", "einops"):
            assert not (isinstance(node, ast.Import) and any(name.name.split(".")[0] == "opensora" for name in node.names))
            continue
        names = [(name.name, name.asname) for name in node.names]
        if node.module != "einops" and not path_of(node.module).is_file():  # the import is from a package
            new = "from . import " + ", ".join(f"{name_there(f'{node.module}.{name}')} as {alias or name}" for name, alias in names)
            needs += [f"{node.module}.{name}" for name, _ in names]
        else:
            module = "opensora.exported.rearrange" if node.module == "einops" else node.module
            new = f"from .{name_there(module)} import " + ", ".join(f"{name} as {alias}" if alias else name for name, alias in names)
            needs.append(module)
            fields |= {name for name, _ in names} if module == "opensora.config" else set()
        assert node.end_lineno is not None
        lines[node.lineno - 1 : node.end_lineno] = [" " * node.col_offset + new + "\n"] + [""] * (node.end_lineno - node.lineno)
    return "".join(lines), needs, fields


def _plain_config(names: Iterable[str]) -> str:
    """Classes of `opensora.config` with their fields, defaults and docstrings, but without checks: values come from a checked stage."""
    text = path_of("opensora.config").read_text()
    classes = {node.name: node for node in ast.parse(text).body if isinstance(node, ast.ClassDef)}
    parts = [
        '"""The parts of osctl\'s configuration that the code beside this file needs, as `opensora.config` describes them."""\n',
        "from __future__ import annotations\n",
        "from dataclasses import dataclass\nfrom typing import Any, Literal\n",
    ]
    for name, node in classes.items():
        if name in names:
            kept = [part for part in node.body if isinstance(part, ast.AnnAssign | ast.Expr)]
            body = "\n".join(f"    {ast.get_source_segment(text, part)}" for part in kept)
            parts.append(f"\n@dataclass(frozen=True)\nclass {name}:\n{body}\n")
    parts += [f"\n{name} = Any\n" for name in sorted(set(names) - classes.keys())]  # unions of classes, which only annotations use
    return "\n".join(parts)


def path_of(module: str) -> Path:
    return PACKAGE.joinpath(*module.split(".")[1:]).with_suffix(".py")


def name_there(module: str) -> str:
    """A module's name in an export, where all modules are side by side."""
    return "opensora_" + module.removeprefix("opensora.").removeprefix("exported.").replace(".", "_")
