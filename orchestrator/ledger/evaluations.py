"""What is asked of a stage's result, and whether its attempt has answered it already. Pure.

Owns the name of a question: a digest over what is evaluated and how. Seeds of the noise follow from the stage's own seed, which is part of
its identity, so that they are in the stage's place in the store.
"""

from __future__ import annotations

import json
from typing import Any

from opensora.config import StageConfig
from orchestrator.ledger.record import sha256
from orchestrator.ledger.records import Committed, Evaluation, Intent

VERSION = 1
"""Raised whenever the same fields would ask otherwise."""


def asked(config: StageConfig) -> dict[str, Any] | None:
    """The fields of a configuration that say what is evaluated and drawn. None: nothing is."""
    if config.evaluate is None and not config.prompts:
        return None
    content = config.model_dump(mode="json")
    return {name: content[name] for name in ("evaluate", "sampling", "prompts")}


def digest_of(config: StageConfig) -> str | None:
    """The name of what a configuration asks. None: it asks nothing."""
    content = asked(config)
    if content is None:
        return None
    return sha256(json.dumps({"version": VERSION, **content}, sort_keys=True, separators=(",", ":")).encode())[:12]


def answered_by_attempt(committed: Committed, intent: Intent | None, digest: str) -> bool:
    """Whether the attempt itself was asked the same and its result has the answer, as releases up to 0.2.0 and trainers of others do."""
    if intent is None or intent.config.judging != "gang" or digest_of(intent.config) != digest:
        return False
    return bool(committed.evaluation) or intent.config.evaluate is None


def readings(committed: Committed | None, found: tuple[Evaluation, ...] | list[Evaluation]) -> dict[str, float]:
    """What is shown of a stage: its newest evaluation, else what its attempt has read itself."""
    if found:
        return dict(found[-1].readings)
    return dict(committed.evaluation) if committed is not None else {}
