"""`osctl`, imported once and forked for each command line: a real process with real streams for each, without the start of Python.

    python tests/warm_osctl.py < requests > answers

A request is a line of JSON {words, folder, env, out, err, limit_s}, an answer {code, cpu_s}; the code of a command that ran longer is null,
and all that it started is ended.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from processes import has_spoken, what_stands

WARM = (
    "orchestrator.cli.commands", "orchestrator.recipe.resolve", "orchestrator.driver.runner", "orchestrator.accounting.status",
    "orchestrator.stores.folder", "orchestrator.recipe.explain", "orchestrator.accounting.plan", "orchestrator.inputs.contents",
    "orchestrator.inputs.data_files", "orchestrator.kube.jobs", "orchestrator.kube.diff", "orchestrator.kube.yaml_text",
    "orchestrator.cli.display", "orchestrator.pipelines.cluster_driver", "rich.console", "rich.table",
)  # fmt: skip


def run(request: dict[str, Any]) -> None:
    os.setsid()
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: a test run that is killed leaves no command behind
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["env"])
    tempfile.tempdir = None  # asked for anew: TMPDIR may be another
    time.tzset()
    for number, path in ((0, os.devnull), (1, request["out"]), (2, request["err"])):
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, number)
        os.close(file)
    sys.argv = ["osctl", *request["words"]]
    from orchestrator.cli import main

    main()


def wait(pid: int, limit_s: float, request: dict[str, Any]) -> dict[str, Any]:
    end = os.pidfd_open(pid)
    in_time = has_spoken(end, limit_s)
    os.close(end)
    if not in_time:
        with Path(request["err"]).open("a") as err:
            err.write(what_stands(pid, Path(request["folder"])))
        os.killpg(pid, signal.SIGKILL)
    _, status, used = os.wait4(pid, 0)
    return {"code": os.waitstatus_to_exitcode(status) if in_time else None, "cpu_s": used.ru_utime + used.ru_stime}


def serve() -> None:
    for name in WARM:
        importlib.import_module(name)
    for line in sys.stdin:
        request = json.loads(line)
        pid = os.fork()
        if not pid:
            run(request)
        sys.stdout.write(json.dumps(wait(pid, request["limit_s"], request)) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    serve()
