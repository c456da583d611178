"""Results of steps that the last run of a data set did not use: found, and removed on request, here and in the store.

Another prompt, detector or release keeps its results beside those of the one before, so that whoever goes back to that one pays nothing
twice. When they are no longer wanted is for a person to say. Owns which these are: all below a digest that is not among those of the last
run (`digests` of status.json). Refuses to touch published versions, which hold their clips themselves, and to guess where no run is known.
"""

from __future__ import annotations

import shutil
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from orchestrator.errors import Refused
from orchestrator.ports import Store, check_key
from orchestrator.prepare import status_object
from orchestrator.prepare.records import Keys
from orchestrator.prepare.run_directory import RunDirectory

SAME = {"matches": "scores"}
"""Steps that have another's digest."""


@dataclass(frozen=True)
class Unused:
    """By step/digest, what is kept there that the last run did not use."""

    objects: Mapping[str, tuple[str, ...]]
    """Keys in the store."""
    folders: tuple[Path, ...]
    """Of this machine."""

    @property
    def bytes_here(self) -> int:
        """On this machine's disk, as the sizes of files add up."""
        return sum(path.stat().st_size for folder in self.folders for path in folder.rglob("*") if path.is_file())


def unused(store: Store, name: str, folder: Path) -> Unused:
    """`folder`: the run directory of this machine. Raises Refused where no run of it is known; Unreachable."""
    keys, directory = Keys(name), RunDirectory(folder)
    used = directory.status().get("digests") or status_object.read(store, keys.status).get("digests")
    if not isinstance(used, dict) or not used:
        raise Refused(
            f"data set {name}: neither {directory.path} nor {store.url} says which results its last run used. "
            f"Run it once: osctl prepare run {directory.config}"
        )

    def is_used(place: str) -> bool:
        step, _, digest = place.partition("/")
        return used.get(SAME.get(step, step)) == digest

    objects: dict[str, list[str]] = defaultdict(list)
    for key in store.list(f"{keys.kept}/"):
        step, digest, *_ = check_key(key).removeprefix(f"{keys.kept}/").split("/")
        if not is_used(f"{step}/{digest}"):
            objects[f"{step}/{digest}"].append(key)
    roots = (directory.kept, directory.path / "quarantined")
    folders = tuple(
        place for root in roots for place in sorted(root.glob("*/*")) if place.is_dir() and not is_used(f"{place.parent.name}/{place.name}")
    )
    return Unused({place: tuple(found) for place, found in sorted(objects.items())}, folders)


def discard(store: Store, found: Unused) -> None:
    """Repeatable. Raises Unreachable, Refused."""
    for names in found.objects.values():
        for key in names:
            store.discard(key)
    for folder in found.folders:
        shutil.rmtree(folder)
