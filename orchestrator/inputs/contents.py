"""What the stages of a pipeline are made of, by content: digests of the clips, weights and encoders that their configurations only name.

Owns the order in which contents are looked for: with local attempts on this machine, since they read the same files; for a cluster what was
registered in the store, since pods may see another folder under the same path, then this machine. Owns also what is said where
nobody can see them. Refuses to read files itself, and to write anything before a launch goes ahead (`Resolved.commit`).

An import (weights, an autoencoder, a text encoder) is a path of this machine, or what the store has under its name or source, or else is
brought to this disk from where it says, once.
"""

from __future__ import annotations

import contextlib
import re
import shlex
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Protocol, TypeVar

from opensora.config import FolderSource, ManifestSource, StageConfig
from opensora.dataset.layouts import Captioned
from opensora.dataset.layouts import Row as ReadRow
from opensora.dataset.manifest import UNKNOWN, DataManifest, RowDifference, Unknown, changed_since, renamed, rows_that_differ, told
from opensora.dataset.usage import LEFT_OUT, LONGEST_NAME
from opensora.dataset.words import split_words
from opensora.printable import quoted, several
from orchestrator.environment import at_home
from orchestrator.errors import NotFound, OsctlError, Refused, Unreachable, UsageError
from orchestrator.inputs import datasets, imports
from orchestrator.ports import Store
from orchestrator.recipe.pipeline import Pipeline, Stage
from orchestrator.recipe.yaml_file import shown

Answer = TypeVar("Answer")
PREPARED = "/prepared/"
"""In the place of a data set that was prepared into a store (`orchestrator.prepare.records`)."""
THE_REST = "or train on what is left"
FilesSource = FolderSource | ManifestSource
READ_AT_MOST = 10 * 2**30
"""Bytes that a launch reads of clips at an address to hash them. More is registered first, by a command that says what it does."""


class Imported(Protocol):
    """Weights or an encoder on this disk (`import_sources.Found`)."""

    @property
    def source(self) -> str: ...
    @property
    def imported(self) -> imports.Import: ...
    @property
    def files(self) -> Mapping[str, Path]: ...
    @property
    def folder(self) -> Path: ...
    @property
    def licence(self) -> str | None: ...
    @property
    def digest(self) -> str: ...


class Sources(Protocol):
    """How imports are brought to this disk (`import_sources.ImportSources`)."""

    def fetch(self, source: str, role: imports.Role | None, *, far: bool = True) -> Imported:
        """Raises NotFound, UsageError, Refused, Unreachable."""


class Files(Protocol):
    """How clips are read (`data_files.DataFiles`)."""

    def scan(self, source: FilesSource, *, at_most: int | None = None) -> tuple[DataManifest, Captioned]:
        """Raises NotFound, UsageError, TooMuch, Refused, Unreachable."""

    def captioned(self, source: FilesSource) -> Captioned:
        """Raises as `scan`."""


@dataclass(frozen=True)
class Resolved:
    """A pipeline with the contents of its stages, as far as they are known."""

    pipeline: Pipeline
    manifests: Mapping[str, DataManifest]
    """Data sets that were scanned, by digest."""
    notes: tuple[str, ...]
    """What was found, for people."""
    found: Mapping[tuple[imports.Role, str], Imported] = field(default_factory=dict)
    """Imports that lie on this disk, by role and as the stage names them."""
    stored: Mapping[str, str] = field(default_factory=dict)
    """Imports that the store has: as the stage names them → digest."""

    def rows_between(self, store: Store, old: str, new: str) -> list[RowDifference]:
        """In which rows two data sets differ, by their digests. Empty where a manifest is in no store. Raises Unreachable."""
        try:
            before = datasets.get_manifest(store, old)
            after = self.manifests.get(new) or datasets.get_manifest(store, new)
        except (NotFound, Refused):
            return []
        return rows_that_differ(before, after)

    def too_few(self, stage: Stage) -> str:
        """Why a stage would end before its first step, as far as files tell without being decoded, and what to do; empty: nothing is known
        against it. Where a setting lets it train, it ends with THE_REST."""
        manifest = self.manifests.get(stage.contents.data or "")
        lost = unusable(manifest) if manifest is not None else []
        most = stage.config.data.max_left_out
        if manifest is None or not lost or (len(lost) < len(manifest.rows) and len(lost) <= most * len(manifest.rows)):
            return ""
        fact = f"{stage.name}: {len(lost):,} of {len(manifest.rows):,} clips are missing, empty or may not be read ({_some(lost)})"
        if len(lost) == len(manifest.rows):
            return f"{fact}, so no device is held. Correct the names in the table, or bring the files where it says"
        return f"{fact}, {LEFT_OUT} (a share of {most:g}), so no device is held. Mend the files or the table, {THE_REST}"

    def commit(self, store: Store) -> None:
        """Write down what was found, before anything of it is used. Idempotent. Raises Unreachable, Refused.

        For a cluster the files of imports, too: its pods see nothing of this disk. Attempts of this machine use them where they lie.
        """
        for manifest in self.manifests.values():
            datasets.put_manifest(store, manifest)
        for (role, _), one in self.found.items():
            digest = imports.put(store, one.imported, one.files if self.pipeline.backend == "kubernetes" else None)
            source = imports.Source(
                manifest=digest, role=role, source=one.source, licence=one.licence, time=time.time(), holder=imports.holder()
            )
            imports.add_source(store, source)

    def places(self, store: Store, cache: Path) -> dict[str, str]:
        """Where each import lies on this machine, as the stages name them; what only the store has is brought here first.

        Raises Refused, CorruptCheckpoint, Unreachable.
        """
        here = {name: str(one.folder) for (_, name), one in self.found.items()}
        return here | {name: str(imports.fetch(store, digest, cache / digest)) for name, digest in self.stored.items()}


def resolve_contents(
    pipeline: Pipeline,
    store: Callable[[], Store] | None,
    files: Files,
    sources: Sources | None = None,
    *,
    needed: bool,
    clips: bool = True,
    far: bool = True,
    cluster: str | None = None,
) -> Resolved:
    """The pipeline with `Stage.contents` filled in.

    Args:
        store: where contents may be registered; None: it is not asked.
        sources: None: imports are not looked for, and what is known of them stays.
        clips: whether clips are looked for.
        far: whether addresses are read, too: that asks a network, and may take long.
        needed: whether contents that cannot be found are a reason to refuse. Otherwise they stay unknown, and that is a note.
        cluster: how `--cluster` calls the pipeline's profile, in commands to paste.

    Raises:
        UsageError: a CSV is no list of clips.
        Refused: contents were needed, and nobody can see them.
        Unreachable: the store or the data did not answer.
    """
    return _Search(pipeline, store, files, sources, needed=needed, clips=clips, far=far, cluster=cluster).resolved()


class _Search:
    """Resolves everything that a pipeline names, once."""

    def __init__(
        self,
        pipeline: Pipeline,
        store: Callable[[], Store] | None,
        files: Files,
        sources: Sources | None,
        *,
        needed: bool,
        clips: bool,
        far: bool,
        cluster: str | None,
    ) -> None:
        self.pipeline, self.store, self.files, self.sources = pipeline, store, files, sources
        self.needed, self.clips, self.far, self.cluster = needed, clips, far, cluster
        self.imported: dict[tuple[imports.Role, str], Imported] = {}
        self.stored: dict[str, str] = {}
        self.manifests: dict[str, DataManifest] = {}
        self.notes: list[str] = []
        self._cut: dict[str, list[str]] = {}
        """What is said of captions that are cut, and of which stages."""
        self._captioned: dict[str, Captioned] = {}
        """Captions that were read here, by place."""
        self._away: Unreachable | None = None
        self._found: dict[str, str | None] = {}
        """By place."""

    def resolved(self) -> Resolved:
        stages = tuple(self._stage(stage) for stage in self.pipeline.stages)
        pipeline = self.pipeline.model_copy(update={"stages": stages})
        self.notes += [f"{', '.join(names)}: {said}" for said, names in self._cut.items()]
        return Resolved(pipeline, self.manifests, tuple(self.notes), self.imported, self.stored)

    def _stage(self, stage: Stage) -> Stage:
        known: dict[str, str | None] = {}
        source = stage.config.data.source
        if self.clips and isinstance(source, FolderSource | ManifestSource):
            if source.path not in self._found:
                self._found[source.path] = self._data(source)
            known["data"] = self._found[source.path]
            self._check_words(stage, self._captioned.get(source.path))
        known |= self._imports(stage.config, self.sources) if self.sources is not None else {}
        if not known:
            return stage
        return stage.model_copy(update={"contents": stage.contents.model_copy(update=known)})

    def _check_words(self, stage: Stage, read: Captioned | None) -> None:
        """The embedded word encoder knows words alone. Raises UsageError where a caption has none."""
        if stage.config.text.kind != "words":
            return
        most = stage.config.model.caption_tokens
        longer = []
        for row in read.rows if read is not None else ():
            words = len(split_words(row.text))
            if not words:
                raise UsageError(f"{row.place}: caption {shown(row.text)} has no words, and {stage.name} learns from words. Write one")
            longer += [row] if words > most else []
        prompts = sum(len(split_words(prompt)) > most for prompt in stage.config.prompts)
        counted = [f"{len(longer):,} of {len(read.rows):,} captions"] if longer and read is not None else []
        counted += [f"{prompts:,} of {len(stage.config.prompts):,} prompts"] if prompts else []
        if counted:
            said = f"{' and '.join(counted)} have more than {most} words: they are cut there, and the model sees the first {most}"
            self._cut.setdefault(said, []).append(stage.name)

    def _ask(self, store: Callable[[], Store], question: Callable[[Store], Answer]) -> Answer:
        """Ask the store. One that does not answer is asked once: each time takes its whole patience. Raises Unreachable."""
        if self._away is not None:
            raise self._away
        try:
            return question(store())
        except Unreachable as error:
            self._away = error
            raise

    @cached_property
    def _names(self) -> list[imports.Source]:
        """What every name of weights and encoders means, read once: a recipe names three, and each look took seven requests."""
        assert self.store is not None, "only who asks a store looks there"
        return self._ask(self.store, imports.named)

    @cached_property
    def _data_sets(self) -> list[datasets.DataSet]:
        """What every name of a data set means, read once."""
        assert self.store is not None, "only who asks a store looks there"
        return self._ask(self.store, datasets.registered)

    def _data(self, source: FilesSource) -> str | None:
        """The digest of a data set; None: nobody knows it."""
        if said := self._hidden_from_pods(source.path):
            if self.needed:
                raise Refused(said)
            self.notes.append(said)
        try:
            return self._registered(source) or self._scanned(source)
        except datasets.TooMuch as error:
            if self.needed:
                raise Refused(f"data {source.path}: {error}. {_register(self.pipeline, source.path, self.cluster)}") from None
            reason = f"{error}; a launch or osctl data register reads them"
        except NotFound:
            if self.needed:
                raise Refused(unseen(self.pipeline, source.path, self.cluster)) from None
            reason = "this machine does not see it, and nobody has registered it"
        except OsctlError as error:
            if self.needed:
                raise
            reason = str(error)
        self.notes.append(f"data {source.path}: its content is not known here ({reason})")
        return None

    def _hidden_from_pods(self, place: str) -> str:
        """What to say of clips of this machine that attempts in a cluster could not read; empty: they can, or it is not known."""
        profile = self.pipeline.cluster
        if self.pipeline.backend == "local" or profile is None or "://" in place or not Path(place).exists():
            return ""
        if any(Path(place).is_relative_to(volume.path) for volume in profile.volumes):
            return ""
        with contextlib.suppress(Unreachable, Refused):
            known = datasets.of_source(self._data_sets, place) if self.store is not None else None
            if known is not None and known.holder.rpartition("@")[2] != socket.gethostname():
                return ""  # somebody has read it where pods see it: in their image, say
        mounts = ", ".join(volume.path for volume in profile.volumes) or "nothing"
        store = f" --store {shlex.quote(self.pipeline.store)}" if "://" in self.pipeline.store else " --store s3://bucket/prefix"
        fact = f"data {place}: lies on this machine, and pods of {self.cluster or profile.name} do not see it: they mount {mounts}"
        send = f"osctl data add {suggested(place)} {shlex.quote(place)}{store}"
        return f"{fact}. Send it to the store, and launch with the address that this prints: {send}"

    def _registered(self, source: FilesSource) -> str | None:
        """The digest that was registered for this place: pods may see another folder there than this machine does.

        What was prepared lies in the store, where nothing is ever changed: nothing of it is read again.
        """
        if self.store is not None and PREPARED in source.path:
            known = self._ask(self.store, lambda store: _prepared(store, source.path))
            if known is not None:
                manifest = self._ask(self.store, lambda store: datasets.get_manifest(store, known.manifest))
                self.manifests[manifest.digest] = manifest
                rows = tuple(ReadRow(row.path, row.text, f"{source.path}/captions.csv") for row in manifest.rows)
                self._captioned[source.path] = Captioned("captions.csv", rows)
                size = f"{several(len(manifest.rows), 'row')}, {_size(manifest.size)}"
                self.notes.append(f"data {source.path}: prepared as {known.name}; {size}, digest {manifest.digest[:12]}")
                return manifest.digest
        if self.store is None or self.pipeline.backend == "local":
            return None
        found = datasets.of_source(self._data_sets, source.path)
        if found is None:
            return None
        if self.far and "://" in source.path:
            self._check_rows(found, source, datasets.get_manifest(self.store(), found.manifest))
        self.notes.append(f"data {source.path}: registered as {found.name}, {several(found.rows, 'row')}, digest {found.manifest[:12]}")
        return found.manifest

    def _check_rows(self, registered: datasets.DataSet, source: FilesSource, recorded: DataManifest) -> None:
        """Where this machine reaches the CSV, its rows must be those that were registered: that is cheap. Raises Refused."""
        try:
            read = self.files.captioned(source)
        except (NotFound, OsctlError):
            return
        rows = [(row.path, row.text) for row in read.rows]
        sizes: list[int | Unknown | None] = [UNKNOWN] * len(rows)
        for number in renamed(recorded, rows):
            entry = (read.listing or {}).get(read.files.get(rows[number][0], rows[number][0]))
            sizes[number] = entry.size if entry is not None and entry.size is not None else UNKNOWN
        differences = changed_since(recorded, rows, sizes)
        if differences:
            raise Refused(
                f"data {source.path}: {several(len(differences), 'row is', 'rows are')} not as registered as {registered.name} "
                f"({told(differences)}). {_register(self.pipeline, source.path, self.cluster, registered.name)}"
            )

    def _scanned(self, source: FilesSource) -> str:
        remote = "://" in source.path
        if remote and not self.far:
            raise NotFound(source.path)
        manifest, read = self.files.scan(source, at_most=READ_AT_MOST if remote or not self.needed else None)
        self.manifests[manifest.digest] = manifest
        self._captioned[source.path] = read
        lost = unusable(manifest)
        missing = f"; {len(lost):,} of them are missing, empty or may not be read, and are left out ({_some(lost)})" if lost else ""
        size = f"{several(len(manifest.rows), 'row')}, {_size(manifest.size)}"
        self.notes.append(f"data {source.path}: {read.layout}; {size}, digest {manifest.digest[:12]}{missing}")
        self.notes += [f"data {source.path}: {remark}" for remark in read.remarks]
        return manifest.digest

    # Imports

    def _imports(self, config: StageConfig, sources: Sources) -> dict[str, str | None]:
        """By role."""
        for role, name in imports_of(config):
            if (key := f"{role} {name}") not in self._found:
                self._found[key] = self._import(role, name, sources)
        return {role: self._found[f"{role} {name}"] for role, name in imports_of(config)}

    def _import(self, role: imports.Role, name: str, sources: Sources) -> str | None:
        """The digest of weights or an encoder; None: nobody knows it."""
        try:
            return self._brought_in(role, name) or self._brought(role, name, sources)
        except NotFound:
            if self.needed:
                kind = UsageError if name.startswith(("/", ".", "~")) else Refused  # a path of this machine was mistyped
                raise kind(unreachable(self.pipeline, role, name)) from None
            reason = "this machine does not have it, and the store does not know it"
        except OsctlError as error:
            if self.needed:
                raise
            reason = str(error)
        self.notes.append(f"{role} {name}: its content is not known here ({reason})")
        return None

    def _brought_in(self, role: imports.Role, name: str) -> str | None:
        """What the store has of this name or source. A path of this machine is read instead: its files may have changed."""
        if self.store is None or at_home(name).exists():
            return None
        found = self._ask(self.store, lambda store: imports.find(store, name, role, self._names))
        if found is None or not imports.is_stored(self.store(), found.manifest):
            return None
        self.stored[name] = found.manifest
        self.notes.append(f"{role} {name}: in the store, digest {found.manifest[:12]}, from {found.source}{_under(found.licence)}")
        return found.manifest

    def _brought(self, role: imports.Role, name: str, sources: Sources) -> str:
        one = sources.fetch(name, role, far=self.far and self.needed)
        self.imported[role, name] = one
        size = f"{several(len(one.files), 'file')}, {_size(one.imported.size)}"
        self.notes.append(f"{role} {name}: {size}, digest {one.digest[:12]}, from {one.source}{_under(one.licence)}")
        return one.digest


def _prepared(store: Store, place: str) -> datasets.DataSet | None:
    """The registration of a place below a store's own prepared data sets; None: it is another place."""
    if not place.startswith(f"{store.url}/{datasets.ROOT}/"):
        return None
    found = datasets.of_place(store, place)
    return found if found is not None and found.prepared is not None else None


def unusable(manifest: DataManifest) -> list[str]:
    """Paths of the rows whose files give no clip, whoever decodes them."""
    return [row.path for row in manifest.rows if manifest.by == "content" and (row.sha256 is None or row.size == 0)]


def _some(paths: Sequence[str], most: int = 3) -> str:
    names = [quoted(path, LONGEST_NAME) for path in paths[:most]]
    return ", ".join([*names, *(["…"] if len(paths) > most else [])])


def imports_of(config: StageConfig) -> Iterator[tuple[imports.Role, str]]:
    """(role, name) of what a stage imports, as the stage names it."""
    if config.weights is not None:
        yield "weights", config.weights
    if config.autoencoder.kind == "kl":
        yield "autoencoder", config.autoencoder.path
    if config.text.kind == "t5":
        yield "text", config.text.path


def unreachable(pipeline: Pipeline, role: imports.Role, name: str) -> str:
    """What to say of an import that nobody can reach, with the command to paste."""
    store = f" --store {pipeline.store}" if "://" in pipeline.store else ""
    again = f"osctl weights add {suggested(name.partition('@')[0])} SOURCE --as {role}{store}"
    return (
        f"{role} {name}: is no file or folder of this machine, no model of the hub that it reaches, and not in the store, so no device is "
        f"held for it. Bring it in from a path, s3://, https:// or owner/name@revision, then name it in the stage: {again}"
    )


def _under(licence: str | None) -> str:
    return f" ({licence})" if licence else ""


def unseen(pipeline: Pipeline, place: str, cluster: str | None) -> str:
    """What to say of data that nobody can see, with the command to paste."""
    if pipeline.backend == "local":
        return (
            f"data {place}: is not on this machine, where the attempts of {pipeline.name} run. Correct data.source.path, or bring it here"
        )
    return (
        f"data {place}: this machine does not see it, and nobody has registered it in {pipeline.store}, so a result could not say what it "
        f"was trained on. {_register(pipeline, place, cluster)}"
    )


def _register(pipeline: Pipeline, place: str, argument: str | None, name: str | None = None) -> str:
    named = argument or (pipeline.cluster.name if pipeline.cluster is not None else None)
    cluster = f" --cluster {shlex.quote(named)}" if named is not None else ""
    store = f" --store {pipeline.store}" if "://" in pipeline.store else ""
    return f"Register it where it lies: osctl data register {name or suggested(place)} {shlex.quote(place)}{store}{cluster}"


def suggested(place: str) -> str:
    """A name for what lies at a place."""
    last = place.rstrip("/").rpartition("/")[2].removesuffix(".csv").lower()
    slug = re.sub(r"[^a-z0-9.-]+", "-", last).strip("-.")[:40].strip("-.")
    return slug if datasets.NAME.fullmatch(slug) else f"data-{slug}"[:40].strip("-.")


def _size(count: int) -> str:
    return f"{count / 1e9:,.1f} GB" if count >= 1e9 else f"{count / 1e6:,.1f} MB"
