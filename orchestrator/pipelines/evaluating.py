"""Judging a committed stage beside the training: the trainer's command on its checkpoint, and the answer in the ledger.

Owns the order: what is asked, whether it is answered, the checkpoints here, the process, the record. Nothing rests on an evaluation: it may
be killed at any moment, and made again. The first answer to a question stays. Refuses to decide when a stage is evaluated.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import resource
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator import modules
from orchestrator.errors import OsctlError, UsageError
from orchestrator.pipelines.checkpoints_here import fetched, folder_of
from orchestrator.pipelines.workspace import Workspace

if TYPE_CHECKING:
    from orchestrator.ledger.records import Committed, Evaluation
    from orchestrator.recipe.pipeline import Stage

Say = Callable[[str], None]


def evaluate(workspace: Workspace, stage: Stage, committed: Committed, say: Say = lambda text: None) -> Evaluation:
    """The answer to what a stage's configuration asks of its result; made now where the ledger has none.

    Args:
        stage: its `evaluate`, `sampling` and `prompts` count; the rest is what the checkpoint says.
        say: hears what the process says.

    Raises:
        UsageError: nothing is asked, or what is asked cannot be.
        OsctlError: the evaluation failed.
        Refused, CorruptCheckpoint, Unreachable: the checkpoint cannot be had.
    """
    from orchestrator.ledger import evaluations

    question = evaluations.digest_of(stage.config)
    if question is None:
        raise UsageError(f"eval {stage.name}: it has neither prompts nor `evaluate`. Ask with: osctl eval {stage.name} --set {EXAMPLE}")
    folder = workspace.host.home / "evaluating" / f"{workspace.pipeline.name}-{stage.name}-{question}"
    with _alone(folder) as out:
        there = workspace.ledger.evaluation(stage.name, committed.inputs_digest, question)
        return there if there is not None else _made(workspace, stage, committed, question, out, say)


def _made(workspace: Workspace, stage: Stage, committed: Committed, question: str, out: Path, say: Say) -> Evaluation:
    """Evaluate now. `out`: an empty folder."""
    checkpoint, host = fetched(workspace, committed)
    intent = workspace.ledger.intent(stage.name, committed.inputs_digest, committed.attempt)
    parent = intent.parent if intent is not None else None
    before = folder_of(workspace, host, parent.key, parent.manifest_digest) if parent is not None else None
    began, computed = time.time(), _cpu_s()
    result = _judge(stage, checkpoint, before, out, host.for_children(), say)
    device_s = _cpu_s() - computed if result["device"] == "cpu" else time.time() - began
    return workspace.ledger.write_evaluation(_record(workspace, stage, committed, question, result, device_s), out / "samples")


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[Path]:
    """A folder of this question, empty, for one process of this machine at a time: a second one waits, and finds the answer. What a killed
    process left there goes with the next."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_name(f"{folder.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


EXAMPLE = "'stage1.evaluate={kind: digits, frames: 8}'"


def _judge(stage: Stage, folder: Path, parent: Path | None, out: Path, env: Mapping[str, str], say: Say) -> dict[str, Any]:
    from opensora.config import write_stage

    write_stage(stage.config, out / "stage.yaml")
    words = [str(folder), f"--out={out}", f"--stage={out / 'stage.yaml'}", *([f"--parent={parent}"] if parent is not None else [])]
    threads = {"OMP_NUM_THREADS": str(stage.spec.resources.devices_per_node), **env}  # as many cores as the stage itself
    process = subprocess.Popen(
        modules.command("opensora.evaluate", *words), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=threads, text=True
    )
    last = ""
    assert process.stderr is not None
    with process.stderr as lines:
        for line in lines:
            last = line.strip()
            if not last.startswith("error: "):
                say(f"{stage.name}: {last}")
    if code := process.wait():
        kind = UsageError if code == 2 else OsctlError
        raise kind(f"eval {stage.name}: {last.removeprefix('error: ') or f'it ended with exit code {code}'}")
    content: dict[str, Any] = json.loads((out / "result.json").read_text())
    return content


def _record(
    workspace: Workspace, stage: Stage, committed: Committed, question: str, result: Mapping[str, Any], device_s: float
) -> Evaluation:
    from orchestrator.driver.act import code_version
    from orchestrator.ledger import evaluations
    from orchestrator.ledger.records import Evaluation
    from orchestrator.recipe import adapt
    from orchestrator.recipe.prices import price_of

    asked = evaluations.asked(stage.config)
    assert asked is not None
    device = adapt.LOCAL_CPU if result["device"] == "cpu" else adapt.gpu_of(workspace.pipeline, workspace.prices)
    return Evaluation(
        stage=stage.name,
        inputs_digest=committed.inputs_digest,
        question=question,
        asked=asked,
        step=committed.step,
        manifest_digest=committed.manifest_digest,
        weights_digest=committed.weights_digest,
        readings=result["readings"],
        held_out=result["held_out"],
        warnings=tuple(result["warnings"]),
        samples=tuple(sorted(path.name for path in Path(result["samples"]).iterdir())) if Path(result["samples"]).is_dir() else (),
        device=device,
        device_s=device_s,
        price=price_of(workspace.named_prices(), device),
        started=result["started"],
        ended=result["ended"],
        code=code_version(),
    )


def _cpu_s() -> float:
    """CPU-seconds of this process's children that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def of_folder(folder: Path, out: Path, env: Mapping[str, str]) -> dict[str, Any]:
    """What a checkpoint folder, or an export, is asked by its own stage; samples and result lie in `out`. Raises OsctlError."""
    words = [str(folder), f"--out={out}"]
    done = subprocess.run(modules.command("opensora.evaluate", *words), check=False, stdout=subprocess.PIPE, env=dict(env), text=True)
    if done.returncode:
        raise SystemExit(done.returncode)
    content: dict[str, Any] = json.loads(done.stdout)
    return content
