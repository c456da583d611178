"""A person's own clips (`--data`): which source of a stage a typed place or name is, and the captions that lie there.

A name is one of a data set in the store, prepared or registered. A path that exists comes before a name.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from opensora.printable import several

if TYPE_CHECKING:
    from opensora.config import FolderSource, ManifestSource
    from orchestrator.ports import Store


@dataclass(frozen=True)
class OwnClips:
    source: FolderSource | ManifestSource
    captions: list[str]
    note: str = ""
    """What a person should know about how it was understood."""


def source_of(place: str, env: Mapping[str, str] = os.environ) -> FolderSource | ManifestSource:
    """A folder, or, by the end of its name, a table. A local path is made absolute. Raises UsageError where the place holds credentials."""
    from opensora.config import FolderSource, ManifestSource
    from opensora.dataset.layouts import is_table
    from orchestrator.environment import at_home
    from orchestrator.errors import UsageError
    from orchestrator.redact import holds_credentials, typed

    if holds_credentials(place, env):
        raise UsageError(f"{typed(place)}: holds credentials, and would be written into the store. Put them into the environment")
    path = place.rstrip("/") if "://" in place else os.path.normpath(at_home(place).absolute())
    if is_table(path) and not Path(path).is_dir():
        return ManifestSource.model_construct(kind="manifest", path=path, clips=0)  # as many as it has
    return FolderSource(kind="folder", path=path)


def own_clips(place: str, home: Path, env: Mapping[str, str] = os.environ, *, store: Callable[[], Store] | None = None) -> OwnClips:
    """The source, and the caption of each clip, read as a trainer reads them; of a name as its store has them.

    Args:
        store: where names are looked for; None: places alone are meant.

    Raises UsageError, Refused, Unreachable.
    """
    from orchestrator.environment import at_home
    from orchestrator.errors import Refused, Unreachable

    if store is None or not may_be_name(place):
        return _at(place, home, env)
    if at_home(place).exists():
        found = None
        with contextlib.suppress(Refused, Unreachable):  # a path needs no store
            found, _ = _named(place, store)
        also = f"--data {place}: is the folder or file of that name here, and not the data set {place} of the store. To train on that"
        note = f"{also}, name its place: --data {found.source.path}" if found is not None else ""
        one = _at(place, home, env)
        return OwnClips(one.source, one.captions, note)
    found, known = _named(place, store)
    return found or _at(place, home, env, known)


def may_be_name(place: str) -> bool:
    from orchestrator.inputs.datasets import NAME

    return NAME.fullmatch(place) is not None


def _named(name: str, store: Callable[[], Store]) -> tuple[OwnClips | None, tuple[str, ...]]:
    """The data set of that name, and the names that there are where it is none of them. Raises CorruptCheckpoint, Unreachable."""
    from opensora.config import FolderSource
    from orchestrator.errors import NotFound, Refused
    from orchestrator.inputs import datasets

    opened = store()
    meant = datasets.of_name(opened, name)
    if not meant:
        return None, tuple(one.name for one in datasets.registered(opened))
    one = meant[-1]
    try:
        captions = [row.text for row in datasets.get_manifest(opened, one.manifest).rows]
    except NotFound:
        raise Refused(f"data set {name}: its manifest {one.manifest} is not in {opened.url}. Prepare or register it again") from None
    source = source_of(one.source)
    said = f"--data {name}: {several(one.rows, 'clip')} at {one.source}"
    return OwnClips(source if isinstance(source, FolderSource) else source.model_copy(update={"clips": len(captions)}), captions, said), ()


def _at(place: str, home: Path, env: Mapping[str, str], known: tuple[str, ...] = ()) -> OwnClips:
    """Raises UsageError, Unreachable."""
    from opensora.config import FolderSource
    from orchestrator.environment import at_home
    from orchestrator.errors import NotFound, UsageError
    from orchestrator.inputs.data_files import DataFiles
    from orchestrator.redact import typed

    source = source_of(place if "://" in place else os.path.realpath(at_home(place)), env)
    try:
        captions = [row.text for row in DataFiles(home, env).captioned(source).rows]
    except NotFound:
        what = "folder" if isinstance(source, FolderSource) else "file"
        names = f", or a data set of the store ({', '.join(known[:5])})" if known else ""
        raise UsageError(
            f"--data {typed(place)}: no such {what}. Name a folder of clips with a captions.csv (columns path,text), or such a file{names}"
        ) from None
    return OwnClips(source if isinstance(source, FolderSource) else source.model_copy(update={"clips": len(captions)}), captions)
