"""Laws of a driver at a gate: it holds the start of the next stage and nothing else, and what opened it is written down first."""

from __future__ import annotations

from dataclasses import replace

from attempt_views import CHAIN, NOW
from driver_rig import Rig
from judging_rig import Judge, asking, seen

from orchestrator.driver.decide import Finish, PassGate, StartAttempt, Wait, decide
from orchestrator.driver.facts import Observed
from orchestrator.driver.runner import Result, Runner
from orchestrator.ledger import lineage
from orchestrator.ledger.records import GateDecision
from orchestrator.recipe.gates import Gate
from orchestrator.recipe.pipeline import Pipeline


def at(gate: Gate) -> Observed:
    """Stage one is committed and has this gate."""
    found = seen(None)
    return replace(found, stages={**found.stages, "one": replace(found.stages["one"], gate=gate)})


def test_a_gate_holds_the_next_stage_until_it_is_open() -> None:
    (action,) = decide(CHAIN, at(Gate("open")), NOW)
    assert isinstance(action, StartAttempt) and action.stage == "two"
    assert decide(CHAIN, at(Gate("passes", "why")), NOW) == [PassGate("one", "0a", "why")]
    assert decide(CHAIN, at(Gate("evaluating", "why")), NOW) == [Wait("why")]
    for state in ("waits", "refused"):
        assert decide(CHAIN, at(Gate(state, "why")), NOW) == [Finish("suspended", 4, "why")]  # type: ignore[arg-type]


def gated(gate: str) -> Pipeline:
    stages = list(asking().stages)
    stages[0] = stages[0].model_copy(update={"spec": stages[0].spec.model_copy(update={"gate": gate})})
    return asking().model_copy(update={"stages": tuple(stages)})


def run(rig: Rig, gate: str) -> Result:
    return Runner(gated(gate), rig.ledger, rig.backend, rig.clock, evaluator=Judge(rig)).run()


def states(result: Result) -> list[str]:
    return [stage.state for stage in result.stages]


def test_a_rule_that_holds_lets_the_chain_go_on_and_stands_in_the_lineage(rig: Rig) -> None:
    result = run(rig, "accuracy >= 0.8")
    assert states(result) == ["committed"] * 3
    (inputs_digest,) = rig.ledger.inputs_of("one")
    (decision,) = rig.ledger.gate_decisions("one", inputs_digest)
    assert (decision.action, decision.gate) == ("passed", "accuracy >= 0.8") and "accuracy 0.9" in decision.note
    (link,) = lineage.links(rig.ledger, "one", inputs_digest, full=False)
    assert any(remark.startswith("gate accuracy >= 0.8: passed, read by") for remark in link.remarks)
    again = len(rig.backend.submitted)
    assert run(rig, "accuracy >= 0.8").status == "succeeded" and len(rig.backend.submitted) == again
    assert len(rig.ledger.gate_decisions("one", inputs_digest)) == 1


def test_a_refused_gate_stops_the_chain_and_keeps_everything_until_a_person_agrees(rig: Rig) -> None:
    result = run(rig, "accuracy >= 0.95")
    assert (result.status, result.exit_code) == ("suspended", 4) and states(result) == ["committed", "open", "blocked"]
    assert "accuracy 0.9" in result.reason and "osctl approve one --note TEXT, then osctl launch" in result.reason
    (inputs_digest,) = rig.ledger.inputs_of("one")
    rig.ledger.decide_gate(
        GateDecision(
            stage="one", inputs_digest=inputs_digest, gate="accuracy >= 0.95", action="approve", by="ann@desk", note="good enough", time=1.0
        )
    )
    assert states(run(rig, "accuracy >= 0.95")) == ["committed"] * 3
    assert len(rig.ledger.attempts("one", inputs_digest)) == 1, "a gate is no part of what a stage is"


def test_approval_is_waited_for_by_nobody_who_holds_a_device(rig: Rig) -> None:
    result = run(rig, "approval")
    assert (result.status, result.exit_code) == ("suspended", 4) and "waits for a person's approval" in result.reason
    assert len(rig.backend.submitted) == 1
