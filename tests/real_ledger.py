"""A ledger on a folder or on S3 for tests, with stages that are published and committed."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from opensora import identity
from opensora.config import CheckpointConfig, DataConfig, DigitsSource, Flow, PatchAutoencoder, SamplingConfig, StageConfig, WordEncoder
from orchestrator.ledger import lineage
from orchestrator.ledger.keys import run_key
from orchestrator.ledger.records import Committed, Intent, Manifest, Terms
from orchestrator.ledger.store import Ledger
from orchestrator.ports import Store

NOW = 1_800_000_000.0


@dataclass
class Lies:
    """A store, and the folder in which its objects lie as plain files."""

    store: Store
    folder: Path
    reach: Callable[[], Store]


def config(frames: int = 1) -> StageConfig:
    return StageConfig(
        objective=Flow(kind="flow"),
        data=DataConfig(source=DigitsSource(kind="digits", clips=100), frames=frames, height=16, width=16),
        autoencoder=PatchAutoencoder(kind="patch", factor=2),
        text=WordEncoder(kind="words"),
        steps=300,
        batch_size=4,
        checkpoint=CheckpointConfig(every_steps=100),
        sampling=SamplingConfig(method="euler"),
    )


def intent(ledger: Ledger, stage: str = "stage1", attempt: int = 1, parent: str | None = None, frames: int = 1) -> Intent:
    reference = lineage.parent_ref(ledger, parent, ledger.inputs_of(parent)[0]) if parent else None
    inputs_digest = identity.name(config(frames), 2, reference.committed_digest if reference else None)
    ledger.write_terms(stage, inputs_digest, attempt, Terms(identity=identity.VERSION, contents=identity.Contents(), price=None))
    return Intent(
        run_key=run_key(ledger.pipeline, stage, inputs_digest, attempt), pipeline=ledger.pipeline, stage=stage,
        inputs_digest=inputs_digest, attempt=attempt,
        epoch=1, created=NOW + frames, config=config(frames), config_digest=config(frames).digest(), nodes=1, devices_per_node=2,
        device="cpu-core", trainer=(), hang_timeout_s=300, flush_s=5, parent=reference, resume=None, code="0.1.0",
    )  # fmt: skip


def step_dir(folder: Path, step: int, content: bytes = b"weights") -> Path:
    """A finished checkpoint of the trainer. Content differs from step to step, sizes do not."""
    path = folder / f"step-{step:08d}"
    path.mkdir(parents=True)
    files = {f"{name}.safetensors": b"%s of %s at %08d" % (content, name.encode(), step) for name in ("model", "ema", "optimizer")}
    for name, data in files.items():
        (path / name).write_bytes(data)
    sizes = {name: len(data) for name, data in files.items()}
    (path / "CHECKPOINT.json").write_text(json.dumps({"schema": 1, "step": step, "complete": step == 300, "files": sizes, "seed": 42}))
    return path


def commit(ledger: Ledger, made: Intent, key: str, manifest: Manifest) -> Committed:
    return ledger.commit(
        Committed(
            run_key=made.run_key, stage=made.stage, inputs_digest=made.inputs_digest, attempt=made.attempt, step=manifest.step,
            manifest=key,
            manifest_digest=manifest.digest(), weights_digest=manifest.weights_digest,
            parent_committed=made.parent.committed_digest if made.parent else None, evaluation={"digit": 0.5}, time=NOW, epoch=1,
        )
    )  # fmt: skip


def train(ledger: Ledger, folder: Path, stage: str, parent: str | None = None, frames: int = 1) -> Committed:
    """One stage from intent to commit, with a checkpoint on the way."""
    made = ledger.create_intent(intent(ledger, stage, parent=parent, frames=frames))
    ledger.publish(made, step_dir(folder / stage, 100, stage.encode()))
    return commit(ledger, made, *ledger.publish(made, step_dir(folder / stage, 300, stage.encode())))
