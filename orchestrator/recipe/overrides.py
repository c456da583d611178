"""What a person sets otherwise, by `OSCTL_*` variables or `--set KEY=VALUE`: which field a key means, and which value its text is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from orchestrator.recipe.paths import absolute, is_path
from orchestrator.recipe.pipeline import PipelineFile, StageSpec
from orchestrator.recipe.yaml_file import Document, Loc, closest, parse_value, usage_error
from orchestrator.redact import typed

SCALARS = tuple(name for name in PipelineFile.model_fields if name not in ("stages", "trainer", "prepare"))


TEXTS = ("name", "backend", "store", "tracking", "experiment", "cluster")


def with_environment(document: Document, env: Mapping[str, str]) -> Document:
    """The pipeline file with what the variables set. Raises UsageError."""
    for name in SCALARS:
        variable = f"OSCTL_{name.upper()}"
        if text := env.get(variable):
            label = f"{variable}={typed(text)}"
            document = document.with_value((name,), pipeline_value((name,), text, label), label)
    return document


def pipeline_value(loc: Loc, text: str, label: str) -> Any:
    """A value of a field of the pipeline, as YAML reads it; where only text is possible, as it was typed (a folder may be called 2026).

    Raises UsageError where text is needed and none is there: a variable of the shell is not set.
    """
    if len(loc) == 1 and loc[0] in TEXTS and not text.strip():
        raise usage_error(f"{label}: is empty. Give {loc[0]} a value, or leave it out")
    return text if len(loc) == 1 and loc[0] in TEXTS else parse_value(text, label)


def stage_value(loc: Loc, text: str, label: str) -> Any:
    """The same of a stage's field. A path is relative to the working folder. Raises UsageError."""
    value = parse_value(text, label)
    if isinstance(value, str) and not value.strip():  # as a path it would be the working folder
        raise usage_error(f"{label}: is empty. Give it a value, or leave it out")
    return absolute(value, Path.cwd()) if isinstance(value, str) and is_path(loc, value, Path.cwd()) else value


def of_profile(profile: Document, changes: Mapping[str, str]) -> Document:
    """A cluster profile with what `--set cluster.FIELD=VALUE` changes. `changes`: by key. Raises UsageError."""
    for key, text in changes.items():
        label = f"--set {key}={typed(text)}"
        profile = profile.with_value(_profile_loc(key), parse_value(text, label), label)
    return profile


def _profile_loc(key: str) -> Loc:
    """Where `cluster.FIELD` belongs in the profile. What follows `node_selector` is the key of a label, which may hold dots."""
    field, _, label = key.removeprefix("cluster.").partition(".")
    return (field, label.strip("\"'")) if field == "node_selector" and label else tuple(key.split(".")[1:])


def profile_changes(overrides: Mapping[str, str], names: Sequence[str], *, on_cluster: bool) -> dict[str, str]:
    """Those of `overrides` that change a field of the cluster profile. Raises UsageError if there is no cluster."""
    found = {key: text for key, text in overrides.items() if key.startswith("cluster.") and "cluster" not in names}
    if found and not on_cluster:
        key, text = next(iter(found.items()))
        raise usage_error(
            f"--set {key}={typed(text)}: this pipeline runs on this machine and has no cluster profile. Add --backend kubernetes"
        )
    return found


def stage_names(document: Document) -> list[str]:
    """Names before anything is validated: overrides are applied first, so that they are validated like the file."""
    stages = document.value.get("stages")
    items = stages if isinstance(stages, list) else []
    return [str(item.get("name")) if isinstance(item, dict) else "" for item in items]


def target_of(key: str, label: str, names: Sequence[str]) -> tuple[Loc, str | None]:
    """Where an override belongs: (place in the pipeline file, None) or (place in the stage file, stage).

    A key's first part is a field of the pipeline, or a stage's name (which may hold dots: the longest one that fits).
    """
    if key in PipelineFile.model_fields:
        return (key,), None
    plain = key.removeprefix("stages.")
    first = key.partition(".")[0]
    if first in ("prepare", "cluster") and first not in names:  # inside a preparation, or a field of the cluster profile
        return tuple(key.split(".")), None
    stage = max((name for name in names if name and plain.startswith(f"{name}.")), key=len, default=None)
    if stage is None:
        first, dot, _ = plain.partition(".")
        known = [name for name in names if name] if dot else [*SCALARS, *(f"{name}.steps" for name in names if name)]
        raise usage_error(f"{label}: no stage or field {first!r} in this pipeline. {closest(first, known)}")
    rest = tuple(plain.removeprefix(f"{stage}.").split("."))
    # `parent` names a stage, `parent.weights` says what is taken from it.
    if rest[0] in StageSpec.model_fields and not (rest[0] == "parent" and len(rest) > 1):
        return ("stages", names.index(stage), *rest), None
    return rest, stage
