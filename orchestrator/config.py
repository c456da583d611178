"""A pipeline: which stages, on what, from what, at which price. Read from files, frozen once resolved.

Owns the schema of `pipeline.yaml`, the resolved `Pipeline`, and the way from the one to the other: files, then `OSCTL_*`, then `--set`.
Refuses to do anything but read files, and to resolve a pipeline whose stages cannot follow one another.
"""

from __future__ import annotations

import csv
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, NonNegativeFloat, PositiveFloat, PositiveInt, SerializerFunctionWrapHandler, model_serializer

from opensora import identity
from opensora.config import FolderSource, Frozen, StageConfig
from opensora.identity import Contents
from orchestrator.cluster import ClusterProfile, shipped_clusters
from orchestrator.document import Document, Loc, closest, parse_value, read, shown, usage_error, validate
from orchestrator.records import RESERVED
from orchestrator.redact import holds_credentials, typed

Name = Annotated[str, Field(pattern=r"^[a-z]([a-z0-9.-]{0,38}[a-z0-9])?$")]
"""Lower-case letters, digits, `-` and `.`; from a letter; 40 characters at most, since names of cluster objects are built from it."""


class Resources(Frozen):
    """Where a stage runs."""

    nodes: PositiveInt = 1
    """Machines; each runs one agent."""
    devices_per_node: PositiveInt = 1
    """Processes of a node, one a device."""
    device: str = "auto"
    """A device of the price list; `auto`: this machine's CUDA devices, where it has any, else its cores."""


class Published(Frozen):
    """What the reference run took for this stage."""

    gpu_hours: NonNegativeFloat
    """Hours of all its GPUs together."""
    usd: NonNegativeFloat
    """What they cost."""
    source: str
    """Where this was published."""


class StageSpec(Frozen):
    """A stage as a pipeline file names it."""

    name: Name
    """How commands, the ledger and MLflow call it."""
    config: str
    """Stage file, relative to the pipeline file."""
    parent: Name | None = None
    """Stage whose committed checkpoint this one starts from."""
    resources: Resources = Resources()
    """Machines and devices."""
    max_attempts: PositiveInt = 5
    """Counted attempts (docs/contracts.md: how an attempt ends) before the stage has failed."""
    hang_timeout_s: PositiveFloat = 300
    """Without a heartbeat for so many seconds the attempt counts as hung."""
    published: Published | None = None
    """The reference that plans and bills are compared with."""


def _not_reserved(name: str) -> str:
    if name in RESERVED:
        raise ValueError(f"is the store's own folder of {name}; give the pipeline another name")
    return name


PipelineName = Annotated[Name, AfterValidator(_not_reserved)]
"""A pipeline is a folder at the root of its store, beside those of data sets and weights."""


class PipelineFile(Frozen):
    """`pipeline.yaml`."""

    name: PipelineName
    """Top folder of its ledger in the store; two pipelines in one store need two names."""
    backend: Literal["local", "kubernetes"] = "local"
    """local: processes of this machine; kubernetes: a PyTorchJob an attempt."""
    store: str = ".osctl/store"
    """Folder, or s3://bucket/prefix."""
    tracking: str = "sqlite"
    """`sqlite`: MLflow's database under .osctl; a URI: an MLflow server; `none`."""
    experiment: str | None = None
    """MLflow experiment; none: the pipeline's name."""
    cluster: str | None = None
    """With kubernetes: a shipped cluster profile's name, or a file relative to this one. Default: h800-64."""
    budget_usd: PositiveFloat | None = None
    """A launch whose plan costs more is refused."""
    flush_s: PositiveFloat = 5.0
    """Seconds between two pieces of an attempt's journal, and between two looks of the driver's trackers."""
    trainer: tuple[str, ...] = ()
    """Another trainer's command; it must obey the run-directory contract. `{run_dir}` and `{devices}` are filled in."""
    stages: tuple[StageSpec, ...] = Field(min_length=1)
    """In any order; `parent` says what follows what."""


class Stage(Frozen):
    """A stage, resolved."""

    spec: StageSpec
    config: StageConfig
    contents: Contents = Contents()
    """Digests of the clips, weights and encoders that the configuration names, as far as they are known."""

    @model_serializer(mode="wrap")
    def _as_before(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Unknown contents are left out: a revision then is what an older release wrote, and reads."""
        content: dict[str, Any] = write(self)
        if self.contents == Contents():
            content.pop("contents", None)
        return content

    @property
    def name(self) -> str:
        return self.spec.name

    @property
    def devices(self) -> int:
        return self.spec.resources.nodes * self.spec.resources.devices_per_node


class Pipeline(Frozen):
    """A pipeline, resolved: every file read, every override applied. What is launched is exactly this."""

    name: PipelineName
    backend: Literal["local", "kubernetes"]
    store: str
    tracking: str
    experiment: str
    cluster: ClusterProfile | None = None
    """Whole, so that whoever reads a launched pipeline needs no file of the person who launched it. None with the backend `local`."""
    budget_usd: PositiveFloat | None
    flush_s: PositiveFloat
    trainer: tuple[str, ...]
    stages: tuple[Stage, ...]
    """In an order in which every parent comes before its children."""

    def stage(self, name: str) -> Stage:
        """Raises KeyError."""
        for stage in self.stages:
            if stage.name == name:
                return stage
        raise KeyError(name)


MAX_PROMPTS = 8
"""Captions of a folder that become prompts: as many rows as a contact sheet shows on one screen. Arbitrary."""

_SCALARS = tuple(name for name in PipelineFile.model_fields if name not in ("stages", "trainer"))
_TEXTS = ("name", "backend", "store", "tracking", "experiment", "cluster")


_PATHS: tuple[Loc, ...] = (("data", "source", "path"),)
"""Local paths of a stage file."""
_PATHS_OR_NAMES: tuple[Loc, ...] = (("autoencoder", "path"), ("text", "path"))
"""`org/name` is a model of the hub as well as a path: these are paths where they begin with a dot or a tilde."""
_PATHS_OR_FILES: tuple[Loc, ...] = (("weights",),)
"""These are paths, too, where such a file or folder lies there or a file's ending says so; else an import's name, or a model of the hub."""
_FILE = re.compile(r"\.(safetensors|pth?|bin|ckpt)$")


def home(env: Mapping[str, str]) -> Path:
    """Where local state lies: store, run directories, MLflow's database. `OSCTL_HOME`, else `./.osctl`."""
    return Path(env.get("OSCTL_HOME") or ".osctl")


def shipped() -> dict[str, Path]:
    """Pipelines that come with this package, by name."""
    return {path.parent.name: path for path in sorted(shipped_folder().glob("*/pipeline.yaml"))}


def shipped_folder() -> Path:
    """`configs/`: inside the package once installed, beside it in a checkout."""
    package = Path(__file__).parent
    installed = package / "configs"
    return installed if installed.is_dir() else package.parent / "configs"


def find(file: str | None) -> Path:
    """The pipeline file that is meant: a file, a folder that holds one, or a shipped name; none: `./osctl.yaml`, else the demo.

    Raises:
        UsageError: there is no such file, folder or name.
    """
    if file is None:
        return Path("osctl.yaml") if Path("osctl.yaml").is_file() else shipped()["demo"]
    path = Path(file)
    if path.is_file():
        return path
    for name in ("pipeline.yaml", "osctl.yaml"):
        if (path / name).is_file():
            return path / name
    names = shipped()
    if file in names:
        return names[file]
    if path.is_dir():
        raise usage_error(f"{file}: a folder without pipeline.yaml or osctl.yaml. Name the pipeline file in it")
    raise usage_error(f"{file}: no such file, folder or shipped pipeline. {closest(file, list(names))}")


def load(path: Path, *, overrides: Mapping[str, str] | None = None, env: Mapping[str, str] | None = None) -> Pipeline:
    """A pipeline file and its stage files, resolved.

    Args:
        overrides: `store`, `stage2.steps`, `stage2.resources.nodes`, … → a YAML value. They win over everything.
        env: `OSCTL_STORE`, `OSCTL_TRACKING`, `OSCTL_BACKEND`, … win over the file; `OSCTL_HOME` moves the default store.

    Raises:
        UsageError: one line that names file, line and key, what was found, what was expected, and what to do.
    """
    env = env or {}
    document = _with_environment(read(path), env)
    names = _stage_names(document)
    stage_overrides: list[tuple[str, Loc, Any, str]] = []
    for key, text in (overrides or {}).items():
        label = f"--set {key}={typed(text)}"
        place, target = _override_target(key, label, names)
        value = _value(place, text, label) if target is None else parse_value(text, label)
        if target is None:
            document = document.with_value(place, value, label)
        else:
            is_path = isinstance(value, str) and _is_path(place, value, Path.cwd())
            stage_overrides.append((target, place, _absolute(value, Path.cwd()) if is_path else value, label))
    file = validate(PipelineFile, document, "pipeline")
    specs = _parents_first(file.stages, document)
    documents = {spec.name: _stage_document(spec, path, document, stage_overrides) for spec in specs}
    stages = {spec.name: Stage(spec=spec, config=validate(StageConfig, documents[spec.name], "stage")) for spec in specs}
    for stage in stages.values():
        if stage.spec.parent is not None:
            _check_follows(stage, stages[stage.spec.parent], documents[stage.name])
    cluster = _cluster(file, document, path) if file.backend == "kubernetes" else None
    tracking = cluster.tracking if cluster and cluster.tracking and "tracking" not in file.model_fields_set else file.tracking
    resolved = Pipeline(
        name=file.name,
        backend=file.backend,
        store=file.store if "store" in file.model_fields_set else str(home(env) / "store"),
        tracking=tracking,
        experiment=file.experiment or file.name,
        cluster=cluster,
        budget_usd=file.budget_usd,
        flush_s=file.flush_s,
        trainer=file.trainer,
        stages=tuple(stages.values()),
    )
    _check_nothing_secret(resolved, document, documents, env)
    return resolved


_INSTEAD = {
    "store": "Put them into AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, in a cluster into the profile's s3_secret",
    "tracking": "Put them into MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD",
}
"""Where credentials belong that people put into a URL."""


def _check_nothing_secret(pipeline: Pipeline, document: Document, stages: Mapping[str, Document], env: Mapping[str, str]) -> None:
    """A pipeline is written to the ledger as it is, parts of it to MLflow and to the cluster. Raises UsageError; the value is not shown."""
    fact = "holds credentials, and everything here is written to the ledger"
    for loc, text in _texts(pipeline.model_dump(mode="json", exclude={"stages", "cluster"}), ()):
        if holds_credentials(text, env):
            raise document.error(loc, fact, _INSTEAD.get(str(loc[0]), "Put them where the program that needs them looks by itself"))
    for loc, text in _texts(pipeline.cluster.model_dump(mode="json") if pipeline.cluster else {}, ()):
        if holds_credentials(text, env):
            raise document.error(("cluster",), f"{'.'.join(map(str, loc))} of the profile {fact}", "Put them into a Secret, and name that")
    for stage in pipeline.stages:
        for part in (stage.spec, stage.config):
            for loc, text in _texts(part.model_dump(mode="json"), ()):
                if holds_credentials(text, env):
                    raise stages[stage.name].error(loc, fact, "Put them where the trainer's libraries look by themselves")


def _texts(value: Any, loc: Loc) -> Iterator[tuple[Loc, str]]:
    """The strings in a value of JSON, with their places."""
    if isinstance(value, str):
        yield loc, value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from _texts(inner, (*loc, key))
    elif isinstance(value, list):
        for place, inner in enumerate(value):
            yield from _texts(inner, (*loc, place))


DEFAULT_CLUSTER = "h800-64"


def _cluster(file: PipelineFile, document: Document, path: Path) -> ClusterProfile:
    """The profile that a pipeline names: shipped, or a file beside it (`--set cluster=` and OSCTL_CLUSTER: in the working directory)."""
    named = file.cluster or DEFAULT_CLUSTER
    found = _cluster_file(named, path)
    if found is None:
        known = list(shipped_clusters(shipped_folder()))
        raise document.error(("cluster",), f"no such file or shipped cluster profile: {named!r}", closest(named, known))
    return validate(ClusterProfile, read(found), "cluster")


def _cluster_file(named: str, path: Path) -> Path | None:
    candidates = (shipped_clusters(shipped_folder()).get(named), path.parent / named, Path(named))
    return next((candidate for candidate in candidates if candidate is not None and candidate.is_file()), None)


def cluster_profile(named: str) -> ClusterProfile:
    """A shipped profile, or a file. Raises UsageError."""
    found = _cluster_file(named, Path.cwd() / "pipeline")
    if found is None:
        raise usage_error(f"no such file or shipped cluster profile: {named!r}. {closest(named, list(shipped_clusters(shipped_folder())))}")
    return validate(ClusterProfile, read(found), "cluster")


def cluster_argument(path: Path, overrides: Mapping[str, str], env: Mapping[str, str]) -> str:
    """How `--cluster` calls the profile of a pipeline that was loaded from the same, wherever it is typed: a shipped name, or a file."""
    named = overrides.get("cluster") or _with_environment(read(path), env).value.get("cluster") or DEFAULT_CLUSTER
    found = _cluster_file(named, path)
    return named if found is None or named in shipped_clusters(shipped_folder()) else str(found.absolute())


def with_data(pipeline: Pipeline, folder: str) -> Pipeline:
    """The same pipeline on a person's own clips: every stage trains on the folder, nothing is judged by the demo's judge of digits,
    and the prompts are captions of the folder.

    Raises:
        UsageError: no folder, no `captions.csv` in it, or no caption in that.
    """
    captions = _captions(Path(folder))
    source = FolderSource(kind="folder", path=str(Path(folder).resolve()))
    changed: list[Stage] = []
    for stage in pipeline.stages:
        data = stage.config.data.model_copy(update={"source": source})
        prompts = captions[:MAX_PROMPTS] if stage.config.prompts else ()
        config = stage.config.model_copy(update={"data": data, "evaluate": None, "prompts": prompts})
        changed.append(stage.model_copy(update={"config": config}))
    return pipeline.model_copy(update={"stages": tuple(changed)})


def _captions(folder: Path) -> tuple[str, ...]:
    """Different captions, in the file's order."""
    if not folder.is_dir():
        raise usage_error(f"{folder}: no such folder. Name a folder of clips with a captions.csv (columns path,text)")
    path = folder / "captions.csv"
    try:
        with path.open(encoding="utf-8-sig", newline="") as lines:
            rows = csv.DictReader(lines)
            columns = rows.fieldnames or []
            if not {"path", "text"} <= set(columns):
                raise usage_error(f"{path}: columns are {', '.join(columns) or 'none'}, expected path and text. Add a line `path,text`")
            captions = tuple(dict.fromkeys(text for row in rows if (text := _caption(path, rows.line_num, row))))
    except FileNotFoundError:
        raise usage_error(f"{path}: no such file. Write a captions.csv with the columns path,text") from None
    except UnicodeDecodeError as error:
        raise usage_error(f"{path}: byte {error.start} is not UTF-8. Save it as UTF-8") from None
    if not captions:
        raise usage_error(f"{path}: holds no caption. Write one line `path,text` a clip")
    return captions


def _caption(path: Path, line: int, row: Mapping[str, str | None]) -> str:
    """Of one row, whose clip has to lie inside the folder: said here, before anything is launched."""
    clip = Path(row["path"] or "")
    if clip.is_absolute() or ".." in clip.parts:
        raise usage_error(f"{path}:{line}: path {str(clip)!r} does not lie inside the folder. Give it relative to the folder, with /")
    return (row["text"] or "").strip()


def on_devices(pipeline: Pipeline, gpus: int) -> Pipeline:
    """The same pipeline with `device: auto` decided for a machine with so many CUDA devices, or for its cluster.

    A stage gets as many GPUs as it has processes, or as there are; its batch a device grows in turn, so that the global batch and with it
    the recipe stay the same. Where they do not divide, fewer GPUs are used.
    """
    stages: list[Stage] = []
    for stage in pipeline.stages:
        asked = stage.spec.resources
        if asked.device == "auto" and pipeline.cluster is not None:
            spec = stage.spec.model_copy(update={"resources": asked.model_copy(update={"device": pipeline.cluster.device})})
            stage = stage.model_copy(update={"spec": spec})
        elif asked.device == "auto":
            stage = _on_machine(stage, gpus)
        stages.append(stage)
    return pipeline.model_copy(update={"stages": tuple(stages)})


def _on_machine(stage: Stage, gpus: int) -> Stage:
    asked, config = stage.spec.resources, stage.config
    shared = config.parallel.ranks_a_clip
    sizes = [config.batch_size, *(bucket.batch_size for bucket in config.data.buckets)]
    totals = [size * (asked.devices_per_node // shared) for size in sizes]
    counts = range(shared, min(gpus, asked.devices_per_node) + 1, shared)
    ranks = max((n for n in counts if all(total % (n // shared) == 0 for total in totals)), default=None)
    update = {"device": "cpu-core"} if ranks is None else {"device": "local-gpu", "devices_per_node": ranks}
    if ranks is not None:
        own, *others = (total // (ranks // shared) for total in totals)
        buckets = tuple(bucket.model_copy(update={"batch_size": size}) for bucket, size in zip(config.data.buckets, others, strict=True))
        config = config.model_copy(update={"batch_size": own, "data": config.data.model_copy(update={"buckets": buckets})})
    spec = stage.spec.model_copy(update={"resources": asked.model_copy(update=update)})
    return stage.model_copy(update={"spec": spec, "config": config})


def _with_environment(document: Document, env: Mapping[str, str]) -> Document:
    for name in _SCALARS:
        variable = f"OSCTL_{name.upper()}"
        if text := env.get(variable):
            label = f"{variable}={typed(text)}"
            document = document.with_value((name,), _value((name,), text, label), label)
    return document


def _value(loc: Loc, text: str, label: str) -> Any:
    """What was typed, as YAML reads it; where only text is possible, as it was typed (a folder may be called 2026)."""
    return text if len(loc) == 1 and loc[0] in _TEXTS else parse_value(text, label)


def _stage_names(document: Document) -> list[str]:
    """Names before anything is validated: overrides are applied first, so that they are validated like the file."""
    stages = document.value.get("stages")
    items = stages if isinstance(stages, list) else []
    return [str(item.get("name")) if isinstance(item, dict) else "" for item in items]


def _override_target(key: str, label: str, names: Sequence[str]) -> tuple[Loc, str | None]:
    """Where an override belongs: (place in the pipeline file, None) or (place in the stage file, stage).

    A key's first part is a field of the pipeline, or a stage's name (which may hold dots: the longest one that fits).
    """
    if key in PipelineFile.model_fields:
        return (key,), None
    plain = key.removeprefix("stages.")
    stage = max((name for name in names if name and plain.startswith(f"{name}.")), key=len, default=None)
    if stage is None:
        first, dot, _ = plain.partition(".")
        known = [name for name in names if name] if dot else [*_SCALARS, *(f"{name}.steps" for name in names if name)]
        raise usage_error(f"{label}: no stage or field {first!r} in this pipeline. {closest(first, known)}")
    rest = tuple(plain.removeprefix(f"{stage}.").split("."))
    # `parent` names a stage, `parent.weights` says what is taken from it.
    if rest[0] in StageSpec.model_fields and not (rest[0] == "parent" and len(rest) > 1):
        return ("stages", names.index(stage), *rest), None
    return rest, stage


def _stage_document(spec: StageSpec, pipeline: Path, document: Document, overrides: Iterable[tuple[str, Loc, Any, str]]) -> Document:
    path = pipeline.parent / spec.config
    if not path.is_file():
        place = next(index for index, stage in enumerate(document.value["stages"]) if stage["name"] == spec.name)
        raise document.error(("stages", place, "config"), f"no such file: {path}", "The path is relative to the pipeline file; correct it")
    stage = _with_absolute_paths(read(path), path.parent)
    for target, loc, value, label in overrides:
        if target == spec.name:
            stage = stage.with_value(loc, value, label)
    return stage


def _with_absolute_paths(document: Document, folder: Path) -> Document:
    """A trainer runs elsewhere, so the paths of a stage file, which are relative to the file, are made absolute."""
    for loc in (*_PATHS, *_PATHS_OR_NAMES, *_PATHS_OR_FILES):
        inner: Any = document.value
        for part in loc:
            inner = inner.get(part) if isinstance(inner, dict) else None
        if isinstance(inner, str) and _is_path(loc, inner, folder):
            document = document.with_value(loc, _absolute(inner, folder))
    return document


def _is_path(place: Loc, value: str, folder: Path) -> bool:
    """`folder`: what it would be relative to."""
    dotted = value.startswith(("./", "../", "~"))
    if place in _PATHS_OR_FILES:
        return dotted or _FILE.search(value) is not None or (folder / value).exists()
    return place in _PATHS or (place in _PATHS_OR_NAMES and dotted)


def _absolute(path: str, folder: Path) -> str:
    return path if "://" in path else os.path.normpath(folder.absolute() / Path(path).expanduser())


def _parents_first(specs: Sequence[StageSpec], document: Document) -> list[StageSpec]:
    """In the file's order, but every parent before its children. Raises UsageError: a name twice, an unknown parent, a cycle."""
    by_name: dict[str, StageSpec] = {}
    for place, spec in enumerate(specs):
        if spec.name in by_name:
            first = next(index for index, other in enumerate(specs) if other.name == spec.name)
            fact = f"{spec.name!r} names two stages, number {first + 1} and number {place + 1}"
            raise document.error(("stages", place, "name"), fact, "Rename one")
        by_name[spec.name] = spec
    for place, spec in enumerate(specs):
        if spec.parent is not None and spec.parent not in by_name:
            fact = f"no stage {spec.parent!r} in this pipeline"
            raise document.error(("stages", place, "parent"), fact, closest(spec.parent, [n for n in by_name if n != spec.name]))
    ordered: dict[str, StageSpec] = {}
    for place, spec in enumerate(specs):
        chain = [spec]
        while (parent := chain[-1].parent) is not None and parent not in ordered:
            if by_name[parent] in chain:
                circle = " -> ".join(each.name for each in [*chain[chain.index(by_name[parent]) :], by_name[parent]])
                raise document.error(("stages", place, "parent"), f"stages start from each other: {circle}", "Let one have no parent")
            chain.append(by_name[parent])
        ordered.update((each.name, each) for each in reversed(chain))
    return list(ordered.values())


def _check_follows(stage: Stage, parent: Stage, document: Document) -> None:
    """Whether the parent's weights fit, as far as files can tell; the checkpoint itself is verified before the stage starts."""
    if stage.config.weights is not None:
        fact = f"imports {shown(stage.config.weights)}, but the stage starts from its parent {parent.name!r}"
        raise document.error(("weights",), fact, "Remove one of the two")
    for misfit in identity.misfits(stage.config, parent.config):
        fact = f"is {misfit.new}, but its parent {parent.name!r} has {misfit.old}, and weights are carried over"
        raise document.error(tuple(misfit.path.split(".")), fact, "Make them equal, or remove the parent")
