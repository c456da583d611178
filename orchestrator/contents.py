"""What the stages of a pipeline are made of, by content: digests of the clips that their configurations only name.

Owns the order in which contents are looked for: with local attempts on this machine, since they read the same files; for a cluster what was
registered in the store, since pods may see another folder under the same path, then this machine. Owns also what is said where
nobody can see them. Refuses to read files itself, and to write anything before a launch goes ahead (`Resolved.commit`).
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

from opensora.config import FolderSource, ManifestSource
from opensora.data.manifest import UNKNOWN, DataManifest, RowDifference, changed_since, rows_that_differ, told
from orchestrator import datasets
from orchestrator.config import Pipeline, Stage
from orchestrator.errors import NotFound, OsctlError, Refused
from orchestrator.ports import Store

FilesSource = FolderSource | ManifestSource
READ_AT_MOST = 10 * 2**30
"""Bytes that a launch reads of clips at an address to hash them. More is registered first, by a command that says what it does."""


class Files(Protocol):
    """How clips are read (`adapters.data_files.DataFiles`)."""

    def manifest(self, source: FilesSource, *, at_most: int | None = None) -> DataManifest:
        """Raises NotFound, UsageError, TooMuch, Refused, Unreachable."""

    def rows(self, source: FilesSource) -> list[tuple[str, str]]:
        """Raises as `manifest`."""


@dataclass(frozen=True)
class Resolved:
    """A pipeline with the contents of its stages, as far as they are known."""

    pipeline: Pipeline
    manifests: Mapping[str, DataManifest]
    """Data sets that were looked at, by digest."""
    notes: tuple[str, ...]
    """What was found, for people."""

    def rows_between(self, store: Store, old: str, new: str) -> list[RowDifference]:
        """In which rows two data sets differ, by their digests. Empty where a manifest is not to be had. Raises Unreachable."""
        try:
            before = datasets.get_manifest(store, old)
            after = self.manifests.get(new) or datasets.get_manifest(store, new)
        except (NotFound, Refused):
            return []
        return rows_that_differ(before, after)

    def commit(self, store: Store) -> None:
        """Write down what was found, before anything of it is used. Idempotent. Raises Unreachable, Refused."""
        for manifest in self.manifests.values():
            datasets.put_manifest(store, manifest)


def resolve_contents(pipeline: Pipeline, store: Callable[[], Store] | None, files: Files, *, needed: bool, far: bool = True) -> Resolved:
    """The pipeline with `Stage.contents` filled in.

    Args:
        store: where data may be registered; None: it is not asked.
        far: whether addresses are read, too: that asks a network, and may take long.
        needed: whether contents that cannot be found are a reason to refuse. Otherwise they stay unknown, and that is a note.

    Raises:
        UsageError: a CSV is no list of clips.
        Refused: contents were needed, and nobody can see them.
        Unreachable: the store or the data did not answer.
    """
    return _Search(pipeline, store, files, needed=needed, far=far).resolved()


class _Search:
    """One look at everything that a pipeline names."""

    def __init__(self, pipeline: Pipeline, store: Callable[[], Store] | None, files: Files, *, needed: bool, far: bool) -> None:
        self.pipeline, self.store, self.files, self.needed, self.far = pipeline, store, files, needed, far
        self.manifests: dict[str, DataManifest] = {}
        self.notes: list[str] = []
        self._found: dict[str, str | None] = {}
        """By place."""

    def resolved(self) -> Resolved:
        stages = tuple(self._stage(stage) for stage in self.pipeline.stages)
        return Resolved(self.pipeline.model_copy(update={"stages": stages}), self.manifests, tuple(self.notes))

    def _stage(self, stage: Stage) -> Stage:
        source = stage.config.data.source
        if not isinstance(source, FolderSource | ManifestSource):
            return stage
        if source.path not in self._found:
            self._found[source.path] = self._data(source)
        contents = stage.contents.model_copy(update={"data": self._found[source.path]})
        return stage.model_copy(update={"contents": contents})

    def _data(self, source: FilesSource) -> str | None:
        """The digest of a data set; None: nobody knows it."""
        try:
            return self._registered(source) or self._looked_at(source)
        except datasets.TooMuch as error:
            if self.needed:
                raise Refused(f"data {source.path}: {error}. {_register(self.pipeline, source.path)}") from None
            reason = f"{error}; a launch or osctl data register reads them"
        except NotFound:
            if self.needed:
                raise Refused(unseen(self.pipeline, source.path)) from None
            reason = "this machine does not see it, and nobody has registered it"
        except OsctlError as error:
            if self.needed:
                raise
            reason = str(error)
        self.notes.append(f"data {source.path}: its content is not known here ({reason})")
        return None

    def _registered(self, source: FilesSource) -> str | None:
        """What pods see may be another folder than this machine's: what was registered where it lies counts."""
        if self.store is None or self.pipeline.backend == "local":
            return None
        found = datasets.of_source(self.store(), source.path)
        if found is None:
            return None
        if self.far and "://" in source.path:
            self._check_rows(found, source, datasets.get_manifest(self.store(), found.manifest))
        self.notes.append(f"data {source.path}: registered as {found.name}, {found.rows:,} rows, digest {found.manifest[:12]}")
        return found.manifest

    def _check_rows(self, registered: datasets.DataSet, source: FilesSource, recorded: DataManifest) -> None:
        """Where this machine reaches the CSV, its rows must be those that were registered: that is cheap. Raises Refused."""
        try:
            rows = self.files.rows(source)
        except (NotFound, OsctlError):
            return
        differences = changed_since(recorded, rows, [UNKNOWN] * len(rows))
        if differences:
            raise Refused(
                f"data {source.path}: {len(differences):,} rows are not as they were registered as {registered.name} "
                f"({told(differences)}). Register what is there now: osctl data register {registered.name} {shlex.quote(source.path)}"
            )

    def _looked_at(self, source: FilesSource) -> str:
        remote = "://" in source.path
        if remote and not self.far:
            raise NotFound(source.path)
        manifest = self.files.manifest(source, at_most=READ_AT_MOST if remote or not self.needed else None)
        self.manifests[manifest.digest] = manifest
        missing = f"; {manifest.unreadable:,} files cannot be read" if manifest.unreadable else ""
        size = f"{len(manifest.rows):,} rows, {_size(manifest.size)}"
        self.notes.append(f"data {source.path}: {size}, digest {manifest.digest[:12]}{missing}")
        return manifest.digest


def unseen(pipeline: Pipeline, place: str) -> str:
    """What to say of data that nobody can see, with the command to paste."""
    if pipeline.backend == "local":
        return (
            f"data {place}: is not on this machine, where the attempts of {pipeline.name} run. Correct data.source.path, or bring it here"
        )
    return (
        f"data {place}: this machine does not see it, and nobody has registered it in {pipeline.store}, so a result could not say what it "
        f"was trained on. {_register(pipeline, place)}"
    )


def _register(pipeline: Pipeline, place: str) -> str:
    cluster = f" --cluster {pipeline.cluster.name}" if pipeline.cluster is not None else ""
    store = f" --store {pipeline.store}" if "://" in pipeline.store else ""
    return f"Register it where it lies: osctl data register {suggested(place)} {shlex.quote(place)}{store}{cluster}"


def suggested(place: str) -> str:
    """A name for what lies at a place."""
    last = place.rstrip("/").rpartition("/")[2].removesuffix(".csv").lower()
    slug = re.sub(r"[^a-z0-9.-]+", "-", last).strip("-.")[:40].strip("-.")
    return slug if datasets.NAME.fullmatch(slug) else f"data-{slug}"[:40].strip("-.")


def _size(count: int) -> str:
    return f"{count / 1e9:,.1f} GB" if count >= 1e9 else f"{count / 1e6:,.1f} MB"
