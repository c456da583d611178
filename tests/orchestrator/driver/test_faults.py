"""Laws of the driver: attempts fail, and what lies in the store is damaged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

import pytest
from driver_rig import CHAIN, Body, Rig, Script, pipeline

from orchestrator.driver.runner import Detached, Runner
from orchestrator.errors import Refused, Unreachable
from orchestrator.inputs import standing as inputs_module
from orchestrator.ledger.records import DamagedCheckpoint, Event, ExitClass


def test_a_lost_attempt_goes_on_from_its_newest_checkpoint(rig: Rig) -> None:
    rig.backend.scripts["two", 1] = [("publish", 10), ("publish", 20), ("step",), ("vanish",)]
    result = rig.launch()
    assert result.status == "succeeded"
    assert rig.outcomes("two") == ["lost", "completed"]
    (inputs_digest,) = rig.ledger.inputs_of("two")
    second = rig.ledger.intent("two", inputs_digest, 2)
    assert second is not None and second.resume is not None and second.resume.step == 20
    assert any("from step 20" in detail for detail in rig.kinds("retry"))


@pytest.mark.parametrize("damage", ["cut", "flip"])
def test_a_broken_checkpoint_is_passed_over_for_an_older_one(rig: Rig, damage: str) -> None:
    def spoil() -> None:
        (path,) = (rig.store.root / "demo/stages").glob("two@*/checkpoints/step-00000020-a1/ema.safetensors")
        data = path.read_bytes()
        path.write_bytes(data[:-1] if damage == "cut" else data[:-1] + bytes([data[-1] ^ 1]))

    rig.backend.scripts["two", 1] = [("publish", 10), ("publish", 20), ("do", spoil), ("vanish",)]
    result = rig.launch()
    assert result.status == "succeeded"
    (inputs_digest,) = rig.ledger.inputs_of("two")
    second = rig.ledger.intent("two", inputs_digest, 2)
    assert second is not None and second.resume is not None and second.resume.step == 10
    assert any("ema.safetensors" in detail for detail in rig.kinds("observed"))


HALF = b'{"schema": 1, "run'


def spoil(rig: Rig, pattern: str, data: bytes = HALF) -> Path:
    [path] = (rig.store.root / "demo/stages").glob(pattern)
    path.unlink()
    path.write_bytes(data)
    return path


@pytest.mark.parametrize(
    ("steps", "start"), [((20,), "from step 10, as nothing newer can be used"), ((10, 20), "from one, as nothing newer can be used")]
)
def test_a_manifest_that_cannot_be_read_is_an_unpublished_checkpoint_and_people_hear_it(
    rig: Rig, steps: tuple[int, ...], start: str
) -> None:
    damages: Script = [("do", lambda: [spoil(rig, f"two@*/checkpoints/step-{step:08d}-a1/MANIFEST.json") for step in steps])]
    rig.backend.scripts["two", 1] = [("publish", 10), ("publish", 20), *damages, ("vanish",)]
    heard: list[Event] = []
    result = Runner(CHAIN, rig.ledger, rig.backend, rig.clock, on_event=heard.append).run()
    assert result.status == "succeeded" and rig.outcomes("two") == ["lost", "completed"]
    unused = [event for event in heard if event.says_unused]
    assert [event.kind for event in unused] == ["observed"] * len(steps) + ["retry"]
    assert "step 20 is not used" in unused[-2].detail and "half written" in unused[-2].detail
    assert (unused[-2].stage, unused[-2].attempt) == ("two", 1) and unused[-1].detail.startswith(start)


def test_a_checkpoint_whose_upload_was_not_finished_is_named_where_an_older_one_is_used(rig: Rig) -> None:
    def lose() -> None:
        [path] = (rig.store.root / "demo/stages").glob("two@*/checkpoints/step-00000020-a1/MANIFEST.json")
        path.unlink()

    rig.backend.scripts["two", 1] = [("publish", 10), ("publish", 20), ("do", lose), ("vanish",)]
    assert rig.launch().status == "succeeded"
    assert any("step 20 is not used" in detail and "upload was not finished" in detail for detail in rig.kinds("observed"))
    assert any("from step 10, as nothing newer can be used" in detail for detail in rig.kinds("retry"))


@pytest.mark.parametrize("data", [HALF, b"", b'{"schema": 2}'])
def test_a_result_that_cannot_be_read_stops_its_stage_alone(rig: Rig, data: bytes) -> None:
    two_roots = pipeline(("one", None), ("two", "one"), ("other", None), seeds={"other": 7})
    rig.launch(two_roots, "one")
    path = spoil(rig, "one@*/COMMITTED.json", data)
    result = rig.launch(two_roots)
    assert (result.status, result.exit_code) == ("failed", 4) and "COMMITTED.json" in result.reason
    assert [stage.state for stage in result.stages] == ["failed", "blocked", "committed"]
    assert path.read_bytes() == data and rig.outcomes("one") == ["completed"]
    with pytest.raises(Refused, match=r"COMMITTED\.json"):
        rig.launch(two_roots, "two")


def test_an_outcome_that_cannot_be_read_is_an_end_and_the_next_attempt_goes_on(rig: Rig) -> None:
    rig.backend.scripts["one", 1] = [("publish", 10), ("end", "nan")]
    rig.launch()
    path = spoil(rig, "one@*/attempts/1/outcome.json")
    assert rig.launch().status == "succeeded"
    (inputs_digest,) = rig.ledger.inputs_of("one")
    second = rig.ledger.intent("one", inputs_digest, 2)
    assert second is not None and second.resume is not None and second.resume.step == 10 and path.read_bytes() == HALF


def test_an_attempt_without_a_readable_intent_is_left_alone_and_never_doubled(rig: Rig) -> None:
    def detach() -> None:
        runner.detach()

    rig.backend.scripts["one", 1] = [("publish", 10), ("do", detach), *[("step",)] * 40, ("vanish",)]
    runner = rig.runner()
    with pytest.raises(Detached):
        runner.run()
    spoil(rig, "one@*/attempts/1/intent.json")
    with pytest.raises(Refused, match=r"one attempt 1 may hold devices.*intent\.json is half written"):
        rig.launch()
    [body] = rig.backend.bodies.values()
    rig.backend._die(body, 1)
    assert rig.launch().status == "succeeded"
    (inputs_digest,) = rig.ledger.inputs_of("one")
    assert rig.ledger.attempts("one", inputs_digest) == [1, 2], "its number is spent"


def test_half_written_terms_of_a_driver_that_died_spend_their_number(rig: Rig) -> None:
    runner = rig.runner()
    runner.detach()
    with pytest.raises(Detached):
        runner.run()
    inputs_digest = inputs_module.name_of(CHAIN.stages[0], None)
    rig.store.create(rig.ledger.keys.terms("one", inputs_digest, 1), HALF)
    assert rig.launch().status == "succeeded"
    assert [rig.ledger.intent("one", inputs_digest, number) is None for number in (1, 2)] == [True, False]


@pytest.mark.parametrize("name", ["intent.json", "outcome.json", "terms.json"])
def test_what_cannot_be_read_of_earlier_inputs_holds_nothing_up(rig: Rig, name: str) -> None:
    rig.launch(CHAIN, "one")
    spoil(rig, f"one@*/attempts/1/{name}")
    assert rig.launch(pipeline(("one", None), seeds={"one": 7})).status == "succeeded"


@pytest.mark.parametrize("pattern", ["attempts/1/journal/000-000000.json", "attempts/1/report.json"])
def test_a_journal_or_a_report_that_cannot_be_read_holds_nothing_up(rig: Rig, pattern: str) -> None:
    rig.backend.scripts["one", 1] = [("publish", 10), ("publish", 20), ("end", "code")]
    end = rig.backend._end

    def end_and_spoil(body: Body, class_: ExitClass) -> None:
        end(body, class_)
        if (body.intent.stage, body.intent.attempt) == ("one", 1):
            spoil(rig, f"one@*/{pattern}")

    rig.backend._end = end_and_spoil  # type: ignore[method-assign]
    assert rig.launch().status == "succeeded"
    (inputs_digest,) = rig.ledger.inputs_of("one")
    second = rig.ledger.intent("one", inputs_digest, 2)
    assert second is not None and second.resume is not None and second.resume.step == 20


def damaged(rig: Rig, number: int, by: Literal["agent", "trainer"] = "agent") -> Script:
    """What an attempt does that was to go on from a checkpoint which is not what was published."""

    def say() -> None:
        (inputs_digest,) = rig.ledger.inputs_of("one")
        intent = rig.ledger.intent("one", inputs_digest, number)
        assert intent is not None and intent.resume is not None
        word = DamagedCheckpoint(key=intent.resume.key, step=intent.resume.step, reason="ema.safetensors: 7 bytes", by=by)
        rig.ledger.write_damaged(intent, word)

    return [("do", say), ("end", "parent")]


def resumed(rig: Rig, stage: str) -> list[int]:
    """Steps from which the attempts of a stage went on."""
    (inputs_digest,) = rig.ledger.inputs_of(stage)
    intents = [rig.ledger.intent(stage, inputs_digest, number) for number in rig.ledger.attempts(stage, inputs_digest)]
    return [intent.resume.step if intent is not None and intent.resume is not None else 0 for intent in intents]


def test_a_checkpoint_that_an_agent_finds_damaged_is_passed_over_by_every_attempt_after_it(rig: Rig) -> None:
    one = pipeline(("one", None))
    rig.backend.scripts["one", 1] = [("publish", 10), ("publish", 20), ("vanish",)]
    rig.backend.scripts["one", 2] = damaged(rig, 2)
    rig.backend.scripts["one", 3] = [("step",), ("vanish",)]
    assert rig.launch(one).status == "succeeded"
    assert resumed(rig, "one") == [0, 20, 10, 10]
    assert rig.outcomes("one") == ["lost", "store", "lost", "completed"]
    (said,) = [said for said in rig.kinds("retry") if "damaged" in said]
    assert "from step 10" in said and "step 20, from which it was to go on, is damaged: ema.safetensors: 7 bytes" in said


def test_a_damaged_checkpoint_is_remembered_by_the_next_launch(rig: Rig) -> None:
    one = pipeline(("one", None))
    runner = rig.runner(one)
    rig.backend.scripts["one", 1] = [("publish", 10), ("publish", 20), ("vanish",)]
    rig.backend.scripts["one", 2] = damaged(rig, 2)
    rig.backend.scripts["one", 3] = [("do", runner.kill), *[("step",)] * 9]
    assert runner.run().status == "suspended"
    assert rig.launch(one).status == "succeeded"
    assert resumed(rig, "one") == [0, 20, 10, 10]


def test_however_many_checkpoints_are_damaged_the_stage_goes_on_and_in_the_end_from_its_start(rig: Rig) -> None:
    one = pipeline(("one", None))
    rig.backend.scripts["one", 1] = [*(("publish", 5 * number) for number in range(1, 8)), ("vanish",)]
    for number in range(2, 9):
        rig.backend.scripts["one", number] = damaged(rig, number)
    assert rig.launch(one).status == "succeeded"
    assert resumed(rig, "one") == [0, 35, 30, 25, 20, 15, 10, 5, 0]
    assert "from the start" in rig.kinds("retry")[-1] and "step 5, from which" in rig.kinds("retry")[-1]
    assert rig.clock.slept < 60, "there is nothing to wait for"


def test_a_trainer_that_refuses_two_checkpoints_in_a_row_is_not_given_a_third(rig: Rig) -> None:
    """Beginning anew would throw good work away, where it is the trainer that cannot read them."""
    one = pipeline(("one", None))
    rig.backend.scripts["one", 1] = [("publish", 10), ("publish", 20), ("publish", 30), ("vanish",)]
    for number in (2, 3):
        rig.backend.scripts["one", number] = damaged(rig, number, by="trainer")
    result = rig.launch(one)
    assert (result.status, result.exit_code) == ("failed", 4) and "two checkpoints in a row" in result.reason
    assert resumed(rig, "one") == [0, 30, 20]


def test_a_permanent_end_fails_the_run_and_blocks_what_hangs_on_it(rig: Rig) -> None:
    rig.backend.scripts["two", 1] = [("end", "nan")]
    result = rig.launch()
    assert (result.status, result.exit_code) == ("failed", 3)
    assert [stage.state for stage in result.stages] == ["committed", "failed", "blocked"]
    assert "attempt 1 ended with nan" in result.reason
    assert rig.kinds("ended") == [f"None failed: {result.reason}"] or rig.kinds("ended")[-1].endswith(result.reason)


def test_three_stalls_fail_the_run_after_growing_pauses(rig: Rig) -> None:
    for number in (1, 2, 3):
        rig.backend.scripts["one", number] = [("vanish",)]
    result = rig.launch()
    assert (result.status, result.exit_code) == ("failed", 3)
    assert rig.outcomes("one") == ["lost"] * 3
    assert rig.clock.slept >= 5
    del rig.backend.scripts["one", 3]
    assert rig.launch().status == "succeeded"


def test_a_completed_report_without_its_checkpoint_is_not_committed(rig: Rig) -> None:
    def lose() -> None:
        for path in (rig.store.root / "demo/stages").glob("one@*/checkpoints/step-*-a1/MANIFEST.json"):
            path.unlink()

    end = rig.backend._end

    def end_and_lose(body: Body, class_: ExitClass) -> None:
        end(body, class_)
        if body.intent.attempt == 1 and body.intent.stage == "one":
            lose()

    rig.backend._end = end_and_lose  # type: ignore[method-assign]
    result = rig.launch()
    assert result.status == "succeeded"
    assert rig.outcomes("one") == ["completed", "completed"]


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_a_parent_that_is_not_what_was_committed_is_refused_with_4(rig: Rig, damage: str) -> None:
    rig.launch(CHAIN, "one")
    (path,) = (rig.store.root / "demo/stages").glob("one@*/checkpoints/step-00000040-a1/model.safetensors")
    data = bytearray(path.read_bytes())
    path.unlink()
    if damage != "remove":
        data[3] ^= 1
        path.write_bytes(data if damage == "flip" else data[:-1])
    result = rig.launch(CHAIN, "two")
    assert (result.status, result.exit_code) == ("failed", 4)
    assert "model.safetensors" in result.reason
    assert rig.ledger.inputs_of("two") == []


def test_an_exchanged_result_is_refused(rig: Rig) -> None:
    rig.launch(CHAIN, "one")
    (path,) = (rig.store.root / "demo/stages").glob("one@*/COMMITTED.json")
    content = json.loads(path.read_bytes())
    path.unlink()
    path.write_text(json.dumps(content | {"time": content["time"] + 1}))
    result = rig.launch(CHAIN, "two")
    assert result.exit_code == 4 and "COMMITTED.json" in result.reason


def test_unknown_life_is_waited_for(rig: Rig) -> None:
    runner = rig.runner()
    looks = 0

    def blindness() -> None:
        nonlocal looks
        looks += 1
        rig.backend.blind = 2 <= looks < 40

    rig.clock.on_sleep.insert(0, blindness)
    result = runner.run()
    assert result.status == "succeeded" and looks > 40
    assert len(rig.backend.submitted) == 3
    assert any("cannot say" in detail for detail in rig.kinds("observed"))


def test_a_store_that_is_away_for_a_while_only_delays(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    runner, calls = rig.runner(), 0
    attempts = runner.ledger.attempts

    def flaky(stage: str, inputs_digest: str) -> list[int]:
        nonlocal calls
        calls += 1
        if calls % 7 == 0:
            raise Unreachable("store: did not answer")
        return attempts(stage, inputs_digest)

    monkeypatch.setattr(runner.ledger, "attempts", flaky)
    assert runner.run().status == "succeeded"
    assert len(rig.backend.submitted) == 3
