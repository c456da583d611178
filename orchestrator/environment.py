"""Environment variables as a person means them: one that is empty is not set.

`OSCTL_HOME=` in a script is a variable that somebody forgot to fill. Owns which variables are removed where they are empty, at the
start of each of our processes, so that no reader of them, and no child, has to ask; and what `~` stands for. Refuses those in which
emptiness says something (CUDA_VISIBLE_DEVICES).
"""

from __future__ import annotations

import os
from collections.abc import MutableMapping
from pathlib import Path

PREFIXES = ("OSCTL_", "AWS_", "MLFLOW_", "XDG_", "HF_")
NAMES = frozenset({"HOME", "USER", "LOGNAME", "TMPDIR", "TEMP", "TMP", "KUBECONFIG", "TORCH_HOME"})


def unset_empty(env: MutableMapping[str, str]) -> None:
    """Remove the variables that hold nothing, or blanks alone."""
    for name in [name for name, value in env.items() if not value.strip() and (name.startswith(PREFIXES) or name in NAMES)]:
        del env[name]


def at_home(path: str | Path) -> Path:
    """A path whose `~` is the person's home. Where nobody knows that home, it stays as it was typed, and is not found under that name."""
    return Path(os.path.expanduser(path))  # noqa: PTH111 - pathlib raises RuntimeError there
