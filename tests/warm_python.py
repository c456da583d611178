"""Python that has imported the trainer, forked for each program: a real process, without the 3 CPU-seconds that its imports take.

    python tests/warm_python.py < requests > answers

A request is a line of JSON. {"argv", "env", "folder", "out"} starts `python *argv` with that environment, in that folder, with its words in
that file, and is answered by {"pid"}. {"wait": pid} is answered by {"code", "cpu_s"} once the process has ended; the code is what
`subprocess` would say.
"""

from __future__ import annotations

import importlib
import json
import os
import runpy
import sys
import traceback
from typing import Any

WARM = (
    "torch", "torch.distributed", "torch.distributed.fsdp", "torch.optim", "safetensors.torch", "numpy", "PIL.Image", "yaml", "pydantic",
    "torch._dynamo", "sklearn.linear_model", "sklearn.datasets", "opensora.train", "opensora.distributed.ddp", "opensora.distributed.fsdp",
)  # fmt: skip
MAIN = "opensora.train"
"""Runs as `__main__` in whoever is forked, so that it must not have been imported under its name."""


def start(request: dict[str, Any]) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 70
    try:
        code = run(request)
    finally:
        os._exit(code)


def run(request: dict[str, Any]) -> int:
    """In the child: what `python *argv` does. Its exit code."""
    os.setsid()
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["env"])
    for number, path, flags in ((0, os.devnull, os.O_RDONLY), (1, request["out"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)):
        file = os.open(path, flags, 0o600)
        os.dup2(file, number)
        os.close(file)
    os.dup2(1, 2)
    first, *rest = request["argv"]
    try:
        if first == "-m":
            sys.argv = rest
            runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
        elif first == "-c":
            sys.argv = ["-c", *rest[1:]]
            exec(compile(rest[0], "<string>", "exec"), {"__name__": "__main__"})  # noqa: S102 # it is what -c does
        else:
            sys.argv = [first, *rest]
            sys.path.insert(0, os.path.dirname(first))  # noqa: PTH120
            runpy.run_path(first, run_name="__main__")
    except SystemExit as left:
        code = left.code
        if isinstance(code, str):
            print(code, file=sys.stderr)
        return code if isinstance(code, int) else int(code is not None)
    except BaseException:  # noqa: BLE001 # as Python itself ends
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    return 0


def end_of(pid: int) -> dict[str, Any]:
    _, status, used = os.wait4(pid, 0)
    return {"code": os.waitstatus_to_exitcode(status), "cpu_s": used.ru_utime + used.ru_stime}


def serve() -> None:
    for name in WARM:
        importlib.import_module(name)
    package, _, name = MAIN.rpartition(".")
    del sys.modules[MAIN]
    delattr(sys.modules[package], name)
    for line in sys.stdin:
        request = json.loads(line)
        answer = end_of(request["wait"]) if "wait" in request else {"pid": start(request)}
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    serve()
