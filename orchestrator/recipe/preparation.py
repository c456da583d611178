"""From what a person typed, or a recipe's `prepare:`, to a `PrepareConfig` that is resolved: paths absolute, every override applied.

Owns what a name is made of where none was given, and which paths of `prepare.yaml` are relative to it. Refuses credentials: all of this is
written into the store.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from opensora.dataset.prepare_config import PrepareConfig
from orchestrator.environment import at_home
from orchestrator.errors import UsageError
from orchestrator.recipe.files import name_for, shipped
from orchestrator.recipe.paths import absolute
from orchestrator.recipe.pipeline import NAME
from orchestrator.recipe.yaml_file import Document, Loc, parse_value, read, shown, validate
from orchestrator.redact import holds_credentials, typed

FILE = "prepare.yaml"
NAME_ADVICE = "Choose lower-case letters, digits, '-' and '.', from a letter on, at most 40: --name mine"
_YAML = (".yaml", ".yml")
_LISTS = (".csv", ".tsv", ".jsonl", ".parquet")
_PATHS: tuple[Loc, ...] = (("filter", "scores"), ("caption", "path"))


def of_typed(
    given: str | None,
    *,
    name: str | None = None,
    licence: str | None = None,
    settings: Sequence[str] = (),
    own: Mapping[str, Any] | None = None,
    env: Mapping[str, str] = os.environ,
    any_name: bool = False,
) -> PrepareConfig:
    """What `osctl prepare run` is to do.

    Args:
        given: a folder or a file of videos, an address, a list of videos, or a prepare.yaml. None: ./prepare.yaml.
        settings: `cut.threshold=30`, ...; they win over everything.
        own: values of options, by key (`workers`, `caption.url`).
        any_name: where none can be made of `given`, any will do: of a plan.

    Raises UsageError.
    """
    document, folder = _document(given, licence)
    if name is not None:
        document = document.with_value(("name",), name, f"--name {name}")
    elif "name" not in document.value:
        document = document.with_value(("name",), _name_of(given or "", any_name), None)
    for key, value in (own or {}).items():
        document = document.with_value(tuple(key.split(".")), value, f"{key}: {value}")
    for setting in settings:
        key, separator, text = setting.partition("=")
        label = f"--set {key}={typed(text)}"
        if not separator or not all(key.split(".")):
            raise UsageError(f"--set {typed(setting)}: is not KEY=VALUE. Example: --set cut.threshold=30")
        document = document.with_value(tuple(key.split(".")), parse_value(text, label), label)
    return resolved(document, folder, env)


def inlined(recipe: Document, folder: Path) -> Document:
    """A recipe whose `prepare:` names a file, with what that file says in its place: then one field of it can be set otherwise.

    Args:
        folder: that the recipe lies in.

    Raises UsageError.
    """
    named = recipe.value.get("prepare")
    if not isinstance(named, str) or not named.strip():
        return recipe
    path = folder / at_home(named)
    content = read(path)
    return recipe.with_value(("prepare",), _with_absolute_paths(content, path.absolute().parent).value)


def of_recipe(recipe: Document, folder: Path, name: str, env: Mapping[str, str]) -> PrepareConfig:
    """What a recipe's `prepare:` means: a mapping, or a prepare.yaml relative to the recipe.

    Args:
        folder: that the recipe lies in.
        name: the recipe's, for a preparation without one.

    Raises UsageError.
    """
    named = recipe.value["prepare"]
    if isinstance(named, str):
        path = folder / at_home(named)
        document, folder = read(path), path.parent
    else:
        lines = {loc[1:]: line for loc, line in recipe.lines.items() if loc[:1] == ("prepare",)}
        said = {loc[1:]: label for loc, label in recipe.overridden.items() if loc[:1] == ("prepare",)}
        document = Document(recipe.source, dict(named), lines, said)
    if "name" not in document.value:
        document = document.with_value(("name",), name, None)
    return resolved(document, folder, env)


def resolved(document: Document, folder: Path, env: Mapping[str, str]) -> PrepareConfig:
    """`folder`: what relative paths are relative to. Raises UsageError."""
    config = validate(PrepareConfig, _with_absolute_paths(document, folder), "prepare")
    if not NAME.fullmatch(config.name):
        raise document.error(("name",), f"{shown(config.name)} is no name of a data set", NAME_ADVICE)
    texts = _texts(config.model_dump(mode="json"), ())
    some = holds_credentials("\n".join(text for _, text in texts), env)  # at once: each look compares with every variable
    for loc, text in texts if some else ():
        if holds_credentials(text, env):
            advice = "Put it into OSCTL_CAPTION_KEY" if loc[0] == "caption" else "Put them where the library that fetches looks by itself"
            raise document.error(loc, "holds credentials, and everything here is written into the store", advice)
    return config


def is_file(given: str | None) -> bool:
    """Whether what was typed means a prepare.yaml. None: the one of this folder."""
    return given is None or (given.lower().endswith(_YAML) and "://" not in given)


def _document(given: str | None, licence: str | None) -> tuple[Document, Path]:
    if given is None:
        if not Path(FILE).is_file():
            raise UsageError(
                f"prepare: nothing to prepare, and there is no {FILE} here. Name a folder of videos: osctl prepare run ~/videos"
            )
        given = FILE
    if is_file(given):
        path = at_home(given)
        return read(path), path.absolute().parent
    if "://" not in given and not at_home(given).exists():
        raise UsageError(f"prepare {typed(given)}: no such file or folder. Name a folder of videos, an address, or a prepare.yaml")
    source: dict[str, Any] = {"path": given}
    if given.lower().endswith(_LISTS):
        source["index"] = "auto"
    if licence:
        source["licence"] = licence
    return Document(f"prepare {typed(given)}", {"sources": [source]}, {}, {}), Path.cwd()


def _name_of(given: str, any_name: bool) -> str:
    path = given.rstrip("/") if "://" in given else os.path.normpath(at_home(given).absolute())
    last = path.rpartition("/")[2]
    name = name_for(Path(last).stem if Path(last).suffix else last)
    if not name and any_name:
        return "data"
    if not name:
        raise UsageError(f"prepare {typed(given)}: no name of a data set can be made of {last!r}. Give one: --name mine")
    return name


def _with_absolute_paths(document: Document, folder: Path) -> Document:
    sources = document.value.get("sources")
    if isinstance(sources, list):  # all at once: `with_value` copies the whole list
        document = document.with_value(("sources",), [_absolute_source(source, folder) for source in sources])
    for loc in _PATHS:
        inner: Any = document.value
        for part in loc:
            inner = inner.get(part) if isinstance(inner, dict) else None
        if isinstance(inner, str) and inner.strip():
            document = document.with_value(loc, absolute(inner, folder))
    encode = document.value.get("encode")
    if isinstance(encode, str) and encode not in shipped() and (folder / at_home(encode)).exists():
        document = document.with_value(("encode",), absolute(encode, folder))
    return document


def _absolute_source(source: Any, folder: Path) -> Any:
    if isinstance(source, dict) and isinstance(source.get("path"), str) and source["path"].strip():
        return {**source, "path": absolute(source["path"], folder)}
    return source


def _texts(value: Any, loc: Loc) -> list[tuple[Loc, str]]:
    if isinstance(value, str):
        return [(loc, value)]
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [found for key, inner in items for found in _texts(inner, (*loc, key))]
