"""Laws of the driver on a cluster with pools: what waits too long is made in the next one, at its price, and nothing is counted."""

from __future__ import annotations

from decimal import Decimal
from pathlib import Path

import pytest
from driver_rig import Rig, whole
from effect_fates import Crash, When
from pools_rig import FATES, FULL, PRICES, ByPool, check_any_effect, crash, found, in_pools, waiting
from proofs import Proof

from opensora import identity
from orchestrator.accounting.history import History
from orchestrator.accounting.status import take_snapshot
from orchestrator.ledger.records import Placement


def test_what_waits_too_long_is_made_in_the_next_pool_at_its_price(rig: Rig) -> None:
    rig.backend.scripts["one", 1] = rig.backend.scripts["one", 2] = waiting()
    rig.backend.scripts["one", 3] = [("queued", FULL), *[("step",)] * 2500, ("begins",), *whole()]
    began = rig.clock.time
    of = in_pools()
    assert rig.launch(of).status == "succeeded"
    assert found(rig) == [("reserved", "moved", 1), ("on-demand", "moved", 1), ("spot", "completed", 1)]
    assert rig.clock.time - began > 2 * 120 + 240, "in the last pool it waits without end"
    snapshot = take_snapshot(of, History(rig.ledger), rig.clock.time)
    bills = snapshot.stages[0].bill.attempts
    assert [bill.held_s for bill in bills[:2]] == [0, 0] and bills[2].held_s > 0
    assert [bill.usd_per_hour for bill in bills] == [Decimal(PRICES[name]) for name in PRICES]
    assert rig.kinds("observed").count(f"one moves on to pool on-demand: waited 2 min for nodes of pool reserved: {FULL}") == 1


def test_a_stage_names_its_own_order(rig: Rig) -> None:
    rig.backend.scripts["one", 1] = waiting()
    assert rig.launch(in_pools("spot", "reserved")).status == "succeeded"
    assert found(rig) == [("spot", "moved", 1), ("reserved", "completed", 1)]


def test_with_one_pool_it_waits_without_end(rig: Rig) -> None:
    rig.backend.scripts["one", 1] = [("queued", FULL), *[("step",)] * 9000, ("begins",), *whole()]
    assert rig.launch(in_pools("spot")).status == "succeeded"
    assert found(rig) == [("spot", "completed", 1)]
    assert rig.clock.slept > 900


def test_what_gets_its_devices_in_time_stays(rig: Rig) -> None:
    rig.backend.scripts["one", 1] = [("queued", FULL), *[("step",)] * 1100, ("begins",), *[("step",)] * 2000, *whole()]
    assert rig.launch(in_pools()).status == "succeeded"
    assert found(rig) == [("reserved", "completed", 1)]


@pytest.mark.parametrize("end", [("vanish", "preempted"), ("end", "drained"), ("end", "hang")], ids=lambda end: end[1])
def test_after_it_ran_in_another_pool_it_begins_at_the_first_again(rig: Rig, end: tuple[str, str]) -> None:
    rig.backend.scripts["one", 1] = waiting()
    rig.backend.scripts["one", 2] = [("publish", 10), end]
    assert rig.launch(in_pools()).status == "succeeded"
    assert [pool for pool, _, _ in found(rig)] == ["reserved", "on-demand", "reserved"]


def test_moves_are_never_counted_and_pause_nothing(rig: Rig) -> None:
    for number in range(1, 15, 3):
        rig.backend.scripts["one", number] = rig.backend.scripts["one", number + 1] = waiting()
        rig.backend.scripts["one", number + 2] = [("step",), ("vanish", "preempted")]
    assert rig.launch(in_pools(), "one").status == "succeeded"
    ends = [class_ for _, class_, _ in found(rig)]
    assert ends == ["moved", "moved", "preempted"] * 5 + ["completed"]
    moves = rig.kinds("retry")
    assert len(moves) == 15 and not [said for said in moves if "counted" in said]


def test_two_failures_with_moves_between_them_are_still_two(rig: Rig) -> None:
    rig.backend.scripts["one", 1] = [("end", "code")]
    rig.backend.scripts["one", 2] = waiting()
    rig.backend.scripts["one", 3] = [("end", "code")]
    assert rig.launch(in_pools()).status == "failed"
    assert [class_ for _, class_, _ in found(rig)] == ["code", "moved", "code"]


def test_a_person_who_stops_a_waiting_attempt_begins_at_the_first_pool_again(rig: Rig) -> None:
    of = in_pools()
    runner = rig.runner(of)
    rig.backend.scripts["one", 1] = waiting()
    rig.backend.scripts["one", 2] = [("queued", FULL), *[("step",)] * 5, ("do", runner.kill), *[("step",)] * 50]
    assert runner.run().status == "suspended"
    assert rig.launch(of).status == "succeeded"
    assert [pool for pool, _, _ in found(rig)] == ["reserved", "on-demand", "reserved"]


def test_without_pools_nothing_of_them_is_written(rig: Rig) -> None:
    of = in_pools(pools=())
    assert rig.launch(of).status == "succeeded"
    assert found(rig) == [(None, "completed", 1)]
    assert not [key for key in rig.store.list("demo/") if "placement" in key]


def test_a_number_that_a_dead_driver_gave_to_another_pool_is_passed_over(rig: Rig) -> None:
    of = in_pools()
    assert rig.launch(in_pools(stages=1), "one").status == "succeeded"
    (inputs_digest,) = rig.ledger.inputs_of("one")
    changed = of.model_copy(
        update={"stages": (of.stages[0].model_copy(update={"config": of.stages[0].config.model_copy(update={"seed": 9})}),)}
    )
    runner = rig.runner(changed)
    name = identity.name(changed.stages[0].config, 1, None)
    assert name != inputs_digest
    rig.ledger.write_placement("one", name, 1, Placement(pool="a-pool-of-before", nodes_asked=1))
    assert runner.run().status == "succeeded"
    assert rig.ledger.intent("one", name, 1) is None
    placed = rig.ledger.placement("one", name, 2)
    assert placed is not None and placed.pool == "reserved"


# --- Drivers that come and go ----------------------------------------------------------------------------------------------------------


def test_the_time_of_a_pool_counts_through_drivers_that_come_and_go(rig: Rig) -> None:
    """Ten drivers, none of which lives for half of the time."""
    of = in_pools()
    rig.backend.scripts["one", 1] = [("queued", FULL), *[entry for _ in range(12) for entry in [*[("step",)] * 150, ("do", crash)]]]
    began = rig.clock.time
    for _ in range(20):
        try:
            result = rig.launch(of)
            break
        except Crash:
            rig.clock.time += 16  # until its lease is over
    assert result.status == "succeeded"
    assert found(rig)[0] == ("reserved", "moved", 1) and found(rig)[1][0] == "on-demand"
    (inputs_digest,) = rig.ledger.inputs_of("one")
    moved = rig.ledger.outcome("one", inputs_digest, 1)
    assert moved is not None and 120 <= moved.ended - began < 160


def test_what_waits_in_a_pool_that_is_no_longer_named_is_made_in_the_first_that_is(rig: Rig) -> None:
    rig.backend.scripts["one", 1] = [("queued", FULL), ("do", crash), *[("step",)] * 5000]
    rig.backend.scripts["one", 2] = [("queued", FULL), ("begins",), *whole()]
    with pytest.raises(Crash):
        rig.launch(in_pools("reserved", "on-demand"))
    rig.clock.time += 16  # until its lease is over
    assert rig.launch(in_pools("spot")).status == "succeeded"
    assert found(rig) == [("reserved", "moved", 1), ("spot", "completed", 1)]


def placement_file(rig: Rig, number: int) -> Path:
    (inputs_digest,) = rig.ledger.inputs_of("one")
    return rig.store.root / rig.ledger.keys.placement("one", inputs_digest, number)


@pytest.mark.parametrize("damage", ["half of it", "none of it"])
def test_an_attempt_whose_pool_no_record_names_is_made_in_the_first_if_it_waits(rig: Rig, damage: str) -> None:
    rig.backend.scripts["one", 1] = waiting()
    rig.backend.scripts["one", 2] = [("queued", FULL), ("do", crash), *[("step",)] * 5000]
    rig.backend.scripts["one", 3] = [("queued", FULL), ("begins",), *whole()]
    with pytest.raises(Crash):
        rig.launch(in_pools())
    file = placement_file(rig, 2)
    file.write_bytes(file.read_bytes()[:20]) if damage == "half of it" else file.unlink()
    rig.clock.time += 16  # until its lease is over
    assert rig.launch(in_pools()).status == "succeeded"
    lost = rig.ledger.outcome("one", *rig.ledger.inputs_of("one"), 2)
    assert lost is not None and lost.class_ == "moved" and lost.reason.startswith("the ledger does not say in which pool it is")
    assert rig.backend.submitted[-1].endswith("/a3"), "nothing lives beside it"
    said = [one for one in rig.kinds("observed") if "placement.json is half written" in one]
    assert len(said) == (damage == "half of it")


def test_an_attempt_that_trains_goes_on_without_a_record_of_its_pool(rig: Rig) -> None:
    rig.backend.scripts["one", 1] = [("publish", 10), ("do", crash), *whole()]
    with pytest.raises(Crash):
        rig.launch(in_pools())
    placement_file(rig, 1).write_text("{")
    rig.clock.time += 16  # until its lease is over
    assert rig.launch(in_pools()).status == "succeeded"
    assert rig.outcomes("one") == ["completed"]


def test_a_number_whose_place_cannot_be_read_is_passed_over(rig: Rig) -> None:
    of = in_pools()
    (inputs_digest, *_) = [identity.name(of.stages[0].config, 1, None)]
    rig.ledger.write_placement("one", inputs_digest, 1, Placement(pool="spot", nodes_asked=1))
    (rig.store.root / rig.ledger.keys.placement("one", inputs_digest, 1)).write_text("{")
    assert rig.launch(of).status == "succeeded"
    assert rig.ledger.intent("one", inputs_digest, 1) is None and rig.ledger.intent("one", inputs_digest, 2) is not None


def two_pools(rig: Rig) -> None:
    goes = [("queued", FULL), *[("step",)] * 20, ("begins",), *whole()]
    rig.backend.scripts = ByPool(rig, **{"reserved": waiting(), "on-demand": goes})


def went_on(rows: list[tuple[str | None, str, int]]) -> bool:
    """The first pool, for which it waited, then the second, which it had. A driver that was killed may have left an attempt that never
    began, which changes nothing of that."""
    began = [(pool, class_) for pool, class_, _ in rows if class_ != "lost"]
    return began == [("reserved", "moved"), ("on-demand", "completed")]


@pytest.mark.long
def test_a_driver_killed_at_any_effect_of_a_move_leads_to_the_same_pool(tmp_path: Path) -> None:
    of = in_pools("reserved", "on-demand")
    assert check_any_effect(tmp_path, of, two_pools, FATES, went_on) > 18


@pytest.mark.prove("effects")
@pytest.mark.parametrize("fate", FATES, ids=[when for when, _ in FATES])
def test_effects_of_a_move_each_with_each_fate(tmp_path: Path, fate: tuple[When, bool], proof: Proof) -> None:
    of = in_pools("reserved", "on-demand")
    proof.count(check_any_effect(tmp_path, of, two_pools, [fate], went_on), note=f"from one pool to the next, {fate[0]}")
