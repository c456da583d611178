"""A pipeline's ledger written by hand, record by record, as drivers and agents would have: nothing is trained, no clock is read.

Every time is a function of what was asked for, so two ledgers written alike are equal to the byte.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path

from opensora import identity
from opensora.config import CheckpointConfig, DataConfig, DigitsSource, Flow, PatchAutoencoder, SamplingConfig, StageConfig, WordEncoder
from orchestrator.ledger.keys import run_key
from orchestrator.ledger.records import (
    Committed,
    ExitClass,
    FileRef,
    Intent,
    JournalPiece,
    Manifest,
    Outcome,
    ParentRef,
    Price,
    ResumeRef,
    Terms,
)
from orchestrator.ledger.store import LeaseHandle, Ledger
from orchestrator.recipe.pipeline import Pipeline, Published, Resources, Stage, StageSpec

START = 1_790_000_000.0
"""2026-09-21, in Unix seconds."""
STEPS_A_PIECE = 10
INIT_S = 2.5


def stage_config(frames: int, steps: int) -> StageConfig:
    return StageConfig(
        objective=Flow(kind="flow"),
        data=DataConfig(source=DigitsSource(kind="digits", clips=5000), frames=frames, height=16, width=16),
        autoencoder=PatchAutoencoder(kind="patch", factor=2),
        text=WordEncoder(kind="words"),
        steps=steps,
        batch_size=32,
        checkpoint=CheckpointConfig(every_steps=max(1, steps // 3)),
        sampling=SamplingConfig(method="euler", steps=30),
        prompts=("a digit 3 moving left", "a digit 7 moving up"),
    )


def pipeline(name: str = "demo", *, steps: int = 30, device: str = "h800", devices: int = 8, experiment: str | None = None) -> Pipeline:
    """Three stages, images first; the last with a published reference."""
    stages = []
    for number, frames in enumerate((1, 8, 16), 1):
        spec = StageSpec(
            name=f"stage{number}",
            config=f"stage{number}.yaml",
            parent=f"stage{number - 1}" if number > 1 else None,
            resources=Resources(devices_per_node=devices, device=device),
            published=Published(gpu_hours=0.25 * number, usd=0.75 * number, source="made up for a test"),
        )
        stages.append(Stage(spec=spec, config=stage_config(frames, steps)))
    return Pipeline(
        name=name, backend="local", store=".osctl/store", tracking="sqlite", experiment=experiment or name, budget_usd=None, flush_s=5.0,
        trainer=(), stages=tuple(stages),
    )  # fmt: skip


@dataclass
class Writer:
    """Writes a ledger in the order in which a launch would. `now` is where its story stands."""

    ledger: Ledger
    pipeline: Pipeline
    now: float = START
    step_s: float = 0.4
    results: dict[str, Committed] = field(default_factory=dict)
    lease: LeaseHandle | None = None
    price: Price | None = None
    """What attempts are made at; none: as by a release that wrote no price down."""

    def clock(self) -> float:
        return self.now

    def launch(self) -> None:
        self.ledger.add_revision(self.pipeline.model_dump(mode="json"), self.now)
        self.lease = self.ledger.acquire(self.now)
        self._event("launched")

    def end(self, status: str = "succeeded") -> None:
        self._event("ended", f"{status}: as the test wanted it")
        assert self.lease is not None
        self.lease.release()
        self.lease = None

    def inputs_digest(self, name: str) -> str:
        stage = self.pipeline.stage(name)
        parent = stage.spec.parent
        return identity.name(stage.config, stage.devices, self.results[parent].digest() if parent else None, stage.contents)

    def begin(self, name: str, *, resume: int = 0) -> Intent:
        """The next attempt's intent."""
        stage, inputs_digest = self.pipeline.stage(name), self.inputs_digest(name)
        number = len(self.ledger.attempts(name, inputs_digest)) + 1
        parent = self.results[stage.spec.parent] if stage.spec.parent else None
        self.now += 1
        self.ledger.write_terms(name, inputs_digest, number, Terms(identity=identity.VERSION, contents=stage.contents, price=self.price))
        return self.ledger.create_intent(
            Intent(
                run_key=run_key(self.pipeline.name, name, inputs_digest, number), pipeline=self.pipeline.name, stage=name,
                inputs_digest=inputs_digest,
                attempt=number, epoch=1, created=self.now, config=stage.config, config_digest=stage.config.digest(),
                nodes=stage.spec.resources.nodes, devices_per_node=stage.spec.resources.devices_per_node,
                device=stage.spec.resources.device, trainer=(), hang_timeout_s=300.0, flush_s=5.0,
                parent=ParentRef(stage=parent.stage, key=parent.manifest, manifest_digest=parent.manifest_digest,
                                 committed_digest=parent.digest()) if parent else None,
                resume=ResumeRef(key=f"step {resume}", manifest_digest="0" * 64, step=resume) if resume else None,
                code="0.1.0+gtest",
            )
        )  # fmt: skip

    def train(self, intent: Intent, last: int) -> None:
        """Journal pieces up to step `last`: a first one of preparation, then one every STEPS_A_PIECE."""
        pieces = self.ledger.journal(intent.stage, intent.inputs_digest, intent.attempt)
        done = max((piece.last_step or 0 for piece in pieces), default=intent.resume.step if intent.resume else 0)
        if not pieces:
            self._piece(intent, 0, {"preflight": 0.5, "init": INIT_S - 0.5}, ())
        for first in range(done + 1, last + 1, STEPS_A_PIECE):
            steps = range(first, min(first + STEPS_A_PIECE, last + 1))
            lines = tuple(self._line(intent, step, place) for place, step in enumerate(steps, 1))
            pace = self.pace(intent.config)
            spent = {"step": 0.9 * pace * len(steps), "data_wait": 0.1 * pace * len(steps)}
            self._piece(intent, len(self.ledger.journal(intent.stage, intent.inputs_digest, intent.attempt)), spent, lines)

    def publish(self, intent: Intent, step: int) -> Manifest:
        files = {name: FileRef(size=4, sha256=f"{step:064x}") for name in ("model.safetensors", "ema.safetensors")}
        manifest = Manifest(
            run_key=intent.run_key, pipeline=intent.pipeline, stage=intent.stage, inputs_digest=intent.inputs_digest,
            attempt=intent.attempt, step=step,
            complete=step == intent.config.steps, config_digest=intent.config_digest, code=intent.code,
            parent_manifest=intent.parent.manifest_digest if intent.parent else None, files=files, weights_digest=f"{step:064x}",
        )  # fmt: skip
        self.ledger.store.create(self._manifest_key(intent, step), manifest.encode())
        return manifest

    def close(self, intent: Intent, class_: ExitClass, *, silent_s: float = 0.0, reason: str = "") -> Outcome:
        """The attempt's outcome. `silent_s`: seconds between its last piece and its death."""
        pieces = self.ledger.journal(intent.stage, intent.inputs_digest, intent.attempt)
        self.now += silent_s
        outcome = Outcome.model_validate(
            {
                "class": class_, "exit_code": None, "reason": reason or class_, "step": None,
                "bound": pieces[0].start if pieces else None, "ended": self.now, "devices": intent.nodes * intent.devices_per_node,
                "unaccounted_s": silent_s, "evaluation": self.evaluation(intent) if class_ == "completed" else {}, "epoch": 1,
            }
        )  # fmt: skip
        return self.ledger.write_outcome(intent, outcome)

    def commit(self, intent: Intent, manifest: Manifest) -> Committed:
        parent = self.pipeline.stage(intent.stage).spec.parent
        committed = self.ledger.commit(
            Committed(
                run_key=intent.run_key, stage=intent.stage, inputs_digest=intent.inputs_digest, attempt=intent.attempt, step=manifest.step,
                manifest=self._manifest_key(intent, manifest.step), manifest_digest=manifest.digest(),
                weights_digest=manifest.weights_digest, parent_committed=self.results[parent].digest() if parent else None,
                evaluation=self.evaluation(intent), time=self.now, epoch=1,
            )
        )  # fmt: skip
        self.results[intent.stage] = committed
        return committed

    def finish(self, intent: Intent) -> Committed:
        """Train to the last step, publish, complete, commit."""
        self.train(intent, intent.config.steps)
        manifest = self.publish(intent, intent.config.steps)
        self.close(intent, "completed")
        return self.commit(intent, manifest)

    def three_stages(self) -> None:
        """A whole launch: stage 2 is killed after its checkpoint, and goes on from it."""
        self.launch()
        self.finish(self.begin("stage1"))
        steps = self.pipeline.stage("stage2").config.steps
        killed = self.begin("stage2")
        self.train(killed, steps // 2)
        self.publish(killed, steps // 3)
        self.close(killed, "lost", silent_s=1.5)
        self.finish(self.begin("stage2", resume=steps // 3))
        self.finish(self.begin("stage3"))
        self.end()

    def draw(self, intent: Intent, name: str, content: bytes, folder: Path) -> None:
        path = folder / f"a{intent.attempt}-{name}"
        path.write_bytes(content)
        self.ledger.add_sample(intent, name, path)

    def pace(self, config: StageConfig) -> float:
        """Seconds a step: clips take longer than images."""
        return self.step_s * (1 + (config.data.frames - 1) / 8)

    @staticmethod
    def evaluation(intent: Intent) -> dict[str, float]:
        """Better from stage to stage."""
        rank = int(intent.stage.removeprefix("stage"))
        return {"digit_accuracy": 0.4 + 0.11 * rank, "direction_accuracy": (0.25, 0.74, 0.88)[rank - 1]}

    def _line(self, intent: Intent, step: int, place: int) -> dict[str, float]:
        wave = 0.02 * math.sin(1.7 * step) * math.sin(0.31 * step)
        pace = self.pace(intent.config)
        loss = 0.25 + 0.1 / intent.config.data.frames + 0.9 * math.exp(-step / (0.15 * intent.config.steps)) + wave
        return {
            "step": step, "time": self.now + place * pace, "loss": loss, "lr": 1e-3, "grad_norm": 0.5 + 4 * wave**2,
            "clips": 256, "tokens": 256 * 64 * intent.config.data.frames, "step_s": 0.9 * pace, "data_wait_s": 0.1 * pace,
            "checkpoint_s": 0.0,
        }  # fmt: skip

    def _piece(self, intent: Intent, seq: int, spent: dict[str, float], lines: tuple[dict[str, float], ...]) -> None:
        start = self.now
        self.now += sum(spent.values())
        self.ledger.append_journal(
            intent,
            JournalPiece(
                node=0, seq=seq, start=start, end=self.now, devices=intent.devices_per_node, spent=spent, metrics=lines,
                first_step=int(lines[0]["step"]) if lines else None, last_step=int(lines[-1]["step"]) if lines else None,
            ),
        )  # fmt: skip

    def _manifest_key(self, intent: Intent, step: int) -> str:
        return f"{self.ledger.keys.checkpoint(intent.stage, intent.inputs_digest, step, intent.attempt)}/MANIFEST.json"

    def _event(self, kind: str, detail: str = "") -> None:
        assert self.lease is not None
        self.now += 0.1
        self.ledger.append_event(self.lease, kind, now=self.now, detail=detail)
