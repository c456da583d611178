"""A pipeline and everything beside it: its store and ledger, its price list, what is known of its data and weights.

Owns the way from what a person asked for (a recipe, overrides, a store) to the resolved pipeline. Refuses to print: what is to be said
goes to the caller's `say`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from orchestrator.errors import UsageError
from orchestrator.pipelines.host import DEFAULT_STORE, Host, write_whole
from orchestrator.redact import typed

if TYPE_CHECKING:
    from opensora.config import StageConfig
    from opensora.dataset.manifest import RowDifference
    from orchestrator.accounting.history import History
    from orchestrator.inputs.contents import Resolved
    from orchestrator.ledger.checkpoints import Published
    from orchestrator.ledger.records import Committed
    from orchestrator.ledger.store import Ledger
    from orchestrator.ports import Store
    from orchestrator.recipe.pipeline import Pipeline
    from orchestrator.recipe.prices import Prices


def _names_contents(config: StageConfig) -> bool:
    """Whether a stage names clips, weights or encoders that lie outside of its configuration."""
    embedded = config.data.source.kind == "digits" and config.autoencoder.kind == "patch" and config.text.kind == "words"
    return not embedded or config.weights is not None


def _reaching(host: Host, pipeline: Pipeline) -> Host:
    """This machine, from which a bucket is reached as the pipeline's cluster says."""
    return host.reaching(pipeline.cluster) if host.store_url(pipeline.store).startswith("s3://") else host


@dataclass(frozen=True)
class Workspace:
    """One pipeline and everything beside it, opened only where asked for: `plan` needs no store, `list` no pipeline.

    Not for two threads at once: each takes a `fresh` one.
    """

    pipeline: Pipeline
    host: Host
    named: bool = False
    """Whether it was found in its store by its name, and not by a recipe."""
    launched: bool = False
    """Whether `pipeline` is what was launched last, and not what a recipe says."""
    remarks: tuple[str, ...] = ()
    """What the store holds of its launches and cannot be read (`find.as_launched`)."""
    found: Resolved | None = None
    """What was found of the pipeline's contents, where they were looked for (`with_contents`)."""
    cluster_argument: str | None = None
    """How `--cluster` calls the pipeline's profile, in commands to paste."""
    data_note: str = ""
    """How `--data` was understood, where it may be a name or a path."""

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
        host: Host | None = None,
    ) -> Workspace:
        """A recipe, or what was launched last under that name in the store. Raises UsageError; of a name also Refused, Unreachable.

        Args:
            file: a pipeline's file, its folder, a shipped name, or a name in the store. None: ./osctl.yaml, else the demo.
            settings: `stage2.steps=500`, ...; they win over everything.
            host: this machine; None: as this process's environment says.
        """
        from orchestrator.local.backend import cuda_devices
        from orchestrator.recipe import adapt, files, resolve

        host = host if host is not None else Host.here()
        asked = dict(split(setting) for setting in settings or ())
        overrides = _with_flags(asked, store=store, tracking=tracking, backend=backend, cluster=cluster)
        if "cluster" in overrides and "backend" not in overrides and not host.env.get("OSCTL_BACKEND"):
            overrides["backend"] = "kubernetes"
        path = files.find(file, missing_ok=True)
        if path is not None:
            pipeline = resolve.load(path, overrides=overrides, env=host.env)
        else:
            assert file is not None, "without a name there is the demo"
            url = store_at(overrides.pop("store", None), host)
            host = reached(url, host, cluster)
            pipeline = resolve.changed(last_launched(file, url, host, as_file=True).model_copy(update={"store": url}), overrides)
        if "cluster" in asked and pipeline.cluster is None:
            raise UsageError(
                f"--set cluster={typed(asked['cluster'])}: this pipeline runs on this machine and has no cluster profile. "
                "Add --backend kubernetes"
            )
        note = ""
        if data is not None:
            from orchestrator.inputs.own_clips import own_clips
            from orchestrator.stores import open_store

            there = _reaching(host, pipeline)
            found = own_clips(data, host.home, there.env, store=lambda: open_store(there.store_url(pipeline.store), there.env))
            pipeline, note = adapt.with_data(pipeline, found.source, found.captions), found.note
        if pipeline.prepare is None:  # else the stages' clips are those that are made first
            adapt.check_rates(pipeline)
        if prices is not None:
            host = host.having(OSCTL_PRICES=str(prices.absolute()))  # what keeps MLflow up to date, a child process, goes by the same
        if pipeline.cluster is not None:
            from orchestrator.recipe.prices import with_named_price

            pipeline = pipeline.model_copy(update={"cluster": with_named_price(pipeline.cluster, host.env)})
        with_cluster = path is not None and pipeline.cluster is not None
        argument = resolve.cluster_argument(path, overrides, host.env) if with_cluster and path is not None else None
        pipeline = adapt.on_devices(pipeline, cuda_devices())
        return cls(pipeline, _reaching(host, pipeline), named=path is None, cluster_argument=argument, data_note=note)

    @classmethod
    def of_name(
        cls, name: str, *, file: str | None = None, store: str | None = None, cluster: str | None = None, host: Host | None = None
    ) -> Workspace:
        """A pipeline of a store as it was last launched, without its recipe. `file`: a recipe that says which store.

        Raises UsageError where the store has none of that name; Refused, Unreachable.
        """
        host = host if host is not None else Host.here()
        url = store_at(store, host, file)
        host = reached(url, host, cluster, file)
        pipeline = last_launched(name, url, host).model_copy(update={"store": url})
        return cls(pipeline, _reaching(host, pipeline), named=True)

    @classmethod
    def at(cls, file: str | None, *, store: str | None = None, cluster: str | None = None, host: Host | None = None) -> Workspace:
        """For commands about what was launched: OSCTL_CLUSTER is where to look, whatever backend the file names."""
        host = host if host is not None else Host.here()
        return cls.open(file, store=store, cluster=cluster or host.env.get("OSCTL_CLUSTER"), host=host)

    def fresh(self) -> Workspace:
        """The same, with a store and a ledger of its own."""
        return replace(self)

    def of_pipeline(self, pipeline: Pipeline, remarks: tuple[str, ...] = ()) -> Workspace:
        """What lies beside another revision of the pipeline."""
        return replace(self, pipeline=pipeline, host=_reaching(self.host, pipeline), remarks=(*self.remarks, *remarks), found=None)

    def check_recipe(self) -> None:
        """Raises UsageError, where it was found by its name: a launch needs a recipe."""
        if self.named:
            name = self.pipeline.name
            raise UsageError(
                f"launch {name}: there is no recipe of that name here to launch. To go on as it was launched: osctl resume {name}"
            )

    def with_contents(
        self,
        *,
        needed: bool,
        clips: bool = True,
        imports: bool = True,
        far: bool = True,
        ask_store: bool = True,
        say: Callable[[str], None],
    ) -> Workspace:
        """The same with the contents of its clips and imports recorded, as far as they can be seen.

        Args:
            needed: contents that nobody sees are a reason to refuse.
            clips: False: of clips that are still to be made nothing is looked for.
            imports: False: what is known of weights and encoders stays.
            far: whether addresses are read, too.
            ask_store: whether the store is asked for what is registered.

        Raises UsageError, Refused, Unreachable.
        """
        if not any(_names_contents(stage.config) for stage in self.pipeline.stages):
            return self  # nothing lies outside of the configuration, and nothing is imported to find that out
        from orchestrator.inputs.contents import resolve_contents
        from orchestrator.inputs.data_files import DataFiles
        from orchestrator.inputs.import_sources import ImportSources

        ask = (lambda: self.store) if ask_store else None
        files = DataFiles(self.host.home, self.host.env)
        sources = ImportSources(self.host.home, self.host.env) if imports else None
        found = resolve_contents(self.pipeline, ask, files, sources, needed=needed, clips=clips, far=far, cluster=self.cluster_argument)
        for note in found.notes:
            say(note)
        there = replace(self, pipeline=found.pipeline, found=found)
        if "store" in vars(self):  # opened already: a client of S3 takes 0.07 CPU-s to make
            vars(there)["store"] = self.store
        return there

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
        file = self.host.home / "data" / f"{digest}.jsonl.gz"
        if not file.exists():
            write_whole(file, manifest.encode())
        return file

    def told_of_imports_of(self, committed: Committed | Published) -> Host:
        """This machine, whose children find the encoders of a result or checkpoint. Raises Refused, CorruptCheckpoint, Unreachable."""
        from opensora import imports as known
        from orchestrator.environment import at_home
        from orchestrator.inputs import imports
        from orchestrator.inputs.contents import imports_of

        host = self.host.told_of({})
        intent = self.ledger.intent(committed.stage, committed.inputs_digest, committed.attempt)
        terms = self.ledger.terms(committed.stage, committed.inputs_digest, committed.attempt)
        if intent is None or terms is None:
            return host
        here: dict[str, str] = {}
        for role, name in imports_of(intent.config):
            digest = getattr(terms.contents, role)
            lies_here = at_home(known.local(name, host.env)).exists()
            if role != "weights" and digest is not None and not lies_here and imports.is_stored(self.store, digest):
                here[name] = str(imports.fetch(self.store, digest, host.imports / digest))
        return host.told_of(here)

    def told_of_imports(self) -> Host:
        """This machine, whose attempts find imports where they lie here. Raises Refused, CorruptCheckpoint, Unreachable."""
        places = self.found.places(self.store, self.host.imports) if self.found is not None else {}
        return self.host.told_of(places)

    def rows_between(self, old: str, new: str) -> list[RowDifference]:
        """In which rows two data sets differ, by their digests, as far as they are known here. Raises Unreachable."""
        return self.found.rows_between(self.store, old, new) if self.found is not None else []

    def too_few(self, targets: Collection[str]) -> str:
        """Why stages of which nothing is trained yet would end before their first step, and what to do; empty: nothing speaks for that.

        All of them at once, those that wait for a parent too: what ends the third of three stages is better known before the first.
        """
        if self.found is None:
            return ""
        stages = [stage for stage in self.pipeline.stages if not targets or stage.name in targets]
        faults = {stage.name: why for stage in stages if (why := self.found.too_few(stage))}
        if not faults:
            return ""
        from orchestrator.inputs.contents import THE_REST
        from orchestrator.inputs.standing import results

        ledger = self.ledger.lenient()
        begun = results(self.pipeline, ledger)
        new = [name for name in faults if name not in begun or not ledger.published_steps(name, begun[name][0])]
        if not new:
            return ""
        why = faults[new[0]]
        settings = " ".join(f"--set {name}.data.max_left_out=1" for name in new)
        return f"{why}: osctl launch {settings}" if why.endswith(THE_REST) else why

    @cached_property
    def store(self) -> Store:
        from orchestrator.stores import open_store

        return open_store(self.store_url, self.host.env)

    @property
    def store_url(self) -> str:
        return self.host.store_url(self.pipeline.store)

    @cached_property
    def ledger(self) -> Ledger:
        from orchestrator.ledger.store import Ledger

        return Ledger(self.store, self.pipeline.name)

    @cached_property
    def prices(self) -> Prices:
        """Of what is about to be made. What was made has its own in the ledger: see `history`."""
        from orchestrator.recipe.prices import named_prices

        return named_prices(self.host.env).at(self.pipeline.cluster)

    @cached_property
    def history(self) -> History:
        from orchestrator.accounting.history import History

        return History(self.ledger, self.named_prices)

    def named_prices(self) -> Prices:
        """The price list that the environment names, else the shipped one. Raises UsageError."""
        from orchestrator.recipe.prices import named_prices

        return named_prices(self.host.env)


def _with_flags(settings: Mapping[str, str], **flags: str | None) -> dict[str, str]:
    """Settings by key, with what options of their own set, `--store` and others. Raises UsageError where both say something else."""
    for name, value in flags.items():
        said = settings.get(name)
        if value is not None and said is not None and said != value:
            raise UsageError(f"--{name} {typed(value)}: but --set {name}={typed(said)} says something else. Leave one of the two out")
    return {**settings, **{name: value for name, value in flags.items() if value is not None}}


def cluster_at(named: str | None, settings: Sequence[str] | None, host: Host) -> str | None:
    """The cluster profile that is asked for, where a command is about a cluster: the one named, else OSCTL_CLUSTER's; None: as the recipe
    or `--set cluster=` says. Raises UsageError."""
    return named or (None if "cluster" in dict(map(split, settings or ())) else host.env.get("OSCTL_CLUSTER"))


def store_at(named: str | None, host: Host, file: str | None = None) -> str:
    """The store where a pipeline is looked for by its name: the one named, OSCTL_STORE, what the recipe at hand says, else the default."""
    from orchestrator.recipe import files

    return host.store_url(named or host.env.get("OSCTL_STORE") or files.store_of(file) or DEFAULT_STORE)


def last_launched(name: str, url: str, host: Host, *, as_file: bool = False) -> Pipeline:
    """What was last launched under a name in a store, as far as it can be read. `as_file`: no recipe has that name.

    Raises UsageError, Refused, Unreachable.
    """
    from orchestrator.errors import Refused
    from orchestrator.ledger.objects import is_key
    from orchestrator.ledger.store import Ledger
    from orchestrator.recipe import launched as launches
    from orchestrator.stores import open_store

    ledger = Ledger(open_store(url, host.env), name)
    found = launches.last(ledger) if is_key(name) and "/" not in name else None
    if found is not None and found.pipeline is None and not found.is_last:
        raise Refused(f"pipeline {name}: no launch in {url} can be read: {found.remarks[0]}")
    if found is None or found.pipeline is None:
        raise _no_such(name, url, ledger.store, as_file=as_file)
    return found.pipeline


def _no_such(name: str, url: str, store: Store, *, as_file: bool) -> UsageError:
    """With the names that are near: of pipelines in the store, and of shipped recipes."""
    import difflib

    from orchestrator.ledger.store import pipelines
    from orchestrator.recipe import files
    from orchestrator.recipe.yaml_file import usage_error

    shipped = list(files.shipped()) if as_file else []
    known = [*pipelines(store), *shipped]
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.6)
    meant = f"Did you mean {' or '.join(map(repr, near))}? " if near else ""
    shown = name if len(name) <= 80 else f"{name[:77]}…"
    no_recipe = f"no such file, folder or shipped pipeline ({', '.join(shipped)}), and " if as_file else ""
    return usage_error(f"{shown}: {no_recipe}no pipeline of that name in {url}. {meant}See what there is: osctl list")


def reached(url: str, host: Host, cluster: str | None = None, file: str | None = None) -> Host:
    """This machine, from which a store is reached as the named cluster says; None: as OSCTL_CLUSTER says, else the recipe at hand (`file`).

    Raises UsageError.
    """
    from orchestrator.recipe import files

    if not url.startswith("s3://"):
        return host
    if named := cluster or host.env.get("OSCTL_CLUSTER"):
        return host.reaching(files.cluster_profile(named))
    try:
        return host.reaching(files.cluster_of(file))
    except UsageError:  # whoever named the store needs no recipe, and whoever needs one is told what is wrong with it
        return host


def split(setting: str) -> tuple[str, str]:
    key, equals, value = setting.partition("=")
    if not equals or not key:
        from orchestrator import redact

        raise UsageError(f"--set {redact.typed(setting)}: is not KEY=VALUE. Example: --set stage2.steps=500")
    return key.strip(), value
