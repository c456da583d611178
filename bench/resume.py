"""How soon a resumed run takes its first optimizer step, counted from when its imports are done; and the whole process, from its start.

A real `opensora.train` process in a run directory that holds a checkpoint, for the demo's second stage and for a model of width 384. Wall
seconds, smallest of the rounds. The first step ends when its line of metrics.jsonl says; the process is killed there. Floor 5 s, goal 1 s.
An attempt in a new run directory has no latent cache and encodes its clips again; that is told apart, without a floor.

    OMP_NUM_THREADS=1 .venv/bin/python bench/resume.py
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import harness
from harness import Measured, Row

from opensora.config import StageConfig, read_stage, write_stage

DEMO = Path(__file__).resolve().parent.parent / "configs" / "demo" / "stage2.yaml"
PROCESS = """
import sys, time
from pathlib import Path
from opensora import train
Path(sys.argv[2]).write_text(str(time.time()))
sys.exit(train.main([sys.argv[1]]))
"""


def stages(quick: bool) -> dict[str, StageConfig]:
    demo = read_stage(DEMO)
    source = demo.data.source
    if quick:
        tiny = demo.model_copy(update={"data": demo.data.model_copy(update={"source": source.model_copy(update={"clips": 64})})})
        return {"tiny": tiny}
    wide = demo.model.model_copy(update={"width": 384, "heads": 6, "depth": 12})
    return {"demo, 1.5M parameters": demo, "width 384, depth 12": demo.model_copy(update={"model": wide, "batch_size": 4})}


def attempt(run: Path, *, save: bool = False) -> dict[str, float]:
    """One process, ended after its first step; seconds since it started (`process_s`) and since its imports were done (`resume_s`).

    `save`: it is asked to drain, so that it leaves a checkpoint of that step.
    """
    imported, metrics, drain = run / "imported", run / "metrics.jsonl", run / "drain"
    for left in (metrics, imported, drain, run / "result.json"):
        left.unlink(missing_ok=True)
    if save:
        drain.touch()
    with (run / "trainer.log").open("w") as log:
        began = time.time()
        process = subprocess.Popen([sys.executable, "-c", PROCESS, str(run), str(imported)], stdout=log, stderr=log)
    steps: list[float] = []
    while process.poll() is None and (save or not steps):
        time.sleep(0.01)
        steps = stepped(metrics)
    process.kill()
    process.wait()
    steps = stepped(metrics)
    if not steps:
        raise SystemExit(f"bench/resume: no step was taken: {(run / 'trainer.log').read_text()}")
    done = float(imported.read_text())
    return {"process_s": steps[0] - began, "imports_s": done - began, "resume_s": steps[0] - done}


def stepped(metrics: Path) -> list[float]:
    """When each step ended, in Unix seconds."""
    lines = [json.loads(line) for line in metrics.read_text().splitlines(keepends=True) if line.endswith("\n")] if metrics.exists() else []
    return [line["time"] - line["checkpoint_s"] for line in lines if "step" in line]


def measure(quick: bool) -> Measured:
    rows: list[Row] = []
    raw: dict[str, Any] = {"libraries": harness.libraries("torch")}
    for name, stage in stages(quick).items():
        with tempfile.TemporaryDirectory() as folder:
            run = Path(folder) / "run"
            run.mkdir()
            write_stage(stage, run / "stage.yaml")
            attempt(run, save=True)  # makes the clips and the checkpoint that is resumed
            resumed = [attempt(run) for _ in range(1 if quick else 4)]
            shutil.rmtree(run / "latents")
            moved = attempt(run)
        best = {key: min(each[key] for each in resumed) for key in resumed[0]}
        raw[name] = {"resumed": resumed, "without latent cache": moved}
        rows += [
            Row(f"resume ({name}): imports done to first step", best["resume_s"], "s", 5, 1, "less"),
            Row(f"resume ({name}): whole process", best["process_s"], "s", better="less"),
            Row(f"resume ({name}): imports done to first step, clips encoded again", moved["resume_s"], "s", better="less"),
        ]
    return rows, raw


def main() -> None:
    harness.run("resume", measure)


if __name__ == "__main__":
    main()
