"""Which numbers of nodes keep a global batch, and when an attempt is made elsewhere: laws over random stages and times."""

from __future__ import annotations

from dataclasses import replace

import pytest
from attempt_views import CONFIG, attempt, outcome, pipeline, report, see
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from pools_rig import profile

from opensora import identity
from opensora.config import Parallel
from orchestrator.driver import placing
from orchestrator.driver.decide import CloseAttempt, decide
from orchestrator.driver.facts import AttemptView, Onward, Room, Size, StageView
from orchestrator.ledger.records import Placement
from orchestrator.ports import Life
from orchestrator.recipe.pipeline import Resources, Stage, StageSpec

LAW = settings(max_examples=200, deadline=None, derandomize=True)
ORDER = ("reserved", "on-demand", "spot")


def stage(nodes: int, devices: int, least: int | None, *, shared: int = 1, accumulate: int = 1, batch: int = 8) -> Stage:
    config = CONFIG.model_copy(update={"batch_size": batch, "accumulate": accumulate, "parallel": Parallel(sequence=shared)})
    resources = Resources(nodes=nodes, devices_per_node=devices, min_nodes=least, device="cpu-core")
    return Stage(spec=StageSpec(name="one", config="x.yaml", resources=resources), config=config)


def fits(config: object, devices: int) -> str:
    return ""


def test_eight_nodes_of_eight_at_512_are_four_with_two_parts() -> None:
    of = stage(8, 8, 2, batch=8)
    assert identity.global_batches(of.config, 64) == (512,)
    assert placing.sizes(of, fits) == (Size(2, 4), Size(4, 2))


@LAW
@given(
    nodes=st.integers(1, 16),
    devices=st.integers(1, 8),
    least=st.integers(1, 16),
    shared=st.sampled_from([1, 2, 4]),
    accumulate=st.integers(1, 6),
)
def test_every_size_has_the_same_identity_and_none_that_would_is_left_out(
    nodes: int, devices: int, least: int, shared: int, accumulate: int
) -> None:
    assume(least <= nodes and nodes * devices % shared == 0)
    of = stage(nodes, devices, least, shared=shared, accumulate=accumulate)
    found = placing.sizes(of, fits)
    name = identity.name(of.config, of.devices, None)
    assert [size.nodes for size in found] == sorted({size.nodes for size in found})
    for size in found:
        assert least <= size.nodes < nodes and size.nodes * devices % shared == 0
        assert identity.name(of.config.model_copy(update={"accumulate": size.accumulate}), size.nodes * devices, None) == name
    batch = identity.global_batches(of.config, of.devices)
    for count in set(range(least, nodes)) - {size.nodes for size in found}:
        ranks = count * devices  # the batch of one part of a step is then no divisor of the global batch
        assert ranks % shared or batch[0] % identity.global_batches(of.config.model_copy(update={"accumulate": 1}), ranks)[0]


def seen(of: Stage, one: AttemptView, room: Room | None = None) -> StageView:
    return StageView("one", "in", attempts=(one,), room=room, sizes=placing.sizes(of, fits))


def waiting(pool: str, made: float, nodes: int = 8) -> AttemptView:
    life = Life("running", waits="0/9 nodes are available", waits_for="capacity", since=made)
    return replace(attempt(1, life=life), made=made, nodes=nodes, placement=Placement(pool=pool, nodes_asked=8))


@LAW
@given(pool=st.sampled_from(ORDER), waited=st.floats(0, 10_000), wait=st.floats(0.1, 100))
def test_a_pool_is_left_when_its_time_is_over_and_the_last_one_never(pool: str, waited: float, wait: float) -> None:
    content = profile().model_dump(mode="json")
    content["pools"] = [one | {"wait_minutes": wait} for one in content["pools"]]
    of, cluster = stage(8, 1, None), type(profile()).model_validate(content)
    change = placing.change(of, cluster, ORDER, seen(of, waiting(pool, 1000.0)), waiting(pool, 1000.0), 1000.0 + waited)
    if pool == "spot" or 1000.0 + waited < 1000.0 + 60 * wait:
        assert change is None
    else:
        assert change is not None and change.pool == ORDER[ORDER.index(pool) + 1] and not change.save


@LAW
@given(
    there=st.integers(0, 12),
    least=st.integers(1, 8),
    short=st.floats(0, 2000),
    now_on=st.integers(1, 8),
    published=st.booleans(),
    trains=st.booleans(),
)
def test_nodes_are_left_out_only_after_the_time_and_taken_back_only_from_a_safe_checkpoint(
    there: int, least: int, short: float, now_on: int, published: bool, trains: bool
) -> None:
    of = stage(8, 1, least)
    room = Room("reserved", there, min(there, 8), 1000.0 if there < 8 else None)
    life = Life("running", bound=900.0) if trains else waiting("reserved", 1000.0).life
    one = replace(waiting("reserved", 1000.0, now_on), life=life, published=10 if published else 0)
    view, now = seen(of, one, room), 1000.0 + short
    change = placing.change(of, profile(), ("reserved",), view, one, now)
    size = placing.wanted_size(of, view, "reserved", now)
    assert size.nodes == 8 or (there < 8 and short >= 60 * of.spec.resources.shrink_after_minutes and least <= size.nodes <= there)
    assert size.nodes * size.accumulate == 8
    if change is None:
        assert size.nodes == now_on or trains
        return
    assert change.pool is None and change.save == trains
    if trains:
        assert published and size.nodes > now_on, "what trains is never made smaller, and never stopped before it has saved anything"


@LAW
@given(classes=st.lists(st.sampled_from(["moved", "preempted", "drained", "code", "lost"]), min_size=1, max_size=6), data=st.data())
def test_only_what_moved_leads_to_another_pool_than_the_first(classes: list[str], data: st.DataObject) -> None:
    attempts, pool = [], "reserved"
    for number, class_ in enumerate(classes, 1):
        following = data.draw(st.sampled_from([None, *ORDER[ORDER.index(pool) + 1 :]])) if class_ == "moved" else None
        ended = outcome(class_).model_copy(update={"next_pool": following})  # type: ignore[arg-type]
        attempts.append(replace(attempt(number), outcome=ended, placement=Placement(pool=pool, nodes_asked=1)))
        found, why = placing.next_pool(ORDER, attempts)
        if class_ != "moved":
            assert (found, why) == ("reserved", "")
        else:
            assert found == (following or pool)
        pool = found or "reserved"


@pytest.mark.parametrize("gone", ["moved", "lost"])
def test_a_pool_that_the_profile_lost_leads_to_the_first(gone: str) -> None:
    ended = outcome(gone).model_copy(update={"next_pool": "of-before", "reason": placing.NEVER_STARTED})  # type: ignore[arg-type]
    one = replace(attempt(1), outcome=ended, placement=Placement(pool="of-before", nodes_asked=1))
    assert placing.next_pool(ORDER, [one]) == ("reserved", "")


def test_what_is_written_of_a_count_is_read_back() -> None:
    for pool in ("reserved", None):
        room = Room(pool, 7)
        text = placing.count_text(room, 8)
        found = placing.COUNTED.fullmatch(text)
        assert found is not None and (found[1], int(found[2]), int(found[3])) == (pool, 7, 8)
        assert placing.count_text(replace(room, said=7), 8) == "" == placing.count_text(Room(pool, 9), 8)
        assert placing.count_text(Room(pool, 9, said=7), 8).endswith("has 8 of 8 nodes")


def test_nodes_are_missing_since_the_first_count_in_a_row_that_missed_any() -> None:
    room = None
    for time, there, since in [(10.0, 7, 10.0), (20.0, 5, 10.0), (30.0, 8, None), (40.0, 6, 40.0), (50.0, 7, 40.0)]:
        room = placing.counted(room, "reserved", there, 8, time)
        assert (room.said, room.short_since) == (there, since)
    assert placing.counted(room, "spot", 7, 8, 60.0).short_since == 60.0, "of another pool nothing is known"


@pytest.mark.parametrize(
    ("onward", "class_"),
    [
        (Onward("waited", "spot", done=False), "preempted"),
        (Onward("waited", "spot", done=True), "preempted"),
        (Onward("nodes are there again", None, done=True), "moved"),
        (Onward("nodes are there again", None, done=False), "moved"),
        (None, "preempted"),
    ],
)
def test_an_attempt_that_got_its_nodes_after_all_and_saved_has_not_moved_to_another_pool(onward: Onward | None, class_: str) -> None:
    """The driver that wanted it elsewhere died before it asked; somebody else made it leave later."""
    life = Life("ended", 900.0, 999.0, 143)
    one = replace(attempt(1, life=life, traces=True), report=report("drained", 10), onward=onward)
    (action,) = decide(pipeline(("one", None), backend="kubernetes"), see(one), 1000.0)
    assert isinstance(action, CloseAttempt) and action.class_ == class_
    assert action.next_pool is None


@pytest.mark.parametrize(
    ("done", "bound", "class_"), [(True, None, "moved"), (False, None, "moved"), (True, 900.0, "moved"), (False, 900.0, "lost")]
)
def test_an_attempt_without_a_word_has_moved_if_it_was_asked_or_never_held_anything(done: bool, bound: float | None, class_: str) -> None:
    one = replace(attempt(1, life=Life("ended", bound, 999.0)), onward=Onward("waited", "spot", done=done))
    (action,) = decide(pipeline(("one", None), backend="kubernetes"), see(one), 1000.0)
    assert isinstance(action, CloseAttempt) and (action.class_, action.next_pool) == (class_, "spot" if class_ == "moved" else None)
