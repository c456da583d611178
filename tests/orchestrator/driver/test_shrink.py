"""Laws of a stage that goes on with fewer nodes, and with all again once they are there: one global batch, and nothing is counted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from driver_rig import Rig, Script, whole
from effect_fates import When
from pools_rig import FATES, FULL, Counter, check_any_effect, crash, found, in_pools, waiting
from proofs import Proof

from opensora import identity
from orchestrator.ledger import lineage
from orchestrator.recipe.pipeline import Pipeline

NODES = {"nodes": 8, "devices_per_node": 1, "min_nodes": 4, "shrink_after_minutes": 2}


def shrinking(*pools: str, **changes: Any) -> Pipeline:
    return in_pools(*pools, resources=NODES | changes, **({} if pools else {"pools": ()}))


def nodes(rig: Rig, count: int, pool: str | None = None) -> tuple[str, Any]:
    """An entry of a script: from now on there are so many nodes."""
    assert isinstance(rig.nodes, Counter)
    return "do", lambda: rig.nodes.nodes.__setitem__(pool, count)  # type: ignore[union-attr]


def test_seven_of_eight_nodes_are_four_at_the_same_global_batch(rig: Rig) -> None:
    rig.nodes = Counter({None: 7})
    rig.backend.scripts["one", 1] = waiting()
    of, began = shrinking(), rig.clock.time
    assert rig.launch(of).status == "succeeded"
    assert found(rig) == [(None, "moved", 8), (None, "completed", 4)]
    (inputs_digest,) = rig.ledger.inputs_of("one")
    before, after = (rig.ledger.intent("one", inputs_digest, number) for number in (1, 2))
    assert before is not None and after is not None and after.config.accumulate == 2 * before.config.accumulate
    assert identity.name(after.config, 4, None) == identity.name(before.config, 8, None) == inputs_digest
    assert after.created - began >= 120
    said = rig.kinds("observed")
    assert said.count("one the cluster has 7 of 8 nodes") == 1
    why = "the cluster has had fewer than 8 nodes for 2 min, now 7: goes on with 4 at the same global batch"
    assert said.count(f"one moves to another number of nodes: {why}") == 1
    placed = rig.ledger.placement("one", inputs_digest, 2)
    assert placed is not None and (placed.nodes_asked, placed.why) == (8, why)
    assert rig.outcomes("one") == ["moved", "completed"]


def test_it_grows_back_when_the_nodes_are_there_and_a_checkpoint_is_safe(rig: Rig) -> None:
    rig.nodes = Counter({None: 7})
    rig.backend.scripts["one", 1] = waiting()
    rig.backend.scripts["one", 2] = [nodes(rig, 8), *[("step",)] * 900, ("publish", 10), *[("step",)] * 900]
    of = shrinking()
    assert rig.launch(of).status == "succeeded"
    assert found(rig) == [(None, "moved", 8), (None, "moved", 4), (None, "completed", 8)]
    (inputs_digest,) = rig.ledger.inputs_of("one")
    last = rig.ledger.intent("one", inputs_digest, 3)
    assert last is not None and last.resume is not None and last.resume.step == 11, "it saved before it left"
    assert last.config.accumulate == 1
    assert "one the cluster has 8 of 8 nodes" in rig.kinds("observed")
    *_, link = lineage.links(rig.ledger, "one", inputs_digest, full=False)
    assert "steps 1-11 on 4 of 8 nodes" in link.remarks, link.remarks


def test_nodes_that_others_hold_are_there(rig: Rig) -> None:
    rig.nodes = Counter({None: 8})
    rig.backend.scripts["one", 1] = [("queued", FULL), *[("step",)] * 6000, ("begins",), *whole()]
    assert rig.launch(shrinking()).status == "succeeded"
    assert found(rig) == [(None, "completed", 8)]


def test_what_is_short_for_a_moment_only_waits(rig: Rig) -> None:
    rig.nodes = Counter({None: 7})
    short_again = [nodes(rig, 7), *[("step",)] * 900, nodes(rig, 8), *[("step",)] * 600]
    rig.backend.scripts["one", 1] = [
        ("queued", FULL),
        *[("step",)] * 900,
        nodes(rig, 8),
        *[("step",)] * 600,
        *short_again,
        ("begins",),
        *whole(),
    ]
    assert rig.launch(shrinking()).status == "succeeded"
    assert found(rig) == [(None, "completed", 8)]


@pytest.mark.parametrize(("there", "said"), [(3, "the cluster has 3, and min_nodes is 4"), (7, "does not divide over 5 to 7 nodes")])
def test_below_min_nodes_or_where_nothing_divides_it_waits_and_says_why(rig: Rig, there: int, said: str) -> None:
    rig.nodes = Counter({None: there})
    rig.backend.scripts["one", 1] = [("queued", FULL), *[("step",)] * 6000, nodes(rig, 8), *[("step",)] * 600, ("begins",), *whole()]
    assert rig.launch(shrinking(min_nodes=4 if there < 4 else 5)).status == "succeeded"
    assert found(rig) == [(None, "completed", 8)]
    assert any(said in line for line in rig.kinds("observed")), rig.kinds("observed")


def test_where_memory_does_not_suffice_it_waits_and_says_why(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    from orchestrator.recipe.prices import Hardware, load_prices

    prices = load_prices()
    small = Hardware(memory_gib=0.001, link_gb_s=1, host_gb_s=1, source="a test")
    device = prices.devices["cpu-core"].model_copy(update={"hardware": small})
    rig.nodes = Counter({None: 7})
    rig.backend.scripts["one", 1] = [("queued", FULL), *[("step",)] * 4000, nodes(rig, 8), *[("step",)] * 600, ("begins",), *whole()]
    of = shrinking()
    runner = rig.runner(of)
    runner.prices = prices.model_copy(update={"devices": {**prices.devices, "cpu-core": device}})
    assert runner.run().status == "succeeded"
    assert found(rig) == [(None, "completed", 8)]
    assert any("GB of each of 4 devices, which have 0.0 GB" in line for line in rig.kinds("observed")), rig.kinds("observed")


def test_without_the_right_to_see_nodes_nothing_shrinks_and_that_is_said(rig: Rig) -> None:
    rig.nodes = Counter({None: 4}, forbidden=True)
    rig.backend.scripts["one", 1] = [("queued", FULL), *[("step",)] * 4000, ("begins",), *whole()]
    assert rig.launch(shrinking()).status == "succeeded"
    assert found(rig) == [(None, "completed", 8)]
    assert sum("may not list nodes" in line for line in rig.kinds("observed")) == 1


def test_a_stage_that_trains_on_all_its_nodes_counts_none(rig: Rig) -> None:
    counter = rig.nodes = Counter()
    rig.backend.scripts["one", 1] = [*[("step",)] * 600, *whole()]
    assert rig.launch(shrinking()).status == "succeeded"
    assert counter.asked <= 2, "before it was made"


def test_whichever_time_is_over_first_counts(rig: Rig) -> None:
    rig.nodes = Counter({"reserved": 7, "on-demand": 8})
    rig.backend.scripts["one", 1] = waiting()
    assert rig.launch(shrinking("reserved", "on-demand", shrink_after_minutes=5)).status == "succeeded"
    assert found(rig) == [("reserved", "moved", 8), ("on-demand", "completed", 8)]


def test_fewer_nodes_of_the_first_pool_come_before_the_next_pool(rig: Rig) -> None:
    rig.nodes = Counter({"reserved": 7, "on-demand": 8})
    rig.backend.scripts["one", 1] = waiting()
    assert rig.launch(shrinking("reserved", "on-demand", shrink_after_minutes=1)).status == "succeeded"
    assert found(rig) == [("reserved", "moved", 8), ("reserved", "completed", 4)]


def test_preempted_while_it_is_short_it_goes_on_with_fewer_at_once(rig: Rig) -> None:
    rig.nodes = Counter({None: 7})
    rig.backend.scripts["one", 1] = waiting()
    rig.backend.scripts["one", 2] = [("publish", 10), ("vanish", "preempted")]
    assert rig.launch(shrinking()).status == "succeeded"
    assert found(rig) == [(None, "moved", 8), (None, "preempted", 4), (None, "completed", 4)]


def test_since_when_nodes_are_missing_counts_through_drivers_that_come_and_go(rig: Rig) -> None:
    rig.nodes = Counter({None: 7})
    from effect_fates import Crash

    rig.backend.scripts["one", 1] = [("queued", FULL), *[entry for _ in range(12) for entry in [*[("step",)] * 150, ("do", crash)]]]
    of = shrinking(shrink_after_minutes=3)
    for _ in range(20):
        try:
            result = rig.launch(of)
            break
        except Crash:
            rig.clock.time += 16
    assert result.status == "succeeded"
    assert found(rig) == [(None, "moved", 8), (None, "completed", 4)]
    (inputs_digest,) = rig.ledger.inputs_of("one")
    moved = rig.ledger.outcome("one", inputs_digest, 1)
    assert moved is not None and 180 <= moved.ended - 1000 < 220


def shrinks_and_grows(rig: Rig) -> None:
    rig.nodes = Counter({None: 7})
    by_nodes = {
        8: [("queued", FULL), ("step",), ("step",), *waiting()[1:]],
        4: [nodes(rig, 8), *[("step",)] * 20, ("publish", 10), *[("step",)] * 400],
    }

    class ByNodes(dict[tuple[str, int], Script]):
        def get(self, key: tuple[str, int], default: Any = None) -> Script:
            (inputs_digest,) = rig.ledger.inputs_of(key[0])
            intent = rig.ledger.intent(key[0], inputs_digest, key[1])
            assert intent is not None
            return whole() if intent.resume is not None and intent.nodes == 8 else by_nodes[intent.nodes]

    rig.backend.scripts = ByNodes()


def shrank_and_grew(rows: list[tuple[str | None, str, int]]) -> bool:
    """A driver that was dead for the time after which a stage shrinks begins with fewer nodes at once."""
    ends = [(class_, nodes) for _, class_, nodes in rows if class_ != "lost"]
    return ends in ([("moved", 8), ("moved", 4), ("completed", 8)], [("moved", 4), ("completed", 8)])


@pytest.mark.long
def test_a_driver_killed_at_any_effect_of_shrinking_and_growing_comes_to_the_same_nodes(tmp_path: Path) -> None:
    of = shrinking(shrink_after_minutes=0.4)
    assert check_any_effect(tmp_path, of, shrinks_and_grows, FATES, shrank_and_grew) > 25


@pytest.mark.prove("effects")
@pytest.mark.parametrize("fate", FATES, ids=[when for when, _ in FATES])
def test_effects_of_shrinking_and_growing_each_with_each_fate(tmp_path: Path, fate: tuple[When, bool], proof: Proof) -> None:
    of = shrinking(shrink_after_minutes=0.4)
    proof.count(check_any_effect(tmp_path, of, shrinks_and_grows, [fate], shrank_and_grew), note=f"fewer nodes and all again, {fate[0]}")
