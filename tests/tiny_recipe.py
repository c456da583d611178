"""A recipe of three real stages that trains in seconds, and a way to call `osctl` on it as a user does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

OSCTL = str(Path(sys.executable).with_name("osctl"))
STAGES = ("stage1", "stage2", "stage3")


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


@dataclass(frozen=True)
class Osctl:
    """`osctl` in a folder."""

    folder: Path
    env: Mapping[str, str] | None = None

    def __call__(self, *arguments: str, expect: int = 0, timeout: float = 240) -> subprocess.CompletedProcess[str]:
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
            )

    def json(self, *arguments: str) -> Any:
        return json.loads(self(*arguments, "-o", "json").stdout)

    def digests(self) -> dict[str, str]:
        """Weight digest of every committed stage."""
        return {line["name"]: line["weights_digest"] for line in self.json("compare") if line["weights_digest"]}

    def environment(self) -> dict[str, str]:
        return {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200", **(self.env or {})}
