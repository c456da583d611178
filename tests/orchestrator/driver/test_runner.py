"""Laws of the driver: chains of stages, and what a person asks of it."""

from __future__ import annotations

import pytest
from driver_rig import CHAIN, Rig, pipeline
from tiny_attempts import STEPS

from orchestrator.driver.runner import Detached
from orchestrator.errors import Refused, UsageError
from orchestrator.ledger import lineage

# --- Chains ------------------------------------------------------------------------------------------------------------------------


def test_every_stage_starts_from_the_committed_result_of_the_one_before(rig: Rig) -> None:
    result = rig.launch()
    assert (result.status, result.exit_code) == ("succeeded", 0)
    assert [(stage.name, stage.state, stage.step, stage.attempts) for stage in result.stages] == [
        (name, "committed", STEPS, 1) for name in ("one", "two", "three")
    ]
    (inputs_digest,) = rig.ledger.inputs_of("three")
    links = list(lineage.links(rig.ledger, "three", inputs_digest, full=True))
    assert [link.stage for link in links] == ["three", "two", "one"] and all(link.ok for link in links), [link.faults for link in links]
    committed = rig.ledger.committed("three", inputs_digest)
    assert committed is not None and committed.evaluation == {"accuracy": 0.5}


def test_launching_twice_does_nothing_twice(rig: Rig) -> None:
    rig.launch()
    before = sorted(rig.store.list("demo/stages/"))
    again = rig.launch()
    assert again.status == "succeeded"
    assert sorted(rig.store.list("demo/stages/")) == before
    assert len(rig.backend.submitted) == 3
    assert len(rig.kinds("committed")) == 3
    assert len(rig.ledger.revisions()) == 1


def test_hand_over_takes_one_look(rig: Rig) -> None:
    rig.launch()
    (one,), (two,) = rig.ledger.inputs_of("one"), rig.ledger.inputs_of("two")
    ended, born = rig.ledger.outcome("one", one, 1), rig.ledger.intent("two", two, 1)
    assert ended is not None and born is not None
    assert born.created - ended.ended <= 0.1


def test_one_stage_alone_finds_its_parent_in_the_ledger(rig: Rig) -> None:
    rig.launch(CHAIN, "one")
    result = rig.launch(CHAIN, "two")
    assert [stage.state for stage in result.stages] == ["committed", "committed", "not asked for"]


def test_one_stage_alone_without_its_parent_is_refused_before_anything_is_written(rig: Rig) -> None:
    with pytest.raises(Refused, match="osctl launch one"):
        rig.launch(CHAIN, "two")
    assert list(rig.store.list("")) == []


def test_a_parent_with_another_configuration_is_no_parent(rig: Rig) -> None:
    rig.launch(CHAIN, "one")
    changed = pipeline(("one", None), ("two", "one"), seeds={"one": 2})
    with pytest.raises(Refused, match="current configuration"):
        rig.launch(changed, "two")


def test_only_what_changed_and_what_hangs_on_it_runs_again(rig: Rig) -> None:
    rig.launch()
    changed = pipeline(("one", None), ("two", "one"), ("three", "two"), seeds={"two": 2})
    rig.launch(changed)
    assert [key.split("@")[0] for key in rig.backend.submitted] == ["demo/one", "demo/two", "demo/three", "demo/two", "demo/three"]


def test_an_unknown_stage_is_a_usage_error_that_names_the_others(rig: Rig) -> None:
    with pytest.raises(UsageError, match="one, two, three"):
        rig.launch(CHAIN, "four")


# --- Stops -------------------------------------------------------------------------------------------------------------------------


def test_drain_saves_and_suspends_and_the_next_launch_goes_on(rig: Rig) -> None:
    runner = rig.runner()
    rig.backend.scripts["two", 1] = [("publish", 10), ("do", runner.drain), ("step",), ("step",), ("step",)]
    result = runner.run()
    assert (result.status, result.exit_code) == ("suspended", 130)
    assert rig.outcomes("two") == ["drained"]
    assert rig.launch().status == "succeeded"
    (inputs_digest,) = rig.ledger.inputs_of("two")
    second = rig.ledger.intent("two", inputs_digest, 2)
    assert second is not None and second.resume is not None and second.resume.step == 11


def test_a_stage_that_completes_while_draining_is_committed(rig: Rig) -> None:
    runner = rig.runner()
    rig.backend.scripts["two", 1] = [("do", runner.drain), ("end", "completed")]
    rig.backend.drain = lambda run_key: None  # type: ignore[method-assign]
    result = runner.run()
    assert result.status == "suspended"
    assert [stage.state for stage in result.stages] == ["committed", "committed", "open"]


def test_kill_ends_at_once(rig: Rig) -> None:
    runner = rig.runner()
    rig.backend.drain = lambda run_key: None  # type: ignore[method-assign]
    rig.backend.scripts["one", 1] = [("do", runner.drain), ("step",), ("do", runner.kill), ("step",)]
    result = runner.run()
    assert (result.status, result.exit_code) == ("suspended", 130)
    assert rig.outcomes("one") == ["lost"]
    assert rig.launch().status == "succeeded"


def test_a_cancel_of_another_process_drains_the_driver(rig: Rig) -> None:
    other = rig.ledger
    rig.backend.scripts["two", 1] = [("publish", 10), ("do", lambda: other.ask_cancel(rig.clock.time)), *[("step",)] * 30]
    result = rig.launch()
    assert (result.status, result.exit_code) == ("cancelled", 130)
    assert rig.outcomes("two") == ["drained"]
    assert rig.kinds("ended")[-1].split()[1].startswith("cancelled")
    assert rig.kinds("ended")[-1].count("cancelled") == 1, "the state is said once"
    assert rig.launch().status == "succeeded"


def test_a_cancel_that_does_not_save_kills(rig: Rig) -> None:
    def ask() -> None:
        rig.ledger.ask_cancel(rig.clock.time, "now, by a test")

    rig.backend.scripts["two", 1] = [("publish", 10), ("do", ask), *[("step",)] * 30]
    result = rig.launch()
    assert (result.status, result.exit_code) == ("cancelled", 130)
    assert rig.outcomes("two") == ["lost"]
    assert rig.launch().status == "succeeded"


def test_a_second_cancel_can_give_up_the_saving(rig: Rig) -> None:
    rig.backend.deaf = True
    asks = [("do", lambda: rig.ledger.ask_cancel(rig.clock.time)), *[("step",)] * 30]
    asks += [("do", lambda: rig.ledger.ask_cancel(rig.clock.time, "now, by a test")), *[("step",)] * 30]
    rig.backend.scripts["two", 1] = asks
    assert rig.launch().status == "cancelled"
    assert rig.outcomes("two") == ["lost"]


def test_a_detached_driver_leaves_its_attempt_running_for_the_next(rig: Rig) -> None:
    first = rig.runner()
    rig.backend.scripts["two", 1] = [("publish", 10), ("do", first.detach), *[("step",)] * 3, ("end", "completed")]
    with pytest.raises(Detached):
        first.run()
    assert rig.outcomes("two") == ["open"] and rig.ledger.holder(rig.clock.time) is None
    assert not rig.kinds("ended"), "the launch is not over"
    assert rig.launch().status == "succeeded"
    assert rig.outcomes("two") == ["completed"] and len(rig.backend.submitted) == 3


def test_a_cancel_outlives_the_driver_that_heard_it(rig: Rig) -> None:
    first = rig.runner()
    rig.backend.deaf = True
    script = [("do", lambda: rig.ledger.ask_cancel(rig.clock.time)), *[("step",)] * 30, ("do", first.detach), *[("step",)] * 30]
    rig.backend.scripts["two", 1] = [*script, ("do", lambda: setattr(rig.backend, "deaf", False)), *[("step",)] * 30]
    with pytest.raises(Detached):
        first.run()
    assert rig.launch().status == "cancelled" and rig.outcomes("two") == ["drained"]
    assert rig.launch().status == "succeeded"
