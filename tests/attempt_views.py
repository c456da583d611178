"""What a driver sees, made by hand for tests of what it decides."""

from __future__ import annotations

from typing import Literal

from opensora.config import StageConfig
from orchestrator.driver.facts import AttemptView, Checkpoint, Observed, StageView
from orchestrator.ledger.records import EXIT_CODES, ExitClass, Outcome, Report
from orchestrator.ports import Life
from orchestrator.recipe.pipeline import Pipeline, Stage, StageSpec

CONFIG = StageConfig.model_validate(
    {
        "objective": {"kind": "flow"},
        "sampling": {"method": "euler"},
        "data": {"source": {"kind": "digits", "clips": 4}, "frames": 1, "height": 16, "width": 16},
        "autoencoder": {"kind": "patch"},
        "text": {"kind": "words"},
        "steps": 40,
        "batch_size": 1,
        "checkpoint": {"every_steps": 10},
    }
)
NOW = 1000.0
Cause = Literal["preempted", "oom_killed", "deleted"]
EPOCH = 7


def pipeline(*parents: tuple[str, str | None], backend: str = "local", max_attempts: int = 5) -> Pipeline:
    return Pipeline.model_validate(
        {
            "name": "demo",
            "backend": backend,
            "store": "store",
            "tracking": "none",
            "experiment": "demo",
            "budget_usd": None,
            "flush_s": 1.0,
            "trainer": (),
            "stages": tuple(
                Stage(spec=StageSpec(name=name, config="x.yaml", parent=parent, max_attempts=max_attempts), config=CONFIG)
                for name, parent in parents
            ),
        }
    )


ONE = pipeline(("one", None))
CHAIN = pipeline(("one", None), ("two", "one"), ("three", "two"))


def outcome(class_: ExitClass, ended: float = NOW - 100, step: int | None = None) -> Outcome:
    return Outcome.model_validate(
        {
            "class": class_, "exit_code": EXIT_CODES.get(class_), "reason": "why", "step": step, "bound": ended - 1, "ended": ended,
            "devices": 1, "unaccounted_s": 0, "epoch": EPOCH,
        }
    )  # fmt: skip


def report(class_: ExitClass, step: int | None = None) -> Report:
    return Report.model_validate({"class": class_, "reason": "why", "step": step, "started": 1.0, "ended": 2.0})


def attempt(
    number: int,
    class_: ExitClass | None = None,
    *,
    life: Life | None = None,
    resumed: int = 0,
    published: int = 0,
    failed_at: int | None = None,
    epoch: int = EPOCH,
    traces: bool = False,
    ended: float = NOW - 100,
    stage: str = "one",
    inputs_digest: str = "in",
) -> AttemptView:
    return AttemptView(
        stage,
        inputs_digest,
        number,
        epoch,
        resumed,
        life or Life("absent"),
        published,
        traces or class_ is not None,
        report(class_, failed_at) if class_ is not None and class_ != "lost" else None,
        outcome(class_, ended) if class_ is not None else None,
    )


def see(*attempts: AttemptView, targets: frozenset[str] | None = None, **view: object) -> Observed:
    only = StageView("one", "in", attempts=attempts, **view)  # type: ignore[arg-type]
    return Observed(EPOCH, {"one": only}, targets or frozenset({"one"}))


def ended(exit_code: int | None = None, cause: Cause | None = None, bound: float | None = NOW - 50) -> Life:
    return Life("ended", bound, NOW - 1, exit_code, cause)


def checkpoint(step: int, number: int = 1, complete: bool = False) -> Checkpoint:
    return Checkpoint(f"step-{step}-a{number}", f"digest-{step}-{number}", step, number, complete)
