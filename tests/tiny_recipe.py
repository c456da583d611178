"""A recipe of three real stages that trains in seconds, and a way to call `osctl` on it as a user does."""

from __future__ import annotations

import atexit
import functools
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import gang
import yaml

OSCTL = str(Path(sys.executable).with_name("osctl"))
STAGES = ("stage1", "stage2", "stage3")
FORKED = [sys.executable, str(Path(__file__).with_name("forked_torchrun.py")), "{run_dir}", "{devices}"]
"""`trainer=FORKED`: the ranks are forked from the elastic agent, so that an attempt imports torch once and not once a rank and once more.
Whatever is not about the start of a trainer is tested with it, or with `warm_trainer()` where nothing is killed either."""


@functools.cache
def warm_trainer() -> list[str]:
    """`trainer=warm_trainer()`: elastic agent and ranks are forked from one process that imports torch once for all tests of this one."""
    program = Path(__file__).with_name("warm_torchrun.py")
    folder = tempfile.TemporaryDirectory(prefix="warm-")
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(f"{folder.name}/socket")
    listener.listen(64)
    with listener:
        server = subprocess.Popen(
            [sys.executable, program, "serve", str(listener.fileno())],
            env=os.environ | {"OMP_NUM_THREADS": "1"}, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True,
            pass_fds=(listener.fileno(),), preexec_fn=gang.die_with_parent,
        )  # fmt: skip
    assert server.stdout is not None
    assert server.stdout.readline() == "ready\n", "on a busy machine its imports take longer than an attempt may be silent"

    def close() -> None:
        server.kill()
        server.communicate()
        folder.cleanup()

    atexit.register(close)
    return [sys.executable, "-S", str(program), f"{folder.name}/socket", "{run_dir}", "{devices}"]


def stage(number: int, **changes: Any) -> dict[str, Any]:
    """One stage file: images, then clips, then fewer and longer clips. `changes` replace whole keys."""
    frames = {1: 1, 2: 4, 3: 6}[number]
    content: dict[str, Any] = {
        "model": {"depth": 2, "width": 32, "heads": 2, "latent_channels": 8, "caption_width": 16, "caption_tokens": 8},
        "objective": {"kind": "flow"},
        "data": {"source": {"kind": "digits", "clips": 48}, "frames": frames, "height": 16, "width": 16},
        "autoencoder": {"kind": "patch", "factor": 4},
        "text": {"kind": "words"},
        "optimizer": {"lr": 1e-3},
        "steps": 8,
        "batch_size": 4,
        "freeze": "temporal" if number == 1 else "none",
        "dtype": "fp32",
        "checkpoint": {"every_steps": 4},
        "sampling": {"steps": 2, "method": "euler", "guidance": 2.0},
        "prompts": ["a digit 3 moving left"],
    }  # fmt: skip
    return content | changes


def write(
    folder: Path,
    *,
    devices: int = 2,
    stages: int = 3,
    changes: Mapping[str, Any] | None = None,
    spec: Mapping[str, Any] | None = None,
    **pipeline: Any,
) -> Path:
    """Write osctl.yaml and its stage files; the folder. `spec`: what osctl.yaml says of each stage besides."""
    folder.mkdir(parents=True, exist_ok=True)
    specs = []
    for number in range(1, stages + 1):
        (folder / f"stage{number}.yaml").write_text(yaml.safe_dump(stage(number, **(changes or {}))))
        stated: dict[str, Any] = {"name": f"stage{number}", "config": f"stage{number}.yaml", "resources": {"devices_per_node": devices}}
        specs.append(stated | ({"parent": f"stage{number - 1}"} if number > 1 else {}) | dict(spec or {}))
    content = {"name": "tiny", "flush_s": 0.5, "tracking": "none", **pipeline, "stages": specs}
    (folder / "osctl.yaml").write_text(yaml.safe_dump(content))
    return folder


class _Warm:
    """A process that has imported osctl, from which commands are forked: one at a time."""

    idle: ClassVar[list[_Warm]] = []

    def __init__(self) -> None:
        program = Path(__file__).with_name("warm_osctl.py")
        self._process = subprocess.Popen(
            [sys.executable, program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, preexec_fn=gang.die_with_parent
        )
        atexit.register(self.close)

    @classmethod
    @contextmanager
    def one(cls) -> Iterator[_Warm]:
        warm = cls.idle.pop() if cls.idle else cls()
        try:
            yield warm
        except BaseException:
            warm.close()  # its answer may still be under way
            raise
        cls.idle.append(warm)

    def run(self, words: Sequence[str], folder: Path, env: Mapping[str, str], limit_s: float) -> subprocess.CompletedProcess[str]:
        with tempfile.TemporaryDirectory() as place:
            out, err = Path(place, "out"), Path(place, "err")
            asked = {"words": words, "folder": str(folder), "env": env, "out": str(out), "err": str(err), "limit_s": limit_s}
            assert self._process.stdin is not None and self._process.stdout is not None
            self._process.stdin.write(json.dumps(asked) + "\n")
            self._process.stdin.flush()
            answer = json.loads(self._process.stdout.readline())
            gang.used.append(answer["cpu_s"])
            if answer["code"] is None:
                raise AssertionError(f"osctl {' '.join(words)}: not ended after {limit_s:g} s\n{out.read_text()}\n{err.read_text()}")
            return subprocess.CompletedProcess(["osctl", *words], answer["code"], out.read_text(), err.read_text())

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()


@dataclass(frozen=True)
class Osctl:
    """`osctl` in a folder."""

    folder: Path
    env: Mapping[str, str] | None = None
    warm: bool = True
    """Commands are forked from a process that has imported osctl. False: each starts as a person's does, with half a CPU-second more."""

    def __call__(self, *arguments: str, expect: int = 0, timeout: float = 240) -> subprocess.CompletedProcess[str]:
        if self.warm:
            with _Warm.one() as warm:
                done = warm.run(arguments, self.folder, self.environment(), timeout)
        else:
            done = subprocess.run(
                [OSCTL, *arguments],
                cwd=self.folder,
                env=self.environment(),
                capture_output=True,
                text=True,
                timeout=timeout,
                stdin=subprocess.DEVNULL,
            )
        assert "Traceback" not in done.stderr, done.stderr
        assert done.returncode == expect, (
            f"osctl {' '.join(arguments)}: exit {done.returncode}, expected {expect}\n{done.stdout}\n{done.stderr}"
        )
        return done

    def start(self, *arguments: str) -> subprocess.Popen[bytes]:
        log = (self.folder / "launch.log").open("ab")
        with log:
            return subprocess.Popen(
                [OSCTL, *arguments],
                cwd=self.folder,
                env=self.environment(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                preexec_fn=_hears_its_terminal_close,
            )

    def json(self, *arguments: str) -> Any:
        return json.loads(self(*arguments, "-o", "json").stdout)

    def digests(self) -> dict[str, str]:
        """Weight digest of every committed stage."""
        return {line["name"]: line["weights_digest"] for line in self.json("compare") if line["weights_digest"]}

    def environment(self) -> dict[str, str]:
        return {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200", **(self.env or {})}


def _hears_its_terminal_close() -> None:
    """osctl leaves SIGHUP as it finds it, and tests that run under nohup pass an ignored one on."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
