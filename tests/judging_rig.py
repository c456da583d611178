"""An evaluator for tests of the driver, and what a driver sees of evaluations: made by hand, since the real one takes seconds a stage."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from attempt_views import CHAIN, EPOCH
from driver_rig import CHAIN as RUN
from driver_rig import Rig

from orchestrator.driver.facts import Judged, Observed, StageView
from orchestrator.ledger import evaluations
from orchestrator.ledger.records import Evaluation
from orchestrator.recipe.pipeline import Pipeline


def seen(*judged: Judged | None, stop: Literal["drain"] | None = None) -> Observed:
    """So many stages are committed, of which this is known; the next one is ready."""
    names = [stage.name for stage in CHAIN.stages]
    views = {name: StageView(name, "0a" if place <= len(judged) else None) for place, name in enumerate(names)}
    views |= {name: StageView(name, "0a", committed=True, judged=one) for name, one in zip(names, judged, strict=False)}
    return Observed(EPOCH, views, frozenset(names), stop)


@dataclass
class Judge:
    """Answers at the second look. The real one is a process: tests/e2e/test_readme.py has it."""

    rig: Rig
    fails: str = ""
    looks: dict[tuple[str, str], int] = field(default_factory=dict)
    began: list[str] = field(default_factory=list)
    closed: int = 0

    def start(self, stage: str, inputs_digest: str, *, yields: bool) -> None:
        self.looks[stage, inputs_digest] = 0
        self.began.append(stage)

    def state(self, stage: str, inputs_digest: str) -> tuple[Literal["absent", "running", "ended"], str]:
        about = stage, inputs_digest
        if about not in self.looks:
            return "absent", ""
        self.looks[about] += 1
        if self.looks[about] < 2:
            return "running", ""
        if not self.fails:
            self.rig.ledger.write_evaluation(answer(self.rig, stage, inputs_digest), Path())
        return "ended", self.fails

    def close(self) -> None:
        self.closed += 1
        self.looks.clear()


def asking() -> Pipeline:
    stages = [stage.model_copy(update={"config": stage.config.model_copy(update={"prompts": ("a digit 3",)})}) for stage in RUN.stages]
    return RUN.model_copy(update={"stages": tuple(stages)})


def answer(rig: Rig, stage: str, inputs_digest: str) -> Evaluation:
    config = asking().stage(stage).config
    committed = rig.ledger.committed(stage, inputs_digest)
    assert committed is not None
    return Evaluation(
        stage=stage, inputs_digest=inputs_digest, question=evaluations.digest_of(config) or "", asked={}, step=committed.step,
        manifest_digest=committed.manifest_digest, weights_digest=committed.weights_digest, readings={"accuracy": 0.9},
        device="cpu-core", device_s=1.0, price=None, started=1.0, ended=2.0, code="x",
    )  # fmt: skip
