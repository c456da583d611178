"""Laws of gates: what opens one, what is said where it stays shut."""

from __future__ import annotations

from typing import Literal

import pytest

from orchestrator.ledger.records import GateDecision
from orchestrator.recipe.gates import check, stands
from orchestrator.recipe.pipeline import StageSpec


def decided(action: Literal["approve", "refuse", "passed"], gate: str = "approval") -> GateDecision:
    return GateDecision(stage="one", inputs_digest="0a", gate=gate, action=action, by="ann@desk", note="looks right", time=1.0)


@pytest.mark.parametrize(
    ("gate", "state"),
    [
        ("direction_accuracy >= 0.5", "passes"),
        ("direction_accuracy > 0.5", "refused"),
        ("held_out_loss<=parent", "passes"),
        ("held_out_loss < parent", "passes"),
        ("digit_accuracy >= parent", "refused"),
        ("digit_accuracy >= -1e-3", "passes"),
        ("nothing >= 1", "refused"),
        ("direction_accuracy >= parent", "refused"),
    ],
)
def test_a_rule_compares_the_evaluation_with_a_number_or_the_parent(gate: str, state: str) -> None:
    read = {"direction_accuracy": 0.5, "held_out_loss": 0.4, "held_out_loss_parent": 0.6, "digit_accuracy": 0.2}
    found = stands(check(gate), "one", None, read, {"held_out_loss": 0.1, "digit_accuracy": 0.3})
    assert found.state == state
    assert state == "passes" or "osctl approve one --note TEXT, then osctl launch" in found.why


def test_a_rule_waits_for_the_evaluation_and_a_person_is_asked_at_once() -> None:
    assert stands("direction_accuracy >= 0.5", "one", None, None, {}).state == "evaluating"
    found = stands("approval", "one", None, None, {})
    assert found.state == "waits" and "osctl approve one" in found.why


def test_a_person_has_the_last_word_and_a_passed_rule_counts_for_that_rule_alone() -> None:
    bad = {"direction_accuracy": 0.1}
    assert stands("direction_accuracy >= 0.5", "one", decided("approve"), bad, {}).state == "open"
    refused = stands("direction_accuracy >= 0.05", "one", decided("refuse"), bad, {})
    assert refused.state == "refused" and "ann@desk: looks right" in refused.why
    passed = decided("passed", "direction_accuracy >= 0.05")
    assert stands("direction_accuracy >= 0.05", "one", passed, bad, {}).state == "open"
    assert stands("direction_accuracy >= 0.5", "one", passed, bad, {}).state == "refused"


@pytest.mark.parametrize("gate", ["", "approve", "direction_accuracy", "direction_accuracy => 0.5", "x >= nan", "x >= 1 or y >= 2"])
def test_what_is_no_gate_is_refused_with_an_example(gate: str) -> None:
    with pytest.raises(ValueError, match=r"Write approval, direction_accuracy >= 0\.5"):
        StageSpec(name="one", config="x.yaml", gate=gate)


def test_a_stage_without_a_gate_is_written_as_before() -> None:
    assert "gate" not in StageSpec(name="one", config="x.yaml").model_dump()
