"""What every field of the configuration files means: type, unit, default and words, straight from the schemas.

Owns the walk through the schemas. Refuses to hold a second description of anything: the words are the fields' docstrings, the units stand
beside the fields' types (`opensora.config.Unit`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, get_args

from pydantic import BaseModel

from opensora.config import StageConfig
from opensora.dataset.prepare_config import PrepareConfig
from orchestrator.errors import UsageError
from orchestrator.recipe.cluster_profile import ClusterProfile
from orchestrator.recipe.pipeline import PipelineFile
from orchestrator.recipe.prices import Prices
from orchestrator.recipe.yaml_file import closest

Root = Literal["pipeline", "stage", "prices", "cluster", "prepare"]

MODELS: dict[Root, type[BaseModel]] = {
    "pipeline": PipelineFile, "stage": StageConfig, "prices": Prices, "cluster": ClusterProfile, "prepare": PrepareConfig,
}  # fmt: skip


@dataclass(frozen=True)
class Explained:
    """One field."""

    path: str
    """As `osctl explain` takes it, e.g. `stage.optimizer.lr`."""
    type: str
    unit: str
    """Empty where the field is no number."""
    default: str
    """As YAML would hold it; `required` where there is none."""
    doc: str


@dataclass(frozen=True)
class Explanation:
    """A path: what stands there, and the fields under it."""

    subject: Explained
    fields: tuple[Explained, ...]


def explain(path: str) -> Explanation:
    """Explain `pipeline`, `stage`, `prices`, `cluster` or `prepare`, or any field in them; else a field of the pipeline.

    A field of several kinds (`stage.objective`) shows the fields of all of them, and a kind may be named (`stage.objective.iddpm`).

    Raises:
        UsageError: no such field; names the closest one.
    """
    root, parts = _split(path)
    schema = json_schema(root)
    where: list[str] = [root]
    node: Mapping[str, Any] = schema
    owner: Mapping[str, Any] = {}
    for part in parts:
        inner, owner = _step(schema, node, part, ".".join(where))
        where.append(part)
        node = inner
    subject = _explained(schema, ".".join(where), owner, where[-1], node)
    return Explanation(subject, tuple(_fields(schema, node, ".".join(where))))


def every_field(root: Root) -> Iterator[Explained]:
    """All fields of a file, each once."""
    seen: set[str] = set()
    pending: list[str] = [root]
    while pending:
        for field in explain(pending.pop()).fields:
            if field.path not in seen:
                seen.add(field.path)
                pending.append(field.path)
                yield field


@cache
def json_schema(root: Root) -> dict[str, Any]:
    """JSON Schema (draft 2020-12) of a file, for editors: completion, types and words while typing."""
    schema = MODELS[root].model_json_schema()
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def _split(path: str) -> tuple[Root, list[str]]:
    parts = [part for part in path.split(".") if part]
    for root in get_args(Root):
        if parts and parts[0] == root:
            return root, parts[1:]
    return "pipeline", parts


def _models(schema: Mapping[str, Any], node: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The objects that a field can hold: through references, alternatives, lists and mappings."""
    if "$ref" in node:
        return _models(schema, schema["$defs"][node["$ref"].rsplit("/", 1)[1]])
    if "properties" in node:
        return [node]
    found: list[Mapping[str, Any]] = []
    for inner in [*node.get("anyOf", ()), *node.get("oneOf", ()), node.get("items"), node.get("additionalProperties")]:
        if isinstance(inner, dict):
            found.extend(_models(schema, inner))
    return found


def _owners(schema: Mapping[str, Any], node: Mapping[str, Any], name: str) -> Iterator[tuple[Mapping[str, Any], Mapping[str, Any]]]:
    """(field's schema, model's schema) of each model at `node` that has the field."""
    for model in _models(schema, node):
        if name in model["properties"]:
            yield model["properties"][name], model


def _step(schema: Mapping[str, Any], node: Mapping[str, Any], part: str, where: str) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """One part further: a field, a kind, or the name of an item of a mapping. Returns (its schema, the model that has it)."""
    models = _models(schema, node)
    for model in models:  # a kind first: one of them may be called as a field of another is
        if len(models) > 1 and model["properties"].get("kind", {}).get("const") == part:
            return model, {}
    for found in _owners(schema, node, part):
        return found
    if isinstance(node.get("additionalProperties"), dict):
        return node["additionalProperties"], {}
    kinds = [model["properties"]["kind"]["const"] for model in models] if len(models) > 1 else []
    known = sorted({name for model in models for name in model["properties"]} | set(kinds))
    raise UsageError(f"{where}.{part}: no such field. {closest(part, known)}")


def _fields(schema: Mapping[str, Any], node: Mapping[str, Any], path: str) -> Iterator[Explained]:
    """Fields at `node`; where it can be of several kinds, each kind and its own fields."""
    models = _models(schema, node)
    for model in models:
        inside = path
        if len(models) > 1:
            kind = model["properties"]["kind"]["const"]
            inside = f"{path}.{kind}"
            yield Explained(inside, f"kind: {kind}", "", "", _doc(schema, model))
        for name, inner in model["properties"].items():
            if name != "kind" or len(models) == 1:
                yield _explained(schema, f"{inside}.{name}", model, name, inner)


def _explained(schema: Mapping[str, Any], path: str, owner: Mapping[str, Any], name: str, node: Mapping[str, Any]) -> Explained:
    required = name in owner.get("required", ())
    return Explained(
        path=path,
        type=_type(schema, node),
        unit=str(node.get("unit", "")),
        default="required" if required else _default(node),
        doc=_doc(schema, node if name != "kind" else owner),
    )


def _doc(schema: Mapping[str, Any], node: Mapping[str, Any]) -> str:
    """The field's words, else those of what it holds, on one line."""
    own = node.get("description")
    inherited = [model["description"] for model in _models(schema, node) if "description" in model]
    return " ".join((own or " / ".join(inherited)).split())


def _default(node: Mapping[str, Any]) -> str:
    if "default" not in node:
        return ""
    match node["default"]:
        case None:
            return "none"
        case bool(value):
            return str(value).lower()
        case dict():
            return "see its fields"
        case list(items):
            return f"[{', '.join(map(str, items))}]"
        case value:
            return str(value)


def _type(schema: Mapping[str, Any], node: Mapping[str, Any]) -> str:
    if "$ref" in node:
        return _type(schema, schema["$defs"][node["$ref"].rsplit("/", 1)[1]])
    if "const" in node:
        return str(node["const"])
    if "enum" in node:
        return " | ".join(map(str, node["enum"]))
    if alternatives := [*node.get("anyOf", ()), *node.get("oneOf", ())]:
        kinds = [model["properties"]["kind"]["const"] for model in _models(schema, node) if "kind" in model["properties"]]
        if len(kinds) > 1:
            return f"keys and values, kind: {' | '.join(kinds)}"
        return " or ".join(_type(schema, each) for each in alternatives)
    if "prefixItems" in node:
        return f"{len(node['prefixItems'])} x {_type(schema, node['prefixItems'][0])}"
    match node.get("type"):
        case "array":
            return f"list of {_type(schema, node['items'])}"
        case "object":
            return "keys and values"
        case "integer" | "number" as kind:
            return f"{'whole number' if kind == 'integer' else 'number'}{_bounds(node)}"
        case "boolean":
            return "true | false"
        case "null":
            return "none"
    return "date" if node.get("format") == "date" else "text"


def _bounds(node: Mapping[str, Any]) -> str:
    low = f" > {node['exclusiveMinimum']:g}" if "exclusiveMinimum" in node else f" >= {node['minimum']:g}" if "minimum" in node else ""
    high = f" <= {node['maximum']:g}" if "maximum" in node else ""
    return f"{low}{' and' if low and high else ''}{high}"
