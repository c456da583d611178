"""One YAML file a person wrote: its plain values, the line of each key, and one line of text for whatever is wrong with it.

Owns reading, overriding and validating such files. Refuses what YAML would guess at: keys given twice, tags, `yes` for true, `010` for 8,
`1e-3` as a string. Numbers are read as YAML 1.2 reads them.
"""

from __future__ import annotations

import difflib
import json
import math
import re
import stat
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from orchestrator.errors import UsageError
from orchestrator.redact import redacted, typed

MAX_BYTES = 1_000_000
"""A configuration of a million bytes is a mistake (a data file, a checkpoint) and takes PyYAML minutes."""
MAX_DEPTH = 20
"""Levels of nesting; the deepest field of the schemas lies 5 deep."""
MAX_VALUES = 100_000
"""Values after aliases are followed: ten lines of aliases can stand for a billion."""

Loc = tuple[str | int, ...]
Model = TypeVar("Model", bound=BaseModel)


@dataclass(frozen=True)
class Document:
    """A file's content as dicts, lists, strings, numbers, booleans and None."""

    source: str
    """The file, as it was named."""
    value: dict[str, Any]
    lines: Mapping[Loc, int]
    """Line of each key and list item, from 1."""
    overridden: Mapping[Loc, str]
    """What was set from outside the file → how it was said there, e.g. `--set stage1.steps=10`."""

    def at(self, loc: Loc) -> str:
        """`file:line` or `--set key=value`: where a person changes what is at `loc`, or what it lies in."""
        for length in range(len(loc), -1, -1):
            if loc[:length] in self.overridden:
                return self.overridden[loc[:length]]
            if loc[:length] in self.lines:
                return f"{self.source}:{self.lines[loc[:length]]}"
        return self.source

    def error(self, loc: Loc, fact: str, next_step: str) -> UsageError:
        key = typed(dotted(self.value, loc))
        return usage_error(f"{self.at(loc)}: {key + ': ' if key else ''}{fact}. {next_step}")

    def with_value(self, loc: Loc, value: Any, label: str | None = None) -> Document:
        """The document with one value replaced or added; `label` says how the person said so, none: it is the file's still."""
        overridden = {**self.overridden, loc: label} if label is not None else self.overridden
        return Document(self.source, _put(self.value, loc, value), self.lines, overridden)


class _Resolver(yaml.SafeLoader):
    """Composes nodes; scalars get their type from `_SCALARS`, and nothing else."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012 - PyYAML's own class attribute


_NULL, _BOOL, _INT, _FLOAT = (f"tag:yaml.org,2002:{name}" for name in ("null", "bool", "int", "float"))
_STR, _MAP, _SEQ = (f"tag:yaml.org,2002:{name}" for name in ("str", "map", "seq"))
_Resolver.add_implicit_resolver(_NULL, re.compile(r"^(?:~|null|Null|NULL|)$"), ["~", "n", "N", ""])
_Resolver.add_implicit_resolver(_BOOL, re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF"))
_Resolver.add_implicit_resolver(_INT, re.compile(r"^[-+]?(?:0|[1-9][0-9_]*)$"), list("-+0123456789"))
_Resolver.add_implicit_resolver(
    _FLOAT,
    re.compile(
        r"^(?:[-+]?(?:(?:0|[1-9][0-9_]*)\.[0-9_]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?|[-+]?(?:0|[1-9][0-9_]*)[eE][-+]?[0-9]+|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
    ),
    list("-+0123456789."),
)


def read(path: Path) -> Document:
    """One YAML mapping.

    Raises:
        UsageError: missing, a folder, unreadable, over 1 MB, not UTF-8, with a byte order mark or tabs, not YAML, a key twice, no mapping.
    """
    try:
        found = path.stat()
        if stat.S_ISFIFO(found.st_mode) and not str(path).startswith(("/dev/", "/proc/")):  # a shell's own pipes have a writer
            raise usage_error(f"{path}: is a pipe, which may never end. Name a YAML file")
        size = found.st_size
        if size > MAX_BYTES:
            raise usage_error(f"{path}: {size:,} bytes, a configuration has at most {MAX_BYTES:,}. Name a YAML file of stages")
        data = path.read_bytes()
    except FileNotFoundError:
        raise usage_error(f"{path}: no such file. Check the name, or see `osctl init`") from None
    except IsADirectoryError:
        raise usage_error(f"{path}: is a folder, not a file. Name a YAML file in it") from None
    except OSError as error:
        raise usage_error(f"{path}: cannot be read: {error.strerror}. Check its permissions") from error
    return parse(_text(path, data), str(path))


def parse(text: str, source: str) -> Document:
    """Raises UsageError."""
    node = _compose(text, source)
    lines: dict[Loc, int] = {}
    value = _Reader(source, lines).value(node, ())
    if not isinstance(value, dict):
        raise usage_error(f"{source}: expected keys and values, found {shown(value)}. See `osctl explain`")
    return Document(source, value, lines, {})


def parse_value(text: str, source: str) -> Any:
    """One YAML value from a command line or the environment. Raises UsageError."""
    return _Reader(source, {}).value(_compose(text, source), ())


def validate(model: type[Model], document: Document, root: str) -> Model:
    """The document as a model, without any guess at types (`"10"` and `10.0` are no whole numbers).

    Args:
        root: where `osctl explain` finds the model's fields: `pipeline`, `stage` or `prices`.

    Raises:
        UsageError: names the first thing that is wrong; unknown keys come first, since the rest may follow from them.
    """
    try:
        return model.model_validate_json(json.dumps(document.value), strict=True)
    except ValidationError as error:
        errors = error.errors(include_url=False)
    errors = [error for error in errors if not _follows_from(error["loc"], errors)]
    first = min(errors, key=lambda e: (e["type"] != "extra_forbidden", document.lines.get(_plain(document.value, e["loc"]), 0)))
    loc = _plain(document.value, first["loc"])
    if first["type"] == "extra_forbidden":
        raise _unknown_key(model, document, loc)
    fact = _fact(first["type"], first["msg"], first["input"], first.get("ctx", {}))
    path = ".".join([root, *(part for part in loc if isinstance(part, str))])
    raise document.error(loc, fact, f"See `osctl explain {path}`")


def usage_error(message: str) -> UsageError:
    """One line, whatever was in the file: what cannot be printed is escaped, and credentials are left out."""
    return UsageError("".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in redacted(message)))


def closest(name: str, known: Sequence[str]) -> str:
    """The next step after an unknown name."""
    match = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f"Did you mean {match[0]!r}?" if match else f"Known: {', '.join(known) or 'none'}"


def shown(value: Any) -> str:
    """A value inside a message: short, on one line, and not if it may be a key in the wrong place."""
    match value:
        case None:
            return "nothing"
        case dict():
            return typed(f"keys and values ({', '.join(map(str, list(value)[:3]))}{', …' if len(value) > 3 else ''})")
        case list():
            return f"a list of {len(value)}"
        case bool():
            return str(value).lower()
    text = typed(repr(value))
    return text if len(text) <= 80 else f"{text[:77]}…"


def dotted(value: Any, loc: Loc) -> str:
    """`stages.stage2.resources.nodes`: list items by their name where they have one, else by their place."""
    parts: list[str] = []
    for part in loc:
        value = _child(value, part)
        named = isinstance(part, int) and isinstance(value, dict) and isinstance(value.get("name"), str)
        parts.append(value["name"] if named else str(part))
    return ".".join(parts)


def models_in(annotation: Any) -> tuple[type[BaseModel], ...]:
    """The models that a field's annotation can hold: through unions, tuples, lists and the values of mappings."""
    origin = get_origin(annotation)
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return (annotation,)
    if origin is Annotated:
        return models_in(get_args(annotation)[0])
    if origin in (Union, types.UnionType, tuple, list, dict):
        return tuple(dict.fromkeys(model for argument in get_args(annotation) for model in models_in(argument)))
    return ()


def _text(path: Path, data: bytes) -> str:
    if data.startswith(b"\xef\xbb\xbf"):
        raise usage_error(f"{path}:1: starts with a byte order mark, expected plain UTF-8. Save it without one")
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise usage_error(f"{path}:{line}: byte 0x{data[error.start]:02x} is not UTF-8. Save the file as UTF-8") from None
    for number, line_text in enumerate(text.splitlines(), start=1):
        if "\t" in line_text[: len(line_text) - len(line_text.lstrip())]:
            raise usage_error(f"{path}:{number}: indented by a tab, YAML wants spaces. Replace the tab by spaces")
    return text


def _compose(text: str, source: str) -> yaml.Node | None:
    try:
        loader = _Resolver(text)
        node: yaml.Node | None = loader.get_single_node()
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise usage_error(f"{source}:{line}: character {ord(text[error.position]):#06x} is not allowed in YAML. Remove it") from None
    except yaml.MarkedYAMLError as error:
        where = f"{source}:{error.problem_mark.line + 1}" if error.problem_mark else source
        raise usage_error(
            f"{where}: not YAML: {typed(error.problem or error.context or '')}. Correct the line, or quote the value"
        ) from None
    except RecursionError:
        raise usage_error(f"{source}: nested more than {MAX_DEPTH} levels deep. Remove levels") from None
    return node


class _Reader:
    """Turns composed nodes into values and notes their lines."""

    def __init__(self, source: str, lines: dict[Loc, int]):
        self.source, self.lines, self.values = source, lines, 0

    def value(self, node: yaml.Node | None, loc: Loc) -> Any:
        if node is None:
            return None
        self.values += 1
        line = node.start_mark.line + 1
        if self.values > MAX_VALUES:
            raise usage_error(f"{self.source}:{line}: more than {MAX_VALUES:,} values, aliases followed. Write the file without aliases")
        if len(loc) > MAX_DEPTH:
            raise usage_error(f"{self.source}:{line}: nested more than {MAX_DEPTH} levels deep. Remove levels")
        match node:
            case yaml.MappingNode(tag=tag) if tag == _MAP:
                return self._mapping(node, loc)
            case yaml.SequenceNode(tag=tag) if tag == _SEQ:
                for place, item in enumerate(node.value):
                    self.lines[*loc, place] = item.start_mark.line + 1
                return [self.value(item, (*loc, place)) for place, item in enumerate(node.value)]
            case yaml.ScalarNode(tag=tag) if tag in _SCALARS:
                return _SCALARS[tag](node.value)
        raise usage_error(
            f"{self.source}:{line}: tag {typed(node.tag.replace('tag:yaml.org,2002:', '!!'))} is not allowed. Write a plain value"
        )

    def _mapping(self, node: yaml.MappingNode, loc: Loc) -> dict[str, Any]:
        content: dict[str, Any] = {}
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            if not isinstance(key_node, yaml.ScalarNode):
                raise usage_error(f"{self.source}:{line}: a key is {key_node.id}, expected a name. Write `name: value`")
            key = key_node.value
            if key in content:
                first = self.lines[*loc, key]
                raise usage_error(
                    f"{self.source}:{line}: {typed('.'.join(map(str, (*loc, key))))}: given twice, first on line {first}. Remove one"
                )
            self.lines[*loc, key] = line
            content[key] = self.value(value_node, (*loc, key))
        return content


def _number(text: str) -> float:
    plain = text.replace("_", "").lower()
    return math.inf * (-1 if plain[0] == "-" else 1) if plain.endswith("inf") else float(plain.replace(".nan", "nan"))


_SCALARS: dict[str, Callable[[str], Any]] = {
    _STR: str,
    _NULL: lambda _: None,
    _BOOL: lambda text: text.lower() == "true",
    _INT: lambda text: int(text.replace("_", "")) if len(text) < 300 else math.inf,
    _FLOAT: _number,
}


def _child(value: Any, part: str | int) -> Any:
    if isinstance(value, dict):
        return value.get(part)
    return value[part] if isinstance(value, list) and isinstance(part, int) and part < len(value) else None


def _put(value: Any, loc: Loc, new: Any) -> Any:
    if not loc:
        return new
    if isinstance(loc[0], int):
        return [_put(item, loc[1:], new) if place == loc[0] else item for place, item in enumerate(value)]
    inner = value if isinstance(value, dict) else {}
    return {**inner, loc[0]: _put(inner.get(loc[0]), loc[1:], new)}


def _plain(value: Any, loc: Loc) -> Loc:
    """pydantic's place of an error without the tags of discriminated unions, which are no keys."""
    plain: list[str | int] = []
    for part in loc:
        if isinstance(value, dict) and part not in value and value.get("kind") == part:
            continue
        plain.append(part)
        value = _child(value, part)
    return tuple(plain)


def _follows_from(loc: Loc, errors: Sequence[ErrorDetails]) -> bool:
    """Whether what is wrong here follows from what is wrong inside: a list is too short because pydantic counts its valid items alone."""
    return any(len(other["loc"]) > len(loc) and other["loc"][: len(loc)] == loc for other in errors)


def _unknown_key(model: type[BaseModel], document: Document, loc: Loc) -> UsageError:
    known = _fields_at(model, document.value, loc[:-1])
    return document.error(loc, f"unknown key {shown(str(loc[-1]))}", closest(str(loc[-1]), sorted(known)))


def _fields_at(model: type[BaseModel], value: Any, loc: Loc) -> list[str]:
    """Names that may stand at `loc`; of a union's members, the one whose `kind` is written there."""
    models: tuple[type[BaseModel], ...] = (model,)
    for part in loc:
        value = _child(value, part)
        if isinstance(part, str):
            fields = [field for each in models if (field := each.model_fields.get(part)) is not None]
            # A mapping's own keys (names of devices) are no fields: its values keep the models.
            models = tuple(inner for field in fields for inner in models_in(field.annotation)) if fields else models
        kind = value.get("kind") if isinstance(value, dict) else None
        models = tuple(m for m in models if "kind" not in m.model_fields or kind in get_args(m.model_fields["kind"].annotation)) or models
    return [name for each in models for name in each.model_fields]


NAME_RULE = "expected lower-case letters a-z, digits, '-' and '.', from a letter to a letter or digit, at most 40"
"""Of pipelines and stages, the only fields with a pattern (`orchestrator.recipe.pipeline.Name`)."""

_EXPECTED = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "decimal_type": "a number in quotes",
    "decimal_parsing": "a number in quotes",
    "finite_number": "a finite number",
    "string_type": "text",
    "bool_type": "true or false",
    "tuple_type": "a list",
    "list_type": "a list",
    "dict_type": "keys and values",
    "model_type": "keys and values",
    "model_attributes_type": "keys and values",
    "date_type": "a date, YYYY-MM-DD",
    "date_parsing": "a date, YYYY-MM-DD",
    "date_from_datetime_parsing": "a date, YYYY-MM-DD",
}


def _length(given: Any) -> str:
    return f" ({len(given)} characters)" if isinstance(given, str) and len(given) > 40 else ""


def _fact(kind: str, message: str, given: Any, context: Mapping[str, Any]) -> str:
    """What is wrong, with what was expected and what was found."""
    match kind:
        case "missing":
            return "is missing, and has no default"
        case "greater_than":
            return f"must be above {context['gt']:g}, found {shown(given)}"
        case "greater_than_equal":
            return f"must be at least {context['ge']:g}, found {shown(given)}"
        case "less_than_equal":
            return f"must be at most {context['le']:g}, found {shown(given)}"
        case "literal_error":
            return f"expected {context['expected']}, found {shown(given)}"
        case "union_tag_invalid":
            return f"kind: expected {' or '.join(str(context['expected_tags']).split(', '))}, found {shown(context['tag'])}"
        case "union_tag_not_found":
            return f"expected keys and values with a `kind`, found {shown(given)}"
        case "string_pattern_mismatch":
            return f"{NAME_RULE}; found {shown(given)}{_length(given)}"
        case "too_short" | "too_long":
            bound = f"at least {context['min_length']}" if kind == "too_short" else f"at most {context['max_length']}"
            return f"expected {bound} items, found {context['actual_length']}"
        case "value_error":
            return message.removeprefix("Value error, ")
    return f"expected {_EXPECTED[kind]}, found {shown(given)}" if kind in _EXPECTED else f"{message}, found {shown(given)}"
