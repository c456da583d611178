"""A preparation in a process of its own, on this machine: what `orchestrator.api` starts where `osctl prepare run` works by itself.

    python -m orchestrator.pipelines.preparing_process

A launcher becomes the parent of whatever its steps leave behind, and ends it: in a notebook that could be somebody else's process.

The first line of stdin is one JSON object: the resolved prepare.yaml, the store, `retry`, `replace`. stdin then stays open: its end, where
the caller was interrupted or has died, asks to save and stop. stdout is one JSON object a line: `{"say": …}`, and at the end
`{"exit_code": …, "reason": …}` or `{"exit_code": 0, "prepared": {…}}`. stderr is the caller's: only a fault of osctl writes there.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from orchestrator import modules
from orchestrator.errors import OsctlError, RunFailed
from orchestrator.pipelines.driver_process import BY_CODE, parsed, speaker

if TYPE_CHECKING:
    from opensora.dataset.prepare_config import PrepareConfig
    from orchestrator.pipelines.host import Host
    from orchestrator.prepare.run import Preparation

STOPPED = 130


@dataclass(frozen=True)
class DataSet:
    """Raw videos that became a data set of a store."""

    name: str
    """What `osctl data` and `osctl launch --data` call it."""
    place: str
    """Folder or address, for `Pipeline.load(data=…)`; it never changes. `manifest.parquet` (a row a clip) and `clips/` are in it."""
    digest: str
    """Over clips, captions and measures: equal, wherever the same was prepared."""
    clips: int
    seconds: float
    """Of video."""
    bytes: int
    licences: tuple[str, ...]
    steps: list[dict[str, Any]]
    """A row a step: `name`, `in`, `kept`, `dropped`, `quarantined` (rows), and `why`, a list of `reason: rows`."""
    usd: float
    """Of this call, of what is priced."""
    attempt: int | None
    """None: there was nothing to do."""


def prepare(config: PrepareConfig, store: str, host: Host, *, retry: bool, replace: bool, say: Callable[[str], None]) -> DataSet:
    """Prepare in a process of its own, and wait for it. An interrupt has it save and stop; once it has, the interrupt goes on.

    Raises UsageError, RunFailed, Refused, Unreachable; OsctlError where it died.
    """
    process = subprocess.Popen(
        modules.command("orchestrator.pipelines.preparing_process"),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=host.for_children(),
        start_new_session=True,  # a Ctrl-C in the terminal is the caller's
        text=True,
    )
    assert process.stdin is not None and process.stdout is not None
    said: dict[str, Any] = {}
    try:
        with contextlib.suppress(BrokenPipeError):  # one that died says so by its end
            request = {"config": config.model_dump(mode="json"), "store": store, "retry": retry, "replace": replace}
            process.stdin.write(json.dumps(request) + "\n")
            process.stdin.flush()
        for line in process.stdout:
            word = parsed(line)
            if "say" in word:
                say(str(word["say"]))
            said |= word
    finally:
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()
        process.stdout.close()
        process.wait()
    if "prepared" in said:
        found: dict[str, Any] = said["prepared"]
        return DataSet(**found | {"licences": tuple(found["licences"])})
    code = int(said.get("exit_code", OsctlError.exit_code))
    kind = RunFailed if code == STOPPED else BY_CODE.get(code, OsctlError)
    raise kind(str(said.get("reason") or f"data set {config.name}: its process ended with {process.returncode} and no word"))


def main() -> int:
    """Prepare what the first line of stdin asks for; the exit code."""
    request = json.loads(sys.stdin.readline())
    say = speaker(sys.stdout)
    try:
        found = work(request, lambda text: say({"say": text}))
    except OsctlError as error:
        end: dict[str, Any] = {"exit_code": error.exit_code, "reason": str(error)}
    except KeyboardInterrupt:
        end = {"exit_code": STOPPED, "reason": "interrupted before it began"}
    else:
        stopped = f"data set {request['config']['name']}: was asked to stop; what is done is kept. To go on, ask for the same again"
        end = {"exit_code": STOPPED, "reason": stopped} if found is None else {"exit_code": 0, "prepared": asdict(found)}
    say(end)
    return int(end["exit_code"])


def work(request: Mapping[str, Any], say: Callable[[str], None]) -> DataSet | None:
    """Prepare in this process, until stdin ends. None: it was asked to stop. Raises as `Preparation.run`."""
    from dataclasses import replace

    from opensora.dataset.prepare_config import PrepareConfig
    from orchestrator.pipelines import preparing
    from orchestrator.pipelines.host import Host
    from orchestrator.pipelines.signals import save_on_signals
    from orchestrator.prepare.run import Preparation
    from orchestrator.stores import open_store

    host, config = Host.here(), PrepareConfig.model_validate(request["config"])
    store = open_store(request["store"], host.env)
    preparing.check(config, store, host)
    store.probe()
    asked = replace(preparing.asked_for(config, store, host), retry=request["retry"], replace=request["replace"])
    preparation = Preparation(asked, say=say)
    threading.Thread(target=_drain_with_stdin, args=(preparation,), name="waits for the caller", daemon=True).start()
    with save_on_signals(preparation, say):
        prepared = preparation.run()
    if prepared.published is None:
        return None
    about = prepared.published.description
    return DataSet(
        prepared.name, prepared.published.place, about.digest, about.clips, about.seconds, about.bytes, about.licences,
        [_step(name, counts) for name, counts in about.steps.items()], float(prepared.usd), prepared.attempt,
    )  # fmt: skip


def _drain_with_stdin(preparation: Preparation) -> None:
    while os.read(sys.stdin.fileno(), 4096):  # not `sys.stdin.read`: at its end the interpreter would want the lock that this thread holds
        pass
    preparation.drain()


def _step(name: str, counts: Mapping[str, Any]) -> dict[str, Any]:
    left = {kind: dict(counts.get(kind, {})) for kind in ("dropped", "quarantined")}
    why = [f"{reason}: {count}" for reasons in left.values() for reason, count in reasons.items()]
    return {"name": name, "in": counts["in"], "kept": counts["kept"], **{kind: sum(one.values()) for kind, one in left.items()}, "why": why}


if __name__ == "__main__":
    sys.exit(main())
