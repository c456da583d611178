"""Sources that somebody asked to take out: no later preparation under the same name uses them.

Owns also what is remembered of versions that are deleted for it: which sources each held, by the digest of its manifest, which is what a
training names. Another source of such a version may be asked for later.
"""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Iterable
from pathlib import Path

from opensora.dataset.prepare_config import PrepareConfig
from orchestrator.errors import NotFound, StoreConflict
from orchestrator.ledger.record import Damaged
from orchestrator.ports import Store
from orchestrator.prepare.records import Keys, Removed


def all_of(store: Store, keys: Keys) -> list[Removed]:
    """Raises Unreachable."""
    found = []
    for key in store.list(f"{keys.folder}/removed/"):
        try:
            found.append(Removed.decode(store.read(key).data))
        except (NotFound, Damaged):
            continue
    return found


def remember(store: Store, keys: Keys, manifest: str, sources: Iterable[str]) -> None:
    """Which sources a version held, before it is deleted. Repeatable. `sources`: their sha256. Raises Unreachable."""
    with tempfile.TemporaryDirectory() as folder:  # of a million sources it has 67 MB: no record that `create` takes
        path = Path(folder, "held.json")
        path.write_text(json.dumps({"schema": 1, "sources": sorted(set(sources))}))
        with contextlib.suppress(StoreConflict):  # remembered before
            store.upload(keys.held(manifest), path)


def is_deleted(store: Store, keys: Keys, manifest: str) -> bool:
    """Whether this version was deleted on request. Raises Unreachable."""
    try:
        store.size(keys.held(manifest))
    except NotFound:
        return False
    return True


def manifests_that_held(store: Store, keys: Keys, sha256: str) -> set[str]:
    """Digests of the manifests of deleted versions that held a source. Raises Unreachable."""
    found = set()
    for key in store.list(f"{keys.folder}/held/"):
        with tempfile.TemporaryDirectory() as folder, contextlib.suppress(NotFound, ValueError, KeyError, TypeError):
            store.download(key, Path(folder, "held.json"))
            if sha256 in json.loads(Path(folder, "held.json").read_bytes())["sources"]:
                found.add(key.rpartition("/")[2].removesuffix(".json"))
    return found


def without(store: Store, keys: Keys, config: PrepareConfig) -> PrepareConfig:
    """The same, that drops what was taken out. Raises Unreachable."""
    digests = {one.sha256 for one in all_of(store, keys)} | set(config.exclude)
    return config if digests == set(config.exclude) else config.model_copy(update={"exclude": tuple(sorted(digests))})
