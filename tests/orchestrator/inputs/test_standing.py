from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import written_ledger
from written_ledger import Writer

from opensora import identity
from opensora.identity import Contents
from orchestrator.inputs import standing as inputs_digest
from orchestrator.ledger.keys import run_key
from orchestrator.ledger.records import Decision, Intent, inputs_of_old
from orchestrator.ledger.store import Ledger
from orchestrator.recipe.pipeline import Pipeline, Resources
from orchestrator.stores.folder import FolderStore

NOW = written_ledger.START
BATCH = 32


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger(FolderStore(tmp_path / "store"), "demo")


def pipeline(devices: int = 8, contents: Contents | None = None, **changes: Any) -> Pipeline:
    """The written recipe, with changes of its first stage's configuration."""
    found = written_ledger.pipeline(devices=devices)
    first, *others = found.stages
    config = first.config.model_copy(update=changes)
    first = first.model_copy(update={"config": config, "contents": contents or Contents()})
    return found.model_copy(update={"stages": (first, *others)})


def worked(ledger: Ledger, recipe: Pipeline, *, to: int = 20, commit: bool = False) -> Writer:
    """Its first stage as far as a step, published there."""
    writer = Writer(ledger, recipe)
    writer.launch()
    intent = writer.begin("stage1")
    writer.train(intent, to)
    manifest = writer.publish(intent, to)
    writer.close(intent, "completed" if commit else "drained")
    if commit:
        writer.commit(intent, manifest)
    writer.end("succeeded" if commit else "suspended")
    return writer


def standing(ledger: Ledger, recipe: Pipeline) -> inputs_digest.Standing:
    return inputs_digest.stand(ledger, recipe.stage("stage1"), None)


def test_work_goes_on_whatever_its_execution_is(ledger: Ledger) -> None:
    worked(ledger, pipeline())
    there = standing(ledger, pipeline())
    for changed in (pipeline(compile=False), pipeline(devices=4, accumulate=2), pipeline(prompts=("another",))):
        assert standing(ledger, changed).inputs_digest == there.inputs_digest
        assert standing(ledger, changed).begun
        assert inputs_digest.to_decide(standing(ledger, changed)) == ""
    said = inputs_digest.goes_on_otherwise(ledger, standing(ledger, pipeline(devices=4, accumulate=2)))
    assert "devices is 4 (was 8)" in said and "accumulate is 2 (was 1)" in said


def test_who_judges_is_the_drivers_choice_and_no_change_that_a_person_is_told(ledger: Ledger) -> None:
    worked(ledger, pipeline(judging="beside"))
    there = standing(ledger, pipeline())
    assert there.begun and inputs_digest.goes_on_otherwise(ledger, there) == ""


def test_what_begins_anew_is_said_with_its_reason_and_what_was_spent(ledger: Ledger) -> None:
    worked(ledger, pipeline())
    found = standing(ledger, pipeline(seed=7))
    assert not found.begun
    assert found.anew == "stage1 begins anew, because seed is 7 (was 42); 20 steps under earlier inputs"
    assert inputs_digest.to_decide(found) == "", "a person who changes the seed means it"
    assert standing(ledger, pipeline()).anew == "", "and the earlier one is still there"


def test_of_several_earlier_works_the_nearest_is_compared(ledger: Ledger) -> None:
    worked(ledger, pipeline(seed=7, ema_decay=0.5))
    worked(ledger, pipeline(seed=7), to=10)
    earlier = standing(ledger, pipeline(seed=8)).earlier
    assert earlier is not None
    assert [(one.path, one.old, one.new) for one in earlier.changes] == [("seed", 7, 8)]
    assert earlier.step == 10


def test_another_global_batch_is_refused_with_both_numbers_and_a_way_to_keep_it(ledger: Ledger) -> None:
    worked(ledger, pipeline())
    why = inputs_digest.to_decide(standing(ledger, pipeline(devices=4)))
    assert why == (
        f"stage1: its global batch would be {4 * BATCH} clips (4 devices), its 20 steps were trained with {8 * BATCH}. "
        "Keep it with `osctl launch --set stage1.accumulate=2`, or train anew: osctl launch --anew stage1"
    )
    assert "--set stage1.batch_size=256" in inputs_digest.to_decide(standing(ledger, pipeline(devices=1, batch_size=257)))
    assert "batch_size and accumulate" in inputs_digest.to_decide(standing(ledger, pipeline(devices=3)))


def test_work_without_a_step_is_nothing_to_decide_about(ledger: Ledger) -> None:
    writer = Writer(ledger, pipeline())
    writer.launch()
    writer.begin("stage1")
    found = standing(ledger, pipeline(devices=4))
    assert found.anew == "" and inputs_digest.to_decide(found) == ""


def test_data_that_changed_asks_for_a_decision(ledger: Ledger) -> None:
    worked(ledger, pipeline(contents=Contents(data="1" * 64)), to=30, commit=True)
    changed = pipeline(contents=Contents(data="2" * 64))
    found = standing(ledger, changed)
    why = inputs_digest.to_decide(found)
    assert "222222222222" in why and "111111111111" in why
    assert "osctl launch --keep stage1" in why and "osctl launch --anew stage1" in why
    assert found.earlier is not None

    def decide(action: str) -> None:
        ledger.decide(
            Decision.model_validate(
                {
                    "stage": "stage1",
                    "inputs": found.inputs_digest,
                    "action": action,
                    "earlier": found.earlier.inputs_digest,
                    "reason": "",
                    "time": NOW,
                }
            )
        )

    decide("keep")
    assert standing(ledger, changed).inputs_digest == found.earlier.inputs_digest
    assert ledger.committed("stage1", standing(ledger, changed).inputs_digest) is not None
    decide("anew")
    assert standing(ledger, changed).inputs_digest == found.inputs_digest, "the last word counts"
    assert inputs_digest.to_decide(standing(ledger, changed)) == ""


def test_data_that_stopped_half_way_cannot_be_kept(ledger: Ledger) -> None:
    worked(ledger, pipeline(contents=Contents(data="1" * 64)))
    why = inputs_digest.to_decide(standing(ledger, pipeline(contents=Contents(data="2" * 64))))
    assert "--keep" not in why and "Put the data back" in why


def of_old(ledger: Ledger, recipe: Pipeline) -> Intent:
    """An attempt as 0.1.0 wrote it: its folder named over every field, and no terms."""
    stage = recipe.stage("stage1")
    name = inputs_of_old(stage.config.digest(), stage.devices, None)
    return ledger.create_intent(
        Intent(
            run_key=run_key("demo", "stage1", name, 1), pipeline="demo", stage="stage1", inputs_digest=name, attempt=1, epoch=1,
            created=NOW,
            config=stage.config, config_digest=stage.config.digest(), nodes=1, devices_per_node=stage.devices,
            device=stage.spec.resources.device, trainer=(), hang_timeout_s=300.0, flush_s=5.0, parent=None, resume=None, code="0.1.0",
        )
    )  # fmt: skip


def test_work_of_an_older_release_is_found_by_the_configuration_in_its_intent(ledger: Ledger) -> None:
    old = of_old(ledger, pipeline())
    for same in (pipeline(), pipeline(compile=False), pipeline(contents=Contents(data="1" * 64)), pipeline(devices=16, batch_size=16)):
        assert standing(ledger, same).inputs_digest == old.inputs_digest
    assert standing(ledger, pipeline(seed=7)).inputs_digest != old.inputs_digest
    assert standing(ledger, pipeline(devices=16)).inputs_digest != old.inputs_digest


def test_the_name_of_an_older_release_is_still_what_it_was() -> None:
    config = pipeline().stage("stage1").config
    assert config.digest() == "7b8068ca9be18709225f56299b60dc2bc83d33583ed9d6ff9b70309231963697"
    assert inputs_of_old(config.digest(), 8, None) == "8c2a7ee9a46d"


def test_contents_that_one_side_did_not_record_are_not_compared(ledger: Ledger) -> None:
    worked(ledger, pipeline())
    recipe = pipeline(contents=Contents(data="1" * 64))
    earlier = standing(ledger, recipe).earlier
    assert earlier is None or not earlier.changed("data")


def test_a_stage_knows_its_devices_in_all_nodes(ledger: Ledger) -> None:
    spread = pipeline()
    first = spread.stages[0]
    spec = first.spec.model_copy(update={"resources": Resources(nodes=2, devices_per_node=4, device="h800")})
    assert inputs_digest.name_of(first.model_copy(update={"spec": spec}), None) == inputs_digest.name_of(first, None)
    assert inputs_digest.name_of(first, None) == identity.name(first.config, 8, None)
