"""Pools and nodes in a model world in which anything may happen in any order: where `decide` may make an attempt, and where never."""

from __future__ import annotations

import itertools

import pytest
from attempt_views import CONFIG, pipeline
from driver_world import World
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from pools_rig import profile
from proofs import Proof

from orchestrator.driver.decide import Finish, Wait
from orchestrator.driver.facts import AttemptView
from orchestrator.ledger.records import ExitClass
from orchestrator.recipe.pipeline import Pipeline, Resources

NODES, LEAST, SHRINK_S, WAIT_S = 8, 3, 300.0, 120.0
ENDS: list[ExitClass] = ["completed", "completed", "drained", "lost", "preempted", "hang"]


def shrinking(*, pools: bool) -> Pipeline:
    made = pipeline(("one", None), ("two", "one"), backend="kubernetes", max_attempts=1000)
    resources = Resources(nodes=NODES, min_nodes=LEAST, shrink_after_minutes=SHRINK_S / 60, device="cpu-core")
    stages = tuple(one.model_copy(update={"spec": one.spec.model_copy(update={"resources": resources})}) for one in made.stages)
    return made.model_copy(update={"stages": stages, "cluster": profile() if pools else profile(pools=())})


class AnyPlacing(RuleBasedStateMachine):
    world: World

    @initialize(pools=st.booleans())
    def build(self, pools: bool) -> None:
        self.world = World(shrinking(pools=pools), begins_at_once=False)
        self.order = self.world.pipeline.pools_of(self.world.pipeline.stage("one"))

    @rule()
    def tick(self) -> None:
        self.world.tick()

    @rule(effects=st.integers(0, 3))
    def driver_is_killed_within_a_round(self, effects: int) -> None:
        self.world.tick(effects)
        self.world.relaunch(survivors=True)

    @precondition(lambda self: self.world.waiting())
    @rule(data=st.data())
    def has_its_nodes(self, data: st.DataObject) -> None:
        self.world.begin(data.draw(st.sampled_from(self.world.waiting())))

    @precondition(lambda self: set(self.world.running()) - set(self.world.waiting()))
    @rule(data=st.data(), step=st.integers(1, CONFIG.steps - 1))
    def publishes(self, data: st.DataObject, step: int) -> None:
        self.world.publish(data.draw(st.sampled_from(sorted(set(self.world.running()) - set(self.world.waiting())))), step, complete=False)

    @precondition(lambda self: set(self.world.running()) - set(self.world.waiting()))
    @rule(data=st.data(), class_=st.sampled_from(ENDS))
    def ends(self, data: st.DataObject, class_: ExitClass) -> None:
        self.world.end(data.draw(st.sampled_from(sorted(set(self.world.running()) - set(self.world.waiting())))), class_)

    @rule(data=st.data(), there=st.integers(0, NODES + 2))
    def nodes_come_and_go(self, data: st.DataObject, there: int) -> None:
        self.world.nodes[data.draw(st.sampled_from(self.order or (None,)))] = there

    @rule(seconds=st.floats(0, 400))
    def time_passes(self, seconds: float) -> None:
        self.world.now += seconds

    @invariant()
    def at_most_one_live_attempt_a_stage(self) -> None:
        live = [key[0] for key in self.world.running()]
        assert len(live) == len(set(live)), live

    @invariant()
    def every_attempt_is_where_it_may_be(self) -> None:
        for name in ("one", "two"):
            made = [one for one in self.world.made if one[0].stage == name]
            for before, (view, when, known) in zip([None, *(one[0] for one in made)], made, strict=False):
                self._check_pool(before, view)
                self._check_nodes(view, when, known)

    def _check_pool(self, before: AttemptView | None, view: AttemptView) -> None:
        assert view.placement is not None
        pool = view.placement.pool
        if not self.order or pool == self.order[0]:
            assert pool is None or self.order
            return
        assert before is not None, "the first attempt is made in the first pool"
        last = self.world.attempts[before.stage, before.inputs_digest, before.number].attempt
        assert last.placement is not None and last.outcome is not None and pool is not None
        if last.placement.pool == pool:
            assert last.outcome.class_ in ("moved", "lost") and last.outcome.next_pool is None
        else:
            assert self.order.index(last.placement.pool or "") + 1 == self.order.index(pool)
            assert last.outcome.class_ == "moved" and last.outcome.bound is None
            assert last.outcome.ended - last.made >= WAIT_S, "it left its pool before its time"

    def _check_nodes(self, view: AttemptView, when: float, known: int) -> None:
        """`known`: how many counts were written down when it was made."""
        assert view.placement is not None
        nodes, about = view.nodes, (view.stage, view.placement.pool)
        assert nodes == NODES or (LEAST <= nodes < NODES and NODES % nodes == 0)
        if nodes == NODES:
            return
        told = [(time, there) for time, stage, pool, there in self.world.counts[:known] if (stage, pool) == about]
        short = list(itertools.takewhile(lambda one: one[1] < NODES, reversed(told)))
        assert short and when - short[-1][0] >= SHRINK_S, "it shrank before its time"
        assert nodes <= short[0][1], "on more nodes than there were"

    def teardown(self) -> None:
        """When nodes come back and faults stop, one more launch ends with every stage committed on all its nodes."""
        if not hasattr(self, "world"):
            return
        world = self.world
        world.nodes.clear()
        world.relaunch(survivors=True)
        for _ in range(16 * len(world.pipeline.stages) + 2 * len(world.attempts)):
            actions = world.tick()
            if world.finished is not None:
                break
            if isinstance(actions[0], Wait):
                for key in world.waiting():
                    world.begin(key)
                for key in world.running():
                    world.end(key, "completed")
                world.now += 60
        assert world.finished == Finish("succeeded", 0, "every stage is committed"), (world.finished, actions)
        assert not world.running()


AnyPlacing.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck))
TestAnyPlacing = AnyPlacing.TestCase


@pytest.mark.prove("any-placing")
def test_any_placing_at_length(proof: Proof) -> None:
    from hypothesis.stateful import run_state_machine_as_test

    run_state_machine_as_test(
        AnyPlacing, settings=settings(max_examples=1000, stateful_step_count=60, deadline=None, suppress_health_check=list(HealthCheck))
    )
    proof.count(1000, "histories of at most 60 steps, with pools and nodes that come and go")
