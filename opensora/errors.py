"""The trainer's one error: something a person or a machine can act on, named by its class."""

from __future__ import annotations

from typing import Literal

Kind = Literal["config", "parent", "nan", "oom", "disk", "code"]


class TrainerError(Exception):
    """An end of training with a reason. `kind` is the `class` of result.json."""

    def __init__(self, message: str, kind: Kind) -> None:
        super().__init__(message)
        self.kind: Kind = kind
