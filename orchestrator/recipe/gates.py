"""Gates between stages: what must hold, or who must agree, before a stage starts from the one that has the gate.

Owns the two ways to write one (a rule over an evaluation, or a person's approval) and what is said of it. Pure. A gate holds the start of
the next stage, never the commit of its own. Refuses to read anything: readings and decisions come in.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from orchestrator.ledger.records import GateDecision

APPROVAL = "approval"
RULE = re.compile(r"([a-z][a-z0-9_]*) *(>=|<=|>|<) *(parent|[-+]?[0-9]*\.?[0-9]+(?:[eE][-+]?[0-9]+)?)")
HOLDS = {">=": operator.ge, "<=": operator.le, ">": operator.gt, "<": operator.lt}
EXAMPLES = "Write approval, direction_accuracy >= 0.5, or held_out_loss <= parent"


@dataclass(frozen=True)
class Gate:
    """How a gate stands."""

    state: Literal["open", "passes", "waits", "evaluating", "refused"]
    """open: it is written down. passes: its rule holds, which is still to be written down."""
    why: str = ""


def check(gate: str) -> str:
    """The same text. Raises ValueError: it is neither `approval` nor a rule."""
    if gate != APPROVAL and RULE.fullmatch(gate) is None:
        raise ValueError(f"{gate!r} is neither approval nor a rule. {EXAMPLES}")
    return gate


def stands(gate: str, stage: str, decision: GateDecision | None, readings: Mapping[str, float] | None, parent: Mapping[str, float]) -> Gate:
    """How the gate of a committed stage stands.

    Args:
        decision: the newest that is written down of it. None: there is none.
        readings: of the stage's evaluation. None: it is still to come.
        parent: readings of the stage that it started from; empty where there are none.
    """
    person = f"osctl approve {stage} --note TEXT, then osctl launch"
    if decision is not None and decision.action == "refuse":
        return Gate("refused", f"the gate of {stage} was refused by {decision.by}: {decision.note}. To go on after all: {person}")
    if decision is not None and (decision.action == "approve" or decision.gate == gate):
        return Gate("open")
    if gate == APPROVAL:
        return Gate("waits", f"the gate of {stage} waits for a person's approval: {person}")
    if readings is None:
        return Gate("evaluating", f"the gate of {stage} waits for its evaluation")
    found = RULE.fullmatch(gate)
    assert found is not None, gate
    name, sign, limit = found.groups()
    value = readings.get(name)
    bound = readings.get(f"{name}_parent", parent.get(name)) if limit == "parent" else float(limit)
    if value is None or bound is None:
        whose = "its parent" if value is not None else stage
        missing = f"the gate of {stage} ({gate}) reads {name}, which no evaluation of {whose} has"
        return Gate("refused", f"{missing}. Evaluate with: osctl eval {stage}, or agree with: {person}")
    said = f"{name} {value:.4g}, {'its parent' if limit == 'parent' else 'the gate'} has {bound:.4g}"
    if HOLDS[sign](value, bound):
        return Gate("passes", said)
    return Gate("refused", f"the gate of {stage} does not hold: {gate}, and {said}. Everything is kept. To go on after all: {person}")
