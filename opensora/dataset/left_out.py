"""Folders that osctl writes itself, so that what it made of raw videos is not taken for raw videos where it lies among them.

Owns how they are told: by what they are (the run's own store, home and run directory, under whatever path or link), and by what lies in
them (run directories of preparations, data sets in a store). Refuses to leave out the folder that a person named as a source.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable
from pathlib import Path

from opensora.printable import several

FILE = "left_out.json"
"""In a run directory: the launcher's own folders, as {"schema": 1, "folders": [PATH, …]}."""
RUN_DIRECTORY = frozenset({"prepare.yaml", "kept", "quarantined", "temporary"})
DATA_SET = frozenset({"attempts", "events"})
"""Of `datasets/NAME` in a store, where a preparation is or was under way."""


class LeftOut:
    """Of one run. `found` has the folders that were passed over, each once."""

    def __init__(self, folders: Iterable[str | Path] = ()) -> None:
        self._own: set[tuple[int, int]] = set()
        for folder in folders:
            with contextlib.suppress(OSError):  # not made yet: nothing can lie in it
                state = os.stat(folder)  # noqa: PTH116 - of a path or a text
                self._own.add((state.st_dev, state.st_ino))
        self.found: dict[tuple[int, int], str] = {}

    def has(self, path: str, here: tuple[int, int], names: Iterable[str]) -> bool:
        """Whether a folder is passed over.

        Args:
            here: its device and inode.
            names: of all that lies in it.
        """
        inside = frozenset(names)
        is_set = inside >= DATA_SET and Path(path).resolve().parent.name == "datasets"
        if here not in self._own and not is_set and not inside >= RUN_DIRECTORY:
            return False
        self.found.setdefault(here, path)
        return True

    def told(self) -> str:
        """A sentence about those that were passed over; empty: none was."""
        if not self.found:
            return ""
        first = min(self.found.values())
        many = several(len(self.found), "folder")
        return f"passed over {many} among the sources that osctl itself wrote (stores, run directories): {first}"


def of_run(run_dir: Path) -> LeftOut:
    """What a launcher left in a run directory, and that directory. A file that cannot be read counts as not there."""
    folders: list[str] = []
    with contextlib.suppress(OSError, ValueError):
        content = json.loads((run_dir / FILE).read_bytes())
        folders = [one for one in content.get("folders", ()) if isinstance(one, str)] if isinstance(content, dict) else []
    return LeftOut([run_dir, *folders])
