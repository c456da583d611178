"""From what a person typed to what the library wants: the resolved pipeline, its store and ledger, the price list, the local folder."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from orchestrator.errors import UsageError

if TYPE_CHECKING:
    from opensora.config import StageConfig
    from opensora.data.manifest import RowDifference
    from orchestrator.cluster import ClusterProfile
    from orchestrator.config import Pipeline
    from orchestrator.contents import Resolved
    from orchestrator.history import History
    from orchestrator.ledger import Ledger
    from orchestrator.ports import Store
    from orchestrator.prices import Prices
    from orchestrator.records import Committed


def home() -> Path:
    """Folder of local state: store, run directories, MLflow's database. `OSCTL_HOME`, else ./.osctl."""
    return Path(os.environ.get("OSCTL_HOME", ".osctl")).absolute()


def latents() -> Path:
    """Folder of encoded clips that the attempts of this machine share. `OSCTL_LATENTS`, else `latents` in `home()`."""
    return Path(os.environ.get("OSCTL_LATENTS") or home() / "latents").absolute()


def imported() -> Path:
    """Folder of imports that were brought here from a store, each under its digest."""
    return home() / "imports"


def lend_places(places: Mapping[str, str]) -> None:
    """Tell this process's children where imports lie (`opensora.imports`): these, and those that were told of before."""
    file = home() / "places.json"
    if not places and not file.exists():
        return
    import json

    from opensora import imports

    os.environ[imports.VARIABLE] = str(file)
    if not places:
        return
    content = {"schema": 1, "places": imports.places() | dict(places)}
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f".{file.name}.{os.getpid()}.partial")
    partial.write_text(json.dumps(content, indent=1) + "\n")
    partial.replace(file)


def lend_endpoint(cluster: ClusterProfile) -> None:
    """Let this process and its children find the object store as the cluster's pods do, where the person's environment is silent."""
    spoken = {
        "OSCTL_S3_ENDPOINT": ("OSCTL_S3_ENDPOINT", "AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"),
        "AWS_REGION": ("AWS_REGION", "AWS_DEFAULT_REGION"),
    }
    for name, value in cluster.store_env().items():
        if not any(os.environ.get(other) for other in spoken[name]):
            os.environ[name] = value


def _names_contents(config: StageConfig) -> bool:
    """Whether a stage names clips, weights or encoders that lie outside of its configuration."""
    embedded = config.data.source.kind == "digits" and config.autoencoder.kind == "patch" and config.text.kind == "words"
    return not embedded or config.weights is not None


@dataclass(frozen=True)
class Workspace:
    """One pipeline and everything beside it, opened only where asked for: `plan` needs no store, `list` no pipeline."""

    pipeline: Pipeline
    remarks: tuple[str, ...] = ()
    """What the store holds of its launches and cannot be read (`look.launched`)."""
    found: Resolved | None = None
    """What was found of the pipeline's contents, where they were looked for (`with_contents`)."""
    cluster_argument: str | None = None
    """How `--cluster` calls the pipeline's profile, in commands to paste."""

    @classmethod
    def open(
        cls,
        file: str | None,
        *,
        settings: Sequence[str] | None = None,
        store: str | None = None,
        tracking: str | None = None,
        data: str | None = None,
        backend: str | None = None,
        cluster: str | None = None,
        prices: Path | None = None,
    ) -> Workspace:
        """Raises UsageError."""
        from orchestrator import config
        from orchestrator.adapters.local import cuda_devices

        overrides = dict(split(setting) for setting in settings or ())
        if cluster is not None and backend is None and "backend" not in overrides and not os.environ.get("OSCTL_BACKEND"):
            backend = "kubernetes"
        for name, value in (("store", store), ("tracking", tracking), ("backend", backend), ("cluster", cluster)):
            if value is not None:
                overrides[name] = value
        path = config.find(file)
        pipeline = config.load(path, overrides=overrides, env=os.environ)
        if data:
            pipeline = config.with_data(pipeline, data)
        if prices is not None:
            os.environ["OSCTL_PRICES"] = str(prices.absolute())  # MLflow's projection, a process beside this one, goes by the same
        if pipeline.cluster is not None and os.environ.get("OSCTL_PRICES"):
            from orchestrator.prices import with_named_price

            pipeline = pipeline.model_copy(update={"cluster": with_named_price(pipeline.cluster)})
        argument = config.cluster_argument(path, overrides, os.environ) if pipeline.cluster is not None else None
        return cls(config.on_devices(pipeline, cuda_devices()), cluster_argument=argument)

    @classmethod
    def at(cls, file: str | None, *, store: str | None = None, cluster: str | None = None) -> Workspace:
        """For commands about what was launched: OSCTL_CLUSTER is where to look, whatever backend the file names. See `launched`."""
        return cls.open(file, store=store, cluster=cluster or os.environ.get("OSCTL_CLUSTER") or None)

    def with_contents(self, *, needed: bool, far: bool = True, ask_store: bool = True, say: Callable[[str], None]) -> Workspace:
        """The same with the contents of its clips recorded, as far as they can be seen.

        Args:
            needed: contents that nobody sees are a reason to refuse.
            far: whether addresses are read, too.
            ask_store: whether the store is asked for what is registered.

        Raises UsageError, Refused, Unreachable.
        """
        if not any(_names_contents(stage.config) for stage in self.pipeline.stages):
            return self  # nothing lies outside of the configuration, and nothing is imported to find that out
        from orchestrator.adapters.data_files import DataFiles
        from orchestrator.adapters.import_sources import ImportSources
        from orchestrator.contents import resolve_contents

        ask = (lambda: self.store) if ask_store else None
        files, sources = DataFiles(home()), ImportSources(home())
        found = resolve_contents(self.pipeline, ask, files, sources, needed=needed, far=far, cluster=self.cluster_argument)
        for note in found.notes:
            say(note)
        return Workspace(found.pipeline, self.remarks, found, self.cluster_argument)

    def keep_contents(self) -> None:
        """Write down what `with_contents` found, before anything of it is used. Raises Unreachable, Refused."""
        if self.found is not None:
            self.found.commit(self.store)

    def recorded_data(self, stage: str) -> Path | None:
        """A file with the manifest of a stage's data, for a process that is given it by name; None: its contents are not known."""
        digest = self.pipeline.stage(stage).contents.data
        manifest = self.found.manifests.get(digest) if self.found is not None and digest is not None else None
        if manifest is None:
            return None
        file = home() / "data" / f"{digest}.jsonl.gz"
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            partial = file.with_name(f".{file.name}.{os.getpid()}.partial")
            partial.write_bytes(manifest.encode())
            partial.replace(file)
        return file

    def lend_imports_of(self, committed: Committed) -> None:
        """Let this process's children find the encoders that a result was made with. Raises Refused, CorruptCheckpoint, Unreachable."""
        from opensora import imports as told
        from orchestrator import imports
        from orchestrator.contents import imports_of

        lend_places({})
        intent = self.ledger.intent(committed.stage, committed.inputs, committed.attempt)
        terms = self.ledger.terms(committed.stage, committed.inputs, committed.attempt)
        if intent is None or terms is None:
            return
        here: dict[str, str] = {}
        for role, name in imports_of(intent.config):
            digest = getattr(terms.contents, role)
            lies_here = Path(told.local(name)).expanduser().exists()
            if role != "weights" and digest is not None and not lies_here and imports.is_stored(self.store, digest):
                here[name] = str(imports.fetch(self.store, digest, imported() / digest))
        lend_places(here)

    def lend_places(self) -> None:
        """Let attempts of this machine find imports where they lie here. Raises Refused, CorruptCheckpoint, Unreachable."""
        if self.found is not None:
            lend_places(self.found.places(self.store, imported()))

    def rows_between(self, old: str, new: str) -> list[RowDifference]:
        """In which rows two data sets differ, by their digests, as far as they are known here. Raises Unreachable."""
        return self.found.rows_between(self.store, old, new) if self.found is not None else []

    @cached_property
    def store(self) -> Store:
        from orchestrator.adapters import open_store

        self.lend_environment()
        return open_store(self.store_url)

    def lend_environment(self) -> None:
        """Let this process and its children find the object store as the cluster's pods do, where the person's environment is silent."""
        if self.pipeline.cluster is None or not self.store_url.startswith("s3://"):
            return
        lend_endpoint(self.pipeline.cluster)

    @property
    def store_url(self) -> str:
        return store_url(self.pipeline.store)

    @cached_property
    def ledger(self) -> Ledger:
        from orchestrator.ledger import Ledger

        return Ledger(self.store, self.pipeline.name)

    @cached_property
    def prices(self) -> Prices:
        """Of what is about to be made. What was made has its own in the ledger: see `history`."""
        from orchestrator.prices import named_prices

        return named_prices().at(self.pipeline.cluster)

    @cached_property
    def history(self) -> History:
        from orchestrator.history import History
        from orchestrator.prices import named_prices

        return History(self.ledger, named_prices)


def store_url(configured: str) -> str:
    """A URL, with one spelling a place since names of cluster objects are made of it; a folder as an absolute path.

    The default folder follows OSCTL_HOME.
    """
    scheme, separator, rest = configured.partition("://")
    if separator:
        place, _, prefix = rest.partition("/")
        return f"{scheme}://{place}" + (f"/{prefix.strip('/')}" if prefix.strip("/") else "")
    return str(home() / "store") if configured == ".osctl/store" else str(Path(configured).absolute())


def split(setting: str) -> tuple[str, str]:
    key, equals, value = setting.partition("=")
    if not equals or not key:
        from orchestrator.redact import typed

        raise UsageError(f"--set {typed(setting)}: is not KEY=VALUE. Example: --set stage2.steps=500")
    return key.strip(), value
