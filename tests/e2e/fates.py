"""Witnesses of the port for effects (`orchestrator.effects`) in real processes: what befalls a launcher or an agent at a chosen effect.

A fate is `WHAT:WHEN`. WHAT is a number, a kind (`process.start`), or a name that the process gives by `named`; WHEN is `before` or `after`,
where the process kills itself by SIGKILL, or `lost`, where the effect is done and its caller gets Unreachable, once. What is tested has no
code for this: a launcher is started by tests/e2e/launch.py, an agent by a `sitecustomize` that `for_agents` writes.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

from orchestrator.effects import Effect
from orchestrator.errors import Unreachable

_now = threading.local()


@contextlib.contextmanager
def named(name: str) -> Iterator[None]:
    """Effects of this thread within bear this name."""
    _now.name = name
    try:
        yield
    finally:
        _now.name = ""


class Fate:
    """Writes each effect that is done into `log`, as `NAME SUBJECT`, and what befell the process at last."""

    def __init__(self, fate: str, log: Path) -> None:
        self._what, _, self._when = fate.partition(":")
        self._log = log

    def before(self, effect: Effect) -> None:
        if self._when == "before" and self._is_mine(effect):
            self._die(effect)

    def after(self, effect: Effect, answer: object) -> None:
        self._write(f"{name_of(effect)} {effect.subject}")
        if self._when == "after" and self._is_mine(effect):
            self._die(effect)
        if self._when == "lost" and self._is_mine(effect):
            self._what = ""
            self._write(f"lost {name_of(effect)}")
            raise Unreachable("the answer was lost")

    def _is_mine(self, effect: Effect) -> bool:
        return self._what in (name_of(effect), str(effect.number))

    def _die(self, effect: Effect) -> None:
        self._write(f"died {self._when} {name_of(effect)}")
        os.kill(os.getpid(), signal.SIGKILL)

    def _write(self, line: str) -> None:
        with self._log.open("a") as log:
            log.write(f"{line}\n")


def name_of(effect: Effect) -> str:
    return getattr(_now, "name", "") or effect.kind


AGENT = """
import sys
if "orchestrator.agent" in sys.orig_argv:
    import os
    from pathlib import Path
    sys.path.insert(0, {here!r})
    from fates import Fate
    sys.path.pop(0)
    from orchestrator import effects
    fate = {fate!r} if any("/stages/stage1@" in word and "/attempts/1/" in word for word in sys.orig_argv) else ""
    watch = effects.watched_by(Fate(fate, Path({logs!r}) / f"agent-{{os.getpid()}}.log"))  # kept: it ends with its last reference
    watch.__enter__()
"""


def for_agents(fate: str, folder: Path) -> dict[str, str]:
    """Variables for a launcher whose agents meet this fate in the first attempt of `stage1`. Logs are `folder`/agent-<pid>.log."""
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(AGENT.format(here=str(Path(__file__).parent), fate=fate, logs=str(folder)))
    return os.environ | {"PYTHONPATH": f"{folder}:{Path(__file__).parents[2]}"}
