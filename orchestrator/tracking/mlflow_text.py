"""Make names and texts that MLflow accepts. Pure."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote

from opensora.config import StageConfig
from opensora.printable import printable

VALUE_CHARACTERS = 500
"""The longest parameter or tag, in characters; longer ones are cut. This is MLflow's own limit on every database."""
NO_ARTIFACT = re.compile(r"""["#$%&'*+:;<=>?@\\^`{|}~,]""")
"""Characters that an artifact's name may not have."""


def metric_name(name: str) -> str:
    """The name, with `_` for every character that MLflow does not accept in a metric's name."""
    return re.sub(r"[^\w\-. /:]", "_", name)


def flatten(config: StageConfig | Mapping[str, Any]) -> dict[str, str]:
    """Every field of a stage, or of a preparation, as a parameter of MLflow (`model.depth: 4`), cut at VALUE_CHARACTERS."""
    flat: dict[str, str] = {}

    def walk(prefix: str, value: Any) -> None:
        if isinstance(value, dict):
            for name, part in value.items():
                walk(f"{prefix}.{name}" if prefix else name, part)
        else:
            flat[prefix] = cut(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))

    walk("", config.model_dump(mode="json") if isinstance(config, StageConfig) else dict(config))
    return flat


def cut(text: str) -> str:
    """The text cut at VALUE_CHARACTERS, with an ellipsis at the end. NUL is removed, since PostgreSQL cannot store it."""
    plain = printable(text)
    return plain if len(plain) <= VALUE_CHARACTERS else f"{plain[: VALUE_CHARACTERS - 1]}…"


def source_uri(store: str, key: str) -> str:
    """Where a checkpoint lies, for people and for `osctl`. `store` is a URL, `key` that of the checkpoint's folder.

    If the store is a folder, the address has the scheme `osctl` and the folder as its query: an MLflow server refuses a source that is a
    local path outside of its own artifacts, or a path that is a symbolic link on its own disk.
    """
    base = store.rstrip("/")
    if "://" in base and not base.startswith("file:"):
        return f"{base}/{key}"
    return f"osctl://folder/{key}?store={quote(base.removeprefix('file://'))}"


def alias_of(stage: str) -> str:
    """A stage's name as an alias that MLflow accepts: without dots, and neither `latest` nor like `v1`."""
    alias = stage.replace(".", "-")
    return f"stage-{alias}" if alias == "latest" or re.fullmatch(r"v\d+", alias) else alias


def artifact_name(name: str) -> str:
    """A sample's name as an artifact's name that MLflow accepts. This release names samples that way; an earlier one, or another trainer,
    may have used characters with a meaning in URLs or for MLflow."""
    return NO_ARTIFACT.sub("-", printable(name))
