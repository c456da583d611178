"""From files to a pipeline that is resolved: the pipeline's file and its stage files, then `OSCTL_*`, then `--set`.

Refuses to do anything but read files, to resolve a pipeline whose stages cannot follow one another, and to let credentials into one.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from opensora import identity
from opensora.config import StageConfig
from orchestrator.recipe import preparation
from orchestrator.recipe.cluster_profile import ClusterProfile, shipped_clusters
from orchestrator.recipe.files import DEFAULT_CLUSTER, cluster_file, shipped_folder
from orchestrator.recipe.overrides import (
    SCALARS,
    of_profile,
    pipeline_value,
    profile_changes,
    stage_names,
    stage_value,
    target_of,
    with_environment,
)
from orchestrator.recipe.paths import with_absolute_paths
from orchestrator.recipe.pipeline import Pipeline, PipelineFile, Stage, StageSpec
from orchestrator.recipe.yaml_file import Document, Loc, closest, read, shown, usage_error, validate
from orchestrator.redact import holds_credentials, typed


def home(env: Mapping[str, str]) -> Path:
    """Where local state lies: store, run directories, MLflow's database. `OSCTL_HOME`, else `./.osctl`."""
    return Path(env.get("OSCTL_HOME") or ".osctl")


def load(path: Path, *, overrides: Mapping[str, str] | None = None, env: Mapping[str, str] | None = None) -> Pipeline:
    """A pipeline file and its stage files, resolved.

    Args:
        overrides: `store`, `stage2.steps`, `cluster.kueue_priority`, … → a YAML value. They win over everything.
        env: `OSCTL_STORE`, `OSCTL_TRACKING`, `OSCTL_BACKEND`, … win over the file; `OSCTL_HOME` moves the default store.

    Raises:
        UsageError: one line that names file, line and key, what was found, what was expected, and what to do.
    """
    env = env or {}
    document = with_environment(read(path), env)
    names = stage_names(document)
    stage_overrides: list[tuple[str, Loc, Any, str]] = []
    for key, text in (overrides or {}).items():
        label = f"--set {key}={typed(text)}"
        place, target = target_of(key, label, names)
        if place[0] == "cluster" and len(place) > 1:
            continue
        if target is None:
            if place[0] == "prepare" and len(place) > 1:
                document = preparation.inlined(document, path.parent)
            document = document.with_value(place, pipeline_value(place, text, label), label)
        else:
            stage_overrides.append((target, place, stage_value(place, text, label), label))
    file = validate(PipelineFile, document, "pipeline")
    specs = _parents_first(file.stages, document)
    documents = {spec.name: _stage_document(spec, path, document, stage_overrides) for spec in specs}
    stages = {spec.name: Stage(spec=spec, config=validate(StageConfig, documents[spec.name], "stage")) for spec in specs}
    for stage in stages.values():
        if stage.spec.parent is not None:
            _check_follows(stage, stages[stage.spec.parent], documents[stage.name])
    changes = profile_changes(overrides or {}, names, on_cluster=file.backend == "kubernetes")
    cluster = _cluster(file, document, path, changes) if file.backend == "kubernetes" else None
    _check_pools(file.stages, cluster, document)
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
        prepare=preparation.of_recipe(document, path.parent, file.name, env) if file.prepare is not None else None,
    )
    _check_nothing_secret(resolved, document, documents, env)
    return resolved


def changed(pipeline: Pipeline, overrides: Mapping[str, str]) -> Pipeline:
    """What was launched, with some fields as they are set now: of its stages, and of its own all but name and store.

    Raises UsageError.
    """
    if not overrides:
        return pipeline
    names = [stage.name for stage in pipeline.stages]
    content = pipeline.model_dump(mode="json", exclude={"stages", "cluster"})
    content["stages"] = [stage.spec.model_dump(mode="json") for stage in pipeline.stages]
    document = Document(f"{pipeline.name} as it was launched", content, {}, {})
    documents = {
        stage.name: Document(f"{stage.name} as it was launched", stage.config.model_dump(mode="json"), {}, {}) for stage in pipeline.stages
    }
    for key, text in overrides.items():
        label = f"--set {key}={typed(text)}"
        place, target = target_of(key, label, names)
        if place[0] == "prepare":
            raise usage_error(f"{label}: what was launched is prepared already. Launch the recipe to prepare otherwise")
        if place[0] == "cluster" and len(place) > 1:
            continue
        if place[0] in ("name", "store", "stages") and (len(place) == 1 or place[-1] in ("name", "parent")):
            raise usage_error(f"{label}: is the {place[-1]} of what was launched, which stays. Launch a recipe to have another")
        if target is None:
            document = document.with_value(place, pipeline_value(place, text, label), label)
        else:
            documents[target] = documents[target].with_value(place, stage_value(place, text, label), label)
    file = validate(PipelineFile, document, "pipeline")
    specs = {spec.name: spec for spec in file.stages}
    stages = {
        stage.name: stage.model_copy(update={"spec": specs[stage.name], "config": validate(StageConfig, documents[stage.name], "stage")})
        for stage in pipeline.stages
    }
    for stage in stages.values():
        if stage.spec.parent is not None:
            _check_follows(stage, stages[stage.spec.parent], documents[stage.name])
    changes = profile_changes(overrides, names, on_cluster=file.backend == "kubernetes")
    cluster = pipeline.cluster
    if "cluster" in overrides or (file.backend == "kubernetes" and cluster is None):
        cluster = _cluster(file, document, Path.cwd() / "pipeline", changes)
    elif cluster is not None and changes:
        launched = Document("the cluster profile as it was launched", cluster.model_dump(mode="json"), {}, {})
        cluster = validate(ClusterProfile, of_profile(launched, changes), "cluster")
    own = {name: getattr(file, name) for name in SCALARS if name not in ("name", "store", "cluster", "experiment")}
    own |= {"experiment": file.experiment or pipeline.experiment, "cluster": cluster if file.backend == "kubernetes" else None}
    result = pipeline.model_copy(update={**own, "stages": tuple(stages.values())})
    _check_pools(file.stages, result.cluster, document)
    _check_nothing_secret(result, document, documents, os.environ)
    return result


_INSTEAD = {
    "store": "Put them into AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, in a cluster into the profile's s3_secret",
    "tracking": "Put them into MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD",
}
"""Where credentials belong that people put into a URL."""


def _check_nothing_secret(pipeline: Pipeline, document: Document, stages: Mapping[str, Document], env: Mapping[str, str]) -> None:
    """A pipeline is written to the ledger as it is, parts of it to MLflow and to the cluster. Raises UsageError; the value is not shown."""
    fact = "holds credentials, and everything here is written to the ledger"
    for loc, text in _texts(pipeline.model_dump(mode="json", exclude={"stages", "cluster", "prepare"}), ()):
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


def _cluster(file: PipelineFile, document: Document, path: Path, changes: Mapping[str, str]) -> ClusterProfile:
    """The profile that a pipeline names: shipped, or a file beside it (`--set cluster=` and OSCTL_CLUSTER: in the working directory).

    `changes`: what `--set cluster.FIELD=VALUE` changes in it, by key.
    """
    named = file.cluster or DEFAULT_CLUSTER
    found = cluster_file(named, path)
    if found is None:
        known = list(shipped_clusters(shipped_folder()))
        raise document.error(("cluster",), f"no such file or shipped cluster profile: {named!r}", closest(named, known))
    return validate(ClusterProfile, of_profile(read(found), changes), "cluster")


def _check_pools(stages: Sequence[StageSpec], cluster: ClusterProfile | None, document: Document) -> None:
    """Whether the profile has the pools that stages name. Without a cluster they mean nothing. Raises UsageError."""
    known = [pool.name for pool in cluster.pools] if cluster is not None else []
    for place, spec in enumerate(stages if cluster is not None else ()):
        for name in spec.pools:
            if name not in known:
                assert cluster is not None
                fact = f"no pool {name!r} in the cluster profile {cluster.name}, which has {', '.join(known) or 'none'}"
                advice = closest(name, known) if known else "Describe it there under `pools`, or leave the stage's pools out"
                raise document.error(("stages", place, "pools"), fact, advice)


def cluster_argument(path: Path, overrides: Mapping[str, str], env: Mapping[str, str]) -> str:
    """How `--cluster` calls the profile of a pipeline that was loaded from the same, wherever it is typed: a shipped name, or a file."""
    named = overrides.get("cluster") or with_environment(read(path), env).value.get("cluster") or DEFAULT_CLUSTER
    found = cluster_file(named, path)
    return named if found is None or named in shipped_clusters(shipped_folder()) else str(found.absolute())


def _stage_document(spec: StageSpec, pipeline: Path, document: Document, overrides: Iterable[tuple[str, Loc, Any, str]]) -> Document:
    path = pipeline.parent / spec.config
    if not path.is_file():
        place = next(index for index, stage in enumerate(document.value["stages"]) if stage["name"] == spec.name)
        raise document.error(("stages", place, "config"), f"no such file: {path}", "The path is relative to the pipeline file; correct it")
    stage = with_absolute_paths(read(path), path.parent)
    for target, loc, value, label in overrides:
        if target == spec.name:
            stage = stage.with_value(loc, value, label)
    return stage


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
