"""A stage's identity: which fields of a configuration change the numbers of its result, and the digest over these fields.

Owns the one list that says of every field whether it is identity (another value gives another result) or execution (it changes how a
result is computed, shown or judged: with another value a stage resumes, samples or evaluates again). Trainer, ledger, plan and
`osctl diff` use it. Owns also which fields must fit a parent, since weights are carried over. Pure, and free of torch.

The digest counts a field only where it differs from its default, so that a field that a later release adds changes no earlier digest.
Content outside of the configuration (clips, imported weights, encoders) is counted by the digests in `Contents`; its path is then not
counted. The batch is counted as a whole, since the numbers depend on it: the clips of all devices and of all accumulated parts of a step.

There are two lists and a test (`test_every_field_is_in_one_list`) instead of a mark on each field, because the division is one decision
about the whole recipe and should be read as one.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin

from opensora.config import Frozen, StageConfig

VERSION = 2
"""Version of the digest. Version 1, of the releases up to 0.1.0, was over all fields and the number of devices, and over no content."""

IDENTITY = (
    "model", "objective",
    "data.source", "data.frames", "data.frame_interval", "data.fps", "data.height", "data.width", "data.buckets", "data.horizontal_flip",
    "autoencoder.kind", "autoencoder.path", "autoencoder.factor", "autoencoder.scale", "autoencoder.posterior", "autoencoder.dtype",
    "text", "optimizer", "ema_decay", "steps", "batch_size", "freeze", "masks", "routing", "dtype", "seed", "parent", "weights",
)  # fmt: skip
"""Fields of `StageConfig`, or prefixes of their paths, that change a stage's numbers."""

EXECUTION = (
    "autoencoder.micro_batch", "activations", "parallel", "accumulate", "compile", "loss_spike", "checkpoint", "sampling", "prompts",
    "evaluate", "judging", "data.max_left_out",
)  # fmt: skip
"""Fields that do not change a stage's numbers: how it is computed, saved, sampled and judged."""

FITS_PARENT = (
    "model.depth", "model.width", "model.heads", "model.mlp_ratio", "model.patch", "model.latent_channels", "model.caption_width",
    "model.caption_tokens", "model.temporal_position", "objective.kind",
    "autoencoder.kind", "autoencoder.factor", "autoencoder.path", "autoencoder.scale", "text.kind", "text.path",
)  # fmt: skip
"""Fields that the meaning of carried weights depends on: a stage and its parent must agree in these. Position tables are made anew, and a
stage may choose the other fields (scales of positions, caption dropout, how an encoder computes)."""

_BATCHES = ("batch_size", "data.buckets")
_CONTENT = {"data": "data.source", "weights": "weights", "autoencoder": "autoencoder.path", "text": "text.path"}
"""For each kind of content, the fields that say where it lies. They are not counted if the content's digest is known."""


class Contents(Frozen):
    """Digests of content that a stage is made of and that its configuration only names. None means not recorded: then the name counts."""

    data: str | None = None
    """Digest of the data set's manifest: which clips, with which captions."""
    weights: str | None = None
    """Digest of imported weights."""
    autoencoder: str | None = None
    """Digest of the autoencoder's files."""
    text: str | None = None
    """Digest of the text encoder's files."""


@dataclass(frozen=True)
class Difference:
    """A field in which two configurations differ."""

    path: str
    """`optimizer.lr`, `global batch`, `data` …"""
    old: Any
    new: Any
    kind: Literal["identity", "execution"]


def is_identity(path: str) -> bool:
    """Whether a field of `StageConfig`, named by its path, is identity. Raises KeyError for a field that is in neither list."""
    for kind, names in ((True, IDENTITY), (False, EXECUTION)):
        if any(path == name or path.startswith(f"{name}.") for name in names):
            return kind
    raise KeyError(path)


def global_batches(stage: StageConfig, devices: int) -> tuple[int, ...]:
    """Clips of one optimizer step over all devices, for each of the stage's sizes (`StageConfig.buckets`).

    Args:
        devices: number of ranks of the whole job.
    """
    readers = devices // stage.parallel.ranks_per_clip
    return tuple(bucket.batch_size * readers * stage.accumulate for bucket in stage.buckets)


def identity(stage: StageConfig, devices: int, contents: Contents | None = None) -> dict[str, Any]:
    """Everything except the parent that a stage's numbers depend on, as flat JSON: `{"optimizer.lr": 0.001, "global batch": [64], …}`.

    Fields at their defaults are left out. If two stages differ in any of these, their results are different results.
    """
    contents = contents or Contents()
    found = dict(contents.model_dump(exclude_none=True))
    named = [place for kind, place in _CONTENT.items() if getattr(contents, kind) is not None]
    for path, value in _stated(stage, ""):
        of_known_content = any(path == place or path.startswith(f"{place}.") for place in named)
        if is_identity(path) and not of_known_content and path not in _BATCHES:
            found[path] = value
    if stage.data.buckets:
        found["data.buckets"] = [[bucket.frames, bucket.height, bucket.width] for bucket in stage.data.buckets]
    return found | {"global batch": list(global_batches(stage, devices))}


def digest(of: Mapping[str, Any], parent: str | None) -> str:
    """12 hex digits that name a result, over its `identity` and the digest of the parent's COMMITTED.json."""
    content = {"version": VERSION, "stage": dict(of), "parent": parent}
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()[:12]


def name(stage: StageConfig, devices: int, parent: str | None, contents: Contents | None = None) -> str:
    """The `<inputs>` of a stage: the `digest` of its `identity`."""
    return digest(identity(stage, devices, contents), parent)


def changes(old: Mapping[str, Any], new: Mapping[str, Any], defaults: Mapping[str, Any]) -> list[Difference]:
    """The fields in which two `identity` values differ, in the order of the new one. `defaults` are those of `flat_defaults`."""
    paths = [*new, *(path for path in old if path not in new)]
    pairs = [(path, old.get(path, defaults.get(path)), new.get(path, defaults.get(path))) for path in paths]
    return [Difference(path, was, now, "identity") for path, was, now in pairs if was != now]


def differences(old: StageConfig, new: StageConfig, old_devices: int, new_devices: int) -> list[Difference]:
    """Fields in which two configurations differ, identity first. Batch sizes are identity if the global batch differs, else execution."""
    defaults = flat_defaults()
    identical = changes(identity(old, old_devices), identity(new, new_devices), defaults)
    before, after = flat(old), flat(new)
    another_batch = any(one.path == "global batch" for one in identical)
    others: list[Difference] = []
    for path in [*after, *(path for path in before if path not in after)]:
        was, now = before.get(path, defaults.get(path)), after.get(path, defaults.get(path))
        if was != now and (not is_identity(path) or path in _BATCHES):
            others.append(Difference(path, was, now, "identity" if path in _BATCHES and another_batch else "execution"))
    return sorted(identical + others, key=lambda one: one.kind != "identity")


def misfits(stage: StageConfig, parent: StageConfig) -> Iterator[Difference]:
    """The fields of FITS_PARENT in which a stage and its parent differ, so that the parent's weights do not fit."""
    for path in FITS_PARENT:
        own, inherited = field(stage, path), field(parent, path)
        if own != inherited:
            yield Difference(path, inherited, own, "identity")


def field(stage: Frozen, path: str) -> Any:
    """The value of a field by its path, as JSON. None means that this kind of encoder or source has no such field."""
    value: Any = stage
    for name in path.split("."):
        value = getattr(value, name, None)
    return list(value) if isinstance(value, tuple) else value


def flat(stage: StageConfig) -> dict[str, Any]:
    """`{"optimizer.lr": 0.001, …}`: every field as JSON. Lists are leaves."""
    found: dict[str, Any] = {}

    def walk(prefix: str, value: Any) -> None:
        if isinstance(value, dict):
            for name, part in value.items():
                walk(f"{prefix}.{name}" if prefix else name, part)
        else:
            found[prefix] = value

    walk("", stage.model_dump(mode="json"))
    return found


def flat_defaults() -> dict[str, Any]:
    """The default of each field that has one, by path, as JSON. For a union (kinds of encoders) the fields of all members are included."""
    return dict(_defaults(StageConfig, ""))


def _defaults(kind: type[Frozen], prefix: str) -> Iterator[tuple[str, Any]]:
    for name, info in kind.model_fields.items():
        path = f"{prefix}{name}"
        for member in models_of(info.annotation):
            yield from _defaults(member, f"{path}.")
        if not models_of(info.annotation) and not info.is_required():
            default = info.get_default(call_default_factory=True)
            yield path, list(default) if isinstance(default, tuple) else default


def _stated(part: Frozen, prefix: str) -> Iterator[tuple[str, Any]]:
    """The leaves of a configuration that differ from their defaults, as JSON."""
    dumped = part.model_dump(mode="json")
    for name, info in type(part).model_fields.items():
        value = getattr(part, name)
        if isinstance(value, Frozen):
            yield from _stated(value, f"{prefix}{name}.")
        elif info.is_required() or value != info.get_default(call_default_factory=True):
            yield f"{prefix}{name}", dumped[name]


def models_of(annotation: Any) -> list[type[Frozen]]:
    """The configuration classes among a field's types. A list of configurations (`data.buckets`) is a leaf and gives none."""
    if isinstance(annotation, type) and issubclass(annotation, Frozen):
        return [annotation]
    if get_origin(annotation) is tuple:
        return []
    return [model for part in get_args(annotation) for model in models_of(part)]
