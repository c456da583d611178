"""Descriptions of runs, as MLflow's pages show them: Markdown for people. Pure.

Owns the texts. They tell of what has ended alone, so that a live bill does not change them at every look: MLflow keeps each value of a tag.
"""

from __future__ import annotations

from collections.abc import Sequence

from opensora.printable import printable, several
from orchestrator.accounting.cost import Bill, account
from orchestrator.ledger.evaluations import readings
from orchestrator.tracking.facts import Facts, StageFacts

LONGEST = 4_000
"""Characters: servers before 2.10 take 5,000 of a tag."""


def of_pipeline(facts: Facts) -> str:
    """A table of its current stages."""
    head = ["| stage | state | step | attempts | device-hours | dollars | evaluation |", "|---|---|---|---|---|---|---|"]
    rows = [_row(stage) for stage in facts.stages if stage.current]
    where = "Videos and sheets lie among the artifacts of each stage's run, under `samples`; each committed stage is a version of the model"
    return _cut([f"Pipeline **{facts.pipeline.name}**, made by osctl.", "", *head, *rows, "", f"{where} **{facts.pipeline.name}**."])


def of_stage(facts: Facts, stage: StageFacts) -> str:
    """What it was trained from, what became of it, and where its result is."""
    intent = stage.attempts[-1].intent
    parent = f"from **{intent.parent.stage}**" if intent.parent is not None else "from nothing"
    lines = [f"Stage **{stage.name}** of **{facts.pipeline.name}**, trained {parent}.", "", *_attempts(stage)]
    if stage.committed is not None:
        place = stage.committed.manifest.rpartition("/")[0]  # the store itself may move: the tag osctl/checkpoint has the whole address
        lines += ["", f"Committed at step {stage.committed.step:,}: `{place}` in the pipeline's store."]
    if not stage.current:
        lines += ["", "The pipeline as it was launched last does not use this result."]
    if any(attempt.samples for attempt in stage.attempts) or any(one.samples for one in stage.evaluations):
        lines += ["", "Videos and sheets: artifacts, `samples`."]
    return _cut(lines)


def _row(stage: StageFacts) -> str:
    committed, bill = stage.committed, _ended(stage)
    state = "committed" if committed is not None else "not committed"
    step = f"{committed.step:,}" if committed is not None else ""
    found = sorted(readings(committed, stage.evaluations).items())[:4]
    read = ", ".join(f"{name} {value:.3g}" for name, value in found)
    return f"| {stage.name} | {state} | {step} | {len(stage.attempts)} | {bill.device_hours:.3f} | {bill.usd:.2f} | {read} |"


def _attempts(stage: StageFacts) -> Sequence[str]:
    ends = [
        f"- attempt {attempt.intent.attempt}: {attempt.outcome.class_}, {printable(attempt.outcome.reason)[:200]}"
        for attempt in stage.attempts
        if attempt.outcome is not None and attempt.outcome.class_ != "completed"
    ]
    return [several(len(stage.attempts), "attempt") + ("; those that did not come to the end:" if ends else "."), *ends[-10:]]


def _ended(stage: StageFacts) -> Bill:
    return account([attempt.time for attempt in stage.attempts if attempt.outcome is not None], stage.evaluations)


def _cut(lines: Sequence[str]) -> str:
    text = "\n".join(lines)
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 1]}…"
