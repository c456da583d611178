"""Whether a name already stands for a data set of other sources. Only reads.

Owns what "other" means: no source of the one is a source of the other, nor lies in one of them. Refuses to compare videos: a folder that
was moved is another one, and whoever moved it says so.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from opensora.dataset.prepare_config import PrepareConfig
from opensora.printable import quoted
from orchestrator.errors import Refused
from orchestrator.inputs import datasets
from orchestrator.ports import Store
from orchestrator.prepare import attempts
from orchestrator.prepare.records import Keys

NOTHING_MADE = ("config", "data")
"""Ends of an attempt that leave nothing that somebody would miss."""


def check(store: Store, config: PrepareConfig) -> None:
    """Raises Refused where the name is that of other sources, Unreachable."""
    there = sources_of(store, config.name)
    mine = [given.path for given in config.sources]
    if not there or overlap(there, mine):
        return
    raise Refused(
        f"data set {config.name}: is made of {_shown(there)}, and this is {_shown(mine)}. Prepare this under another name: --name OTHER. "
        "Or let the name stand for this from now on: --replace"
    )


def check_followed(store: Store, config: PrepareConfig) -> None:
    """Raises Refused where somebody prepares other sources under this name, Unreachable."""
    made = attempts.all_of(store, Keys(config.name))
    there = _paths(made[-1].intent.config) if made and made[-1].intent is not None else []
    mine = [given.path for given in config.sources]
    if there and not overlap(there, mine):
        raise Refused(
            f"data set {config.name}: what somebody prepares under this name is made of {_shown(there)}, and this is {_shown(mine)}. "
            "Prepare this under another name: --name OTHER"
        )


def sources_of(store: Store, name: str) -> list[str]:
    """What a name's data set is, or is being, made of; empty: nothing is known under this name. Raises Unreachable."""
    made = attempts.all_of(store, Keys(name))
    whole = [one for one in made if one.outcome is not None and one.outcome.class_ == "completed"]
    begun = [one for one in made if one.outcome is None or one.outcome.class_ not in NOTHING_MADE]
    for one in reversed(whole or begun):
        if one.intent is not None and (paths := _paths(one.intent.config)):
            return paths
    known = datasets.of_name(store, name)
    return [known[-1].source] if known and known[-1].prepared is None else []


def overlap(one: Iterable[str], other: Iterable[str]) -> bool:
    """Whether some source is in both, by its path, or lies in a source of the other."""
    first, second = ({_real(path) for path in paths} for paths in (one, other))
    return bool(first & _above(second) or second & _above(first))


def _real(path: str) -> str:
    return path.rstrip("/") if "://" in path else os.path.realpath(path)


def _above(paths: Iterable[str]) -> set[str]:
    """The paths, and all folders that they lie in."""
    return {str(above) for path in paths for above in ((path,) if "://" in path else (path, *Path(path).parents))}


def _paths(config: Any) -> list[str]:
    sources = config.get("sources") if isinstance(config, dict) else None
    return [str(one["path"]) for one in sources or () if isinstance(one, dict) and one.get("path")]


def _shown(paths: list[str]) -> str:
    more = f" and {len(paths) - 1:,} more" if len(paths) > 1 else ""
    return f"{quoted(paths[0], 200)}{more}"
