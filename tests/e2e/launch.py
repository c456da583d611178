"""A launcher that can be made to die at a chosen side effect: `python tests/e2e/launch.py ROOT [--die KIND:WHEN] [--ttl SECONDS]`.

Runs the real `Runner` on ROOT/store with the real local backend, the pipeline from ROOT/pipeline.json. Prints the result as JSON and
leaves with its exit code. `--die outcome:before` kills this very process by SIGKILL before its first write of an outcome,
`--die 7:after` after its seventh effect of any kind. The counting stands outside: what is tested has no code for tests.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

from orchestrator.adapters.folder import FolderStore
from orchestrator.adapters.local import LocalBackend
from orchestrator.config import Pipeline
from orchestrator.errors import OsctlError
from orchestrator.ledger import Ledger
from orchestrator.runner import LEASE_TTL_S, Runner


class Effects:
    """Counts effects, and dies at the chosen one."""

    def __init__(self, die: str, log: Path):
        self.what, _, self.when = die.partition(":")
        self.count = 0
        self.log = log

    def around(self, kind: str, call: Any, *arguments: Any) -> Any:
        self.count += 1
        mine = self.what in (kind, str(self.count))
        if mine and self.when == "before":
            self.end(kind)
        answer = call(*arguments)
        with self.log.open("a") as log:
            log.write(f"{kind}\n")
        if mine:
            self.end(kind)
        return answer

    def end(self, kind: str) -> None:
        with self.log.open("a") as log:
            log.write(f"died {self.when} {kind}\n")
        os.kill(os.getpid(), signal.SIGKILL)


class Watched:
    """A store or backend whose effects are counted."""

    def __init__(self, inner: Any, effects: Effects):
        self.inner, self.effects = inner, effects

    def __getattr__(self, name: str) -> Any:
        call = getattr(self.inner, name)
        if name == "create":
            return lambda key, data: self.effects.around(kind_of(key, data), call, key, data)
        if name == "replace":
            return lambda key, data, etag: self.effects.around(turn_of(data), call, key, data, etag)
        if name == "submit":
            return lambda *arguments: self.effects.around(name, self.submit_and_tell, *arguments)
        if name in ("drain", "kill"):
            return lambda *arguments: self.effects.around(name, call, *arguments)
        return call

    def submit_and_tell(self, intent_key: str, run_key: str) -> None:
        """Tells the watcher whom to watch, before anything can befall the launcher."""
        self.inner.submit(intent_key, run_key)
        child = self.inner._children.get(run_key)
        if child is not None:
            with (self.effects.log.parent / "agents.log").open("a") as log:
                log.write(f"{self.inner.run_dir(run_key).name} {child.process.pid}\n")


def kind_of(key: str, data: bytes) -> str:
    if "/events/" in key:
        return f"event-{json.loads(data)['kind']}"
    if "/revisions/" in key:
        return "revision"
    return key.rpartition("/")[2].removesuffix(".json").lower()


def turn_of(data: bytes) -> str:
    return "release" if json.loads(data)["expires"] == 0 else "lease"


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("root", type=Path)
    parser.add_argument("targets", nargs="*")
    parser.add_argument("--die", default="")
    parser.add_argument("--ttl", type=float, default=LEASE_TTL_S)
    parser.add_argument("--home", type=Path, help="holds the run directories; none: ROOT")
    parser.add_argument("--agent", default="", help="more options of the agent, in one word")
    options = parser.parse_args()
    root: Path = options.root
    pipeline = Pipeline.model_validate_json((root / "pipeline.json").read_bytes())
    store = FolderStore(root / "store")
    effects = Effects(options.die, root / "effects.log")
    ledger = Ledger(Watched(store, effects), pipeline.name)
    backend = Watched(LocalBackend(store.url, options.home or root, options=options.agent.split()), effects)
    runner = Runner(pipeline, ledger, backend, lease_ttl_s=options.ttl)
    signal.signal(signal.SIGINT, lambda *_: runner.drain())
    signal.signal(signal.SIGTERM, lambda *_: runner.kill())
    try:
        result = runner.run(options.targets or None)
    except OsctlError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(json.dumps(dataclasses.asdict(result)))
    return result.exit_code


if __name__ == "__main__":
    sys.exit(main())
