"""A launcher that meets a chosen fate at a chosen effect: `python tests/e2e/launch.py ROOT [--die WHAT:WHEN] [--ttl SECONDS]`.

Runs the real `Runner` on ROOT/store with the real local backend, the pipeline from ROOT/pipeline.json. Prints the result as JSON and
leaves with its exit code. `--die outcome:before` kills this very process by SIGKILL before its first write of an outcome,
`--die 7:after` after its seventh effect of any kind, `--die 7:lost` loses the answer of that one (tests/e2e/fates.py).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, cast

from fates import Fate, named

from orchestrator.driver.runner import LEASE_TTL_S, Runner
from orchestrator.effects import Effect, watched_by
from orchestrator.errors import OsctlError
from orchestrator.ledger.store import Ledger
from orchestrator.local.backend import LocalBackend
from orchestrator.ports import Store
from orchestrator.recipe.pipeline import Pipeline
from orchestrator.stores.folder import FolderStore


class Launcher(Fate):
    """Tells the watcher (`agents.log`) of each agent that is started, before anything can befall the launcher."""

    def __init__(self, fate: str, root: Path):
        super().__init__(fate, root / "effects.log")
        self._agents = root / "agents.log"

    def after(self, effect: Effect, answer: object) -> None:
        if isinstance(answer, subprocess.Popen):
            with self._agents.open("a") as log:
                log.write(f"{effect.subject.replace('/', '_')} {answer.pid}\n")
        super().after(effect, answer)


class Named:
    """A store whose writes are named by what is written."""

    def __init__(self, inner: Any):
        self.inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def create(self, key: str, data: bytes) -> Any:
        with named(kind_of(key, data)):
            return self.inner.create(key, data)

    def replace(self, key: str, data: bytes, etag: str) -> Any:
        with named(turn_of(data)):
            return self.inner.replace(key, data, etag)


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
    ledger = Ledger(cast(Store, Named(store)), pipeline.name)
    backend = LocalBackend(store.url, options.home or root, options=options.agent.split())
    runner = Runner(pipeline, ledger, backend, lease_ttl_s=options.ttl)
    signal.signal(signal.SIGINT, lambda *_: runner.drain())
    signal.signal(signal.SIGTERM, lambda *_: runner.kill())
    try:
        with watched_by(Launcher(options.die, root)):
            result = runner.run(options.targets or None)
    except OsctlError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(json.dumps(dataclasses.asdict(result)))
    return result.exit_code


if __name__ == "__main__":
    sys.exit(main())
